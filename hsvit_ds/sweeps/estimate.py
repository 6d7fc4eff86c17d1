"""How long a sweep's cells will take: as its finished ones did, or by a few steps of one that are timed."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from ..data import splits
from ..errors import counted
from ..run import recipe as recipes
from ..run import timing, widths
from ..run.processes import Share
from .cells import Cell


class Estimate(NamedTuple):
    """seconds: of each cell that is not finished, by its name. how: it was estimated."""

    seconds: dict[str, float]
    how: str

    def in_all(self, jobs: int) -> float:
        """With so many cells at a time, each started as soon as there is room."""
        ends = [0.0] * jobs
        for seconds in self.seconds.values():
            heapq.heapreplace(ends, ends[0] + seconds)
        return max(ends)


def estimate(cells: Sequence[Cell], share: Share) -> Estimate:
    """share: of this machine, that a cell gets.

    Raises:
        RefusedError: no cell is finished, and the steps of one cannot be timed.
    """
    left = [cell for cell in cells if not cell.is_finished]
    if done := [(cell, _seconds(cell, share)) for cell in cells if cell.is_finished]:
        seconds = {cell.name: _left(cell) * _pace(done, cell) for cell in left}
        return Estimate(seconds, f"as {counted(len(done), 'finished cell')} took from the first step on")
    first = left[0]
    timed = timing.first_steps(recipes.dumps(first.recipe), first.plan.ranks, share)
    rate = timed.images_per_second * work(first) / _images(first)
    seconds = {cell.name: timed.start + _left(cell) / rate for cell in left}
    steps = f"{counted(timing.STEPS, 'step')} of {first.name} took ({timed.images_per_second:,.0f} images/s)"
    return Estimate(seconds, f"as {steps}, and its start ({timed.start:.0f} s); without evaluations")


def _seconds(cell: Cell, share: Share) -> float:
    """That a finished cell would take with this share of the machine."""
    found = cell.summary
    assert found is not None
    return found.seconds * max(1.0, found.cores / len(share.cores) if share.cores else 1.0)


def _pace(done: Sequence[tuple[Cell, float]], cell: Cell) -> float:
    """Seconds for a multiply-add, of finished cells of the same recipe where there are such."""
    same = [pair for pair in done if pair[0].path == cell.path] or done
    return sum(seconds for _, seconds in same) / sum(work(other) for other, _ in same)


def _left(cell: Cell) -> float:
    """What of a cell's work is still to be done."""
    found = cell.summary
    return work(cell) * (1 - found.step / found.steps if found and found.steps else 1)


def work(cell: Cell) -> float:
    """Multiply-adds of a cell's training, on average over seeds: an image's at a width, three times for forward and
    backward. Teachers and evaluations are not counted."""
    recipe, facts = cell.recipe, splits.facts(cell.recipe.data)
    shape = facts.image_size, facts.channels, facts.classes
    each = _images(cell) / recipe.run.epochs
    epochs = widths.expected_epochs(recipe, cell.plan).items()
    return 3.0 * each * sum(count * recipe.model.macs(*shape, width) for width, count in epochs)


def _images(cell: Cell) -> int:
    """That are trained on, each as often as it is."""
    return cell.plan.steps * cell.recipe.run.global_batch
