"""What the links of a ring of ranks carry, measured by all-reduces."""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.distributed as dist

from hsvit_ds.grid.grid import Config, Grid

from .watch import Watch

SMALL, LARGE = 2**10, 2**22
"""Bytes of the messages that it is measured by."""


def link_seconds(watch: Watch, repeats: int = 30) -> tuple[float, float]:
    """Of an all-reduce of `SMALL` and of `LARGE` bytes between the ranks, medians."""
    Grid(Config(), submodules=1)
    found = []
    for size in (SMALL, LARGE):
        x, taken = torch.zeros(size // 4), []
        for _ in range(repeats):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(x)
            taken.append(time.perf_counter() - began)
        found.append(median(taken))
    return found[0], found[1]


def link(small: float, large: float, ranks: int) -> tuple[float, float]:
    """(bandwidth, latency) of a ring of ranks, of whose bytes an all-reduce sends an N-th 2 (N - 1) times."""
    messages = 2 * (ranks - 1)
    bandwidth = messages * (LARGE - SMALL) / ranks / (large - small)
    return bandwidth, max(small / messages - SMALL / ranks / bandwidth, 0.0)
