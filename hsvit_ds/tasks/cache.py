"""Rows of numbers that were computed once: a sparse file, shared by runs and ranks whose rows are equal."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RefusedError


class Rows:
    """Rows of `numbers` 16- or 32-bit numbers, by their own number.

    Each ends in a byte that says that it is there, so one that was written in part is not. Nothing is locked: whoever
    writes a row writes the same.

    Args:
        root: folder of all caches. about: what the rows depend on; another one has another file. key: of root in the
            recipe.
    """

    def __init__(self, root: Path, about: Mapping[str, Any], numbers: int, dtype: torch.dtype, key: str) -> None:
        text = json.dumps(about, sort_keys=True, default=str)
        folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "about.json").write_text(text, "utf-8")
            self.file = os.open(folder / "rows.bin", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RefusedError(f"{key} = {root}: {error.strerror}") from error
        self.numbers, self.dtype, self.size = numbers, dtype, numbers * dtype.itemsize

    def read(self, rows: Sequence[int]) -> Tensor | None:
        """[len(rows), numbers], None unless all are there."""
        found = bytearray()
        for row in rows:
            data = os.pread(self.file, self.size + 1, row * (self.size + 1))
            if len(data) <= self.size or not data[-1]:
                return None
            found += data[:-1]
        return torch.frombuffer(found, dtype=self.dtype).view(len(rows), self.numbers)

    def write(self, rows: Sequence[int], values: Tensor) -> None:
        """values: [len(rows), numbers]."""
        data = values.detach().cpu().contiguous().view(torch.uint8).view(len(rows), self.size)
        for row, value in zip(rows, data.numpy(), strict=True):
            os.pwrite(self.file, value.tobytes() + b"\1", row * (self.size + 1))


def digest(module: nn.Module) -> str:
    """Of a network's weights and statistics."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
