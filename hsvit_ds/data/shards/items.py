"""Images that are to become samples, and where they lie."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...errors import RefusedError, first_line

GZIP = ".gz"
MOST_UNPACKED = 2**31
"""Bytes of a file in gzip, which is read whole: a small one could fill the memory."""


class Item(NamedTuple):
    """An image: `size` bytes at `offset` of `file`. name: what the source calls it, class_name: what its class. shape:
    (channels, height, width) of raw pixels, one plane after the other; empty where the bytes are an image file."""

    file: str
    offset: int
    size: int
    label: int
    class_name: str
    name: str
    shape: tuple[int, ...] = ()

    def read(self) -> bytes:
        """Its image file: of raw pixels a PNG.

        Raises:
            RefusedError: the file is gone, or shorter than it was.
        """
        if self.file.endswith(GZIP):
            data = unpacked(self.file)[self.offset : self.offset + self.size]
        else:
            try:
                with open(self.file, "rb") as file:
                    data = os.pread(file.fileno(), self.size, self.offset)
            except OSError as error:
                raise RefusedError(
                    f"{self.file}: {error.strerror}; restore it and start the same command again"
                ) from error
        if len(data) != self.size:
            raise RefusedError(f"{self.file}: shorter than when it was listed; leave SOURCE alone while it is read")
        return _png(data, self.shape) if self.shape else data


@lru_cache(maxsize=1)
def unpacked(path: str) -> bytes:
    """The content of a file in gzip, kept for its next image.

    Raises:
        RefusedError: it is damaged, or too large.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(MOST_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RefusedError(f"{path}: damaged ({first_line(error)}); fetch it again") from error
    if len(data) > MOST_UNPACKED:
        raise RefusedError(f"{path}: more than {MOST_UNPACKED} bytes when unpacked")
    return data


def _png(pixels: bytes, shape: tuple[int, ...]) -> bytes:
    planes = np.frombuffer(pixels, np.uint8).reshape(shape)
    file = io.BytesIO()
    Image.fromarray(planes[0] if len(planes) == 1 else np.ascontiguousarray(planes.transpose(1, 2, 0))).save(
        file, "PNG"
    )
    return file.getvalue()


@dataclass(frozen=True)
class Source:
    """A split before it is shuffled. classes: name of each class index; titles: the same for people to read."""

    items: list[Item]
    classes: list[str]
    titles: list[str]

    @property
    def fingerprint(self) -> str:
        """Of the images' names, sizes and labels, not of where they lie."""
        digest = hashlib.sha256("\n".join(self.classes).encode(errors="surrogateescape"))
        for item in self.items:
            digest.update(f"{item.name}\0{item.size}\0{item.label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]
