"""What is in a folder of images: its splits and classes, and what of it can be trained on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from ..data.decode import GREY, BadImageError, digest, open_upright
from ..data.index import member
from ..data.layouts import split_shards
from ..data.members import BLOCK, IMAGES, MOST_BYTES
from ..data.scan import scan
from ..data.shards.items import Item, Source
from ..data.shards.make import class_names, hold_out
from ..data.shards.sources import SPLITS, open_source
from ..errors import RefusedError, counted

HELD_OUT = 0.15
"""Share of each class's images that becomes a split which is not there."""
LEAST = {("val",): 2, ("test",): 2, ("val", "test"): 3}
"""Images of each class that holding splits out of train needs: one for each."""
UNEVEN = 10
"""Times as many images of the most frequent class as of the rarest from which it is said."""


class Seen(NamedTuple):
    """An image that was decoded. digest: of its pixels. wrong: why there are none."""

    width: int = 0
    height: int = 0
    format: str = ""
    digest: bytes = b""
    wrong: str = ""


@dataclass(frozen=True)
class Survey:
    """What a folder holds.

    splits: of images that can be read, each once. shorter: median of the images' shorter sides, pixels. sizes: width
    and height of the smallest and the largest. formats: images by extension and mode. damaged, copies: what is left
    out, a line each. others: files of no image by their extension. held_out: splits that were not there and are drawn
    from train. tars: whether the folder's shards can be used as they are.
    """

    splits: dict[str, Source]
    shorter: int
    sizes: tuple[tuple[int, int], tuple[int, int]]
    formats: dict[str, int]
    damaged: tuple[str, ...]
    copies: tuple[str, ...]
    others: dict[str, int]
    held_out: tuple[str, ...]
    tars: bool
    names: dict[str, str]
    """What the tars call "val" and "test", where they stay as they are."""

    @property
    def classes(self) -> list[str]:
        return self.splits["train"].titles

    @property
    def is_grey(self) -> bool:
        """Whether every image has one channel."""
        return {kind.split()[-1] for kind in self.formats} <= set(GREY)

    def counts(self) -> dict[str, Counter[int]]:
        """Images of each label, by split."""
        return {split: Counter(item.label for item in source.items) for split, source in self.splits.items()}


def survey(folder: Path, seed: int, processes: int, done: Callable[[int, int], None]) -> Survey:
    """Look at every image in a folder, or of a CSV of file and label; nothing is written.

    Raises:
        RefusedError: nothing to train on, with what was found.
    """
    splits, tars = _splits(folder)
    if "train" not in splits:
        raise RefusedError(f"{folder}: has {', '.join(splits)} and no train; call the images to learn from train")
    seen = _look(splits, processes, done)
    kept, damaged, copies = _readable(splits, seen)
    good = [one for one in seen.values() if not one.wrong]
    found = {split: source for split, source in kept.items() if source.items}
    _check(folder, splits, found)
    missing = tuple(split for split in ("val", "test") if split not in found)
    whole = tars and len(missing) < 2  # one stands for the other: shards are not written again for it
    if missing and not whole:
        found = _hold_out(folder, found, missing, seed)
    sides = sorted((one.width, one.height) for one in good)
    return Survey(
        found,
        int(median(min(size) for size in sides)),
        (min(sides, key=lambda s: s[0] * s[1]), max(sides, key=lambda s: s[0] * s[1])),
        dict(Counter(one.format for one in good).most_common()),
        damaged,
        copies,
        {} if tars else _others(folder),
        () if whole else missing,
        whole,
        {SPLITS.get(split, split): split for split in split_shards(folder)} if whole else {},
    )


def _splits(folder: Path) -> tuple[dict[str, Source], bool]:
    """The images as they are found, and whether they lie in shards."""
    if not folder.exists():
        raise RefusedError(f"{folder}: no such folder")
    if folder.is_file():
        if folder.suffix.lower() != ".csv":
            raise RefusedError(
                f"{folder}: a file; give a folder with a sub-folder of images for each class, or a CSV of file, label"
            )
        return {"train": open_source(folder, "train", [])}, False
    if shards := split_shards(folder):
        return _of_shards(folder, shards), True
    inside = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    named = {name: SPLITS[name.lower()] for name in inside if name.lower() in SPLITS}
    if named and len(named) == len(inside):
        twice = [name for name, split in named.items() if list(named.values()).count(split) > 1]
        if twice:
            raise RefusedError(f"{folder}: {' and '.join(sorted(twice))} are one split; keep one of them")
        train = next((name for name, split in named.items() if split == "train"), None)
        known = open_source(folder / train, "train", []).classes if train else []
        return {split: open_source(folder / name, split, known) for name, split in named.items()}, False
    if not inside:
        raise RefusedError(f"{folder}: {_content(folder)}, and no sub-folder; put the images of each class in one")
    return {"train": open_source(folder, "train", [])}, False


def _content(folder: Path) -> str:
    names = [entry.name for entry in os.scandir(folder)]
    images = sum(name.lower().endswith(IMAGES) for name in names)
    return counted(images, "image") if images else "empty" if not names else f"{counted(len(names), 'file')}, no image"


def _of_shards(folder: Path, shards: dict[str, list[str]]) -> dict[str, Source]:
    """The images where they lie in the tars, whose labels have names where the folder says them."""
    names, found = class_names(folder), {}
    for split, tars in shards.items():
        read = [(folder / tar, sample) for tar in tars for sample in scan(folder / tar).samples]
        most = max((label for _, (_, _, label) in read), default=-1) + 1
        classes = list(names) if len(names) >= most else [str(label) for label in range(most)]
        items = [
            Item(str(tar), block * BLOCK, size, label, classes[label], member(tar, block * BLOCK))
            for tar, (block, size, label) in read
        ]
        found[SPLITS.get(split, split)] = Source(items, classes, classes)
    return found


def _look(splits: dict[str, Source], processes: int, done: Callable[[int, int], None]) -> dict[tuple[str, int], Seen]:
    """What of each image is there, by split and place."""
    items = [(split, place) for split, source in splits.items() for place in range(len(source.items))]
    found = {}
    with ProcessPoolExecutor(processes) as pool:
        every = pool.map(look, (splits[split].items[place] for split, place in items), chunksize=16)
        for number, (key, seen) in enumerate(zip(items, every, strict=True), 1):
            found[key] = seen
            done(number, len(items))
    return found


def look(item: Item) -> Seen:
    """Decode an image."""
    if item.size > MOST_BYTES:
        return Seen(wrong=f"{item.size} bytes are more than {MOST_BYTES}")
    try:
        image = open_upright(item.read())
    except (BadImageError, RefusedError) as error:
        return Seen(wrong=str(error))
    extension = Path(item.name).suffix.lower().removeprefix(".").replace("jpeg", "jpg").replace("tiff", "tif")
    return Seen(image.width, image.height, f"{extension.upper()} {image.mode}", digest(image))


def _readable(
    splits: dict[str, Source], seen: dict[tuple[str, int], Seen]
) -> tuple[dict[str, Source], tuple[str, ...], tuple[str, ...]]:
    """Each image once: without the damaged ones, without copies of one that was before, and without one that is in two
    classes, which may be either."""
    labels: dict[bytes, set[int]] = {}
    for (split, place), one in seen.items():
        labels.setdefault(one.digest, set()).add(splits[split].items[place].label)
    damaged, copies, first = [], [], dict[bytes, str]()
    kept: dict[str, list[Item]] = {split: [] for split in splits}
    # What is held out keeps its image: of two copies the one in train goes.
    for split in sorted(splits, key=lambda name: name == "train"):
        for place, item in enumerate(splits[split].items):
            one, name = seen[split, place], f"{split}/{item.name}" if len(splits) > 1 else item.name
            if one.wrong:
                damaged.append(f"{name}: {one.wrong}")
            elif len(labels[one.digest]) > 1:
                classes = ", ".join(splits[split].titles[label] for label in sorted(labels[one.digest]))
                copies.append(f"{name}: the same image is in {classes}")
            elif one.digest in first:
                copies.append(f"{name}: the same image as {first[one.digest]}")
            else:
                first[one.digest] = name
                kept[split].append(item)
    found = {split: replace(source, items=kept[split]) for split, source in splits.items()}
    return found, tuple(damaged), tuple(copies)


def _check(folder: Path, splits: dict[str, Source], found: dict[str, Source]) -> None:
    """Refuse what nothing can be learned from."""
    if "train" not in found:
        total = sum(len(source.items) for source in splits.values())
        raise RefusedError(f"{folder}: none of its {counted(total, 'image')} can be read")
    train = found["train"]
    if len(train.classes) < 2:
        raise RefusedError(
            f"{folder}: one class, {train.titles[0]}, with {counted(len(train.items), 'image')}: nothing to tell it "
            "from; give a folder with a sub-folder for each class"
        )
    counts = Counter(item.label for item in train.items)
    if empty := [title for label, title in enumerate(train.titles) if not counts[label]]:
        raise RefusedError(f"{folder}: class {empty[0]} has no readable image in train; add some, or remove the class")
    for split, source in found.items():
        if source.classes != train.classes:
            differing = sorted(set(source.classes) ^ set(train.classes))
            where = split if differing[0] in source.classes else "train"
            raise RefusedError(
                f"{folder}: {split} and train have other classes: {differing[0]} is in {where} alone"
                f"{f', as {len(differing) - 1} more' if len(differing) > 1 else ''}; every split has the same folders"
            )


def _hold_out(folder: Path, found: dict[str, Source], missing: tuple[str, ...], seed: int) -> dict[str, Source]:
    train, least = found["train"], LEAST[missing]
    counts = Counter(item.label for item in train.items)
    few = [label for label in range(len(train.classes)) if counts[label] < least]
    if few:
        raise RefusedError(
            f"{folder}: class {train.titles[few[0]]} has {counted(counts[few[0]], 'readable image')}: train"
            f"{''.join(f' and {split}' for split in missing)} need one each, {least} in all; add images to it, or move "
            "the folder away"
        )
    parts, left = dict(found), 1.0
    for split in missing:
        train, parts[split] = hold_out(train, HELD_OUT / left, seed)
        left -= HELD_OUT
    return {"train": train} | {split: parts[split] for split in parts if split != "train"}


def _others(folder: Path) -> dict[str, int]:
    """Files by their extension that no image has; hidden ones aside."""
    if folder.is_file():
        return {}
    names: Iterable[str] = (name for _, _, files in os.walk(folder) for name in files)
    kinds = Counter(
        Path(name).suffix.lower() or name
        for name in names
        if not name.startswith(".") and not name.lower().endswith(IMAGES)
    )
    return dict(kinds.most_common())
