"""What a walk over a tar shard's headers finds: its samples, where they lie, and what of it cannot be used."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import RefusedError
from .members import BLOCK, MOST_BYTES, Sample, grouped, printable, safe, walk

MOST_BLOCKS = 2**32
"""Of a shard: an index keeps places in 32 bits."""


@dataclass(frozen=True)
class Scan:
    """What a header walk finds in one shard. samples: (block of the image, its bytes, label). modified: time of
    modification, ns. checksum: of the members' names, places and labels."""

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
    if found.offset // BLOCK >= MOST_BLOCKS:
        return f"{found.name}: lies {found.offset} bytes behind the start of its shard, more than an index can say"
    return found.offset // BLOCK, found.size, label
