"""The index of a split: where each sample of its tar shards lies, and what its label is.

`NAME-SPLIT-0000.tar`, … in one folder are indexed in `SPLIT.index.npz` beside them, by a walk over the tars' headers:
no image is read. An index holds 12 bytes a sample, so a rank and each of its workers can keep all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import RefusedError, first_line

FORMAT = 1
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
BLOCK = 512  # of a tar
MOST_BYTES = 2**29
"""Of an image file: it is read whole."""
_SHARD = re.compile(r"(?P<name>.+)-(?P<split>[A-Za-z_]+)-\d+\.tar")


@dataclass(frozen=True)
class Index:
    """A split's samples, in the order of shards and of the members in them.

    lengths: samples of each shard. bytes, modified, checksums: of each shard its size, its time of modification
    (ns) and the hash of its members' names, places and labels. offsets: uint32 [N], in blocks of 512 bytes. sizes:
    uint32 [N], bytes of the image. labels: int32 [N]. problems: samples that are left out, and why. classes: what the
    labels mean, where that is known.
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


def open_index(path: Path, folder: Path) -> Index:
    """The index in `path` of the shards in `folder`, compared with the files that are there.

    Raises:
        RefusedError: no index, one of another version or damaged, or shards that are missing, new or changed since.
    """
    remedy = f"make it anew: hsvit shards index {folder}"
    if not path.exists():
        raise RefusedError(f"{path}: there is no index; make it: hsvit shards index {folder}")
    try:
        index = _read(path, folder)
    except Exception as error:  # NumPy makes nearly anything of a damaged file
        raise RefusedError(f"{path}: not an index ({first_line(error)}); {remedy}") from error
    return _compared(index, path, remedy)


def _read(path: Path, folder: Path) -> Index:
    """The index in `path`, whose parts fit each other; anybody may have written it."""
    with np.load(path, allow_pickle=False) as file:
        if file["format"] != FORMAT:
            raise ValueError(f"format {file['format']}, this version reads {FORMAT}")
        if any(part.compress_type for part in file.zip.infolist()):  # then it may take more memory than disk
            raise ValueError("compressed")
        arrays = {f.name: file[f.name] for f in fields(Index) if f.name in file}  # the first ones had no classes
    names = ("shards", "problems", "classes")
    shards, problems, classes = (tuple(str(text) for text in arrays.pop(name, ())) for name in names)
    shapes = [(len(shards),)] * 4 + [(int(arrays["lengths"].sum()),)] * 3
    if [x.shape for x in arrays.values()] != shapes or any(x.dtype.kind not in "iu" for x in arrays.values()):
        raise ValueError("its arrays do not fit each other")
    if any(arrays[name].min(initial=0) < 0 for name in ("lengths", "offsets", "sizes", "labels")):
        raise ValueError("negative numbers")
    if odd := [name for name in shards if "/" in name or not _SHARD.fullmatch(name)]:
        raise ValueError(f"{printable(odd[0])} is no shard's name")
    if arrays["sizes"].max(initial=0) > MOST_BYTES:
        raise ValueError(f"an image of more than {MOST_BYTES} bytes")
    return Index(folder, shards, problems=problems, classes=classes, **arrays)


def _compared(index: Index, path: Path, remedy: str) -> Index:
    """The index with the shards' times of modification as they are now; refused where the shards are not its own."""
    split = path.name.removesuffix(".index.npz")
    known = set(index.shards)
    new = [p.name for p in split_shards(index.folder).get(split, []) if p.name not in known]
    if new:
        raise RefusedError(f"{index.folder / new[0]}: not in {path} ({len(new)} such shards); {remedy}")
    modified = index.modified.copy()
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
            if scan(shard).checksum != index.checksums[i]:
                raise RefusedError(f"{shard}: its members are not those of {path}; {remedy}")
            modified[i] = found.st_mtime_ns
    return replace(index, modified=modified)


def split_shards(folder: Path) -> dict[str, list[Path]]:
    """{split: its shards in the order of their names} of the `NAME-SPLIT-0000.tar` in a folder."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.tar")):
        if match := _SHARD.fullmatch(path.name):
            found.setdefault(match["split"], []).append(path)
    for split, paths in found.items():
        names = sorted({_SHARD.fullmatch(p.name)["name"] for p in paths})  # type: ignore[index]
        if len(names) > 1:
            raise RefusedError(
                f"{folder}: shards of {' and '.join(names)} for {split}; keep each set in its own folder"
            )
    return found


def no_split(where: str, split: str, there: Iterable[str]) -> RefusedError:
    """That a split is not among those that are there, and which key names another in its place."""
    found = list(there)
    others = [name for name in found if name != "train"]
    remedy = f'; data.{split} = "{others[0]}" takes that one in its place' if others and split != "train" else ""
    return RefusedError(f"{where}: no split {split} ({', '.join(found) or 'no NAME-SPLIT-0000.tar'}){remedy}")


def build(
    folder: Path,
    shards: list[Path],
    processes: int,
    done: Callable[[Path], None] = lambda _: None,
    classes: Iterable[str] = (),
) -> Index:
    """Index the shards of a split. done: called after each shard. classes: what the labels mean."""
    scans = []
    with ProcessPoolExecutor(processes) if processes > 1 else nullcontext() as pool:
        results = pool.map(scan, shards) if pool is not None else map(scan, shards)
        for path, result in zip(shards, results, strict=True):
            scans.append(result)
            done(path)
    rows = np.array([row for s in scans for row in s.samples], dtype=np.int64).reshape(-1, 3)
    return Index(
        folder,
        tuple(path.name for path in shards),
        lengths=np.array([len(s.samples) for s in scans]),
        bytes=np.array([s.bytes for s in scans]),
        modified=np.array([s.modified for s in scans]),
        checksums=np.array([s.checksum for s in scans], dtype=np.uint64),
        offsets=rows[:, 0].astype(np.uint32),
        sizes=rows[:, 1].astype(np.uint32),
        labels=rows[:, 2].astype(np.int32),
        problems=tuple(problem for s in scans for problem in s.problems),
        classes=tuple(map(printable, classes)),
    )


@dataclass(frozen=True)
class Scan:
    """What a header walk finds in one shard. samples: (block of the image, its bytes, label)."""

    samples: list[tuple[int, int, int]]
    problems: list[str]
    bytes: int
    modified: int
    checksum: int


def scan(path: Path) -> Scan:
    """Walk over a shard's headers; samples that cannot be used are named in `problems`."""
    samples: list[tuple[int, int, int]] = []
    problems: list[str] = []
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            for key, members in grouped(safe(path, walk(path, file, problems))):
                sample = _sample(key, members, status.st_size)
                if isinstance(sample, str):
                    problems.append(printable(f"{path.name}: {sample}"))
                else:
                    samples.append(sample)
                digest.update(f"{key} {sample}\n".encode(errors="surrogateescape"))
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror}") from error
    checksum = int.from_bytes(digest.digest()[:8], "big")
    return Scan(samples, problems, status.st_size, status.st_mtime_ns, checksum)


@dataclass(frozen=True)
class Member:
    """A file in a tar. text: read where it is small metadata, not an image. unsafe: why it must not be read, or ""."""

    name: str
    offset: int
    size: int
    text: bytes
    unsafe: str


def walk(path: Path, file: BinaryIO, problems: list[str], end: int = sys.maxsize) -> Iterator[Member]:
    """The files of a tar in their order; where it is cut off or damaged the walk ends and says so in `problems`.

    end: byte of `file` at which the tar ends, where it is itself in a tar.
    """
    last = "its start"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0:  # tarfile would go back, for ever
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                if (wrong := unsafe(member)) or member.isfile():
                    text = b""
                    if member.name.endswith((".cls", ".json")) and member.size <= 1 << 20:
                        text = os.pread(file.fileno(), member.size, member.offset_data)
                    yield Member(member.name, member.offset_data, member.size, text, wrong)
                    last = printable(member.name)
                tar.members = []  # type: ignore[attr-defined]  # it keeps them all
            # tarfile stops at any block that is no header.
            rest = os.pread(file.fileno(), max(min(1 << 20, end - tar.offset), 0), tar.offset)
            if len(rest) < BLOCK:
                problems.append(f"{path.name}: cut off after {last} (no end mark)")
            elif any(rest):
                problems.append(f"{path.name}: damaged after {last}")
    except (tarfile.TarError, RecursionError) as error:
        problems.append(printable(f"{path.name}: cut off or damaged after {last} ({first_line(error)})"))


def unsafe(member: tarfile.TarInfo) -> str:
    """Why a member must not be read, "" where it may be. Nothing is unpacked here; but where it is, such a member
    reaches what lies outside the folder, and a sparse one can claim any size."""
    if not member.isdir() and (not member.isreg() or member.issparse()):
        return "a link, a device or a sparse file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the folder that it is unpacked in"
    return ""


def safe(path: Path, members: Iterable[Member]) -> Iterator[Member]:
    """The members of a tar; refused where one is unsafe."""
    for member in members:
        if member.unsafe:
            raise RefusedError(f"{path}: {printable(member.name)}: {member.unsafe}; make the tar anew without it")
        yield member


def printable(text: str) -> str:
    """Names in a tar may hold anything; what is shown and saved of them is one line that no terminal obeys."""
    return text if text.isprintable() else ascii(text)


def grouped(members: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {extension: member}) of consecutive members with one key, as webdataset groups them."""
    key, group = "", dict[str, Member]()
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        this = f"{folder}/{stem}" if folder else stem
        if this != key and group:
            yield key, group
            group = {}
        key = this
        group[(dot + extension).lower()] = member
    if group:
        yield key, group


def label_of(members: dict[str, bytes]) -> int | None:
    """The label in `.cls`, or in "label" of `.json`, by the members' extensions; None where there is none.

    Raises:
        ValueError: it is not a number.
    """
    if ".cls" in members:
        return int(members[".cls"])
    if ".json" in members:
        try:
            label = json.loads(members[".json"]).get("label")
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if label is not None and type(label) is not int:
            raise ValueError(label)
        return label
    return None


def _sample(key: str, members: dict[str, Member], bytes_: int) -> tuple[int, int, int] | str:
    """(block, bytes, label) of a sample, or what is wrong with it."""
    image = next((member for extension, member in members.items() if extension.endswith(IMAGES)), None)
    if image is None:
        return f"{key}: no image among {', '.join(sorted(members))}"
    try:
        label = label_of({extension: member.text for extension, member in members.items()})
    except (ValueError, AttributeError):
        return f"{key}: its label is not a number"
    if label is None:
        return f"{image.name}: no label ({key}.cls, or label in {key}.json)"
    if not 0 <= label < 2**31:
        return f"{image.name}: label {label} is out of range"
    if not 0 < image.size <= MOST_BYTES:
        return f"{image.name}: {image.size} bytes"
    if image.offset + image.size > bytes_:
        return f"{image.name}: cut off"
    return image.offset // BLOCK, image.size, label
