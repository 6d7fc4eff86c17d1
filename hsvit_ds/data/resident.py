"""Splits that are decoded once and live on the device, where every batch is looked up.

Order, views and what is done to images afterwards are those of images that workers decode, bit for bit. Workers still
draw the views, as only Python's generator gives theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import loader
from .augment import Config
from .batch import PADDING, UNREADABLE, Images, Job
from .sources import InMemory, Shards
from .transform import Transform, own_generators

CHUNK = 256
"""Images that a worker decodes at a time."""
FLIP = 4
"""Where a view has its flip; see `augment.VIEW`."""


@dataclass(frozen=True)
class Views:
    """What is random of resident training images, as a worker draws it.

    sizes: int64 [N, 2], height and width of each file. instead: int64 [N], which image stands for each: itself, or the
    next one that can be read.
    """

    transform: Transform
    sizes: Tensor
    instead: Tensor

    def training(self, job: Job) -> Images:
        """Rows as labels, and their views; no pixels."""
        rows = self.instead[job.samples]
        views = torch.empty(len(rows), 0)
        if self.is_random:
            sizes = self.sizes[rows].tolist()
            numbers = zip(sizes, rows.tolist(), job.copies.tolist(), strict=True)
            with own_generators():
                drawn = [self.transform.view((h, w), job.epoch, row, copy) for (h, w), row, copy in numbers]
            views = torch.tensor(drawn)
        return Images(torch.empty(len(rows), 0, dtype=torch.uint8), rows, views, [])

    @property
    def is_random(self) -> bool:
        return bool(self.transform.config.canvas or self.transform.config.flip)


class Split:
    """A split on a device, for training or for evaluation.

    Args:
        source: where it is read from. training: as workers begin with training images, otherwise as for evaluation.

    pixels: uint8 [N, C, H, W]. labels: int64 [N], UNREADABLE where there is no image. bad: file, member and reason of
    each of these.
    """

    def __init__(self, source: InMemory | Shards, training: bool, workers: int, device: torch.device) -> None:
        self.bad: list[str] = []
        if isinstance(source, InMemory):
            self.pixels, self.labels = source.images.to(device), source.labels.to(device)
            self.sizes = torch.zeros(len(self.labels), 2, dtype=torch.int64)
            return
        count = len(source.index)
        chunks = torch.arange(count).split(CHUNK)
        answers = loader.answers(
            source.same if training else source.held_out, lambda n: iter(chunks[n:]), workers, pin=False
        )
        labels: list[Tensor] = []
        sizes: list[Tensor] = []
        for chunk, read in zip(chunks, answers, strict=True):
            if not labels:
                self.pixels = torch.empty(count, *read.pixels.shape[1:], dtype=torch.uint8, device=device)
            self.pixels[chunk[0] : chunk[-1] + 1] = read.pixels
            labels.append(read.labels)
            sizes.append(read.views.long())
            self.bad += read.bad
        self.labels, self.sizes = torch.cat(labels).to(device), torch.cat(sizes)

    def views(self, transform: Transform) -> Views:
        good = (self.labels.cpu() != UNREADABLE).nonzero()[:, 0]
        place = torch.searchsorted(good, torch.arange(len(self.labels))) % max(len(good), 1)
        return Views(transform, self.sizes, good[place])

    def look_up(self, read: Images, config: Config) -> tuple[Tensor, Tensor, Tensor]:
        """(images, labels, views) on the device of what `Views` drew, as workers would have given them."""
        device = self.pixels.device
        rows, views = (x.to(device, non_blocking=True) for x in (read.labels, read.views))
        images, labels = self.pixels[rows], self.labels[rows]
        if config.canvas:
            return images, labels, views
        if config.flip:
            images = torch.where(views[:, FLIP, None, None, None] > 0, images.flip(3), images)
        return images, labels, views[:, :0]

    def held_out(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """(images, labels) on the device; padding where a number is negative. See `batch.PADDING`."""
        rows = samples.to(self.pixels.device, non_blocking=True)
        labels = torch.where(rows < 0, PADDING, self.labels[rows])
        return self.pixels[rows], labels
