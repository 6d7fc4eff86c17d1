"""What a folder of results holds, written to where it is read: kernels/results/, docs/performance.md, the recipes."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hsvit_ds.errors import counted
from tools.benchmarks import kernels as benchmarks
from tools.pages import filled

from .counters import KEPT
from .ledger import FILE
from .steps import PARTS
from .training import GOAL

ROOT = Path(__file__).parents[2]
Steps = dict[str, dict[str, Any]]


def write(out: Path) -> list[str]:
    """The files written. A rehearsal's report stays in its own folder.

    Raises:
        SystemExit: there are no results.
    """
    file = out / FILE
    if not file.exists():
        sys.exit(f"{file}: no such file; python -m tools.gpu all --out {out}")
    found = json.loads(file.read_text())
    machine, parts = found["machine"], found["parts"]
    toy = machine["device"].startswith("interpreter")
    root = out / "report" if toy else ROOT
    model = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    results = root / "kernels/results"
    written = [results / model / FILE, root / "docs/performance.md"]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, written[0])
    measured = "\n".join(page(machine, parts)) + "\n"
    written[1].write_text(filled((ROOT / "docs/performance.md").read_text(), measured))
    if rows := list(kernel_rows(machine, parts.get("benchmarks", {}))):
        written += [results / "kernels.csv", results / "roofline.png"]
        with written[-2].open("w", newline="") as table:
            writer = csv.DictWriter(table, benchmarks.COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        roofs = next(r["figures"]["roofs"] for r in parts["benchmarks"].values() if "roofs" in r["figures"])
        benchmarks.draw_roofline(rows, benchmarks.Roofs(**roofs), written[-1])
    if curves := [(n, r["figures"]) for n, r in parts.get("training", {}).items() if r["figures"].get("top1")]:
        written.append(root / "docs/training.png")
        draw_training(curves, machine["device"], written[-1])
        recipes = root / "recipes/cifar10/README.md"
        recipes.parent.mkdir(parents=True, exist_ok=True)
        recipes.write_text(with_results((ROOT / "recipes/cifar10/README.md").read_text(), curves, machine["device"]))
        written.append(recipes)
    tuned = out / "configurations.json"
    if tuned.exists() and not toy:
        written.append(ROOT / "kernels/hsvit_kernels/configurations.json")
        shutil.copy(tuned, written[-1])
    return [str(path) for path in written]


def kernel_rows(machine: dict[str, Any], steps: Steps) -> Iterator[dict[str, Any]]:
    about = {name: machine[name] for name in ("device", "torch", "triton")}
    for record in steps.values():
        for row in record["figures"].get("rows", []):
            yield dict.fromkeys(benchmarks.COLUMNS, "") | about | row


# The page's last part


def page(machine: dict[str, Any], parts: dict[str, Steps]) -> Iterator[str]:
    yield "Measured by `make gpu` on:"
    yield ""
    yield from _table(["", ""], ([name, str(value)] for name, value in machine.items()))
    for part, steps in PARTS.items():
        yield from ("", f"### {part.capitalize()}", "")
        records = parts.get(part, {})
        states = []
        for name in steps:
            record = records.get(name, {"state": "not run", "seconds": "", "why": ""})
            states.append([name, record["state"], str(record["seconds"]), record["why"].replace("|", "/")])
        yield from _table(["step", "state", "seconds", ""], states)
        for name, record in records.items():
            yield from SECTIONS[part](name, record["figures"])
        if part == "training" and any(record["figures"].get("top1") for record in records.values()):
            yield from ("", f'![Top-1 over the steps](training.png "CIFAR-10 on {machine["device"]}")')


def _table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _correctness(name: str, figures: dict[str, Any]) -> Iterator[str]:
    if "passed" in figures:
        yield from ("", f"{name}: " + ", ".join(f"{figures[k]} {k}" for k in ("passed", "failed", "skipped")) + ".")
    if verdicts := figures.get("verdicts"):
        yield ""
        yield from _table(
            ["place", "verdict", "kernel, ms", "PyTorch, ms", "error, of what is allowed"],
            (
                [place, v["state"], *(f"{v.get(k) or 0:.3g}" for k in ("ms", "reference_ms", "excess"))]
                for place, v in verdicts.items()
            ),
        )


def _tuning(_name: str, figures: dict[str, Any]) -> Iterator[str]:
    if tuned := figures.get("tuned"):
        yield ""
        rows = ([place, found["said"].removeprefix(f"{place}: ")] for place, found in tuned.items())
        yield from _table(["place", "fastest"], rows)


def _benchmarks(_name: str, figures: dict[str, Any]) -> Iterator[str]:
    if kernels := figures.get("kernels"):
        yield from ("", "Nsight Compute, a step of B512 G16 T33 D64 L8; waits: % of the samples of its warps:", "")
        cells = ([k["kernel"], *(str(k.get(name, "")) for name in KEPT), _largest(k["waits"])] for k in kernels)
        yield from _table(["kernel", *KEPT, "waits"], cells)
    for operation, shape in dict.fromkeys((row["operation"], row["shape"]) for row in figures.get("rows", [])):
        names = ["passes", "dropout", "implementation", "ms p50", "TFLOP/s", "% of roof", "error"]
        rows = [row for row in figures["rows"] if row["shape"] == shape]
        yield from ("", f"{operation}, {shape}:", "")
        yield from _table(names, ([_timed(name, row.get(name, "")) for name in names] for row in rows))


def _largest(waits: dict[str, float]) -> str:
    return ", ".join(f"{name} {share}" for name, share in list(waits.items())[:6])


def _timed(name: str, value: Any) -> str:
    """A rehearsal has nothing but zeros."""
    return "not timed" if value == 0 and name in ("ms p50", "TFLOP/s", "% of roof", "ms", "images/s") else str(value)


def _training(name: str, figures: dict[str, Any]) -> Iterator[str]:
    if not figures.get("top1"):
        return
    reached = figures[f"seconds to {GOAL}"]
    yield ""
    yield (
        f"`{name}.toml`: {figures['last']:.2f} % after {counted(figures['steps'], 'step')} in {figures['seconds']} s; "
        f"{GOAL} %: {'not reached' if reached is None else f'after {reached} s'}."
    )


def _scala(name: str, figures: dict[str, Any]) -> Iterator[str]:
    if ways := figures.get("ways"):
        yield from ("", f"{name}, four widths, batch {figures['batch']}:", "")
        names = ["ms", "images/s", "GiB"]
        yield from _table(["", *names], ([way, *(_timed(n, row[n]) for n in names)] for way, row in ways.items()))


def _operation(name: str) -> str:
    """A kernel's name without what a template was given."""
    return name.removeprefix("void ").replace("(anonymous namespace)::", "").partition("<")[0]


def _end_to_end(name: str, figures: dict[str, Any]) -> Iterator[str]:
    if "host" in figures:
        for clock in ("device", "host"):
            yield from ("", f"Profile of ten steps of fast.toml, by the {clock}'s own time:", "")
            rows = ([_operation(row["name"]), str(row["calls"]), str(row["ms"])] for row in figures[clock])
            yield from _table(["operation", "calls", "ms"], rows)
    elif figures:
        said = (f"{key.removeprefix('perf/')} {value:.4g}" for key, value in figures.items() if key.startswith("perf/"))
        yield from ("", f"{name}: {', '.join(said)}.")


SECTIONS = dict(zip(PARTS, (_correctness, _tuning, _end_to_end, _benchmarks, _scala, _training), strict=True))


# The recipes


def with_results(text: str, curves: list[tuple[str, dict[str, Any]]], device: str) -> str:
    """The recipes' table with what was reached in its last two columns."""
    for name, figures in curves:
        cells = f" {figures['last']:.2f} after {counted(figures['steps'], 'step')} | {figures['seconds']} s, {device} |"
        pattern = rf"^(\| `{name}\.toml`[^|]*\| [\d,]+ \|[^|]*\|).*\|$"
        text, count = re.subn(pattern, rf"\g<1>{cells}", text, flags=re.M)
        if count != 1:
            sys.exit(f"recipes/cifar10/README.md has {count} rows of {name}.toml, not one")
    return text


def draw_training(curves: list[tuple[str, dict[str, Any]]], device: str, file: Path) -> None:
    """Top-1 over the steps of every run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, figures in curves:
        for key in sorted({key for row in figures["top1"] for key in row} - {"step"}):
            points = [(row["step"], row[key]) for row in figures["top1"] if key in row]
            if points:
                averaged = key.startswith("ema")
                label = f"{name}.toml{', averaged weights' if averaged else ''}"
                axes.plot(*zip(*points, strict=True), "--" if averaged else "-", marker=".", label=label)
    axes.axhline(GOAL, color="0.6", linewidth=1, label=f"published: {GOAL} %")
    axes.set(xlabel="steps", ylabel="top-1, %", title=f"CIFAR-10 on {device}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
