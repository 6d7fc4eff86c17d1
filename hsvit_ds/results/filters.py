"""Which runs of a list are shown, and in which order: by its columns, recipe keys and metrics."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..errors import RefusedError
from ..run import table
from .rows import Row, columns, recipe_name

_FORM = re.compile(r"(?P<key>[^=!<>]+)(?P<sign>!=|<=|>=|==?|<|>)(?P<value>.*)", re.DOTALL)
_ORDERS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
"""Of an age."""


@dataclass(frozen=True)
class Key:
    """What a person names of a run. of: its value in a row; None where that has none. is_column: of the list itself."""

    name: str
    of: Callable[[Row], Any]
    is_column: bool


def key(name: str, rows: list[Row], asked: str) -> Key:
    """The column, recipe key or metric of a name; of the last two also an end that no other has, as `depth`.

    Args:
        asked: how a refusal begins.

    Raises:
        RefusedError: no row has such a one, or more than one is meant.
    """
    keys = {known for row in rows for known in row.record.recipe}
    metrics = {known for row in rows for known in row.metrics}
    shown = columns(rows)
    found = table.find(name, {*shown, *keys, *metrics}, asked)
    if found in shown:
        return Key(found, lambda row: row.values.get(found), True)
    if found in keys:
        return Key(found, lambda row: row.record.recipe.get(found), False)
    return Key(found, lambda row: row.metrics.get(found), False)


def keep(rows: list[Row], texts: list[str]) -> tuple[list[Row], list[Key]]:
    """(The rows that all filters hold of, what these name).

    Args:
        texts: `key=value`, `key!=value`, `key<value` and so on. A text's value may be a glob. Of what a run does not
            have, only != holds.

    Raises:
        RefusedError: one of another form, or that names what no run has, or orders what is no number.
    """
    named, kept = [], rows
    for text in texts:
        form = _FORM.fullmatch(text)
        if form is None:
            raise RefusedError(f'filter "{text}": must be key=value, or have !=, <, <=, > or >= in the place of =')
        if not rows:
            continue
        found = key(form["key"].strip(), rows, f'filter "{text}"')
        named.append(found)
        sign, wanted = form["sign"], form["value"].strip()
        kept = [row for row in kept if _holds(found, row, sign, wanted, f'filter "{text}"')]
    return kept, named


def _holds(key: Key, row: Row, sign: str, wanted: str, asked: str) -> bool:
    value = key.of(row)
    if sign in _ORDERS:
        number = _number(key, wanted, asked)
        if value is None:
            return False
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise RefusedError(f"{asked}: {key.name} is {_text(value)} in {row.record.name}, no number; use = or !=")
        return _ORDERS[sign](value, number)
    return (value is not None and _is(key, value, wanted)) == (sign != "!=")


def _is(key: Key, value: Any, wanted: str) -> bool:
    texts = [_text(value), *([recipe_name(value)] if key.name == "recipe" else [])]
    if any(text == wanted or fnmatchcase(text, wanted) for text in texts):
        return True
    _, given = table.split(f"value={wanted}")
    return type(given) is not str and isinstance(given, bool) == isinstance(value, bool) and bool(given == value)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(key: Key, text: str, asked: str) -> float:
    form = re.fullmatch(r"(.*?)\s*(s|min|h|d)", text) if key.name == "age" else None
    try:
        return float(form[1]) * _UNITS[form[2]] if form else float(text)
    except ValueError:
        example = ", as in age<2h" if key.name == "age" else ""
        raise RefusedError(f"{asked}: {text} is no number{example}") from None


def ordered(rows: list[Row], by: str) -> tuple[list[Row], list[Key]]:
    """(The rows by a column, recipe key or metric, what that is); those without it last.

    Args:
        by: with a - before it the largest first; "": as they are.
    """
    if not by or not rows:
        return rows, []
    found = key(by.removeprefix("-"), rows, f"--sort {by}")

    def place(row: Row) -> tuple[bool, float, str]:
        value = found.of(row)
        is_number = isinstance(value, int | float)
        return not is_number, float(value) if is_number else 0.0, "" if is_number else _text(value)

    there = [row for row in rows if found.of(row) is not None]
    there = sorted(there, key=place, reverse=by.startswith("-"))
    return there + [row for row in rows if found.of(row) is None], [found]
