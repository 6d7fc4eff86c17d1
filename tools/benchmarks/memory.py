"""Memory of a rank by ZeRO stage, as planned and as measured: `python -m tools.benchmark memory`."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hsvit_ds.data import splits
from hsvit_ds.engine.engine import BatchStatistics, Engine
from hsvit_ds.grid.grid import Grid, world_size
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.memory import needed
from hsvit_kernels.random import Draw

from .steps import machine, show

RECIPE = Path("recipes/imagenet/hybrid_resnet50.toml")
BASE = ["model.backbone.weights=", "run.global_batch=16", "data.image_size=128", "model.heads=4"]
MODES = {
    "frozen": ["model.backbone.trained_stages=0"],
    "last stage": ["model.backbone.trained_stages=1"],
    "all": ["model.backbone.trained_stages=-1"],
    "all, recomputed": ["model.backbone.trained_stages=-1", "engine.checkpoint_activations=true"],
}


def run(out: Path | None) -> None:
    """A ResNet-50 hybrid on two replicas at every stage, each in processes of its own."""
    rows: list[dict[str, Any]] = []
    ranks = 2
    for mode, overrides in MODES.items():
        for stage in (0, 1, 2, 3):
            found = measure(RECIPE, [*BASE, *overrides, f"engine.zero_stage={stage}"], ranks)
            rows.append({"backbone": mode, "ZeRO": stage, **{name: mib(size) for name, size in found.items()}})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    show(rows, f"MiB of a rank, ResNet-50 hybrid at 128 px, {ranks} replicas x 8 images: {machine(device)}", out)


def mib(size: int) -> float:
    return round(size / 2**20, 1)


def measure(recipe: Path, overrides: list[str], ranks: int) -> dict[str, int]:
    """Bytes of rank 0: the plan, and what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
        command = [*torchrun, "-m", "tools.benchmarks.memory", str(out), str(recipe), *overrides]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        found: dict[str, int] = json.loads(out.read_text())
    return found


def worker(out: Path, path: Path, overrides: list[str]) -> None:
    recipe, plan = recipes.resolve(recipes.read(path, overrides), world_size())
    facts, grid = splits.facts(recipe.data), Grid(recipe.grid, recipe.model.submodules)
    before = held(grid.device)
    model = recipe.model.build(
        image_size=facts.image_size, channels=facts.channels, classes=facts.classes, here=grid.submodules, grid=grid
    )
    engine = Engine(
        model,
        recipe.engine,
        recipe.optimizer,
        grid,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        batch_statistics=BatchStatistics(plan.bn_runs, plan.bn_synced),
        bf16=plan.bf16,
    )
    images = torch.randn(plan.micro_batch, facts.channels, facts.image_size, facts.image_size, device=grid.device)
    labels = torch.zeros(plan.micro_batch, dtype=torch.int64, device=grid.device)
    draw = Draw.of(0, image=torch.arange(plan.micro_batch), device=grid.device)

    def step() -> None:
        def loss() -> Tensor:
            return F.cross_entropy(engine(images, draw=draw).float(), labels)

        engine.step(lambda: ((loss() for _ in range(1)) for _ in range(plan.accumulation)), 1, 1e-3, 0)

    for _ in range(2):  # the first makes the optimizer's state
        step()
    between = held(grid.device) - before - images.nbytes
    peak = between + most_in(step, grid.device)
    if grid.is_main:
        memory = needed(recipe, plan)
        names = ("parameters", "gradients", "reduction", "optimizer", "activations", "in_all")
        planned = {f"plan: {name.replace('_', ' ')}": getattr(memory, name) for name in names}
        out.write_text(json.dumps({**planned, "measured between steps": between, "measured peak": peak}))
    grid.close()


def held(device: torch.device) -> int:
    """Bytes of all tensors that Python knows of, each memory once; on GPUs what the allocator has given away."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def most_in(step: Any, device: torch.device) -> int:
    """Bytes that a step has at most beside what there was before."""
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes), default=0)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
