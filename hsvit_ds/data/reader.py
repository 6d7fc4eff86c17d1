"""From a run's position to the batches of this rank: which images, read where, shared how."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RefusedError
from ..grid.grid import Grid
from . import augment, decode, loader, stream
from .batch import PADDING, Batch, Images, Job
from .index import Index, open_index, split_shards, stand_in
from .loader import Loader
from .order import Order, Share
from .sets import SETS, Facts, photographs
from .sources import InMemory, Shards, Source, digits_split
from .stream import Streamed
from .transform import Transform


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "digits"
    """The data set: "digits" is built in; "cifar10", "imagenette", "tiny_imagenet" and "imagenet1k" are known; any
    other name is a set of your own, with `classes`."""
    root: str = ""
    """Folder of its shards NAME-SPLIT-0000.tar, indexed by `hsvit shards index`; or a URL with `_info.json` (https:,
    gs:, pipe:cat /x), whose shards are streamed, with the weaker promises of `stream.py`."""
    index: str = ""
    """Folder of the index files, where they are not beside the shards."""
    classes: int = 0
    """Of a data set of your own; 0: of the known one."""
    image_size: int = 0
    """Side of the images that the model takes, pixels; 0: that of the known data set, 224 for your own."""
    window: int = 8192
    """Samples shuffled together after the shards were."""
    last_batch: str = "drop"
    """The last incomplete global batch of an epoch: "drop" it, or "fill" it up with the epoch's first samples."""
    share: str = "auto"
    """"none": every submodule rank reads all images of its replica; "gather": each reads its part and they gather
    uint8; "auto": gather from 3 submodule ranks and above 64 px on."""
    cache: str = ""
    """Folder for streamed shards, which are then fetched once; "": fetched in every epoch."""
    timeout: float = 30.0
    """Seconds that a server may send nothing before it is asked again."""
    workers: int = 4
    """Processes of a rank that read, decode and augment; 0: the rank itself."""
    decoder: str = "auto"
    """"simplejpeg" (turbo-JPEG), "pillow", or "auto": the first that is installed. Resolved with its version: another
    one gives other pixels, and is refused."""
    any_decoder: bool = False
    """Go on although the images were decoded by another program or version before, or are on another rank."""
    fingerprint: str = ""
    """Of the training split's index; filled in, and compared when a run is resumed."""
    max_bad_fraction: float = 0.01
    """Share of the training images that may be unreadable before the run stops."""
    eval_batch: int = 256
    """Images of a forward in evaluation, on each replica."""

    def __post_init__(self) -> None:
        for name, allowed in {"share": ("auto", "none", "gather"), "last_batch": ("drop", "fill")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} = "{getattr(self, name)}": must be one of {", ".join(allowed)}')
        for name in ("window", "eval_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("workers", "classes", "image_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        stream.check_root(self.root)
        if self.timeout <= 0:
            raise ValueError(f"timeout = {self.timeout}: must be above 0 seconds")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction = {self.max_bad_fraction}: must be in [0, 1]")
        if self.name not in SETS and not self.classes:
            raise ValueError(
                f'name = "{self.name}": not one of {", ".join(SETS)}; for a data set of your own set classes too'
            )
        if self.name == "digits" and (self.root or self.classes or self.image_size):
            raise ValueError('name = "digits" is built in: it takes no root, classes or image_size')


def facts(config: Config) -> Facts:
    """What the model depends on; no file is read."""
    known = SETS.get(config.name) or photographs(224, config.classes)
    return dataclasses.replace(
        known, image_size=config.image_size or known.image_size, classes=config.classes or known.classes
    )


def open_split(config: Config, split: str) -> Index | stream.Split | None:
    """Where the samples of a split are: by their index, behind URLs, or None for a set in memory.

    Raises:
        RefusedError: nothing is there, or it is not of this data set.
    """
    if config.name == "digits":
        return None
    if stream.is_url(config.root):
        return stream.open_split(config.root, split, config.timeout)
    if not config.root:
        raise RefusedError(f"data.root is not set: the folder of {config.name}'s shards, NAME-SPLIT-0000.tar")
    folder = Path(config.root)
    if not folder.is_dir():
        raise RefusedError(f"data.root = {folder}: no such folder")
    shards = split_shards(folder)
    name = stand_in(split, shards)
    if name is None:
        found = ", ".join(shards) or "no file NAME-SPLIT-0000.tar"
        raise RefusedError(f"data.root = {folder}: no shards of the split {split} ({found})")
    path = (Path(config.index) if config.index else folder) / f"{name}.index.npz"
    index = open_index(path, folder)
    if not len(index):
        raise RefusedError(f"{path}: holds no sample; hsvit shards check {folder} tells why")
    worst, classes = int(index.labels.argmax()), facts(config).classes
    if index.labels[worst] >= classes:
        raise RefusedError(
            f"{path}: {index.name(worst)} has label {index.labels[worst]}, but {config.name} has {classes} classes, "
            f"0 to {classes - 1}; is data.root the right folder, or data.classes to be set?"
        )
    return index


def check_splits(config: Config) -> None:
    """Refuse a data set that lacks a split, before a run trains an epoch to find out."""
    for split in ("train", "val", "test"):
        open_split(config, split)


def resolved(config: Config) -> Config:
    """With the decoder and the fingerprint of the data filled in; refuses others than a recipe names."""
    if config.name == "digits" or not config.root:
        return config
    there = open_split(config, "train")
    assert there is not None
    if config.fingerprint not in ("", there.fingerprint):
        raise RefusedError(
            f'data.fingerprint = "{config.fingerprint}", but the training split in {config.root} has '
            f'"{there.fingerprint}": other samples, labels or shards. Take them with data.fingerprint=""'
        )
    return dataclasses.replace(config, decoder=decode.resolved(config.decoder), fingerprint=there.fingerprint)


def shard_lengths(config: Config) -> tuple[int, ...]:
    """Samples in each shard of the training split; without data.root one shard of the published size."""
    if config.name == "digits" or (config.name in SETS and not config.root):
        return (facts(config).samples["train"],)
    there = open_split(config, "train")
    assert there is not None
    return tuple(int(length) for length in there.lengths)


def shares_images(config: Config, submodule_ranks: int, image_size: int) -> bool:
    """Whether the ranks of a replica each read a part and gather; decided by `share`, see there.

    Streams are always shared: two ranks that read one apart might not get the same images again after a fault.
    """
    if stream.is_url(config.root):
        return submodule_ranks > 1
    if config.share == "auto":
        return submodule_ranks > 2 and image_size > 64
    return config.share == "gather" and submodule_ranks > 1


class Reader:
    """Reads the training split in the run's order, and any split once, for one rank. Collective.

    Args:
        augmentation: what the workers do to training images. order: of the training split. share: this replica's part
        of every global batch.
    """

    def __init__(self, config: Config, augmentation: augment.Config, order: Order, share: Share, grid: Grid) -> None:
        self.config, self.augmentation, self.order, self.share, self.grid = config, augmentation, order, share, grid
        self.facts = facts(config)
        # Named here for a run that is opened elsewhere: its own decoder may be another version.
        self._transform = Transform(augmentation, self.facts.image_size, decode.installed(config.decoder), order.seed)
        there = grid.together(lambda: open_split(config, "train"))
        self._gathers = shares_images(config, grid.submodule_ranks, self.facts.image_size)
        self._training = self._source("train", there)
        self._pins = grid.device.type == "cuda"
        loader.preload(self._transform.modules)
        self._stream: Loader | None = None
        self._answers: Iterator[Images] = iter(())
        self._position = (-1, -1)
        self.left_out = list(there.problems) if isinstance(there, Index) else []
        """Samples of the training split that its index leaves out, and why."""
        self._bad: list[str] = []
        if there is not None:
            if not config.any_decoder:
                self._check_ranks("the decoder", self._transform.decoder)
            self._check_ranks("data of fingerprint", there.fingerprint)

    def _check_ranks(self, what: str, mine: str) -> None:
        for rank, other in enumerate(self.grid.gather(mine)):
            if other != mine:
                raise RefusedError(
                    f"rank {rank} has {what} {other}, rank {self.grid.rank} {mine}; they must be the same"
                )

    def _source(self, split: str, there: Index | stream.Split | None) -> Source | Streamed:
        if there is None:
            return digits_split(split)
        if isinstance(there, Index):
            return Shards(there, self._transform)
        s = self.grid.submodule_ranks if self._gathers else 1
        return Streamed(
            there,
            self._transform,
            self.facts.classes,
            reader=self.grid.replica * s + (self.grid.submodule_rank if self._gathers else 0),
            readers=self.grid.replicas * s,
            count=self.share.micro_batch // s,
            window=self.config.window,
            cache=self.config.cache,
            timeout=self.config.timeout,
        )

    @property
    def _workers(self) -> int:
        return 0 if isinstance(self._training, InMemory) else self.config.workers

    def _started(self, epoch: int, step: int) -> Loader:
        """The images of the micro batches from a step on."""
        source = self._training
        if isinstance(source, Streamed):
            done = (epoch * self.order.steps_per_epoch + step) * self.share.accumulation
            return source.start(self._workers, self._pins, done)
        return loader.answers(source.training, lambda n: self._jobs(epoch, step, n), self._workers, self._pins)

    def train(self, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        """The micro batches of every step of `epoch` from `first_step` on; skipped steps read nothing.

        The workers go on into the next epoch, which is there without waiting when it is asked for next.
        """
        if self._position != (epoch, first_step):
            self.close()
            self._stream = self._started(epoch, first_step)
            self._answers = iter(self._stream)
        steps = self.order.steps_per_epoch
        for step in range(first_step, steps):
            self._position = (-1, -1)  # unknown while a step is being read
            batches = [
                self._batch(next(self._answers), self.share.indices(micro), epoch * steps + step)
                for micro in range(self.share.accumulation)
            ]
            self._position = (epoch, step + 1) if step + 1 < steps else (epoch + 1, 0)
            yield batches

    def _jobs(self, epoch: int, step: int, skipped: int) -> Iterator[Job]:
        """What the workers are asked for from a step on, without end; without the first `skipped` micro batches."""
        steps, micros = self.order.steps_per_epoch, self.share.accumulation
        position, micro = divmod(skipped, micros)
        epoch, step = divmod(epoch * steps + step + position, steps)
        while True:
            batch = self.order.batches(epoch)
            for s in range(step, steps):
                samples, copies = batch(s)
                for a in range(micro, micros):
                    index = self._mine(self.share.indices(a))
                    yield Job(epoch, samples[index], copies[index])
                micro = 0
            epoch, step = epoch + 1, 0

    def _mine(self, whole: Tensor) -> Tensor:
        """The part of a forward's images that this rank reads."""
        return whole.chunk(self.grid.submodule_ranks)[self.grid.submodule_rank] if self._gathers else whole

    def _batch(self, read: Images, index: Tensor, step: int) -> Batch:
        images, labels, views = self._shared(read)
        return Batch(images, labels, views, index, self.order.seed, step)

    def _shared(self, read: Images) -> tuple[Tensor, Tensor, Tensor]:
        """(images, labels, views) on the device, read here or by all ranks of the replica together."""
        self._bad += read.bad
        device = self.grid.device
        images, labels, views = (x.to(device, non_blocking=True) for x in read[:3])
        if not self._gathers:
            return images, labels, views
        # One message: each image's pixels, its label and its view as bytes.
        parts = [images.flatten(1), labels[:, None].view(torch.uint8), views.view(torch.uint8)]
        rows = self.grid.share_images(torch.cat(parts, 1))
        pixels, label, view = rows.split([part.shape[1] for part in parts], 1)
        labels = label.contiguous().view(torch.int64)[:, 0]
        return pixels.unflatten(1, images.shape[1:]), labels, view.contiguous().view(torch.float32)

    def new_bad(self) -> list[str]:
        """File, member and reason of what this rank could not read since the last call."""
        found, self._bad = self._bad, []
        return found

    def count(self, split: str) -> int:
        """Samples of a split."""
        there = open_split(self.config, split)
        return self.facts.samples[split] if there is None else sum(int(length) for length in there.lengths)

    def evaluation(self, split: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, valid) of every batch; each sample of `split` is valid on exactly one replica.

        Every replica gets the same number of equal batches (ZeRO-3 gathers parameters in each forward), filled up
        where they are not valid. The label of an image that cannot be read is `batch.UNREADABLE`.
        """
        source, count = self._source(split, open_split(self.config, split)), self.count(split)
        size = min(self.config.eval_batch, -(-count // self.grid.replicas))
        size += -size % self.grid.submodule_ranks  # which divide the images between them, or a backbone's part of them
        if isinstance(source, Streamed):
            size //= self.grid.submodule_ranks if self._gathers else 1
            answers = dataclasses.replace(source, count=size, once=True).start(self._workers, self._pins)
        else:
            starts = range(self.grid.replica * size, count + self.grid.replica * size, size * self.grid.replicas)
            positions = [torch.arange(size) + start for start in starts]
            samples = [self._mine(torch.where(p < count, p, -1)) for p in positions]
            answers = loader.answers(source.held_out, lambda n: iter(samples[n:]), self._workers, self._pins)
        try:
            for read in answers:
                images, labels, _ = self._shared(read)
                yield images, labels, labels != PADDING
        finally:
            answers.close()

    def close(self) -> None:
        """End the workers."""
        self._position = (-1, -1)
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def check_share(config: Config, facts: Facts, submodule_ranks: int, micro_batch: int) -> None:
    """Refuse a micro batch that the ranks of a replica cannot divide, and streams that they do not."""
    if stream.is_url(config.root) and config.share == "none" and submodule_ranks > 1:
        raise RefusedError('data.share = "none": the ranks of a replica share a stream; set "auto" or "gather"')
    if shares_images(config, submodule_ranks, facts.image_size) and micro_batch % submodule_ranks:
        raise RefusedError(
            f'data.share = "{config.share}": the micro batch of {micro_batch} is not divisible by '
            f'{submodule_ranks} submodule ranks; choose another global batch, or data.share = "none"'
        )
