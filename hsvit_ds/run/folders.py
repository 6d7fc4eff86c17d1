"""The folder of a run, `root`/`name`-NNN: the newest one of a name, or a new one, claimed by making it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from ..errors import RefusedError
from . import metrics, title
from .recipe import Run
from .summary import ERRORS


def newest(run: Run) -> Path | None:
    """The folder of the highest number, to resume; None where the name has none."""
    folders = {number: path for number, path in _numbered(_base(run)).items() if path.is_dir()}
    return folders[max(folders)] if folders else None


def claim(run: Run) -> Path:
    """Make the folder of the next number. Of several starts at one moment one alone can make it; the others go on to
    the next number."""
    folder = _next(_base(run))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while not _makes(folder):
            folder = _next(_base(run))
    except OSError as error:
        raise RefusedError(f"run folder {folder}: {error.strerror}; set run.root") from error
    return folder


def _makes(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def open_folder(run: Run, asked: Path | None, resume: bool, recipe_text: str, changes: str = "") -> Path:
    """The folder that is asked for by its path, made where it is missing, or the newest one to resume, or a new one;
    with the recipe and the title (see `title`) that it was started with; the last words of earlier attempts are moved
    aside, to errors-NNN. Refused where not writable."""
    folder = asked or (newest(run) if resume else None) or claim(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "recipe.toml").exists():
            (folder / "recipe.toml").write_text(recipe_text, "utf-8")
            named = f"{folder.name.rpartition('-')[0]},"  # a sweep's run is named by its keys
            added = [word for word in changes.split() if f",{word}," not in named]
            (folder / title.FILE).write_text(" ".join([folder.name, *added]) + "\n", "utf-8")
        (folder / metrics.FILE).open("a").close()
        if (errors := folder / ERRORS).exists():
            errors.rename(_next(errors))
    except OSError as error:
        raise RefusedError(f"run folder {folder}: {error.strerror}; set run.root") from error
    return folder


def names_splits(run: Run, asked: Path | None, resume: bool) -> bool:
    """Whether the recipe of a run that goes on says which splits are `data.val` and `data.test`; once none did."""
    folder = asked or (newest(run) if resume else None)
    try:
        return folder is None or "val" in tomllib.loads((folder / "recipe.toml").read_text("utf-8"))["data"]
    except OSError:  # a new one
        return True


def log_name(rank: int) -> str:
    """The file in a run's folder of what libraries print on a rank."""
    return f"log-{rank:04d}.txt" if rank else "log.txt"


def _base(run: Run) -> Path:
    return Path(run.root) / run.name


def _next(base: Path) -> Path:
    return base.with_name(f"{base.name}-{max(_numbered(base), default=0) + 1:03d}")


def _numbered(base: Path) -> dict[int, Path]:
    """{NNN: path} of all that is called `base`-NNN; after 999 comes 1000."""
    numbered = re.compile(re.escape(base.name) + r"-(\d{3}|[1-9]\d{3,})")
    try:
        found = [(numbered.fullmatch(path.name), path) for path in base.parent.iterdir()]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RefusedError(f"{base.parent}: cannot be listed ({error.strerror}); set run.root") from error
    return {int(match[1]): path for match, path in found if match}
