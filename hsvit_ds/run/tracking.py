"""What is kept of a run: its metrics and its summary in its folder, and a copy in MLflow, never in a step's way."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..engine.checkpoint import Position
from ..errors import RefusedError, first_line, tell, warn
from . import metrics, mlflow_copy, mlflow_run
from . import summary as summaries
from .summary import FINISHED, Best, Summary

CLASSES = "classes.txt"
"""The names of the classes, one a line, where the data says them."""
BEAT = 10.0
"""Seconds after which a logged step renews the summary."""
LEAVE = 15.0
"""Seconds that a run waits at its end for a server that is away."""
PAUSE = 30.0
"""Seconds at most between two questions whether MLflow is back."""


@dataclass(frozen=True, kw_only=True)
class Config:
    mlflow: bool = True
    """Log to MLflow too."""
    uri: str = ""
    """MLflow's tracking URI; by default sqlite in the folder of all runs. Several hosts: a server's http URI."""
    experiment: str = "hsvit-ds"
    """MLflow experiment that the run is logged to."""
    parent: str = ""
    """Id of the MLflow run that this one belongs to, as `hsvit sweep` sets it."""
    profile: int = 0
    """Steps whose parts are timed on every rank, after ten others, as `hsvit profile` sets it; then the run ends."""

    def __post_init__(self) -> None:
        if self.profile < 0:
            raise ValueError(f"profile = {self.profile}: must not be negative")
        # In a query databases take them too.
        if "@" in self.uri.partition("://")[2].partition("/")[0] or "password=" in self.uri.lower():
            raise ValueError(
                "uri holds a user name or password, which would be saved with the run: set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD in the environment"
            )


class Tracker:
    """Rank 0's; every other rank has an `Untracked`.

    Args:
        recipe: flat recipe keys, MLflow's parameters. summary: of this attempt. start: where it begins; what an
        earlier one has logged behind it is forgotten.
    """

    def __init__(
        self, config: Config, folder: Path, recipe: Mapping[str, Any], summary: Summary, start: Position
    ) -> None:
        self._config, self.folder = config, folder
        keep = self._covered_by(start)
        self._lines = metrics.Lines(folder, keep)
        self.summary = _resumed(summary, folder, start.total)
        self._began, self._written = time.monotonic() - self.summary.seconds, 0.0
        self._write()
        self._sender = _Sender(config, folder, recipe, self.summary, keep) if config.mlflow else None

    def log(self, found: Mapping[str, float], step: int) -> None:
        self._lines.log(found, step, time.time())
        before, self.summary = self.summary, self.summary.after(step, found)
        if self.summary.best != before.best or time.monotonic() - self._written > BEAT:
            self._write()

    def size(self) -> int:
        """Bytes of the metrics so far, for the checkpoint that covers them."""
        return self._lines.size

    def covered(self, by: Position) -> None:
        """A checkpoint is there: what was logged before it will not be again, so that MLflow, which forgets no point,
        may have it."""
        if self._sender is not None and by.logged is not None:
            self._sender.allow(by.logged, self.summary)

    def artifacts(self, paths: Iterable[Path]) -> None:
        if self._sender is not None:
            self._sender.artifacts(paths)

    def run_id(self) -> str | None:
        """The MLflow run's id, None until the server has given one."""
        return mlflow_copy.read_state(self.folder).get("run")

    def ui(self) -> str:
        """The URI of the database where this run is, for `mlflow ui`; "" where there is none."""
        uri = self._config.uri
        if self.run_id() is None or (uri and not uri.startswith("sqlite")):
            return ""
        return uri or mlflow_run.uri_of(self.folder.parent.resolve() / mlflow_run.FILE)

    def go_back(self, to: Position) -> None:
        """Forget what was logged since a checkpoint, and will be again."""
        self._lines.cut(self._covered_by(to))

    def close(self, state: str, why: str = "", seconds: float = 60) -> None:
        """End as finished, stopped or failed; MLflow gets so long for what it does not have yet."""
        self._lines.close()
        self.summary = replace(self.summary, state=state, why=why)
        self._write()
        if self._sender is not None:
            self._sender.end(self.summary, self._lines.size if state == FINISHED else 0, seconds)

    def _covered_by(self, position: Position) -> int:
        """Bytes of the metrics."""
        return metrics.size_after(self.folder, position.total) if position.logged is None else position.logged

    def _write(self) -> None:
        self._written = time.monotonic()
        self.summary = replace(self.summary, seconds=self._written - self._began)
        self.summary.write(self.folder)


def _resumed(summary: Summary, folder: Path, step: int) -> Summary:
    """With what an earlier attempt has reached by the step that is resumed."""
    try:
        before = summaries.read(folder)
    except (OSError, ValueError) as error:
        warn(f"{folder / summaries.FILE}: cannot be read ({first_line(error)}); it begins anew")
        return summary
    if before is None:
        return summary
    if before.step > step:  # it has seen steps that will be done again
        before = _as_of(before, folder, step)
    return replace(
        summary, id=before.id, started=before.started, seconds=before.seconds, metrics=before.metrics, best=before.best
    )


def _as_of(before: Summary, folder: Path, step: int) -> Summary:
    """A summary as it was after an earlier step, the last one that the run's metrics have now.

    They are read from their end, until every metric was seen; all of them where a best accuracy was reached later, or a
    width abandoned.
    """
    last: dict[str, int] = {}
    values: dict[str, float] = {}
    best = {name: found for name, found in before.best.items() if found.step <= step}
    lost = set(before.best.keys() - best.keys())
    for line in metrics.newest_first(folder):
        at, _ = line.pop("step"), line.pop("time")
        for name, value in line.items():
            last.setdefault(name, at)
            if "top1" in name and name not in before.best:
                lost.add(name)
            if math.isfinite(value):
                values.setdefault(name, value)
                if name in lost and (name not in best or value >= best[name].value):
                    best[name] = Best(value=value, step=at)
        if not lost and before.metrics.keys() <= values.keys():
            break
    kept = metrics.current(last)
    return replace(
        before,
        metrics={name: values[name] for name in kept if name in values},
        best={name: best[name] for name in kept if name in best},
    )


class _Sender:
    """A thread that keeps MLflow's copy of a run up to date, and waits for a server that is away."""

    def __init__(self, config: Config, folder: Path, recipe: Mapping[str, Any], summary: Summary, covered: int) -> None:
        self._config, self.folder, self._recipe = config, folder, recipe
        self._where = config.uri or folder.parent / mlflow_run.FILE
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._covered, self._summary, self._paths = covered, summary, list[Path]()
        self._told: Summary | None = None
        self._ending, self._away = False, 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def allow(self, covered: int, summary: Summary) -> None:
        with self._lock:
            self._covered, self._summary = covered, summary
        self._wake.set()

    def artifacts(self, paths: Iterable[Path]) -> None:
        with self._lock:
            self._paths += paths
        self._wake.set()

    def end(self, summary: Summary, covered: int, seconds: float) -> None:
        """The last words. covered: 0 for what it is."""
        with self._lock:
            self._covered, self._summary, self._ending = max(covered, self._covered), summary, True
        self._wake.set()
        until = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < (until if not self._away else until - seconds + LEAVE):
            self._thread.join(timeout=0.2)
        if self._thread.is_alive():
            warn(
                f"MLflow at {self._where} did not take everything; when it does, "
                f"`hsvit runs {self.folder.name} --runs {self.folder.parent} --to {self._where}` sends the rest"
            )

    def _run(self) -> None:
        """Everything that talks to MLflow."""
        copy = None
        while True:
            try:
                copy = copy or self._open()
                ended = self._send(copy)
                if self._away:
                    tell(f"hsvit: MLflow at {self._where} is back")
                    self._away = 0
                if ended:
                    return
                self._wake.wait(PAUSE)
            except RefusedError as error:
                warn(f"MLflow at {self._where} is not usable, {metrics.FILE} has everything: {error}")
                return
            except Exception as error:  # whatever a remote service does must not touch the run
                if not self._away:
                    warn(
                        f"MLflow at {self._where} is away; what it misses is sent when it is back: {first_line(error)}"
                    )
                self._away += 1
                self._wake.wait(min(2.0**self._away, 2.0 if self._ending else PAUSE))
            self._wake.clear()

    def _open(self) -> mlflow_copy.Copy:
        c = self._config
        copy, lost = mlflow_copy.Copy.open(c.uri, c.experiment, self.folder, self._recipe, self._summary, c.parent)
        if lost:
            warn(
                f"MLflow at {self._where} has no run {lost}, as where the folder was moved or the run deleted: "
                f"it goes on as run {copy.run}, from its first step"
            )
        return copy

    def _send(self, copy: mlflow_copy.Copy) -> bool:
        """Whether that was all."""
        with self._lock:
            covered, summary, paths, ending = self._covered, self._summary, list(self._paths), self._ending
        copy.send_metrics(covered)
        for path in paths:
            copy.artifact(path)
            with self._lock:
                self._paths.remove(path)
        if summary != self._told:
            copy.tell(summary)
            self._told = summary
        if ending:
            copy.end(summary.state)
        return ending


class Untracked:
    """The tracker of every rank but the first."""

    def log(self, found: Mapping[str, float], step: int) -> None: ...

    def size(self) -> int:
        return 0

    def covered(self, by: Position) -> None: ...

    def artifacts(self, paths: Iterable[Path]) -> None: ...

    def run_id(self) -> str | None:
        return None

    def ui(self) -> str:
        return ""

    def go_back(self, to: Position) -> None: ...

    def close(self, state: str, why: str = "", seconds: float = 60) -> None: ...
