"""What a recipe's training amounts to at each of its widths: for how many epochs it is trained, and what all of them
would take one by one, beside the one training of all together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby, pairwise
from typing import NamedTuple

import torch

from .. import models
from ..data import splits
from ..errors import RefusedError
from ..models.slimmable import FULL, Ratio, Width
from ..tasks import scala
from . import recipe as recipes
from . import timing
from .recipe import Plan, Recipe


def expected_epochs(recipe: Recipe, plan: Plan) -> dict[Width, float]:
    """How many epochs each width that some step may train is trained for, on average over seeds, the smallest first
    (Scala, equation 1); where one network is trained, all of the run's."""
    if not isinstance(recipe.task, scala.Config):
        return {FULL: float(recipe.run.epochs)}
    return _sampler(recipe, plan).expected_epochs(plan.steps)


def alike(recipe: Recipe) -> str:
    """Widths of a resolved recipe's model that rounding gives the same channels, as "0.25 and 0.28125, 0.50 and
    0.5625"; "" where there are none."""
    same: dict[models.Config, list[Width]] = {}
    for width in recipe.model.widths.all:
        same.setdefault(recipe.model.at(width), []).append(width)
    return ", ".join(" and ".join(map(str, widths)) for widths in same.values() if len(widths) > 1)


def _sampler(recipe: Recipe, plan: Plan) -> scala.Sampler:
    assert isinstance(recipe.task, scala.Config)
    return scala.Sampler(recipe.task, recipe.model.widths, recipe.run.seed, plan.steps_per_epoch)


def words(expected: Mapping[Width, float]) -> str:
    """Expected epochs as "0.25: 40, 0.375 to 0.625: 13.33, 0.75 to 0.875: 20, 1.00: 40"."""
    parts = []
    for epochs, group in groupby(expected, lambda width: f"{expected[width]:.4g}"):
        first, *rest = map(str, group)
        parts.append(f"{first}{f' to {rest[-1]}' if rest else ''}: {epochs}")
    return ", ".join(parts)


class Alone(NamedTuple):
    """A width that is trained by itself. macs: multiply-adds of an image. epochs: expected where all are trained
    together. step: seconds."""

    width: Width
    parameters: int
    macs: int
    epochs: float
    step: float


class Hours(NamedTuple):
    """What a recipe takes here, and what its widths would, each trained alone for as many steps (Scala, tables 4 and
    12). Without starts, evaluations and checkpoints.

    steps: of each training. alone: the smallest width first. step: seconds, mean over the recipe's own steps.
    """

    steps: int
    alone: tuple[Alone, ...]
    step: float

    @property
    def together(self) -> float:
        """Hours of the recipe."""
        return self.steps * self.step / 3600

    @property
    def separate(self) -> float:
        """Hours of one training a width."""
        return self.steps * sum(one.step for one in self.alone) / 3600


def hours(recipe: Recipe, plan: Plan, told: Callable[[int, int], None] = lambda done, total: None) -> Hours:
    """From first steps that are timed on this machine: of every width alone, and of the recipe itself.

    Args:
        recipe, plan: resolved. told: is given (done, of how many) timings.

    Raises:
        RefusedError: there are no widths to be compared, or steps cannot be timed.
    """
    if not isinstance(recipe.task, scala.Config):
        raise RefusedError(
            f'--hours: task.kind = "{recipe.task.kind}" trains one network; task.kind = "scala" trains several widths'
        )
    trained = _sampler(recipe, plan).trained(plan.steps)
    if len(trained) == 1:
        raise RefusedError(
            f"--hours: this recipe trains width {trained[0]} alone; for several set model.widths, task.sampling and "
            "task.full_epochs"
        )
    alone, parts = [_alone(recipe, width) for width in trained], list(_parts(recipe, plan))
    # The first epochs of full width alone are the steps of that width.
    texts = list(dict.fromkeys(map(recipes.dumps, [*alone, *(part for _, part in parts)])))
    seconds: dict[str, float] = {}
    for text in texts:
        told(len(seconds), len(texts))
        seconds[text] = recipe.run.global_batch / timing.first_steps(text, plan.ranks).images_per_second
    facts, epochs = splits.facts(recipe.data), expected_epochs(recipe, plan)
    with torch.device("meta"):
        model = recipe.model.build(image_size=facts.image_size, channels=facts.channels, classes=facts.classes)
    return Hours(
        plan.steps,
        tuple(
            Alone(w, models.parameters(model, w), models.macs(model, w), epochs[w], seconds[recipes.dumps(one)])
            for w, one in zip(trained, alone, strict=True)
        ),
        sum(steps * seconds[recipes.dumps(part)] for steps, part in parts) / plan.steps,
    )


def _alone(recipe: Recipe, width: Width) -> Recipe:
    """Separate training of a width of the last family."""
    last = [recipe.model.widths.granularity, *(change.granularity for change in recipe.model.widths.then)][-1]
    task = {"sampling": "fixed", "width": str(width), "pinned": ()}
    return _alike(recipe, last, task)


def _parts(recipe: Recipe, plan: Plan) -> Iterator[tuple[int, Recipe]]:
    """(How many steps, a recipe of steps like these) of each part of a training."""
    assert isinstance(recipe.task, scala.Config)
    widths, each = recipe.model.widths, plan.steps_per_epoch
    if full := min(recipe.task.full_epochs * each, plan.steps):
        yield full, _alone(recipe, FULL)
    families = [(0, widths.granularity), *((change.epoch * each, change.granularity) for change in widths.then)]
    for (first, granularity), (end, _) in pairwise([*families, (plan.steps, 0.0)]):
        if (steps := end - max(first, full)) > 0:
            yield steps, _alike(recipe, granularity, {})


def _alike(recipe: Recipe, granularity: Ratio, task: Mapping[str, object]) -> Recipe:
    """With one family and no epochs of full width alone: the first steps are like all others."""
    widths = replace(recipe.model.widths, granularity=granularity, then=())
    changed = replace(recipe.task, full_epochs=0, **task)  # type: ignore[arg-type]
    model = replace(recipe.model, widths=widths)  # type: ignore[arg-type]  # timm's have one width
    return replace(recipe, model=model, task=changed)
