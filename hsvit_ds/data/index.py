"""The index of a split: where each sample of its tar shards lies, and what its label is.

The shards in a folder are indexed in its `SPLIT.index.npz`, by a walk over the tars' headers: no image is read. An
index holds 12 bytes a sample, so a rank and each of its workers can keep all of it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import tarfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np

from ..errors import RefusedError, counted, first_line, warn
from .layouts import NONE, name_in, options, split_shards
from .members import BLOCK, MOST_BYTES, Sample, grouped, printable, safe, walk

FORMAT = 2
"""1 took for a sample's image the first of its members that ended as one does."""


@dataclass(frozen=True)
class Index:
    """A split's samples, in the order of shards and of the members in them.

    shards: relative to `folder` where they lie in it. lengths: samples of each. bytes, modified, checksums: of each
    shard its size, its time of modification (ns) and the hash of its members' names, places and labels. offsets: uint32
    [N], in blocks of 512 bytes. sizes: uint32 [N], bytes of the image. labels: int32 [N]. problems: samples that are
    left out, and why. classes: what the labels mean, where that is known. image: the extensions that it was asked for,
    see `Sample.image`.
    """

    folder: Path
    shards: tuple[str, ...]
    lengths: np.ndarray
    bytes: np.ndarray
    modified: np.ndarray
    checksums: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    problems: tuple[str, ...]
    classes: tuple[str, ...] = ()
    image: str = ""

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], self.lengths.cumsum()])

    def shard_of(self, sample: int) -> int:
        return int(self._starts.searchsorted(sample, "right")) - 1

    def name(self, sample: int) -> str:
        """The shard and the member of a sample's image."""
        shard = self.shard_of(sample)
        try:
            with (self.folder / self.shards[shard]).open("rb") as file:
                header = os.pread(file.fileno(), BLOCK, (int(self.offsets[sample]) - 1) * BLOCK)
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError):
            member = f"sample {sample - int(self._starts[shard])}"
        return f"{self.shards[shard]}: {printable(member)}"

    @property
    def fingerprint(self) -> str:
        """Of what the order and the labels depend on, not of where the shards lie."""
        digest = hashlib.sha256("\n".join(self.shards).encode())
        for part in (self.lengths, self.checksums):
            digest.update(part.tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write it, unless the file holds the same already."""
        if self._is_in(path):
            return
        arrays = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self) if f.name != "folder"}
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, **{"format": np.array(FORMAT), **arrays})  # type: ignore[arg-type]
            partial.rename(path)
        except OSError as error:
            raise RefusedError(
                f"{path}: cannot be written ({error.strerror}); --out FOLDER puts it elsewhere"
            ) from error

    def _is_in(self, path: Path) -> bool:
        try:
            there = _read(path, self.folder)
        except Exception:  # none, or a damaged one
            return False
        parts = (f.name for f in fields(self) if f.name != "folder")
        return all(np.array_equal(getattr(there, name), getattr(self, name)) for name in parts)


def open_index(path: Path, folder: Path, patterns: Mapping[str, str] = NONE) -> Index:
    """The index in `path` of the shards in `folder`, compared with the files that are there. patterns: of the splits
    that are named, see `split_shards`.

    Raises:
        RefusedError: no index, one of another version or damaged, or shards that are missing, new or changed since.
    """
    if not path.exists():
        raise RefusedError(f"{path}: there is no index; make it: {command(path, folder, patterns=patterns)}")
    try:
        index = _read(path, folder)
    except Exception as error:  # NumPy makes nearly anything of a damaged file
        remedy = f"make it anew: {command(path, folder, patterns=patterns)}"
        raise RefusedError(f"{path}: not an index ({first_line(error)}); {remedy}") from error
    return _compared(index, path, patterns)


def command(path: Path, folder: Path, image: str = "", patterns: Mapping[str, str] = NONE) -> str:
    """The command that makes an index."""
    out = "" if path.parent == folder else f" --out {shlex.quote(str(path.parent))}"
    asked = f' --image "{image}"' if image else ""
    return f"hsvit shards index {shlex.quote(str(folder))}{out}{options(patterns)}{asked}"


def _read(path: Path, folder: Path) -> Index:
    """The index in `path`, whose parts fit each other; anybody may have written it."""
    with np.load(path, allow_pickle=False) as file:
        if file["format"] != FORMAT:
            raise ValueError(f"format {file['format']}, this version reads {FORMAT}")
        if any(part.compress_type for part in file.zip.infolist()):  # then it may take more memory than disk
            raise ValueError("compressed")
        arrays = {f.name: file[f.name] for f in fields(Index) if f.name != "folder"}
    names = ("shards", "problems", "classes")
    shards, problems, classes = (tuple(str(text) for text in arrays.pop(name)) for name in names)
    image = str(arrays.pop("image"))
    shapes = [(len(shards),)] * 4 + [(int(arrays["lengths"].sum()),)] * 3
    if [x.shape for x in arrays.values()] != shapes or any(x.dtype.kind not in "iu" for x in arrays.values()):
        raise ValueError("its arrays do not fit each other")
    if any(arrays[name].min(initial=0) < 0 for name in ("lengths", "offsets", "sizes", "labels")):
        raise ValueError("negative numbers")
    if odd := [name for name in shards if ".." in name.split("/")]:
        raise ValueError(f"{printable(odd[0])} is no shard's name")
    if arrays["sizes"].max(initial=0) > MOST_BYTES:
        raise ValueError(f"an image of more than {MOST_BYTES} bytes")
    return Index(folder, shards, problems=problems, classes=classes, image=image, **arrays)


def _compared(index: Index, path: Path, patterns: Mapping[str, str]) -> Index:
    """The index with the shards' times of modification as they are now; refused where the shards are not its own."""
    again = command(path, index.folder, index.image, patterns)
    remedy = f"make it anew: {again}"
    split = path.name.removesuffix(".index.npz")
    there = [name_in(index.folder, shard) for shard in split_shards(index.folder, patterns).get(split, [])]
    known = set(index.shards)
    if new := [name for name in there if name not in known]:
        raise RefusedError(f"{index.folder / new[0]}: not in {path} ({counted(len(new), 'such shard')}); {remedy}")
    modified, changed = index.modified.copy(), list[int]()
    for i, name in enumerate(index.shards):
        shard = index.folder / name
        try:
            found = shard.stat()
        except OSError as error:
            raise RefusedError(
                f"{shard}: {error.strerror}, but {path} names it; restore the shard, or {remedy}"
            ) from error
        if found.st_size != index.bytes[i]:
            raise RefusedError(f"{shard}: {found.st_size} bytes, {path} says {index.bytes[i]}; {remedy}")
        if found.st_mtime_ns != modified[i]:  # copied, or rewritten: the headers tell
            changed.append(i)
            modified[i] = found.st_mtime_ns
    if others := known.difference(there):  # whoever wrote the index may have named any file
        told = "tell the shards as when it was made (data.shards, --shards)" + (f", or {remedy}" if there else "")
        raise RefusedError(f"{path}: names {printable(min(others))}, which is no shard of {split}; {told}")
    if list(index.shards) != there:
        raise RefusedError(f"{path}: has the shards of {split} in another order; {remedy}")
    if changed:
        files = tuple((index.shards[i], int(index.bytes[i]), int(modified[i])) for i in changed)
        for i, checksum in zip(changed, _checksums(path, index.folder, index.image, files, again), strict=True):
            if checksum != index.checksums[i]:
                raise RefusedError(f"{index.folder / index.shards[i]}: its members are not those of {path}; {remedy}")
    return replace(index, modified=modified)


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


def build(
    folder: Path,
    shards: list[Path],
    processes: int,
    done: Callable[[Path], None] = lambda _: None,
    classes: Iterable[str] = (),
    image: str = "",
) -> Index:
    """Index the shards of a split. done: called after each shard. classes: what the labels mean. image: see
    `Sample.image`."""
    scans, problems, one = [], list[str](), partial(scan, image=image)
    names = tuple(name_in(folder, path) for path in shards)
    with ProcessPoolExecutor(processes) if processes > 1 else nullcontext() as pool:
        results = pool.map(one, shards) if pool is not None else map(one, shards)
        for path, name, result in zip(shards, names, results, strict=True):
            scans.append(result)
            problems += [problem.replace(path.name, printable(name), 1) for problem in result.problems]
            done(path)
    rows = np.array([row for s in scans for row in s.samples], dtype=np.int64).reshape(-1, 3)
    return Index(
        folder,
        names,
        lengths=np.array([len(s.samples) for s in scans]),
        bytes=np.array([s.bytes for s in scans]),
        modified=np.array([s.modified for s in scans]),
        checksums=np.array([s.checksum for s in scans], dtype=np.uint64),
        offsets=rows[:, 0].astype(np.uint32),
        sizes=rows[:, 1].astype(np.uint32),
        labels=rows[:, 2].astype(np.int32),
        problems=tuple(problems),
        classes=tuple(map(printable, classes)),
        image=image,
    )


@dataclass(frozen=True)
class Scan:
    """What a header walk finds in one shard. samples: (block of the image, its bytes, label)."""

    samples: list[tuple[int, int, int]]
    problems: list[str]
    bytes: int
    modified: int
    checksum: int


def scan(path: Path, image: str = "") -> Scan:
    """Walk over a shard's headers; samples that cannot be used are named in `problems`. image: see `Sample.image`."""
    samples: list[tuple[int, int, int]] = []
    problems: list[str] = []
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            for sample in grouped(safe(path, walk(path, file, problems))):
                found = _located(sample, image, status.st_size)
                if isinstance(found, str):
                    problems.append(printable(f"{path.name}: {found}"))
                else:
                    samples.append(found)
                place = "left out" if isinstance(found, str) else found
                digest.update(f"{sample.key} {place}\n".encode(errors="surrogateescape"))
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror}") from error
    checksum = int.from_bytes(digest.digest()[:8], "big")
    return Scan(samples, problems, status.st_size, status.st_mtime_ns, checksum)


def _located(sample: Sample, image: str, bytes_: int) -> tuple[int, int, int] | str:
    """(block, bytes, label) of a sample, or what is wrong with it."""
    try:
        found, label = sample.image_and_label(image)
    except ValueError as error:
        return f"{sample.key}: {error}"
    if not 0 < found.size <= MOST_BYTES:
        return f"{found.name}: {found.size} bytes"
    if found.offset + found.size > bytes_:
        return f"{found.name}: cut off"
    return found.offset // BLOCK, found.size, label
