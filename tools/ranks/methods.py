"""One rank of a case, really computing: the project's engine, or a stage of the published network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_ds.engine.engine import BatchStatistics, Engine
from hsvit_ds.grid.grid import Config, Grid
from hsvit_ds.run.links import Passes
from hsvit_ds.run.recipe import Plan, Recipe
from hsvit_ds.run.rehearsal import first_share
from hsvit_kernels.random import Draw

from . import pipeline
from .points import CLASSES, SIZE, SUBMODULES, Case
from .start import pretend
from .watch import Step, Watch

WARM = 3
"""Steps that are not counted."""


def batch(images: int) -> tuple[Tensor, Tensor]:
    """So many, and their labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, SIZE, SIZE, generator=generator), torch.randint(
        CLASSES, (images,), generator=generator
    )


def engine_step(recipe: Recipe, plan: Plan) -> tuple[Engine, Callable[[], Any]]:
    """This rank's engine and one step of it."""
    grid = Grid(recipe.grid, recipe.model.submodules)
    here = first_share(recipe) if grid.size == 1 else grid.submodules
    model = recipe.model.build(image_size=SIZE, channels=3, classes=CLASSES, here=here, grid=grid)
    engine = Engine(
        model,
        recipe.engine,
        recipe.optimizer,
        grid,
        micro_batch=plan.micro_batch,
        accumulation=1,
        batch_statistics=BatchStatistics(plan.bn_runs, plan.bn_synced),
        bf16=plan.bf16,
    )
    images, labels = batch(plan.micro_batch)
    draw = Draw.of(0, image=torch.arange(plan.micro_batch))

    def passes() -> Any:
        yield (F.cross_entropy(engine(images, draw=draw), labels) for _ in range(1))

    return engine, lambda: engine.step(passes, 1, 1e-3, 0)


def stage_step(
    case: Case,
    layers_of: Sequence[range],
    shapes: Sequence[Sequence[int]],
    mark: Callable[[], object] = lambda: None,
) -> Callable[[], Any]:
    """This rank's stage of a pipeline and one step of it.

    Args:
        shapes: of what comes into each stage. mark: called after the forwards, and after the backwards.
    """
    grid = Grid(Config(), submodules=1)
    parts = pipeline.layers(pipeline.network(case.variant, SUBMODULES))
    mine = [parts[number] for number in layers_of[grid.rank]]
    stage = pipeline.Stage(mine, grid.rank, grid.size, shapes[grid.rank])
    optimizer = torch.optim.AdamW(stage.net.parameters(), lr=1e-3) if list(stage.net.parameters()) else None
    images, labels = (whole.chunk(case.micro_batches) for whole in batch(case.batch))

    def step() -> None:
        stage.step(images, labels, mark)
        mark()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def watched(make: Callable[[], Callable[[], Any]], watch: Watch, steps: int) -> list[Step]:
    """The steps of this rank, the first ones too."""
    step, watch.steps = make(), []
    for _ in range(WARM + steps):
        with watch.step():
            step()
    return watch.steps


class Timed(NamedTuple):
    """Medians, and the coefficient of variation of a step."""

    passes: Passes
    spread: float


def timed(recipe: Recipe, plan: Plan, steps: int) -> Timed:
    """The passes of the first rank, whose messages take no time."""
    pretend(0, plan.ranks)
    engine, step = engine_step(recipe, plan)
    marks: list[float] = []

    def mark(*_: Any) -> None:
        marks.append(time.perf_counter())

    def entered(_: nn.Module, given: tuple[Tensor]) -> None:
        mark()
        given[0].register_hook(mark)

    engine.module.head.register_forward_pre_hook(entered)  # type: ignore[union-attr]
    rows = []
    # After the last backward pass; of an HSViT's own trunk there is nothing else to do there.
    engine._sum_partial = mark  # type: ignore[method-assign]
    for _ in range(WARM + steps):
        marks.clear()
        mark()
        step()
        mark()
        began, head, backward, update, ended = marks
        rows.append((head - began, backward - head, update - backward, ended - update))
    forward, head, backward, update = (median(column) for column in zip(*rows[WARM:], strict=True))
    whole = [sum(row) for row in rows[WARM:]]
    return Timed(Passes(forward=forward, head=head, backward=backward, update=update), stdev(whole) / fmean(whole))


def timed_stage(
    case: Case, layers_of: Sequence[range], shapes: Sequence[Sequence[int]], rank: int, steps: int
) -> tuple[float, float, float]:
    """Seconds of a stage's forward and backward of a micro batch, and of its update; its messages take no time."""
    pretend(rank, case.ranks)
    marks: list[float] = []

    def mark() -> None:
        marks.append(time.perf_counter())

    step, rows = stage_step(case, layers_of, shapes, mark), []
    for _ in range(WARM + steps):
        marks.clear()
        mark()
        step()
        mark()
        began, forward, backward, ended = marks
        rows.append(
            ((forward - began) / case.micro_batches, (backward - forward) / case.micro_batches, ended - backward)
        )
    forward, backward, update = (median(column) for column in zip(*rows[WARM:], strict=True))
    return forward, backward, update


class Layers(NamedTuple):
    """Of a network's layers. seconds: (forward, backward) of each for a micro batch. outputs: shapes of a micro
    batch."""

    seconds: list[tuple[float, float]]
    outputs: list[tuple[int, ...]]


def timed_layers(case: Case, steps: int) -> Layers:
    """Of the network that a pipeline divides, on this rank alone."""
    parts, (images, _) = (
        pipeline.layers(pipeline.network(case.variant, SUBMODULES)),
        batch(case.batch // case.micro_batches),
    )
    pipeline.layer_seconds(parts, images, WARM)
    seconds, outputs, x = pipeline.layer_seconds(parts, images, steps), [], images
    with torch.no_grad():
        for layer in parts:
            x = layer(x)
            outputs.append(tuple(x.shape))
    return Layers(seconds, outputs)
