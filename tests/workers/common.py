"""What the workers share: a trainer of a small model, and its state in the canonical form."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsvit_ds.grid.grid import Grid, world_size
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent
# Dropout, dropped submodules, mixing, smoothing, clipping, two parameter groups and odd shapes: all on.
SMALL = [
    'model.variant=""',
    "model.kernels=[8,16]",
    "model.pool_strides=[4,2]",
    "model.groups=4",
    "model.depth=2",
    "model.heads=3",
    "model.embedding=15",
    "model.dropout=0.2",
    "model.submodules=2",
    "model.submodule_drop=0.2",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.mix_block=4",
    "augment.shift=2",
    "augment.label_smoothing=0.1",
    "optimizer.clip=0.5",
    "optimizer.lr=0.01",
    "run.global_batch=16",
    "tracking.mlflow=false",
]

# Drop path, LayerScale, mixing, smoothing, clipping: all on.
SMALL_SCALA = [
    "model.embedding=32",
    "model.heads=2",
    "model.depth=2",
    "model.patch_size=8",
    "model.drop_path=0.2",
    "model.layer_scale=0.5",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.mix_block=4",
    "augment.shift=2",
    "augment.label_smoothing=0.1",
    "optimizer.clip=0.5",
    "optimizer.lr=0.01",
    "optimizer.warmup_epochs=0.1",
    "run.global_batch=16",
    "tracking.mlflow=false",
]
# A backbone trained in full, dropout, drop path, mixing, smoothing, clipping: all on.
# With other seeds, or AdamW at 0.001, a rectified value lies so near to zero that rounding decides about its gradient:
# norms that are equal to 1e-8 until then differ by 1e-5 from that step on.
SMALL_HYBRID = [
    "run.seed=1",
    "model.dropout=0.2",
    "model.backbone.drop_path=0.3",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.mix_block=4",
    "augment.shift=2",
    "augment.label_smoothing=0.1",
    "optimizer.clip=0.5",
    "optimizer.lr=0.01",
    "optimizer.warmup_epochs=0.1",
    "optimizer.layer_decay=0.8",
    "run.global_batch=16",
    "tracking.mlflow=false",
]
# Drop path, mixing, smoothing, clipping, BatchNorm: all on.
SMALL_FAMILY = [
    "model.drop_path=0.2",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.mix_block=4",
    "augment.shift=2",
    "augment.label_smoothing=0.1",
    "optimizer.clip=0.5",
    "optimizer.lr=0.01",
    "optimizer.warmup_epochs=0.1",
    "run.global_batch=16",
    "tracking.mlflow=false",
]
SMALL_MOBILENET = [
    "model.channels=[8,16,24]",
    "model.depths=[1,2]",
    "model.strides=[2,2,2]",
    "model.features=32",
    *SMALL_FAMILY,
]
SMALL_UNIFORMER = [
    "model.channels=[16,16,32,32]",
    "model.depths=[1,1,2,1]",
    "model.heads=[2,4]",
    "model.strides=[4,2,1,2]",
    *SMALL_FAMILY,
]
BASES = {
    "hsvit": SMALL,
    "scala": SMALL_SCALA,
    "hybrid": SMALL_HYBRID,
    "mobilenet": SMALL_MOBILENET,
    "uniformer": SMALL_UNIFORMER,
}

_grids: dict[tuple[Any, ...], Grid] = {}


def trainer(folder: Path, overrides: list[str], resume: bool = False, base: str = "hsvit") -> Trainer:
    """A trainer of a digits recipe, made small, on all ranks of this worker."""
    recipe = recipes.read(ROOT / f"recipes/digits/{base}.toml", [*BASES[base], *overrides])
    recipe, plan = recipes.resolve(recipe, world_size())
    place = (recipe.grid.submodule_ranks, recipe.grid.absent, recipe.model.submodules)
    if place not in _grids:
        _grids[place] = Grid(recipe.grid, recipe.model.submodules)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(recipe, plan, _grids[place], folder, resume)


def steps(run: Trainer, stop: int, waiting: str = "default") -> list[float]:
    """Run the steps from where the run stands in epoch 0 to `stop`; their gradient norms. waiting: of the host for a
    GPU is an "error", or as by "default"."""
    results, size, at = [], run.plan.steps_per_epoch, run.start.step
    batches = chain.from_iterable(
        run.reader.train(epoch, at if epoch == 0 else 0) for epoch in range(-(-stop // size)) if at < (epoch + 1) * size
    )
    if waiting != "default":
        torch.cuda.set_sync_debug_mode(waiting)
    for step, micro_batches in enumerate(islice(batches, stop - at), at):
        results.append(run._step(micro_batches, step))
        if run.ema is not None:
            run.ema.update(results[-1].applied)
    if waiting != "default":
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.applied for result in results)
    return [float(result.grad_norm) for result in results]


def state(run: Trainer) -> dict[str, Tensor]:
    """{file/tensor: value} of what this rank would save."""
    files: dict[str, Any] = run.checkpoints._snapshot()
    return {f"{file}/{name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}
