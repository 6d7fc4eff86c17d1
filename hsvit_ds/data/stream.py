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
import json
import os
import random
import re
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from http.client import HTTPException
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hsvit_kernels.random import Site, key, sequence

from ..errors import RefusedError, counted, first_line, warn
from . import loader
from .augment import VIEW
from .batch import PADDING, UNREADABLE, Images
from .decode import BadImageError
from .index import no_split
from .loader import Loader
from .members import MOST_BYTES, Member, Sample, grouped, printable, unsafe
from .sources import empty
from .transform import Transform, own_generators

TRIES = 8
"""Times that a shard is asked for before the run is refused; a quarter of a second is waited after the first, and each
time twice as long: half a minute in all."""
TRANSIENT = (OSError, EOFError, ValueError, HTTPException, tarfile.TarError, RecursionError)
"""What a server, a subprocess or a file that breaks off becomes on its way through urllib, tarfile and webdataset."""
_FINAL = (400, 401, 403, 404, 405, 410)  # of a URL that will not get better
_SHARD = re.compile(r"\w[\w.-]*\.tar", re.ASCII)
_LOGIN = re.compile(r"://[^/\s]*@")


def is_url(root: str) -> bool:
    return "://" in root or is_command(root)


def is_command(root: str) -> bool:
    """Whether it is run by a shell."""
    return root.startswith("pipe:")


def check_root(root: str) -> None:
    """
    Raises:
        ValueError: it holds what must not be saved with a run, shown and tracked.
    """
    if _LOGIN.search(root):
        raise ValueError(
            "root holds a user name or password, which would be saved with the run: put them into ~/.netrc and set "
            '"pipe:curl -sSfn https://…"'
        )
    if is_url(root) and not is_command(root) and "?" in root:
        raise ValueError(
            "root holds a query (?…), which may be a key and would be saved with the run: put it into the environment "
            """and set 'pipe:curl -sSf "https://…?$KEY"'"""
        )


@dataclass(frozen=True)
class Split:
    """A split's shards. lengths: samples of each."""

    root: str
    shards: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.shards, self.lengths)).encode()).hexdigest()[:16]


def open_split(root: str, split: str, timeout: float) -> Split:
    """What `ROOT/_info.json` says of a split, as `hsvit shards make` writes it and timm reads it."""
    splits = _info(root, timeout)["splits"]
    if split not in splits:
        raise no_split(f"{root}/_info.json", split, splits)
    about = splits[split]
    try:
        found = Split(root, tuple(about["filenames"]), tuple(int(length) for length in about["shard_lengths"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{root}/_info.json: split {split} has no {error}; `hsvit shards make` writes it") from None
    if not found.shards or len(found.shards) != len(found.lengths):
        raise RefusedError(
            f"{root}/_info.json: {split} has {counted(len(found.shards), 'file')} and "
            f"{counted(len(found.lengths), 'length')}"
        )
    # They become parts of paths, of URLs and, behind pipe:, of a shell's command.
    if odd := [shard for shard in found.shards if not _SHARD.fullmatch(str(shard))]:
        raise RefusedError(
            f"{root}/_info.json: {str(odd[0])!a} of {split} is not the plain name of a tar "
            "(letters, digits, _, . and -)"
        )
    return found


def split_names(root: str, timeout: float) -> list[str]:
    """The splits that `ROOT/_info.json` names."""
    return list(_info(root, timeout)["splits"])


def class_names(root: str, timeout: float) -> tuple[str, ...]:
    """What `ROOT/_info.json` calls the labels; () where it does not."""
    return tuple(str(name) for name in _info(root, timeout).get("classes", []))


@cache
def _info(root: str, timeout: float) -> dict[str, Any]:
    url = f"{root}/_info.json"

    def read() -> dict[str, Any]:
        from webdataset.gopen import gopen

        _open_http_ourselves(timeout)
        with gopen(url) as stream:
            found: dict[str, Any] = json.loads(stream.read())
            return found

    return _tried(read, url)


def _tried(action: Any, url: str) -> Any:
    """The result of an action that may fail for a while."""
    for attempt in range(TRIES):
        try:
            return action()
        except TRANSIENT as error:
            _wait(attempt, url, error)
    return None


def _wait(attempt: int, url: str, error: Exception) -> None:
    words = error.args[:1]  # webdataset adds the stream and the URL
    reason = words[0].partition(" @ <")[0] if words and isinstance(words[0], str) else first_line(error)
    if attempt + 1 == TRIES:
        raise RefusedError(
            f"{url}: {reason}; tried {counted(TRIES, 'time')}. Is the server there, and the file whole?"
        ) from error
    delay = 0.25 * 2**attempt
    warn(f"{url}: {reason}; again in {delay:g} s")
    time.sleep(delay)


class _Download:
    """A response that is known to be whole when it ends: Python's own stops short without a word."""

    def __init__(self, response: Any) -> None:
        self._response = response
        length = response.headers.get("Content-Length")
        self._left = int(length) if length is not None else 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._response.read() if size < 0 else self._response.read(size)
        self._left -= len(data)
        if (size < 0 or not data) and self._left > 0:
            raise OSError(f"cut off {self._left} bytes before its end")
        return data

    def close(self) -> None:
        self._response.close()

    def __enter__(self) -> _Download:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_http_ourselves(timeout: float) -> None:
    """Take HTTP out of webdataset's hands: its curl waits for a stalled server for ever, and cannot tell 404."""
    from webdataset.gopen import gopen_schemes

    def http(url: str, *_: object, **__: object) -> _Download:
        try:
            return _Download(urllib.request.urlopen(url, timeout=timeout))
        except urllib.error.HTTPError as error:
            if error.code in _FINAL:
                raise RefusedError(f"{url}: {error.code} {error.reason}; is data.root right?") from None
            raise

    gopen_schemes.update(http=http, https=http)


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
        training for ever. image: see `Sample.image`.
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
        batches = self._batches(samples, self._held_out, last=True)
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
            url, length = f"{self.split.root}/{self.split.shards[shard]}", self.split.lengths[shard]
            first, got = sum(self.split.lengths[:shard]), 0
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
                    _wait(attempt, url, error)

    def _shard(self, url: str) -> Iterator[Sample]:
        from webdataset.gopen import gopen

        _open_http_ourselves(self.timeout)
        with open(self._cache().get_file(url), "rb") if self.cache else gopen(url) as stream:
            yield from grouped(_files(stream))

    def _cache(self) -> Any:
        """webdataset's, in a folder of its own for each root, as it goes by file names only."""
        from webdataset.cache import FileCache

        root = hashlib.sha256(self.split.root.encode()).hexdigest()[:8]
        return FileCache(os.path.join(self.cache, root), url_to_name=lambda url: url.rpartition("/")[2])

    def _forget(self, url: str) -> None:
        """Take a shard that broke off out of the cache."""
        if self.cache:
            cache = self._cache()
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
        images = empty(self.count, canvas or self.transform.size, VIEW if canvas else 0)
        images.labels.fill_(PADDING)
        return images
