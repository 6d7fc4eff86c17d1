"""What a run will need of each rank's memory, told before it starts: parameters, gradients, optimizer, activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hsvit_kernels.random import Draw

from . import engine, models
from .data import reader
from .grid import Config, shares
from .recipe import Plan, Recipe

PREFETCHED = 50_000_000
"""Numbers that DeepSpeed's stage 3 gathers ahead of the module that is being computed (stage3_prefetch_bucket_size)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the most demanding moment of a step; what libraries reserve for themselves is left out."""

    parameters: int
    """Trained and frozen ones, stage 3's gathered ones included."""
    gradients: int
    """Held until the step's one reduction."""
    reduction: int
    """Buffers of that, after the activations at stages 1 and 2, all the time at stage 3."""
    optimizer: int
    """Moments, and from stage 1 on the fp32 parameters that the optimizer steps."""
    activations: int
    """The most that exists in a forward of one micro batch, by PyTorch's reference operations."""
    average: int
    """Of the weights (EMA)."""
    teacher: int
    in_all: int
    """At the most demanding moment."""


def needed(recipe: Recipe, plan: Plan) -> Memory:
    """The memory of one rank for a resolved recipe."""
    facts = reader.facts(recipe.data)
    with torch.device("meta"):
        model = recipe.model.build(
            image_size=facts.image_size,
            channels=facts.channels,
            classes=facts.classes,
            here=_here(recipe),
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    other = sum(p.numel() * (2 if plan.bf16 and p.dim() > 1 else 4) for p in frozen)
    other += sum(b.nbytes for b in model.buffers())
    stage, each = recipe.engine.zero_stage, 4 * trained
    part = -(-each // plan.replicas)
    moments = {"adamw": 2, "sgd": 1}[recipe.optimizer.name]
    parameters, optimizer, reduction, gathered = each + other, moments * each, 0, 0
    if stage > 0:
        optimizer, reduction = (moments + 1) * part, 4 * min(trained, engine.LARGEST_BUCKET) + part
    if stage == 3:
        gathered = min(each + other, 4 * PREFETCHED)
        parameters = part + -(-other // plan.replicas) + gathered
    kept = activations(recipe, plan)
    average = (each if stage == 0 else part) if recipe.ema.decay else 0
    # Stage 3 copies what it gathers in a forward, when there are no gradients yet.
    together = kept + reduction + max(gathered, each) if stage == 3 else each + max(kept, reduction)
    return Memory(
        parameters=parameters,
        gradients=each,
        reduction=reduction,
        optimizer=optimizer,
        activations=kept,
        average=average,
        teacher=plan.teacher_bytes,
        in_all=parameters + optimizer + average + plan.teacher_bytes + together,
    )


def _here(recipe: Recipe) -> range:
    """The submodules of the first rank of a replica."""
    return shares(recipe.grid.submodule_ranks, recipe.model.submodules, recipe.grid.absent)[0]


class _Alive(TorchDispatchMode):
    """Notes every tensor that is made, and how many bytes of them existed at the same time at most."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.made.values()))
        return result


class _OneRank:
    """Stands for a grid of which only the first rank of a replica exists."""

    def __init__(self, config: Config) -> None:
        self.submodule_ranks, self.absent = config.submodule_ranks, config.absent

    def share_of(self, images: int) -> slice:
        return slice(images // self.submodule_ranks)

    def exchange_features(self, maps: Tensor) -> Tensor:
        return maps[:, : maps.shape[1] // self.submodule_ranks].repeat(self.submodule_ranks, 1, 1)

    def exchange(self, sums: Tensor) -> Tensor:
        return sums


def activations(recipe: Recipe, plan: Plan) -> int:
    """The most bytes that exist in a forward of one micro batch and did not before: nothing is computed, the tensors
    are fake. What is kept for the backward is part of them."""
    facts = reader.facts(recipe.data)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = models.without_weights(recipe.model).build(
            image_size=facts.image_size,
            channels=facts.channels,
            classes=facts.classes,
            here=_here(recipe),
            grid=_OneRank(recipe.grid),  # type: ignore[arg-type]
        )
        engine.prepare(model.train(), recipe.engine.checkpoint_activations, plan.bf16)
        images = torch.empty(plan.micro_batch, facts.channels, facts.image_size, facts.image_size)
        draw = Draw.of(0, image=torch.arange(plan.micro_batch))
        with _Alive() as alive, torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16):
            output = model(images, draw=draw)
            logits = output if isinstance(output, Tensor) else torch.stack(output).sum(0)  # of a distilled model
            F.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.int64))
    return alive.most
