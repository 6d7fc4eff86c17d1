"""The maps of a frozen backbone, computed once for each image and then read: for runs that show every image alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.augment import Config as Augment
from ..data.batch import Batch
from ..data.order import Order
from ..errors import RefusedError
from ..grid.grid import Grid
from ..models.backbone import Backbone
from .cache import Rows, digest


def check(folder: str, trained_stages: int, zero_stage: int, augmentation: Augment) -> None:
    """Refuse to keep maps that change, or that ranks could only compute together."""
    if not folder:
        return
    where = f"model.backbone.cache = {folder}"
    if trained_stages:
        raise RefusedError(f"{where}: the maps of a backbone that is trained change; set trained_stages to 0")
    if zero_stage == 3:
        raise RefusedError(f"{where}: at ZeRO-3 all ranks compute the backbone together; set engine.zero_stage below 3")
    if keys := augmentation.random_keys:
        raise RefusedError(f"{where}: augment.{keys[0]} shows an image in a new way every time; switch it off")


class Features:
    """The maps of this rank's own images, [B / S, K, f].

    Args:
        key: what an image's pixels depend on. bf16: computed by autocast.
    """

    def __init__(
        self, folder: str, backbone: Backbone, grid: Grid, order: Order, key: Mapping[str, Any], bf16: bool
    ) -> None:
        self.folder, self.backbone, self.grid, self.order, self.bf16 = folder, backbone, grid, order, bf16
        config = asdict(backbone.config) | {"cache": "", "weights": digest(backbone)}
        self.about = {**key, "backbone": config, "bf16": bf16, "device": grid.device.type}
        self.rows: Rows | None = None  # once the first maps have told their shape and type
        self.shape = torch.Size()
        self._epoch = -1

    @torch.no_grad()
    def __call__(self, batch: Batch, images: Tensor) -> Tensor:
        """images [B, C, H, W], normalised, of the replica."""
        own = self.grid.share_of(len(images))
        samples = self._samples(batch)[own].tolist()
        if self.rows is not None and (found := self.rows.read(samples)) is not None:
            return found.to(images.device).unflatten(1, self.shape)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            maps = self.backbone(images[own]).flatten(2)
        if self.rows is None:
            self.shape = maps.shape[1:]
            key = "model.backbone.cache"
            self.rows = Rows(Path(self.folder), self.about, self.shape.numel(), maps.dtype, key)
        self.rows.write(samples, maps.flatten(1))
        return maps

    def _samples(self, batch: Batch) -> Tensor:
        """The sample numbers of a micro batch."""
        epoch, step = divmod(batch.step, self.order.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self.order.batches(epoch)
        return self._batches(step)[0][batch.index]
