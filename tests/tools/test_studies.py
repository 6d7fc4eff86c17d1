"""What is kept of a study is what its runs found, and its tables say nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from hsvit_ds.errors import RefusedError
from hsvit_ds.models.slimmable import Width
from hsvit_ds.results import present
from hsvit_ds.run.pictures import write_widths
from hsvit_ds.run.report import WidthRow
from hsvit_ds.run.summary import Cost
from hsvit_ds.sweeps import cells
from hsvit_ds.sweeps.cells import Cell, Sweep
from tests.summaries import summary
from tests.sweeps.test_cells import written
from tools import studies

COSTS = (Cost(width="0.50", parameters=10, macs=20), Cost(width="1.00", parameters=40, macs=5_000_000_000))


def trained(sweep: Sweep, found: Callable[[Cell], dict[str, float]], **changes: Any) -> Sweep:
    for cell in sweep.cells:
        cell.folder.mkdir(parents=True)
        made = {"state": "finished", "seconds": 90.0, "costs": COSTS[1:], "commit": "c" * 40, "dirty": False} | changes
        summary(metrics=found(cell), **made).write(cell.folder)
    return sweep


def score(cell: Cell) -> float:
    model: Any = cell.recipe.model
    return 50.0 + cell.recipe.run.seed + 10 * model.depth + model.groups / 7


def test_a_row_is_of_the_seeds_of_a_cell(tmp_path: Path) -> None:
    path = written(tmp_path, seeds=[0, 1, 2], cells=[{}, {"model.depth": 1}])
    sweep = trained(cells.read(path), lambda cell: {"test/top1": score(cell)})
    found = studies.collect(sweep)
    assert [row["label"] for row in found["rows"]] == ["as the recipe is", "depth=1"]
    for row, depth in zip(found["rows"], (2, 1), strict=True):
        expected = [round(50.0 + seed + 10 * depth + 16 / 7, 4) for seed in (0, 1, 2)]
        assert row["top1"] == {"": expected}
        plan = next(cell.plan for cell in sweep.cells if cell.recipe.model.depth == depth)
        training = 3 * plan.steps * sweep.cells[0].recipe.run.global_batch * plan.macs / 1e12
        said = f"| {row['label']} | {mean(expected):.2f} ± {stdev(expected):.2f} | 40 | 5.0000 | {training:.2f} |"
        assert said in studies.markdown(found, "a.svg")
    assert "3 seeds, mean ± sample deviation" in studies.markdown(found, "a.svg")


def test_a_whole_grid_of_two_keys_is_a_table_of_both(tmp_path: Path) -> None:
    path = written(tmp_path, grid={"model.depth": [1, 2, 3], "model.groups": [2, 4]})
    sweep = trained(cells.read(path), lambda cell: {"test/top1": score(cell)})
    lines = studies.markdown(studies.collect(sweep), "a.svg").splitlines()
    assert lines[2:7] == [
        "| depth \\ groups | 2 | 4 |",
        "| --- | ---: | ---: |",
        *(f"| {d} | {50 + 10 * d + 2 / 7:.2f} | {50 + 10 * d + 4 / 7:.2f} |" for d in (1, 2, 3)),
    ]


def test_widths_and_submodules_are_columns(tmp_path: Path) -> None:
    path = written(tmp_path, cells=[{}, {"model.depth": 1}])

    def by_width(cell: Cell) -> dict[str, float]:
        both = {"test/top1_w0.50": 91.0, "test/top1_w1.00": 93.0}
        return {"test/top1": 93.0} | (both if cell.recipe.model.depth == 2 else {})  # type: ignore[union-attr]

    sweep = trained(cells.read(path), by_width)
    small = summary(state="finished", metrics={"test/top1": 88.0}, costs=COSTS[:1], commit="c" * 40)
    small.write(sweep.cells[1].folder)
    text = studies.markdown(studies.collect(sweep), "a.svg")
    assert "|  | width 0.50 | width 1.00 |" in text
    assert "| as the recipe is | 91.00 | 93.00 |" in text
    assert "| depth=1 | 88.00 |  |" in text  # a network of its own
    for cell in sweep.cells:
        subsets = [(0,), (1,), (0, 1)]
        present.write(cell.folder / "evaluate-present-test-step-8.csv", subsets, [60.0, 70.0, 93.0])
    text = studies.markdown(studies.collect(sweep), "a.svg")
    assert "| width 0.50 | width 1.00 | 1 of 2 | 2 of 2 |" in text
    assert "| as the recipe is | 91.00 | 93.00 | 65.00 | 93.00 |" in text


def test_widths_that_were_never_trained_and_subsets_of_a_width_are_lines_of_their_own(tmp_path: Path) -> None:
    sweep = trained(cells.read(written(tmp_path)), lambda _: {"test/top1": 93.0, "test/top1_w0.50": 91.0})
    folder = sweep.cells[0].folder
    rows = [WidthRow(Width(n, 8), 1, 2, 10.0 * n, n != 3) for n in (3, 4)]
    write_widths(folder / "evaluate-widths-test-step-8.csv", rows)
    present.write(folder / "evaluate-present-test-step-8-1.00.csv", [(0,), (1,), (0, 1)], [60.0, 70.0, 93.0])
    found = studies.collect(sweep)
    assert found["rows"][0]["top1"] == {
        "": [93.0], "width 0.50": [91.0], "width 0.375, untrained": [30.0], "width 1.00, 1 of 2": [65.0],
        "width 1.00": [93.0],
    }  # fmt: skip
    assert studies._lines(found["rows"][0]) == {
        "as the recipe is": {0.5: [91.0], 1.0: [93.0]},
        "as the recipe is, untrained": {0.375: [30.0]},
        "as the recipe is, 1 of 2": {1.0: [65.0]},
    }


def test_of_many_widths_a_table_has_those_that_all_lines_have(tmp_path: Path) -> None:
    path = written(tmp_path, cells=[{}, {"model.depth": 1}])

    def by_width(cell: Cell) -> dict[str, float]:
        step = 0.25 if cell.recipe.model.depth == 1 else 0.05  # type: ignore[union-attr]
        widths = [round(i * step, 2) for i in range(1, round(1 / step) + 1)]
        return {"test/top1": 93.0, **{f"test/top1_w{width:.2f}": 90.0 for width in widths}}

    text = studies.markdown(studies.collect(trained(cells.read(path), by_width)), "a.svg")
    assert "|  | width 0.25 | width 0.50 | width 0.75 | width 1.00 | parameters |" in text


def test_unfinished_cells_and_other_commits_are_refused(tmp_path: Path) -> None:
    sweep = cells.read(written(tmp_path, seeds=[0, 1]))
    with pytest.raises(RefusedError, match="2 cells not finished: digits-hsvit,seed=0"):
        studies.collect(sweep)
    trained(sweep, lambda cell: {"test/top1": 1.0})
    other = summary(state="finished", metrics={"test/top1": 1.0}, commit="d" * 40, dirty=True, costs=COSTS)
    other.write(sweep.cells[1].folder)
    with pytest.raises(RefusedError, match="several commits: cccccccccccc, dddddddddddd and changes"):
        studies.collect(sweep)


@pytest.mark.parametrize("path", sorted(studies.STUDIES.glob("*/")), ids=lambda path: path.name)
def test_a_study_has_what_a_reader_needs(path: Path) -> None:
    assert (path / "sweep.toml").exists()
    for sweep in path.glob("*.toml"):
        assert studies.question(sweep).endswith((".", "?", ")"))
    if list(path.glob("*.json")):
        text = (path / "README.md").read_text()
        assert text.startswith("# ")
        for kept in path.glob("*.json"):
            assert f"hsvit sweep recipes/studies/{path.name}/{kept.stem}.toml" in text
