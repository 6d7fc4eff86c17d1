"""One rank's stage of the published network: loss and gradients of a step, whose BatchNorms are in eval mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hsvit_ds.grid.grid import Config, Grid
from tools.ranks import pipeline
from tools.ranks.methods import batch

VARIANT, SUBMODULES, IMAGES = "C2A2", 4, 8


def main(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """arguments: {"micro_batches": m, "stages": [[first layer, last + 1], …], "shapes": of what comes into each, of an
    image}."""
    grid = Grid(Config(), submodules=1)
    parts = pipeline.layers(pipeline.network(VARIANT, SUBMODULES).eval())
    first, end = arguments["stages"][grid.rank]
    count = arguments["micro_batches"]
    shape = [IMAGES // count, *arguments["shapes"][grid.rank]]
    stage = pipeline.Stage(parts[first:end], grid.rank, grid.size, shape)
    images, labels = (whole.chunk(count) for whole in batch(IMAGES))
    loss = stage.step(images, labels)
    gradients = [p.grad for p in stage.net.parameters()]
    return {"loss": loss, "gradients": [torch.zeros(0) if g is None else g for g in gradients]}
