"""How long a sweep will take follows from what was measured and what is left to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsvit_ds.run import timing
from hsvit_ds.run.processes import Share
from hsvit_ds.run.summary import FINISHED, STOPPED, Data, Summary
from hsvit_ds.run.timing import Timed
from hsvit_ds.sweeps.cells import Cell
from hsvit_ds.sweeps.estimate import Estimate, estimate

from .test_cells import HSVIT, SCALA, sweep


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No trial run: as if 100 images a second were trained after 5 s; the ranks of those asked for."""
    asked: list[int] = []

    def first_steps(recipe: str, ranks: int, share: Share) -> Timed:
        asked.append(ranks)
        return Timed(100.0, 5.0)

    monkeypatch.setattr(timing, "first_steps", first_steps)
    return asked


def leave(cell: Cell, seconds: float, step: int, cores: int = 1) -> None:
    """A run of the cell that has come to a step."""
    data = Data(name="digits", fingerprint="", counts={}, val="val", test="test", classes=10, image_size=32)
    cell.folder.mkdir(parents=True)
    Summary(
        id="",
        title="",
        recipe="",
        changed={},
        data=data,
        costs=(),
        ranks=1,
        cores=cores,
        gpus=0,
        hosts=(),
        device="",
        launcher="",
        commit="",
        dirty=False,
        versions={},
        started=0.0,
        steps=cell.plan.steps,
        steps_per_epoch=cell.plan.steps_per_epoch,
        epochs=cell.recipe.run.epochs,
        state=FINISHED if step == cell.plan.steps else STOPPED,
        seconds=seconds,
        step=step,
    ).write(cell.folder)


def test_a_timed_cell_stands_for_all_by_multiply_adds_images_and_epochs(tmp_path: Path, timed: list[int]) -> None:
    made = sweep(tmp_path, recipes=[HSVIT, SCALA], grid={"run.epochs": [1, 3]})
    found = estimate(made.cells, Share())
    one, three, scala, _ = (found.seconds[cell.name] for cell in made.cells)
    assert timed == [2]
    images = made.cells[0].plan.steps * made.cells[0].recipe.run.global_batch
    assert one == pytest.approx(5 + images / 100)
    assert three == pytest.approx(5 + 3 * images / 100)
    assert 1.5 < (scala - 5) / (one - 5) < 2.5  # the whole network, a quarter of its width, and one between
    assert found.how.startswith("as 10 steps of digits-hsvit,epochs=1 took (100 images/s), and its start (5 s)")


def test_finished_cells_are_taken_before_timed_ones_and_what_is_done_is_not_counted(
    tmp_path: Path, timed: list[int]
) -> None:
    made = sweep(tmp_path, recipes=[HSVIT, SCALA], seeds=[0, 1, 2], keys={"run.epochs": 2})
    hsvit, scala = made.cells[:3], made.cells[3:]
    leave(hsvit[0], 10.0, hsvit[0].plan.steps)
    leave(hsvit[1], 7.0, hsvit[1].plan.steps // 2)
    first = estimate(made.cells, Share()).seconds
    assert first.keys() == {cell.name for cell in made.cells[1:]}
    assert first[hsvit[1].name] == pytest.approx(10 * (1 - (hsvit[1].plan.steps // 2) / hsvit[1].plan.steps))
    assert first[hsvit[2].name] == pytest.approx(10)
    assert 15 < first[scala[0].name] < 25
    leave(scala[0], 100.0, scala[0].plan.steps)
    later = estimate(made.cells, Share())
    assert later.seconds[scala[1].name] == pytest.approx(100, rel=0.05)  # it draws other widths
    assert later.seconds[hsvit[2].name] == pytest.approx(10)
    assert later.how == "as 2 finished cells took from the first step on"
    assert not timed


def test_fewer_cores_than_a_finished_cell_had_take_longer(tmp_path: Path) -> None:
    made = sweep(tmp_path, seeds=[0, 1])
    leave(made.cells[0], 10.0, made.cells[0].plan.steps, cores=4)
    assert estimate(made.cells, Share()).in_all(1) == pytest.approx(10)
    assert estimate(made.cells, Share(cores=(0, 1))).in_all(2) == pytest.approx(20)


def test_cells_at_the_same_time_follow_each_other_as_there_is_room() -> None:
    found = Estimate({"a": 5, "b": 1, "c": 1, "d": 4}, "")
    assert [found.in_all(jobs) for jobs in (1, 2, 3, 8)] == [11, 6, 5, 5]
