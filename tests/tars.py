"""Small data sets in tar shards, written by the tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hsvit_ds.data.index import COLUMNS, open_index
from hsvit_ds.data.indexing import make
from hsvit_ds.data.layouts import split_shards


def picture(number: int, side: int | tuple[int, int] = 32, channels: int = 3) -> Image.Image:
    """An RGB or grey image whose pixels follow from its number: a few smooth blobs, so that JPEG keeps them."""
    size = (side, side) if isinstance(side, int) else side
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse if channels == 3 else coarse[:, :, 0]).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> bytes:
    """Its bytes, as GNU tar writes them."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def sample(number: int, data: bytes, label: int, extension: str = "jpg") -> list[tuple[str, bytes]]:
    return [(f"{number:06d}.{extension}", data), (f"{number:06d}.cls", str(label).encode())]


def write_split(
    folder: Path,
    split: str,
    count: int,
    *,
    shards: int = 3,
    classes: int = 10,
    side: int = 32,
    channels: int = 3,
    name: str = "tiny",
) -> None:
    """`count` pictures, numbered over the split, in shards of nearly equal length; sample i has label i % classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, numbers in enumerate(np.array_split(np.arange(count), shards)):
        pictures = ((i, encoded(picture(i, side, channels))) for i in numbers.tolist())
        members = [member for i, data in pictures for member in sample(i, data, i % classes)]
        write_tar(folder / f"{name}-{split}-{shard:04d}.tar", members)


def make_index(folder: Path) -> None:
    for split in split_shards(folder):
        make(folder, split)


def old_index(folder: Path, split: str) -> Path:
    """The index of a split as format 2 had it, in place of the one that is there."""
    index = open_index(folder, split)
    arrays = {name: index.read(name) for name in COLUMNS} | {
        name: np.asarray(getattr(index, name))
        for name in ("shards", "lengths", "bytes", "modified", "checksums", "problems", "classes", "image")
    }
    path = folder / f"{split}.index.npz"
    with path.open("wb") as file:
        np.savez(file, format=np.array(2), **arrays)  # type: ignore[arg-type]
    index.path.unlink()
    return path


def data_set(folder: Path, train: int = 48, val: int = 20, held_out: str = "val", **options: Any) -> Path:
    """An indexed set with a training split and one that is held out; returns its folder."""
    write_split(folder, "train", train, **options)
    write_split(folder, held_out, val, **options)
    make_index(folder)
    return folder
