"""What each rank reads of a data set: sample numbers, labels and hashes of the augmented pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from hsvit_ds.data import augment
from hsvit_ds.data.batch import Batch
from hsvit_ds.data.index import open_index
from hsvit_ds.data.order import Order, Share
from hsvit_ds.data.reader import Reader
from hsvit_ds.data.splits import Config
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid

EPOCHS, BATCH = 2, 12
AUGMENT = augment.Config(crop="random_resized", flip=0.5)


def described(reader: Reader, batch: Batch) -> dict[str, Any]:
    epoch, step = divmod(batch.step, reader.order.steps_per_epoch)
    samples = reader.order.batches(epoch)(step)[0][batch.index]
    seen = torch.cat((batch.images.flatten(1), batch.views.contiguous().view(torch.uint8)), 1)
    hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in seen]
    return {"samples": samples.tolist(), "labels": batch.labels.tolist(), "pixels": hashes}


def main(arguments: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    root = Path(arguments["root"])
    lengths = tuple(open_index(root, "train").lengths.tolist())
    found = []
    for case in arguments["cases"]:
        grid = Grid(GridConfig(submodule_ranks=case["submodule_ranks"]), 2)
        here = {name: case[name] for name in ("workers", "share", "on_device")}
        config = Config(name="tiny", classes=10, image_size=32, root=str(root), **here)
        order, share = Order(lengths, config.window, BATCH, 0), Share(BATCH, 1, grid.replicas, grid.replica)
        reader = Reader(config, augment.Config(**{**vars(AUGMENT), "canvas": case["canvas"]}), order, share, grid)
        steps = [described(reader, step[0]) for epoch in range(EPOCHS) for step in reader.train(epoch, 0)]
        evaluated = [label for _, labels, valid in reader.evaluation("val") for label in labels[valid].tolist()]
        found.append({"steps": steps, "evaluated": evaluated})
        reader.close()
    return found
