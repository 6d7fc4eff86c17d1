"""What a list of runs tells of each: one value a column, raw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RefusedError, warn
from ..run.summary import FINISHED
from .history import History
from .record import Latest, Record

COLUMNS = (
    *("name", "title", "recipe", "state", "why", "epoch", "epochs", "step", "steps"),
    *("best", "best_split", "best_step", "top1", "top1_split", "images_per_sec"),
    *("seconds", "touched", "age", "where", "id"),
)
"""best: the highest top-1 on the split that chooses the best checkpoint. top1: the last one, of a finished run on the
split that gives its result. Both in %, of the largest width; others are in best_w0.50 and so on. seconds: of work.
touched: Unix time of the last sign, s; age: the seconds since."""


@dataclass(frozen=True)
class Row:
    """values: by column; None, or no such column, where it is not known. metrics: the last value of each."""

    record: Record
    values: dict[str, Any]
    metrics: Mapping[str, float]


def of(record: Record) -> Row:
    latest, best = _measured(record)
    val, test = record.splits
    # A run that goes on for more epochs has a result of before.
    has_result = f"{test}/top1" in latest.values and (record.state == FINISHED or record.summary is None)
    split = test if has_result else val
    found = record.summary
    values: dict[str, Any] = {
        **dict.fromkeys(COLUMNS),
        "name": record.name,
        "title": record.title,
        "recipe": found.recipe if found else None,
        "state": record.state,
        "why": record.why or None,
        "epochs": found.epochs if found else record.recipe.get("run.epochs"),
        "step": latest.step,
        "steps": found.steps if found else None,
        "images_per_sec": latest.values.get("perf/images_per_sec"),
        "seconds": found.seconds if found else None,
        "touched": record.touched,
        "age": record.age,
        "where": record.where,
        "id": record.id or (found.id if found else None),
    }
    if found and found.steps_per_epoch:
        values["epoch"] = latest.step / found.steps_per_epoch
    elif record.state == FINISHED:
        values["epoch"] = values["epochs"]
    if (highest := best(f"{val}/top1")) is not None:
        values |= {"best": highest[0], "best_split": val, "best_step": highest[1]}
    if (last := latest.values.get(f"{split}/top1")) is not None:
        values |= {"top1": last, "top1_split": split}
    for width in _widths(latest.values, val):
        highest = best(f"{val}/top1_w{width}")
        values[f"best_w{width}"] = highest[0] if highest else None
    values |= {f"top1_w{width}": latest.values[f"{split}/top1_w{width}"] for width in _widths(latest.values, split)}
    return Row(record, values, latest.values)


def _measured(record: Record) -> tuple[Latest, Callable[[str], tuple[float, int] | None]]:
    """(The last values, what gives the best one of a metric): from its summary where that is the last word, as all
    points take longer."""
    known, found = record.latest, record.summary
    if known is not None and found is not None and record.ended:
        return known, lambda name: (found.best[name].value, found.best[name].step) if name in found.best else None
    try:
        history = record.read()
    except RefusedError as error:
        warn(str(error))
        history = History({})
    if known is None:
        steps = (int(curve.steps[-1]) for curve in history.curves.values() if len(curve.values))
        known = Latest(history.ends, max(steps, default=0))
    return known, history.best


def _widths(values: Mapping[str, float], split: str) -> list[str]:
    """Those of a split's accuracies, as they are printed, the smallest first."""
    start = f"{split}/top1_w"
    return sorted((name.removeprefix(start) for name in values if name.startswith(start)), key=float)


def widths(row: Row, column: str) -> list[str]:
    """Of "best" or "top1": the smallest width, the one nearest to half, the largest; none where there is one alone."""
    start = f"{column}_w"
    found = sorted((name.removeprefix(start) for name in row.values if name.startswith(start)), key=float)
    half = min(found, key=lambda width: abs(float(width) - 0.5), default="")
    return list(dict.fromkeys((found[0], half, found[-1]))) if found else []


def recipe_name(path: str) -> str:
    """What a recipe's file is called: "recipes/digits/hsvit.toml" is "digits/hsvit"."""
    return "/".join((*Path(path).parent.parts[-1:], Path(path).stem)).lstrip("/")


def columns(rows: list[Row]) -> list[str]:
    """All that some row has, those of widths last."""
    found = {name for row in rows for name in row.values} - set(COLUMNS)
    return [*COLUMNS, *sorted(found)]
