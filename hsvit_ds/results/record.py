"""One run as it is found, whatever became of it and wherever it lies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..run.summary import RUNNING, Summary
from .history import History

GONE = "gone"
"""The state of a run that ended without a word: killed, or its host is lost."""


@dataclass(frozen=True)
class Latest:
    """values: the last one of each metric. step: of the last point."""

    values: dict[str, float]
    step: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run.

    name: its folder's path below the folder of runs, or its name in MLflow. where: the folder, or its page or place in
    MLflow. recipe: flat, {} where it is not known. summary: None of a run that never began or is of an older version.
    state: running, finished, stopped, failed, or gone. why: of those that did not finish. touched: Unix time of its
    last sign, s. latest: where it is known without all points. id: of the MLflow run; "" of a folder.
    """

    name: str
    where: str
    title: str
    recipe: dict[str, Any]
    summary: Summary | None
    state: str
    why: str
    touched: float
    read: Callable[[], History]
    """Its metrics. Raises RefusedError where there are none."""
    latest: Latest | None = None
    id: str = ""

    @property
    def age(self) -> float:
        """Seconds since its last sign."""
        return max(0.0, time.time() - self.touched)

    @property
    def splits(self) -> tuple[str, str]:
        """The names of the splits that choose the best checkpoint and give the result."""
        return str(self.recipe.get("data.val", "val")), str(self.recipe.get("data.test", "test"))

    @property
    def ended(self) -> bool:
        """Whether its summary is the last word about it."""
        return self.summary is not None and self.state not in (RUNNING, GONE)
