"""Runs as they are found, whatever became of them: in folders, on a tracking server, or by what a person calls them."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import RefusedError, masked, warn
from ..run import metrics, summary, table
from ..run.summary import FAILED, FINISHED, RUNNING, Summary
from . import history, mlflow_records
from .history import History
from .record import GONE, Latest, Record

DEPTH = 3
"""Folders below one of runs in which others are looked for, as a sweep makes them."""


def is_run(folder: Path) -> bool:
    """Also one that has lost its recipe or its metrics. MLflow's artifacts are a recipe and a summary alone."""
    return (folder / metrics.FILE).is_file() or (
        any((folder / name).is_file() for name in ("recipe.toml", summary.FILE))
        and ((folder / summary.LOCK).is_file() or (folder / "checkpoints").is_dir())
    )


def of_folder(folder: Path, name: str = "") -> Record:
    """What cannot be read of it is said in a warning, and unknown.

    Args:
        name: to call it by; its folder's name by default.

    Raises:
        RefusedError: no run there.
    """
    if not is_run(folder):
        raise RefusedError(f"{folder}: no run there; one has a recipe.toml and a {metrics.FILE}")
    found = _summary(folder)
    state, why = _state(folder, found)
    signs = [path for path in (folder / metrics.FILE, folder / summary.FILE) if path.is_file()]
    return Record(
        name=name or folder.resolve().name,
        where=str(folder),
        title=found.title if found else folder.resolve().name,
        recipe=_recipe(folder),
        summary=found,
        state=state,
        why=why,
        touched=max(path.stat().st_mtime for path in signs or [folder]),
        read=_reader(folder),
        latest=Latest(found.metrics, found.step) if found and state not in (RUNNING, GONE) else None,
    )


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / "recipe.toml"
    try:
        return table.flat(tomllib.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        warn(f"{path}: is not there; what was trained is not known")
    except (OSError, ValueError) as error:
        warn(f"{path}: cannot be read ({error}); what was trained is not known")
    return {}


def _summary(folder: Path) -> Summary | None:
    try:
        return summary.read(folder)
    except (OSError, ValueError) as error:
        warn(f"{folder / summary.FILE}: cannot be read ({error}); {metrics.FILE} is read instead")
        return None


def _reader(folder: Path) -> Callable[[], History]:
    said = False

    def read() -> History:
        nonlocal said
        try:
            found = history.read(folder)
        except FileNotFoundError:
            raise RefusedError(f"{folder}: has no {metrics.FILE}; what it measured is not known") from None
        except (OSError, ValueError) as error:
            raise RefusedError(f"{folder / metrics.FILE}: cannot be read ({error})") from error
        if not said:
            metrics.tell_lost(folder, list(found.lost))
            said = True
        return found

    return read


def _state(folder: Path, found: Summary | None) -> tuple[str, str]:
    """(state, why)."""
    if summary.is_held(folder):
        return RUNNING, ""
    if found is None:
        return GONE, _first_error(folder)
    if found.state == RUNNING:
        return GONE, _first_error(folder)
    return found.state, "" if found.state == FINISHED else (found.state == FAILED and _first_error(folder)) or found.why


def _first_error(folder: Path) -> str:
    """The first word of a rank about its failure, of one that is not merely lost to the others where there is such."""
    words = [
        (word["kind"] == "lost", word["time"], f"rank {word['rank']} on {word['host']}: {word['error']}")
        for word in summary.rank_words(folder)
    ]
    return min(words)[2] if words else ""


def in_folder(root: Path) -> list[Record]:
    """All below a folder of runs, those that were touched last first; one that cannot be read is said in a warning.

    Raises:
        RefusedError: no such folder.
    """
    if not root.is_dir():
        remedy = f"; a database of MLflow is named --runs sqlite:///{root}" if root.is_file() else ""
        raise RefusedError(f"--runs {root}: no such folder{remedy}")
    found = []
    for folder in _folders(root, DEPTH):
        try:
            found.append(of_folder(folder, str(folder.relative_to(root))))
        except OSError as error:
            warn(f"{folder}: cannot be read ({error.strerror}); it is left out")
    return sorted(found, key=lambda record: -record.touched)


def _folders(root: Path, depth: int) -> Iterator[Path]:
    try:
        inner = sorted(path for path in root.iterdir() if path.is_dir())
    except OSError as error:
        warn(f"{root}: cannot be listed ({error.strerror}); what is in it is left out")
        return
    for path in inner:
        try:
            is_one = is_run(path)
        except OSError as error:
            warn(f"{path}: cannot be read ({error.strerror}); it is left out")
            continue
        if is_one:
            yield path
        elif depth > 1:
            yield from _folders(path, depth - 1)


def all_in(root: str) -> list[Record]:
    """Of a folder of runs, or of an MLflow server or database by its URI; those that were touched last first.

    Raises:
        RefusedError: no such folder, or MLflow is not to be had there.
    """
    return mlflow_records.at(root) if mlflow_records.is_uri(root) else in_folder(Path(root))


def find(names: list[str], root: str) -> list[Record]:
    """The runs that a person names, each once, in the order of the names.

    Args:
        names: a run's folder, a folder of runs, an MLflow URI (all in it); or of those in `root`: a run's name, that of
            a folder there, a glob of such (`digits-*`), or an MLflow run's id.
        root: see `all_in`; looked into where a name is none of a folder.

    Raises:
        RefusedError: no such run; the nearest names are told.
    """

    @cache
    def known() -> list[Record]:
        return all_in(root)

    found: dict[str, Record] = {}
    for name in names:
        for record in _named(name, root, known):
            found.setdefault(record.where if record.id else str(Path(record.where).resolve()), record)
    return list(found.values())


def _named(name: str, root: str, known: Callable[[], list[Record]]) -> list[Record]:
    path = Path(name)
    if mlflow_records.is_uri(name):
        found = mlflow_records.at(name)
    elif is_run(path):
        return [of_folder(path)]
    elif path.is_dir():
        found = in_folder(path)
    else:
        found = [record for record in known() if _is_called(record, name.rstrip("/"))]
        if not found:
            names = [record.name for record in known()]
            near = difflib.get_close_matches(name, names) or names[:3]
            raise RefusedError(
                f"{name}: no run is called so in {masked(root)}; "
                + (f"near: {', '.join(near)}" if near else "none is there")
            )
        return found
    if not found:
        raise RefusedError(f"{masked(name)}: no run is there")
    return found


def _is_called(record: Record, name: str) -> bool:
    called = [record.name, record.where]
    if record.id:  # MLflow's name of a run goes on with what its command line changed
        called.append(record.name.partition(" ")[0])
    ids = [record.id, *([record.summary.id] if record.summary else [])]
    return (
        name in (*ids, *called) or record.name.startswith(f"{name}/") or any(fnmatchcase(text, name) for text in called)
    )
