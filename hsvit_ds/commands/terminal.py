"""What the commands show on a terminal, or in a file: tables, long lists, and how far they are."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from ..errors import RefusedError

_INTERVAL = 60  # s between progress lines where there is no terminal


def cores(processes: int) -> int:
    """How many processes --processes asks for."""
    if processes < 0:
        raise RefusedError(f"--processes {processes}: must be at least 1, or 0 for one each core")
    return processes or len(os.sched_getaffinity(0))


def size(count: int) -> str:
    """Bytes as 12 B or 3.4 MiB."""
    number, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    return f"{count} B" if unit == "B" else f"{number:.1f} {unit}"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, numbers: Sequence[str] = ()
) -> None:
    """Of names as they are: no brackets or colons in them are markup. numbers: columns aligned at the right."""
    from rich.console import Console
    from rich.table import Column, Table

    made = Table(*(Column(name, justify="right" if name in numbers else "left") for name in head), title=title)
    for row in rows:
        made.add_row(*row)
    Console(highlight=False, soft_wrap=True, markup=False, emoji=False).print(made)


def lines(texts: Sequence[str], most: int) -> None:
    """The first of some lines, and how many more there are."""
    for text in texts[:most]:
        typer.echo(text if text.isprintable() else ascii(text))  # names in a tar may hold anything
    if len(texts) > most:
        typer.echo(f"… and {len(texts) - most:,} more")


def write_report(text: str, out: Path | None, mark: str, command: str) -> None:
    """To a file, over one that has the command's mark near its beginning, or to standard output."""
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        if out.exists():
            with out.open(encoding="utf-8", errors="replace") as file:
                if mark not in file.read(1000):
                    raise RefusedError(f"--out {out}: is no report of {command}; name another, or move it away")
        out.write_text(text, "utf-8")
    except OSError as error:
        raise RefusedError(f"--out {out}: cannot be written ({error.strerror})") from error
    typer.echo(out)


@contextmanager
def progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function that is told (done, total): a bar on a terminal, elsewhere a line a minute."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _INTERVAL:
                last = time.monotonic()
                typer.echo(f"{done:,}/{total:,} {unit}", err=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), TextColumn(unit), BarColumn(24), TimeRemainingColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
