"""Three steps of four widths through the engine: gradient norms, weights, and the collectives of the last step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hsvit_ds.engine.engine import BatchStatistics, Engine
from hsvit_ds.engine.engine import Config as EngineConfig
from hsvit_ds.engine.optimizer import Config as OptimizerConfig
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid, world_size
from tests.kernels.test_sliced_linear import K, Slimmable

from . import steps

WIDTHS = (1.0, 0.75, 0.5, 0.25)
BATCH = 16


def main(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    for name in steps.COLLECTIVES:
        setattr(dist, name, steps.counted(name))
    grid = Grid(GridConfig(submodule_ranks=1), submodules=1)
    return {name: one_case(grid, **case) for name, case in arguments.items()}


def one_case(grid: Grid, zero_stage: int, gather: bool, kernels: str = "auto", accumulation: int = 1) -> Any:
    """gather: into main gradients; else autograd slices the weights."""
    torch.manual_seed(0)
    share = BATCH // world_size() // accumulation
    engine = Engine(
        Slimmable(),
        EngineConfig(zero_stage=zero_stage, kernels=kernels),
        OptimizerConfig(name="sgd", clip=0.5),
        grid,
        micro_batch=share,
        accumulation=accumulation,
        batch_statistics=BatchStatistics(runs=1, synced=False),
        bf16=False,
    )
    images = torch.randn(3, BATCH, K, generator=torch.Generator().manual_seed(1))

    def losses(x: Tensor) -> Iterator[Tensor]:
        for width in WIDTHS:
            yield engine(x, width, gather).square().mean()

    norms = []
    for step, batch in enumerate(images):
        steps.calls.clear()
        mine = batch.view(accumulation, world_size(), share, K)[:, grid.replica]
        result = engine.step(lambda mine=mine: (losses(x) for x in mine), len(WIDTHS), 0.1, step)
        norms.append(float(result.grad_norm))
    data = [(name, numbers) for name, group, numbers in steps.calls if group is grid.data_group]
    weights = dict(engine.shards.gather([m.detach() for m in engine.shards.masters]))
    trained = sum(tensor.numel() for tensor in weights.values())
    return {"norms": norms, "weights": weights, "calls": data, "trained": trained}
