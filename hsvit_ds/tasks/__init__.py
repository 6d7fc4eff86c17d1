"""What one optimizer step computes: a list of passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from ..data.batch import Batch
from ..engine.engine import Engine
from ..models.slimmable import Width


class Task(Protocol):
    """A task; steps are counted from the start of the run."""

    def passes(self, step: int) -> int:
        """Forwards with a backward each, for one micro batch (P)."""
        ...

    def losses(self, engine: Engine, batch: Batch) -> Iterator[Tensor]:
        """The loss of every pass over a micro batch, each computed when asked for."""
        ...

    def lr_factor(self, step: int) -> float:
        """What the schedule's learning rate is multiplied with."""
        ...

    def widths(self, step: int) -> tuple[Width, ...]:
        """The widths of a step's passes (of its first micro batch)."""
        ...

    @property
    def possible(self) -> tuple[Width, ...]:
        """Every width that some step may train, the smallest first."""
        ...

    def trained(self, steps: int) -> tuple[Width, ...]:
        """The widths that the first `steps` steps train and do not abandon, the smallest first."""
        ...
