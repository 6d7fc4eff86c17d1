"""A comparison as one HTML file that needs nothing else: tables that can be sorted, plots that answer."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape

from ..errors import counted
from . import page_plots, sheet, tables
from .comparison import ENOUGH, MISSING, Comparison, Difference, Group, Section
from .outcome import Outcome
from .tables import Column

SHOWN = 10
"""Groups that are drawn at first; the others when they are asked for."""
OPEN = 24
"""Rows up to which a table is open at first."""
_DASHES = ("", "7 4", "2 3", "7 3 2 3", "11 4")
_SYMBOLS = (
    '<circle cx="17" cy="6" r="4"/>',
    '<rect x="13" y="2" width="8" height="8"/>',
    '<path d="M17 1l5 5-5 5-5-5z"/>',
    '<path d="M17 1l5 9H12z"/>',
    '<path d="M13 2l8 8m0-8l-8 8" stroke-width="3"/>',
    '<path d="M17 1v10m-5-5h10" stroke-width="3"/>',
    '<path d="M17 11l5-9H12z"/>',
    '<path d="M17 0l1.6 4.2 4.4.2-3.5 2.7 1.2 4.3L17 9l-3.7 2.4 1.2-4.3L11 4.4l4.4-.2z"/>',
)
_MEANINGS = {
    "±": "standard deviation over the runs of a group, of the sample (divided by n − 1); a group of one run has none",
    "n": "runs of a group: seeds of one recipe, unless the report was made by other keys",
    "top-1": "share of the images whose label is the network's first answer, %; top-5: among its first five",
    "w0.25, width": "a subnet's share of the channels; top-1 alone is that of the largest",
    "best": "of the epoch with the highest top-1 on the split that chooses the best checkpoint",
    "GMACs": "billions of multiply-adds of one image; the Scala paper calls them GFLOPs",
    "GPU hours, core hours": "hours of training times the GPUs, or the CPU cores, that computed",
    "data wait": "share of a step's time that the step waits for its images",
    "gradient norm": "of all gradients of a step, before clipping",
    "submodules": "shares of an HSViT, one a rank; its accuracy with some of them absent",
    "to the best": f"points of the result behind the best group, both of {ENOUGH} runs and more",
    "p": "how likely so large a difference is where there is none",
    MISSING: "not known, or not there",
}


def html(found: Comparison) -> str:
    from plotly.offline import get_plotlyjs

    data, parts = [], []
    for number, section in enumerate(found.sections):
        drawn = page_plots.of(section, found)
        parts.append(_section(found, section, number, drawn))
        groups = [{"shown": place < SHOWN} for place in range(len(section.groups))]
        data.append({"groups": groups, "plots": [plot for plots in drawn.values() for plot in plots]})
    scripts = f"""<script>{get_plotlyjs()}</script>
<script type="application/json" id="data">{sheet.script_json(data)}</script>
<script>
{sheet.asset("page.js")}</script>"""
    return sheet.document(
        f"{counted(len(found.runs), 'run')} compared",
        f"{_what(found)}, {time.strftime('%Y-%m-%d %H:%M')}",
        "\n".join([_notes(found), *parts, _differences(found)]),
        _meanings(found).items(),
        tables.MARKS["html"],
        "page.css",
        scripts,
    )


def _what(found: Comparison) -> str:
    by = f"by {', '.join(found.by)}" if found.by else "seeds of one recipe together"
    return f"{counted(len(found.groups), 'group')}, {by}"


def _meanings(found: Comparison) -> dict[str, str]:
    columns = {
        column.title: column.meaning
        for section in found.sections
        for column in (*tables.results(section, found.metrics), *tables.costs(section))
    }
    return columns | _MEANINGS


def _notes(found: Comparison) -> str:
    """What a reader must know before the numbers."""
    notes = []
    for run in found.runs:
        record = run.record
        if not run.is_finished:
            why = f": {record.why}" if record.why else ""
            notes.append(f"{run.name} is not finished ({record.state}{why}): it is in no mean")
        if not run.last:
            notes.append(f"{run.name} has no metrics")
        if run.lost:
            which = ", ".join(map(str, run.lost[:3])) + (", …" if len(run.lost) > 3 else "")
            notes.append(f"{run.name}: {counted(len(run.lost), 'line')} of its metrics cannot be read ({which})")
    if len(found.sections) > 1:
        notes.append("runs of different data or splits stand apart, and are not averaged")
    where = dict.fromkeys(run.latency.where for run in found.runs if run.latency)
    measured = f"latencies were measured on {'; '.join(where)}, one image at a time"
    return sheet.notes(notes) + (f'<p class="soft">{escape(measured)}</p>' if where else "")


def _section(found: Comparison, section: Section, number: int, drawn: dict[str, list[page_plots.Plot]]) -> str:
    results, costs = tables.results(section, found.metrics), tables.costs(section)
    tests = tables.tested(section)
    few = f"Differences between groups are tested from {ENOUGH} runs each on."
    told = f"p: {tables.TEST}." if tests else few if len(section.groups) > 1 else ""
    parts = [
        f"<section><h2>{escape(section.data.words)}</h2><p class=soft>{escape(section.data.details)}</p>",
        _group_table(section, results, tests),
        f'<p class="note">{escape(told)}</p>' if told else "",
        sheet.part("Cost", _group_table(section, costs)),
        _legend(section, number),
    ]
    for heading, plots in drawn.items():
        for place, plot in enumerate(plots):
            plot["id"] = f"plot-{number}-{heading.lower().replace(' ', '-')}-{place}"
        shared = all(plot["xs"] == plots[0]["xs"] for plot in plots) and len(plots) > 1
        chooser = _chooser(plots[0]["xs"], [plot["id"] for plot in plots], heading) if shared else ""
        body = "".join(_figure(plot, not shared) for plot in plots)
        parts.append(sheet.part(heading, f'<div class="plots">{body}</div>', chooser))
    parts.append(_run_table(section, [*results, *costs]))
    return "\n".join(filter(None, parts)) + "</section>"


def _chooser(xs: Sequence[Sequence[str]], ids: Sequence[str], of: str) -> str:
    """Chooses the horizontal axis of some plots."""
    if len(xs) < 2:
        return ""
    options = "".join(f'<option value="{escape(key)}">{escape(key)}</option>' for key, _ in xs)
    label = f"horizontal axis: {of}"
    select = f'<select data-x="{" ".join(ids)}" aria-label="{escape(label)}">{options}</select>'
    return f'<label class="soft">against {select}</label>'


def _figure(plot: page_plots.Plot, chooses: bool) -> str:
    chooser = _chooser(plot["xs"], [plot["id"]], plot["title"]) if chooses else ""
    note = f'<p class="note">{escape(plot["note"])}</p>' if plot.get("note") else ""
    label = escape(f"{plot['title']}: {plot['y']}; the same as a table below")
    return (
        f"<figure><figcaption><h4>{escape(plot['title'])}</h4>{chooser}</figcaption>"
        f'<div class="plot" id="{plot["id"]}" role="img" aria-label="{label}"></div>{note}'
        f'<details id="{plot["id"]}-data"><summary>Data</summary></details></figure>'
    )


def _legend(section: Section, number: int) -> str:
    """Of all plots of a section: buttons that show and hide a group."""
    buttons = "".join(
        f'<button data-group="{place}" aria-pressed="{"true" if place < SHOWN else "false"}">'
        f"{_swatch(place)}{escape(_cut(group.label))}</button>"
        for place, group in enumerate(section.groups)
    )
    both = '<button data-all="yes">All</button><button data-all="no">None</button>' if len(section.groups) > 3 else ""
    label = "groups in the plots"
    return f'<div class="legend" data-section="{number}" role="group" aria-label="{label}">{both}{buttons}</div>'


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _broken(name: str) -> str:
    """Of HTML, with places where a line may end."""
    text = escape(name)
    return re.sub(r"([._/-])(?=[A-Za-z])", r"\1<wbr>", text)


def _swatch(place: int) -> str:
    """A group's line and marker, as the script draws them."""
    tint = f"var(--c{place % 7})"
    dash = f' stroke-dasharray="{dashes}"' if (dashes := _DASHES[place % 5]) else ""
    line = f'<path d="M0 6h34" fill="none" stroke-width="2"{dash}/>'
    return (
        f'<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true" fill="{tint}" stroke="{tint}">{line}'
        f'<g stroke-width="1">{_SYMBOLS[place % 8]}</g></svg>'
    )


def _table(head: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """rows: of cells as HTML. kind: "words", which are not sorted, or "runs"."""
    names = "".join(
        f'<th scope="col">{escape(name)}</th>'
        if kind == "words"
        else f'<th scope="col" aria-sort="none"><button>{escape(name)}</button></th>'
        for name in head
    )
    classes = f"scroll{' tall' if len(rows) > OPEN else ''}{f' {kind}' if kind else ''}"
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="{classes}" tabindex="0"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _group_table(section: Section, columns: Sequence[Column], tests: Mapping[str, Sequence[str]] | None = None) -> str:
    """tests: further columns, of a text a group."""
    tests = tests or {}

    def row(place: int, group: Group) -> str:
        size = f'<span class="mark">{escape(group.mark)}</span>' if group.mark else str(len(group.runs))
        cells = [_mean_cell(column, group) for column in columns]
        told = [_told(texts[place]) for texts in tests.values()]
        name = f'<th scope="row">{_swatch(place)}{_broken(group.label)}</th>'
        return f'{name}<td data-value="{len(group.runs)}">{size}</td>{"".join([cells[0], *told, *cells[1:]])}'

    rows = [row(place, group) for place, group in enumerate(section.groups)]
    titles = [column.title for column in columns]
    return _table(["group", "n", titles[0], *tests, *titles[1:]], rows)


def _told(text: str) -> str:
    return _cell(text, None if text == MISSING else float(text))


def _mean_cell(column: Column, group: Group) -> str:
    found = group.mean(column.value)
    return _cell(column.text(found, len(group.runs)), None if found is None else found.mean)


def _cell(text: str, value: float | None) -> str:
    known = value is not None and math.isfinite(value)
    return f'<td data-value="{value if known else ""}"{"" if known else " class=missing"}>{escape(text)}</td>'


def _run_table(section: Section, columns: Sequence[Column]) -> str:
    seed = "run.seed"

    def row(group: Group, run: Outcome) -> str:
        state = run.record.state
        mark = "" if run.is_finished else ' class="mark"'
        text = str(run.recipe.get(seed, MISSING))
        cells = "".join(_one(column.form, column.value(run)) for column in columns)
        latencies = "".join(_one(tables.number, tables.latency(width)(run)) for width in widths if timed)
        scores = "".join(_one(tables.percent, run.widths.get(width)) for width in widths)
        return (
            f'<th scope="row" title="{escape(run.record.where)}">{_broken(run.name)}</th>'
            f"<td>{escape(_cut(group.label))}</td><td>{escape(text)}</td><td{mark}>{escape(state)}</td>"
            f"{cells}{scores}{latencies}"
        )

    runs = [(group, run) for group in section.groups for run in group.runs]
    widths = sorted({width for _, run in runs for width in run.widths}, key=float)
    columns = [column for column in columns if "/top1_w" not in column.title]
    timed = any(run.latency for _, run in runs)
    head = ["run", "group", "seed", "state", *(column.title for column in columns)]
    head += [f"{section.result}_w{width}" for width in widths]
    head += [f"ms at {width}" for width in widths] if timed else []
    rows = [row(group, run) for group, run in runs]
    table = _table(head, rows, "runs")
    opened = " open" if len(rows) <= OPEN else ""
    return f'<div class="part"><details{opened}><summary>Every run ({len(rows)})</summary>{table}</details></div>'


def _one(form: Callable[[float], str], value: float | None) -> str:
    return _cell(MISSING if value is None else form(value), value)


def _differences(found: Comparison) -> str:
    parts = []
    if found.trained:
        parts.append(f"<h2>What differs</h2><p class=soft>Keys of what is trained.</p>{_keys(found, found.trained)}")
    elif len(found.groups) > 1:
        parts.append("<h2>What differs</h2><p class=soft>Nothing of what is trained.</p>")
    if found.placed:
        table = _keys(found, found.placed)
        parts.append(f'<details class="part"><summary>Where and how ({len(found.placed)})</summary>{table}</details>')
    return "\n".join(parts)


def _keys(found: Comparison, differences: Sequence[Difference]) -> str:
    """A row a key, or a group where those are more."""
    labels, keys = [group.label for group in found.groups], [difference.key for difference in differences]
    cells = [list(difference.values) for difference in differences]
    head, names = (["key", *labels], keys)
    if len(labels) > max(8, len(keys)):
        head, names, cells = ["group", *keys], labels, [list(column) for column in zip(*cells, strict=True)]
    rows = [
        f'<th scope="row">{_broken(name)}</th>' + "".join(_word(text) for text in line)
        for name, line in zip(names, cells, strict=True)
    ]
    return _table(head, rows, "words")


def _word(text: str) -> str:
    return f"<td{' class=missing' if text == MISSING else ''}>{escape(text)}</td>"
