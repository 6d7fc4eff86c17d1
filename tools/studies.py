"""Keeps what a study found: `python -m tools.studies recipes/studies/NAME/sweep.toml [run.root=FOLDER ...]`.

Reads the finished cells of a sweep, with the keys that it was started with, into `sweep.json` beside its file: all that
the repository has of the runs. Tables, plots and the overview in docs/results.md are written from these files, here and
by `python -m tools.docs`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from hsvit_ds.errors import RefusedError, counted
from hsvit_ds.results import present
from hsvit_ds.results.comparison import Mean
from hsvit_ds.run import table
from hsvit_ds.run.summary import Summary
from hsvit_ds.sweeps import cells
from hsvit_ds.sweeps.cells import Cell, Sweep
from hsvit_ds.sweeps.estimate import work

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "recipes/studies"
SEED = "run.seed"
WIDTH, OF = "width ", " of "
"""What a score is of, beside "", the largest width of all submodules: a width, so many of the submodules, or
both; and a width that was never trained."""
MOST = 12
"""Scores in a line of a table; of more those that every line has, as the plot has them all."""
TOP1 = "top-1, %"
PLAIN = "as the recipe is"
FEW = 4
"""Rows of a study that the overview names all."""


def collect(sweep: Sweep) -> dict[str, Any]:
    """What is kept of a sweep: a row for the cells that differ in their seed alone.

    Raises:
        RefusedError: some cells are not finished, or are of other commits than the rest.
    """
    if missing := [cell.name for cell in sweep.cells if not cell.is_finished]:
        raise RefusedError(f"{sweep.folder}: {counted(len(missing), 'cell')} not finished: {', '.join(missing)}")
    found = [(cell, summary) for cell in sweep.cells if (summary := cell.summary)]
    commits = {f"{summary.commit[:12]}{' and changes' * summary.dirty}" for _, summary in found}
    if len(commits) > 1:
        raise RefusedError(f"{sweep.folder}: its cells are of several commits: {', '.join(sorted(commits))}")
    varied, rows = _varied(sweep.cells), dict[str, list[tuple[Cell, Summary]]]()
    for cell, summary in found:
        values = {key: value for key, value in _keys(cell).items() if key in varied}
        name = [table.run_name(cell.path)] * (len({cell.path for cell in sweep.cells}) > 1)
        label = ", ".join(name + [f"{table.short(key, varied)}={table.text(v)}" for key, v in values.items()])
        rows.setdefault(label or PLAIN, []).append((cell, summary))
    first, kept_rows = found[0][1], [{"label": label} | _row(runs, varied) for label, runs in rows.items()]
    if any(name.startswith(WIDTH) for row in kept_rows for name in row["top1"]):
        for row in kept_rows:  # a network of one width has no accuracy by width
            row["top1"].setdefault(f"{WIDTH}{row['width']}", row["top1"][""])
    return {
        "commit": commits.pop(),
        "device": first.device,
        "cores": first.cores,
        "gpus": first.gpus,
        "torch": first.versions.get("torch", ""),
        "data": {"name": first.data.name, "split": first.data.test, **first.data.counts},
        "rows": kept_rows,
    }


def _keys(cell: Cell) -> dict[str, Any]:
    return {".".join(parts): value for parts, value in map(table.split, cell.overrides)}


def _varied(all_cells: Sequence[Cell]) -> list[str]:
    """Keys that do not have one value in all cells, but for the seed."""
    keys = [_keys(cell) for cell in all_cells]
    names = dict.fromkeys(key for one in keys for key in one)
    alike = {key for key in names if len({repr(one.get(key)) for one in keys}) == 1}
    return [key for key in names if key not in (*alike, SEED, "run.name", "run.root")]


def _row(runs: Sequence[tuple[Cell, Summary]], varied: Sequence[str]) -> dict[str, Any]:
    """Of the runs of one row: a value for each seed, rounded to what a table shows twice over."""
    (cell, summary), scores = runs[0], dict[str, list[float]]()
    for cell_, one in runs:
        split = one.data.test
        for name, value in one.metrics.items():
            if name == f"{split}/top1":
                scores.setdefault("", []).append(round(value, 4))
            elif name.startswith(f"{split}/top1_w"):
                scores.setdefault(f"{WIDTH}{name.partition('_w')[2]}", []).append(round(value, 4))
        for width, top1 in _untrained(cell_.folder, split).items():
            scores.setdefault(f"{WIDTH}{width}, untrained", []).append(top1)
        for width in ("", *(cost.width for cost in one.costs)):
            for subsets in present.of_folder(cell_.folder, width).values():
                counts = sorted({len(row.subset) for row in subsets})
                for count in counts[:-1] if width else counts:  # all of them are the width itself
                    of_count = [row.top1 for row in subsets if len(row.subset) == count]
                    name = f"{WIDTH}{width}, " * bool(width) + f"{count}{OF}{counts[-1]}"
                    scores.setdefault(name, []).append(round(mean(of_count), 4))
    keys = {key: value for key, value in _keys(cell).items() if key in varied}
    costs = summary.costs[-1]
    return {
        "keys": keys,
        "seeds": [cell.recipe.run.seed for cell, _ in runs],
        "top1": scores,
        "width": costs.width,
        "parameters": costs.parameters,
        "macs": costs.macs,
        "training_macs": round(work(cell)),
    }


def _untrained(folder: Path, split: str) -> dict[str, float]:
    """Top-1 in % of widths that the run never trained, as `hsvit evaluate --untrained` left it."""
    found: dict[str, float] = {}
    for path in sorted(folder.glob(f"evaluate-widths-{split}-*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            found |= {row["width"]: float(row["top1"]) for row in csv.DictReader(file) if row["trained"] == "no"}
    return found


def words(values: Sequence[float]) -> str:
    """97.94 ± 0.32, the sample's deviation; of one value no deviation."""
    middle, deviation = _bar(values)
    return f"{middle:.2f}" + (f" ± {deviation:.2f}" if len(values) > 1 else "")


def markdown(found: Mapping[str, Any], picture: str) -> str:
    """The tables of a study, and its plot."""
    data, rows = found["data"], found["rows"]
    seeds = sorted({len(row["seeds"]) for row in rows})
    runs = f"{counted(seeds[0], 'seed')}, mean ± sample deviation" if seeds[-1] > 1 else "one seed"
    hardware = counted(found["gpus"], "GPU") if found["gpus"] else f"{counted(found['cores'], 'core')} a run"
    lines = [
        f"Top-1 in % on {data['split']} of {data['name']} ({counted(data[data['split']], 'image')}; "
        f"{data['train']:,} to train on), {runs}. {found['device']}, {hardware}, torch {found['torch']}, "
        f"commit {found['commit']}.",
        "",
        *(_matrix(rows) or _list(rows)),
        "",
        f"![{found['data']['name']}: top-1]({picture})",
    ]
    return "\n".join(lines) + "\n"


def _list(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row["top1"]))
    if len(columns) > 1:  # the largest width is among them
        columns = [name for name in columns if name]
    if len(columns) > MOST:
        columns = [name for name in columns if all(name in row["top1"] for row in rows)]
    heads = ["", *(name or "top-1" for name in columns), "parameters", "GMACs", "training, TMACs"]
    yield f"| {' | '.join(heads)} |"
    yield f"| --- |{' ---: |' * (len(heads) - 1)}"
    for row in rows:
        scores = [words(row["top1"][name]) if name in row["top1"] else "" for name in columns]
        costs = [f"{row['parameters']:,}", f"{row['macs'] / 1e9:.4f}", f"{row['training_macs'] / 1e12:.2f}"]
        yield f"| {' | '.join([row['label'], *scores, *costs])} |"


def _axes(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """(down, across), the two keys of a full grid of single values."""
    keys = list(dict.fromkeys(key for row in rows for key in row["keys"]))
    if len(keys) != 2 or any(len(row["keys"]) < 2 or set(row["top1"]) != {""} for row in rows):
        return None
    sizes = [len({repr(row["keys"][key]) for row in rows}) for key in keys]
    return (keys[0], keys[1]) if sizes[0] * sizes[1] == len(rows) and min(sizes) > 1 else None


def _matrix(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = _axes(rows)
    if found is None:
        return []
    down, across = found
    values = {tuple(table.text(row["keys"][key]) for key in found): words(row["top1"][""]) for row in rows}
    columns = list(dict.fromkeys(pair[1] for pair in values))
    lines = [
        f"| {table.short(down, found)} \\ {table.short(across, found)} | {' | '.join(columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for value in dict.fromkeys(pair[0] for pair in values):
        lines.append(f"| {value} | {' | '.join(values[value, column] for column in columns)} |")
    return lines


def picture(found: Mapping[str, Any]) -> str:
    """The plot of a study as SVG: a line a row over widths or submodules, a line a value of a grid, or bars."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context({"svg.hashsalt": "hsvit-ds", "font.size": 9}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes, rows, pair = figure.subplots(), found["rows"], _axes(found["rows"])
        if pair:
            down, across = (table.short(key, pair) for key in pair)
            for line in dict.fromkeys(table.text(row["keys"][pair[1]]) for row in rows):
                own = [row for row in rows if table.text(row["keys"][pair[1]]) == line]
                values = [table.text(row["keys"][pair[0]]) for row in own]
                axes.plot(values, [row["top1"][""][0] for row in own], "o-", label=f"{across} {line}")
            axes.set(xlabel=down, ylabel=TOP1)
            figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        elif any(len(row["top1"]) > 1 for row in rows):
            for row in rows:
                for label, scores in _lines(row).items():
                    points, bars = zip(*map(_bar, scores.values()), strict=True)
                    axes.errorbar([*scores], points, bars, marker="o", capsize=2, label=textwrap.fill(label, 48))
            by_width = any(name.startswith(WIDTH) for row in rows for name in row["top1"])
            axes.set(xlabel="width" if by_width else "submodules that answer", ylabel=TOP1)
            if not by_width:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        else:
            points, bars = zip(*(_bar(row["top1"][""]) for row in rows), strict=True)
            axes.errorbar(points, [row["label"] for row in rows], xerr=bars, fmt="o", capsize=2)
            axes.invert_yaxis()
            axes.set(xlabel=TOP1)
        axes.grid(alpha=0.3)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _lines(row: Mapping[str, Any]) -> dict[str, dict[float, list[float]]]:
    """Scores over widths or submodules, by label: of all submodules, and of so many of them."""
    lines: dict[str, dict[float, list[float]]] = {}
    for name, values in row["top1"].items():
        at, comma, subset = name.removeprefix(WIDTH).partition(",")
        if at:
            lines.setdefault(row["label"] + comma + subset, {})[float(at.partition(OF)[0])] = values
    return lines


def _bar(values: Sequence[float]) -> tuple[float, float]:
    """(mean, sample deviation, 0 of one value)."""
    found = Mean.of(values)
    assert found is not None
    return found.mean, found.std or 0.0


def kept() -> Iterator[tuple[Path, dict[str, Any]]]:
    """(sweep's file, what it found) of every study that was run."""
    for path in sorted(STUDIES.glob("*/*.json")):
        yield path.with_suffix(".toml"), json.loads(path.read_text("utf-8"))


def overview() -> str:
    """A row for every study that was run: what it asks, and what it found, whole or from the lowest to the highest."""
    lines = ["| study | of | runs | top-1, % |", "| --- | --- | ---: | --- |"]
    for path, found in kept():
        rows = [(row["label"], row["top1"][""]) for row in found["rows"]]
        runs = sum(len(row["seeds"]) for row in found["rows"])
        if len(rows) > FEW:
            low, high = min(rows, key=lambda row: mean(row[1])), max(rows, key=lambda row: mean(row[1]))
            rows, joint = [low, high], " … "
        else:
            joint = "; "
        scores = joint.join(f"{label}: {words(values)}" for label, values in rows)
        what = "" if path.stem == "sweep" else f", {path.stem}"
        name = f"[{path.parent.name}{what}](../{path.parent.relative_to(ROOT)}/README.md)"
        lines.append(f"| {name} | {question(path)} | {runs} | {scores} |")
    return "\n".join(lines) + "\n"


def question(path: Path) -> str:
    """What a sweep's file says first: its comment to an empty line or the command."""
    lines = [line.removeprefix("# ") for line in path.read_text("utf-8").splitlines()]
    return " ".join(lines[: next(n for n, line in enumerate(lines) if line == "#" or line.startswith("Command:"))])


def main() -> None:
    parser = argparse.ArgumentParser("tools.studies", description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    found = collect(cells.read(given.sweep, given.overrides))
    out = given.sweep.with_suffix(".json")
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(out)


if __name__ == "__main__":
    main()
