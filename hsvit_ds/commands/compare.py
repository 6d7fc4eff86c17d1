"""Runs side by side, on the terminal or in a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RefusedError, shown, warn
from . import Debug

if TYPE_CHECKING:
    from ..results.comparison import Comparison, Section
    from ..results.record import Record

FORMATS = ("md", "csv", "json", "html")


def compare_runs(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs or of many, names, globs, MLflow run ids.")],
    root: Annotated[
        str, typer.Option("--runs", help="Where names are looked for: a folder, or MLflow's URI.")
    ] = "runs",
    by: Annotated[str, typer.Option(help="Average runs that share these keys: lr,epochs.")] = "",
    metric: Annotated[str, typer.Option(help="Further metrics: val/loss,ema/test_top1.")] = "",
    latency: Annotated[bool, typer.Option("--latency", help="Measure one image on this machine, by width.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A file .html, .md, .csv or .json.")] = None,
    form: Annotated[str, typer.Option("--format", help="md, csv or json, on standard output.")] = "",
    debug: Debug = False,
) -> None:
    """Compare runs: what differs, means over seeds, costs and curves.

    Example: hsvit compare digits-hsvit-001 digits-scala-001 -o report.html
    """
    with shown(2, debug):
        form = _format(out, form)
        from ..results import comparison, outcome, page, records, tables
        from .terminal import progress, write_report

        found = records.find(runs, root)
        if latency:
            _measure(found)
        keys, metrics = (list(filter(None, text.split(","))) for text in (by, metric))
        reduced = []
        with progress("runs") as told:
            for record in found:
                reduced.append(outcome.of(record, metrics))
                told(len(reduced), len(found))
        compared = comparison.compare(reduced, keys, metrics)
        if form:
            makers = {"html": page.html, "md": tables.markdown, "csv": tables.as_csv, "json": tables.as_json}
            write_report(makers[form](compared), out, tables.MARKS[form], "hsvit compare")
        else:
            _print(compared)


def _format(out: Path | None, form: str) -> str:
    """That is asked for, or that the file's ending says; "" for the terminal."""
    if form and form not in FORMATS:
        raise RefusedError(f"--format {form}: must be one of {', '.join(FORMATS)}")
    if form == "html" and out is None:
        raise RefusedError("--format html: is a file; name it, as in -o report.html")
    if form or out is None:
        return form
    if out.suffix[1:] not in FORMATS:
        raise RefusedError(f"--out {out}: must end in .{', .'.join(FORMATS)}, or say --format")
    return out.suffix[1:]


def _measure(found: list[Record]) -> None:
    from ..results import latency

    for record in found:
        try:
            measured = latency.measure(Path(record.where))
            ms = ", ".join(f"{width} {value:.2f}" for width, value in measured.ms.items())
            typer.echo(f"{record.name}: ms by width on {measured.where}: {ms}", err=True)
        except RefusedError as error:
            warn(f"{record.name}: its latency is not measured: {error}")


def _print(compared: Comparison) -> None:
    """A table a section, of the columns that the terminal has room for."""
    for section in compared.sections:
        _print_section(section, compared)
    typer.echo("what differs, curves and every run: -o report.html")


def _print_section(section: Section, compared: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..results import tables

    titles, cells = tables.rows_of(section, [*tables.results(section, compared.metrics), *tables.costs(section)])
    titles = [title.replace(f"{section.result}_w", "w") for title in titles]
    room = shutil.get_terminal_size((200, 24)).columns
    sizes = [max(map(len, column)) + 3 for column in zip(titles, *cells, strict=True)]
    numbers = [tables.runs_in(group) for group in section.groups]
    first = min(max(len(group.label) for group in section.groups), max(24, room // 3))
    used = first + 7 + max(map(len, numbers))
    kept = max(1, sum(used + sum(sizes[: place + 1]) <= room for place in range(len(sizes))))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("group", width=first, overflow="fold")
    for title in ("n", *titles[:kept]):
        table.add_column(title, justify="right", no_wrap=True)
    for group, number, line in zip(section.groups, numbers, cells, strict=True):
        table.add_row(group.label, number, *line[:kept])
    console = Console(highlight=False, markup=False, emoji=False, width=room)
    console.print(f"{section.data.words}; {section.data.details}")
    console.print(table)
    if "p" in titles:
        console.print(f"p: {tables.TEST}")
    if kept < len(titles):
        console.print(f"no room for: {', '.join(titles[kept:])} (--format md)")
