"""How accurate subsets of an HSViT's submodules are: the file that a sweep leaves beside its picture."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import warn

_HEAD = ["present", "subset", "top1"]


@dataclass(frozen=True)
class Row:
    """Of one subset. top1: %."""

    subset: tuple[int, ...]
    top1: float


def write(path: Path, subsets: Sequence[tuple[int, ...]], top1: Sequence[float]) -> Path:
    """A row a subset: how many submodules answered, which ("0 2"), top-1 in %."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(_HEAD)
        for subset, score in zip(subsets, top1, strict=True):
            rows.writerow([len(subset), " ".join(map(str, subset)), f"{score:.4f}"])
    return path


def of_folder(folder: Path, width: str = "") -> dict[str, list[Row]]:
    """By split, of the newest checkpoint that was swept. width: that was asked for, "0.50"; "" where none was."""
    newest: dict[str, tuple[int, Path]] = {}
    pattern = rf"evaluate-present-(.+)-step-(\d+){re.escape(f'-{width}' if width else '')}\.csv"
    for path in folder.glob("evaluate-present-*.csv"):
        if match := re.fullmatch(pattern, path.name):
            split, step = match[1], int(match[2])
            newest[split] = max(newest.get(split, (-1, path)), (step, path))
    return {split: _read(path) for split, (_, path) in newest.items()}


def _read(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                Row(tuple(int(number) for number in row["subset"].split()), float(row["top1"]))
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn(f"{path}: cannot be read ({error}); hsvit evaluate --present sweep writes it again")
        return []
