"""The metrics of a run: lines of JSON in its folder, the truth about every step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from ..errors import counted, warn

FILE = "metrics.jsonl"
BLOCK = 1 << 20
"""Bytes that are read at a time from the end; lines are shorter."""


class Lines:
    """The file, to which lines are appended.

    Args:
        keep: bytes of it that stay, those that a resumed checkpoint covers; what follows will be logged again.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        self.path = folder / FILE
        self._file = self.path.open("ab", buffering=0)
        self._unwritten = b""
        self._size = 0
        self.cut(keep)

    @property
    def size(self) -> int:
        """Bytes of all lines so far, also of those that a full disk has not taken yet."""
        return self._size + len(self._unwritten)

    def cut(self, keep: int) -> None:
        """Forget the lines behind the first `keep` bytes, and one that is not whole before it."""
        self._unwritten = b""
        with self.path.open("rb") as file:
            # A power cut may have taken more than the checkpoint knows.
            size = min(keep, os.fstat(file.fileno()).st_size)
            file.seek(max(0, size - BLOCK))
            tail = file.read(min(size, BLOCK))
        self._size = size - len(tail) + tail.rfind(b"\n") + 1
        self._file.truncate(self._size)

    def log(self, metrics: Mapping[str, float], step: int, now: float) -> None:
        """now: Unix time, s."""
        line = json.dumps({"step": step, "time": now, **_valid(metrics)}, allow_nan=False) + "\n"
        self._unwritten += line.encode()
        try:
            self._flush()
        except OSError as error:  # a full disk
            warn(f"{self.path}: {error.strerror}; metrics are kept in memory until there is room")

    def _flush(self) -> None:
        """Append what the file has not taken so far, too: a buffered file loses lines on a full disk."""
        while self._unwritten:
            taken = self._file.write(self._unwritten)
            self._size += taken
            self._unwritten = self._unwritten[taken:]

    def close(self) -> None:
        try:
            self._flush()
        except OSError as error:
            warn(f"{self.path}: the last metrics are lost: {error.strerror}")
        self._file.close()


def _valid(metrics: Mapping[str, float]) -> dict[str, Any]:
    """With null where JSON has no number, and what it was: {…, "not_finite": {"train/loss": "nan"}}."""
    odd = {name: str(value) for name, value in metrics.items() if not math.isfinite(value)}
    return {name: None if name in odd else value for name, value in metrics.items()} | (
        {"not_finite": odd} if odd else {}
    )


def parsed(lines: Iterable[bytes]) -> tuple[list[dict[str, Any]], list[int]]:
    """(Lines with numbers that are not finite there again, the numbers from 1 of lines that cannot be read), as one
    that a killed run had not finished."""
    found, lost = [], []
    for number, text in enumerate(lines, 1):
        try:
            line = from_json(text)  # in a quarter of json's time
            if odd := line.pop("not_finite", None):
                line |= {name: float(value) for name, value in odd.items()}
            line["step"], line["time"] = int(line["step"]), float(line["time"])
        except (ValueError, KeyError, TypeError, AttributeError):
            lost.append(number)
        else:
            found.append(line)
    return found, lost


def size_after(folder: Path, step: int) -> int:
    """Bytes of the lines of the first `step` steps, for a checkpoint of a version that did not note them."""
    size = 0
    for line in (folder / FILE).read_bytes().splitlines(keepends=True):
        found, _ = parsed([line])
        if found and found[0]["step"] > step:
            break
        size += len(line)
    return size


def current(last: Mapping[str, int]) -> list[str]:
    """The metrics that count: all but the accuracies of widths that a run has abandoned, which its later evaluations do
    not have. last: the step of the last point of each."""
    newest: dict[str, int] = {}
    for name, step in last.items():
        kind = _kind(name)
        newest[kind] = max(step, newest.get(kind, step))
    return [name for name, step in last.items() if "top1_w" not in name or step == newest[_kind(name)]]


def _kind(name: str) -> str:
    """What a metric measures, at whatever width: "val/top1" of "val/top1_w0.50"."""
    return name.partition("_w")[0]


def read(folder: Path) -> list[dict[str, Any]]:
    """Every line of a run's metrics, in the order of logging; {"step": …, "time": …, metric: value}."""
    found, lost = parsed((folder / FILE).read_bytes().splitlines())
    tell_lost(folder, lost)
    return found


def newest_first(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics from the last one on, those that can be read; nothing before them is looked at."""
    with (folder / FILE).open("rb") as file:
        end, rest = os.fstat(file.fileno()).st_size, b""
        while end:
            begin = max(0, end - BLOCK)
            file.seek(begin)
            lines = (file.read(end - begin) + rest).splitlines(keepends=True)
            end, rest = begin, lines.pop(0) if begin else b""  # which begins further ahead
            yield from reversed(parsed(lines)[0])


def tell_lost(folder: Path, lost: list[int]) -> None:
    """Warn of lines that could not be read."""
    if lost:
        which = ", ".join(map(str, lost[:3])) + (", …" if len(lost) > 3 else "")
        warn(f"{folder / FILE}: {counted(len(lost), 'line')} cannot be read ({which}); the others are used")
