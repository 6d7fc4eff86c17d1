"""What became of one run: its history reduced to what it is compared by."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..run.summary import FINISHED, Cost, Summary
from . import latency, present
from .history import Curve, Floats, History, Steps
from .record import Record

BUCKETS = 150
"""Of a thinned curve, two points each."""


@dataclass(frozen=True)
class Thinned:
    """Points of a curve. steps, hours (since the run's first point), values: [points]."""

    steps: list[int]
    hours: list[float]
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run.

    last, best: of every metric its last value (`History.ends`), and the highest of an accuracy with the step it was
    measured after.
    typical: medians of what is logged of speed and traffic. lost: lines that could not be read.
    """

    record: Record
    last: dict[str, float]
    best: dict[str, tuple[float, int]]
    typical: dict[str, float]
    curves: dict[str, Thinned]
    lost: tuple[int, ...]
    latency: latency.Latency | None
    subsets: dict[str, list[present.Row]] = field(default_factory=dict)
    """By split: accuracies of subsets of the submodules, as `hsvit evaluate --present sweep` left them."""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def recipe(self) -> dict[str, Any]:
        return self.record.recipe

    @property
    def summary(self) -> Summary | None:
        return self.record.summary

    @property
    def is_finished(self) -> bool:
        return self.record.state == FINISHED

    @property
    def test(self) -> str:
        return self.record.splits[1]

    @property
    def costs(self) -> tuple[Cost, ...]:
        return self.summary.costs if self.summary else ()

    @cached_property
    def widths(self) -> dict[str, float]:
        """{"0.50": top-1 on the test split, %}, the smallest first."""
        found = {match[1]: self.last[match[0]] for match in self._widths}
        return dict(sorted(found.items(), key=lambda pair: float(pair[0])))

    @property
    def _widths(self) -> list[re.Match[str]]:
        pattern = re.compile(rf"{re.escape(self.test)}/top1_w(\d+(?:\.\d+)?)")
        return [match for name in self.last if (match := pattern.fullmatch(name))]

    def epoch(self, step: float) -> float | None:
        """That a step ends, or lies in."""
        per_epoch = self.summary.steps_per_epoch if self.summary else 0
        return step / per_epoch if per_epoch else None

    @property
    def hours(self) -> float | None:
        return self.summary.seconds / 3600 if self.summary and self.summary.seconds else None

    def device_hours(self, kind: str) -> float | None:
        """kind: "GPU", or "core" of a run without GPUs."""
        if self.summary is None or self.hours is None:
            return None
        count = self.summary.gpus if kind == "GPU" else 0 if self.summary.gpus else self.summary.cores
        return self.hours * count if count else None


def of(record: Record, names: Collection[str]) -> Outcome:
    """Of a run, which is read here and no longer held. names: of metrics, or their ends, whose curves are kept
    beside the usual ones."""
    history = record.read()
    val, _ = record.splits
    folder = Path(record.where)
    usual, ends = curve_names(val), tuple(f"/{name}" for name in names)
    return Outcome(
        record=record,
        last=history.ends,
        best={name: best for name in history.curves if "top1" in name and (best := history.best(name))},
        typical=_typical(history),
        curves={
            name: thin(history, curve)
            for name, curve in history.curves.items()
            if name in usual or f"/{name}".endswith(ends)
        },
        lost=history.lost,
        latency=latency.cached(folder),
        subsets=present.of_folder(folder),
    )


def curve_names(val: str) -> tuple[str, ...]:
    """The metrics that are drawn. val: the split that is evaluated in training."""
    return (
        *("train/loss", f"{val}/loss", f"{val}/top1", f"ema/{val}_top1"),
        *("train/lr", "train/grad_norm", "perf/images_per_sec", "perf/data_wait"),
    )


def _typical(history: History) -> dict[str, float]:
    return {
        name: float(np.nanmedian(curve.values))
        for name, curve in history.curves.items()
        if name.startswith(("perf/", "comm/")) and not np.isnan(curve.values).all()
    }


def thin(history: History, curve: Curve, buckets: int = BUCKETS) -> Thinned:
    """The lowest and the highest point of each of so many stretches, so that no spike is lost, and both ends."""
    where = np.arange(len(curve.values))
    if len(where) > 2 * buckets:
        where = _extremes(curve.values, buckets)
    start = min((float(other.times[0]) for other in history.curves.values()), default=0.0)
    steps: Steps = curve.steps[where]
    hours: Floats = (curve.times[where] - start) / 3600
    return Thinned(steps.tolist(), hours.round(5).tolist(), curve.values[where].tolist())


def _extremes(values: Floats, buckets: int) -> Steps:
    """Places in order. What is not a number is the highest of its stretch, so that it shows."""
    high, low = (np.where(np.isnan(values), np.inf, sign * values) for sign in (1, -1))
    edges = np.linspace(0, len(values), buckets + 1).astype(np.int64)
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    found = [start + int(part[start:end].argmax()) for start, end in pairs for part in (high, low)]
    return np.unique([0, *found, len(values) - 1])
