"""A split whose samples can be read in any order: in memory, or from tar shards by their index."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import RefusedError
from . import digits
from .augment import VIEW
from .batch import PADDING, UNREADABLE, Images, Job
from .decode import BadImageError
from .index import Index
from .transform import Transform, own_generators

OPEN_FILES = 128
"""Shards that a process keeps open; a window of the order touches a few."""


class Source(Protocol):
    """One split. A worker process holds a copy of it."""

    def training(self, job: Job) -> Images:
        """The images of a job, augmented; a bad sample is replaced by the next good one in the index."""
        ...

    def held_out(self, samples: Tensor) -> Images:
        """Images for evaluation, padding where a number is negative. See `batch.PADDING` and `batch.UNREADABLE`."""
        ...


class InMemory:
    """Images uint8 [N, C, H, W] and labels int64 [N], never bad."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def training(self, job: Job) -> Images:
        return Images(self.images[job.samples], self.labels[job.samples], torch.empty(len(job.samples), 0), [])

    def held_out(self, samples: Tensor) -> Images:
        labels = torch.where(samples < 0, PADDING, self.labels[samples])
        return Images(self.images[samples], labels, torch.empty(len(samples), 0), [])


def digits_split(split: str) -> InMemory:
    return InMemory(*digits.split(split))


class Shards:
    """A split in tar shards.

    A read asks the index for a sample's place, and then for the bytes of one image, both of files that are still those
    that were opened.
    """

    def __init__(self, index: Index, transform: Transform) -> None:
        self.index, self.transform = index, transform
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": OrderedDict()}  # a worker opens its own

    def training(self, job: Job) -> Images:
        side = self.transform.config.canvas or self.transform.size
        view = VIEW if self.transform.config.canvas else 0
        found = empty(len(job.samples), self.transform.channels, side, view)
        with own_generators():
            for i, (sample, copy) in enumerate(zip(job.samples.tolist(), job.copies.tolist(), strict=True)):
                self._training(found, i, sample, copy, job.epoch)
        return found

    def _training(self, found: Images, i: int, sample: int, copy: int, epoch: int) -> None:
        for other in range(sample, sample + len(self.index)):
            other %= len(self.index)
            try:
                data, label = self.read(other)
                pixels, view = self.transform.training(data, epoch, other, copy)
            except BadImageError as error:
                found.bad.append(f"{self.index.name(other)}: {error}")
                continue
            found.pixels[i], found.labels[i] = pixels, label
            found.views[i] = torch.tensor(view)
            return
        raise RefusedError(f"{self.index.folder}: no image of the split can be read")

    def held_out(self, samples: Tensor) -> Images:
        return self._once(samples, self.transform.size, 0, lambda data: (self.transform.held_out(data), ()))

    def same(self, samples: Tensor) -> Images:
        """What of training images is the same every time, see `Transform.same`; their heights and widths as views."""
        return self._once(samples, self.transform.config.canvas or self.transform.size, 2, self.transform.same)

    def _once(self, samples: Tensor, side: int, view: int, made: Callable[[bytes], tuple[Tensor, Any]]) -> Images:
        found = empty(len(samples), self.transform.channels, side, view)
        found.labels.fill_(PADDING)
        for i, sample in enumerate(samples.tolist()):
            if sample < 0:
                continue
            try:
                data, label = self.read(sample)
                found.pixels[i], found.views[i] = (torch.as_tensor(x) for x in made(data))
                found.labels[i] = label
            except BadImageError as error:
                found.bad.append(f"{self.index.name(sample)}: {error}")
                found.labels[i] = UNREADABLE
        return found

    def read(self, sample: int) -> tuple[bytes, int]:
        """The image file of a sample, and its label.

        Raises:
            RefusedError: the shard or the index has changed since they were opened. BadImageError: it is cut off.
        """
        place = self.index.place(sample)
        data = os.pread(self._open(place.shard), place.size, place.offset)
        if len(data) < place.size:
            raise BadImageError(f"cut off: {len(data)} of {place.size} bytes")
        return data, place.label

    def _open(self, shard: int) -> int:
        """The file of a shard, which is still the one that the index was compared with."""
        path = self.index.folder / self.index.shards[shard]
        file = self._files.get(shard)
        if file is None:
            try:
                file = self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise RefusedError(f"{path}: {error.strerror}, while the run was reading it") from error
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(shard)
        now = os.fstat(file)
        if now.st_size != self.index.bytes[shard] or now.st_mtime_ns != self.index.modified[shard]:
            raise RefusedError(
                f"{path}: changed while the run was reading it; restore it, or make a new index "
                f"({self.index.again}) and start a new run"
            )
        return file


def empty(count: int, channels: int, side: int, view: int) -> Images:
    """Room for `count` images."""
    pixels = torch.zeros(count, channels, side, side, dtype=torch.uint8)
    return Images(pixels, torch.empty(count, dtype=torch.int64), torch.empty(count, view), [])
