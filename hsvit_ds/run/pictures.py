"""The pictures of a run, and the tables beside them that a program reads."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from ..errors import counted
from ..models.slimmable import Width
from . import metrics
from .evaluation import Answers
from .report import PresentRow, WidthRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"
PRESENT, ABSENT = "train/submodules_present", "submodules absent"
MANY = 30
"""Classes from which on a picture names only some of them."""


def accuracy_of(split: str, images: int) -> str:
    """The name of an axis."""
    return f"top-1 on {split} ({counted(images, 'image')}), %"


def draw_widths(path: Path, rows: Sequence[WidthRow], title: str, accuracy: str) -> Path:
    """A PNG of accuracy against GMACs, one point a width, a hollow one if it was not trained. accuracy: see
    `accuracy_of`."""
    figure, axes = _figure(7, 4.5)
    points = [(row.macs / 1e9, row.top1) for row in rows]
    (line,) = axes.plot(*zip(*points, strict=True))
    for row, point in zip(rows, points, strict=True):
        fill = line.get_color() if row.trained else "white"
        axes.plot(*point, marker="o", color=line.get_color(), markerfacecolor=fill)
    for row, point, after in zip(rows, points, [*points[1:], points[-1]], strict=True):
        # The line goes on to the right, up or down: the name stands on its other side.
        rises = after[1] >= point[1]
        offset = (5, -5) if rises else (5, 5)
        axes.annotate(row.name, point, textcoords="offset points", xytext=offset, va="top" if rises else "bottom")
    axes.set(xlabel="GMACs of an image (billions of multiply-adds)", ylabel=accuracy)
    axes.set_title(title, parse_math=False)
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def draw_present(path: Path, rows: Sequence[PresentRow], title: str, accuracy: str) -> Path:
    """A PNG of accuracy against how many submodules answered: every subset's, their mean and their range."""
    figure, axes = _figure(7, 4.5)
    sizes = [row.present for row in rows]
    axes.fill_between(sizes, [min(row.top1) for row in rows], [max(row.top1) for row in rows], alpha=0.2)
    points = [(row.present, score) for row in rows for score in row.top1]
    axes.plot(*zip(*points, strict=True), ".", color="gray", alpha=0.6, label="a subset")
    axes.plot(sizes, [mean(row.top1) for row in rows], marker="o", label="mean")
    axes.set(xlabel="submodules that answer", ylabel=accuracy, xticks=sizes)
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    return path


def draw_curves(folder: Path, title: str, val: str, images: int, steps_per_epoch: int, best: int | None = None) -> Path:
    """A PNG of loss, accuracy, gradient norm, learning rate, speed and waiting over the steps and epochs of a run, from
    its JSONL file.

    val, images: the split that is evaluated, and its size. best: the step of the best checkpoint.
    """
    figure, _ = _figure(11, 10, empty=True)
    figure.suptitle(title, parse_math=False)
    lines = metrics.read(folder)
    accuracy = accuracy_of(val, images)
    panels: list[tuple[str, Mapping[str, str], str, float]] = [
        ("cross-entropy, nats", {"train/loss": "training", f"{val}/loss": val}, "log", 1),
        (accuracy, _accuracies(lines, val), "linear", 1),
        ("gradient norm before clipping", {"train/grad_norm": ""}, "log", 1),
        ("learning rate", {"train/lr": ""}, "linear", 1),
        ("training images a second", {"perf/images_per_sec": ""}, "linear", 1),
        ("time spent waiting for images, %", {"perf/data_wait": ""}, "linear", 100),
    ]
    for axes, (label, names, scale, factor) in zip(figure.subplots(3, 2).flat, panels, strict=True):
        shades = _shades(len(names)) if len(names) > 3 else [None] * len(names)
        for (name, called), shade in zip(names.items(), shades, strict=True):
            points = [(line["step"], factor * line[name]) for line in lines if line.get(name) is not None]
            if points:
                marker = "o" if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), label=called, marker=marker, markersize=3, color=shade)
        if label == accuracy:
            _mark(axes, lines, best)
        _readable(axes, label, scale, steps_per_epoch)
        axes.set_xlim(0, 1.02 * max((line["step"] for line in lines), default=1))
        if scale == "linear" and label != accuracy:
            axes.set_ylim(bottom=0)
        if len(axes.lines) > 4:
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        elif len(axes.lines) + len(axes.patches) > 1:
            axes.legend(fontsize="small")
    figure.savefig(folder / CURVES, dpi=120)
    return folder / CURVES


def _mark(axes: Axes, lines: Sequence[Mapping[str, float]], best: int | None) -> None:
    """Where the best checkpoint is, and from where to where submodules were absent."""
    if best is not None:
        axes.axvline(best, color="0.4", linestyle=":", label=f"best checkpoint, step {best:,}")
    counts = [(line["step"], line[PRESENT]) for line in lines if PRESENT in line]
    whole = max((count for _, count in counts), default=0)
    labelled = False
    for (start, _), (stop, count) in zip([(0, whole), *counts], counts, strict=False):
        if count < whole:
            axes.axvspan(start, stop, alpha=0.15, color="tab:red", linewidth=0, label=None if labelled else ABSENT)
            labelled = True


def _accuracies(lines: Sequence[Mapping[str, float]], val: str) -> dict[str, str]:
    """{metric: its name in a legend}: of every width, or of the one there is, and of the average."""
    widths = sorted({key for line in lines for key in line if key.startswith(f"{val}/top1_w")})
    named = {key: f"width {key.rpartition('_w')[2]}" for key in widths} or {f"{val}/top1": "weights"}
    return named | {f"ema/{val}_top1": "averaged weights"}


def _readable(axes: Axes, label: str, scale: Any, steps_per_epoch: int) -> None:
    """Ticks as a person writes numbers, and epochs along the top."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axes.dataLim.intervaly
    scale = "linear" if high < 10 * low else scale  # a logarithmic axis would have one tick
    axes.set(xlabel="step", ylabel=label, yscale=scale)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if scale == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    there: Any = lambda x: x / steps_per_epoch  # noqa: E731
    back: Any = lambda x: x * steps_per_epoch  # noqa: E731
    epochs = axes.secondary_xaxis("top", functions=(there, back))
    epochs.set_xlabel("epoch")
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _shades(count: int) -> list[Any]:
    """From light to dark, the smallest width first."""
    import matplotlib

    colours: Any = matplotlib.colormaps["viridis_r"]
    return [colours(0.15 + 0.85 * i / max(count - 1, 1)) for i in range(count)]


def write_widths(path: Path, rows: Sequence[WidthRow]) -> Path:
    """A CSV with what `draw_widths` shows, top-1 in %, and whether the run trained the width."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["width", "trained", "parameters", "macs", "top1"])
        table.writerows(
            [str(r.width), "yes" if r.trained else "no", r.parameters, r.macs, f"{r.top1:.4f}"] for r in rows
        )
    return path


def write_classes(path: Path, answers: Answers, names: Sequence[str], title: str) -> list[Path]:
    """A PNG of the accuracy of each class beside the confusion matrix, of the largest width, and both as CSV, with the
    accuracy at every width.

    path: of the PNG. names: of the classes, or none.
    """
    matrix = answers.matrix.cpu()
    named = list(names) or [str(label) for label in range(len(matrix))]
    counts, right = matrix.sum(1), matrix.diagonal()
    scores = (100 * right / counts.clamp(min=1)).tolist()
    tables = path.with_suffix(".csv"), path.with_name(f"{path.stem}-confusion.csv")
    with tables[0].open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "images", *(class_column(width) for width in answers.widths)])
        by_class = (100 * answers.right.cpu() / counts.clamp(min=1)).t().tolist()
        cells = ([f"{score:.2f}" for score in row] for row in by_class)
        rows.writerows([name, count, *row] for name, count, row in zip(named, counts.tolist(), cells, strict=True))
    with tables[1].open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["label, answer", *named])
        rows.writerows([name, *row] for name, row in zip(named, matrix.tolist(), strict=True))
    shown = sorted(range(len(named)), key=scores.__getitem__)[:MANY]
    figure, _ = _figure(11, max(5, 1.5 + 0.25 * len(shown)), empty=True)
    figure.suptitle(title, parse_math=False)
    bars, heat = figure.subplots(1, 2, width_ratios=(1, 1.3))
    bars.barh(range(len(shown)), [scores[i] for i in shown])
    bars.set_yticks(range(len(shown)), [named[i] for i in shown], parse_math=False)
    bars.set(xlabel="top-1, %", ylabel="class", xlim=(0, 100))
    bars.set_title("lowest of the classes" if len(shown) < len(named) else "classes", fontsize="medium")
    bars.margins(y=0.01)
    bars.invert_yaxis()
    shares = 100 * matrix / counts.clamp(min=1)[:, None]
    image = heat.imshow(shares.tolist(), cmap="Blues", vmin=0, vmax=100)
    heat.set(xlabel="answer", ylabel="label")
    heat.set_title("answers to the images of a class, %", fontsize="medium")
    if len(named) <= MANY:
        heat.set_xticks(range(len(named)), named, rotation=90 if max(map(len, named)) > 2 else 0, parse_math=False)
        heat.set_yticks(range(len(named)), named, parse_math=False)
    figure.colorbar(image, ax=heat, shrink=0.8)
    figure.savefig(path, dpi=120)
    return [path, *tables]


def class_column(width: Width) -> str:
    """What the table of the classes calls the accuracy at a width."""
    return f"top-1 at {width.words}, %"


def _figure(width: float, height: float, empty: bool = False) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = None if empty else figure.subplots()
    return figure, axes
