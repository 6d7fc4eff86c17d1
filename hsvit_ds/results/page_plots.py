"""The plots of a page, as what its script draws: series of points with a choice of horizontal axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

import numpy as np

from . import published
from .comparison import Comparison, Group, Mean, Section, Value
from .outcome import Outcome, Thinned, curve_names
from .tables import cost, device_hours, gmacs, hours, latency, width_of

Plot = dict[str, Any]
"""id, title, y (its axis), log, xs ([[key, axis]]), lines (or points alone), note, series. A series has its group's
place, a name, x by key, y, and error (a deviation each) or low and high."""

_CURVES = {
    "train/loss": ("Training loss", "cross-entropy, nats", True),
    "train/lr": ("Learning rate", "learning rate", False),
    "train/grad_norm": ("Gradient norm", "before clipping", True),
    "perf/images_per_sec": ("Throughput", "images/s", False),
    "perf/data_wait": ("Data wait", "share of a step", False),
}
STEPS = [["epoch", "epoch"], ["step", "step"], ["hours", "hours since the first logged step, pauses included"]]


def of(section: Section, comparison: Comparison) -> dict[str, list[Plot]]:
    """{heading: plots}; those without points are left out."""
    curves = [*curve_names(section.data.val), *comparison.metrics]
    parts = {
        "Accuracy": [_against_cost(section), _by_width(section), _by_submodules(section)],
        "Curves": [_curve(section, name) for name in dict.fromkeys(curves)],
    }
    kept = {heading: [plot for plot in plots if plot["series"]] for heading, plots in parts.items()}
    return {heading: plots for heading, plots in kept.items() if plots}


def _digits(value: float) -> float | None:
    return rounded([value], 5)[0]


def rounded(values: Sequence[float], digits: int) -> list[float | None]:
    """To so many digits that count; None for each that JSON has not."""
    found = np.asarray(values, np.float64)
    usual = np.isfinite(found) & (found != 0)
    places = digits - 1 - np.floor(np.log10(np.abs(np.where(usual, found, 1.0))))
    up, down = 10.0 ** np.maximum(places, 0), 10.0 ** np.maximum(-places, 0)
    near = np.round(found * up / down) * down / up  # whole numbers by a power of ten: as short as they were meant
    return [value if fine else None for value, fine in zip(near.tolist(), np.isfinite(found).tolist(), strict=True)]


def _axis(section: Section) -> str:
    return f"top-1 on {section.data.test}, %"


def _axes(section: Section, axes: Iterable[tuple[str, str, Value]]) -> list[tuple[str, str, Value]]:
    """(key, title, value) of those that some run has."""
    return [axis for axis in axes if any(axis[2](run) is not None for run in section.runs)]


def _latency_axis(section: Section) -> str:
    where = dict.fromkeys(run.latency.where for run in section.runs if run.latency)
    return f"latency of one image, ms ({'; '.join(where)})"


def _against_cost(section: Section) -> Plot:
    axes = _axes(
        section,
        [
            ("GMACs", "GMACs of an image", gmacs()),
            ("parameters", "parameters", cost("parameters")),
            ("latency, ms", _latency_axis(section), latency()),
            ("GPU hours", "GPU hours of training", device_hours("GPU")),
            ("core hours", "core hours of training", device_hours("core")),
            ("hours", "hours of training", hours),
        ],
    )
    series = []
    for place, group in enumerate(section.groups):
        result = group.mean(lambda run: run.last.get(section.result))
        x = {key: [_digits(found.mean)] for key, _, value in axes if (found := group.mean(value))}
        if result and x:
            series.append({"group": place, "name": group.label, "x": x} | _spread([result]))
    return {
        "title": "Against cost",
        "y": _axis(section),
        "log": False,
        "xs": [[key, title] for key, title, _ in axes],
        "lines": False,
        "series": series,
    }


def _spread(found: Sequence[Mean]) -> dict[str, Any]:
    values: dict[str, Any] = {"y": [_digits(each.mean) for each in found], "n": max(each.n for each in found)}
    return values | ({"error": [_digits(each.std or 0) for each in found]} if any(each.std for each in found) else {})


def _by_width(section: Section) -> Plot:
    series: list[dict[str, Any]] = []
    known: dict[str, tuple[published.Published, dict[str, float]]] = {}
    for place, group in enumerate(section.groups):
        widths = sorted({width for run in group.runs for width in run.widths}, key=float)
        if len(widths) > 1:
            series.append({"group": place, "name": group.label} | _widths(group, widths))
        for run in group.runs:
            for curve in published.of(run.recipe):
                known[curve.name] = curve, {entry.width: entry.macs / 1e9 for entry in run.costs}
    series += [_published(curve, macs) for curve, macs in known.values()]
    axes = [["width", "width"], ["GMACs", "GMACs of an image"], ["parameters", "parameters"]]
    axes.append(["latency, ms", _latency_axis(section)])
    note = " ".join(
        f"Published: {curve.name} ({curve.source}{'; ~ read off a figure' if curve.figure else ''})."
        for curve, _ in known.values()
    )
    return {
        "title": "By width",
        "y": _axis(section),
        "log": False,
        "xs": [axis for axis in axes if any(axis[0] in one["x"] for one in series)],
        "lines": True,
        "note": note,
        "series": series,
    }


def _widths(group: Group, widths: Sequence[str]) -> dict[str, Any]:
    found = [result for width in widths if (result := group.mean(width_of(width)))]
    x: dict[str, Any] = {"width": [float(width) for width in widths]}
    for key, value in {"GMACs": gmacs, "parameters": lambda w: cost("parameters", w), "latency, ms": latency}.items():
        means = [group.mean(value(width)) for width in widths]
        if all(means):
            x[key] = [_digits(each.mean) for each in means if each]
    return {"x": x} | _spread(found)


def _published(curve: published.Published, macs: dict[str, float]) -> dict[str, Any]:
    widths = sorted(curve.top1, key=float)
    x: dict[str, Any] = {"width": [float(width) for width in widths]}
    if all(width in macs for width in widths):
        x["GMACs"] = [_digits(macs[width]) for width in widths]
    signs = ["~" if width in curve.figure else "" for width in widths]
    return {
        "group": -1,
        "name": f"published: {curve.name}",
        "x": x,
        "y": [curve.top1[w] for w in widths],
        "sign": signs,
    }


def _by_submodules(section: Section) -> Plot:
    series = []
    for place, group in enumerate(section.groups):
        for run in group.runs:
            if rows := run.subsets.get(section.data.test):
                sizes = sorted({len(row.subset) for row in rows})
                scores = [[row.top1 for row in rows if len(row.subset) == size] for size in sizes]
                series.append(
                    {"group": place, "name": run.name, "x": {"submodules": sizes}}
                    | {"y": [_digits(mean(each)) for each in scores]}
                    | {"low": [_digits(min(each)) for each in scores], "high": [_digits(max(each)) for each in scores]}
                )
    return {
        "title": "By submodules present",
        "note": "Means over subsets of the submodules; bars from the lowest to the highest.",
        "y": _axis(section),
        "log": False,
        "xs": [["submodules", "submodules that answer"]],
        "lines": True,
        "series": series,
    }


def _curve(section: Section, name: str) -> Plot:
    val = section.data.val
    usual = _CURVES | {
        f"{val}/loss": (f"Loss on {val}", "cross-entropy, nats", True),
        f"{val}/top1": (f"Accuracy on {val}", f"top-1 on {val}, %", False),
        f"ema/{val}_top1": (f"Accuracy on {val}, averaged weights", f"top-1 on {val}, %", False),
    }
    title, axis, log = usual.get(name, (name, name, "loss" in name))
    series = [
        {"group": place, "name": run.name} | _points(run, run.curves[name])
        for place, group in enumerate(section.groups)
        for run in group.runs
        if name in run.curves
    ]
    return {"title": title, "y": axis, "log": log, "xs": STEPS, "lines": True, "metric": name, "series": series}


def _points(run: Outcome, curve: Thinned) -> dict[str, Any]:
    """per_epoch: steps, from which the page has epochs."""
    x = {"step": curve.steps, "hours": rounded(curve.hours, 4)}
    per_epoch = run.summary.steps_per_epoch if run.summary else 0
    return {"x": x, "y": rounded(curve.values, 5)} | ({"per_epoch": per_epoch} if per_epoch else {})
