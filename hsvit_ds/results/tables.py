"""What a comparison says as tables: of groups, as Markdown, of runs, as CSV, and all of it, as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .comparison import ENOUGH, MISSING, Comparison, Group, Mean, Section, Value
from .outcome import Outcome

MARKS = {
    "html": '<meta name="generator" content="hsvit compare">',
    "md": "<!-- hsvit compare -->",
    "csv": "run,group,where,state,why,",
    "json": '"program": "hsvit compare"',
}
"""By which a file of ours is known, near its beginning."""


TEST = f"Welch's t-test against the best group, of groups of {ENOUGH} runs and more; not corrected for several tests"


@dataclass(frozen=True)
class Column:
    """A number of each run. meaning: of its title. exact: the same in every run, so that no deviation is told."""

    title: str
    value: Value
    form: Callable[[float], str]
    meaning: str
    exact: bool = False

    def text(self, found: Mean | None, runs: int) -> str:
        """ "98.31 ± 0.24"; with n where some of the runs lack it."""
        if found is None:
            return MISSING
        few = f" (n = {found.n})" if found.n < runs else ""
        std = found.std if found.std is None or found.std > 1e-9 * abs(found.mean) else 0.0  # or it is rounding alone
        if std is None or (self.exact and not std):
            return self.form(found.mean) + few
        form = self.form
        if form is number and 0 < std < 10:  # to two digits of the deviation
            places = 1 - math.floor(math.log10(std))

            def form(value: float) -> str:
                return f"{value:.{places}f}"

        return f"{form(found.mean)} ± {form(std)}{few}"

    def cell(self, group: Group) -> str:
        return self.text(group.mean(self.value), len(group.runs))


def percent(value: float) -> str:
    return f"{value:.2f}"


def number(value: float) -> str:
    """Four digits that count, without an exponent where that is readable."""
    if value and abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def form_of(metric: str) -> Callable[[float], str]:
    return percent if "top1" in metric or "top5" in metric else number


def last(metric: str) -> Value:
    return lambda run: run.last.get(metric)


def width_of(width: str) -> Value:
    return lambda run: run.widths.get(width)


def cost(kind: str, width: str = "") -> Value:
    """kind: macs or parameters, of a width or the largest."""

    def value(run: Outcome) -> float | None:
        found = [entry for entry in run.costs if entry.width == width or not width]
        return float(getattr(found[-1], kind)) if found else None

    return value


def gmacs(width: str = "") -> Value:
    macs = cost("macs", width)
    return lambda run: None if (found := macs(run)) is None else found / 1e9


def latency(width: str = "") -> Value:
    """Of a width or the largest, ms."""

    def value(run: Outcome) -> float | None:
        ms = run.latency.ms if run.latency else {}
        return ms.get(width) if width else next(reversed(ms.values()), None)

    return value


def typical(metric: str, scale: float = 1.0) -> Value:
    return lambda run: None if (found := run.typical.get(metric)) is None else scale * found


def device_hours(kind: str) -> Value:
    return lambda run: run.device_hours(kind)


def hours(run: Outcome) -> float | None:
    return run.hours


def results(section: Section, metrics: Sequence[str] = ()) -> list[Column]:
    """What the runs reached: the result, at the smallest width and half of it where there are widths, and the best."""
    val, result = section.data.val, section.result
    best = f"{val}/top1"
    widths = list(dict.fromkeys(width for run in section.runs for width in run.widths))
    some = sorted({min(widths, key=float), *({"0.50"} & set(widths))}, key=float) if widths else []
    averaged = f"ema/{section.data.test}_top1"

    def best_of(run: Outcome) -> float | None:
        return run.best[best][0] if best in run.best else None

    def best_epoch(run: Outcome) -> float | None:
        return run.epoch(run.best[best][1]) if best in run.best else None

    columns = [Column(result, last(result), percent, f"accuracy on {section.data.test} at the end, %")]
    for width in some:
        meaning = f"the same at width {width}, %; {result} is the largest width's"
        columns.append(Column(f"{result}_w{width}", width_of(width), percent, meaning))
    columns.append(Column(averaged, last(averaged), percent, "the same with averaged weights, %"))
    columns.append(Column(f"best {best}", best_of, percent, f"the highest accuracy on {val} of any epoch, %"))
    columns.append(Column("after epoch", best_epoch, number, "the epoch that it was measured after"))
    columns += [Column(name, last(name), form_of(name), "its last value") for name in metrics]
    return _there(columns, section, (result, f"best {best}"))


def costs(section: Section) -> list[Column]:
    """What the runs took, and what their networks take."""
    kinds = {
        "comm/exchange_bytes": ("exchanged", "CLS sums between submodules"),
        "comm/feature_bytes": ("maps", "a backbone's maps and their gradients"),
        "comm/gradient_bytes": ("gradients", "gradients between replicas"),
        "comm/norm_bytes": ("statistics", "BatchNorm's statistics"),
        "comm/data_bytes": ("images", "images between the ranks of a replica"),
    }
    columns = [
        Column("hours", hours, number, "of training, evaluations and pauses for saving included, without downtime"),
        Column("images/s", typical("perf/images_per_sec"), whole, "median of the training speeds that were logged"),
        Column("GMACs", gmacs(), number, "billions of multiply-adds of one image, of the largest width", True),
        Column("parameters", cost("parameters"), whole, "of the largest width", True),
        *(
            Column(f"{kind} hours", device_hours(kind), number, f"hours times {kind}s that computed")
            for kind in ("GPU", "core")
        ),
        Column("data wait, %", typical("perf/data_wait", 100), number, "share of a step that waits for images, median"),
        Column("latency, ms", latency(), number, "of one image, of the largest width, median, on this machine"),
        *(
            Column(f"{name}, kB a step", typical(metric, 1e-3), number, f"{meaning}, that a rank sends in a step", True)
            for metric, (name, meaning) in kinds.items()
        ),
    ]
    columns = [column for column in columns if "kB" not in column.title or any(map(column.value, section.runs))]
    return _there(columns, section, ("hours", "images/s", "GMACs", "parameters"))


def _there(columns: list[Column], section: Section, always: tuple[str, ...]) -> list[Column]:
    return [
        column
        for column in columns
        if column.title in always or any(column.value(run) is not None for run in section.runs)
    ]


def runs_in(group: Group) -> str:
    """How many were averaged, or what became of the one that is not finished."""
    return group.mark or str(len(group.runs))


def tested(section: Section) -> dict[str, list[str]]:
    """Columns of a group's table: how far each is behind the best, and how sure that is; {} where too few runs tell."""
    tests = {id(test.second): test for test in section.tests()}
    if not tests:
        return {}
    found = [tests.get(id(group)) for group in section.groups]
    return {
        "to the best": [MISSING if test is None else f"{-test.difference:+.2f}" for test in found],
        "p": [MISSING if test is None or test.p is None else f"{test.p:.2g}" for test in found],
    }


def rows_of(section: Section, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """(Titles, a row of texts for each group): the columns, with what tests tell behind the first."""
    tests = tested(section)
    titles = [column.title for column in columns]
    rows = []
    for place, group in enumerate(section.groups):
        cells = [column.cell(group) for column in columns]
        rows.append([cells[0], *(texts[place] for texts in tests.values()), *cells[1:]])
    return [titles[0], *tests, *titles[1:]], rows


def markdown(found: Comparison) -> str:
    """The groups' tables, as a document has them."""
    parts = [MARKS["md"]]
    for section in found.sections:
        columns = [*results(section, found.metrics), *costs(section)]
        titles, cells = rows_of(section, columns)
        head, rows = (
            ["", "n", *titles],
            [[group.label, runs_in(group), *line] for group, line in zip(section.groups, cells, strict=True)],
        )
        words = [f"### {_plain(section.data.words)}", f"{_plain(section.data.details)}."]
        parts += ["\n\n".join(words), _md_table(head, rows), *([f"p: {TEST}."] if "p" in titles else [])]
    if found.trained:
        head = ["key", *(group.label for group in found.groups)]
        parts += ["### What differs", _md_table(head, [[d.key, *d.values] for d in found.trained])]
    return "\n\n".join(parts) + "\n"


def _md_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(text: str) -> str:
    """Without what Markdown or HTML would take for its own."""
    for special in "\\|`<>[]":
        text = text.replace(special, "&lt;" if special == "<" else f"\\{special}")
    return " ".join(text.split())


def raw(found: Comparison) -> list[dict[str, Any]]:
    """Every run with every number, as it is."""
    seed = "run.seed"
    keys = [seed, *(difference.key for difference in (*found.trained, *found.placed))]
    rows = []
    for section in found.sections:
        for group in section.groups:
            for run in group.runs:
                record, data = run.record, section.data
                rows.append(
                    {"run": run.name, "group": group.label, "where": record.where, "state": record.state}
                    | {"why": record.why, "data": data.name, "fingerprint": data.fingerprint}
                    | {"val": data.val, "test": data.test}
                    | {f"images in {split}": count for split, count in data.counts}
                    | {key: run.recipe.get(key) for key in keys}
                    | run.last
                    | _best(run)
                    | _costs(run)
                )
    return rows


def _best(run: Outcome) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, (value, step) in run.best.items():
        found |= {f"best {name}": value, f"best {name} step": step}
    return found


def _costs(run: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = {f"median {name}": value for name, value in run.typical.items()}
    found |= {"hours": run.hours, "GPU hours": run.device_hours("GPU"), "core hours": run.device_hours("core")}
    for entry in run.costs:
        found |= {f"parameters_w{entry.width}": entry.parameters, f"macs_w{entry.width}": entry.macs}
        found[f"expected_epochs_w{entry.width}"] = entry.epochs
    if run.latency:
        found |= {"latency on": run.latency.where}
        found |= {f"latency_ms_w{width}": ms for width, ms in run.latency.ms.items()}
    return found


def as_csv(found: Comparison) -> str:
    rows = raw(found)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_json(found: Comparison) -> str:
    """Numbers that are not finite are null."""
    sections = [
        {
            "data": asdict(section.data) | {"counts": dict(section.data.counts)},
            "groups": [_group(group, [*results(section, found.metrics), *costs(section)]) for group in section.groups],
            "tests": [
                {"first": t.first.label, "second": t.second.label, "difference": t.difference, "p": t.p}
                for t in section.tests()
            ],
        }
        for section in found.sections
    ]
    differs = {name: {d.key: d.values for d in getattr(found, name)} for name in ("trained", "placed")}
    curves = {run.name: {name: asdict(curve) for name, curve in run.curves.items()} for run in found.runs}
    labels = [group.label for group in found.groups]
    everything = {
        "program": "hsvit compare",
        "groups": labels,
        "differs": differs,
        "sections": sections,
        "runs": raw(found),
        "curves": curves,
    }
    return json.dumps(finite(everything), indent=1, allow_nan=False) + "\n"


def _group(group: Group, columns: Sequence[Column]) -> dict[str, Any]:
    means = {column.title: group.mean(column.value) for column in columns}
    return {
        "label": group.label,
        "state": group.mark or "finished",
        "runs": [run.name for run in group.runs],
        "means": {title: asdict(found) if found else None for title, found in means.items()},
    }


def finite(value: Any) -> Any:
    """With None for each number that JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
