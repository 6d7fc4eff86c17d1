"""CIFAR-10 trained for as long as there is time, and how fast."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .here import Here
from .kernels import ROOT, use_tuned

GOAL = 94.04
"""% top-1 of C4A8 on CIFAR-10 (arXiv 2404.05196, table 2)."""
TINY = (
    'model.variant=""', "model.kernels=[8,16]", "model.pool_strides=[4,2]", "model.groups=4", "model.depth=1",
    "model.heads=2", "model.embedding=16", "run.global_batch=16", "run.epochs=1", "run.log_every=1",
    "augment.mix_block=4", "data.workers=0",
)  # fmt: skip


def _shards(here: Here) -> Path:
    """The folder of CIFAR-10's indexed shards; an archive is unpacked, and a rehearsal makes a few images."""
    folder = here.out / "data" / "cifar10"
    if here.data is not None and here.data.is_dir():
        folder = here.data
    elif not folder.exists():
        unpacking = folder.with_name("unpacking")  # whole or not at all
        shutil.rmtree(unpacking, ignore_errors=True)
        unpacking.mkdir(parents=True)
        if here.data is None:
            from tests.tars import data_set

            data_set(unpacking / "cifar10", train=48, val=16, held_out="test")
        else:
            with tarfile.open(here.data) as archive:
                archive.extractall(unpacking, filter="data")
        found = next(path.parent for path in unpacking.rglob("*-train-*.tar"))
        os.replace(found, folder)
    if not list(folder.glob("*.index.safetensors")):
        subprocess.run([sys.executable, "-m", "hsvit_ds.cli", "shards", "index", str(folder)], cwd=ROOT, check=True)
    return folder


def _train(here: Here, recipe: str, name: str, *keys: str) -> tuple[list[dict[str, float]], bool]:
    """Train on from where the run of this name stands, as long as there is time: (metrics, whether it has ended)."""
    use_tuned(here)
    folder = here.out / "runs"
    fixed = [f"data.root={_shards(here)}", f"run.root={folder}", f"run.name={name}", "tracking.mlflow=false"]
    fixed += ["checkpoint.keep_last=1", *(TINY if here.toy else ())]
    command = [sys.executable, "-m", "hsvit_ds.train", str(ROOT / f"recipes/cifar10/{recipe}.toml"), *fixed, *keys]
    process = subprocess.Popen([*command, "--resume"], cwd=ROOT)
    try:
        code = process.wait(max(here.left - 15, 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it saves, and the next call goes on from there
        code = process.wait()
    if code not in (0, 75):
        raise RuntimeError(f"{recipe}.toml ended with {code}; its own words stand above")
    (file,) = folder.glob(f"{name}-001/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()], code == 0


def _speed(metrics: list[dict[str, float]]) -> dict[str, float]:
    """The medians of what each interval was, after the first."""
    names = ("perf/images_per_sec", "perf/step_ms_p50", "perf/data_wait", "perf/mfu")
    rows = [row for row in metrics if names[0] in row]
    return {name: statistics.median(row[name] for row in rows[1:] or rows) for name in names if name in rows[-1]}


def accuracy(recipe: str, here: Here) -> dict[str, Any]:
    metrics, ended = _train(here, recipe, recipe)
    scores = [row for row in metrics if any(name.endswith("/top1") for name in row)]
    began = metrics[0]["time"] if metrics else 0.0

    def best(row: dict[str, float]) -> float:
        return max(value for name, value in row.items() if name.endswith("top1"))

    reached = [row["time"] - began for row in scores if best(row) >= GOAL]
    return {
        "steps": metrics[-1]["step"] if metrics else 0,
        "top1": [{k: round(v, 2) for k, v in row.items() if k.endswith("top1") or k == "step"} for row in scores],
        "last": round(best(scores[-1]), 2) if scores else None,
        "seconds": round(metrics[-1]["time"] - began, 1) if metrics else 0.0,
        f"seconds to {GOAL}": round(reached[0], 1) if reached else None,
        **_speed(metrics),
        "state": "done" if ended else "partial",
        "why": "" if ended else f"after {metrics[-1]['step'] if metrics else 0} steps; the next call goes on",
    }


def speed(recipe: str, keys: tuple[str, ...], here: Here) -> dict[str, Any]:
    """Images a second, share of the peak, and of the time that images were waited for, in some epochs."""
    name = f"speed-{recipe}-{len(keys)}"
    shutil.rmtree(here.out / "runs" / f"{name}-001", ignore_errors=True)
    metrics, _ = _train(here, recipe, name, "run.eval_every=99", *keys, *(() if here.toy else ("run.epochs=3",)))
    return _speed(metrics)


def published_loop(here: Here) -> dict[str, Any]:
    """C4A8 as published: groups in a Python loop, bf16 autocast."""
    import torch

    from tools.benchmarks import steps

    variant, batch = ("C2A2", 4) if here.toy else ("C4A8", 512)
    images = torch.randn(batch, 3, 32, 32, device=here.device)
    labels = torch.randint(10, (batch,), device=here.device)
    step = steps.loop(variant, not here.toy, images, labels, channels_last=False)
    if here.toy:
        step()
        return {"perf/images_per_sec": 0.0}
    ms = steps.median_ms({"loop": step}, 10, images.device)["loop"]
    return {"perf/images_per_sec": 1000 * batch / ms, "perf/step_ms_p50": ms}


def profile(here: Here) -> dict[str, Any]:
    """Where the time of fast.toml's steps goes on the device and on the host: the largest twelve of each."""
    import torch
    from torch.profiler import ProfilerActivity

    from hsvit_ds.grid.grid import Grid
    from hsvit_ds.run import recipe as recipes
    from hsvit_ds.run.trainer import Trainer

    use_tuned(here)
    keys = [f"data.root={_shards(here)}", "tracking.mlflow=false", *(TINY if here.toy else ())]
    recipe, plan = recipes.resolve(recipes.read(ROOT / "recipes/cifar10/fast.toml", keys), 1)
    folder = here.out / "profile"
    folder.mkdir(exist_ok=True)
    run = Trainer(recipe, plan, Grid(recipe.grid, recipe.model.submodules), folder, resume=False)
    run._choose_kernels()
    batches = run.reader.train(0, 0)
    for step in range(1 if here.toy else 20):
        run._step(next(batches), step)
    on_gpu = [] if here.toy else [ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *on_gpu]) as found:
        for step in range(20, 21 if here.toy else 30):
            run._step(next(batches), step)
        list(run.engine.outcomes.settle())
    run.reader.close()
    averages = found.key_averages()
    return {
        clock: [
            {"name": row.key[:80], "calls": row.count, "ms": round(getattr(row, attribute) / 1000, 3)}
            for row in sorted(averages, key=lambda row: -getattr(row, attribute))[:12]
        ]
        for clock, attribute in {"host": "self_cpu_time_total", "device": "self_device_time_total"}.items()
    }


RECIPES = {name: partial(accuracy, name) for name in ("fast", "c2a2", "c3a4", "c4a8")}
SPEEDS: dict[str, Callable[[Here], dict[str, Any]]] = {
    "profile": profile,
    "fast": partial(speed, "fast", ()),
    "fast, images from workers": partial(speed, "fast", ("data.on_device=never",)),
    "fast, not captured": partial(speed, "fast", ("engine.capture=false", "data.on_device=auto")),
    "c4a8": partial(speed, "c4a8", ()),
    "published loop": published_loop,
}
