"""Runs as they are found, whatever became of them: in folders."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RefusedError
from ..run import metrics, summary, table
from ..run.summary import ERRORS, FAILED, FINISHED, RUNNING, Summary
from . import history
from .history import History

GONE = "gone"
"""The state of a run that ended without a word: killed, or its host is lost."""
DEPTH = 3
"""Folders below one of runs in which others are looked for, as a sweep makes them."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run.

    name: its folder's path below the folder of runs, or its name in MLflow. where: the folder, or MLflow's URI with the
    run's id. recipe: flat, {} where it is not known. summary: None of a run that never began or is of an older version.
    state: running, finished, stopped, failed, or gone. why: of those that did not finish. touched: Unix time of its
    last sign, s.
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

    @property
    def age(self) -> float:
        """Seconds since its last sign."""
        return max(0.0, time.time() - self.touched)

    @property
    def splits(self) -> tuple[str, str]:
        """The names of the splits that choose the best checkpoint and give the result."""
        return str(self.recipe.get("data.val", "val")), str(self.recipe.get("data.test", "test"))


def is_run(folder: Path) -> bool:
    return (folder / "recipe.toml").is_file() and (folder / metrics.FILE).is_file()


def of_folder(folder: Path, name: str = "") -> Record:
    """name: to call it by; its folder's name by default.

    Raises:
        RefusedError: no run there.
    """
    if not is_run(folder):
        raise RefusedError(f"{folder}: no run there; one has a recipe.toml and a {metrics.FILE}")
    try:
        recipe = table.flat(tomllib.loads((folder / "recipe.toml").read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{folder / 'recipe.toml'}: cannot be read ({error})") from error
    try:
        found = summary.read(folder)
    except (OSError, ValueError) as error:
        raise RefusedError(f"{folder / summary.FILE}: cannot be read ({error})") from error
    state, why = _state(folder, found)

    def read() -> History:
        return history.read(folder)

    touched = (folder / metrics.FILE).stat().st_mtime
    return Record(
        name=name or folder.resolve().name,
        where=str(folder),
        title=found.title if found else folder.resolve().name,
        recipe=recipe,
        summary=found,
        state=state,
        why=why,
        touched=touched,
        read=read,
    )


def _state(folder: Path, found: Summary | None) -> tuple[str, str]:
    """(state, why)."""
    if summary.is_held(folder):
        return RUNNING, ""
    if found is None:
        return GONE, ""
    if found.state == RUNNING:
        return GONE, _first_error(folder)
    return found.state, "" if found.state == FINISHED else (found.state == FAILED and _first_error(folder)) or found.why


def _first_error(folder: Path) -> str:
    """The first word of a rank about its failure, of one that is not merely lost to the others where there is such."""
    words = []
    for path in (folder / ERRORS).glob("rank-*.json"):
        try:
            word = json.loads(path.read_text("utf-8"))
            words.append(
                (word["kind"] == "lost", word["time"], f"rank {word['rank']} on {word['host']}: {word['error']}")
            )
        except (OSError, ValueError, KeyError, TypeError):  # its host was lost while it wrote
            continue
    return min(words)[2] if words else ""


def in_folder(root: Path) -> list[Record]:
    """All below a folder of runs, those that were touched last first.

    Raises:
        RefusedError: no such folder.
    """
    if not root.is_dir():
        raise RefusedError(f"--runs {root}: no such folder")
    found = [of_folder(folder, str(folder.relative_to(root))) for folder in _folders(root, DEPTH)]
    return sorted(found, key=lambda record: -record.touched)


def _folders(root: Path, depth: int) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        if path.is_dir():
            if is_run(path):
                yield path
            elif depth > 1:
                yield from _folders(path, depth - 1)
