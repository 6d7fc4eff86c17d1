"""Segments of runs: each resumes its folder's latest checkpoint, steps, saves, and returns the canonical state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hsvit_ds.models.hsvit
from hsvit_ds.checkpoint import Position
from hsvit_ds.models.hsvit import HSViT

from .common import state, steps, trainer


def with_frozen_stem(*args: Any, **kwargs: Any) -> HSViT:
    model = HSViT(*args, **kwargs)
    model.submodules.trunk[0].requires_grad_(False)
    return model


def main(arguments: list[dict[str, Any]], _folder: Path) -> list[dict[str, Any]]:
    states = []
    for segment in arguments:
        hsvit_ds.models.hsvit.HSViT = with_frozen_stem if segment.get("frozen") else HSViT
        run = trainer(Path(segment["folder"]), segment["overrides"], resume=True)
        assert run.start.total == segment["start"]
        steps(run, segment["stop"])
        run.checkpoints.save(Position(0, segment["stop"], segment["stop"]))
        states.append(state(run))
        assert run.checkpoints.wait() is None
    return states
