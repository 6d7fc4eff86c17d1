"""A sweep's file, and its cells: every recipe with every combination of keys and every seed, read and resolved."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from ..errors import RefusedError, counted, read_text
from ..run import folders, summary, table
from ..run import recipe as recipes
from ..run.recipe import Plan, Recipe
from ..run.summary import FINISHED, RUNNING

NEW, GONE = "new", "gone"
"""States of a cell beside those of a run: never started; ended without a word, as when it was killed."""
LONGEST = 120
"""Letters of a cell's name."""


@dataclass(frozen=True, kw_only=True)
class Config:
    recipes: tuple[str, ...]
    """Files, relative to the sweep's."""
    seeds: tuple[int, ...] = ()
    """By default each recipe's own."""
    ranks: int = 0
    """Of a cell; 0: what one replica of its recipe needs."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Of every cell."""
    grid: dict[str, Any] = field(default_factory=dict)
    """A list of values for each key; every combination is a cell."""
    cells: tuple[dict[str, Any], ...] = ()
    """Tables of keys; each is a cell, or where there is a grid each of its combinations with it."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. path: of its recipe. overrides: key=value, over it. recipe, plan: resolved."""

    name: str
    path: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    plan: Plan

    @property
    def folder(self) -> Path:
        """Of its run, there or not."""
        run = self.recipe.run
        return folders.newest(run) or Path(run.root) / f"{run.name}-001"

    @property
    def summary(self) -> summary.Summary | None:
        """None of a run that never began, or whose file is damaged."""
        try:
            return summary.read(self.folder)
        except (OSError, ValueError):
            return None

    @property
    def state(self) -> str:
        found = self.summary
        if summary.is_held(self.folder):
            return RUNNING
        if found is None:
            return GONE if self.folder.is_dir() else NEW
        return GONE if found.state == RUNNING else found.state

    @property
    def is_finished(self) -> bool:
        return self.state == FINISHED

    @property
    def top1(self) -> float | None:
        """Of the test split, once there is one."""
        found = self.summary
        return found.metrics.get(f"{self.recipe.data.test}/top1") if found else None

    def changed(self) -> list[str]:
        """What of its recipe is not as its folder's run was started with: "model.depth = 2, now 3"."""
        file = self.folder / "recipe.toml"
        if not file.exists():
            return []
        try:
            before = table.flat(tomllib.loads(file.read_text("utf-8")))
        except (OSError, ValueError) as error:
            raise RefusedError(f"{file}: cannot be read ({error})") from error
        now = table.flat(tomllib.loads(recipes.dumps(self.recipe)))
        return [
            f"{key} = {_toml(value)}, now {_toml(now[key])}"
            for key, value in before.items()
            if table.is_trained(key) and key in now and now[key] != value
        ]


@dataclass(frozen=True)
class Sweep:
    """text: of its file. root: of all runs. folder: of this sweep's."""

    path: Path
    text: str
    root: Path
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return table.run_name(self.path)

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def logs(self) -> Path:
        """Folder with what its cells printed."""
        return self.folder / "logs"


class _Wanted(NamedTuple):
    """A cell before its recipe is read. varied: the keys that tell it from the others."""

    path: Path
    keys: dict[str, Any]
    varied: dict[str, Any]


def read(path: Path, overrides: Sequence[str] = (), ranks: int = 0) -> Sweep:
    """A sweep's file with all of its cells, each of which could be started.

    Args:
        overrides: key=value, of every cell, over the file's own.
        ranks: that every cell will have; 0: as the file says.

    Raises:
        RefusedError: the file is wrong, or cells cannot be resolved; it names all of those.
    """
    config = _config(path, overrides)
    root = Path(config.keys.get("run.root", recipes.Run().root))
    found: list[Cell] = []
    wrong: list[tuple[str, str]] = []
    for wanted in _wanted(config, path):
        own = [f"{key}={_toml(value)}" for key, value in (wanted.keys | wanted.varied).items()]
        name = _name(wanted.path, wanted.varied, ())
        try:
            recipe = recipes.read(wanted.path, own)
            name = _name(wanted.path, wanted.varied, recipes.flat(recipe))
            run = replace(recipe.run, name=name, root=str(root / table.run_name(path)))
            recipe = replace(recipe, run=run)
            recipe, plan = recipes.resolve(recipe, ranks or config.ranks or recipe.grid.submodule_ranks)
        except RefusedError as error:
            wrong.append((name, str(error)))
        else:
            found.append(Cell(name, wanted.path, tuple(own), recipe, plan))
    if wrong:
        lines = [f"  {name}: {why}" for name, why in wrong]
        count = counted(len(found) + len(wrong), "cell")
        raise RefusedError("\n".join([f"{path}: {len(wrong)} of {count} cannot run, and none was started:", *lines]))
    return Sweep(path, read_text(path), root, tuple(map(_placed, _told_apart(path, found))))


def check_unchanged(sweep: Sweep) -> None:
    """Refuse cells whose folder has a run of another recipe."""
    lines = [f"  {cell.folder}: {'; '.join(changes)}" for cell in sweep.cells if (changes := cell.changed())]
    if lines:
        raise RefusedError(
            "\n".join(
                [
                    f"{sweep.path}: {counted(len(lines), 'run')} of it have been trained with other keys:",
                    *lines,
                    "move them away, or give the sweep's file another name; none was started",
                ]
            )
        )


def _config(path: Path, overrides: Sequence[str]) -> Config:
    values = table.read(path, [])
    known = [entry.name for entry in fields(Config)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'did you mean "{near[0]}"' if near else f"known: {', '.join(known)}"
            raise RefusedError(f'{path}: unknown key "{key}"; {hint}; what is of a recipe stands in [keys] or [grid]')
    try:
        config = TypeAdapter(Config).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        told = [f"{'.'.join(map(str, e['loc']))}: {e['msg'][:1].lower()}{e['msg'][1:]}" for e in error.errors()]
        raise RefusedError(f"{path}: {'; '.join(told)}") from error
    except TypeError as error:  # a TOML date, which JSON does not have
        raise RefusedError(f"{path}: {error}") from error
    given = {".".join(parts): value for parts, value in map(table.split, overrides)}
    config = replace(config, keys=table.flat(config.keys) | given)
    if why := next(_wrong(config), ""):
        raise RefusedError(f"{path}: {why}")
    return config


def _wrong(config: Config) -> Iterator[str]:
    keys, grid = config.keys, table.flat(config.grid)
    listed = [table.flat(cell) for cell in config.cells]
    if not config.recipes:
        yield "recipes = []: name at least one"
    if config.ranks < 0:
        yield f"ranks = {config.ranks}: must be at least 1, or 0 for what the recipe needs"
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            yield f"[grid] {key} = {_toml(values)}: must be a list of values; one for all cells stands in [keys]"
        for where, others in (("[keys]", [keys]), ("[[cells]]", listed)):
            if any(key in other for other in others):
                yield f"{key} is in [grid] and in {where}; leave one of them out"
    everywhere = [keys, grid, *listed]
    if any("run.name" in place for place in everywhere):
        yield "run.name: a sweep names its runs by their keys; leave it out"
    if any("run.root" in place for place in everywhere[1:]):
        yield "run.root: the runs of a sweep lie in one folder; set it in [keys]"
    if config.seeds and any("run.seed" in place for place in everywhere):
        yield "run.seed and seeds: leave one of them out"


def _wanted(config: Config, path: Path) -> Iterator[_Wanted]:
    """In the order of the file, seeds innermost: a recipe's cells with the next key come after all of its seeds."""
    keys, grid = config.keys, table.flat(config.grid)
    seeds = [{"run.seed": seed} for seed in config.seeds] or [{}]
    for recipe, cell, *values in product(config.recipes, config.cells or ({},), *grid.values()):
        file = Path(os.path.normpath(path.parent / recipe))
        for seed in seeds:
            yield _Wanted(file, keys, table.flat(cell) | dict(zip(grid, values, strict=True)) | seed)


def _name(path: Path, varied: dict[str, Any], keys: dict[str, Any] | tuple[()]) -> str:
    """Of a cell, from itself alone, so that it stays when others are added. keys: of its whole recipe."""
    parts = [f"{table.short(key, keys)}={table.text(value)}" for key, value in varied.items()]
    text = re.sub(r"[{}]", "", ",".join([table.run_name(path), *parts])).replace(", ", ",")
    return re.sub(r"[^\w.,=+-]+", "-", text)


def _told_apart(path: Path, cells: list[Cell]) -> Iterator[Cell]:
    """With another name for cells that would have one name, or one that is no file's: ended by a digest of its keys.

    Raises:
        RefusedError: two cells are one and the same.
    """
    twice = [key for key, count in Counter((cell.path, cell.overrides) for cell in cells).items() if count > 1]
    if twice:
        same = next(cell.name for cell in cells if (cell.path, cell.overrides) == twice[0])
        raise RefusedError(f"{path}: {same} is there twice; leave one of them out")
    names = Counter(cell.name for cell in cells)
    for cell in cells:
        if names[cell.name] > 1 or len(cell.name) > LONGEST:
            digest = hashlib.sha256("\n".join([str(cell.path), *cell.overrides]).encode()).hexdigest()[:8]
            name = f"{cell.name[:LONGEST]}-{digest}"
            run = replace(cell.recipe.run, name=name)
            yield replace(cell, name=name, recipe=replace(cell.recipe, run=run))
        else:
            yield cell


def _placed(cell: Cell) -> Cell:
    run = cell.recipe.run
    return replace(cell, overrides=(*cell.overrides, f"run.root={_toml(run.root)}", f"run.name={_toml(run.name)}"))


def _toml(value: Any) -> str:
    """As an override has it: a word as it is, everything else in one line."""
    return value if isinstance(value, str) and table.split(f"key={value}")[1] == value else _inline(value)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_inline(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    return json.dumps(value, ensure_ascii=False)  # which TOML reads alike
