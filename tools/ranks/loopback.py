"""What the links between ranks carry: of a ring, measured by its collectives, and of a message from one to the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hsvit_ds.grid.grid import Config, Grid

from .watch import Watch

SMALL, LARGE = 2**10, 2**22
"""Bytes of the messages that it is measured by."""
BEGUN = 20
"""All-gathers that are begun one after another before the first is waited for."""


class Seconds(NamedTuple):
    """Medians. small, large: of an all-reduce of `SMALL` and of `LARGE` bytes. begun: of one of `BEGUN` all-gathers.
    sent_small, sent_large: of a message from one rank to another, on the first one's clock."""

    small: float
    large: float
    begun: float
    sent_small: float
    sent_large: float


def link_seconds(watch: Watch, repeats: int = 30) -> Seconds:
    Grid(Config(backend="gloo"), submodules=1)
    small, large = torch.zeros(SMALL // 4), torch.zeros(LARGE // 4)
    wholes = [torch.zeros(SMALL // 4 * dist.get_world_size()) for _ in range(BEGUN)]

    def begun() -> None:
        for work in [dist.all_gather_into_tensor(whole, small, async_op=True) for whole in wholes]:
            work.wait()

    def back_and_forth(x: Tensor) -> None:
        if dist.get_rank() == 0:
            dist.send(x, 1)
        if dist.get_rank() < 2:
            dist.recv(x, 1 - dist.get_rank())
        if dist.get_rank() == 1:
            dist.send(x, 0)

    def seconds(act: Callable[[], object]) -> float:
        taken = []
        for _ in range(repeats):
            dist.barrier()
            began = time.perf_counter()
            act()
            taken.append(time.perf_counter() - began)
        return median(taken)

    return Seconds(
        small=seconds(lambda: dist.all_reduce(small)),
        large=seconds(lambda: dist.all_reduce(large)),
        begun=seconds(begun) / BEGUN,
        sent_small=seconds(lambda: back_and_forth(small)) / 2,
        sent_large=seconds(lambda: back_and_forth(large)) / 2,
    )


def one_by_one(found: Seconds) -> tuple[float, float]:
    """(bandwidth, latency) of a message while no other travels."""
    bandwidth = (LARGE - SMALL) / (found.sent_large - found.sent_small)
    return bandwidth, max(found.sent_small - SMALL / bandwidth, 0.0)


class Ring(NamedTuple):
    """Of links, as `Links` has them."""

    bandwidth: float
    latency: float
    call: float
    together: float


def ring(found: Seconds, ranks: int) -> Ring:
    """Of so many ranks, of whose bytes an all-reduce sends an N-th 2 (N - 1) times, an all-gather half as often. What
    one of many all-gathers takes beyond half a small all-reduce is the call itself; or they help one another."""
    messages = 2 * (ranks - 1)
    bandwidth = messages * (LARGE - SMALL) / ranks / (found.large - found.small)
    call = min(max(found.begun - found.small / 2, 0.0), found.small)
    latency = max((found.small - call) / messages - SMALL / ranks / bandwidth, 0.0)
    return Ring(bandwidth, latency, call, min(found.begun / (found.small / 2), 1.0))
