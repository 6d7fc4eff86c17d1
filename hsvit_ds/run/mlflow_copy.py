"""A run in MLflow, as a copy of its folder: sent in any number of parts, at any time, and never twice."""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from ..errors import counted, first_line, warn
from . import metrics, mlflow_run, system
from .summary import FINISHED, RUNNING, Summary

STATE = "mlflow.json"
"""In the run's folder: where its copy is, and how far."""
BATCH = 1000
"""Metrics of a request, by MLflow's limit."""
PARAMETER, TAG = 6000, 8000
"""Characters of a value, by MLflow's limits."""
STEADY = ("comm/", "data/bad_samples", "train/skipped_steps", "train/submodules_present")
"""Metrics that mostly never change, which is no curve: sent when they do."""
STATUS = {"running": "RUNNING", "finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass
class Copy:
    """The MLflow run of a run's folder, open.

    MLflow's databases know a point by its run, name, time, step and value, so sending one again changes nothing.

    client: MLflow's. run: the id of the MLflow run. sent: bytes of each file of metrics that MLflow has.
    """

    client: Any
    run: str
    uri: str
    folder: Path
    sent: dict[str, int]
    status: str
    """When it was opened."""
    _steady: dict[str, Point] = field(default_factory=dict)

    @classmethod
    def open(
        cls, uri: str, experiment: str, folder: Path, recipe: Mapping[str, Any], summary: Summary, parent: str = ""
    ) -> tuple[Copy, str]:
        """(The copy, the id that the folder knew and MLflow has lost, or "").

        Args:
            uri: "" for a file in the folder of all runs. recipe: flat. parent: id of the MLflow run that it belongs to.

        Raises:
            RefusedError: what a person has to put right in MLflow. Others: whatever MLflow meets.
        """
        state = read_state(folder)
        known = state if state.get("uri") == uri else {}
        tags = _tags(folder, summary) | ({"mlflow.parentRunId": parent} if parent else {})
        client, run, lost, status = mlflow_run.open_run(uri, experiment, folder, summary, tags, known.get("run", ""))
        copy = cls(client, run, uri, folder, known.get("sent", {}) if run == known.get("run") else {}, status)
        if not copy.sent and status != "FINISHED":
            copy._begin(recipe, summary)
        copy._note()
        copy._recall()
        return copy, lost

    def _begin(self, recipe: Mapping[str, Any], summary: Summary) -> None:
        """Everything that does not change."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        there = self.client.get_run(self.run).data.params  # which cannot be changed
        params = [Param(key, _cut(str(value), PARAMETER)) for key, value in recipe.items() if key not in there]
        for part in _parts(params, 100):
            self.client.log_batch(self.run, params=part)
        when = int(summary.started * 1000)
        points = []
        for cost in summary.costs:
            end = f"_w{cost.width}" if len(summary.costs) > 1 else ""
            points.append(Point(f"model/parameters{end}", cost.parameters, 0, when))
            points.append(Point(f"model/gmacs{end}", cost.macs / 1e9, 0, when))
            if cost.epochs is not None:
                points.append(Point(f"model/expected_epochs{end}", cost.epochs, 0, when))
        self._send(points)
        data = summary.data
        source = str(recipe.get("data.root") or "built in")
        profile = {"images": data.counts, "classes": data.classes, "image_size": data.image_size}
        digest = (data.fingerprint or data.name)[:36]
        self.client.log_inputs(
            self.run,
            [
                DatasetInput(
                    Dataset(data.name, digest, "local", json.dumps({"uri": source}), profile=json.dumps(profile)),
                    [InputTag("mlflow.data.context", "training")],
                )
            ],
        )
        self.client.log_artifact(self.run, str(self.folder / "recipe.toml"))

    # Points

    def send_metrics(self, upto: int) -> None:
        """Those of the first `upto` bytes of the run's metrics, and all that its hosts have measured of themselves."""
        self._send_file(self.folder / metrics.FILE, upto, "")
        for host, file in system.files(self.folder):
            self._send_file(file, file.stat().st_size, f"system/{host}/")

    def _send_file(self, file: Path, upto: int, prefix: str) -> None:
        start = self.sent.get(file.name, 0)
        if upto <= start or not file.exists():
            return
        with file.open("rb") as opened:
            opened.seek(start)
            # Without a line that is being written.
            rest = takewhile(lambda line: opened.tell() <= upto and line.endswith(b"\n"), iter(opened.readline, b""))
            while lines := list(islice(rest, BATCH // 10)):
                self._send([point for point in _points(lines, prefix) if self._changes(point)])
                start += sum(map(len, lines))
                self.sent[file.name] = start
                self._note()

    def _send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        for part in _parts([Metric(p.name, float(p.value), p.time, p.step) for p in points], BATCH):
            self.client.log_batch(self.run, metrics=part)

    def _changes(self, point: Point) -> bool:
        """Whether a point is to be sent: of what mostly never changes only where it does, and nothing while it is 0."""
        if not point.name.startswith(STEADY):
            return True
        before = self._steady.get(point.name)
        self._steady[point.name] = point
        return point.value != (before.value if before else 0.0)

    def _recall(self) -> None:
        """The last values that were sent of what mostly never changes."""
        sent = self.sent.get(metrics.FILE, 0)
        if sent:
            with (self.folder / metrics.FILE).open("rb") as file:
                file.seek(max(0, sent - (1 << 20)))
                lines = file.read(min(sent, 1 << 20)).splitlines()
            for point in _points(lines, ""):
                if point.name.startswith(STEADY):
                    self._steady[point.name] = point

    # The rest

    def artifact(self, path: Path) -> None:
        """A file, or a folder under its name."""
        if path.is_dir():
            self.client.log_artifacts(self.run, str(path), path.name)
        else:
            self.client.log_artifact(self.run, str(path))

    def tell(self, summary: Summary) -> None:
        """What is known of the run by now."""
        if summary.state == RUNNING:
            self.client.update_run(self.run, status="RUNNING")
        self.client.set_tag(self.run, "mlflow.note.content", _cut(described(summary), TAG))
        self.client.log_artifact(self.run, str(self.folder / "summary.json"))

    def end(self, state: str) -> None:
        self.client.set_terminated(self.run, STATUS[state])

    def _note(self) -> None:
        partial = self.folder / f"{STATE}.partial"
        partial.write_text(json.dumps({"uri": self.uri, "run": self.run, "sent": self.sent}) + "\n", "utf-8")
        partial.rename(self.folder / STATE)


@dataclass(frozen=True)
class Point:
    """One value of a metric. time: Unix time in ms."""

    name: str
    value: float
    step: int
    time: int


def _points(lines: Sequence[bytes], prefix: str) -> Iterator[Point]:
    for line in metrics.parsed(lines)[0]:
        step, when = line.pop("step"), int(line.pop("time") * 1000)
        yield from (Point(prefix + name, float(value), step, when) for name, value in line.items())


def send(uri: str, experiment: str, folder: Path, recipe: Mapping[str, Any], summary: Summary) -> bool:
    """Copy a finished run to MLflow; whether it was not there yet. See `Copy.open`."""
    copy, _ = Copy.open(uri, experiment, folder, recipe, summary)
    if copy.status == "FINISHED":
        return False
    copy.send_metrics((folder / metrics.FILE).stat().st_size)
    for path in artifacts(folder):
        copy.artifact(path)
    copy.tell(summary)
    copy.end(FINISHED)
    return True


def add(folder: Path, paths: Iterable[Path]) -> None:
    """Files or folders that were made of a run to its copy, where it has one; what fails is a warning."""
    state = read_state(folder)
    where = state.get("uri") or folder.parent / mlflow_run.FILE
    if not state or (not state["uri"] and not Path(where).exists()):  # untracked, or moved away from its database
        return
    try:
        client, _ = mlflow_run.connect(state["uri"], folder.parent)
        for path in paths:
            Copy(client, state["run"], state["uri"], folder, {}, "").artifact(path)
    except Exception as error:  # the files are there all the same
        warn(f"MLflow at {where} has not taken them: {first_line(error)}")


def artifacts(folder: Path) -> list[Path]:
    """The pictures, tables and exports of a run."""
    found = [*folder.glob("*.png"), *folder.glob("*.csv"), *folder.glob("*.txt"), *folder.glob("export-*")]
    return sorted(path for path in found if not path.name.startswith("log"))


def read_state(folder: Path) -> dict[str, Any]:
    """{"uri", "run", "sent"} of a run's copy; {} where there is none."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text("utf-8"))
    except (OSError, ValueError):  # half written when the disk was full: the run is found again by its tag
        return {}
    return state


def _tags(folder: Path, summary: Summary) -> dict[str, str]:
    tags = {
        mlflow_run.ID: summary.id,
        "mlflow.user": _user(),
        "mlflow.source.name": summary.recipe,
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": described(summary),
        "folder": str(folder.resolve()),
        "device": summary.device,
        "hosts": ", ".join(summary.hosts),
        "ranks": str(summary.ranks),
        "launcher": summary.launcher,
        **{f"version.{name}": number for name, number in summary.versions.items()},
        **{f"changed.{key}": str(value) for key, value in summary.changed.items()},
    }
    if summary.commit:
        tags |= {"mlflow.source.git.commit": summary.commit, "git.dirty": str(summary.dirty).lower()}
    return {name: _cut(value, TAG) for name, value in tags.items()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return ""


def described(summary: Summary) -> str:
    """A run in markdown: what it is and what it has reached."""
    data = summary.data
    devices = counted(summary.gpus, "GPU") if summary.gpus else counted(summary.cores, "core")
    lines = [
        f"**{summary.title}**, from `{summary.recipe}`: {data.name} at {data.image_size} px, "
        f"{counted(summary.epochs, 'epoch')} on {devices} ({summary.device}).",
        "",
    ]
    if summary.changed:
        keys = ", ".join(f"`{key} = {value}`" for key, value in summary.changed.items() if len(str(value)) < 60)
        lines += [f"Other than the defaults: {keys}", ""]
    test = {name: value for name, value in summary.metrics.items() if name.startswith(f"{data.test}/top1")}
    if summary.state == "finished" and test:
        lines += [f"| width | parameters | GMACs | expected epochs | top-1 on {data.test}, % |", f"|{' --- |' * 5}"]
        for cost in summary.costs:
            top1 = test.get(f"{data.test}/top1_w{cost.width}", test[f"{data.test}/top1"])
            size = f"{cost.parameters:,} | {cost.macs / 1e9:.4g}"
            epochs = "" if cost.epochs is None else f"{cost.epochs:.4g}"
            lines.append(f"| {cost.width} | {size} | {epochs} | {top1:.2f} |")
    elif summary.why:
        lines.append(f"{summary.state}: {summary.why}")
    return "\n".join(lines)


def _cut(value: str, most: int) -> str:
    """The whole is in an artifact."""
    return value if len(value) <= most else value[: most - 1] + "…"


def _parts(items: Sequence[Any], most: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), most):
        yield list(items[start : start + most])
