"""The metrics of a run as arrays, parsed once and cached beside it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..run import metrics

CACHE = "metrics.cache.npz"

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]


@dataclass(frozen=True)
class Curve:
    """The points of one metric in the order of logging. steps, values, times (Unix, s): [points]."""

    steps: Steps
    values: Floats
    times: Floats


@dataclass(frozen=True)
class History:
    """Every point of a run. lost: the numbers of lines that could not be read."""

    curves: Mapping[str, Curve]
    lost: tuple[int, ...] = ()

    @property
    def last_time(self) -> float | None:
        """Unix time of the last point, s."""
        return max((float(curve.times[-1]) for curve in self.curves.values()), default=None)

    @property
    def ends(self) -> dict[str, float]:
        """The last value of every metric, but for accuracies at widths that the run has abandoned."""
        filled = {name: curve for name, curve in self.curves.items() if len(curve.values)}
        kept = metrics.current({name: int(curve.steps[-1]) for name, curve in filled.items()})
        return {name: float(filled[name].values[-1]) for name in kept}

    def last(self, name: str) -> float | None:
        return float(self.curves[name].values[-1]) if name in self.curves else None

    def best(self, name: str) -> tuple[float, int] | None:
        """(The highest finite value, the step that it was measured after)."""
        if name not in self.curves or not np.isfinite(self.curves[name].values).any():
            return None
        curve = self.curves[name]
        place = int(np.nanargmax(np.where(np.isfinite(curve.values), curve.values, -np.inf)))
        return float(curve.values[place]), int(curve.steps[place])


def read(folder: Path) -> History:
    """Of a run's folder; a line that cannot be read is left out, and counted.

    Raises:
        OSError: no metrics there.
    """
    file = folder / metrics.FILE
    state = file.stat()
    key = np.array([state.st_size, state.st_mtime_ns])
    cached = _cached(folder / CACHE, key)
    if cached is not None:
        return cached
    lines, lost = metrics.parsed(file.read_bytes().splitlines())
    arrays = {"key": key, "lost": np.array(lost, np.int64), **_columns(lines)}
    with suppress(OSError):  # somebody else's folder: it is parsed again the next time
        partial = folder / f"{CACHE}.partial"
        with partial.open("wb") as opened:
            np.savez(opened, allow_pickle=False, **arrays)
        partial.rename(folder / CACHE)
    return _history(arrays)


def _columns(lines: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """The points of every metric, one metric after another. Lines of the same metrics are read as one table."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for place, line in enumerate(lines):
        alike.setdefault(tuple(line), []).append(place)
    found: dict[str, list[tuple[Steps, Floats]]] = {"step": [], "time": []}
    for names, where in alike.items():
        values = np.array([list(lines[place].values()) for place in where], np.float64)
        for name, column in zip(names, values.T, strict=True):
            found.setdefault(name, []).append((np.array(where, np.int64), column))
    joined = {name: _in_order(parts) for name, parts in found.items()}
    (_, steps), (_, times) = joined.pop("step"), joined.pop("time")
    return {
        "steps": steps.astype(np.int64),
        "times": times,
        "names": np.array(list(joined), np.str_),
        "counts": np.array([len(places) for places, _ in joined.values()], np.int64),
        "places": np.concatenate([places for places, _ in joined.values()] or [np.array([], np.int64)]),
        "values": np.concatenate([values for _, values in joined.values()] or [np.array([], np.float64)]),
    }


def _in_order(parts: list[tuple[Steps, Floats]]) -> tuple[Steps, Floats]:
    """(The lines of a metric's points, its values)."""
    if not parts:
        return np.array([], np.int64), np.array([], np.float64)
    places, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(places)
    return places[order], values[order]


def _cached(path: Path, key: NDArray[Any]) -> History | None:
    """None where there is none of this very file."""
    try:
        with np.load(path, allow_pickle=False) as opened:
            return _history(opened) if np.array_equal(opened["key"], key) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _history(arrays: Any) -> History:
    steps, times, places, values = (arrays[name] for name in ("steps", "times", "places", "values"))
    ends = np.cumsum(arrays["counts"])
    pairs = zip(np.split(places, ends)[:-1], np.split(values, ends)[:-1], strict=True)  # nothing is behind the last
    curves = {
        str(name): Curve(steps[where], points, times[where])
        for name, (where, points) in zip(arrays["names"], pairs, strict=True)
    }
    return History(curves, tuple(arrays["lost"].tolist()))
