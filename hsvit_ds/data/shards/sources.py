"""Where images come from before they are shards: a folder of classes, a table of files, ImageNet's own archives, or
what other sets come as (`published.py`).

Archives are read in place, as bytes at an offset: nothing is unpacked, so a source costs its list of images.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ...errors import RefusedError, counted, first_line, read_text, warn
from ..decode import BadImageError, open_upright
from ..members import IMAGES, MOST_BYTES, Member, printable, safe, unsafe, walk
from . import published
from .items import Item, Source

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What folders of a split are called, and the split."""


def open_source(folder: Path, split: str, known: list[str], name: str = "") -> Source:
    """List the images of a split, in an order that depends on their names alone.

    known: the classes of splits that were made before; a folder that has no others is labelled as they are. name: of
    the data set, which of some tells the classes.

    Raises:
        RefusedError: no known layout, no images, or files that are incomplete or contradict each other.
    """
    if folder.is_file() and folder.suffix.lower() == ".csv":
        return _table(folder, known)
    if folder.is_file() and folder.name.endswith(published.PACKED):
        raise RefusedError(f"{folder}: packed; unpack it (tar xzf {folder.name}) and give the folder in it")
    if not folder.is_dir():
        raise RefusedError(f"{folder}: neither a folder nor a CSV of file and label")
    try:
        names = {entry.name for entry in os.scandir(folder)}
        if {TRAIN, VAL} & names:
            source = _imagenet(folder, split)
        elif found := published.open_published(folder, names, split, name):
            source = found
        elif classes := sorted(n for n in names if not _is_hidden(n) and (folder / n).is_dir()):
            source = _image_folder(folder, classes, known)
        else:
            raise RefusedError(
                f"{folder}: unknown layout; looked for one sub-folder a class, for {TRAIN} or {VAL} beside {DEVKIT}, "
                f"and for {published.LAYOUTS}"
            )
    except OSError as error:
        raise RefusedError(f"{error.filename or folder}: {error.strerror}") from error
    if not source.items:
        raise RefusedError(
            f"{folder}: no images ({', '.join(IMAGES)}) in {counted(len(source.classes), 'class', 'classes')}"
        )
    return source


def _image_folder(folder: Path, names: list[str], known: list[str]) -> Source:
    """Sorted names of sub-folders with images are the classes, as in torchvision's ImageFolder."""
    if SPLITS.keys() >= set(names):
        raise RefusedError(f"{folder}: {', '.join(names)} are splits, not classes; give {folder / names[0]}")
    found = {name: sorted(images_in(folder / name)) for name in names}
    same = {name.casefold(): name for name in names if found[name]}
    if twins := [name for name in names if found[name] and same[name.casefold()] != name]:
        raise RefusedError(
            f"{folder}: {twins[0]} and {same[twins[0].casefold()]} differ in case only, and are one folder on other "
            "systems; give one another name, or move its images to the other"
        )
    classes = [name for name in names if found[name]] or names
    if set(classes) <= set(known):
        classes = known
    for name in sorted(set(names) - set(classes)):
        warn(f"{folder / name}: no image in it; it is no class")
    items = [
        Item(path, 0, os.stat(path).st_size, label, name, os.path.relpath(path, folder))
        for label, name in enumerate(classes)
        for path in found.get(name, [])
    ]
    return Source(items, classes, classes)


def _table(path: Path, known: list[str]) -> Source:
    """A CSV of file and label, with a first line that names its columns or without; files are relative to it."""
    rows = [row for row in csv.reader(io.StringIO(read_text(path))) if any(cell.strip() for cell in row)]
    columns = (0, 1)
    if rows and (head := [cell.strip().lower() for cell in rows[0]]) and not _is_image(rows[0][0]):
        names = (("file", "filename", "path", "image"), ("label", "class", "category"))
        found = [next((i for i, cell in enumerate(head) if cell in known_as), None) for known_as in names]
        if None in found:
            raise RefusedError(f"{path}: its first line has no columns file and label, but {', '.join(rows[0])}")
        columns, rows = (found[0] or 0, found[1] or 0), rows[1:]
    items = []
    for line, row in enumerate(rows, 1):
        if len(row) <= max(columns):
            raise RefusedError(f"{path}, row {line}: {len(row)} cells, of which file and label are to be two")
        items.append((row[columns[0]].strip(), row[columns[1]].strip()))
    classes = sorted({label for _, label in items})
    if set(classes) <= set(known):
        classes = known
    numbers = {label: number for number, label in enumerate(classes)}
    try:
        sized = [(name, os.stat(path.parent / name).st_size, label) for name, label in items]
    except OSError as error:
        raise RefusedError(f"{path}: names {error.filename}, {error.strerror}") from error
    return Source(
        [Item(str(path.parent / name), 0, size, numbers[label], label, name) for name, size, label in sized],
        classes,
        classes,
    )


def images_in(folder: Path) -> Iterator[str]:
    """Its images, also behind links, but of no folder twice: a link may lead back."""
    seen = {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, followlinks=True):
        yield from (os.path.join(root, name) for name in files if _is_image(name))
        inside = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(folders) if not _is_hidden(name)}
        folders[:] = [name for name, real in inside.items() if real not in seen]
        seen.update(inside.values())


def _is_hidden(name: str) -> bool:
    """Of a folder or file: what programs leave behind, as macOS in its archives."""
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGES) and not _is_hidden(os.path.basename(name))


def _imagenet(folder: Path, split: str) -> Source:
    archive = folder / {"train": TRAIN, "val": VAL, "validation": VAL}.get(split, "")
    if archive == folder:
        raise RefusedError(f"--split {split}: ImageNet's archives hold train and val; its test split has no labels")
    if not archive.exists():
        raise RefusedError(f"{archive}: not there; --split {split} needs it")
    devkit = folder / DEVKIT
    if archive.name == VAL:
        if not devkit.exists():
            raise RefusedError(f"{devkit}: not there; the labels of {VAL} are in it")
        return _imagenet_val(archive, devkit)
    return _imagenet_train(archive, devkit if devkit.exists() else None)


def _imagenet_train(archive: Path, devkit: Path | None) -> Source:
    """A tar of one tar a class. Without the devkit the classes are those that are there."""
    with archive.open("rb") as file:
        tars = [m for m in _members(archive, file, 0) if m.name.endswith(".tar")]
        found = {Path(m.name).stem: m for m in tars}
        titles = _read_devkit(devkit)[0] if devkit else {}
        classes = sorted(titles or found)
        if unknown := sorted(found.keys() - set(classes)):
            raise RefusedError(
                f"{archive}: {unknown[0]}.tar is none of the {counted(len(classes), 'class', 'classes')} of {devkit}"
            )
        items = [
            Item(str(archive), image.offset, image.size, label, wnid, image.name)
            for label, wnid in enumerate(classes)
            if wnid in found
            for image in sorted(_nested(archive, file, found[wnid]), key=lambda m: m.name)
        ]
    return Source(items, classes, [f"{wnid} {titles.get(wnid, '')}".strip() for wnid in classes])


def _imagenet_val(archive: Path, devkit: Path) -> Source:
    """Line i of the ground truth is the devkit's id, not the class index, of the i-th image by name."""
    titles, wnids, truth = _read_devkit(devkit)
    classes = sorted(titles)
    rank = {wnid: label for label, wnid in enumerate(classes)}
    with archive.open("rb") as file:
        images = sorted((m for m in _members(archive, file, 0) if _is_image(m.name)), key=lambda m: m.name)
    if len(truth) != len(images):
        raise RefusedError(
            f"{devkit}: {TRUTH} has {counted(len(truth), 'line')}, {archive.name} has {counted(len(images), 'image')}"
        )
    items = []
    for image, line in zip(images, truth, strict=True):
        wnid = wnids.get(line)
        if wnid is None:
            raise RefusedError(f'{devkit}: {TRUTH} says "{line}" of {image.name}, which is no id of a class in {META}')
        items.append(Item(str(archive), image.offset, image.size, rank[wnid], wnid, image.name))
    return Source(items, classes, [f"{wnid} {titles[wnid]}" for wnid in classes])


def _members(archive: Path, file: io.BufferedReader, start: int, end: int = sys.maxsize) -> list[Member]:
    """The files of the tar between two bytes of a file; refused where it is damaged."""
    file.seek(start)
    problems: list[str] = []
    members = list(safe(archive, walk(archive, file, problems, end)))
    if problems:
        raise RefusedError(f"{archive.parent / problems[0]}; fetch it again")
    return members


def _nested(archive: Path, file: io.BufferedReader, tar: Member) -> Iterator[Member]:
    for image in _members(archive, file, tar.offset, tar.offset + tar.size):
        if _is_image(image.name):
            yield image


def _read_devkit(path: Path) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """({wnid: words}, {id: wnid}, ids of the validation images) of the classes, which are the synsets without children.

    Raises:
        RefusedError: not the devkit of ILSVRC2012.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    texts = dict[str, bytes]()
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                if wrong := unsafe(member) or ("too large" if member.size > MOST_BYTES else ""):
                    raise ValueError(f"{printable(member.name)}: {wrong}")
                for name in (META, TRUTH):
                    if member.name.endswith(name) and (file := tar.extractfile(member)):
                        texts[name] = file.read()
        synsets = np.atleast_1d(loadmat(io.BytesIO(texts[META]), squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"] == 0]
        truth = texts[TRUTH].decode().split()
        wnids = {str(int(leaf["ILSVRC2012_ID"])): str(leaf["WNID"]) for leaf in leaves}
        titles = {str(leaf["WNID"]): str(leaf["words"]) for leaf in leaves}
    except (tarfile.TarError, zlib.error, EOFError, OSError, MatReadError, ValueError, TypeError, IndexError) as error:
        raise RefusedError(f"{path}: not the devkit of ILSVRC2012 ({first_line(error)}); fetch it again") from error
    except KeyError as error:
        raise RefusedError(f"{path}: not the devkit of ILSVRC2012 ({error} is missing); fetch it again") from error
    return titles, wnids, truth


def sample(item: Item, resize: int | None, quality: int) -> dict[str, bytes]:
    """{extension: content} of a webdataset sample.

    resize: an image with a longer shorter side, pixels, becomes a JPEG of this one; any other keeps its bytes.

    Raises:
        BadImageError: 0 bytes, too many, or no image.
    """
    if item.size > MOST_BYTES:
        raise BadImageError(f"{item.size} bytes are more than {MOST_BYTES}")
    data = item.read()
    extension = PurePosixPath(item.name).suffix.lower().removeprefix(".").replace("jpeg", "jpg")
    facts: dict[str, Any] = {"label": item.label, "class": item.class_name, "filename": item.name}
    if not data:
        raise BadImageError("0 bytes")
    image = open_upright(data)
    if resize:
        if min(image.size) > resize and not image.mode.startswith(("I", "F")):  # deeper than a JPEG's 8 bits
            image = _shrunk(image, resize)
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality)  # without its EXIF: it is upright
            data, extension = file.getvalue(), "jpg"
        facts["width"], facts["height"] = image.size
    return {extension: data, "cls": str(item.label).encode(), "json": json.dumps(facts).encode()}


def _shrunk(image: Image.Image, shorter: int) -> Image.Image:
    """RGB or greyscale with the shorter side given; Pillow antialiases when it shrinks."""
    scale = shorter / min(image.size)
    width, height = (max(round(side * scale), shorter) for side in image.size)
    if image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    return image.resize((width, height), Image.Resampling.BICUBIC)
