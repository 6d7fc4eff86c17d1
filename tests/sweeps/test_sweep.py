"""Real sweeps, through the launchers that a person uses: finished, killed in the middle, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

from hsvit_ds.run import metrics
from hsvit_ds.run import summary as summaries

from ..cluster.hosts import until
from ..ranks import environment
from .test_cells import HSVIT, SCALA

ONE_RANK = {"grid.submodule_ranks": 1}
SHORT = {"tracking.mlflow": False, "run.epochs": 1, "run.global_batch": 128}


def written(folder: Path, **values: Any) -> Path:
    path = folder / "my/study.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(tomli_w.dumps({"recipes": [HSVIT]} | values))
    return path


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """`hsvit sweep` of the folder's file; its runs lie there."""
    return subprocess.Popen(
        [sys.executable, "-m", "hsvit_ds.cli", "sweep", "my/study.toml", *options],
        cwd=folder,
        env=environment(COLUMNS="200"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(sweep: subprocess.Popen[str], code: int = 0) -> str:
    said = sweep.communicate(timeout=1800)[0]
    assert sweep.returncode == code, said
    return said


def folders(folder: Path) -> dict[str, Path]:
    """Of the runs, by name."""
    return {path.parent.name: path.parent for path in sorted(folder.glob("runs/my-study/*/recipe.toml"))}


def scores(folder: Path) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """What the evaluations of every run found, whatever the time."""
    found = {}
    for name, run in folders(folder).items():
        lines = [
            (line["step"], {k: v for k, v in line.items() if "val" in k or "test" in k}) for line in metrics.read(run)
        ]
        found[name] = [line for line in lines if line[1]]
    return found


def processes(folder: Path) -> list[psutil.Process]:
    """Of the folder's runs."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "hsvit_ds.train" in words and process.cwd() == str(folder):
            found.append(process)
    return found


@pytest.mark.slow
def test_two_keys_and_two_seeds_are_four_runs_side_by_side(tmp_path: Path) -> None:
    written(tmp_path, seeds=[0, 1], keys=SHORT | ONE_RANK, grid={"model.dropout": [0.0, 0.3]})
    jobs = min(2, len(os.sched_getaffinity(0)))
    said = finish(start(tmp_path, "--jobs", str(jobs)))
    names = [f"digits-hsvit,dropout={dropout},seed={seed}-001" for dropout in ("0", "0.3") for seed in (0, 1)]
    assert [*folders(tmp_path)] == names
    for run in folders(tmp_path).values():
        found = summaries.read(run)
        assert found is not None
        assert found.state == summaries.FINISHED
        assert f"{run.name} │ finished │ {found.metrics['test/top1']:.2f}" in " ".join(said.split())
    again = finish(start(tmp_path))
    assert "4 cells, 4 of them finished" in again
    assert "started" not in again


@pytest.mark.slow
@pytest.mark.marathon
def test_the_runs_of_two_recipes_have_one_mlflow(tmp_path: Path) -> None:
    written(tmp_path, recipes=[HSVIT, SCALA], seeds=[0], keys={"run.epochs": 1})
    said = finish(start(tmp_path))
    runs = folders(tmp_path)
    assert len(runs) == 2
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("hsvit-ds")
    assert experiment is not None
    there = {run.info.run_name.split()[0]: run for run in client.search_runs([experiment.experiment_id])}
    for name, run in runs.items():
        last = metrics.read(run)[-1]["test/top1"]
        assert f"{name} │ finished │ {last:.2f}" in " ".join(said.split())
        assert there[name].data.metrics["test/top1"] == pytest.approx(last)
        found = summaries.read(run)
        assert found is not None
        assert (found.ranks, found.launcher) == (2, "deepspeed")
        if name.startswith("digits-scala"):
            assert len([key for key in there[name].data.metrics if key.startswith("test/top1_w")]) == 7
            assert "widths-test.png" in {file.path for file in client.list_artifacts(there[name].info.run_id)}
    assert "hsvit compare runs/my-study" in said


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    killed_sweep(folder)
    finish(start(folder))
    return folder


def killed_sweep(folder: Path) -> Path:
    keys = {"tracking.mlflow": False, "run.epochs": 2, "run.log_every": 1, "checkpoint.every_steps": 5}
    return written(folder, keys=keys)


@pytest.mark.slow
@pytest.mark.parametrize("left", ["killed too", "alive"])
def test_a_sweep_that_is_killed_ends_with_the_same_metrics(left: str, uninterrupted: Path, tmp_path: Path) -> None:
    """With -9 and in the middle of a cell, whose two ranks are killed too, or go on by themselves."""
    killed_sweep(tmp_path)
    sweep = start(tmp_path)
    first = tmp_path / "runs/my-study/digits-hsvit-001"
    until(lambda: (first / "checkpoints/latest").exists() and len(metrics.read(first)) > 12, "some steps", 120)
    sweep.kill()
    sweep.wait()
    there = processes(tmp_path)
    assert len(there) >= 2
    if left == "killed too":
        for process in there:
            process.kill()
    said = finish(start(tmp_path))
    assert ("processes that were started before go on with it" in said) is (left == "alive")
    if left == "alive":
        assert (tmp_path / "runs/my-study/logs/digits-hsvit.log").read_text().count("parameters") == 1
    assert scores(tmp_path) == scores(uninterrupted)
    for name, run in folders(tmp_path).items():
        steps = [line["step"] for line in metrics.read(run) if "train/loss" in line]
        assert steps == [line["step"] for line in metrics.read(folders(uninterrupted)[name]) if "train/loss" in line]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_sweep_goes_on_where_it_was(uninterrupted: Path, tmp_path: Path) -> None:
    killed_sweep(tmp_path)
    sweep = start(tmp_path)
    first = tmp_path / "runs/my-study/digits-hsvit-001"
    until(lambda: (first / "metrics.jsonl").exists() and len(metrics.read(first)) > 12, "some steps", 120)
    sweep.send_signal(signal.SIGINT)
    said = finish(sweep, 75)
    assert "stopped; to go on:\n  hsvit sweep my/study.toml" in said
    found = summaries.read(first)
    assert found is not None
    assert found.state == summaries.STOPPED
    assert 12 < found.step < found.steps
    assert not processes(tmp_path)
    finish(start(tmp_path))
    assert f"resumed at step {found.step}" in (tmp_path / "runs/my-study/logs/digits-hsvit.log").read_text()
    assert scores(tmp_path) == scores(uninterrupted)


@pytest.mark.slow
def test_a_cell_that_diverges_stops_no_other(tmp_path: Path) -> None:
    keys = SHORT | ONE_RANK | {"engine.max_skipped_steps": 2}
    written(tmp_path, keys=keys, grid={"optimizer.lr": [1e30, 2e-3]})
    said = finish(start(tmp_path), 1)
    (line,) = [line for line in said.splitlines() if ": failed: " in line]
    assert line.startswith("digits-hsvit,lr=1e+30: failed: rank 0 on ")
    assert "had a non-finite gradient" in line
    assert "digits-hsvit,lr=0.002: finished" in said


@pytest.mark.slow
def test_how_long_a_sweep_will_take_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    written(tmp_path, recipes=[HSVIT, SCALA], seeds=[0, 1], keys={"run.epochs": 2})
    said = finish(start(tmp_path, "--dry-run"))
    assert "4 cells to train: about " in said
    assert "images/s), and its start" in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "my/study.toml"]
    assert not processes(tmp_path)
