"""Images a second and idle time over the number of ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .points import Row

COLOURS = {
    "submodules": "#0072b2",
    "data parallel": "#d55e00",
    "ZeRO-1": "#e69f00",
    "ZeRO-3": "#cc79a7",
    "model parallel": "#999999",
    "pipeline, m = 2": "#66bb99",
    "pipeline, m = 4": "#009e73",
    "pipeline, m = 8": "#004d38",
}
MARKS = {"measured": "o", "emulated": "^"}
Curve = list[tuple[int, float, float]]


def draw(rows: Sequence[Row], predicted: Sequence[dict[str, Any]], path: Path) -> None:
    """Measured rows on loopback as points, the weak scaling of predictions as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    speed, idle = figure.subplots(1, 2)
    for name, curve in _curves(predicted):
        ranks, rates, shares = zip(*curve, strict=True)
        speed.plot(ranks, rates, color=COLOURS[name], linewidth=1.5)
        idle.plot(ranks, shares, color=COLOURS[name], linewidth=1.5)
    named: set[str] = {name for name, _ in _curves(predicted)}
    for row in rows:
        if row.over == "loopback":
            mark = {"marker": MARKS[row.how], "color": COLOURS[row.case.name], "linestyle": "", "markersize": 5}
            speed.plot(row.ranks, row.images_per_second, **mark)
            idle.plot(row.ranks, 100 * row.idle_share, **mark)
            named.add(row.case.name)
    for axes, what in ((speed, "images a second"), (idle, "idle, % of a step")):
        axes.set(xlabel="ranks", ylabel=what)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    speed.set_yscale("log")
    idle.set_ylim(0, 100)
    for name in (name for name in COLOURS if name in named):
        speed.plot([], [], color=COLOURS[name], label=name)
    for how in (how for how in MARKS if any(row.how == how for row in rows)):
        speed.plot([], [], marker=MARKS[how], color="black", linestyle="", label=how)
    figure.legend(handles=speed.get_legend_handles_labels()[0], loc="outside right upper", frameon=False)
    figure.savefig(path)


def _curves(predicted: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Curve]]:
    found: dict[str, Curve] = defaultdict(list)
    for line in predicted:
        if line["scaling"] == "weak":
            found[line["divided by"]].append((line["ranks"], float(line["images/s"]), float(line["idle, %"])))
    yield from found.items()
