"""MLflow gets the metrics of every run, whatever starts beside it, and whatever became of its run there."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.run import metrics, mlflow_copy, mlflow_run, system
from hsvit_ds.run import summary as summaries
from hsvit_ds.run.summary import Cost
from hsvit_ds.run.tracking import Config, Tracker

from ..ranks import environment
from ..summaries import summary

CONFIG = Config()
EPOCHS = {"0.50": 40 / 3, "1.00": 40.0}
STARTS = 5
START = """
import sys
import time
from pathlib import Path
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.run.tracking import Config, Tracker
from tests.summaries import summary
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
(folder / "recipe.toml").write_text("")
sys.stdin.readline()
begins = summary(id=folder.name, title=folder.name)
tracker = Tracker(Config(), folder, {"a": 1}, begins, Position(0, 0, 0, logged=0))
tracker.log({"train/loss": 1.0}, 1)
tracker.close("finished", seconds=200)
"""


def track(folder: Path, step: int, resume: bool = False, config: Config = CONFIG) -> str | None:
    """Track one step of a run; the id of its MLflow run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text("")
    file = folder / metrics.FILE
    start = Position(0, step - 1, step - 1, logged=file.stat().st_size if resume else 0)
    tracker = Tracker(config, folder, {"a": 1}, summary(id=f"of {folder.name}", title=folder.name), start)
    tracker.log({"train/loss": float(step)}, step)
    tracker.close("finished", seconds=100)
    return tracker.run_id()


def trained(run: Run) -> dict[str, float]:
    """Its metrics but those that say what it is."""
    return {name: value for name, value in run.data.metrics.items() if not name.startswith("model/")}


def client(root: Path) -> MlflowClient:
    return MlflowClient(mlflow_run.uri_of(root / "mlflow.db"))


def tracked(root: Path) -> dict[str, Run]:
    """{name: MLflow run} of all in the folder of all runs."""
    there = client(root)
    experiment = there.get_experiment_by_name("hsvit-ds")
    assert experiment is not None
    return {run.info.run_name: run for run in there.search_runs([experiment.experiment_id])}


@pytest.mark.slow
def test_runs_that_start_together_are_all_tracked(tmp_path: Path) -> None:
    names = [f"run-{number:03d}" for number in range(STARTS)]
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(tmp_path / name)],
            env=environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for name in names
    ]
    for start in starts:
        assert start.stdin is not None
        start.stdin.write("go\n")
        start.stdin.flush()
    output = "".join(start.communicate(timeout=280)[0] for start in starts)
    assert "hsvit: warning:" not in output
    found = tracked(tmp_path)
    assert {name: trained(found[name]) for name in names} == {name: {"train/loss": 1.0} for name in names}
    assert {run.info.status for run in found.values()} == {"FINISHED"}


@pytest.mark.parametrize("name", ["50% of it", "why?", "a%20b", "q?a=b#c", "ü"])
def test_a_folder_of_any_name_has_its_own_database(name: str, tmp_path: Path) -> None:
    run = track(tmp_path / name / "run-001", 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {path.name for path in (tmp_path / name).iterdir()} == {
        "mlflow.db",
        "mlflow.db.lock",
        "artifacts",
        "run-001",
    }
    assert len(list((tmp_path / name / "artifacts").rglob("recipe.toml"))) == 1
    assert tracked(tmp_path / name)["run-001"].info.run_id == run


def test_a_run_that_was_killed_while_it_made_the_database_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db.partial").write_bytes(b"half of it")
    track(tmp_path / "run-001", 1)
    assert list(tracked(tmp_path)) == ["run-001"]


def test_a_half_migrated_database_is_named_with_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track(tmp_path / "run-001", 1)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        # As after a migration that was cut off: tables of later ones are missing, changes of this one are there.
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        database.execute("DROP TABLE trace_info")
    database.close()
    file = tmp_path / "mlflow.db"
    broken = tmp_path / "other" / "mlflow.db"
    broken.parent.mkdir()
    shutil.move(file, broken)  # MLflow keeps connections to a file that it has opened
    capsys.readouterr()
    assert track(broken.parent / "run-001", 1) is None
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hsvit: warning:")]
    assert f"MLflow at {broken} is not usable, metrics.jsonl has everything: {broken} is half-migrated (" in warning
    assert f"move it away (mv {broken} {broken}.broken)" in warning
    assert json.loads((broken.parent / "run-001/metrics.jsonl").read_text())["train/loss"] == 1.0


def test_an_experiment_that_another_run_makes_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    track(tmp_path / "run-001", 1)
    look, answers = MlflowClient.get_experiment_by_name, [None]

    def not_yet(self: MlflowClient, name: str) -> Any:
        return answers.pop() if answers else look(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", not_yet)
    track(tmp_path / "run-002", 1)
    assert not answers
    assert set(tracked(tmp_path)) == {"run-001", "run-002"}


def test_a_resumed_run_goes_on_in_its_mlflow_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = track(tmp_path / "run-001", 1)
    assert track(tmp_path / "run-001", 2, resume=True) == first
    assert "hsvit: warning:" not in capsys.readouterr().err
    history = client(tmp_path).get_metric_history(str(first), "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("fate", ["moved", "deleted"])
def test_a_resumed_run_whose_mlflow_run_is_gone_has_a_new_one(
    fate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "first"
    before = str(track(root / "run-001", 1))
    if fate == "deleted":
        client(root).delete_run(before)
    else:
        root = tmp_path / "second"
        root.mkdir()
        shutil.move(tmp_path / "first/run-001", root)
    after = track(root / "run-001", 2, resume=True)
    assert after != before
    warning = f"hsvit: warning: MLflow at {root}/mlflow.db has no run {before}, "
    assert warning in capsys.readouterr().err
    run = tracked(root)["run-001"]
    assert (run.info.run_id, run.info.status, trained(run)) == (after, "FINISHED", {"train/loss": 2.0})


def test_a_deleted_experiment_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track(tmp_path / "run-001", 1)
    there = client(tmp_path)
    experiment = there.get_experiment_by_name("hsvit-ds")
    assert experiment is not None
    there.delete_experiment(experiment.experiment_id)
    track(tmp_path / "run-002", 1)
    assert 'experiment "hsvit-ds" was deleted there: restore it, or set tracking.experiment' in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_valid_json_with_a_flag_and_are_read_back(tmp_path: Path) -> None:
    tracker = Tracker(Config(mlflow=False), tmp_path, {}, summary(), Position(0, 0, 0, logged=0))
    tracker.log({"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/lr": 0.5}, 3)
    tracker.close("finished")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / metrics.FILE).read_text(), parse_constant=refuse)
    assert (line["train/loss"], line["train/grad_norm"], line["train/lr"]) == (None, None, 0.5)
    assert line["not_finite"] == {"train/loss": "nan", "train/grad_norm": "inf"}
    (read,) = metrics.read(tmp_path)
    assert math.isnan(read["train/loss"])
    assert read["train/grad_norm"] == math.inf
    assert "not_finite" not in read


def test_what_is_made_of_a_run_later_is_an_artifact_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs/run-001"
    run = track(folder, 1)
    export = folder / "export-0.50"
    export.mkdir()
    (export / "model.safetensors").write_bytes(b"weights")
    (folder / "widths.png").write_bytes(b"a picture")
    mlflow_copy.add(folder, [folder / "widths.png", export])
    there = client(tmp_path / "runs")
    names = {file.path for path in ("", "export-0.50") for file in there.list_artifacts(str(run), path)}
    assert {"widths.png", "export-0.50/model.safetensors", "summary.json", "recipe.toml"} <= names
    assert "hsvit: " not in capsys.readouterr().err
    shutil.move(folder, tmp_path / "run-001")
    mlflow_copy.add(tmp_path / "run-001", [export])  # away from its database: no other is made
    assert not (tmp_path / mlflow_run.FILE).exists()
    mlflow_copy.add(tmp_path, [export])  # no run, or an untracked one
    assert "hsvit: " not in capsys.readouterr().err
    state = json.loads((tmp_path / "run-001" / mlflow_copy.STATE).read_text())
    (tmp_path / "run-001" / mlflow_copy.STATE).write_text(json.dumps(state | {"uri": "sqlite:////nowhere/mlflow.db"}))
    mlflow_copy.add(tmp_path / "run-001", [export])
    assert "MLflow at sqlite:////nowhere/mlflow.db has not taken them: " in capsys.readouterr().err


def test_the_expected_epochs_of_each_width_are_in_mlflow_where_the_summary_has_them(tmp_path: Path) -> None:
    """One of an older version has none, and is read."""
    costs = tuple(Cost(width=width, parameters=10, macs=20, epochs=epochs) for width, epochs in EPOCHS.items())
    begins = summary(costs=costs, state="finished", metrics={"test/top1": 90.0, "test/top1_w0.50": 80.0})
    for name in ("new", "old"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.toml").write_text("")
        (folder / metrics.FILE).write_text("")
        replace(begins, id=name, title=name).write(folder)
        if name == "old":
            table = json.loads((folder / summaries.FILE).read_text())
            for cost in table["costs"]:
                del cost["epochs"]
            (folder / summaries.FILE).write_text(json.dumps(table))
        found = summaries.read(folder)
        assert found is not None
        assert {cost.width: cost.epochs for cost in found.costs} == (EPOCHS if name == "new" else dict.fromkeys(EPOCHS))
        assert mlflow_copy.send("", "hsvit-ds", folder, {}, found)
    new, old = (tracked(tmp_path)[name].data for name in ("new", "old"))
    ours = {f"model/expected_epochs_w{width}": epochs for width, epochs in EPOCHS.items()}
    assert ours.items() <= new.metrics.items()
    assert old.metrics.keys() == new.metrics.keys() - ours.keys() != set()
    assert "| 0.50 | 10 | 2e-08 | 13.33 | 80.00 |" in new.tags["mlflow.note.content"]
    assert "| 0.50 | 10 | 2e-08 |  | 80.00 |" in old.tags["mlflow.note.content"]


def test_a_resumed_run_goes_on_with_its_summary(tmp_path: Path) -> None:
    folder = tmp_path / "run-001"
    folder.mkdir()
    config = Config(mlflow=False)
    first = Tracker(config, folder, {}, summary(id="first"), Position(0, 0, 0, logged=0))
    first.log({"val/top1": 50.0, "train/loss": 1.0}, 1)
    saved = Position(0, 1, 1, logged=first.size())
    first.log({"val/top1": 90.0, "train/loss": 0.1}, 2)  # and then it is killed
    first._write()
    again = Tracker(config, folder, {}, summary(id="second"), saved)
    assert (again.summary.id, again.summary.metrics["train/loss"]) == ("first", 1.0)
    assert again.summary.best["val/top1"].value == 50.0
    again.log({"val/top1": 60.0}, 2)
    again.close("stopped", "asked to")
    read = summaries.read(folder)
    assert read is not None
    assert (read.state, read.why, read.step, read.best["val/top1"].step) == ("stopped", "asked to", 2, 2)
    assert [line["val/top1"] for line in metrics.read(folder)] == [50.0, 60.0]
    assert read.seconds > 0


@pytest.mark.parametrize("step", [10, 25, 40, 59])
def test_a_summary_of_an_earlier_step_is_what_it_was(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much is read at a time; with a metric that comes late, one that is not finite, abandoned widths."""
    monkeypatch.setattr(metrics, "BLOCK", 300)
    whole = summary(id="first")
    folder, config = tmp_path / "run-001", Config(mlflow=False)
    folder.mkdir()
    tracker, expected, saved = Tracker(config, folder, {}, whole, Position(0, 0, 0, logged=0)), whole, None
    for at in range(1, 61):
        found = {"train/loss": 1 / at, "perf/late": 1.0} if at > 30 else {"train/loss": 1 / at}
        if at % 10 == 0:
            top1 = 90.0 - at if at < 40 else 70.0 + at
            found |= {"val/top1": top1, "val/loss": math.nan if at == 20 else 1.0}
            found |= {f"val/top1_w{width}": top1 for width in (["0.25", "0.50"] if at < 30 else ["0.50"])}
        tracker.log(found, at)
        if at == step:
            expected, saved = tracker.summary, Position(0, at, at, logged=tracker.size())
    tracker._write()
    again = Tracker(config, folder, {}, summary(id="second"), saved)  # type: ignore[arg-type]
    assert again.summary.metrics == expected.metrics
    assert again.summary.best == expected.best


def test_a_resume_reads_the_end_of_the_metrics_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = tmp_path / "run-001", Config(mlflow=False)
    folder.mkdir()
    tracker = Tracker(config, folder, {}, summary(), Position(0, 0, 0, logged=0))
    for step in range(1, 20_001):
        tracker.log({"train/loss": 1 / step} | ({"val/top1": 50.0} if step % 1000 == 0 else {}), step)
        if step == 19_500:
            saved = Position(0, step, step, logged=tracker.size())
    tracker._write()
    size, read = (folder / metrics.FILE).stat().st_size, list[int]()
    parsed = metrics.parsed

    def counted(lines: Any) -> Any:
        given = list(lines)
        read.append(sum(map(len, given)))
        return parsed(given)

    monkeypatch.setattr(metrics, "BLOCK", 1 << 14)
    monkeypatch.setattr(metrics, "parsed", counted)
    again = Tracker(config, folder, {}, summary(), saved)
    assert again.summary.metrics == {"train/loss": 1 / 19_500, "val/top1": 50.0}
    assert sum(read) < size / 10


@pytest.mark.parametrize("keep", ["all", "more than there is"])
def test_a_line_that_was_cut_off_is_forgotten_at_a_resume(keep: str, tmp_path: Path) -> None:
    whole = b'{"step": 1, "time": 1.0, "train/loss": 2.0}\n'
    (tmp_path / metrics.FILE).write_bytes(whole + b'{"step": 2, "ti')
    lines = metrics.Lines(tmp_path, 10**6 if keep != "all" else len(whole) + 15)
    lines.log({"train/loss": 1.0}, 2, 2.0)
    lines.close()
    assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2]


def test_a_checkpoint_of_an_older_version_keeps_the_lines_of_its_steps(tmp_path: Path) -> None:
    text = "".join(json.dumps({"step": step, "time": 0.0, "train/loss": 1.0}) + "\n" for step in (1, 2, 2, 3))
    (tmp_path / metrics.FILE).write_text(text)
    Tracker(Config(mlflow=False), tmp_path, {}, summary(), Position(0, 2, 2)).close("finished")
    assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2, 2]


def test_a_run_is_seen_to_go_on_while_its_lock_is_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not summaries.is_held(tmp_path)
    with summaries.held(tmp_path):
        assert summaries.is_held(tmp_path)
        with summaries.held(tmp_path):
            assert "another process holds its lock" in capsys.readouterr().err
    assert not summaries.is_held(tmp_path)


def test_a_host_is_measured_into_a_file_that_mlflow_has_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "INTERVAL", 0.05)
    folder = tmp_path / "run-001"
    folder.mkdir()
    with system.watched(folder):
        while not system.files(folder) or len(system.files(folder)[0][1].read_bytes().splitlines()) < 3:
            time.sleep(0.05)
    ((host, _),) = system.files(folder)
    run = track(folder, 1)
    points = client(tmp_path).get_metric_history(str(run), f"system/{host}/cpu_utilization_percentage")
    assert [point.step for point in points][:3] == [0, 1, 2]
