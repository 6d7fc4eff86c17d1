"""Folders as runs leave them, made by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from hsvit_ds.run.metrics import Lines
from hsvit_ds.run.summary import ERRORS, FINISHED, Best, Cost, held

from ..summaries import summary

STEPS_PER_EPOCH = 10
EPOCHS = 10
RECIPE = {
    "run": {"epochs": EPOCHS, "seed": 0},
    "model": {"kind": "hsvit", "depth": 2, "kernels": [64, 128], "widths": {"isolated": True}},
    "task": {"kind": "supervised"},
    "data": {"name": "digits", "val": "val", "test": "test"},
    "optimizer": {"lr": 0.001},
}


def changed(recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with other values, by their whole keys."""
    made = json.loads(json.dumps(recipe))
    for key, value in changes.items():
        *tables, last = key.split(".")
        inner = made
        for name in tables:
            inner = inner[name]
        inner[last] = value
    return dict(made)


def points(epochs: int, top1: float, widths: tuple[str, ...] = (), val: str = "val") -> list[dict[str, float]]:
    """A line after each half epoch and each evaluation; the accuracy is highest at the last but one."""
    lines: list[dict[str, float]] = []
    for epoch in range(1, epochs + 1):
        step = epoch * STEPS_PER_EPOCH
        for at in (step - STEPS_PER_EPOCH // 2, step):
            lines.append({"step": at, "train/loss": 2 / at, "perf/images_per_sec": 1000.0 + at})
        score = top1 - (1 if epoch == epochs > 1 else 0) - max(0, epochs - 1 - epoch)
        by_width = {f"{val}/top1_w{width}": score - 10 + 10 * float(width) for width in widths}
        lines.append({"step": step, f"{val}/top1": score, f"{val}/loss": 1.0, **by_width})
    return lines


def run(
    folder: Path,
    lines: list[dict[str, float]],
    changes: Mapping[str, Any] | None = None,
    *,
    state: str = FINISHED,
    why: str = "",
    has_summary: bool = True,
    widths: tuple[str, ...] = (),
    error: str = "",
    file: str = "recipes/digits/hsvit.toml",
) -> Path:
    """A run that ended with a state; `error`: what rank 1 said at the end."""
    folder.mkdir(parents=True)
    recipe = changed(RECIPE, changes or {})
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    now = time.time()
    made = Lines(folder)
    for line in lines:
        made.log({name: value for name, value in line.items() if name != "step"}, int(line["step"]), now)
    made.close()
    with held(folder):
        pass
    if error:
        (folder / ERRORS).mkdir()
        word = {"rank": 1, "host": "node17", "time": now, "kind": "failed", "error": error}
        (folder / ERRORS / "rank-0001.json").write_text(json.dumps(word))
    if not has_summary:
        return folder
    metrics = {name: value for line in lines for name, value in line.items() if name != "step"}
    best: dict[str, Best] = {}
    for line in lines:
        for name, value in line.items():
            if "top1" in name and (name not in best or value > best[name].value):
                best[name] = Best(value=value, step=int(line["step"]))
    summary(
        id=f"id-of-{folder.name}",
        title=folder.name,
        recipe=file,
        changed=dict(changes or {}),
        costs=tuple(Cost(width=width, parameters=1, macs=1) for width in widths or ("1.00",)),
        started=now - 100,
        steps=EPOCHS * STEPS_PER_EPOCH,
        steps_per_epoch=STEPS_PER_EPOCH,
        epochs=EPOCHS,
        state=state,
        why=why,
        seconds=100.0,
        step=max((int(line["step"]) for line in lines), default=0),
        metrics=metrics,
        best=best,
    ).write(folder)
    return folder
