"""An index and the order of an epoch, by the size of the set: `python -m tools.benchmark index`.

The shards are empty files of the right sizes, and so are those parts of an index that no measured step reads. Beside
them the way of before: an index that is read whole, and the whole permutation of an epoch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hsvit_ds.data.arrays import header
from hsvit_ds.data.index import COLUMNS, Index, open_index
from hsvit_ds.data.indexing import Shard, content
from hsvit_ds.data.order import Order
from hsvit_kernels.random import Site, sequence

from .steps import machine, show

SETS = {"ImageNet-1k": (1_281_167, 1024), "ImageNet-21k": (14_197_122, 13_000), "a billion": (10**9, 100_000)}
WINDOWS, BATCH, EPOCH = (8192, 65_536), 1024, 3
MOST = 2 * 10**7
"""Samples up to which the way of before is measured too."""


def synthetic(folder: Path, samples: int, shards: int) -> None:
    """A training split and its index; every tenth shard has no sample."""
    full = [n for n in range(shards) if n % 10 != 9]
    lengths = np.zeros(shards, dtype=np.int64)
    lengths[full] = samples // len(full)
    lengths[full[: samples % len(full)]] += 1
    found = []
    for n, length in enumerate(lengths.tolist()):
        path = folder / f"set-train-{n:06d}.tar"
        with path.open("wb") as file:
            file.truncate(512 * (2 + 3 * length))
        found.append(Shard(path.name, 512 * (2 + 3 * length), path.stat().st_mtime_ns, n, 0, length, 999, []))
    columns, metadata = content(found, dict.fromkeys(COLUMNS, ()), (), "")
    begin, names = header(columns, metadata)
    with (folder / "train.index.safetensors").open("wb") as file:
        file.write(begin)
        for name in names:
            for part in columns[name].parts:
                file.write(part.tobytes())
            if name in COLUMNS:
                file.seek(4 * samples, os.SEEK_CUR)
    index = open_index(folder, "train")
    with index.path.open("r+b") as file:  # an image of one byte, with label 0, for each sample that is read
        for order in orders(index):
            for step in steps(order):
                for sample in order.batches(EPOCH)(step)[0].tolist():
                    os.pwrite(file.fileno(), b"\1", index.arrays.places["sizes"].start + 4 * sample)


def orders(index: Index) -> list[Order]:
    return [Order(tuple(index.lengths.tolist()), window, BATCH, seed=0) for window in WINDOWS]


def steps(order: Order) -> list[int]:
    """Some of an epoch, of which none shares a window with the one before."""
    return [order.steps_per_epoch * i // 9 for i in range(9)]


def whole(order: Order, epoch: int) -> torch.Tensor:
    """The permutation of an epoch as its words define it, all at once: shards are shuffled, then windows of samples. It
    was computed so before, and the tests hold the order against it."""
    shards = sequence(order.seed, Site.ORDER, epoch, 0, count=len(order.shards)).argsort(stable=True)
    sizes = torch.tensor(order.shards)
    starts = sizes.cumsum(0) - sizes
    found = torch.cat([torch.arange(order.shards[s]) + starts[s] for s in shards.tolist()])
    window = torch.arange(order.samples) // order.window
    luck = sequence(order.seed, Site.ORDER, epoch, 1, count=order.samples)
    return found[(window * 2**32 + luck).argsort(stable=True)]


def resident() -> float:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def ms(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


def measured(folder: Path) -> dict[str, float]:
    """In a process of its own."""
    torch.set_num_threads(1)
    Order((1000, 1000), 64, 8, seed=0).batches(0)(3)  # the code that it touches is not counted
    before = resident()
    found = {"open, ms": ms(lambda: open_index(folder, "train"))}
    index = open_index(folder, "train")
    found["memory, MB"] = resident() - before
    for order in orders(index):
        found["epoch, ms"] = ms(partial(order.batches, EPOCH))
        batch = order.batches(EPOCH)
        times = [ms(partial(batch, step)) for step in steps(order)]
        found[f"step, window {order.window:,}, ms"] = max(times)
    samples = batch(steps(order)[-1])[0].tolist()
    found[f"places of {BATCH:,}, ms"] = ms(lambda: [index.place(sample) for sample in samples])
    found["memory after steps, MB"] = resident() - before
    if len(index) <= MOST:
        found["before: index, MB"] = 12 * len(index) / 1e6
        found["before: epoch, ms"] = ms(partial(whole, order, EPOCH))
    return found


def rows(repeats: int, sets: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, float]] = {}
    for name, (samples, shards) in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            synthetic(Path(folder), samples, shards)
            command = [sys.executable, "-m", "tools.benchmarks.index", folder]
            runs = []
            for _ in range(repeats):
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs.append(json.loads(done.stdout))
            found[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    costs = dict.fromkeys(cost for costs in found.values() for cost in costs)
    return [
        {"cost": cost, **{name: f"{of[cost]:,.1f}" if cost in of else "" for name, of in found.items()}}
        for cost in costs
    ]


def run(repeats: int, out: Path | None) -> None:
    sizes = ", ".join(f"{name}: {samples:,} samples in {shards:,} shards" for name, (samples, shards) in SETS.items())
    show(rows(repeats, SETS), f"{sizes}; median of {repeats}: {machine(torch.device('cpu'))}", out)


if __name__ == "__main__":
    print(json.dumps(measured(Path(sys.argv[1]))))
