"""The members of a tar, and which of them are a sample, its image and its label: for index, stream and check alike.

Members that follow each other and have one key are a sample, as in webdataset: the key is a name up to the first dot
behind its last /, the extension what follows that dot, in lower case. Only a whole extension counts: beside `7.jpg`
neither `7.mask.png` nor `7.depth.png` is the image.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import RefusedError, counted, first_line

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
BLOCK = 512  # of a tar
MOST_BYTES = 2**29
"""Of an image file: it is read whole."""
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own


@dataclass(frozen=True)
class Member:
    """A file in a tar. data: what was read of it. unsafe: why it must not be read, or ""."""

    name: str
    offset: int
    size: int
    data: bytes
    unsafe: str


@dataclass(frozen=True)
class Sample:
    """Members with one key. members: (extension with its dot, member), in the order of the tar."""

    key: str
    members: list[tuple[str, Member]]

    @property
    def repeated(self) -> str:
        """An extension that it has more than once, or ""."""
        extensions = [extension for extension, _ in self.members]
        return next((extension for extension in extensions if extensions.count(extension) > 1), "")

    def image(self, wanted: str) -> Member:
        """
        Args:
            wanted: the image's extensions without their dots, the preferred first, as "jpg" or "rgb.png;png"; "" where
            one alone is that of an image.

        Raises:
            ValueError: there is none, or more than one.
        """
        said = "hsvit shards index --image says which, for a stream data.image"
        there = ", ".join(sorted(extension for extension, _ in self.members))
        for choice in ([f".{extension}"] for extension in wanted.lower().split(";")) if wanted else [list(IMAGES)]:
            found = [(extension, member) for extension, member in self.members if extension in choice]
            if len(found) > 1:
                raise ValueError(
                    f"{counted(len(found), 'image')} ({', '.join(extension for extension, _ in found)}); {said}"
                )
            if found:
                return found[0][1]
        if wanted:
            raise ValueError(f"no image {wanted} among {there}")
        perhaps = any(extension.endswith(IMAGES) for extension, _ in self.members)
        raise ValueError(f"no image among {there}" + (f"; {said}" if perhaps else ""))

    def label(self) -> int | None:
        """In `.cls`, or in "label" of `.json`; None where there is none.

        Raises:
            ValueError: it is not a number.
        """
        data = {extension: member.data for extension, member in self.members}
        try:
            label = int(data[".cls"]) if ".cls" in data else json.loads(data.get(".json", b"{}")).get("label")
        except (ValueError, AttributeError, RecursionError):
            raise ValueError("its label is not a number") from None
        if label is not None and type(label) is not int:
            raise ValueError("its label is not a number")
        return label

    def image_and_label(self, wanted: str) -> tuple[Member, int]:
        """
        Raises:
            ValueError: it cannot be used; the message says why.
        """
        if self.repeated:
            raise ValueError(f"{self.repeated} more than once")
        image, label = self.image(wanted), self.label()
        if label is None:
            raise ValueError(f"no label ({self.key}.cls, or label in {self.key}.json)")
        if not 0 <= label < 2**31:
            raise ValueError(f"label {label} is out of range")
        return image, label


def grouped(members: Iterable[Member]) -> Iterator[Sample]:
    """The samples of members in the order of a tar. What webdataset passes over is none: names without a dot and
    metadata; nor are hidden files, as those that macOS puts beside each (`._7.jpg`)."""
    sample = Sample("", [])
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or _META.match(member.name):
            continue
        key = f"{folder}{slash}{stem}"
        if key != sample.key:
            if sample.members:
                yield sample
            sample = Sample(key, [])
        sample.members.append((f".{extension}".lower(), member))
    if sample.members:
        yield sample


def walk(path: Path, file: BinaryIO, problems: list[str], end: int = sys.maxsize) -> Iterator[Member]:
    """The files of a tar in their order; where it is cut off or damaged the walk ends and says so in `problems`.

    Labels and other small metadata are read, images are not. end: byte of `file` at which the tar ends, where it is
    itself in a tar.
    """
    last = "its start"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0:  # tarfile would go back, for ever
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                if (wrong := unsafe(member)) or member.isfile():
                    data = b""
                    if member.name.lower().endswith((".cls", ".json")) and member.size <= 1 << 20:
                        data = os.pread(file.fileno(), member.size, member.offset_data)
                    yield Member(member.name, member.offset_data, member.size, data, wrong)
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
