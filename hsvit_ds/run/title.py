"""What a run is called: as its folder, with what its command line changed of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RefusedError
from . import recipe as recipes
from . import table
from .recipe import Recipe

FILE = "title.txt"


def changes(path: Path, overrides: list[str], recipe: Recipe) -> str:
    """What the overrides change of what is trained: "isolated=false seed=2".

    Args:
        path, overrides: from which `recipe` was read.
    """
    now = recipes.flat(recipe)
    try:
        before = recipes.flat(recipes.read(path))
    except RefusedError:  # without its overrides it says too little, such as not where the data is
        before = {}
    given = dict.fromkeys(key for override in overrides for key in _keys(*table.split(override)))
    changed = [
        key for key in given if key in now and table.is_trained(key) and (key not in before or before[key] != now[key])
    ]
    return " ".join(f"{table.short(key, now)}={table.text(now[key])}" for key in changed)


def of(folder: Path) -> str:
    """A run's title; the folder's name for one that has none."""
    file = folder / FILE
    return file.read_text("utf-8").strip() if file.exists() else folder.name


def _keys(parts: list[str], value: Any) -> list[str]:
    """The keys that an override sets: those of a table are the table's."""
    if isinstance(value, dict):
        return [key for name, inner in value.items() for key in _keys([*parts, name], inner)]
    return [".".join(parts)]
