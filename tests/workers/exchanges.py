"""One exchange of each format: what a rank gets, the gradient at what it gave, and the bytes that it sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hsvit_ds.grid.grid import Config, Grid
from hsvit_ds.grid.rounding import FORMATS


def main(arguments: dict[str, Any], _folder: Path) -> dict[str, Any]:
    """arguments: {"ranks": submodule ranks, "sums": a file of [B, M, D]}."""
    whole = torch.load(arguments["sums"])
    grid = Grid(Config(submodule_ranks=arguments["ranks"]), whole.shape[1])
    own = whole[:, grid.submodules.start : grid.submodules.stop]
    before = own.sum(1)
    dist.all_reduce(before, group=grid.replica_group)
    found = {"before": before}
    for form in FORMATS:
        given = own.clone().requires_grad_()
        answer = grid.exchange(given, form)
        answer.backward(torch.arange(answer.numel()).reshape(answer.shape).float())
        found[form] = answer.detach(), given.grad, grid.exchanges.take()
    return found
