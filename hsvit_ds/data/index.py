"""The index of a split: where each sample of its tar shards lies, and what its label is.

The shards in a folder are indexed in its `SPLIT.index.safetensors`, by a walk over the tars' headers: no image is read.
It has 12 bytes a sample, which stay on disk: a rank and its workers read those of the samples that they need.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import RefusedError, counted, first_line, warn
from .arrays import Arrays
from .layouts import NONE, options, split_shards, states
from .members import BLOCK, MOST_BYTES, printable
from .scan import scan

FORMAT = "3"
"""2 was an `.npz`, which is still read. 1 took for a sample's image the first of its members that ended as one does."""
SUFFIX, OLD_SUFFIX = ".index.safetensors", ".index.npz"
COLUMNS = ("offsets", "sizes", "labels")
"""Of every sample: the block of 512 bytes where its image begins in the shard, the image's bytes, and its label."""


class Place(NamedTuple):
    """Where a sample's image lies. offset, size: bytes."""

    shard: int
    offset: int
    size: int
    label: int


@dataclass(frozen=True)
class Index:
    """A split's samples, in the order of shards and of the members in them.

    shards: relative to `folder` where they lie in it. lengths: samples of each. bytes, modified, checksums: of each
    shard its size, its time of modification (ns) and the hash of its members' names, places and labels. problems:
    samples that are left out, and why. classes: what the labels mean, where that is known. image: the extensions that
    it was asked for, see `Sample.image`. arrays: the file, which has the `COLUMNS`. again: the command that makes it.
    """

    folder: Path
    shards: tuple[str, ...]
    lengths: np.ndarray
    bytes: np.ndarray
    modified: np.ndarray
    checksums: np.ndarray
    problems: tuple[str, ...]
    classes: tuple[str, ...]
    image: str
    largest_label: int
    arrays: Arrays
    again: str

    def __len__(self) -> int:
        return self.arrays.count("labels")

    @property
    def path(self) -> Path:
        return self.arrays.path

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], self.lengths.cumsum()])

    def shard_of(self, sample: int) -> int:
        return int(self._starts.searchsorted(sample, "right")) - 1

    def place(self, sample: int) -> Place:
        """
        Raises:
            RefusedError: it cannot be: the index was changed while it was read, or never was one of the shards.
        """
        block, size, label = (int(self.read(name, sample, 1)[0]) for name in COLUMNS)
        shard = self.shard_of(sample)
        if block < 0 or not 0 < size <= MOST_BYTES or block * BLOCK + size > self.bytes[shard]:
            raise RefusedError(
                f"{self.path}: says that sample {sample} has {size} bytes from {block * BLOCK} on, in a shard of "
                f"{self.bytes[shard]}, {self.shards[shard]}; delete it, and make it anew: {self.again}"
            )
        if not 0 <= label <= self.largest_label:
            raise RefusedError(
                f"{self.path}: says that sample {sample} has label {label}, and {self.largest_label} is the largest; "
                f"delete it, and make it anew: {self.again}"
            )
        return Place(shard, block * BLOCK, size, label)

    def read(self, column: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """[count] of one of the `COLUMNS`, from sample `first` on; by default of all samples.

        Raises:
            RefusedError: the file was changed or cut since it was opened.
        """
        try:
            return self.arrays.read(column, first, count)
        except (ValueError, OSError) as error:
            raise RefusedError(
                f"{self.path}: {first_line(error)}, after it was opened; restore it, or make it anew ({self.again}) "
                "and start again"
            ) from error

    def name(self, sample: int) -> str:
        """The shard and the member of a sample's image."""
        shard = self.shard_of(sample)
        try:
            return f"{self.shards[shard]}: {member(self.folder / self.shards[shard], self.place(sample).offset)}"
        except (OSError, tarfile.TarError, RefusedError):
            return f"{self.shards[shard]}: sample {sample - int(self._starts[shard])}"

    def label_counts(self) -> dict[int, int]:
        """{label: samples} of the labels that there are; all are read."""
        found = Counter[int]()
        for labels in self.arrays.chunks("labels"):
            found.update(dict(zip(*(x.tolist() for x in np.unique(labels, return_counts=True)), strict=True)))
        return found

    def image_bytes(self) -> int:
        """Of all samples together; all are read."""
        return sum(int(sizes.sum(dtype=np.int64)) for sizes in self.arrays.chunks("sizes"))

    def named_with(self, label: int) -> str:
        """The name of the first sample that has a label, for a message; all of them are looked at."""
        first = 0
        for labels in self.arrays.chunks("labels"):
            if len(found := (labels == label).nonzero()[0]):
                return self.name(first + int(found[0]))
            first += len(labels)
        return "a sample"

    @property
    def fingerprint(self) -> str:
        """Of what the order and the labels depend on, not of where the shards lie."""
        digest = hashlib.sha256("\n".join(self.shards).encode(errors="surrogateescape"))
        for part in (self.lengths, self.checksums):
            digest.update(part.tobytes())
        return digest.hexdigest()[:16]


def member(shard: Path, offset: int) -> str:
    """The name of the member whose data begins at a byte of a shard.

    Raises:
        OSError, tarfile.TarError: there is none.
    """
    with shard.open("rb") as file:
        header = os.pread(file.fileno(), BLOCK, offset - BLOCK)
    return printable(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)


def file_of(folder: Path, split: str) -> Path:
    """The file of a split's index in a folder; one of the old format where that alone is there."""
    new, old = (folder / f"{split}{suffix}" for suffix in (SUFFIX, OLD_SUFFIX))
    return old if old.exists() and not new.exists() else new


def splits_in(folder: Path) -> list[str]:
    """The splits that have an index in a folder."""
    found = [path.name.removesuffix(suffix) for suffix in (SUFFIX, OLD_SUFFIX) for path in folder.glob(f"*{suffix}")]
    return sorted(set(found))


def open_index(folder: Path, split: str, where: Path | None = None, patterns: Mapping[str, str] = NONE) -> Index:
    """The index of a split of the shards in `folder`, compared with the files that are there. where: its folder, if it
    is not in the same. patterns: of the splits that are named, see `split_shards`.

    Raises:
        RefusedError: no index, one of another version or damaged, or shards that are missing, new or changed since.
    """
    path = file_of(where or folder, split)
    if not path.exists():
        raise RefusedError(f"{path}: there is no index; make it: {command(folder, where, patterns=patterns)}")
    try:
        index = read_index(path, folder, patterns)
    except Exception as error:
        remedy = f"make it anew: {command(folder, where, patterns=patterns)}"
        raise RefusedError(f"{path}: not an index ({first_line(error)}); {remedy}") from error
    return _compared(index, split, patterns)


def command(folder: Path, where: Path | None = None, image: str = "", patterns: Mapping[str, str] = NONE) -> str:
    """The command that makes the indexes of a folder."""
    out = "" if where in (None, folder) else f" --out {shlex.quote(str(where))}"
    asked = f' --image "{image}"' if image else ""
    return f"hsvit shards index {shlex.quote(str(folder))}{out}{options(patterns)}{asked}"


def read_index(path: Path, folder: Path, patterns: Mapping[str, str] = NONE) -> Index:
    """The index in `path`, whose parts fit each other; anybody may have written it, and its samples are checked when
    they are read.

    Raises:
        Exception: there is none; a damaged file makes nearly anything of zipfile, json and NumPy.
    """
    arrays = Arrays(path)
    old = path.suffix == ".npz"
    said = str(arrays.read("format")[0]) if old else arrays.metadata.get("format")
    if said not in ("2", FORMAT):
        raise ValueError(f"format {said}, this version reads {FORMAT}, and 2 of an .npz")
    texts = _texts_of_npz if old else _texts
    shards, problems, classes = (texts(arrays.read(name)) for name in ("shards", "problems", "classes"))
    numbers = {name: arrays.read(name) for name in ("lengths", "bytes", "modified", "checksums")}
    image = str(arrays.read("image")[0]) if old else arrays.metadata["image"]
    kinds = {arrays.places[name].dtype.kind for name in (*numbers, *COLUMNS)}
    lengths = numbers["lengths"].tolist()
    counts = [arrays.count(name) for name in COLUMNS]
    if kinds - {"i", "u"} or {len(x) for x in numbers.values()} != {len(shards)} or set(counts) != {sum(lengths)}:
        raise ValueError("its arrays do not fit each other")
    if min(lengths, default=0) < 0:
        raise ValueError("negative numbers")
    if odd := [name for name in shards if ".." in name.split("/")]:
        raise ValueError(f"{printable(odd[0])} is no shard's name")
    largest = max((int(x.max()) for x in arrays.chunks("labels")), default=-1) if old else None
    return Index(
        folder,
        shards,
        problems=problems,
        classes=classes,
        image=image,
        largest_label=int(arrays.metadata["largest_label"]) if largest is None else largest,
        arrays=arrays,
        again=command(folder, path.parent, image, patterns),
        lengths=numbers["lengths"].astype("<i8"),
        bytes=numbers["bytes"].astype("<i8"),
        modified=numbers["modified"].astype("<i8"),
        checksums=numbers["checksums"].astype("<u8"),
    )


def _texts(array: np.ndarray) -> tuple[str, ...]:
    return tuple(array.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1])


def _texts_of_npz(array: np.ndarray) -> tuple[str, ...]:
    return tuple(map(str, array.tolist()))


def bytes_of(texts: Sequence[str]) -> np.ndarray:
    """uint8: texts as an index holds them, each with a zero behind it."""
    return np.frombuffer("".join(f"{text}\0" for text in texts).encode("utf-8", "surrogateescape"), np.uint8)


def _compared(index: Index, split: str, patterns: Mapping[str, str]) -> Index:
    """The index with the shards' times of modification as they are now; refused where the shards are not its own."""
    path, remedy = index.path, f"make it anew: {index.again}"
    there = split_shards(index.folder, patterns).get(split, [])
    known = set(index.shards)
    if new := [name for name in there if name not in known]:
        raise RefusedError(f"{index.folder / new[0]}: not in {path} ({counted(len(new), 'such shard')}); {remedy}")
    found = np.array(states(index.folder, index.shards), dtype="<i8").reshape(-1, 2)
    for i in (found[:, 0] != index.bytes).nonzero()[0].tolist():
        shard = index.folder / index.shards[i]
        if found[i, 0] < 0:
            raise RefusedError(
                f"{shard}: No such file or directory, but {path} names it; restore the shard, or {remedy}"
            )
        raise RefusedError(f"{shard}: {found[i, 0]} bytes, {path} says {index.bytes[i]}; {remedy}")
    if others := known.difference(there):  # whoever wrote the index may have named any file
        told = "tell the shards as when it was made (data.shards, --shards)" + (f", or {remedy}" if there else "")
        raise RefusedError(f"{path}: names {printable(min(others))}, which is no shard of {split}; {told}")
    if list(index.shards) != there:
        raise RefusedError(f"{path}: has the shards of {split} in another order; {remedy}")
    # Copied, or rewritten: the headers tell.
    if changed := (found[:, 1] != index.modified).nonzero()[0].tolist():
        files = tuple((index.shards[i], int(index.bytes[i]), int(found[i, 1])) for i in changed)
        checksums = _checksums(path, index.folder, index.image, files, index.again)
        for i, checksum in zip(changed, checksums, strict=True):
            if checksum != index.checksums[i]:
                raise RefusedError(f"{index.folder / index.shards[i]}: its members are not those of {path}; {remedy}")
    return replace(index, modified=found[:, 1])


@cache
def _checksums(path: Path, folder: Path, image: str, files: tuple[tuple[str, int, int], ...], again: str) -> list[int]:
    """Those of shards (name, bytes, time of modification), by a walk over each; a process opens an index several times,
    and walks once. again: the command that makes the index."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warn(
            f"{folder}: the times of {counted(len(files), 'shard')} are not those in {path.name}, "
            f"as of copies: each start compares headers; this ends it: {again}"
        )
    return [scan(folder / name, image).checksum for name, _, _ in files]
