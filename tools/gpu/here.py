"""Where a step runs, and how much of it fits there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Here:
    """out: folder of the results. data: CIFAR-10 as it was brought. toy: nothing is timed. end: of the step's time, by
    the monotonic clock. about: the machine."""

    out: Path
    data: Path | None
    toy: bool
    end: float
    about: dict[str, Any]

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    @property
    def device(self) -> str:
        return "cpu" if self.toy else "cuda"


def fitting(batch: int, run: Callable[[int], T]) -> tuple[int, T]:
    """(batch, what `run` gives for it), halved until it fits into the GPU's memory.

    Raises:
        torch.OutOfMemoryError: one image does not fit.
    """
    while True:
        try:
            return batch, run(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        torch.cuda.empty_cache()


def smaller(asked: int, batch: int) -> str:
    """A word about a batch that did not fit."""
    return "" if batch == asked else f"batch {batch} instead of {asked}: the GPU has too little memory"
