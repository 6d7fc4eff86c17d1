"""From an order and a source to the batches of this rank; tar shards plug in here as another `Source`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hsvit_kernels.random import Draw

from ..errors import RefusedError
from ..grid import Grid
from . import digits
from .order import Order, Share


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "digits"
    """The data set: "digits" is built in."""
    window: int = 8192
    """Samples shuffled together after the shards were."""
    share: str = "auto"
    """"none": every submodule rank reads all images of its replica; "gather": each reads its part and they gather
    uint8; "auto": gather from 3 submodule ranks and above 64 px on."""
    eval_batch: int = 256
    """Images of a forward in evaluation, on each replica."""

    def __post_init__(self) -> None:
        if self.name not in SETS:
            raise ValueError(f'name = "{self.name}": must be one of {sorted(SETS)}')
        if self.share not in ("auto", "none", "gather"):
            raise ValueError(f'share = "{self.share}": must be "auto", "none" or "gather"')
        for key in ("window", "eval_batch"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)}: must be at least 1")


@dataclass(frozen=True)
class Facts:
    """What is known of a data set without reading an image."""

    image_size: int
    channels: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    samples: dict[str, tuple[int, ...]]
    """Samples in each shard of each split."""

    def count(self, split: str) -> int:
        return sum(self.samples[split])


class Source(Protocol):
    """One split, addressed by the number of a sample in its index."""

    def images(self, samples: Tensor) -> Tensor:
        """uint8 [n, C, H, W]."""
        ...

    def labels(self, samples: Tensor) -> Tensor:
        """int64 [n]; from the index, without decoding."""
        ...


class Digits:
    """The built-in digits, in memory."""

    def __init__(self, split: str) -> None:
        self._images, self._labels = digits.split(split)

    def images(self, samples: Tensor) -> Tensor:
        return self._images[samples]

    def labels(self, samples: Tensor) -> Tensor:
        return self._labels[samples]


DIGITS_FACTS = Facts(
    image_size=digits.SIDE,
    channels=1,
    classes=10,
    mean=digits.MEAN,
    std=digits.STD,
    samples={name: (stop - start,) for name, (start, stop) in digits.SPLITS.items()},
)


def _photographs(image_size: int, classes: int, train: int, held_out: int) -> Facts:
    """RGB photographs with ImageNet's channel statistics, and one split held out."""
    return Facts(
        image_size=image_size,
        channels=3,
        classes=classes,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        samples={"train": (train,), "val": (held_out,), "test": (held_out,)},
    )


def _no_shards(split: str) -> Source:
    raise RefusedError("data.name: tar shards cannot be read yet; recipes of this data set can be resolved, not run")


SETS: dict[str, tuple[Facts, Callable[[str], Source]]] = {
    "digits": (DIGITS_FACTS, Digits),
    "imagenette": (_photographs(128, 10, 9469, 3925), _no_shards),
    "imagenet1k": (_photographs(224, 1000, 1281167, 50000), _no_shards),
}


def facts(config: Config) -> Facts:
    return SETS[config.name][0]


def shares_images(config: Config, submodule_ranks: int, image_size: int) -> bool:
    """Whether the ranks of a replica each read a part and gather; decided by `share`, see there."""
    if config.share == "auto":
        return submodule_ranks > 2 and image_size > 64
    return config.share == "gather" and submodule_ranks > 1


@dataclass(frozen=True)
class Batch:
    """One micro batch of a replica: the same on all its ranks.

    images: uint8 [b, C, H, W] on the device. labels: int64 [b] on the device. index: int64 [b], where each sample
    stands in the global batch. seed, step: of the run, for the randomness.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    seed: int
    step: int

    def draw(self, pass_: int, device: torch.device | str = "cpu") -> Draw:
        """The randomness of pass `pass_` over this batch."""
        return Draw.of(self.seed, self.step, pass_, image=self.index, device=device)


class Reader:
    """Reads the training split in the run's order, and any split once, for one rank.

    Args:
        order: of the training split. share: this replica's part of every global batch.
    """

    def __init__(self, config: Config, order: Order, share: Share, grid: Grid) -> None:
        self.config, self.order, self.share, self.grid = config, order, share, grid
        self.facts, self._open = SETS[config.name]
        self._training = self._open("train")
        self._gathers = shares_images(config, grid.submodule_ranks, self.facts.image_size)

    def train(self, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        """The micro batches of every step of `epoch` from `first_step` on; skipped steps read nothing."""
        permutation = self.order.epoch(epoch)
        size = self.order.global_batch
        for step in range(first_step, self.order.steps_per_epoch):
            samples = permutation[step * size : (step + 1) * size]
            global_step = epoch * self.order.steps_per_epoch + step
            yield [
                self._batch(self._training, samples, self.share.indices(micro), global_step)
                for micro in range(self.share.accumulation)
            ]

    def _batch(self, source: Source, samples: Tensor, index: Tensor, step: int) -> Batch:
        images = self._images(source, samples[index])
        labels = source.labels(samples[index]).to(self.grid.device, non_blocking=True)
        return Batch(images, labels, index, self.order.seed, step)

    def _images(self, source: Source, samples: Tensor) -> Tensor:
        """uint8 [n, C, H, W] on the device, read here or by all ranks of the replica together."""
        if not self._gathers:
            return source.images(samples).to(self.grid.device, non_blocking=True)
        mine = samples.chunk(self.grid.submodule_ranks)[self.grid.submodule_rank]
        return self.grid.share_images(source.images(mine).to(self.grid.device))

    def evaluation(self, split: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, valid) of every batch; each sample of `split` is valid on exactly one replica.

        Every replica gets the same number of equal batches (ZeRO-3 gathers parameters in each forward), filled up
        with copies of a sample that are not valid.
        """
        source, count = self._open(split), self.facts.count(split)
        size = min(self.config.eval_batch, -(-count // self.grid.replicas))
        size += -size % self.grid.submodule_ranks if self._gathers else 0
        for start in range(0, count, size * self.grid.replicas):
            position = torch.arange(size) + start + self.grid.replica * size
            samples = position.clamp(max=count - 1)
            labels = source.labels(samples).to(self.grid.device)
            yield self._images(source, samples), labels, (position < count).to(self.grid.device)


def check_share(config: Config, facts: Facts, submodule_ranks: int, micro_batch: int) -> None:
    """Refuse a micro batch that the ranks of a replica cannot divide."""
    if shares_images(config, submodule_ranks, facts.image_size) and micro_batch % submodule_ranks:
        raise RefusedError(
            f'data.share = "{config.share}": the micro batch of {micro_batch} is not divisible by '
            f'{submodule_ranks} submodule ranks; choose another global batch, or data.share = "none"'
        )
