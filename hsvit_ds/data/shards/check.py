"""A check of everything in tar shards: tars, keys, labels, and every image decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...errors import RefusedError, counted
from ..decode import BadImageError, digest, open_upright
from ..index import open_index
from ..layouts import NAMES, NONE, split_shards
from ..members import MOST_BYTES, Member, Sample, grouped, walk
from ..scan import scan
from .make import INFO, Done, disagreement, read_info

WARNINGS = ("duplicate image", "image in two splits", "index")


class Finding(NamedTuple):
    """What is wrong, and with which shard and member."""

    kind: str
    text: str

    @property
    def is_error(self) -> bool:
        return self.kind not in WARNINGS


@dataclass
class Checked:
    """A shard that was read. samples: as its index counts them. images: of each sample the SHA-256 of its pixels, its
    label and its name."""

    shard: str
    samples: int
    findings: list[Finding] = field(default_factory=list)
    keys: dict[str, None] = field(default_factory=dict)
    images: list[tuple[bytes, int | None, str]] = field(default_factory=list)

    def find(self, kind: str, member: str, what: str) -> None:
        self.findings.append(Finding(kind, f"{self.shard}: {member}: {what}"))


def check(
    folder: Path, classes: int, image: str, processes: int, done: Done, patterns: Mapping[str, str] = NONE
) -> tuple[list[Finding], dict[str, int]]:
    """Read every byte of the shards in a folder. Gives what is wrong, and the samples of each split.

    classes: labels are below it; 0 takes the number of classes in `_info.json`, if it tells. image: see `Sample.image`;
    "" takes that of the split's index, if it is in the folder. patterns: see `split_shards`.

    Raises:
        RefusedError: no shards, or an `_info.json` that cannot be read.
    """
    splits, info = shards_in(folder, patterns), read_info(folder)
    findings, samples, total, count = list[Finding](), dict[str, int](), sum(map(len, splits.values())), 0
    with ProcessPoolExecutor(processes) as pool:
        known = Known()
        for split, names in splits.items():
            known.keys, lengths, wanted = {}, [], image
            try:
                wanted = image or open_index(folder, split, patterns=patterns).image
            except RefusedError as error:
                findings.append(Finding("index", str(error)))
            read = partial(check_shard, classes=classes or len(info.get("classes", [])), image=wanted)
            for checked in pool.map(read, map(folder.joinpath, names), names):
                findings += [*checked.findings, *known.repeated(split, checked)]
                lengths.append(checked.samples)
                done(count := count + 1, total)
            samples[split] = sum(lengths)
            if text := disagreement(info, split, names, lengths):
                findings.append(Finding(INFO, text))
    for split in info.get("splits", {}).keys() - splits.keys():
        findings.append(Finding(INFO, f"{split} is in it, but has no shards"))
    return findings, samples


def shards_in(folder: Path, patterns: Mapping[str, str] = NONE) -> dict[str, list[str]]:
    """`split_shards` of a folder that must have some."""
    if not folder.is_dir():
        raise RefusedError(f"{folder}: not a folder")
    if not (splits := split_shards(folder, patterns)):
        raise RefusedError(f"{folder}: no shards named {NAMES}; --shards SPLIT=PATTERN tells other names")
    return splits


class Known:
    """Keys of a split's shards so far, and images of all of them: some 200 bytes a sample."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.images: dict[bytes, tuple[int | None, str, str]] = {}

    def repeated(self, split: str, checked: Checked) -> Iterator[Finding]:
        shard = checked.shard
        for key in checked.keys:
            if (first := self.keys.setdefault(key, shard)) != shard:
                yield Finding("duplicate key", f"{shard}: {key}: also in {first}")
        for pixels, label, name in checked.images:
            this = f"{shard}: {name}"
            first_label, first, other = self.images.setdefault(pixels, (label, this, split))
            if first != this and first_label != label:
                yield Finding("one image, two labels", f"{this}: label {label}, but {first} has {first_label}")
            elif first != this:
                yield Finding("duplicate image" if other == split else "image in two splits", f"{this}: also {first}")


def check_shard(path: Path, name: str, classes: int, image: str) -> Checked:
    """Read a shard and decode its images, one at a time; how far Pillow decodes them is how much is checked. name: of
    the shard in what is found."""
    try:
        samples = len(scan(path, image).samples)
    except RefusedError:  # for a reason that is found below
        samples = 0
    checked = Checked(name, samples)
    problems = list[str]()

    def watched(members: Iterable[Member]) -> Iterator[Member]:
        for member in members:
            if member.unsafe:
                checked.find("unsafe member", member.name, member.unsafe)
            else:
                yield member

    try:
        with path.open("rb") as file:
            for sample in grouped(watched(walk(path, file, problems))):
                if sample.key in checked.keys or sample.repeated:
                    checked.find("duplicate key", sample.key, "more than once in this shard")
                checked.keys[sample.key] = None
                _check_image(file.fileno(), sample, image, _checked_label(sample, classes, checked), checked)
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
    checked.findings += [Finding("damaged tar", problem.replace(path.name, name, 1)) for problem in problems]
    return checked


def _checked_label(sample: Sample, classes: int, checked: Checked) -> int | None:
    key = sample.key
    try:
        label = sample.label()
    except ValueError:
        checked.find("label", key, "not a number")
        return None
    if label is None:
        checked.find("label", key, f"missing (no {key}.cls, nor label in {key}.json)")
    elif not 0 <= label < (classes or 2**31):
        checked.find(
            "label",
            key,
            f"{label} is out of range" + (f" of {counted(classes, 'class', 'classes')}" if classes else ""),
        )
    return label


def _check_image(file: int, sample: Sample, wanted: str, label: int | None, checked: Checked) -> None:
    try:
        image = sample.image(wanted)
    except ValueError as error:
        checked.find("which image", sample.key, str(error))
        return
    if image.size > MOST_BYTES:
        checked.find("broken image", image.name, f"{image.size} bytes are more than {MOST_BYTES}")
        return
    data = os.pread(file, image.size, image.offset)
    if not image.size:
        checked.find("empty image", image.name, "0 bytes")
        return
    if len(data) < image.size:
        checked.find("broken image", image.name, f"cut off after {len(data)} of {image.size} bytes")
        return
    try:
        pixels = open_upright(data)
    except BadImageError as error:
        checked.find("broken image", image.name, str(error))
        return
    checked.images.append((digest(pixels), label, image.name))
