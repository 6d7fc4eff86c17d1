"""HSViT's training step beside loops over groups, and the default recipe: `python -m tools.benchmark step`."""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hsvit_ds.engine.engine import BatchStatistics, Engine
from hsvit_ds.engine.engine import Config as EngineConfig
from hsvit_ds.engine.optimizer import Config as OptimizerConfig
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid
from hsvit_ds.models.hsvit import Config, HSViT
from hsvit_kernels.random import Draw
from tools.benchmarks.published import published

VARIANTS = ("C2A2", "C3A4", "C4A8")
BATCH, SIZE, CLASSES = 64, 32, 10
Step = Callable[[], Any]


def ours(variant: str, bf16: bool, images: Tensor, labels: Tensor, grid: Grid) -> Step:
    """A step of HSViT through the engine, dropout, clipping and AdamW as in the loop's."""
    model = HSViT(Config(variant=variant), image_size=SIZE, channels=3, classes=CLASSES)
    engine = Engine(
        model,
        EngineConfig(zero_stage=1),
        OptimizerConfig(clip=1.0),
        grid,
        micro_batch=BATCH,
        accumulation=1,
        batch_statistics=BatchStatistics(runs=1, synced=False),
        bf16=bf16,
    )
    draw = Draw.of(0, image=torch.arange(BATCH), device=grid.device)

    def passes() -> Any:
        yield (F.cross_entropy(engine(images, draw=draw).float(), labels) for _ in range(1))

    return lambda: engine.step(passes, 1, 1e-3, 0)


def loop(variant: str, bf16: bool, images: Tensor, labels: Tensor, channels_last: bool) -> Step:
    """A step of the published model's shape in plain PyTorch: groups in a Python loop."""
    model: nn.Module = published(variant, SIZE).train().to(images.device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def median_ms(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each step, the median over `repeats`, taking turns so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:  # the first two warm up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def run(repeats: int, threads: int, out: Path | None) -> None:
    """Training steps at 32 px and batch 64, then the default recipe from its command to its end."""
    torch.set_num_threads(threads)
    grid = Grid(GridConfig(), submodules=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to(grid.device)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator).to(grid.device)
    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        for bf16 in (False, True):
            steps = {
                "hsvit-ds": ours(variant, bf16, images, labels, grid),
                "loop": loop(variant, bf16, images, labels, False),
                "loop, channels-last": loop(variant, bf16, images, labels, True),
            }
            ms = median_ms(steps, repeats, grid.device)
            fastest = min(value for name, value in ms.items() if name != "hsvit-ds")
            for name, value in ms.items():
                rows.append(
                    {
                        "variant": variant,
                        "precision": "bf16" if bf16 else "fp32",
                        "implementation": name,
                        "ms": round(value, 1),
                        "images/s": round(1000 * BATCH / value, 1),
                        "over the fastest loop": f"{fastest / value:.2f}x",
                    }
                )
    show(rows, f"One training step, batch {BATCH}, {SIZE} px, median of {repeats}: {machine(grid.device)}", out)
    show(digits(), f"recipes/digits/hsvit.toml on two ranks: {machine(grid.device)}", None)


def digits() -> list[dict[str, Any]]:
    """The default recipe through the deepspeed launcher: seconds after start-up, and in all."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
        command = [*launcher, "--module", "hsvit_ds.train", "recipes/digits/hsvit.toml", f"run.root={folder}"]
        env = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"} | {"OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        wall = time.perf_counter() - start
        log = Path(folder) / "digits-hsvit-001" / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    first = lines[0]
    interval = first["step"] * 32 / first["perf/images_per_sec"]
    return [
        {
            "test top-1, %": round(lines[-1]["test/top1"], 2),
            "first step to last evaluation, s": round(lines[-1]["time"] - first["time"] + interval, 1),
            "command to end, s": round(wall, 1),
        }
    ]


def machine(device: torch.device) -> str:
    """Hardware and versions, as every quoted figure needs them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = f"{len(names)} cores of {names[0].partition(':')[2].strip()}" if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def show(rows: list[dict[str, Any]], title: str, out: Path | None) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    if out is not None:
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "machine"])
            writer.writeheader()
            writer.writerows({**row, "machine": title.rpartition(": ")[2]} for row in rows)
