"""Segments of runs: each resumes its folder's latest checkpoint, steps, saves, and returns the canonical state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hsvit_ds.engine.checkpoint import Position

from .common import state, steps, trainer


def main(arguments: list[dict[str, Any]], _folder: Path) -> list[dict[str, Any]]:
    states = []
    for segment in arguments:
        run = trainer(Path(segment["folder"]), segment["overrides"], True, segment["base"])
        assert run.start.total == segment["start"]
        steps(run, segment["stop"])
        run.checkpoints.save(Position(0, segment["stop"], segment["stop"]))
        states.append(state(run))
        assert run.checkpoints.wait() is None
    return states
