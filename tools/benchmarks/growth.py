"""What checkpoints, evaluations and resumed metrics take, by parameters, ranks, samples and steps:
`python -m tools.benchmark growth`.

Runs of `recipes/digits/scala.toml` with the networks of DeiT, ZeRO stage 1 and an EMA. A save has two parts: the ranks
wait while a copy is taken to host memory, and their threads write it while they train.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.errors import Log
from hsvit_ds.run import metrics
from hsvit_ds.run.start import start
from hsvit_ds.run.summary import Best
from hsvit_ds.run.tracking import Config, Tracker

from .compare import finished
from .start import ENVIRONMENT
from .steps import machine, show

NETWORKS, RANKS, LINES = ("DeiT-Ti", "DeiT-S"), (1, 2), (10_000, 1_000_000)
RECIPE = Path("recipes/digits/scala.toml")
MODEL = 'model={{kind="vit", variant="{network}", patch_size=8, widths={{smallest=0.5, granularity=0.5}}}}'
KEYS = ["ema.decay=0.999", "engine.zero_stage=1", "tracking.mlflow=false", "run.global_batch=4"]


def seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measured(network: str, ranks: int, repeats: int) -> dict[str, float]:
    """Of a run, by rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
        command = [*torchrun, "-m", "tools.benchmarks.growth", folder, network, str(repeats)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        found: dict[str, float] = json.loads(Path(folder, "found.json").read_text())
    return found


def rank(folder: Path, network: str, repeats: int) -> None:
    keys = [*KEYS, MODEL.format(network=network), f"run.root={folder}"]
    trainer = start(RECIPE, keys, folder / "run", resume=False, log=Log(debug=False))
    trainer._step(next(iter(trainer.reader.train(0, 0))), 0)  # the optimizer has its state then
    found: dict[str, list[float]] = {}
    for repeat in range(1, repeats + 1):
        where = Position(0, repeat, repeat, logged=0)
        times = {
            "saving, the ranks wait, s": seconds(partial(trainer.checkpoints.save, where)),
            "saving, written meanwhile, s": seconds(trainer.checkpoints.wait),
            "loading, s": seconds(trainer.checkpoints.load),
        }
        for split in ("val", "train") if repeat == 1 else ():  # minutes
            count = trainer.reader.count(split)
            name = f"evaluating {count:,} images at two widths, s"
            times[name] = seconds(partial(trainer._evaluate, split, repeat))
        for name, value in times.items():
            found.setdefault(name, []).append(value)
    if trainer.grid.is_main:
        files = list((folder / "run/checkpoints").glob(f"step-*{repeats}/*.safetensors"))
        row = {"parameters, M": sum(p.numel() for p in trainer.engine.module.parameters()) / 1e6}
        row["a checkpoint, MB"] = sum(file.stat().st_size for file in files) / 1e6
        row |= {name: statistics.median(values) for name, values in found.items()}
        row["most memory of rank 0, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        (folder / "found.json").write_text(json.dumps(row))
    trainer.reader.close()
    trainer.grid.close()
    os._exit(0)


def resumed(lines: int, repeats: int) -> dict[str, float]:
    """Seconds that a run with so many logged steps takes to go on 100 before its end, and to read all of them."""
    with tempfile.TemporaryDirectory() as name:
        folder, logged = Path(name), 0
        with (folder / metrics.FILE).open("w") as file:
            for step in range(1, lines + 1):
                line = {"step": step, "time": 1e9 + step, "train/loss": 1 / step, "perf/images_per_sec": 1000.0}
                file.write(json.dumps(line | ({"val/top1": 50.0} if step % 1000 == 0 else {})) + "\n")
                if step == lines - 100:
                    logged = file.tell()
        kept = (folder / metrics.FILE).read_bytes()
        before = replace(finished("long"), step=lines, best={"val/top1": Best(value=50.0, step=1000)})
        before = replace(before, metrics={"train/loss": 1 / lines, "perf/images_per_sec": 1000.0, "val/top1": 50.0})

        def go_on() -> None:
            Tracker(Config(mlflow=False), folder, {}, before, Position(0, 0, lines - 100, logged=logged))

        times: dict[str, list[float]] = {"resumed": [], "read": []}
        for _ in range(repeats):
            (folder / metrics.FILE).write_bytes(kept)
            before.write(folder)
            times["resumed"].append(seconds(go_on))
            times["read"].append(seconds(lambda: metrics.read(folder)))
    return {name: statistics.median(values) for name, values in times.items()}


def run(repeats: int, out: Path | None) -> None:
    found = {(n, r): measured(n, r, repeats) for n in NETWORKS for r in RANKS}
    costs = list(next(iter(found.values())))
    titles = {(n, r): f"{n}, {r} rank" + "s" * (r > 1) for n, r in found}
    rows = [{"cost": cost} | {titles[key]: f"{found[key][cost]:,.2f}" for key in found} for cost in costs]
    where = f"median of {repeats}: {machine(torch.device('cpu'))}"
    show(rows, f"a run of digits, {where}", out)
    near, whole = "going on near the end, s", "reading all, s"
    logged = []
    for lines in LINES:
        of = resumed(lines, repeats)
        logged.append({"logged steps": f"{lines:,}", near: f"{of['resumed']:.4f}", whole: f"{of['read']:.4f}"})
    show(logged, f"metrics of a run, {where}", None)


if __name__ == "__main__":
    rank(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
