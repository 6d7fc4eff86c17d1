"""A run whose widths change at an epoch: killed on both sides of it, and what it says of widths that it gave up."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.engine.checkpoint_files import pointed
from hsvit_ds.results import outcome, rows
from hsvit_ds.results.records import of_folder
from hsvit_ds.results.saved import open_run
from hsvit_ds.run import metrics, summary

from ..engine.test_checkpoint import assert_equal
from ..ranks import finish, fork
from ..workers.common import SMALL_SCALA

pytestmark = pytest.mark.heavy

FOUR = ("0.25", "0.50", "0.75", "1.00")
THREE = ("0.25", "0.625", "1.00")
OUTPUT = "output.txt"
"""What the run said, beside its folder."""


def arguments(root: Path, *more: str) -> list[str]:
    """Three epochs of three steps, the last one with three widths; a checkpoint after each step."""
    keys = [*SMALL_SCALA, "run.global_batch=376", "run.epochs=3", "model.depth=1", "ema.decay=0.9"]
    keys += ["model.widths.granularity=0.25", "model.widths.then=[{epoch=2, granularity=0.375}]"]
    keys += ["checkpoint.every_steps=1", "checkpoint.keep_last=9", "run.eval_every=1"]
    return ["recipes/digits/scala.toml", *keys, f"run.root={root}", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to, on two ranks."""
    root = tmp_path_factory.mktemp("whole")
    (root / OUTPUT).write_text(finish(fork("hsvit_ds.train", arguments(root), 2)))
    return root / "digits-scala-001"


def latest(folder: Path) -> Path:
    found = pointed(folder / "checkpoints", "latest")
    assert found is not None
    return found


@pytest.mark.parametrize("step", [5, 7, 9], ids=["before", "at the first step", "after"])
def test_a_run_killed_on_either_side_of_another_family_and_resumed_is_bit_equal(
    step: int, whole: Path, tmp_path: Path
) -> None:
    ranks = fork("tests.workers.interrupted", ["1", f"step {step}: forward", "SIGKILL", *arguments(tmp_path)], 2)
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [76, -9], outputs
    folder = tmp_path / whole.name
    saved = int(latest(folder).name[5:13])
    assert saved in (step - 2, step - 1)  # the last one may have been under way
    output = finish(fork("hsvit_ds.train", arguments(tmp_path, "--resume"), 2))
    assert f"resumed at step {saved}" in output
    assert_equal(latest(folder), latest(whole))
    scores = [
        [(line["step"], {key: value for key, value in line.items() if "top1" in key}) for line in metrics.read(run)]
        for run in (whole, folder)
    ]
    assert scores[0] == scores[1]


def test_a_width_that_is_abandoned_is_no_longer_reported(whole: Path) -> None:
    evaluated = [[name.rpartition("_w")[2] for name in line if "val/top1_w" in name] for line in metrics.read(whole)]
    assert [tuple(widths) for widths in evaluated if widths] == [FOUR, FOUR, THREE]
    found = summary.read(whole)
    assert found is not None
    assert tuple(cost.width for cost in found.costs) == THREE
    told = of_folder(whole)
    lasts = outcome.of(told, ()).last
    for known in (found.metrics, found.best, lasts):
        assert sorted(key for key in known if key.startswith("val/top1_w")) == [f"val/top1_w{w}" for w in THREE]
    assert [key for key in rows.of(told).values if key.startswith("best_w")] == [f"best_w{width}" for width in THREE]
    assert tuple(outcome.of(told, ()).widths) == THREE


def test_a_run_says_for_how_many_epochs_each_width_is_trained(whole: Path) -> None:
    said = "expected epochs of each width: 0.25: 3, 0.50: 2, 0.625: 1, 0.75: 2, 1.00: 3\n"
    assert (whole.parent / OUTPUT).read_text().count(said) == 1
    found = summary.read(whole)
    assert found is not None
    assert {cost.width: cost.epochs for cost in found.costs} == {"0.25": 3.0, "0.625": 1.0, "1.00": 3.0}


def test_the_trained_widths_are_those_of_the_checkpoint(whole: Path) -> None:
    for step, widths in ((6, FOUR), (9, THREE)):
        assert tuple(map(str, open_run(whole, checkpoint=str(step)).trained)) == widths
    done = CliRunner().invoke(app, ["evaluate", str(whole), "--split", "val"])
    assert done.exit_code == 0, done.output
    assert "0.625" in done.output
    assert "0.75" not in done.output
    done = CliRunner().invoke(app, ["evaluate", str(whole), "--widths", "0.5"])
    assert done.exit_code == 2
    expected = "width 0.50 was never trained, or is abandoned (trained: 0.25, 0.625, 1.00); --untrained takes it anyway"
    assert expected in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["evaluate", str(whole), "--widths", "0.5", "--untrained", "--split", "val"])
    assert done.exit_code == 0, done.output
