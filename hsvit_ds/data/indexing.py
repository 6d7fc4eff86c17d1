"""Making a split's index: shard by shard, in parallel, from where an earlier call was stopped.

What is found is kept beside the index until all of it is there: in `SPLIT.index.shards.partial` a line a shard, in
`SPLIT.index.samples.partial` 12 bytes a sample. What an index that is there says of shards that have not changed since
is taken over, so a set that has grown is not read again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from ..errors import RefusedError
from .arrays import CHUNK, Column, write
from .index import COLUMNS, FORMAT, SUFFIX, Index, bytes_of, file_of, read_index
from .layouts import NONE, split_shards, states
from .members import printable
from .scan import scan

ROW = np.dtype([(name, "<u4") for name in COLUMNS])
SAFE = 1.0
"""Seconds after which what was found is put on disk."""
AHEAD = 4
"""Shards for each process that are read before those in front of them are written down."""
State = tuple[int, int]
"""A file's bytes and time of modification, ns."""


@dataclass(frozen=True)
class Shard:
    """What an index says of a shard. digest: of its rows, which tells whether they are whole."""

    name: str
    bytes: int
    modified: int
    checksum: int
    digest: int
    samples: int
    largest_label: int
    problems: list[str]


Found = tuple[Shard, np.ndarray]
"""A shard and its samples, `ROW` [N]."""


def make(
    folder: Path,
    split: str,
    *,
    where: Path | None = None,
    processes: int = 1,
    done: Callable[[], None] = lambda: None,
    classes: Iterable[str] = (),
    image: str = "",
    patterns: Mapping[str, str] = NONE,
) -> Index:
    """Index the shards of a split. An index without a sample is not left there.

    Args:
        where: folder of the index; that of the shards by default. done: called after each shard. classes: what the
        labels mean. image: see `Sample.image`. patterns: see `split_shards`.

    Raises:
        RefusedError: a shard that cannot be read, or that comes, goes or changes meanwhile; no room or no right to
            write; another call at work on the same index.
    """
    path = (where or folder) / f"{split}{SUFFIX}"
    names, titles = split_shards(folder, patterns)[split], tuple(map(printable, classes))
    known, files = Known(file_of(where or folder, split), folder, image), states(folder, names)
    try:
        with Journal(path, image) as journal:
            count = journal.go_on(names, files)
            for _ in range(count):
                done()
            with ProcessPoolExecutor(processes) if processes > 1 else nullcontext() as pool:

                def task(name: str, file: State) -> Callable[[], Found]:
                    if there := known.found(name, file):
                        return lambda: there
                    read = partial(_read, folder, name, image)
                    return read if pool is None else pool.submit(read).result

                for found in _ahead(map(task, names[count:], files[count:]), AHEAD * processes):
                    journal.add(*found)
                    done()
            _check_unchanged(folder, split, patterns, journal.shards)
            if not known.says(journal.shards, titles):
                journal.write(titles)
    except OSError as error:
        elsewhere = "" if where else "; --out FOLDER puts it elsewhere"
        raise RefusedError(f"{path}: cannot be written ({error.strerror}){elsewhere}") from error
    index = read_index(path, folder, patterns)
    if not len(index):
        path.unlink()
    return index


def _ahead(tasks: Iterable[Callable[[], Found]], ahead: int) -> Iterator[Found]:
    """The results of tasks in their order, of which `ahead` have been asked for."""
    waiting = deque[Callable[[], Found]]()
    for task in tasks:
        waiting.append(task)
        if len(waiting) > ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _read(folder: Path, name: str, image: str) -> Found:
    found = scan(folder / name, image)
    rows = np.array(found.samples, dtype=ROW)
    problems = [problem.replace(Path(name).name, printable(name), 1) for problem in found.problems]
    return _shard(name, found.bytes, found.modified, found.checksum, rows, problems), rows


def _shard(name: str, size: int, modified: int, checksum: int, rows: np.ndarray, problems: list[str]) -> Shard:
    largest = int(rows["labels"].max()) if len(rows) else -1
    return Shard(name, size, modified, checksum, _digest(rows), len(rows), largest, problems)


def _digest(rows: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(rows.tobytes(), digest_size=8).digest(), "little")


class Known:
    """What an index that is there says; nothing where it is damaged, of the old format, or of other images."""

    def __init__(self, path: Path, folder: Path, image: str) -> None:
        self._number: dict[str, int] = {}
        self._taken = 0
        try:
            self._index = index = read_index(path, folder)
            self._ends, self._digests = index.lengths.cumsum(), index.arrays.read("digests")
            self._problem_ends = index.arrays.read("problem_counts").cumsum()
        except Exception:  # all is read anew
            return
        if index.image == image:
            self._number = {name: i for i, name in enumerate(index.shards)}

    def found(self, name: str, file: State) -> Found | None:
        """What it says of a shard, if that is as it was, and what was said of it too."""
        i = self._number.get(name)
        if i is None or file != (self._index.bytes[i], self._index.modified[i]):
            return None
        index = self._index
        count = int(index.lengths[i])
        rows = np.empty(count, ROW)
        for column in COLUMNS:
            rows[column] = index.read(column, int(self._ends[i]) - count, count)
        problems = index.problems[self._problem_ends[i - 1] if i else 0 : self._problem_ends[i]]
        size, modified, checksum = (int(numbers[i]) for numbers in (index.bytes, index.modified, index.checksums))
        shard = _shard(name, size, modified, checksum, rows, list(problems))
        if shard.digest != self._digests[i]:
            return None
        self._taken += 1
        return shard, rows

    def says(self, shards: Sequence[Shard], classes: tuple[str, ...]) -> bool:
        """Whether all of this was taken from it, and it says nothing else."""
        names = [shard.name for shard in shards]
        return self._taken == len(names) and list(self._number) == names and self._index.classes == classes


class Journal:
    """What was found so far of the index in `path`, on disk; it goes once the index is there."""

    def __init__(self, path: Path, image: str) -> None:
        self._path, self._image = path, image
        self.shards: list[Shard] = []
        stem = path.name.removesuffix(SUFFIX)
        self._lines = path.with_name(f"{stem}.index.shards.partial").open("a+b")
        self._rows = path.with_name(f"{stem}.index.samples.partial").open("a+b")
        self._waiting: list[Found] = []
        self._saved = time.monotonic()

    def __enter__(self) -> Journal:
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(f"{self._path}: another process is making it; wait for its end") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        for file in (self._lines, self._rows):
            with file:
                if kind is None:
                    os.unlink(file.name)
                elif file is self._lines:
                    self._save()

    def go_on(self, names: Sequence[str], files: Sequence[State]) -> int:
        """Take what an earlier call left of the first shards, as far as they are the same; gives their number."""
        self._lines.seek(0)
        first = json.dumps({"format": FORMAT, "image": self._image}).encode() + b"\n"
        self._rows.seek(0)
        end = samples = 0
        room = os.fstat(self._rows.fileno()).st_size // ROW.itemsize
        if self._lines.readline() == first:
            end = len(first)
            for name, file, line in zip(names, files, self._lines, strict=False):
                shard = self._whole(line, room - samples)
                if shard is None or (shard.name, shard.bytes, shard.modified) != (name, *file):
                    break
                self.shards.append(shard)
                end, samples = end + len(line), samples + shard.samples
        self._lines.truncate(end)
        self._rows.truncate(samples * ROW.itemsize)
        if not end:
            self._lines.write(first)
        return len(self.shards)

    def _whole(self, line: bytes, room: int) -> Shard | None:
        """The shard in a line, if its samples, of which at most `room` are there, come next."""
        try:
            shard = Shard(**json.loads(line))
            is_there = 0 <= shard.samples <= room
        except (ValueError, TypeError):  # it was cut off
            return None
        return shard if is_there and _digest(np.fromfile(self._rows, ROW, shard.samples)) == shard.digest else None

    def add(self, shard: Shard, rows: np.ndarray) -> None:
        self.shards.append(shard)
        self._waiting.append((shard, rows))
        if time.monotonic() - self._saved > SAFE:
            self._save()

    def _save(self) -> None:
        """The samples first, so that no line says more than there is."""
        self._rows.write(b"".join(rows.tobytes() for _, rows in self._waiting))
        _on_disk(self._rows)
        self._lines.write(b"".join(json.dumps(asdict(shard)).encode() + b"\n" for shard, _ in self._waiting))
        _on_disk(self._lines)
        self._waiting, self._saved = [], time.monotonic()

    def write(self, classes: Sequence[str]) -> None:
        """The index."""
        self._save()

        def column(name: str) -> Iterator[np.ndarray]:
            self._rows.seek(0)
            while len(part := np.fromfile(self._rows, ROW, CHUNK)):
                yield part[name]

        columns = {name: column(name) for name in COLUMNS}
        write(self._path, *content(self.shards, columns, classes, self._image))


def content(
    shards: Sequence[Shard], samples: Mapping[str, Iterable[np.ndarray]], classes: Sequence[str], image: str
) -> tuple[dict[str, Column], dict[str, str]]:
    """The arrays of an index, and its metadata. samples: the parts of each of the `COLUMNS`."""
    count = sum(shard.samples for shard in shards)
    columns = {
        "lengths": Column.of([s.samples for s in shards], "<i8"),
        "bytes": Column.of([s.bytes for s in shards], "<i8"),
        "modified": Column.of([s.modified for s in shards], "<i8"),
        "problem_counts": Column.of([len(s.problems) for s in shards], "<i8"),
        "checksums": Column.of([s.checksum for s in shards], "<u8"),
        "digests": Column.of([s.digest for s in shards], "<u8"),
        **{name: Column("<i4" if name == "labels" else "<u4", count, parts) for name, parts in samples.items()},
        "shards": Column.of(bytes_of([s.name for s in shards]), "|u1"),
        "problems": Column.of(bytes_of([text for s in shards for text in s.problems]), "|u1"),
        "classes": Column.of(bytes_of(classes), "|u1"),
    }
    largest = max((shard.largest_label for shard in shards), default=-1)
    return columns, {"format": FORMAT, "image": image, "largest_label": str(largest)}


def _check_unchanged(folder: Path, split: str, patterns: Mapping[str, str], shards: Sequence[Shard]) -> None:
    """Refuse shards that are others by now than those that were read."""
    names = split_shards(folder, patterns).get(split, [])
    now = dict(zip(names, states(folder, names), strict=True))
    read = {shard.name: (shard.bytes, shard.modified) for shard in shards}
    for name in sorted(now.keys() | read.keys()):
        if now.get(name) != read.get(name):
            what = "came" if name not in read else "is gone" if name not in now else "was changed"
            raise RefusedError(
                f"{folder / name}: {what} while the shards of {split} were read; once they stay as they are, the same "
                "command goes on from there"
            )


def _on_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
