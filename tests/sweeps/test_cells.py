"""A sweep's file names its cells, all of which can be started or none is."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.errors import RefusedError
from hsvit_ds.models import slimmable
from hsvit_ds.run import recipe as recipes
from hsvit_ds.sweeps import cells
from hsvit_ds.sweeps.cells import Sweep

from ..ranks import ROOT, STUDIES

HSVIT, SCALA = (str(ROOT / f"recipes/digits/{name}.toml") for name in ("hsvit", "hsvit_scala"))


def sweep(folder: Path, text: str = "", **values: Any) -> Sweep:
    """Of a file with these values, whose runs go into `folder`/runs."""
    return cells.read(written(folder, text, **values))


def written(folder: Path, text: str = "", **values: Any) -> Path:
    values = {"recipes": [HSVIT]} | values
    values["keys"] = {"run.root": str(folder / "runs")} | values.get("keys", {})
    path = folder / "my/study.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{text}\n{tomli_w.dumps(values)}")
    return path


def names(made: Sweep) -> list[str]:
    return [cell.name for cell in made.cells]


def refusal(folder: Path, text: str = "", **values: Any) -> str:
    with pytest.raises(RefusedError) as refused:
        sweep(folder, text, **values)
    return str(refused.value)


def test_every_recipe_meets_every_cell_every_combination_and_every_seed(tmp_path: Path) -> None:
    made = sweep(
        tmp_path,
        recipes=[HSVIT, SCALA],
        seeds=[0, 1],
        cells=[{}, {"augment.shift": 1}],
        grid={"optimizer.lr": [1e-3, 2e-3], "model.dropout": [0.1]},
    )
    assert len(names(made)) == len(set(names(made))) == 2 * 2 * 2 * 2
    assert names(made)[:2] == [f"digits-hsvit,lr=0.001,dropout=0.1,seed={seed}" for seed in (0, 1)]
    assert names(made)[-1] == "digits-hsvit_scala,shift=1,lr=0.002,dropout=0.1,seed=1"
    for cell in made.cells:
        r = cell.recipe
        said = f"digits-{cell.path.stem}" + (",shift=1" if r.augment.shift else "")
        said += f",lr={r.optimizer.lr:g},dropout={r.model.dropout:g},seed={r.run.seed}"  # type: ignore[union-attr]
        assert cell.name == said == r.run.name
        assert cell.folder == tmp_path / "runs/my-study" / f"{said}-001"


def test_a_cell_keeps_its_name_when_others_are_added(tmp_path: Path) -> None:
    few = sweep(tmp_path, seeds=[3], grid={"model.dropout": [0.2]})
    many = sweep(tmp_path, recipes=[HSVIT, SCALA], seeds=[2, 3], grid={"model.dropout": [0.1, 0.2]})
    assert set(names(few)) < set(names(many))


def test_the_overrides_of_a_cell_are_its_recipe(tmp_path: Path) -> None:
    """As its launcher reads them."""
    values: dict[str, Any] = {
        "optimizer.betas": [[0.9, 0.95]],
        "tracking.experiment": ['a "b" \\c', "true", "7", "ünï #1", " padded "],
        "checkpoint.keep_last": [3],
    }
    for cell in sweep(tmp_path, seeds=[5], grid=values).cells:
        again = recipes.read(cell.path, list(cell.overrides))
        resolved, _ = recipes.resolve(again, cell.plan.ranks)
        assert recipes.flat(resolved) == recipes.flat(cell.recipe)
        assert again.tracking.experiment in values["tracking.experiment"]


@pytest.mark.parametrize(
    "nested",
    ["[keys]\nrun.epochs = 3", "[keys]\n'run.epochs' = 3", "[keys.run]\nepochs = 3", "keys.run = {epochs = 3}"],
)
def test_keys_may_be_nested_or_quoted(nested: str, tmp_path: Path) -> None:
    path = tmp_path / "my/study.toml"
    path.parent.mkdir()
    path.write_text(f"recipes = ['{HSVIT}']\n{nested}\n")
    (cell,) = cells.read(path).cells
    assert cell.recipe.run.epochs == 3
    assert cell.folder == Path("runs/my-study/digits-hsvit-001")


def test_keys_of_the_command_are_of_every_cell_and_over_the_files(tmp_path: Path) -> None:
    path = written(tmp_path, keys={"run": {"epochs": 3}, "model.dropout": 0.1}, grid={"optimizer.lr": [1e-3, 2e-3]})
    made = cells.read(path, ["run.epochs=4", f"run.root={tmp_path / 'elsewhere'}", "data.workers=3"])
    for cell in made.cells:
        recipe = recipes.read(cell.path, list(cell.overrides))  # as its launcher reads it
        assert (recipe.run.epochs, recipe.data.workers) == (4, 3)
        assert cell.folder.parent == tmp_path / "elsewhere/my-study"
    assert names(made) == names(cells.read(path))
    with pytest.raises(RefusedError, match=r"optimizer.lr is in \[grid\] and in \[keys\]"):
        cells.read(path, ["optimizer.lr=1"])
    with pytest.raises(RefusedError, match=r'override "epochs": must have the form'):
        cells.read(path, ["epochs"])


def test_cells_that_would_share_a_name_are_told_apart(tmp_path: Path) -> None:
    experiments = ["a/same", "b/same", "c d", "c?d", "x" * 300, "x" * 301]
    made = sweep(tmp_path, grid={"tracking.experiment": experiments})
    assert len(set(names(made))) == len(experiments)
    for cell in made.cells:
        (tmp_path / f"{cell.name}-001").mkdir()  # a name that a file system takes
        assert not set(cell.name) & set(" /?\"'")


def test_a_list_of_tables_is_a_value(tmp_path: Path) -> None:
    (cell,) = sweep(
        tmp_path,
        recipes=[SCALA],
        keys={"run.epochs": 3},
        cells=[{"model.widths.then": [{"epoch": 2, "granularity": 0.75}]}],
    ).cells
    assert cell.name == "digits-hsvit_scala,then=epoch=2,granularity=0.75"
    assert cell.recipe.model.widths.then == (slimmable.Change(epoch=2, granularity=0.75),)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_study_of_the_tree_can_be_started(path: Path) -> None:
    assert path.read_text().startswith("# ")
    assert f"hsvit sweep {path.relative_to(ROOT)}" in path.read_text()
    assert cells.read(path).cells


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seed": [0]}, 'unknown key "seed"; did you mean "seeds"'),
        ({"epochs": 3}, 'unknown key "epochs"; known: recipes, seeds'),
        ({"recipes": []}, "recipes = []: name at least one"),
        ({"recipes": ["gone.toml"]}, "gone.toml: cannot be read (No such file"),
        ({"seeds": ["a"]}, "seeds.0: input should be a valid integer"),
        ({"ranks": -1}, "ranks = -1: must be at least 1"),
        ({"grid": {"model.dropout": 0.1}}, "[grid] model.dropout = 0.1: must be a list of values"),
        ({"grid": {"model.dropout": []}}, "[grid] model.dropout = []: must be a list of values"),
        (
            {"grid": {"model.dropout": [0.1]}, "keys": {"model.dropout": 0.2}},
            "model.dropout is in [grid] and in [keys]; leave one of them out",
        ),
        (
            {"grid": {"model.dropout": [0.1]}, "cells": [{}, {"model.dropout": 0.2}]},
            "model.dropout is in [grid] and in [[cells]]; leave one of them out",
        ),
        ({"grid": {"run.seed": [0]}, "seeds": [0]}, "run.seed and seeds: leave one of them out"),
        ({"keys": {"run.name": "a"}}, "run.name: a sweep names its runs by their keys"),
        ({"cells": [{"run.root": "a"}]}, "run.root: the runs of a sweep lie in one folder; set it in [keys]"),
        ({"seeds": [0, 0]}, "digits-hsvit,seed=0 is there twice"),
        ({"recipes": [HSVIT, HSVIT]}, "digits-hsvit is there twice"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, **values)


def test_all_cells_that_do_not_resolve_are_named_before_anything_starts(tmp_path: Path) -> None:
    grid = {"model.dropout": [0.1, 0.2], "run.global_batch": [32, 33]}
    more = [{}, {"model.dept": 3}]
    path = written(tmp_path, ranks=4, grid=grid, cells=more)
    result = CliRunner().invoke(app, ["sweep", str(path)])
    assert result.exit_code == 2
    assert "6 of 8 cells cannot run, and none was started" in result.output
    lines = result.output.splitlines()
    for dropout in ("0.1", "0.2"):
        said = f"  digits-hsvit,dropout={dropout},global_batch=33: run.global_batch = 33 is not divisible by 2 replicas"
        assert said in lines
        for batch in ("32", "33"):
            (line,) = [line for line in lines if f"dept=3,model.dropout={dropout},run.global_batch={batch}" in line]
            assert 'unknown key "model.dept"; did you mean "model.depth"?' in line
    assert not (tmp_path / "runs").exists()


def test_a_run_of_another_recipe_is_refused_and_not_mixed(tmp_path: Path) -> None:
    """What is trained counts, not where and how."""
    before = sweep(tmp_path, seeds=[0, 1], keys={"model.dropout": 0.2})
    for cell in before.cells:
        cell.folder.mkdir(parents=True)
        (cell.folder / "recipe.toml").write_text(recipes.dumps(cell.recipe))
    cells.check_unchanged(before)
    cells.check_unchanged(sweep(tmp_path, seeds=[0, 1, 2], keys={"model.dropout": 0.2, "data.workers": 1}))
    with pytest.raises(RefusedError) as refused:
        cells.check_unchanged(sweep(tmp_path, seeds=[0], keys={"model.dropout": 0.3}))
    assert f"{before.cells[0].folder}: model.dropout = 0.2, now 0.3" in str(refused.value)
    assert "move them away" in str(refused.value)
    (before.cells[0].folder / "recipe.toml").write_text("[")
    with pytest.raises(RefusedError, match="cannot be read"):
        cells.check_unchanged(before)


def test_a_recipe_is_found_beside_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/mine.toml").write_bytes(Path(HSVIT).read_bytes())
    (tmp_path / "a/b/study.toml").write_text("recipes = ['../mine.toml']\n")
    monkeypatch.chdir(tmp_path)
    (cell,) = cells.read(Path("a/b/study.toml")).cells
    assert cell.path == Path("a/mine.toml")
    assert tomllib.loads(cell.path.read_text())["model"]["kind"] == "hsvit"
