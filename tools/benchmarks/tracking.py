"""What tracking takes of a step's time, beside a run without MLflow; a part of `python -m tools.benchmark compare`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.run import metrics
from hsvit_ds.run.summary import read
from hsvit_ds.run.tracking import Config, Tracker

from .start import ENVIRONMENT

EVERY = 10
"""Steps between logged ones."""
RECIPE = ["recipes/digits/hsvit.toml", "grid.submodule_ranks=1", "run.epochs=4", f"run.log_every={EVERY}"]


def step_ms(folder: Path, mlflow: bool) -> float:
    """The median step of a real run behind its first epoch, ms."""
    keys = [*RECIPE, f"tracking.mlflow={str(mlflow).lower()}", "--run", str(folder)]
    command = [sys.executable, "-m", "hsvit_ds.train", *keys]
    subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps = [line["perf/step_ms_p50"] for line in metrics.read(folder) if "perf/step_ms_p50" in line]
    return median(steps[len(steps) // 4 :])


def log_ms(folder: Path) -> float:
    """The median time that the loop waits for one logged step, with MLflow's thread at work, ms."""
    before = read(folder)
    assert before is not None
    (line,) = [line for line in metrics.read(folder) if "perf/step_ms_p50" in line][-1:]
    found = {name: value for name, value in line.items() if name not in ("step", "time")}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "recipe.toml").write_text("")
        tracker = Tracker(Config(), Path(name), {}, before, Position(0, 0, 0, logged=0))
        took = []
        for step in range(1, 2001):
            began = time.perf_counter()
            tracker.log(found, step)
            took.append(1000 * (time.perf_counter() - began))
            if step % 100 == 0:
                tracker.covered(Position(0, step, step, logged=tracker.size()))
        tracker.close("finished")
    return median(took)


def rows(repeats: int) -> list[dict[str, str]]:
    """A table of what a step and its share of logging take."""
    found: dict[bool, list[float]] = {True: [], False: []}
    logged = []
    for _ in range(repeats):
        for mlflow in found:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name) / "run"
                found[mlflow].append(step_ms(folder, mlflow))
                if mlflow:
                    logged.append(log_ms(folder))
    step, log = median(found[True]), median(logged)
    share = 100 * log / EVERY / step
    return [
        {"what": "a step of digits/hsvit, tracked in MLflow", "ms": f"{step:.2f}", "of a step, %": "100"},
        {"what": "the same without MLflow", "ms": f"{median(found[False]):.2f}", "of a step, %": ""},
        {"what": f"logging, once in {EVERY} steps", "ms": f"{log:.3f}", "of a step, %": f"{share:.3f}"},
    ]
