"""Which split was read: it is there or named by the recipe, and everything that a run says bears its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.data import splits
from hsvit_ds.grid.grid import Grid
from hsvit_ds.train import main

from ..ranks import ROOT
from ..tars import data_set
from ..workers.common import SMALL_SCALA

HELD_OUT = [("test", "val"), ("val", "test")]
"""The split that is there, and the one that it stands in for."""


@pytest.fixture(autouse=True)
def _the_group_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends leaves the process group, which here is that of all tests."""
    monkeypatch.setattr(Grid, "close", lambda grid: None)


def arguments(root: Path, data: Path, *more: str) -> list[str]:
    keys = ["run.epochs=1", "data.name=tiny", "data.classes=10", "data.image_size=32", "data.workers=0"]
    keys += ["model.widths.granularity=0.25", f"run.root={root}", f"data.root={data}"]
    return [str(ROOT / "recipes/digits/scala.toml"), *SMALL_SCALA, *keys, *more]


def names(folder: Path) -> set[str]:
    """The splits that metrics are of."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key.partition("/")[0] for line in lines for key in line if "top1" in key}


@pytest.mark.parametrize(("there", "missing"), HELD_OUT)
def test_a_split_that_is_missing_is_refused_and_a_named_one_is_read_and_said(
    there: str, missing: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = data_set(tmp_path / "set", held_out=there)
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, data))
    found = ", ".join(sorted(("train", there)))
    told = "".join(capfd.readouterr())
    assert f'data.root = {data}: no split {missing} ({found}); data.{missing} = "{there}" takes that one in its' in told
    assert not list(tmp_path.glob("digits-scala*"))
    shown = CliRunner().invoke(app, ["recipe", *arguments(tmp_path, data)])
    assert (shown.exit_code, f"no split {missing}" in shown.stderr) == (2, True)  # by the same check

    main(arguments(tmp_path, data, f"data.{missing}={there}", "ema.decay=0.9"))
    told = capfd.readouterr().out
    folder = tmp_path / "digits-scala-001"
    assert told.count(f'data.val = data.test = "{there}"') == 1
    assert f"{missing}/" not in told
    assert names(folder) == {there, "ema"}
    assert not any(missing in key for line in (folder / "metrics.jsonl").open() for key in json.loads(line))
    assert {file.name for file in folder.glob("widths*.png")} == {f"widths-{there}.png"}

    exported = CliRunner().invoke(app, ["export", str(folder), "--width", "0.5"])
    assert exported.exit_code == 0, exported.output
    assert f"{there} top-1, %" in (folder / "export-0.50/README.md").read_text()
    for role in ("val", "test"):
        scored = CliRunner().invoke(app, ["evaluate", str(folder), "--split", role])
        assert scored.exit_code == 0, scored.output
        assert f", {there}, step 3" in scored.output
        assert f"widths-{there}-" in scored.output.replace("\n", "")


@pytest.mark.parametrize(("there", "missing"), HELD_OUT)
def test_a_run_that_was_begun_when_recipes_named_no_splits_goes_on_with_a_warning(
    there: str, missing: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = data_set(tmp_path / "set", held_out=there)
    main(arguments(tmp_path, data, f"data.{missing}={there}"))
    file = tmp_path / "digits-scala-001/recipe.toml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith(("val = ", "test = "))))
    capfd.readouterr()
    main(arguments(tmp_path, data, "run.epochs=2", "--resume"))
    told = capfd.readouterr().out
    assert f'warning: data.val = data.test = "{there}"' in told
    assert names(file.parent) == {there}


def test_names_of_before_are_those_that_are_there(tmp_path: Path) -> None:
    data = data_set(tmp_path / "set", held_out="validation")
    found = splits.named_as_before(splits.Config(name="tiny", classes=10, root=str(data)))
    assert (found.val, found.test) == ("validation", "validation")
    assert splits.named_as_before(splits.Config()) == splits.Config()


def test_a_set_that_names_its_classes_needs_no_number_of_them_and_an_export_has_the_names(tmp_path: Path) -> None:
    data = data_set(tmp_path / "set")
    keys = [key for key in arguments(tmp_path, data, "data.test=val") if not key.startswith("data.classes")]
    command = ["recipe", keys[0], *keys[1:]]
    refused = CliRunner().invoke(app, command)
    assert (refused.exit_code, "names no classes" in refused.stderr) == (2, True), refused.output
    names = [f"sort {label}" for label in range(10)]
    (data / "classes.txt").write_text("\n".join(names) + "\n")
    assert CliRunner().invoke(app, ["shards", "index", str(data)]).exit_code == 0
    assert "classes = 10" in CliRunner().invoke(app, command).output
    main(keys)
    folder = tmp_path / "digits-scala-001"
    assert (folder / "classes.txt").read_text().splitlines() == names
    exported = CliRunner().invoke(app, ["export", str(folder), "--width", "0.5"])
    assert exported.exit_code == 0, exported.output
    assert (folder / "export-0.50/classes.txt").read_text().splitlines() == names
    assert json.loads((folder / "export-0.50/config.json").read_text())["label_names"] == names
