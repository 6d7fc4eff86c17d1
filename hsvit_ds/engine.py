"""The DeepSpeed engine: one optimizer step of A micro batches x P passes with one gradient reduction."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import hsvit_kernels

from . import optimizer as optimizers
from .errors import RefusedError
from .grid import Grid
from .models.batchnorm import BatchNorm2d, Statistics, move_running_statistics, set_statistics
from .zero import Shards, shards, step_state


@dataclass(frozen=True, kw_only=True)
class Config:
    zero_stage: int = 1
    """What replicas share: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters."""
    precision: str = "auto"
    """"fp32", "bf16" (torch autocast over fp32 parameters), or "auto": bf16 on GPUs, fp32 on CPUs."""
    kernels: str = "auto"
    """"triton" or "reference" for every operation of hsvit_kernels, or "auto": Triton where it was measured faster."""
    compile: bool = False
    """torch.compile the model's training graph; evaluation stays eager."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped for a non-finite gradient before the run stops."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own keys, passed through; refused where they contradict a derived one."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage = {self.zero_stage}: must be 0, 1, 2 or 3")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f'precision = "{self.precision}": must be "auto", "fp32" or "bf16"')
        if self.kernels not in hsvit_kernels.CHOICES:
            raise ValueError(f'kernels = "{self.kernels}": must be one of {", ".join(hsvit_kernels.CHOICES)}')
        if self.max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps = {self.max_skipped_steps}: must not be negative")


@dataclass(frozen=True)
class BatchStatistics:
    """How BatchNorm's runs lie in a micro batch; derived by the recipe from `run.bn_batch`."""

    runs: int
    """Runs in one micro batch."""
    synced: bool
    """One run spans the micro batches of all replicas."""


@dataclass(frozen=True)
class StepResult:
    loss: Tensor
    """Mean loss of this rank's micro batches, on the device."""
    grad_norm: float
    """Global norm before clipping; not finite for a skipped step."""
    applied: bool


Passes = Callable[[], Iterator[Iterable[Tensor]]]
"""For each micro batch, the losses of its passes, each computed when asked for."""


def deepspeed_config(config: Config, clip: float, bf16: bool, micro_batch: int) -> dict[str, Any]:
    """What DeepSpeed is told; the expert keys are merged in, and refused where they contradict."""
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # accumulation and the loss's 1/A are the engine's own
        "gradient_clipping": clip if config.zero_stage else 0.0,  # 1.0 when unset; stage 0 clips here
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if bf16:
        # An empty list keeps the reduction of gradients in fp32; it does not touch what autocast computes in bf16.
        derived["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return _merge(derived, config.deepspeed, "engine.deepspeed")


def _merge(derived: dict[str, Any], expert: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in expert.items():
        if isinstance(value, dict) and isinstance(derived.get(key), dict):
            merged[key] = _merge(derived[key], value, f"{where}.{key}")
        elif key in derived and derived[key] != value:
            raise RefusedError(
                f"{where}.{key} = {value!r} contradicts {derived[key]!r}, which is derived from the recipe; "
                "set the recipe's own key"
            )
        else:
            merged[key] = value
    return merged


class Engine:
    """A model under DeepSpeed on a grid.

    Args:
        model: on the CPU, marked where its parameters differ inside a replica.
        batch_statistics: how BatchNorm's runs lie in a micro batch of `micro_batch`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        optimizer_config: optimizers.Config,
        grid: Grid,
        *,
        micro_batch: int,
        accumulation: int,
        batch_statistics: BatchStatistics,
        bf16: bool,
    ) -> None:
        self.config, self.grid, self.accumulation = config, grid, accumulation
        try:
            hsvit_kernels.force(config.kernels, grid.device)
        except ValueError as error:
            raise RefusedError(f"engine: {error}") from None
        self.clip = optimizer_config.clip
        if grid.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # silences a warning on every rank
        import deepspeed  # here, as it takes 6 s: a recipe is read and refused without it
        from deepspeed.utils import groups as deepspeed_groups

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Otherwise DeepSpeed compiles a collective at start-up (30 s, needs g++) that training never uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed would make this group itself, with no timeout that could be set.
        deepspeed_groups._WORLD_GROUP = grid.world_group
        deepspeed.init_distributed(grid.backend, dist_init_required=False)
        model.to(grid.device)
        self.parameter_groups = optimizers.parameter_groups(model, optimizer_config)
        self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizers.build(self.parameter_groups, optimizer_config),
            config=deepspeed_config(config, self.clip, bf16, micro_batch),
            mpu=grid,
            dist_init_required=False,
        )
        self.module: nn.Module = self.deepspeed.module
        self.step_state = step_state(self.module)
        self.shards: Shards = shards(config.zero_stage, self.module, self.optimizer, grid)
        synced = batch_statistics.synced and grid.replicas > 1
        set_statistics(self.module, Statistics(batch_statistics.runs, grid.norms if synced else None))
        self.runs_differ = grid.norms if grid.replicas > 1 and not synced else None
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        if config.compile:
            self.deepspeed.compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def traffic(self, steps: int) -> dict[str, float]:
        """Bytes a step that this rank gave to collectives since the last call, `steps` steps ago, by what they were:
        CLS sums, BatchNorm's statistics, images, and gradients (by count: one fp32 reduction a step)."""
        trained = sum(f.shape.numel() for fragments in self.shards.layout for f in fragments)
        return {
            "comm/exchange_bytes": self.grid.exchanges.take() / steps,
            "comm/norm_bytes": self.grid.norms.take() / steps,
            "comm/data_bytes": self.grid.images.take() / steps,
            "comm/gradient_bytes": 4.0 * trained if self.grid.replicas > 1 else 0.0,
        }

    def step(self, passes: Passes, count: int, lr: float, step: int) -> StepResult:
        """Run every pass of every micro batch, reduce once, clip, step.

        Args:
            passes: gives the step's micro batches anew; see `Passes`.
            count: passes of a micro batch (P).
            lr: learning rate of this step. step: its number, for messages.
        """
        self.module.train()
        self.step_state.gathers = True
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses: list[Tensor] = []
        last = self.accumulation * count - 1
        with self._one_reduction():
            for micro in passes():
                for loss in micro:
                    if self.config.zero_stage == 0:  # where coalescing raises
                        self.deepspeed.set_gradient_accumulation_boundary(len(losses) == last)
                    self.step_state.last = len(losses) == last
                    self.deepspeed.backward(loss / self.accumulation)
                    losses.append(loss.detach().float())
        applied, norm = self._update()
        self.step_state.clear()
        self.step_state.gathers = False
        move_running_statistics(self.module, applied, self.runs_differ)
        loss = torch.stack(losses).sum() / self.accumulation
        if not applied:
            self._skip(passes, loss, step)
        else:
            self._skipped_in_a_row = 0
        return StepResult(loss, norm, applied)

    def _one_reduction(self) -> AbstractContextManager[None]:
        # Without it stages 1 and 2 silently keep the last pass only; boundaries would reduce once a pass.
        if self.config.zero_stage == 0:
            return nullcontext()
        return self.deepspeed.coalesce_grad_reduction()

    def _update(self) -> tuple[bool, float]:
        """(whether the step was applied, gradient norm); a non-finite gradient is never applied."""
        if self.config.zero_stage == 0:
            norm = self._clip()
            if not math.isfinite(norm):
                self.deepspeed.zero_grad()
                return False, norm
        self.deepspeed.step()
        if self.config.zero_stage:
            norm = float(self.deepspeed.get_global_grad_norm())
        return bool(self.deepspeed.was_step_applied()), norm

    @torch.no_grad()
    def _clip(self) -> float:
        """Stage 0: DeepSpeed neither reports the norm without clipping nor skips a non-finite gradient there."""
        gradients = [(p.grad, p) for p in self.module.parameters() if p.grad is not None]
        squares = torch.zeros(2, dtype=torch.float64, device=self.grid.device)  # own, shared
        for gradient, parameter in gradients:
            shared = not getattr(parameter, "model_parallel", False)
            squares[int(shared)] += torch.linalg.vector_norm(gradient).double().square()
        own = squares[:1].clone()
        if self.grid.submodule_ranks > 1:
            self.grid.sum_over_submodule_ranks(own)
        norm = float((own[0] + squares[1]).sqrt())
        if self.clip and math.isfinite(norm) and norm > self.clip:
            for gradient, _ in gradients:
                gradient.mul_(self.clip / (norm + 1e-6))
        return norm

    def _skip(self, passes: Passes, loss: Tensor, step: int) -> None:
        """Count a skipped step; at the limit stop, naming where the first non-finite number appears."""
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row <= self.config.max_skipped_steps:
            return
        places = self.grid.gather(self._diagnose(passes))
        rank = next((rank for rank, place in enumerate(places) if place), None)
        where = "every loss and output is finite, so the backward pass overflowed"
        raise RefusedError(
            f"{self._skipped_in_a_row} steps in a row, up to step {step}, had a non-finite gradient "
            f"(engine.max_skipped_steps = {self.config.max_skipped_steps}); "
            f"{where if rank is None else f'rank {rank}: loss {float(loss):g}, {places[rank]}'}"
        )

    def _diagnose(self, passes: Passes) -> str:
        """Where this rank's first non-finite number is, empty where there is none. Collective.

        Repeats the step's forwards: randomness is counted, so they are the same.
        """
        found = [
            f"non-finite parameter {fragment.name}"
            for flat, fragments in zip(self.shards.masters, self.shards.layout, strict=True)
            for fragment in fragments
            if not bool(fragment.of(flat).isfinite().all())
        ]

        def look(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                    found.append(f"non-finite output of {name or 'the model'}")

            return hook

        hooks = [m.register_forward_hook(look(n)) for n, m in self.module.named_modules()]
        try:
            with torch.no_grad():
                for micro in passes():
                    found += ["non-finite loss" for loss in micro if not bool(loss.isfinite())]
        finally:
            for hook in hooks:
                hook.remove()
            for module in self.module.modules():
                if isinstance(module, BatchNorm2d):
                    module.pending.clear()
        return found[0] if found else ""
