"""Folders of runs, as the trainer leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from hsvit_ds.run import metrics, table
from hsvit_ds.run.summary import FINISHED, Cost, Summary

from ..summaries import summary as made

PER_EPOCH = 10
RECIPE: dict[str, Any] = {
    "run": {"name": "digits-hsvit", "root": "runs", "seed": 0, "epochs": 3, "global_batch": 32},
    "model": {"kind": "hsvit", "groups": 16},
    "data": {"name": "digits", "val": "val", "test": "test"},
    "optimizer": {"lr": 0.002},
    "grid": {"submodule_ranks": 1},
}
DATA = made().data


def summary(**values: Any) -> Summary:
    found = made(
        id="id", title="title", changed={}, costs=(Cost(width="1.00", parameters=1000, macs=2_000_000),), ranks=1,
        hosts=("a",), launcher="python", versions={}, started=1000.0, steps=30, steps_per_epoch=PER_EPOCH, epochs=3,
        state=FINISHED, seconds=7200.0, step=30,
    )  # fmt: skip
    return replace(found, **values)


def run(
    root: Path,
    name: str,
    test: float | None = 90.0,
    val: Sequence[float] = (50.0, 80.0, 70.0),
    overrides: Sequence[str] = (),
    more: Mapping[str, float] | None = None,
    said: Summary | None = None,
    recipe: Mapping[str, Any] = RECIPE,
) -> Path:
    """A folder of three epochs. test: the result; None of a run that has none yet. overrides: of the recipe. more:
    metrics at the end. said: its summary; none is written where it is None."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    (folder / "recipe.toml").write_text(tomli_w.dumps(table.read(folder / "recipe.toml", list(overrides))))
    lines = metrics.Lines(folder)
    for step in range(1, 31):
        logged = {"train/loss": 2.0 / step, "train/lr": 0.002, "perf/images_per_sec": 100.0 + step}
        lines.log(logged, step, 1000.0 + step)
        if step % PER_EPOCH == 0:
            lines.log({"val/top1": val[step // PER_EPOCH - 1], "val/loss": 1.0 / step}, step, 1000.5 + step)
    if test is not None:
        lines.log({"test/top1": test, **(more or {})}, 30, 1031.0)
    lines.close()
    if said:
        said.write(folder)
    return folder
