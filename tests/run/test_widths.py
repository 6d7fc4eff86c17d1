"""What each width of a recipe's training amounts to: its expected epochs, and the hours that it alone would take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.models.slimmable import Width
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run import timing, widths
from hsvit_ds.run.recipe import Recipe
from hsvit_ds.run.timing import Timed

from ..ranks import ROOT

SCALA, HSVIT = ROOT / "recipes/digits/scala.toml", ROOT / "recipes/digits/hsvit.toml"
STEP = {"0.25": 0.5, "0.4375": 0.75, "0.625": 1.0, "0.8125": 1.5, "1.00": 2.0, "": 3.0}
"""Seconds of a step at each width alone, and of all together."""


def resolved(path: Path, *overrides: str) -> tuple[Recipe, recipes.Plan]:
    return recipes.resolve(recipes.read(path, list(overrides)), 1)


def shown(*arguments: str, path: Path = SCALA) -> str:
    result = CliRunner().invoke(app, ["recipe", str(path), *arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.stdout


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Recipe]:
    """No trial runs: a step takes `STEP`, times 10 where 7 widths are trained together; the recipes that were timed."""
    asked: list[Recipe] = []

    def first_steps(text: str, ranks: int) -> Timed:
        path = tmp_path / "trial.toml"
        path.write_text(text)
        recipe, _ = resolved(path)
        asked.append(recipe)
        task: Any = recipe.task
        seconds = STEP[str(recipe.model.widths.find(task.width)) if task.sampling == "fixed" else ""]
        many = task.sampling != "fixed" and len(recipe.model.widths.all) == 7
        return Timed(recipe.run.global_batch / (10 * seconds if many else seconds), 5.0)

    monkeypatch.setattr(timing, "first_steps", first_steps)
    return asked


# Expected epochs


def test_epochs_are_told_by_width_and_equal_neighbours_together() -> None:
    found = {Width(n, 8): epochs for n, epochs in [(2, 40.0), (3, 40 / 3), (4, 40 / 3), (6, 20.0), (8, 40.0)]}
    assert widths.words(found) == "0.25: 40, 0.375 to 0.50: 13.33, 0.75: 20, 1.00: 40"


def test_a_network_of_one_width_is_trained_for_all_epochs() -> None:
    assert list(widths.expected_epochs(*resolved(HSVIT, "grid.submodule_ranks=1", "run.epochs=7")).values()) == [7.0]
    alone = widths.expected_epochs(*resolved(SCALA, "task.sampling=fixed", "task.width=0.5"))
    assert {str(width): epochs for width, epochs in alone.items()} == {"0.50": 40.0}


def test_the_recipe_is_shown_with_the_epochs_of_its_widths() -> None:
    line = "# expected epochs of each width = "
    assert f"{line}0.25: 40, 0.375 to 0.625: 13.33, 0.75 to 0.875: 20, 1.00: 40\n" in shown()
    assert f"{line}0.25: 30, 0.375 to 0.625: 10, 0.75 to 0.875: 15, 1.00: 40\n" in shown("task.full_epochs=10")
    assert line not in shown(path=HSVIT)


# Hours


def test_separate_training_is_as_many_steps_of_each_width_alone(timed: list[Recipe]) -> None:
    recipe, plan = resolved(SCALA, "model.widths.granularity=0.375", "task.pinned=[0.625]", "run.epochs=4")
    told: list[tuple[int, int]] = []
    found = widths.hours(recipe, plan, lambda done, total: told.append((done, total)))
    assert [(str(one.width), one.step, one.epochs) for one in found.alone] == [
        ("0.25", 0.5, 4.0), ("0.625", 1.0, 4.0), ("1.00", 2.0, 4.0),
    ]  # fmt: skip
    assert [one.parameters for one in found.alone] == [53_866, 318_970, 805_258]
    assert [one.macs for one in found.alone] == [recipe.model.macs(32, 1, 10, one.width) for one in found.alone]
    assert found.steps == plan.steps == 4 * 35
    assert found.separate == pytest.approx(4 * 35 * (0.5 + 1.0 + 2.0) / 3600)
    assert found.together == pytest.approx(4 * 35 * 3.0 / 3600)
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    for one in timed:  # nothing else differs from the recipe
        same = {name: getattr(one, name) for name in ("run", "data", "augment", "optimizer", "engine", "grid")}
        assert same == {name: getattr(recipe, name) for name in same}


def test_the_first_epochs_and_other_families_are_steps_of_their_own(timed: list[Recipe]) -> None:
    """2 epochs of full width alone, 3 of seven widths, 5 of three."""
    then = "model.widths.then=[{epoch=5, granularity=0.375}]"
    recipe, plan = resolved(SCALA, then, "task.full_epochs=2", "run.epochs=10")
    found = widths.hours(recipe, plan)
    assert [str(one.width) for one in found.alone] == ["0.25", "0.625", "1.00"], "those that are not abandoned"
    assert found.step == pytest.approx((2 * 2.0 + 3 * 30.0 + 5 * 3.0) / 10)
    assert len(timed) == 5, "the full width is timed once"
    assert {(one.model.widths.then, one.task.full_epochs) for one in timed} == {((), 0)}  # type: ignore[union-attr]


def test_a_width_of_a_later_family_is_trained_alone_too(timed: list[Recipe]) -> None:
    then = "model.widths.then=[{epoch=1, granularity=0.1875}]"
    found = widths.hours(*resolved(SCALA, "model.widths.granularity=0.375", then, "run.epochs=3"))
    assert {str(one.width): one.step for one in found.alone} == {name: step for name, step in STEP.items() if name}


def test_hours_are_shown_by_width_and_in_sum(timed: list[Recipe]) -> None:
    arguments = ["--hours", "model.widths.granularity=0.375", "run.epochs=4"]
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown(*arguments).splitlines()]
    assert ["0.25", "53,866", "0.0009", "4", "0.5", "1m10s"] in lines
    assert ["1.00", "805,258", "0.0138", "4", "2", "4m40s"] in lines
    assert ["one by one", "", "", "", "", "8m10s"] in lines
    assert ["together", "", "", "", "3", "7m00s"] in lines
    assert lines[-1][0].startswith("one by one 3 widths take 1.17x as long as together;")
    found = json.loads(shown(*arguments, "--format", "json"))
    assert (found["recipe"], found["ranks"], found["steps"]) == ("digits-scala", 1, 140)
    assert found["widths"][1] == {
        "width": "0.625", "parameters": 318_970, "macs": 5_490_080, "expected_epochs": 4.0, "seconds_a_step": 1.0,
        "hours": 140 / 3600,
    }  # fmt: skip
    assert (found["separate_hours"], found["hours"]) == (pytest.approx(490 / 3600), pytest.approx(420 / 3600))


@pytest.mark.heavy
@pytest.mark.slow
def test_first_steps_of_real_trainings_are_timed() -> None:
    found = json.loads(shown("--hours", "--format", "json", "model.widths.granularity=0.75"))
    assert [(one["width"], one["seconds_a_step"] > 0) for one in found["widths"]] == [("0.25", True), ("1.00", True)]
    assert found["hours"] > 0


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        (HSVIT, ["--hours"], '--hours: task.kind = "supervised" trains one network;'),
        (SCALA, ["--hours", "model.widths.smallest=1"], "--hours: this recipe trains width 1.00 alone;"),
        (SCALA, ["--hours", "task.sampling=fixed", "task.width=0.5"], "--hours: this recipe trains width 0.50 alone;"),
        (SCALA, ["--hours", "--memory"], "--memory and --hours: each takes the recipe's place;"),
        (SCALA, ["--format", "json"], "--format json: only --hours has one;"),
    ],
)
def test_hours_are_refused_where_there_is_nothing_to_compare(
    path: Path, arguments: list[str], message: str, timed: list[Recipe]
) -> None:
    result = CliRunner().invoke(app, ["recipe", str(path), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert not timed


# Rounded channels


def test_widths_that_rounding_gives_the_same_channels_are_said() -> None:
    said = shown("model.widths.granularity=0.0625", path=ROOT / "recipes/digits/mobilenet.toml")
    model = resolved(ROOT / "recipes/digits/mobilenet.toml", "model.widths.granularity=0.0625")[0].model
    (line,) = [line for line in said.splitlines() if "rounding" in line]
    assert line == "# widths that rounding gives the same channels = 0.375 and 0.4375, 0.625 and 0.6875"
    sizes: dict[Any, list[str]] = {}
    for width in model.widths.all:
        sizes.setdefault(model.at(width).channels, []).append(str(width))  # type: ignore[union-attr]
    assert [" and ".join(names) for names in sizes.values() if len(names) > 1] == line.partition(" = ")[2].split(", ")
    assert "rounding" not in shown(), "every width of a ViT has channels of its own"
