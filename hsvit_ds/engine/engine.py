"""The DeepSpeed engine: one optimizer step of A micro batches x P passes with one gradient reduction."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import hsvit_kernels

from ..errors import RefusedError, first_line
from ..grid.grid import Grid
from ..models import timm_models
from ..models.batchnorm import Statistics, move_running_statistics, set_statistics
from ..models.network import Network
from ..spans import Part, each, span, spanned
from . import captured, expert
from . import optimizer as optimizers
from .outcomes import Outcomes, Passes, StepResult
from .update import Update
from .zero import Shards, shards, step_state


@dataclass(frozen=True, kw_only=True)
class Config:
    zero_stage: int = 1
    """What replicas share: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters."""
    precision: str = "auto"
    """"fp32", "bf16" (torch autocast over fp32 parameters), or "auto": bf16 on GPUs, fp32 on CPUs."""
    kernels: str = "auto"
    """"triton" or "reference" for every operation of hsvit_kernels, or "auto": on a GPU the kernels that the first use
    finds right and faster, elsewhere the reference."""
    checkpoint_activations: bool = False
    """Recompute the activations of a timm model or a UniFormer in backward instead of keeping them."""
    compile: bool = False
    """torch.compile the model's training graph; evaluation stays eager."""
    capture: bool = True
    """On a GPU, launch a forward, and its backward, as one CUDA graph for each width, where the model allows; at
    zero_stage = 0 the optimizer's step too."""
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


def _is_partial(parameter: Any) -> bool:
    """Whether the ranks of a replica each have a part of a sum as the gradient (see `HSViT`)."""
    return getattr(parameter, "partial_in_replica", False)


def _whole_numel(parameter: Any) -> int:
    """Numbers of a parameter, which stage 3 keeps in parts."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def prepare(model: nn.Module, checkpoint_activations: bool, bf16: bool) -> None:
    """Have a model ask for draws and answer with all its heads, switch activation checkpointing on, and store frozen
    matrices as autocast would read them."""
    if isinstance(model, Network):
        model.keyed = model.all_heads = True
    nets = timm_models.nets(model)
    if checkpoint_activations:
        if not nets:
            raise RefusedError(
                "engine.checkpoint_activations = true: only for models of timm and UniFormers (model.backbone.name, or "
                'model.kind = "timm", "uniformer")'
            )
        for _, net in nets:
            try:
                net.set_grad_checkpointing(True)
            except (AssertionError, ValueError) as error:  # as timm's models say that they cannot
                raise RefusedError(f"engine.checkpoint_activations = true: {first_line(error)}") from error
    for parameter in model.parameters():
        if bf16 and not parameter.requires_grad and parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()


WIDTHS = 64
"""Graphs of one model that torch.compile may make; of more it would run the others eagerly, without a word."""
LARGEST_BUCKET = 500_000_000
"""Numbers of a buffer that gradients are reduced in."""


def deepspeed_config(config: Config, clip: float, bf16: bool, micro_batch: int, trained: int) -> dict[str, Any]:
    """What DeepSpeed is told; the expert keys are merged in, and refused where they contradict or are unknown to it.
    trained: numbers."""
    expert.check(config.deepspeed)
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if "reduce_bucket_size" not in config.deepspeed.get("zero_optimization", {}):
        # DeepSpeed reserves the whole bucket, 2 GB, for however small a model.
        zero["reduce_bucket_size"] = max(min(trained, LARGEST_BUCKET), 1)
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # accumulation and the loss's 1/A are the engine's own
        "gradient_clipping": clip if config.zero_stage else 0.0,  # 1.0 when unset; stage 0 clips here
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # It waits for the device twice a step, to time what is not told.
        "timers": {"throughput": {"enabled": False}},
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


def import_deepspeed(grid: Grid) -> Any:
    """DeepSpeed on the groups of a grid. Here, as it takes 6 s: a recipe is read and refused without it."""
    if grid.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # silences a warning on every rank
    import deepspeed
    from deepspeed.utils import groups as deepspeed_groups

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Otherwise DeepSpeed compiles a collective at start-up (30 s, needs g++) that training never uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import_muon()
    # DeepSpeed would make this group itself, with no timeout that could be set.
    deepspeed_groups._WORLD_GROUP = grid.world_group
    deepspeed.init_distributed(grid.backend, dist_init_required=False)
    return deepspeed


def import_muon() -> None:
    """Import an optimizer that ours never is, and which DeepSpeed asks for at every ZeRO stage, without the decorators
    that would load PyTorch's compiler: seconds of every rank's start."""
    from deepspeed.runtime import compiler

    with patch.object(compiler, "compile", lambda: compiler.dummy_decorator):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


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
        deepspeed = import_deepspeed(grid)
        model.to(grid.device)
        prepare(model, config.checkpoint_activations, bf16)
        try:
            self.parameter_groups = optimizers.parameter_groups(model, optimizer_config)
        except ValueError as error:
            raise RefusedError(f"[optimizer] {error}") from None
        trained = sum(p.numel() for group in self.parameter_groups for p in group["params"])
        self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizers.build(self.parameter_groups, optimizer_config),
            config=deepspeed_config(config, optimizer_config.clip, bf16, micro_batch, trained),
            mpu=grid,
            dist_init_required=False,
        )
        self.module: nn.Module = self.deepspeed.module
        self.step_state = step_state(self.module)
        self.shards: Shards = shards(config.zero_stage, self.module, self.optimizer, grid)
        self.update: Callable[[], Tensor] | None = None
        """Stage 0's, which DeepSpeed's step only surrounds there."""
        if config.zero_stage == 0:
            self.update = Update(self.module, self.optimizer, grid, optimizer_config.clip)
            self.optimizer.step = lambda: None
            self.deepspeed.allreduce_gradients = spanned(Part.REDUCTION)(self.deepspeed.allreduce_gradients)
            if optimizer_config.name == "sgd" and optimizer_config.momentum:
                # PyTorch makes these at the first step, without numbers in them where that step is left out.
                self.shards.set_moment("momentum_buffer", [torch.zeros_like(m) for m in self.shards.masters])
        # Where the ranks of a replica split its images, each has batch statistics of its own.
        norms = grid.all_norms if getattr(self.module, "splits_images", False) else grid.norms
        synced = batch_statistics.synced and norms.size > 1
        set_statistics(self.module, Statistics(batch_statistics.runs, norms if synced else None))
        self.runs_differ = norms if norms.size > 1 and not synced else None
        self._partial = [p for p in self.module.parameters() if p.requires_grad and _is_partial(p)]
        self.outcomes = Outcomes(self.module, self.shards, grid, config.max_skipped_steps)
        self.not_captured = self._compile_and_capture(bf16, synced)
        """Why forward and backward are not CUDA graphs, nor the optimizer's step; empty where they are."""

    def _compile_and_capture(self, bf16: bool, synced: bool) -> str:
        config = self.config
        if config.compile:
            # Each width is a graph of its own: numbers that change with it are not to become variables of one.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, WIDTHS)
        why_not = "engine.capture = false"
        if config.capture:
            why_not = captured.why_not(self.module, self.grid, config.zero_stage, synced)
        if not why_not:
            forward = torch.compile(self.module.forward, dynamic=False) if config.compile else self.module.forward
            self.module.forward = captured.Captured(self.module, forward, torch.bfloat16 if bf16 else None)
            if self.update is not None:
                self.update = captured.CapturedUpdate(self.update, self.optimizer)
        elif config.compile:
            self.deepspeed.compile(compile_kwargs={"dynamic": False})
        return why_not

    @spanned(Part.FORWARD)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def traffic(self, steps: int) -> dict[str, float]:
        """Bytes a step that this rank gave to collectives since the last call, `steps` steps ago, by what they were:
        CLS sums, a backbone's maps and their gradients, BatchNorm's statistics, images, and gradients (by count: one
        fp32 reduction a step over the replicas, and one of a backbone's inside a replica)."""
        trained = sum(f.shape.numel() for fragments in self.shards.layout for f in fragments)
        partial = sum(_whole_numel(p) for p in self._partial)
        return {
            "comm/exchange_bytes": self.grid.exchanges.take() / steps,
            "comm/feature_bytes": self.grid.features.take() / steps,
            "comm/norm_bytes": (self.grid.norms.take() + self.grid.all_norms.take()) / steps,
            "comm/data_bytes": self.grid.images.take() / steps,
            "comm/gradient_bytes": 4.0 * (trained if self.grid.replicas > 1 else 0) + 4.0 * partial,
        }

    def step(self, passes: Passes, count: int, lr: float, step: int) -> StepResult:
        """Run every pass of every micro batch, reduce once, clip, step. A non-finite gradient is not applied; the host
        learns of it from `outcomes`, and does not wait here (DeepSpeed's own optimizers, at ZeRO 1 to 3, wait).

        Args:
            passes: gives the step's micro batches anew; see `Passes`.
            count: passes of a micro batch (P).
            lr: learning rate of this step. step: its number, for messages.
        """
        self.module.train()
        # What is captured cannot know which pass is the step's last: there autograd adds the slices up.
        self.step_state.gathers = bool(self.not_captured)
        for group in self.optimizer.param_groups:
            group["lr"] = float(np.float32(lr * group["lr_scale"]))  # as a captured step has it
        losses: list[Tensor] = []
        last = self.accumulation * count - 1
        with self._one_reduction():
            for micro in passes():
                for loss in each(Part.LOSS, micro):
                    with span(Part.BACKWARD):
                        if self.config.zero_stage == 0:  # where coalescing raises
                            self.deepspeed.set_gradient_accumulation_boundary(len(losses) == last)
                        self.step_state.last = len(losses) == last
                        self.deepspeed.backward(loss / self.accumulation)
                    losses.append(loss.detach().float())
                if not self.not_captured and len(losses) <= last:
                    captured.own_gradients(self.module)
            self._sum_partial()
        with span(Part.OPTIMIZER):
            applied, norm = self._update()
            self.step_state.clear()
            self.step_state.gathers = False
            move_running_statistics(self.module, applied, self.runs_differ)
            result = StepResult(step, torch.stack(losses).view(-1, count).mean(0), norm, applied)
            self.outcomes.add(result, passes)
        return result

    @contextmanager
    def _one_reduction(self) -> Iterator[None]:
        # Without it stages 1 and 2 silently keep the last pass only; boundaries would reduce once a pass.
        with ExitStack() as at_the_end:
            if self.config.zero_stage:
                at_the_end.enter_context(self.deepspeed.coalesce_grad_reduction())
            yield
            with span(Part.REDUCTION):
                at_the_end.close()

    @spanned(Part.REDUCTION)
    @torch.no_grad()
    def _sum_partial(self) -> None:
        """Sum the gradients of a backbone over the ranks of the replica, each of which has seen a share of its images:
        before the reduction over the replicas at stages 1 to 3, after it at stage 0, which is the same."""
        if not self._partial:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._partial]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.grid.sum_over_submodule_ranks(flat)
        for parameter, whole in zip(self._partial, flat.split([g.numel() for g in gradients]), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(whole.view(parameter.grad.shape))

    def _update(self) -> tuple[Tensor, Tensor]:
        """(whether the step was applied, gradient norm in fp64), on the device; a non-finite gradient never is."""
        if self.update is not None:
            norm = self.update()
            self.deepspeed.step()
            return norm.isfinite(), norm
        self.deepspeed.step()
        norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), dtype=torch.float64, device=self.grid.device)
        return torch.full_like(norm, self.deepspeed.was_step_applied(), dtype=torch.bool), norm
