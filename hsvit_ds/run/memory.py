"""What a run will need of each rank's memory, told before it starts: parameters, gradients, optimizer, activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data import splits
from ..engine import engine
from .recipe import Plan, Recipe
from .rehearsal import first_share, rehearsal

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
    facts = splits.facts(recipe.data)
    with torch.device("meta"):
        model = recipe.model.build(
            image_size=facts.image_size,
            channels=facts.channels,
            classes=facts.classes,
            here=first_share(recipe),
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


def activations(recipe: Recipe, plan: Plan) -> int:
    """The most bytes that exist in a forward of one micro batch and did not before; what is kept for the backward is
    part of them."""
    with rehearsal(recipe, plan) as (model, images, draw), _Alive() as alive:
        output = model(images, draw=draw)
        logits = output if isinstance(output, Tensor) else torch.stack(output).sum(0)  # of several heads
        F.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.int64))
    return alive.most


def used_up(recipe: Recipe, plan: Plan, doing: str, error: str) -> str:
    """What to say of a rank that was out of memory: while it was doing what, by which error."""
    micro, block = plan.micro_batch, recipe.augment.mix_block if recipe.augment.mixes else 1
    smaller = [n for n in range(1, micro) if micro % n == 0 and n % block == 0]
    planned = {name: size for name, size in vars(needed(recipe, plan)).items() if size}
    parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in planned.items() if name != "in_all")
    remedy = f"run.micro_batch={smaller[-1]} (now {micro})" if smaller else "a higher engine.zero_stage"
    return (
        f"{doing}: out of memory ({error}); planned for each rank, MiB: {parts}, "
        f"{planned['in_all'] / 2**20:,.1f} in all; try {remedy}"
    )
