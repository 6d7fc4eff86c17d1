"""Metrics: a JSONL file in the run folder as the truth, and MLflow beside it, never in a step's way."""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RefusedError, first_line, warn
from . import mlflow_run

METRICS = "metrics.jsonl"
CLASSES = "classes.txt"
"""The names of the classes, one a line, where the data says them."""
_RUN_ID = "mlflow_run_id"


@dataclass(frozen=True, kw_only=True)
class Config:
    mlflow: bool = True
    """Log to MLflow too."""
    uri: str = ""
    """MLflow's tracking URI; by default sqlite in the folder of all runs. Several hosts: a server's http URI."""
    experiment: str = "hsvit-ds"
    """MLflow experiment that the run is logged to."""

    def __post_init__(self) -> None:
        # In a query databases take them too.
        if "@" in self.uri.partition("://")[2].partition("/")[0] or "password=" in self.uri.lower():
            raise ValueError(
                "uri holds a user name or password, which would be saved with the run: set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD in the environment"
            )


class Tracker:
    """Rank 0's metrics; every other rank has an `Untracked`.

    Args:
        name: of the MLflow run. recipe: flat recipe keys, MLflow's parameters.
        resume_step: forget lines of later steps, which will be logged again; None for a new run.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        name: str,
        recipe: Mapping[str, Any],
        resume_step: int | None,
    ) -> None:
        self._config, self.folder, self.path = config, folder, folder / METRICS
        if resume_step is not None:
            _forget_after(self.path, resume_step)
        self._file = self.path.open("ab", buffering=0)
        self._unwritten = b""
        self._queue: queue.Queue[tuple[str, Any] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        if config.mlflow:
            self._thread = threading.Thread(target=self._send, args=(config, name, recipe), daemon=True)
            self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = time.time()
        try:
            self._write(json.dumps({"step": step, "time": now, **_valid(metrics)}, allow_nan=False) + "\n")
        except OSError as error:  # a full disk
            warn(f"{self.path}: {error.strerror}; metrics are kept in memory until there is room")
        if self._thread is not None:
            self._queue.put(("metrics", (dict(metrics), step, int(now * 1000))))

    def _write(self, text: str) -> None:
        """Append to the file what it has not taken so far, too: a buffered file loses lines on a full disk."""
        self._unwritten += text.encode()
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def artifact(self, path: Path) -> None:
        if self._thread is not None:
            self._queue.put(("artifact", path))

    def run_id(self) -> str | None:
        """The MLflow run's id, None until the server has given one."""
        path = self.folder / _RUN_ID
        return path.read_text("utf-8").strip() if path.exists() else None

    def ui(self) -> str:
        """The URI of the database where this run is, for `mlflow ui`; "" where there is none."""
        uri = self._config.uri
        if self.run_id() is None or (uri and not uri.startswith("sqlite")):
            return ""
        return uri or mlflow_run.uri_of(self.folder.parent.resolve() / mlflow_run.FILE)

    def go_back(self, step: int) -> None:
        """Forget lines of steps after `step`, which will be logged again."""
        self._file.close()
        _forget_after(self.path, step)
        self._file = self.path.open("ab", buffering=0)

    def close(self, status: str, seconds: float = 60) -> None:
        """End with "FINISHED", "KILLED" or "FAILED"; waits so long for what is still queued."""
        try:
            self._write("")
        except OSError as error:
            warn(f"{self.path}: the last metrics are lost: {error.strerror}")
        self._file.close()
        if self._thread is not None:
            self._queue.put(("status", status))
            self._queue.put(None)
            self._thread.join(timeout=seconds)
            if self._thread.is_alive():
                warn(f"MLflow did not take the last metrics within {seconds:g} s")

    def _send(self, config: Config, name: str, recipe: Mapping[str, Any]) -> None:
        """In the thread: everything that talks to MLflow. One failure ends it with one warning."""
        where = config.uri or self.folder.parent / mlflow_run.FILE
        try:
            client, run, lost = mlflow_run.open_run(
                config.uri, config.experiment, self.folder, recipe, self.run_id(), name
            )
            (self.folder / _RUN_ID).write_text(run, "utf-8")
            if lost:
                warn(
                    f"MLflow at {where} has no run {lost}, as where the folder was moved or the run deleted: "
                    f"it goes on as run {run}; {METRICS} has the steps before"
                )
            while (item := self._queue.get()) is not None:
                kind, value = item
                if kind == "metrics":
                    self._send_metrics(client, run, value)
                elif kind == "artifact":
                    client.log_artifact(run, str(value))
                else:
                    client.set_terminated(run, value)
        except Exception as error:  # whatever a remote service does must not touch the run
            why = str(error) if isinstance(error, RefusedError) else first_line(error)
            warn(f"MLflow at {where} is not usable, {METRICS} has everything: {why}")

    def _send_metrics(self, client: Any, run: str, value: Any) -> None:
        from mlflow.entities import Metric

        metrics, step, when = value
        client.log_batch(run, metrics=[Metric(k, float(v), when, step) for k, v in metrics.items()])


class Untracked:
    """The tracker of every rank but the first."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def run_id(self) -> str | None:
        return None

    def ui(self) -> str:
        return ""

    def go_back(self, step: int) -> None: ...

    def close(self, status: str, seconds: float = 60) -> None: ...


def _valid(metrics: Mapping[str, float]) -> dict[str, Any]:
    """With null where JSON has no number, and what it was: {…, "not_finite": {"train/loss": "nan"}}."""
    odd = {name: str(value) for name, value in metrics.items() if not math.isfinite(value)}
    return {name: None if name in odd else value for name, value in metrics.items()} | (
        {"not_finite": odd} if odd else {}
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every line of a run's metrics, in the order of logging; numbers that are not finite are there again."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text("utf-8").splitlines()]
    return [line | {n: float(text) for n, text in line.pop("not_finite", {}).items()} for line in lines]


def _forget_after(path: Path, step: int) -> None:
    """Drop lines of steps after `step`, and a last line that a killed run had not finished."""
    kept = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept), "utf-8")
    temporary.rename(path)
