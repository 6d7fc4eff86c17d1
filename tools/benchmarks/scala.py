"""Scala's four-width step beside the same model with autograd slicing: `python -m tools.benchmark scala`.

Each runs in a process of its own, so that its peak of memory is its own; they take turns, so that noise hits all alike.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsvit_ds.engine.engine import BatchStatistics, Engine
from hsvit_ds.engine.engine import Config as EngineConfig
from hsvit_ds.engine.optimizer import Config as OptimizerConfig
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid
from hsvit_ds.models import slimmable, vit
from tools.benchmarks.published_scala import RATIOS, Network, total
from tools.benchmarks.steps import machine, show

CASES = {"224 px, patch 16, batch 8": (224, 16, 8, 1000), "32 px, patch 4, batch 64": (32, 4, 64, 10)}
Step = Callable[[], Any]


def ours(size: int, patch: int, classes: int, bf16: bool, qkv: str, images: Tensor, labels: Tensor) -> Step:
    """DeiT-Ti through the engine. qkv: see `vit.Config`."""
    grid = Grid(GridConfig(), submodules=1)
    widths = slimmable.Config(smallest=0.25, granularity=0.25)
    config = vit.Config(variant="DeiT-Ti", patch_size=patch, distilled=True, qkv=qkv, widths=widths)
    engine = Engine(
        config.build(image_size=size, channels=3, classes=classes),
        EngineConfig(zero_stage=0),
        OptimizerConfig(),
        grid,
        micro_batch=len(images),
        accumulation=1,
        batch_statistics=BatchStatistics(runs=1, synced=False),
        bf16=bf16,
    )

    def passes() -> Iterator[Iterator[Tensor]]:
        yield total((engine(images, width=width) for width in reversed(widths.all)), labels)

    return lambda: engine.step(passes, len(RATIOS), 1e-3, 0)


def published(size: int, patch: int, classes: int, bf16: bool, images: Tensor, labels: Tensor) -> Step:
    """The published code's step: explicit attention, autograd slices, AdamW."""
    model = Network(192, 3, 12, size, patch, classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def forward(ratio: float) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(images, ratio)

    def step() -> None:
        for loss in total((forward(ratio) for ratio in RATIOS), labels):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def serve(pipe: Connection, name: str, case: tuple[int, int, int, int], bf16: bool, threads: int) -> None:
    """In a process: time one step whenever asked, and end with the peak of resident memory."""
    torch.set_num_threads(threads)
    size, patch, batch, classes = case
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    import deepspeed  # noqa: F401  (its memory is no step's)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = {
        "hsvit-ds, per_role": lambda: ours(size, patch, classes, bf16, "per_role", images, labels),
        "hsvit-ds, fused": lambda: ours(size, patch, classes, bf16, "fused", images, labels),
        "published": lambda: published(size, patch, classes, bf16, images, labels),
    }[name]()
    pipe.send(None)
    while pipe.recv():
        start = time.perf_counter()
        made()
        pipe.send(time.perf_counter() - start)
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


NAMES = ("hsvit-ds, per_role", "hsvit-ds, fused", "published")


def run(repeats: int, threads: int, out: Path | None) -> None:
    rows: list[dict[str, Any]] = []
    for title, case in CASES.items():
        for bf16 in (False, True):
            seconds, peaks = measured(case, bf16, repeats, threads)
            for name in NAMES:
                rows.append(
                    {
                        "DeiT-Ti": title,
                        "precision": "bf16" if bf16 else "fp32",
                        "implementation": name,
                        "images/s": round(case[2] / seconds[name], 1),
                        "over published": f"{seconds['published'] / seconds[name]:.2f}x",
                        "peak, MiB": round(peaks[name]),
                    }
                )
    torch.set_num_threads(threads)
    place = machine(torch.device("cpu"))
    show(rows, f"A step of four widths, median of {repeats}: {place}", out)


def measured(
    case: tuple[int, int, int, int], bf16: bool, repeats: int, threads: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step, the median, and MiB of memory above the start, by implementation."""
    context = get_context("spawn")
    pipes, processes = {}, []
    for name in NAMES:
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, case, bf16, threads))
        process.start()
        processes.append(process)
        pipes[name].recv()
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for repeat in range(repeats + 2):
        for name in NAMES:
            pipes[name].send(True)
            taken = pipes[name].recv()
            if repeat >= 2:  # the first two warm up
                times[name].append(taken)
    peaks = {}
    for name, process in zip(NAMES, processes, strict=True):
        pipes[name].send(False)
        peaks[name] = pipes[name].recv()
        process.join()
    return {name: statistics.median(values) for name, values in times.items()}, peaks
