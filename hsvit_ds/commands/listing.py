"""The runs of a folder or of an MLflow server on one screen."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RefusedError, counted, masked, shown, tell
from . import Debug

if TYPE_CHECKING:
    from ..results.filters import Key
    from ..results.rows import Row

_UNLIMITED = 10_000
"""Columns of a file or a pipe: a line a run."""
_DROPPED = ("recipe", "images/s", "best", "epoch")
"""Columns that a narrow terminal lacks, the first to go first."""
_LEAST = {"name": 24, "state": 15}
"""Characters of columns that are folded where there is no room."""
_NARROW = 10
"""Of those on a terminal so narrow that nothing else helps."""
_REASON = 32
"""Those of a state that says why, before a long name gets more."""
_GAP = 2
_MISSING = "-"


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    CSV = "csv"


Filters = Annotated[
    list[str] | None, typer.Argument(help="As state=failed, 'top1>90', name=digits*.", metavar="[FILTER]...")
]
Runs = Annotated[str, typer.Option("--runs", help="The folder of runs, or an MLflow URI, http:// or sqlite:///.")]


def list_runs(
    filters: Filters = None,
    runs: Runs = "runs",
    sort: Annotated[
        str, typer.Option(help="A column, recipe key or metric; -KEY: the largest first. By default the newest first.")
    ] = "",
    form: Annotated[
        Format, typer.Option("--format", help="json and csv have every column, not rounded.")
    ] = Format.TABLE,
    to: Annotated[str, typer.Option(help="Send those that are finished to this MLflow URI; what is there stays.")] = "",
    debug: Debug = False,
) -> None:
    """List runs: how each stands, its best and last top-1, its speed, and its age.

    All filters must hold. One names a column, a recipe key (model.depth=2, or
    depth=2 where no other key ends so) or a metric (train/loss<0.5: its last
    value), with =, !=, <, <=, > or >=. A text may be a glob, an age has a unit
    (age<2h). Quote < and >, which the shell takes for files.

    Example: hsvit runs state=finished 'top1>90' --sort -top1
    """
    with shown(2, debug):
        from ..results import filters as selection
        from ..results import records, rows

        found = [rows.of(record) for record in records.all_in(runs)]
        kept, named = selection.keep(found, filters or [])
        kept, order = selection.ordered(kept, sort)
        if to:
            _send(kept, runs, to)
            return
        extra = list({key.name: key for key in (*named, *order) if not key.is_column}.values())
        if form is Format.TABLE:
            if kept:
                _print_table(kept, extra)
            if not kept or filters:
                tell(f"{len(kept):,} of {counted(len(found), 'run')} in {masked(runs)}")
            return
        names = rows.columns(kept)
        table = [{name: _plain(row.values.get(name)) for name in names} for row in kept]
        for line, row in zip(table, kept, strict=True):
            line |= {key.name: _plain(key.of(row)) for key in extra}
        if form is Format.JSON:
            typer.echo(json.dumps(table, indent=1, ensure_ascii=False))
        else:
            writer = csv.DictWriter(sys.stdout, [*names, *(key.name for key in extra)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


def _send(rows: list[Row], runs: str, to: str) -> None:
    from pathlib import Path

    from ..results import mlflow_records
    from ..run import mlflow_copy
    from ..run.summary import FINISHED

    if mlflow_records.is_uri(runs) or not mlflow_records.is_uri(to):
        raise RefusedError(f"--runs {masked(runs)} --to {masked(to)}: runs are sent from a folder to a URI")
    for row in rows:
        record = row.record
        if record.state != FINISHED or record.summary is None:
            typer.echo(f"{record.name}: not sent, as it is {record.state}")
            continue
        experiment = str(record.recipe.get("tracking.experiment", "hsvit-ds"))
        with mlflow_records.readable(to):
            is_new = mlflow_copy.send(to, experiment, Path(record.where), record.recipe, record.summary)
        typer.echo(f"{record.name}: {'sent' if is_new else 'is there already'}")


def _plain(value: Any) -> Any:
    """JSON has no other numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class _Column:
    name: str
    head: str
    cells: list[str]
    is_number: bool = True

    @property
    def width(self) -> int:
        return max(map(len, (self.head, *self.cells)))

    @property
    def least(self) -> int:
        return min(self.width, _LEAST.get(self.name, self.width))


def _print_table(rows: list[Row], extra: list[Key]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNLIMITED
    columns, left_out = _fitting(_columns(rows, extra), console.width)
    widths = _widths(columns, console.width)
    made, shown = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False), []
    for column in columns:
        width = widths[column.name]
        made.add_column(column.head, justify="right" if column.is_number else "left", width=width, overflow="fold")
        shown.append([_shortened(cell, width) if column.name == "state" else cell for cell in column.cells])
    for cells in zip(*shown, strict=True):
        made.add_row(*cells)
    console.print(made)
    if any(_has_widths(row) for row in rows):
        typer.echo("of several widths: the smallest, the one nearest to half, the largest")
    if left_out:
        typer.echo(f"left out: {', '.join(left_out)}; --format csv has every column")


def _widths(columns: list[_Column], width: int) -> dict[str, int]:
    """By column; what can be folded shares what is left, a reason first."""
    spare = width - _width(columns)
    found = {column.name: column.least for column in columns}
    whole = {column.name: column.width for column in columns}
    for name, most in (("state", _REASON), ("name", whole["name"]), ("state", whole["state"])):
        more = min(spare, max(0, min(most, whole[name]) - found[name]))
        more = max(more, min(0, _NARROW - found[name]))
        found[name] += more
        spare -= more
    return found


def _shortened(text: str, width: int) -> str:
    """To three lines."""
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder=" …"))


def _fitting(columns: list[_Column], width: int) -> tuple[list[_Column], list[str]]:
    """(Those that a terminal so wide shows, the names of the others)."""
    left_out: list[str] = []
    for name in _DROPPED:
        if _width(columns) > width:
            columns = [column for column in columns if column.name != name]
            left_out.append(name)
    return columns, left_out


def _width(columns: list[_Column]) -> int:
    """The least that they take beside each other."""
    return sum(column.least for column in columns) + _GAP * (len(columns) - 1)


def _columns(rows: list[Row], extra: list[Key]) -> list[_Column]:
    from ..results.rows import recipe_name

    def cells(name: str, show: Callable[[Any], str] = _clean) -> list[str]:
        return [_MISSING if (value := row.values[name]) is None else show(value) for row in rows]

    others = [_Column(key.name, key.name, [_value(key.of(row)) for row in rows]) for key in extra]
    return [
        _Column("name", "name", cells("name"), is_number=False),
        _Column("recipe", "recipe", cells("recipe", lambda path: _clean(recipe_name(path))), is_number=False),
        _Column("state", "state", [_state(row) for row in rows], is_number=False),
        *(column for column in others if len(set(column.cells)) > 1),  # model.depth=2 is known to be 2
        _Column("epoch", "epoch", [_epoch(row) for row in rows]),
        _accuracy("best", rows),
        _accuracy("top1", rows),
        _Column("images/s", "images/s", cells("images_per_sec", lambda speed: f"{speed:,.0f}")),
        _Column("age", "age", cells("age", _age)),
    ]


def _clean(text: str) -> str:
    """Names and reasons may hold anything, as what moves a terminal's cursor."""
    text = " ".join(text.split())
    return text if text.isprintable() else ascii(text)


def _state(row: Row) -> str:
    """With why: of an error its kind and words alone, without the rank that said it and what it was doing."""
    why = row.values["why"] or ""
    if named := re.search(r"\b\w+(Error|Exception): .*", why, re.DOTALL):
        why = named[0]
    return _clean(f"{row.values['state']}: {re.sub(r'^rank [0-9]+ on [^ ]+: ', '', why)}".removesuffix(": "))


def _value(value: Any) -> str:
    if value is None:
        return _MISSING
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else _clean(str(value))


def _epoch(row: Row) -> str:
    done, all_of_them = row.values["epoch"], row.values["epochs"]
    if all_of_them is None:
        return _MISSING
    return f"{_MISSING if done is None else int(done)}/{all_of_them}"


def _accuracy(name: str, rows: list[Row]) -> _Column:
    """The split's name stands above, or beside each where they are of several."""
    splits = {row.values[f"{name}_split"] for row in rows} - {None}
    longest = max(map(len, splits), default=0)
    cells = []
    for row in rows:
        cell = _scores(row, name)
        if len(splits) > 1:
            cell += f" {_clean(row.values[f'{name}_split'] or ''):{longest}}"
        cells.append(cell)
    return _Column(name, f"{name}, {_clean(min(splits))}" if len(splits) == 1 else name, cells)


def _scores(row: Row, name: str) -> str:
    from ..results.rows import widths

    values = [row.values[f"{name}_w{width}"] for width in widths(row, name)] or [row.values[name]]
    return " ".join(_MISSING if value is None else f"{value:.2f}" for value in values)


def _has_widths(row: Row) -> bool:
    from ..results.rows import widths

    return bool(widths(row, "best") or widths(row, "top1"))


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"
