"""Shards behind URLs (`https:`, `gs:`, `pipe:`), read from front to back on webdataset's pipeline.

A tar that cannot be read in any order cannot be given the indexed reader's promises. These are the weaker ones:

* An epoch is a number of steps, the same on every rank. Each shard is read once before any is read again, in an order
  that differs by epoch; a sample may come a little early or late for its epoch.
* The shards are dealt to the workers of all ranks in turn. So which images are together in a step depends on the
  numbers of ranks and workers.
* With several submodule ranks each reads its part of the replica's images, and they gather.
* Resuming starts at the beginning of the shard that each worker was in: up to a shard a worker is read again.
* Evaluation reads every sample exactly once.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hsvit_kernels.random import Site, key, sequence

from ..errors import RefusedError, counted
from . import loader
from .augment import VIEW
from .batch import PADDING, UNREADABLE, Images
from .decode import FIRST, BadImageError, check_channels
from .layouts import parts
from .loader import Loader
from .members import MOST_BYTES, Member, Sample, grouped, printable, unsafe
from .remote import TRANSIENT, TRIES, Split, open_http_ourselves, wait
from .sources import empty
from .transform import Transform, own_generators


def _files(stream: Any) -> Iterator[Member]:
    """The files of a tar with their data, unless they must not be read or are too large.

    A compressed tar is not one here: a small one could fill the memory.
    """
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            wrong = unsafe(member)
            if wrong or member.isreg():
                is_read = not wrong and member.size <= MOST_BYTES
                data = tar.extractfile(member).read() if is_read else b""  # type: ignore[union-attr]
                yield Member(member.name, member.offset_data, member.size, data, wrong)
            tar.members = []  # type: ignore[attr-defined]  # it keeps them all


@dataclass(frozen=True)
class Streamed(IterableDataset[Images]):
    """One split for one rank.

    Args:
        classes: labels are below it. reader, readers: this one among those that read different images, over all ranks.
        count: images of a forward here. window: samples that are shuffled together, over all readers. cache: folder for
        whole shards, or "". done: forwards of this reader before the first one. once: a pass for evaluation instead of
        training for ever. image: see `Sample.image`. channels: see `check_channels`.
    """

    split: Split
    transform: Transform
    classes: int
    reader: int
    readers: int
    count: int
    window: int
    cache: str
    timeout: float
    done: int = 0
    once: bool = False
    image: str = ""
    channels: int = 0

    def start(self, workers: int, pin: bool, done: int = 0) -> Loader:
        """The images of one forward after the other, from forward `done` of this reader on."""

        def start(first: int) -> Iterable[Images]:
            return loader.data_loader(replace(self, done=done + first), workers, pin)

        return Loader(start, workers)

    def __iter__(self) -> Iterator[Images]:
        try:
            with own_generators():
                yield from self._pass() if self.once else self._training()
        except RefusedError as error:
            nothing = torch.empty(0)
            yield Images(nothing, nothing, nothing, [], refused=str(error))

    def _slot(self) -> tuple[int, int, int]:
        """(this worker, workers) among those of all readers, and its forwards among the `done` first of this reader."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        done = self.done // workers + (worker < self.done % workers)  # PyTorch asks them in turn, from the first on
        return self.reader * workers + worker, self.readers * workers, done

    def _training(self) -> Iterator[Images]:
        """Without end."""
        import webdataset

        slot, slots, done = self._slot()
        luck = random.Random(key(self.transform.seed, int(Site.ORDER), slot, done)[0])
        buffer = max(self.window // slots, 1)
        stages = [
            partial(self._shards, slot, slots, done * self.count),
            self._samples,
            self._checked,
            webdataset.shuffle(buffer, initial=max(buffer // 4, 1), rng=luck),
            partial(self._batches, transform=self.transform.training),
        ]
        yield from webdataset.DataPipeline(*stages)

    def _pass(self) -> Iterator[Images]:
        """Every sample of this worker's shards once, then padding up to the number of forwards of the longest."""
        slot, slots, done = self._slot()
        totals = [sum(self.split.lengths[i::slots]) for i in range(slots)]
        forwards = -(-max(totals) // self.count)
        samples = self._samples((0, shard) for shard in range(slot, len(self.split.shards), slots))
        batches = self._batches(self._checked(samples), self._held_out, last=True)
        yield from islice(chain(batches, iter(self._empty, None)), done, forwards)

    def _shards(self, slot: int, slots: int, skip: int) -> Iterator[tuple[int, int]]:
        """(epoch, shard): of the epochs' permutations, one after the other, every `slots`-th; without those whose
        samples are among the first `skip`."""
        count = len(self.split.shards)
        epoch, order = -1, torch.empty(0)
        for place in range(slot, sys.maxsize, slots):
            if place // count != epoch:
                epoch = place // count
                order = sequence(self.transform.seed, Site.ORDER, epoch, 0, count=count).argsort(stable=True)
            shard = int(order[place % count])
            if skip >= self.split.lengths[shard]:
                skip -= self.split.lengths[shard]
            else:
                skip = 0
                yield epoch, shard

    def _samples(self, shards: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, str, Sample]]:
        """(epoch, number in the split, shard, sample) of whole shards, however often they break off."""
        for epoch, shard in shards:
            url, length = self.split.urls[shard], self.split.lengths[shard]
            first, got = self.split.starts[shard], 0
            for attempt in range(TRIES):
                try:
                    for number, sample in enumerate(self._shard(url)):
                        if number >= got:
                            got += 1
                            yield epoch, first + number, url, sample
                    if got < length:
                        raise OSError(f"{counted(got, 'sample')}, _info.json says {length}")
                    break
                except TRANSIENT as error:
                    self._forget(url)
                    wait(attempt, url, error)

    def _checked(self, samples: Iterable[Any]) -> Iterator[Any]:
        """The same, unless the first ones have other channels than the data set."""
        rest = iter(samples)
        first = list(islice(rest, FIRST if self.channels else 0))
        check_channels(self._first_images(first), self.channels, self.transform.decoder)
        yield from chain(first, rest)

    def _first_images(self, samples: Iterable[Any]) -> Iterator[tuple[str, bytes]]:
        for _, _, url, sample in samples:
            try:
                yield f"{url}: {printable(sample.key)}", self._image_and_label(url, sample)[0]
            except BadImageError:  # told when it is its turn
                continue

    def _shard(self, url: str) -> Iterator[Sample]:
        from webdataset.gopen import gopen

        open_http_ourselves(self.timeout)
        with open(self._cache(url).get_file(url), "rb") if self.cache else gopen(url) as stream:
            yield from grouped(_files(stream))

    def _cache(self, url: str) -> Any:
        """webdataset's, which goes by file names only, in a folder of its own for each place that shards come from."""
        from webdataset.cache import FileCache

        folder, name, after = parts(url)
        place = hashlib.sha256(f"{folder}{after}".encode()).hexdigest()[:8]
        return FileCache(os.path.join(self.cache, place), url_to_name=lambda _: name)

    def _forget(self, url: str) -> None:
        """Take a shard that broke off out of the cache."""
        if self.cache:
            cache = self._cache(url)
            path = os.path.join(cache.cache_dir, cache.url_to_name(url))
            if os.path.exists(path):
                os.remove(path)

    def _held_out(self, data: bytes, *_: int) -> tuple[Tensor, list[float]]:
        return self.transform.held_out(data), []

    def _batches(self, samples: Iterable[Any], transform: Any, last: bool = False) -> Iterator[Images]:
        """Whole forwards. last: also an incomplete one, padded."""
        found, filled = self._empty(), 0
        for epoch, number, url, sample in samples:
            try:
                image, label = self._image_and_label(url, sample)
                pixels, view = transform(image, epoch, number, 0)
                found.pixels[filled], found.labels[filled] = pixels, label
                found.views[filled] = torch.tensor(view)
            except BadImageError as error:
                found.bad.append(f"{url}: {printable(sample.key)}: {error}")
                if not last:
                    continue
                found.labels[filled] = UNREADABLE
            filled += 1
            if filled == self.count:
                yield found
                found, filled = self._empty(), 0
        if last and filled:
            yield found

    def _image_and_label(self, url: str, sample: Sample) -> tuple[bytes, int]:
        for _, member in sample.members:
            if member.unsafe:
                raise BadImageError(member.unsafe)
        try:
            image, label = sample.image_and_label(self.image)
        except ValueError as error:
            raise BadImageError(printable(str(error))) from None
        if image.size > MOST_BYTES:
            raise BadImageError(f"{image.size} bytes")
        if label >= self.classes:
            raise RefusedError(
                f"{url}: {printable(sample.key)} has label {label}, but the data set has "
                f"{counted(self.classes, 'class', 'classes')}, "
                f"0 to {self.classes - 1}; is data.root right, or data.classes to be set?"
            )
        return image.data, label

    def _empty(self) -> Images:
        config = self.transform.config
        canvas = 0 if self.once else config.canvas
        side = canvas or self.transform.size
        images = empty(self.count, self.transform.channels, side, VIEW if canvas else 0)
        images.labels.fill_(PADDING)
        return images
