"""Every collective of one training step, as torch.distributed sees it: (name, group, numbers)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .common import trainer

COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


calls: list[tuple[str, Any, int]] = []


def counted(name: str) -> Any:
    original = getattr(dist, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor)]
        calls.append((name, kwargs.get("group"), max(t.numel() for t in tensors)))
        return original(*args, **kwargs)

    return call


def main(arguments: dict[str, list[str]], folder: Path) -> dict[str, Any]:
    for name in COLLECTIVES:  # before DeepSpeed takes references to them
        setattr(dist, name, counted(name))
    return {name: one_step(trainer(folder / name, overrides)) for name, overrides in arguments.items()}


def one_step(run: Any) -> dict[str, Any]:
    batches = [batch for batch, _ in zip(run.reader.train(0, 0), range(2), strict=False)]
    run._step(batches[0], 0)  # what happens at the first step alone is not counted
    calls.clear()
    run._step(batches[1], 1)
    names = {run.grid.replica_group: "replica", run.grid.data_group: "data"}
    return {
        "calls": [(name, names.get(group, "other"), numbers) for name, group, numbers in calls],
        "trained": sum(f.shape.numel() for fragments in run.engine.shards.layout for f in fragments),
        "exchanged": run.plan.micro_batch * run.recipe.model.embedding,
    }
