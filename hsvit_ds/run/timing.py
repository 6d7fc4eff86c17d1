"""How long a recipe's steps take here, by a real start of it that is ended after a few."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from ..errors import RefusedError
from . import metrics
from .processes import Processes, Share, command, complaint

STEPS = 10
"""That are timed, after `WARM` others."""
WARM = 3
PATIENCE = 120
"""Seconds that a run may take for them; what it did by then is taken."""

_WORDS = "words"


class Timed(NamedTuple):
    """images_per_second: the median of some of the first steps. start: seconds until the first one was done."""

    images_per_second: float
    start: float


def first_steps(recipe: str, ranks: int = 1, share: Share | None = None) -> Timed:
    """Of a recipe's text, with everything that a run does between its steps.

    Raises:
        RefusedError: the run ends before, with its own words.
    """
    share = share or Share()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [f"run.root={folder}", "tracking.mlflow=false", "run.log_every=1", "run.eval_every=1000000"]
        file = folder / "trial.toml"
        file.write_text(recipe, "utf-8")
        with (folder / _WORDS).open("wb") as words:
            run = Processes(command(file, overrides, ranks, share.gpus), words, ranks, share)
            try:
                return _watched(run, folder)
            finally:
                run.kill()
                run.wait()


def _watched(run: Processes, folder: Path) -> Timed:
    began, wall = time.monotonic(), time.time()
    while True:
        steps = [step for path in folder.glob(f"*/{metrics.FILE}") for step in _steps(path)]
        late = time.monotonic() - began > PATIENCE
        code = run.poll()  # where it has finished, there are so few images
        if len(steps) >= WARM + STEPS or (steps and (late or code is not None)):
            rates = [rate for rate, _ in steps]
            return Timed(statistics.median(rates[WARM:] or rates), steps[0][1] - wall)
        if code is not None:
            words = (folder / _WORDS).read_text("utf-8", "replace")
            raise RefusedError(f"a first step could not be timed: {complaint(words) or f'exit code {code}'}")
        if late:
            raise RefusedError(f"a first step could not be timed: none in {PATIENCE} s")
        time.sleep(0.2)


def _steps(path: Path) -> list[tuple[float, float]]:
    """(images/s, Unix time) of every step."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        try:
            values = json.loads(line)
            found.append((values["perf/images_per_sec"], values["time"]))
        except (ValueError, KeyError):  # the last line, half written, or no step's
            continue
    return found
