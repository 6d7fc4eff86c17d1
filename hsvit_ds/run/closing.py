"""What a run draws and tells when it is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.reader import Reader
from ..data.splits import class_names
from ..engine.checkpoint_files import best_step
from ..models import Model
from ..models.slimmable import Width
from . import metrics, title
from .evaluation import Answers
from .pictures import CURVES, accuracy_of, draw_curves, draw_widths, write_classes
from .recipe import Plan, Recipe
from .report import WidthRow, duration, width_rows
from .tracking import CLASSES


def draw(
    folder: Path,
    recipe: Recipe,
    plan: Plan,
    reader: Reader,
    model: Model,
    widths: Sequence[Width],
    final: Mapping[str, float],
    counts: Answers,
) -> tuple[list[Path], list[WidthRow]]:
    """The files drawn, and a row for each width where there are several. final, counts: of the last evaluation."""
    name, val, test = title.of(folder), recipe.data.val, recipe.data.test
    best = best_step(folder / "checkpoints")
    files = [draw_curves(folder, name, val, reader.count(val), plan.steps_per_epoch, best)]
    named = f"{name}, {test}"
    files += filter(Path.exists, [folder / CLASSES])
    files += write_classes(folder / f"classes-{test}.png", counts, class_names(recipe.data), named)
    if len(widths) == 1:
        return files, []
    rows = width_rows(model, widths, {key.removeprefix(f"{test}/"): value for key, value in final.items()}, widths)
    files.append(draw_widths(folder / f"widths-{test}.png", rows, named, accuracy_of(test, reader.count(test))))
    return files, rows


def result(folder: Path, recipe: Recipe, plan: Plan, final: Mapping[str, float], seconds: float) -> dict[str, str]:
    """The closing table. final: metrics of the last evaluation."""
    rows = {name: f"{value:.4g}" for name, value in final.items() if "_w" not in name}
    val = f"{recipe.data.val}/top1"
    scores = [(line[val], line["step"]) for line in metrics.read(folder) if line.get(val) is not None]
    if scores:
        best, step = max(scores, key=lambda score: score[0])
        rows[f"best {val}"] = f"{best:.4g}, after epoch {step // plan.steps_per_epoch} of {recipe.run.epochs}"
    return rows | {"time": duration(seconds), "run": str(folder), "curves": str(folder / CURVES)}
