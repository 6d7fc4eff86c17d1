"""Named arrays in a file, read where they lie: of safetensors, or of NumPy's uncompressed `.npz`.

A read is a `pread` of what is asked for, so the page cache has one copy for all processes of a host, and a file that is
cut or replaced meanwhile is an error; a mapping of it would end the process with SIGBUS.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DTYPES = {"I64": "<i8", "U64": "<u8", "U32": "<u4", "I32": "<i4", "U8": "|u1"}
"""safetensors' names of those that are used here; the widest first, so that each array is aligned."""
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_MOST_HEADER = 1 << 24
CHUNK = 1 << 20
"""Elements that are read at a time where all are looked at."""


class Span(NamedTuple):
    """Where an array lies, and how many elements it has, in one dimension."""

    dtype: np.dtype[Any]
    start: int
    elements: int


class Arrays:
    """The arrays of a file, by their names, and `metadata`, texts.

    Raises:
        ValueError: it is no such file, or not whole. OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, path.open("rb", buffering=0)
        self._state = _state(self._file.fileno())
        self.metadata: dict[str, str] = {}
        self.places: dict[str, Span] = {}
        if path.suffix == ".npz":
            self._of_npz()
        else:
            self._of_safetensors()
        size = os.fstat(self._file.fileno()).st_size
        for name, place in self.places.items():
            if place.start < 0 or place.elements < 0 or place.start + place.elements * place.dtype.itemsize > size:
                raise ValueError(f"{name} is not within its {size} bytes")

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = self.path.open("rb", buffering=0)  # which may be another one by now: see `read`

    def _of_safetensors(self) -> None:
        """https://github.com/huggingface/safetensors#format"""
        file = self._file.fileno()
        length = int.from_bytes(os.pread(file, 8, 0), "little")
        text = os.pread(file, length, 8) if length <= _MOST_HEADER else b""
        if not length or len(text) < length:
            raise ValueError("no header")
        try:
            found = json.loads(text)
            self.metadata = {name: str(text) for name, text in found.pop("__metadata__", {}).items()}
            for name, about in found.items():
                (count,), (begin, end) = about["shape"], about["data_offsets"]
                if {type(count), type(begin), type(end)} != {int}:
                    raise ValueError(f"{name} has no whole numbers")
                place = Span(np.dtype(DTYPES[about["dtype"]]), 8 + length + begin, count)
                if begin < 0 or end - begin != count * place.dtype.itemsize:
                    raise ValueError(f"{name} is not as long as it says")
                self.places[name] = place
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header is none ({error!r})") from error

    def _of_npz(self) -> None:
        with self.path.open("rb") as raw, zipfile.ZipFile(raw) as archive:
            for part in archive.infolist():
                if part.compress_type:  # then it may take more memory than disk
                    raise ValueError("compressed")
                raw.seek(part.header_offset)
                local = raw.read(30)  # its name and extra field may be longer than in the archive's directory
                raw.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), os.SEEK_CUR)
                version = np.lib.format.read_magic(raw)
                read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                shape, _, dtype = read(raw)
                if len(shape) > 1 or dtype.hasobject:
                    raise ValueError(f"{part.filename} has shape {shape} and type {dtype}")
                self.places[part.filename.removesuffix(".npy")] = Span(dtype, raw.tell(), shape[0] if shape else 1)

    def count(self, name: str) -> int:
        return self.places[name].elements

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """[count] of an array from element `first` on; by default to its end.

        Raises:
            ValueError: the file is not the one that was opened, or is cut off. KeyError: no such array.
        """
        place = self.places[name]
        wanted = (place.elements - first if count is None else count) * place.dtype.itemsize
        file, start, data = self._file.fileno(), place.start + first * place.dtype.itemsize, b""
        if _state(file) != self._state:
            raise ValueError("was changed")
        while len(data) < wanted:  # Linux gives 2 GiB at a time at most
            part = os.pread(file, wanted - len(data), start + len(data))
            if not part:
                raise ValueError("was cut off")
            data += part
        return np.frombuffer(data, place.dtype)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """All of an array, a part at a time."""
        for first in range(0, self.count(name), CHUNK):
            yield self.read(name, first, min(CHUNK, self.count(name) - first))


def _state(file: int) -> tuple[int, int]:
    now = os.fstat(file)
    return now.st_size, now.st_mtime_ns


@dataclass(frozen=True)
class Column:
    """An array to be written, in parts."""

    dtype: str
    count: int
    parts: Iterable[np.ndarray]

    @classmethod
    def of(cls, values: Any, dtype: str) -> Column:
        array = np.asarray(values, dtype)
        return cls(dtype, len(array), [array])


def header(columns: Mapping[str, Column], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """How a safetensors file begins, and the names of its arrays in their order."""
    widest = sorted(columns, key=lambda name: list(DTYPES.values()).index(columns[name].dtype))
    found: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in widest:
        column = columns[name]
        begin, end = end, end + column.count * np.dtype(column.dtype).itemsize
        found[name] = {
            "dtype": _NAMES[np.dtype(column.dtype)],
            "shape": [column.count],
            "data_offsets": [begin, end],
        }
    text = json.dumps(found).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, widest


def write(path: Path, columns: Mapping[str, Column], metadata: Mapping[str, str]) -> None:
    """A safetensors file, which has its name once all of it is on disk.

    Raises:
        OSError: it cannot be written.
    """
    begin, names = header(columns, metadata)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(begin)
        for name in names:
            for part in columns[name].parts:
                file.write(part.astype(columns[name].dtype, copy=False).tobytes())
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
