"""How long a recipe's steps take here, by a real start of it that is ended after a few."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..errors import RefusedError

STEPS = 10
"""That are timed, after `WARM` others."""
WARM = 3
PATIENCE = 120
"""Seconds that a run may take for them; what it did by then is taken."""

_WORDS = "stderr"


def images_per_second(recipe: str) -> float:
    """The median of some of the first steps of a recipe's text, with everything that a run does between them.

    Raises:
        RefusedError: the run ends before, with its own words.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = (f"run.root={folder}", "tracking.mlflow=false", "run.log_every=1", "run.eval_every=1000000")
        file = Path(folder) / "trial.toml"
        file.write_text(recipe, "utf-8")
        command = [sys.executable, "-m", "hsvit_ds.train", str(file), *overrides]
        with (
            (Path(folder) / _WORDS).open("w") as words,
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=words) as run,
        ):
            try:
                return _watched(run, Path(folder))
            finally:
                run.kill()


def _watched(run: subprocess.Popen[bytes], folder: Path) -> float:
    began = time.monotonic()
    while True:
        rates = [rate for path in folder.glob("*/metrics.jsonl") for rate in _rates(path)]
        late = time.monotonic() - began > PATIENCE
        if len(rates) >= WARM + STEPS or (late and rates):
            return statistics.median(rates[WARM:] or rates)
        if run.poll() is not None:
            if rates:  # so few images that it has finished
                return statistics.median(rates[WARM:] or rates)
            words = (folder / _WORDS).read_text("utf-8", "replace").strip().splitlines()
            why = words[-1].removeprefix("hsvit: error: ") if words else f"exit code {run.returncode}"
            raise RefusedError(f"a first step could not be timed: {why}")
        if late:
            raise RefusedError(f"a first step could not be timed: none in {PATIENCE} s")
        time.sleep(0.2)


def _rates(metrics: Path) -> list[float]:
    lines = metrics.read_text("utf-8").splitlines()
    found = []
    for line in lines:
        try:
            found.append(json.loads(line)["perf/images_per_sec"])
        except (ValueError, KeyError):  # the last line, half written, or no step's
            continue
    return found
