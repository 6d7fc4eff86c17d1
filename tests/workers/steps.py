"""Five steps of every case: gradient norms and the canonical state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .common import state, steps, trainer


def main(arguments: dict[str, list[str]], folder: Path) -> dict[str, Any]:
    results = {}
    for name, overrides in arguments.items():
        run = trainer(folder / name, overrides)
        weights = {k: v.clone() for k, v in run.engine.module.named_parameters() if v.numel()}
        results[name] = {"initial": weights, "norms": steps(run, 5), "state": state(run)}
    return results
