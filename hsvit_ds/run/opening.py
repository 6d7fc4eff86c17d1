"""What a run says of itself before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from hsvit_kernels.mask import MASK, definition

from ..data.bad import FILE
from ..data.reader import Reader
from ..engine.checkpoint import Position
from ..engine.engine import Engine
from ..engine.optimizer import describe
from ..errors import counted
from ..grid.grid import Grid
from ..models import hsvit
from . import title, widths
from .recipe import Plan, Recipe


def lines(
    recipe: Recipe,
    plan: Plan,
    grid: Grid,
    engine: Engine,
    reader: Reader,
    folder: Path,
    start: Position,
    weights: Sequence[str] = (),
    dropout_mask: int = MASK,
) -> Iterator[str]:
    """start: where the run goes on. weights: what is said of those that it starts from. dropout_mask: the newest
    definition of masks that it has known so far."""
    yield (
        f"{folder.parent / title.of(folder)}: {plan.parameters:,} parameters, {plan.macs / 1e9:,.4g} GMACs an image; "
        f"{counted(plan.replicas, 'replica')} x {counted(grid.submodule_ranks, 'submodule rank')} on "
        f"{grid.device.type} ({grid.backend}), "
        f"ZeRO-{recipe.engine.zero_stage}, {'bf16 autocast' if plan.bf16 else 'fp32'}"
    )
    yield (
        f"global batch {recipe.run.global_batch} = {counted(plan.replicas, 'replica')} x "
        f"{counted(plan.accumulation, 'micro batch', 'micro batches')} x {plan.micro_batch}; "
        f"{counted(plan.steps_per_epoch, 'step')} an epoch, {plan.steps} in all; "
        f"{describe(engine.parameter_groups, grid)}"
    )
    if len(epochs := widths.expected_epochs(recipe, plan)) > 1:
        yield f"expected epochs of each width: {widths.words(epochs)}"
    if same := widths.alike(recipe):
        yield f"widths that rounding gives the same channels: {same}"
    yield from weights
    if reader.working:
        yield reader.working
    if reader.placement:
        yield reader.placement
    if reader.left_out:
        yield f"not readable, as the index says: {counted(len(reader.left_out), 'image')}, see {folder / FILE}"
    if recipe.data.val == recipe.data.test:
        yield (
            f'warning: data.val = data.test = "{recipe.data.val}": the images of the result also choose the best '
            "checkpoint"
        )
    yield from _launches(recipe, grid, engine)
    backbone = getattr(recipe.model, "backbone", None)
    given = backbone is not None and (backbone.weights or recipe.model.weights)
    if backbone is not None and backbone.name and not given and not backbone.trained_stages:
        yield "warning: the backbone is frozen with random weights; set model.backbone.weights"
    if plan.teacher_bytes:
        yield f"the teacher's weights take {plan.teacher_bytes / 2**20:,.1f} MiB on every rank"
    if grid.absent:
        yield (
            f"submodules {list(grid.absent)} of {recipe.model.submodules} are absent: the others are trained, "
            "theirs stay as they are in the checkpoints"
        )
    if start.total:
        yield f"resumed at step {start.total}: epoch {start.epoch}, step {start.step} of it"
    model = recipe.model
    if isinstance(model, hsvit.Config) and model.depth and model.dropout and dropout_mask < definition(model.tokens):
        yield (
            f"warning: so far attention's dropout was drawn by definition {dropout_mask}, from here on by "
            f"{definition(model.tokens)}: the run goes on with other masks than the version that began it would"
        )


def _launches(recipe: Recipe, grid: Grid, engine: Engine) -> Iterator[str]:
    if grid.device.type == "cuda" and engine.not_captured:
        yield f"forward and backward are not captured as CUDA graphs: {engine.not_captured}"
    elif grid.device.type == "cuda":
        update = "" if engine.update is None else "; so is the optimizer's step"
        yield f"forward and backward are captured as CUDA graphs, one for each width{update}"
    elif recipe.engine.compile:
        yield "warning: engine.compile = true: on a CPU compiling takes minutes, and HSViT is slower for it"
