"""A hybrid's step: frozen beside its parts, and its backbone over data beside replicated: `python -m tools.benchmark
hybrid`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_ds.engine.engine import BatchStatistics, Engine
from hsvit_ds.engine.engine import Config as EngineConfig
from hsvit_ds.engine.optimizer import Config as OptimizerConfig
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid
from hsvit_ds.models import backbone
from hsvit_ds.models.hsvit import Config, HSViT
from hsvit_kernels.random import Draw

from .steps import Step, machine, median_ms, show

BACKBONE, SIZE, BATCH, CLASSES, RANKS = "resnet18", 128, 32, 10, 2


class Known(nn.Module):
    """A hybrid without its backbone: the same groups and head on maps that are given."""

    def __init__(self, model: HSViT) -> None:
        super().__init__()
        self.submodules, self.head, self.groups = model.submodules, model.head, model.config.groups

    def forward(self, maps: Tensor, draw: Draw) -> Tensor:
        logits: Tensor = self.head(self.submodules(maps, draw).sum(1) / self.groups)
        return logits


class Replicated(HSViT):
    """Every rank computes the backbone for all images of the replica."""

    @property
    def splits_images(self) -> bool:
        return False


def config(trained_stages: int) -> Config:
    return Config(
        groups=16,
        depth=2,
        heads=4,
        dropout=0.1,
        submodules=RANKS,
        backbone=backbone.Config(name=BACKBONE, trained_stages=trained_stages),
    )


def engine(model: nn.Module, grid: Grid, bf16: bool, synced: bool = False) -> Engine:
    return Engine(
        model,
        EngineConfig(zero_stage=1),
        OptimizerConfig(clip=1.0),
        grid,
        micro_batch=BATCH,
        accumulation=1,
        batch_statistics=BatchStatistics(runs=1, synced=synced),
        bf16=bf16,
    )


def step_of(trainer: Engine, images: Tensor, grid: Grid) -> Step:
    """images: or maps."""
    labels = torch.arange(BATCH, device=grid.device) % CLASSES
    draw = Draw.of(0, image=torch.arange(BATCH), device=grid.device)

    def losses() -> Iterator[Tensor]:
        yield F.cross_entropy(trainer(images, draw=draw).float(), labels)

    return lambda: trainer.step(lambda: iter([losses()]), 1, 1e-3, 0)


def frozen(repeats: int, grid: Grid, bf16: bool) -> dict[str, Any]:
    """A step with a frozen backbone, beside timm's own forward of it and a step of the rest."""
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=grid.device)
    network = timm.create_model(BACKBONE, num_classes=0, global_pool="").eval().to(grid.device)
    there = images.contiguous(memory_format=torch.channels_last)

    def model() -> HSViT:
        return config(0).build(image_size=SIZE, channels=3, classes=CLASSES)

    @torch.no_grad()
    def forward() -> Tensor:
        with torch.autocast(grid.device.type, torch.bfloat16, enabled=bf16):
            maps: Tensor = network(there)
        return maps

    maps = forward().flatten(2)
    ms = median_ms(
        {
            "hybrid": step_of(engine(model(), grid, bf16), images, grid),
            "backbone": forward,
            "head": step_of(engine(Known(model()), grid, bf16), maps, grid),
        },
        repeats,
        grid.device,
    )
    return {
        "precision": "bf16" if bf16 else "fp32",
        "hybrid's step, ms": round(ms["hybrid"], 1),
        "timm's forward, ms": round(ms["backbone"], 1),
        "step of groups and head, ms": round(ms["head"], 1),
        "step over both": f"{ms['hybrid'] / (ms['backbone'] + ms['head']):.2f}x",
    }


def divided(repeats: int, grid: Grid) -> list[dict[str, Any]]:
    """On two submodule ranks: the backbone over data with channels exchanged, and computed by both in full."""
    rows = []
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(grid.device)
    for name, trained in (("frozen", 0), ("trained", -1)):
        trainers: dict[str, Engine] = {}
        for way, kind in (("exchanged", HSViT), ("replicated", Replicated)):
            model = kind(config(trained), image_size=SIZE, channels=3, classes=CLASSES, here=grid.submodules, grid=grid)
            assert model.backbone is not None
            for parameter in model.backbone.parameters():
                parameter.partial_in_replica = True  # type: ignore[attr-defined]  # a rank has the gradient of its own channels
            trainers[way] = engine(model, grid, False, synced=way == "exchanged" and trained != 0)
        steps = {way: step_of(trainer, images, grid) for way, trainer in trainers.items()}
        ms = median_ms(steps, repeats, grid.device)
        shape = backbone.shape(config(trained).backbone, SIZE, 3)
        numbers = BATCH // RANKS * shape.channels * shape.height * shape.width * (RANKS - 1) // RANKS
        for way, trainer in trainers.items():
            trainer.traffic(1)
            steps[way]()
            sent = trainer.traffic(1)["comm/feature_bytes"]
            ways = 0 if way == "replicated" else 1 if trained == 0 else 2
            images_here = BATCH // (RANKS if way == "exchanged" else 1)
            rows.append(
                {
                    "backbone": name,
                    "way": way,
                    "ms a step": round(ms[way], 1),
                    "maps sent, bytes": int(sent),
                    "by formula": 4 * numbers * ways,
                    "backbone's forward, GMACs": round(images_here * shape.macs / 1e9, 1),
                }
            )
    return rows


def run(repeats: int, threads: int, out: Path | None) -> None:
    torch.set_num_threads(threads)
    grid = Grid(GridConfig(), submodules=1)
    what = f"{BACKBONE} hybrid, {SIZE} px, batch {BATCH}, median of {repeats}"
    rows = [frozen(repeats, grid, bf16) for bf16 in (False, True)]
    show(rows, f"Frozen backbone, {what}: {machine(grid.device)}", out)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rows.json"
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(RANKS)]
        command = [*torchrun, "-m", "tools.benchmarks.hybrid", str(found), str(repeats)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        title = f"Two submodule ranks, a thread each, fp32, {what}: {machine(grid.device)}"
        show(json.loads(found.read_text()), title, None if out is None else out.with_stem(f"{out.stem}-ranks"))


if __name__ == "__main__":
    place = Grid(GridConfig(submodule_ranks=RANKS), submodules=RANKS)
    rows_found = divided(int(sys.argv[2]), place)
    if place.is_main:
        Path(sys.argv[1]).write_text(json.dumps(rows_found))
    place.close()
