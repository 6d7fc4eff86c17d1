"""Segments of runs with absent submodules: each resumes, steps and saves; norms, and the states found and left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hsvit_ds.engine.checkpoint import Position

from .common import state, steps, trainer


def main(arguments: list[dict[str, Any]], _folder: Path) -> list[dict[str, Any]]:
    """arguments: for each segment "folder", "base", "overrides", and "stops", the steps to save after."""
    return [segment(**arguments) for arguments in arguments]


def segment(folder: str, base: str, overrides: list[str], stops: list[int]) -> dict[str, Any]:
    run = trainer(Path(folder), overrides, True, base)
    loaded, norms = state(run), []
    for stop in stops:
        norms += steps(run, stop)
        position = Position(0, stop, stop)
        run.start = position
        run.checkpoints.save(position)
        assert run.checkpoints.wait() is None
    return {"loaded": loaded, "norms": norms, "state": state(run)}
