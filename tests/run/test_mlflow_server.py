"""A real MLflow server has every step of a run once, whatever becomes of the server and of the run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.run import metrics, mlflow_copy
from hsvit_ds.run import summary as summaries
from hsvit_ds.run.tracking import Config, Tracker

from ..mlflow_server import Server, served
from ..ranks import ROOT, environment
from ..summaries import summary

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("server")) as started:
        yield started


def the_run(server: Server, folder: Path) -> Run:
    """The one MLflow run of a run in a folder."""
    client, known = MlflowClient(server.uri), summaries.read(folder)
    experiment = client.get_experiment_by_name("hsvit-ds")
    assert experiment is not None
    assert known is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`hsvit.run` = '{known.id}'")
    return run


def history(server: Server, folder: Path, name: str) -> list[tuple[int, float]]:
    points = MlflowClient(server.uri).get_metric_history(the_run(server, folder).info.run_id, name)
    return [(point.step, point.value) for point in points]


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics.read(folder) if name in line]


def tracker(folder: Path, uri: str, start: Position) -> Tracker:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text("")
    return Tracker(Config(uri=uri), folder, {"a": 1}, summary(id=folder.parent.name), start)


@pytest.mark.slow
def test_a_server_that_was_away_is_caught_up_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with served(tmp_path) as server:
        run = tracker(folder, server.uri, Position(0, 0, 0, logged=0))
        run.log({"train/loss": 1.0}, 1)
        run.covered(Position(0, 1, 1, logged=run.size()))
        while run.run_id() is None:
            time.sleep(0.1)
        server.kill()
        for step in (2, 3):
            run.log({"train/loss": 1.0 / step}, step)
            run.covered(Position(0, step, step, logged=run.size()))
        while "is away" not in capsys.readouterr().err:
            time.sleep(0.1)
        server.start()
        run.log({"train/loss": 0.25}, 4)
        run.close("finished", seconds=100)
        assert history(server, folder, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
        assert the_run(server, folder).info.status == "FINISHED"


def test_only_what_a_checkpoint_covers_is_sent_and_never_twice(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "run"
    run = tracker(folder, server.uri, Position(0, 0, 0, logged=0))
    run.log({"train/loss": 1.0}, 1)
    saved = Position(0, 1, 1, logged=run.size())
    run.covered(saved)
    run.log({"train/loss": 7.0}, 2)  # and then the run is killed
    while not (folder / mlflow_copy.STATE).exists() or not mlflow_copy.read_state(folder)["sent"]:
        time.sleep(0.1)
    state = mlflow_copy.read_state(folder)
    # Killed between the request and the note of it:
    (folder / mlflow_copy.STATE).write_text(json.dumps(state | {"sent": {}}))
    run = tracker(folder, server.uri, saved)
    run.log({"train/loss": 0.5}, 2)
    run.close("finished", seconds=100)
    assert history(server, folder, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert the_run(server, folder).data.tags["hsvit.run"] == tmp_path.name


def test_what_never_changes_is_no_curve(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "run"
    run = tracker(folder, server.uri, Position(0, 0, 0, logged=0))
    for step, bad in enumerate((0, 0, 2, 2), 1):
        run.log({"comm/gradient_bytes": 0.0, "comm/exchange_bytes": 4096.0, "data/bad_samples": float(bad)}, step)
    run.close("finished", seconds=100)
    assert "comm/gradient_bytes" not in the_run(server, folder).data.metrics
    assert history(server, folder, "comm/exchange_bytes") == [(1, 4096.0)]
    assert history(server, folder, "data/bad_samples") == [(3, 2.0)]


def test_a_finished_run_is_sent_once(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "run"
    run = tracker(folder, "", Position(0, 0, 0, logged=0))
    for step in (1, 2):
        run.log({"train/loss": 1.0 / step}, step)
    run.close("finished", seconds=100)
    (folder / "curves.png").write_bytes(b"a picture")
    ended = summaries.read(folder)
    assert ended is not None
    assert mlflow_copy.send(server.uri, "hsvit-ds", folder, {"a": "x" * 9000}, ended)
    assert not mlflow_copy.send(server.uri, "hsvit-ds", folder, {"a": 1}, ended)
    (folder / mlflow_copy.STATE).unlink()
    assert not mlflow_copy.send(server.uri, "hsvit-ds", folder, {"a": 1}, ended)
    found, client = the_run(server, folder), MlflowClient(server.uri)
    assert history(server, folder, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert (found.info.status, len(found.data.params["a"])) == ("FINISHED", 6000)
    there = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"curves.png", "recipe.toml", "summary.json"} <= there
    (dataset,) = found.inputs.dataset_inputs
    assert (dataset.dataset.name, json.loads(dataset.dataset.profile)["images"]["train"]) == ("digits", 1150)
    assert found.data.metrics["model/parameters"] == 812_298
    assert found.data.tags["changed.model.variant"] == "C2A2"
    assert found.data.tags["version.python"] == "3.11.0"


# Real runs

ARGUMENTS = ["recipes/digits/hsvit.toml", "grid.submodule_ranks=1", "run.log_every=1", "checkpoint.every_steps=5"]


def train(folder: Path, server: Server, *overrides: str) -> subprocess.Popen[str]:
    arguments = [*ARGUMENTS, *overrides, f"tracking.uri={server.uri}", "--run", str(folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "hsvit_ds.train", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps(folder: Path) -> int:
    file = folder / metrics.FILE
    return len(metrics.read(folder)) if file.exists() else 0


def until(folder: Path, step: int, run: subprocess.Popen[str]) -> None:
    while steps(folder) < step:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.2)


def every_step_is_there_once(server: Server, folder: Path) -> None:
    assert the_run(server, folder).info.status == "FINISHED"
    names = {name for line in metrics.read(folder) for name in line}
    for name in names - {"step", "time"}:
        if not name.startswith(mlflow_copy.STEADY):
            assert history(server, folder, name) == logged(folder, name), name


def log_of(run: subprocess.Popen[str]) -> str:
    return run.communicate(timeout=900)[0]


@pytest.mark.slow
@pytest.mark.marathon
def test_a_server_killed_for_a_minute_has_every_step_of_a_run_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with served(tmp_path) as server:
        run = train(folder, server, "run.epochs=14")
        until(folder, 20, run)
        server.kill()
        began = time.monotonic()
        while time.monotonic() - began < 60:
            assert run.poll() is None, "the run is too short for this test"
            time.sleep(1)
        server.start()
        output = log_of(run)
        assert run.returncode == 0, output
        assert output.count("is away; what it misses is sent when it is back") == 1
        assert output.count(f"MLflow at {server.uri} is back") == 1
        every_step_is_there_once(server, folder)


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_has_every_step_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with served(tmp_path) as server:
        run = train(folder, server, "run.epochs=2")
        until(folder, 43, run)
        run.send_signal(signal.SIGKILL)
        log_of(run)
        sent: Any = mlflow_copy.read_state(folder)["sent"]
        assert sent[metrics.FILE] > 0
        run = train(folder, server, "run.epochs=2")
        output = log_of(run)
        assert run.returncode == 0, output
        every_step_is_there_once(server, folder)
