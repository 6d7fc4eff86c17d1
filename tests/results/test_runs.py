"""`hsvit runs` shows every run, in any width of terminal, and those alone that its filters hold of."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hsvit_ds.cli import app
from hsvit_ds.run.summary import held

from ..ranks import ROOT, environment
from .made import points, run

WIDTHS = ("0.25", "0.50", "0.75", "1.00")
SCALA = "recipes/digits/scala.toml"


def result(top1: float, widths: tuple[str, ...] = ()) -> dict[str, float]:
    return {"step": 100, "test/top1": top1} | {f"test/top1_w{width}": top1 - 10 + 10 * float(width) for width in widths}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of runs of every kind, the first one the newest."""
    root = tmp_path_factory.mktemp("runs")
    scala = {"task.kind": "scala", "model.depth": 4}
    run(root / "digits-scala-002", points(3, 91.7, WIDTHS), scala, state="running", widths=WIDTHS, file=SCALA)
    run(root / "digits-scala-001", [*points(10, 96.75, WIDTHS), result(95.5, WIDTHS)], scala, widths=WIDTHS, file=SCALA)
    run(root / "digits-hsvit-001", [*points(10, 94.2), result(93.76123)])
    run(root / "digits-hsvit-002", points(2, 90.2), {"run.seed": 1}, state="stopped", why="SIGTERM")
    error = "step 21: backward: RuntimeError: CUDA out of memory, 3.2 GiB wanted"
    run(root / "sweep/lr=0.01-001", points(2, 88.7), {"optimizer.lr": 0.01}, state="failed", error=error)
    run(root / "photos-001", points(10, 71.2, val="dev"), {"data.val": "dev", "data.test": "dev"})
    run(root / "old-001", points(4, 60.0), has_summary=False)
    run(root / "empty-001", [], has_summary=False)
    names = [
        *("digits-scala-002", "digits-scala-001", "digits-hsvit-001", "digits-hsvit-002"),
        *("sweep/lr=0.01-001", "photos-001", "old-001", "empty-001"),
    ]
    for age, name in enumerate(names):
        for file in ("metrics.jsonl", "summary.json"):
            if (root / name / file).exists():
                os.utime(root / name / file, (1.79e9 - 4000 * age, 1.79e9 - 4000 * age))
    return root


def hsvit(root: Path, *arguments: str, **env: str) -> Result:
    return CliRunner().invoke(app, ["runs", "--runs", str(root), *arguments], env=env)


def listed(root: Path, *arguments: str) -> list[dict[str, Any]]:
    done = hsvit(root, *arguments, "--format", "json")
    assert done.exit_code == 0, done.output
    return list(json.loads(done.stdout))


def screen(root: Path, columns: int, *arguments: str) -> list[str]:
    """The lines of a terminal so wide."""
    done = hsvit(root, *arguments, FORCE_COLOR="1", NO_COLOR="1", TERM="xterm", COLUMNS=str(columns))
    assert done.exit_code == 0, done.output
    return [line.replace("\x1b[1m", "").replace("\x1b[0m", "").rstrip() for line in done.stdout.splitlines()]


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


def test_json_has_every_column_and_what_was_measured_as_it_was(root: Path) -> None:
    found = {row["name"]: row for row in listed(root)}
    assert names(listed(root))[0] == "digits-scala-002"
    whole = found["digits-hsvit-001"]
    assert whole | {"age": 0, "touched": 0, "where": ""} == {
        **dict.fromkeys(f"{name}_w{width}" for name in ("best", "top1") for width in WIDTHS),
        "name": "digits-hsvit-001",
        "title": "digits-hsvit-001",
        "recipe": "recipes/digits/hsvit.toml",
        "state": "finished",
        "why": None,
        "epoch": 10.0,
        "epochs": 10,
        "step": 100,
        "steps": 100,
        "best": 94.2,
        "best_split": "val",
        "best_step": 90,
        "top1": 93.76123,
        "top1_split": "test",
        "images_per_sec": 1100.0,
        "seconds": 100.0,
        "age": 0,
        "touched": 0,
        "where": "",
        "id": "id-of-digits-hsvit-001",
    }
    assert all(row.keys() == whole.keys() for row in found.values())
    slim = found["digits-scala-001"]
    assert [slim[f"top1_w{width}"] for width in WIDTHS] == [result(95.5, WIDTHS)[f"test/top1_w{w}"] for w in WIDTHS]
    old, empty = found["old-001"], found["empty-001"]
    assert (old["best"], old["top1"], old["epoch"], old["epochs"], old["recipe"]) == (60.0, 59.0, None, 10, None)
    assert (empty["best"], empty["top1"], empty["top1_split"], empty["step"]) == (None, None, None, 0)


def test_csv_has_what_json_has(root: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(hsvit(root, "--format", "csv").stdout)))
    for row, expected in zip(rows, listed(root), strict=True):
        expected["age"] = row["age"]
        assert row == {name: "" if value is None else str(value) for name, value in expected.items()}


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        (["state=failed"], ["sweep/lr=0.01-001"]),
        (["state!=finished", "name=digits-*"], ["digits-scala-002", "digits-hsvit-002"]),
        (["name=digits-[h]*"], ["digits-hsvit-001", "digits-hsvit-002"]),
        (["model.depth=4"], ["digits-scala-002", "digits-scala-001"]),
        (["depth=4", "epoch>=4"], ["digits-scala-001"]),
        (["depth==4", "epoch<4"], ["digits-scala-002"]),
        (["top1>93"], ["digits-scala-001", "digits-hsvit-001"]),
        (["top1<=59"], ["old-001"]),
        (["top1_w0.50>90"], ["digits-scala-001"]),
        (["best=71.2"], ["photos-001"]),
        (["train/loss<0.03"], ["digits-scala-001", "digits-hsvit-001", "photos-001"]),
        (["val/top1>95"], ["digits-scala-001"]),
        (["lr=1e-2"], ["sweep/lr=0.01-001"]),
        (["seed=1"], ["digits-hsvit-002"]),
        (["kernels=[64, 128]", "isolated=true", "task.kind=scala"], ["digits-scala-002", "digits-scala-001"]),
        (["isolated=1"], []),
        (["recipe=digits/scala"], ["digits-scala-002", "digits-scala-001"]),
        (["recipe=recipes/digits/scala.toml", "state=gone"], ["digits-scala-002"]),
        (["why=*out of memory*"], ["sweep/lr=0.01-001"]),
        (["top1_split=dev"], ["photos-001"]),
        (["val/loss!=1.0"], ["empty-001", "photos-001"]),  # which never had it
        (["age>0s", "age>1d", "state=failed", "age<100000d"], ["sweep/lr=0.01-001"]),
    ],
)
def test_runs_are_listed_that_all_filters_hold_of(root: Path, filters: list[str], left: list[str]) -> None:
    assert sorted(names(listed(root, *filters))) == sorted(left)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["depht=2"], 'filter "depht=2": no run here has depht; near: model.depth'),
        (["train/los<1"], "near: train/loss"),
        (["zzzz=1"], "no run here has zzzz; there are age, best, "),
        (["loss<1"], "loss may be dev/loss or train/loss or val/loss; name one whole"),
        (["kind=scala"], "kind may be model.kind or task.kind"),
        (["state<3"], "no number; use = or !="),
        (["top1>high"], 'filter "top1>high": high is no number'),
        (["age<2weeks"], "2weeks is no number, as in age<2h"),
        (["depth"], 'filter "depth": must be key=value'),
        (["=2"], "must be key=value"),
        (["--sort", "-tpo1"], "--sort -tpo1: no run here has tpo1; near: "),
        (["state=failed", "val/top=1"], "near: val/top1"),
    ],
)
def test_what_no_run_has_is_refused_with_the_nearest(root: Path, arguments: list[str], said: str) -> None:
    done = hsvit(root, *arguments)
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("by", "first", "last"),
    [
        ("top1", "old-001", "empty-001"),
        ("-top1", "digits-scala-001", "empty-001"),
        ("-train/loss", "digits-hsvit-002", "empty-001"),
        ("name", "digits-hsvit-001", "sweep/lr=0.01-001"),
        ("-lr", "sweep/lr=0.01-001", "empty-001"),
        ("", "digits-scala-002", "empty-001"),
        ("-age", "empty-001", "digits-scala-002"),
    ],
)
def test_runs_are_sorted_by_any_column_and_what_lacks_it_comes_last(root: Path, by: str, first: str, last: str) -> None:
    found = names(listed(root, "--sort", by))
    assert (found[0], found[-1]) == (first, last)
    assert len(found) == 8


def test_a_wide_terminal_shows_everything_with_the_name_of_its_split(root: Path) -> None:
    lines = screen(root, 160)
    assert lines[0].split() == ["name", "recipe", "state", "epoch", "best", "top1", "images/s", "age"]
    cells = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert "digits/scala finished 10/10 89.25 91.75 96.75 val 88.00 90.50 95.50 test 1,100" in cells["digits-scala-001"]
    assert "digits/hsvit finished 10/10 94.20 val 93.76 test 1,100" in cells["digits-hsvit-001"]
    assert "gone 3/10 84.20 86.70 91.70 val 83.20 85.70 90.70 val 1,030" in cells["digits-scala-002"]
    assert "71.20 dev 70.20 dev" in cells["photos-001"]
    assert "failed: RuntimeError: CUDA out" in cells["sweep/lr=0.01-001"]
    assert "- gone -/10 60.00 val 59.00 val" in cells["old-001"]
    assert "- gone -/10 - - -" in cells["empty-001"]
    assert lines[-1] == "of several widths: the smallest, the one nearest to half, the largest"


def test_where_all_are_of_one_split_its_name_stands_above(root: Path) -> None:
    lines = screen(root, 160, "recipe=digits/hsvit", "state=stopped")
    assert lines[0].split() == ["name", "recipe", "state", "epoch", "best,", "val", "top1,", "val", "images/s", "age"]


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 160])
def test_a_terminal_has_every_name_whole_and_says_which_columns_it_lacks(root: Path, columns: int) -> None:
    lines = screen(root, columns)
    table = [line for line in lines if not line.startswith(("of several", "left out"))]
    assert max(map(len, table)) <= columns
    assert max(map(len, lines)) <= max(80, columns)
    shown = "".join(line.split()[0] for line in table if line[:1].strip())
    for row in listed(root):
        assert row["name"] in shown
    assert ("left out: " in lines[-1]) == (columns < 160 and "recipe" not in lines[0])
    assert "recipe" in lines[0] or "left out: recipe" in lines[-1]
    assert {"top1", "state", "age"} <= set(lines[0].replace(",", " ").split())


def test_a_file_gets_a_line_a_run_with_everything(root: Path) -> None:
    lines = hsvit(root).stdout.splitlines()
    assert len(lines) == 1 + 8 + 1
    assert "failed: RuntimeError: CUDA out of memory, 3.2 GiB wanted" in "".join(lines)


def test_a_running_run_is_told_its_last_step_and_not_that_of_its_summary(tmp_path: Path) -> None:
    folder = run(tmp_path / "a-001", points(2, 90.0), state="running")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 25, "time": 1.0, "perf/images_per_sec": 7.0}) + "\n")
    with held(folder):
        (row,) = listed(tmp_path)
    assert (row["state"], row["step"], row["epoch"], row["images_per_sec"]) == ("running", 25, 2.5, 7.0)
    assert (row["best"], row["top1"], row["top1_split"]) == (90.0, 89.0, "val")


def test_a_run_that_goes_on_after_its_result_is_told_by_what_it_measures_now(tmp_path: Path) -> None:
    folder = run(tmp_path / "a-001", [*points(2, 90.0), {"step": 20, "test/top1": 70.0}], state="running")
    with held(folder):
        (row,) = listed(tmp_path)
    assert (row["top1"], row["top1_split"]) == (89.0, "val")


def test_names_and_reasons_do_not_move_the_cursor(tmp_path: Path) -> None:
    run(tmp_path / "a\x1b[2J-001", points(1, 90.0), state="failed", why="bad\x1b]0;x\x07\nworse [red]it[/red] :smile:")
    done = hsvit(tmp_path)
    assert "\x1b" not in done.stdout
    assert "\\x1b[2J-001" in done.stdout
    assert "[red]it[/red] :smile:" in done.stdout


def test_an_empty_folder_and_filters_that_hold_of_none_are_said(root: Path, tmp_path: Path) -> None:
    done = hsvit(tmp_path)
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"0 of 0 runs in {tmp_path}" in done.stderr
    assert "0 of 8 runs" in hsvit(root, "depth=3").stderr
    assert listed(tmp_path, "depth=3", "--sort", "top1") == []
    assert "no such folder" in hsvit(tmp_path / "gone").stderr


@pytest.mark.heavy
def test_runs_of_a_folder_are_listed_without_torch_or_mlflow(root: Path) -> None:
    script = f"""
import sys
from hsvit_ds.cli import main
sys.argv = ["hsvit", "runs", "--runs", {str(root)!r}]
try:
    main()
finally:
    loaded = {{"torch", "mlflow", "scipy", "sqlalchemy", "matplotlib", "deepspeed"}} & set(sys.modules)
    assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "digits-hsvit-001" in done.stdout
