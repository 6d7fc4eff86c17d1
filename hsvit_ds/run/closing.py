"""What a run draws and tells when it is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..data.reader import Reader
from ..data.splits import class_names
from ..engine.checkpoint_files import best_step
from ..models import Model
from ..models.slimmable import Width
from .pictures import accuracy_of, draw_curves, draw_widths, write_classes
from .recipe import Plan, Recipe
from .report import WidthRow, width_rows


def draw(
    folder: Path,
    recipe: Recipe,
    plan: Plan,
    reader: Reader,
    model: Model,
    widths: Sequence[Width],
    final: Mapping[str, float],
    matrix: Tensor,
) -> tuple[list[Path], list[WidthRow]]:
    """The files drawn, and a row for each width where there are several. final, matrix: of the last evaluation."""
    name, val, test = folder.name, recipe.data.val, recipe.data.test
    best = best_step(folder / "checkpoints")
    files = [draw_curves(folder, name, val, reader.count(val), plan.steps_per_epoch, best)]
    title = f"{name}, {test}"
    files += write_classes(folder / f"classes-{test}.png", matrix.cpu(), class_names(recipe.data), title)
    if len(widths) == 1:
        return files, []
    rows = width_rows(model, widths, {key.removeprefix(f"{test}/"): value for key, value in final.items()})
    files.append(draw_widths(folder / f"widths-{test}.png", rows, title, accuracy_of(test, reader.count(test))))
    return files, rows
