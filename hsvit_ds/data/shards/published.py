"""Data sets as they are published: CIFAR's binary version, idx files as MNIST's, Tiny-ImageNet, Food-101.

Nothing is unpickled: loading a pickle runs what whoever wrote it wants.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import RefusedError, counted, read_text
from ..members import IMAGES, printable
from .items import GZIP, Item, Source, unpacked

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
PACKED = (".tar.gz", ".tgz", ".zip")
LAYOUTS = (
    "CIFAR's data_batch_1.bin or train.bin, train-images-idx3-ubyte, Tiny-ImageNet's val_annotations.txt, Food-101's "
    "meta/train.txt"
)
PICKLES = ({"data_batch_1", "batches.meta"}, {"train", "test", "meta"})
"""Files of CIFAR's pickled versions."""
SIDE = 32  # of CIFAR, pixels
NAMED = {
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
}
"""Classes by the name of a set whose files do not say them."""


def open_published(folder: Path, names: set[str], split: str, name: str) -> Source | None:
    """The split of a published set; None where the folder is none. names: what is in it. name: of the data set.

    Raises:
        RefusedError: pickled, incomplete, or files that contradict each other.
    """
    if any(files <= names and all((folder / file).is_file() for file in files) for files in PICKLES):
        raise RefusedError(
            f"{folder}: the pickled (python) version of CIFAR, which is not read: loading a pickle can run anything; "
            f"fetch the binary version: {CIFAR_URL}"
        )
    if {"data_batch_1.bin", "test_batch.bin"} & names:
        return _cifar(folder, split, _CIFAR10)
    if {"train.bin", "test.bin"} & names:
        return _cifar(folder, split, _CIFAR100)
    if any(_idx_file(names, prefix, 3) for prefix in _IDX.values()):
        return _idx(folder, names, split, name)
    if ANNOTATIONS in names:
        return _tiny_imagenet(folder.parent, folder.name if split == folder.name else split)
    if "wnids.txt" in names and (folder / "val" / ANNOTATIONS).is_file():
        return _tiny_imagenet(folder, split)
    if "images" in names and (folder / "meta" / "classes.txt").is_file():
        return _food101(folder, split)
    return None


def _of_split(folder: Path, split: str, parts: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    if split not in parts:
        raise RefusedError(f"{folder}: --split {split}: it has {' and '.join(parts)}")
    return parts[split]


class _Cifar(NamedTuple):
    """files: of each split. names: the file of the classes. before: bytes before the label of a record."""

    files: dict[str, tuple[str, ...]]
    names: str
    before: int


_CIFAR10 = _Cifar(
    {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}, "batches.meta.txt", 0
)
# A record of CIFAR-100 has its coarse label first.
_CIFAR100 = _Cifar({"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt", 1)


def _cifar(folder: Path, split: str, kind: _Cifar) -> Source:
    """Records of labels and 3,072 bytes: red, green and blue, each by row."""
    classes, items = read_text(folder / kind.names).split(), list[Item]()
    head, pixels = kind.before + 1, 3 * SIDE * SIDE
    record = head + pixels
    for name in _of_split(folder, split, kind.files):
        path = folder / name
        data = np.fromfile(path, np.uint8)
        if not data.size or data.size % record:
            raise RefusedError(
                f"{path}: {data.size} bytes are no whole records of {record}; fetch it again: {CIFAR_URL}"
            )
        labels = data.reshape(-1, record)[:, kind.before].tolist()
        _check_labels(path, labels, len(classes))
        items += [
            Item(str(path), i * record + head, pixels, label, classes[label], f"{name}/{i:05d}.png", (3, SIDE, SIDE))
            for i, label in enumerate(labels)
        ]
    return Source(items, classes, classes)


def _check_labels(path: Path, labels: list[int], classes: int) -> None:
    if labels and max(labels) >= classes:
        where = next(i for i, label in enumerate(labels) if label >= classes)
        raise RefusedError(f"{path}: image {where} has label {labels[where]} of {counted(classes, 'class', 'classes')}")


_IDX = {"train": "train", "test": "t10k"}


def _idx_file(names: Iterable[str], prefix: str, dimensions: int) -> str:
    """The name that idx files have in one of their spellings, or ""."""
    kind = "images" if dimensions == 3 else "labels"
    stems = (f"{prefix}-{kind}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", GZIP))
    return next((stem for stem in stems if stem in names), "")


def _idx(folder: Path, names: set[str], split: str, name: str) -> Source:
    """Images uint8 [N, H, W] and labels uint8 [N] (http://yann.lecun.com/exdb/mnist); the names of classes are no part
    of them."""
    (prefix,) = _of_split(folder, split, {split: (prefix,) for split, prefix in _IDX.items()})
    files = [_idx_file(names, prefix, dimensions) for dimensions in (3, 1)]
    if not all(files):
        missing = f"{prefix}-images-idx3-ubyte" if not files[0] else f"{prefix}-labels-idx1-ubyte"
        raise RefusedError(f"{folder}: --split {split} needs {missing}, or {missing}{GZIP}")
    images, labelled = (folder / file for file in files)
    (count, height, width), _ = _read_idx(images, 3)
    (labels_count,), data = _read_idx(labelled, 1)
    if count != labels_count:
        raise RefusedError(
            f"{images}: {counted(count, 'image')}, but {labelled.name} has {counted(labels_count, 'label')}"
        )
    labels = list(data)
    classes = read_text(folder / "classes.txt").splitlines() if "classes.txt" in names else list(NAMED.get(name, ()))
    classes = classes or [str(label) for label in range(max(labels, default=-1) + 1)]
    _check_labels(labelled, labels, len(classes))
    size, start = height * width, 16
    items = [
        Item(str(images), start + i * size, size, label, classes[label], f"{prefix}/{i:05d}.png", (1, height, width))
        for i, label in enumerate(labels)
    ]
    return Source(items, classes, classes)


def _read_idx(path: Path, dimensions: int) -> tuple[tuple[int, ...], bytes]:
    """(sizes, what follows them) of an idx file of bytes."""
    data = unpacked(str(path)) if path.suffix == GZIP else path.read_bytes()
    if data[:4] != bytes((0, 0, 8, dimensions)):
        raise RefusedError(
            f"{path}: begins with {data[:4].hex(' ') or 'nothing'}, an idx file of bytes in "
            f"{counted(dimensions, 'dimension')} with {bytes((0, 0, 8, dimensions)).hex(' ')}"
        )
    start = 4 + 4 * dimensions
    sizes = struct.unpack(f">{dimensions}I", data[4:start]) if len(data) >= start else (0,)
    needed = start + math.prod(sizes)
    if not all(sizes) or len(data) != needed:
        said = " x ".join(map(str, sizes))
        raise RefusedError(f"{path}: {len(data)} bytes, but its header says {said}, {needed} bytes; fetch it again")
    return sizes, data[start:]


ANNOTATIONS = "val_annotations.txt"


def _tiny_imagenet(folder: Path, split: str) -> Source:
    """A folder of images a class to train on; those of val lie in one, and a file says their classes."""
    _of_split(folder, split, {"train": (), "val": ()})
    lists = {name: folder / name for name in ("wnids.txt", "words.txt")}
    classes = sorted(read_text(lists["wnids.txt"]).split())
    words = (
        dict(line.split("\t", 1) for line in _lines(lists["words.txt"]) if "\t" in line)
        if lists["words.txt"].exists()
        else {}
    )
    if split == "train":
        named = [
            (f"{wnid}/images/{image}", wnid)
            for wnid in classes
            for image in sorted(os.listdir(folder / "train" / wnid / "images"))
            if image.lower().endswith(IMAGES)
        ]
        items = _files(folder / "train", folder / "wnids.txt", named, classes)
    else:
        annotations = folder / "val" / ANNOTATIONS
        rows = [line.split("\t") for line in _lines(annotations)]
        if short := next((i for i, row in enumerate(rows, 1) if len(row) < 2), 0):
            raise RefusedError(f"{annotations}, line {short}: no image and class, divided by a tab")
        items = _files(folder / "val" / "images", annotations, [(row[0], row[1]) for row in rows], classes)
    return Source(items, classes, [f"{wnid} {words.get(wnid, '')}".strip() for wnid in classes])


def _food101(folder: Path, split: str) -> Source:
    """Lists of CLASS/NUMBER for each split, of images/CLASS/NUMBER.jpg."""
    (name,) = _of_split(folder, split, {"train": ("train.txt",), "test": ("test.txt",)})
    meta = folder / "meta"
    classes, listed = _lines(meta / "classes.txt"), _lines(meta / name)
    titles = _lines(meta / "labels.txt") if (meta / "labels.txt").exists() else classes
    named = [(f"{line}.jpg", line.partition("/")[0]) for line in listed]
    items = _files(folder / "images", meta / name, named, classes)
    return Source(items, classes, titles if len(titles) == len(classes) else classes)


def _lines(path: Path) -> list[str]:
    return [line for line in read_text(path).splitlines() if line.strip()]


def _files(folder: Path, listed: Path, named: list[tuple[str, str]], classes: list[str]) -> list[Item]:
    """The images (name in the folder, class) that a list names; refused where one is missing or unknown."""
    rank = {name: label for label, name in enumerate(classes)}
    items, missing, wrong = list[Item](), list[str](), _first_wrong(named, rank)
    if wrong:
        raise RefusedError(f"{listed}: {wrong}")
    for name, of in named:
        try:
            items.append(Item(str(folder / name), 0, os.stat(folder / name).st_size, rank[of], of, name))
        except (OSError, ValueError):
            missing.append(name)
    if missing:
        raise RefusedError(
            f"{listed}: names {printable(missing[0])}, which is not in {folder} ({counted(len(missing), 'image')} "
            "missing); unpack the archive again"
        )
    return items


def _first_wrong(named: list[tuple[str, str]], rank: dict[str, int]) -> str:
    seen = set[str]()
    checks: tuple[tuple[Callable[[str, str], bool], str], ...] = (
        (lambda name, of: name.startswith("/") or ".." in name.split("/"), "leads out of its folder"),
        (lambda name, of: name in seen, "is named twice"),
        (lambda name, of: of not in rank, "is of an unknown class"),
    )
    for name, of in named:
        for check, what in checks:
            if check(name, of):
                return f"{printable(name)} {what}"
        seen.add(name)
    return ""
