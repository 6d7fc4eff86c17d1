"""Tar shards that are made from a source, resumably and byte by byte the same.

A shard is `NAME-SPLIT-0000.tar` of webdataset samples: NUMBER.cls, NUMBER.jpg and NUMBER.json. Beside the shards lie
`_info.json` in the layout of timm's webdataset reader, `classes.txt`, the index, and the record of how they were made.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from hsvit_kernels.random import sequence

from ...errors import RefusedError, counted, first_line
from .. import indexing
from ..decode import BadImageError
from ..index import Index
from ..layouts import split_shards
from ..scan import scan
from .items import Item, Source
from .sources import open_source, sample

INFO, CLASSES = "_info.json", "classes.txt"
Done = Callable[[int, int], None]  # is told (shards done, of how many)
_SHUFFLE_KEY = 0x736861726473  # "shards"
_HOLDOUT_KEY = 0x686F6C646F7574  # "holdout"
EACH = 1000
"""Images of a shard, where their number is not given."""
HELD_OUT = "val"


@dataclass(frozen=True)
class Options:
    """What a split is made with.

    shards: how many; 0: one for every `EACH` images. resize: the shorter side in pixels; without it images are copied
    as they are. holdout: share of each class's images that becomes the split "val" instead. strict: images that cannot
    be read are refused.
    """

    name: str
    split: str
    shards: int = 0
    resize: int | None = None
    quality: int = 87
    seed: int = 0
    holdout: float = 0.0
    strict: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name, re.ASCII):
            raise RefusedError(f'--name "{self.name}": must be letters, digits, _, . and -, as imagenet1k')
        if not re.fullmatch(r"[A-Za-z_]+", self.split):
            raise RefusedError(f'--split "{self.split}": must be letters, as train or val')
        limits = {"shards": (0, 10**6), "resize": (1, 2**16), "quality": (1, 100), "seed": (0, 2**32)}
        for option, (least, most) in limits.items():
            value = getattr(self, option)
            if value is not None and not least <= value <= most:
                raise RefusedError(f"--{option} {value}: must be from {least} to {most}")

        if not 0 <= self.holdout < 1:
            raise RefusedError(f"--holdout {self.holdout}: must be at least 0 and below 1, a share of the images")
        if self.holdout and self.split == HELD_OUT:
            raise RefusedError(f"--holdout {self.holdout}: makes the split {HELD_OUT} too; give --split another name")

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.split}"

    @property
    def record(self) -> str:
        return f"{self.stem}.make.json"


@dataclass(frozen=True)
class Job:
    """A shard to be written. first: the number of its first sample. left_out: what an earlier call could not read."""

    path: Path
    options: Options
    first: int
    items: list[Item]
    left_out: list[str]

    @property
    def is_done(self) -> bool:
        if not self.path.exists():
            return False
        found = scan(self.path)
        return not found.problems and len(found.samples) == len(self.items) - len(self.left_out)


def make(
    source_folder: Path, out: Path, options: Options, processes: int, done: Done
) -> Iterator[tuple[Index, list[str]]]:
    """Write the shards that are not there yet, then what describes all of them: a split, and one that is held out.

    Yields:
        The index of each, and which images could not be read and why.

    Raises:
        RefusedError: a source, options or files in `out` that do not fit; an image that cannot be read, where that is
            refused; a full disk.
    """
    if out.resolve().is_relative_to(source_folder.resolve()):
        raise RefusedError(f"{out}: is inside SOURCE {source_folder}; give a folder elsewhere")
    source = open_source(source_folder, options.split, read_info(out).get("classes", []), options.name)
    if not options.holdout:
        yield make_split(source, out, options, processes, done)
        return
    kept, held = hold_out(source, options.holdout, options.seed)
    yield make_split(kept, out, options, processes, done)
    # Its shards are as large as the others.
    count = options.shards and max(1, round(options.shards * len(held.items) / len(kept.items)))
    yield make_split(held, out, replace(options, split=HELD_OUT, shards=count, holdout=0.0), processes, done)


def hold_out(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """The images of a source in two parts, the second with the same share of each class, drawn by the seed.

    Raises:
        RefusedError: a class with one image.
    """
    luck = sequence(_HOLDOUT_KEY, seed, count=len(source.items)).tolist()
    of_class: dict[int, list[int]] = {}
    for i in sorted(range(len(source.items)), key=luck.__getitem__):
        of_class.setdefault(source.items[i].label, []).append(i)
    held = set[int]()
    for label, numbers in sorted(of_class.items()):
        if len(numbers) < 2:
            raise RefusedError(
                f"--holdout {share}: class {source.classes[label]} has one image, which cannot be in both splits"
            )
        held.update(numbers[: min(max(round(share * len(numbers)), 1), len(numbers) - 1)])
    parts: tuple[list[Item], list[Item]] = ([], [])
    for i, item in enumerate(source.items):
        parts[i in held].append(item)
    return replace(source, items=parts[0]), replace(source, items=parts[1])


def make_split(source: Source, out: Path, options: Options, processes: int, done: Done) -> tuple[Index, list[str]]:
    """Write a split's shards; see `make`."""
    count = len(source.items)
    if options.shards > count:
        raise RefusedError(
            f"--shards {options.shards}: more than the {counted(count, 'image')}; at most --shards {count}"
        )
    options = replace(options, shards=options.shards or -(-count // EACH))
    record, path = _claimed(out, options, source), out / options.record
    jobs = _dealt(out, options, source, record.left_out)
    with ProcessPoolExecutor(processes) as pool:
        for i, (job, left_out) in enumerate(zip(jobs, pool.map(write_shard, jobs), strict=True)):
            if left_out != job.left_out:
                record = replace(record, left_out={**record.left_out, job.path.name: left_out})
                record.save(path)
            done(i + 1, len(jobs))
    made = indexing.make(out, options.split, processes=processes, classes=source.titles)
    _describe(out, options.split, source, made)
    return made, [text for _, texts in sorted(record.left_out.items()) for text in texts]


@dataclass(frozen=True)
class Record:
    """How the shards of a split were made, so that another call can tell whether it goes on with the same."""

    options: dict[str, Any]
    images: int
    source: str
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        _write(path, json.dumps(asdict(self), indent=1))


def _claimed(out: Path, options: Options, source: Source) -> Record:
    """The record in `out`, of this call or of an earlier one that it continues; nothing of another is overwritten."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(f"{out}: {error.strerror}") from error
    known = read_info(out).get("classes", source.classes)
    if known != source.classes:
        raise RefusedError(f"{out / INFO}: names other classes ({len(known)}) than SOURCE has; give another OUT")
    record = Record({k: v for k, v in asdict(options).items() if k != "strict"}, len(source.items), source.fingerprint)
    path = out / options.record
    there = split_shards(out).get(options.split, [])
    if path.exists():
        record = replace(record, left_out=_same(path, record))
    elif there:
        raise RefusedError(f"{out / there[0]}: made otherwise, {path.name} is missing; give another OUT")
    for unfinished in out.glob(f"{options.stem}-*.tar.partial"):
        unfinished.unlink()
    record.save(path)
    return record


def _same(path: Path, now: Record) -> dict[str, list[str]]:
    """What the record in `path` left out; refused where it is of other options or another source."""
    remedy = f"give another OUT, or delete {path} and its shards"
    try:
        before = Record(**json.loads(path.read_text("utf-8")))
        differing = [
            f"--{k} {before.options[k]}, now {v}" for k, v in now.options.items() if v != before.options.get(k, v)
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RefusedError(f"{path}: not a record of hsvit shards make ({first_line(error)}); {remedy}") from error
    if before.source != now.source:
        differing.append(f"{counted(before.images, 'image')} ({before.source}), now {now.images} ({now.source})")
    if differing:
        raise RefusedError(f"{path}: shards were made with {'; '.join(differing)}; {remedy}")
    return before.left_out


def _dealt(out: Path, options: Options, source: Source, left_out: dict[str, list[str]]) -> list[Job]:
    """The split in its shuffled order, cut into shards whose lengths differ by at most one."""
    order = sequence(_SHUFFLE_KEY, options.seed, count=len(source.items)).argsort(stable=True).tolist()
    digits = max(4, len(str(options.shards - 1)))
    cuts = [len(order) * i // options.shards for i in range(options.shards + 1)]
    jobs = []
    for i, (first, stop) in enumerate(pairwise(cuts)):
        path = out / f"{options.stem}-{i:0{digits}d}.tar"
        items = [source.items[k] for k in order[first:stop]]
        jobs.append(Job(path, options, first, items, left_out.get(path.name, [])))
    return jobs


def write_shard(job: Job) -> list[str]:
    """Write a shard unless it is there; it gets its name once all of it is on disk. Gives what it left out."""
    if job.is_done:
        return job.left_out
    unfinished = job.path.with_name(job.path.name + ".partial")
    left_out = []
    try:
        with unfinished.open("wb") as file:
            # The defaults would write the time of day.
            with TarWriter(file, encoder=False, mtime=0, user="hsvit", group="hsvit") as tar:
                for number, item in enumerate(job.items, job.first):
                    try:
                        content = sample(item, job.options.resize, job.options.quality)
                    except BadImageError as error:
                        if job.options.strict:
                            raise RefusedError(f"{item.name}: {error} (--strict)") from error
                        left_out.append(f"{item.name}: {error}")
                    else:
                        tar.write({"__key__": f"{number:08d}", **content})
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(job.path)
    except OSError as error:
        raise RefusedError(f"{unfinished}: {error.strerror}; then the same command goes on from there") from error
    return left_out


def read_info(folder: Path) -> dict[str, Any]:
    """`_info.json`, or {} where there is none."""
    path = folder / INFO
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text("utf-8"))
        if not isinstance(info.get("splits", {}), dict) or not isinstance(info.get("classes", []), list):
            raise ValueError("splits must be an object, classes a list")
    except (OSError, ValueError, AttributeError) as error:
        raise RefusedError(f"{path}: not a description of shards ({first_line(error)}); repair or delete it") from error
    return info


def class_names(folder: Path) -> list[str]:
    """What the labels of the shards in a folder mean: the lines of `classes.txt`, or what `_info.json` says."""
    try:
        return (folder / CLASSES).read_text("utf-8", errors="surrogateescape").splitlines()
    except FileNotFoundError:
        return [str(name) for name in read_info(folder).get("classes", [])]
    except OSError as error:
        raise RefusedError(f"{folder / CLASSES}: {error.strerror}") from error


def disagreement(info: dict[str, Any], split: str, shards: Iterable[str], lengths: Iterable[int]) -> str | None:
    """What `_info.json` says otherwise than the shards of a split; None where it agrees or says nothing."""
    said = info.get("splits", {}).get(split)
    if said is None:
        return None
    found = dict(zip(shards, map(int, lengths), strict=True))
    try:
        known = dict(zip(said["filenames"], said["shard_lengths"], strict=True))
        total = said["num_samples"]
    except (KeyError, TypeError, ValueError) as error:
        return f"{split} has no proper filenames, shard_lengths and num_samples ({first_line(error)})"
    for name in sorted(known.keys() | found.keys()):
        if known.get(name) != found.get(name):
            said_to = counted(known[name], "sample") if name in known else "no samples"
            return f"{name} has {said_to}, found: {found.get(name, 'no such shard')}"
    if total != sum(found.values()):
        return f"{split} has {counted(total, 'sample')}, found: {sum(found.values())}"
    return None


def _describe(out: Path, split: str, source: Source, made: Index) -> None:
    info = read_info(out)
    info.setdefault("splits", {})[split] = {
        "name": split,
        "filenames": list(made.shards),
        "shard_lengths": made.lengths.tolist(),
        "num_samples": len(made),
    }
    info["classes"] = source.classes
    _write(out / INFO, json.dumps(info, indent=1))
    if source.titles != source.classes or not (out / CLASSES).exists():  # the better names stay
        _write(out / CLASSES, "".join(f"{title}\n" for title in source.titles))


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".partial")
    try:
        unfinished.write_text(text, "utf-8", errors="surrogateescape")
        unfinished.rename(path)
    except OSError as error:
        raise RefusedError(f"{path}: cannot be written ({error.strerror})") from error
