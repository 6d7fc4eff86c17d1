"""Every run is found by what a person calls it and in the state that it is in; a broken one hides no other."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hsvit_ds.errors import RefusedError
from hsvit_ds.results import history, records, rows
from hsvit_ds.run.summary import held

from .made import points, run


def append(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(text)

    return change


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def half_a_cache(folder: Path) -> None:
    history.read(folder)
    data = (folder / history.CACHE).read_bytes()
    (folder / history.CACHE).write_bytes(data[: len(data) // 2])


def no_more_than_checkpoints(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    for name in ("metrics.jsonl", "summary.json", "lock"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (append('{"step": 51, "ti'), "metrics.jsonl: 1 line cannot be read (16)"),
        (append("[1]\nnull\n"), "metrics.jsonl: 2 lines cannot be read (16, 17)"),
        (append('{"step": 51, "time": 1, "train/loss": "low"}\n'), "metrics.jsonl: cannot be read (could not convert"),
        (remove("metrics.jsonl"), "has no metrics.jsonl"),
        (no_more_than_checkpoints, "has no metrics.jsonl"),
        (write("summary.json", "{"), "summary.json: cannot be read (Expecting"),
        (write("summary.json", "{}"), "summary.json: cannot be read (no summary of a run"),
        (write("summary.json", "[]"), "summary.json: cannot be read (no summary of a run"),
        (write("recipe.toml", "= 1"), "recipe.toml: cannot be read"),
        (remove("recipe.toml"), "recipe.toml: is not there"),
        (write("metrics.jsonl", ""), ""),
        (remove("summary.json"), ""),
        (write("metrics.cache.npz", ""), ""),
        (half_a_cache, ""),
    ],
)
def test_a_broken_run_is_listed_and_said_once_and_hides_no_other(
    breaks: Callable[[Path], object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "good-001", points(10, 90.0))
    breaks(run(tmp_path / "broken-001", points(5, 80.0), state="running"))
    found = {record.name: record for record in records.in_folder(tmp_path)}
    listed = {name: rows.of(record) for name, record in found.items()}
    assert listed.keys() == {"good-001", "broken-001"}
    assert listed["good-001"].values["best"] == 90.0
    assert listed["broken-001"].values["state"] == "gone"
    told = capsys.readouterr().err
    assert told.count(f"{tmp_path / 'broken-001'}") == (1 if said else 0)
    assert said in told


def test_artifacts_are_no_run(tmp_path: Path) -> None:
    run(tmp_path / "a-001", points(2, 80.0))
    artifacts = tmp_path / "artifacts" / "0" / "artifacts"
    artifacts.mkdir(parents=True)
    for name in ("recipe.toml", "summary.json"):
        (artifacts / name).write_bytes((tmp_path / "a-001" / name).read_bytes())
    assert [record.name for record in records.in_folder(tmp_path)] == ["a-001"]


def test_lost_lines_are_said_once_however_often_they_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "a-001", points(2, 80.0))
    append('{"step": 51, "ti')(folder)
    record = records.of_folder(folder)
    assert record.read().lost == record.read().lost == (7,)
    assert capsys.readouterr().err.count("cannot be read") == 1


def test_what_remains_of_a_broken_run_is_told(tmp_path: Path) -> None:
    folder = run(tmp_path / "a-001", points(5, 80.0), state="running")
    append('{"step": 51, "ti')(folder)
    (folder / "summary.json").write_text("{")
    values = rows.of(records.of_folder(folder)).values
    assert (values["best"], values["best_step"], values["top1"], values["step"]) == (80.0, 40, 79.0, 50)
    assert values["epochs"] == 10
    assert values["epoch"] is None


def test_a_folder_that_cannot_be_read_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "good-001", points(1, 90.0))
    run(tmp_path / "locked-001", points(1, 90.0))
    run(tmp_path / "sweep" / "b-001", points(1, 90.0))
    real_run, real_list = records.is_run, Path.iterdir

    def is_run(folder: Path) -> bool:
        if folder.name == "locked-001":
            raise PermissionError(13, "Permission denied")
        return real_run(folder)

    def iterdir(folder: Path) -> object:
        if folder.name == "sweep":
            raise PermissionError(13, "Permission denied")
        return real_list(folder)

    monkeypatch.setattr(records, "is_run", is_run)
    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert [record.name for record in records.in_folder(tmp_path)] == ["good-001"]
    told = capsys.readouterr().err
    assert f"{tmp_path / 'locked-001'}: cannot be read (Permission denied)" in told
    assert f"{tmp_path / 'sweep'}: cannot be listed (Permission denied)" in told


def test_the_state_of_a_run_is_told_with_why(tmp_path: Path) -> None:
    run(tmp_path / "finished-001", points(10, 90.0))
    run(tmp_path / "stopped-001", points(1, 90.0), state="stopped", why="SIGTERM")
    run(tmp_path / "failed-001", points(1, 90.0), state="failed", why="lost", error="KeyError: 'x'")
    run(tmp_path / "killed-001", points(1, 90.0), state="running")
    running = run(tmp_path / "running-001", points(1, 90.0), state="running")
    with held(running):
        found = {record.name: (record.state, record.why) for record in records.in_folder(tmp_path)}
    assert found == {
        "finished-001": ("finished", ""),
        "stopped-001": ("stopped", "SIGTERM"),
        "failed-001": ("failed", "rank 1 on node17: KeyError: 'x'"),
        "killed-001": ("gone", ""),
        "running-001": ("running", ""),
    }


def test_the_best_of_a_run_that_goes_on_is_that_of_its_points(tmp_path: Path) -> None:
    """MLflow's copy of a summary may be older than its points."""
    record = records.of_folder(run(tmp_path / "a-001", points(3, 90.0)))
    assert record.summary is not None
    old = replace(record, summary=replace(record.summary, best={}))
    assert rows.of(replace(old, state="running")).values["best"] == 90.0
    assert rows.of(old).values["best"] is None


def test_runs_are_found_by_what_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a-001", "a-002", "b-001", "sweep/c-001", "sweep/c-002"]
    for age, name in enumerate(names):
        folder = run(Path("runs") / name, points(1, 90.0))
        for file in ("metrics.jsonl", "summary.json"):
            os.utime(folder / file, (1e9 - age, 1e9 - age))
    run(Path("elsewhere/d-001"), points(1, 90.0))

    def find(*names: str, root: str = "runs") -> list[str]:
        return [record.name for record in records.find(list(names), root)]

    assert find("b-001", "a-001") == ["b-001", "a-001"]
    assert find("runs/b-001") == find("./runs/b-001/") == find(str(tmp_path / "runs/b-001")) == ["b-001"]
    assert find("runs") == names
    assert find("a-*") == find("runs/a-*") == ["a-001", "a-002"]
    assert find("sweep") == find("sweep/") == ["sweep/c-001", "sweep/c-002"]
    assert find("*/c-00[2]") == ["sweep/c-002"]
    assert find("id-of-a-002") == ["a-002"]
    assert find("elsewhere/d-001", root="no such folder") == ["d-001"]
    assert find("a-002", "runs/a-002", "a-*", "id-of-a-001") == ["a-002", "a-001"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a-01", "a-01: no run is called so in runs; near: a-001"),
        ("z*", "z*: no run is called so in runs; near: a-001"),
        ("empty", "empty: no run is there"),
    ],
)
def test_an_unknown_run_is_refused_with_the_nearest(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("runs/a-001"), points(1, 90.0))
    Path("empty").mkdir()
    with pytest.raises(RefusedError) as refused:
        records.find([name], "runs")
    assert said in str(refused.value)


def test_a_folder_of_runs_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="gone: no such folder"):
        records.all_in(str(tmp_path / "gone"))
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(RefusedError, match=r"--runs sqlite:///.*mlflow\.db"):
        records.all_in(str(tmp_path / "mlflow.db"))


def test_what_is_cached_is_what_was_logged(tmp_path: Path) -> None:
    folder = run(tmp_path / "a-001", points(3, 80.0))
    first, second = history.read(folder), history.read(folder)
    assert first.curves.keys() == second.curves.keys() == {"train/loss", "perf/images_per_sec", "val/top1", "val/loss"}
    for name, curve in first.curves.items():
        expected = [(line["step"], line[name]) for line in points(3, 80.0) if name in line]
        for read in (curve, second.curves[name]):
            assert np.array_equal(np.stack([read.steps, read.values], 1), np.array(expected))
