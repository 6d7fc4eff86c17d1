"""How long ranks take to meet and to make their groups: `python -m tools.benchmark grid`."""

from __future__ import annotations

import gc
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from hsvit_ds.grid import rendezvous
from hsvit_ds.grid.grid import Config, Grid

from .steps import machine, show

RANKS = (16, 32, 64)
TIMEOUT = timedelta(seconds=120)


def grid(ranks: int, submodule_ranks: int) -> None:
    Grid(Config(submodule_ranks=submodule_ranks), submodules=submodule_ranks)


def every_group(ranks: int, submodule_ranks: int) -> None:
    """The alternative: every rank makes a group for each use, whether or not there is one of the same members."""
    everybody = list(range(ranks))
    dist.new_group(timeout=TIMEOUT)
    for first in everybody[::submodule_ranks]:
        dist.new_group(everybody[first : first + submodule_ranks], timeout=TIMEOUT)
    for first in everybody[:submodule_ranks]:
        dist.new_group(everybody[first::submodule_ranks], timeout=TIMEOUT)
    for _ in ("files", "signals"):
        dist.new_group(timeout=TIMEOUT, backend="gloo")


def started(ranks: int, submodule_ranks: int, groups: Callable[[int, int], None]) -> tuple[float, float]:
    """Seconds of the slowest of so many forked ranks until all have met, and then until it has its groups."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    go, start = os.pipe()
    results, result = os.pipe()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            status = 1
            try:
                os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
                os.close(results)
                os.read(go, 1)
                began = time.perf_counter()
                rendezvous.join("gloo", rank, ranks, TIMEOUT)
                dist.barrier()  # or a rank that met the others sooner would wait for them in its first group
                met = time.perf_counter()
                groups(ranks, submodule_ranks)
                made = time.perf_counter()
                os.write(result, f"{json.dumps([met - began, made - met])}\n".encode())
                dist.barrier()  # none leaves while another still connects
                status = 0
            finally:
                os._exit(status)  # without gloo's destructors
        children.append(child)
    os.close(result)
    os.write(start, bytes(ranks))
    with os.fdopen(results) as lines:
        seconds = [json.loads(line) for line in lines]
    os.close(go)
    os.close(start)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise RuntimeError(f"{ranks} ranks: some failed")
    return max(met for met, _ in seconds), max(made for _, made in seconds)


def run(repeats: int, out: Path | None) -> None:
    gc.freeze()
    rows: list[dict[str, Any]] = []
    for ranks in RANKS:
        for submodule_ranks in (1, ranks // 8, ranks // 2, ranks):
            both = [[started(ranks, submodule_ranks, what) for what in (grid, every_group)] for _ in range(repeats)]
            ours, theirs = (median(of[place][1] for of in both) for place in (0, 1))
            rows.append(
                {
                    "ranks": ranks,
                    "submodule ranks": submodule_ranks,
                    "init_process_group and a barrier, s": f"{median(met for of in both for met, _ in of):.2f}",
                    "the grid's groups, s": f"{ours:.2f}",
                    "a group for each use, s": f"{theirs:.2f}",
                    "ratio": f"{theirs / ours:.1f}x",
                }
            )
    show(rows, f"The slowest rank's start, median of {repeats}: {machine(torch.device('cpu'))}", out)
