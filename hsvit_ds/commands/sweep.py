"""Many runs that answer one question."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import Exit, RefusedError, counted, has_screen, shown
from ..train import check_kernels
from . import Debug, terminal

if TYPE_CHECKING:
    from ..run.processes import Share
    from ..sweeps.cells import Cell, Sweep
    from ..sweeps.jobs import Ended, Job


def run_sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="Recipes, keys and seeds to combine, in TOML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Of every cell.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; they share the cores and GPUs out.")] = 1,
    hostfile: Annotated[Path | None, typer.Option(help="Hosts, `NAME slots=N`, for one cell after another.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cells, and how long they will take.")] = False,
    debug: Debug = False,
) -> None:
    """Train every combination of a file's recipes, keys and seeds; started again, go on where it was.

    Exit code 1: cells failed; 75: stopped as asked, and saved.

    Example: hsvit sweep recipes/studies/digits_seeds/sweep.toml --dry-run
    """
    with shown(Exit.REFUSED, debug):
        check_kernels()
        from ..hosts.cluster import read_hostfile
        from ..run.processes import Share, Stops, shares
        from ..sweeps import cells
        from ..sweeps.pool import Pool, held

        if hostfile and jobs > 1:
            raise RefusedError(f"--jobs {jobs} with a --hostfile: a cell takes all of its hosts; leave --jobs out")
        ranks = sum(host.slots for host in read_hostfile(hostfile)) if hostfile else 0
        sweep = cells.read(file, overrides or (), ranks)
        cells.check_unchanged(sweep)
        each = [Share()] if hostfile else shares(jobs, max(cell.plan.ranks for cell in sweep.cells))
        if dry_run:
            _print_plan(sweep, jobs, None if hostfile else each[0])
            return
        stops = Stops()
        with held(sweep), _Screen(sweep) as screen, stops.heard():
            pool = Pool(sweep, each, hostfile, screen)
            pool.run(stops)
    raise typer.Exit(_print_result(sweep, pool.ended))


def _print_plan(sweep: Sweep, jobs: int, share: Share | None) -> None:
    """share: of this machine, for a cell; None where other hosts take them."""
    from ..run.processes import Share
    from ..run.report import duration
    from ..sweeps.estimate import estimate

    finished = sum(cell.is_finished for cell in sweep.cells)
    took = None
    if finished < len(sweep.cells) and (share or finished):
        if not finished:
            typer.echo("timing the first steps of a cell …")
        took = estimate(sweep.cells, share or Share())
    rows = [
        (cell.name, _state(cell), duration(took.seconds[cell.name]) if took and cell.name in took.seconds else "-")
        for cell in sweep.cells
    ]
    terminal.table(("cell", "state", "will take"), rows, title=str(sweep.folder))
    left = counted(len(sweep.cells) - finished, "cell")
    if took:
        at_a_time = f", {jobs} at a time" if jobs > 1 else ""
        typer.echo(f"{left} to train{at_a_time}: about {duration(took.in_all(jobs))}, {took.how}")
    elif finished < len(sweep.cells):
        typer.echo(f"{left} to train; how long one takes on other hosts is known once one is finished")
    else:
        typer.echo("all are finished")


def _state(cell: Cell) -> str:
    found = cell.summary
    if found is None or cell.is_finished:
        return cell.state
    return f"{cell.state} at step {found.step} of {found.steps}"


def _print_result(sweep: Sweep, ended: Mapping[str, Ended]) -> Exit:
    """A row for each cell, why some failed, and what to do next; how the sweep ended."""
    from ..run.report import duration
    from ..run.summary import FAILED

    rows = []
    for cell in sweep.cells:
        found = cell.summary
        top1 = "-" if cell.top1 is None else f"{cell.top1:.2f}"
        state = FAILED if cell.name in ended and ended[cell.name].state == FAILED else cell.state
        rows.append((cell.folder.name, state, top1, duration(found.seconds) if found else "-"))
    split = " or ".join(dict.fromkeys(cell.recipe.data.test for cell in sweep.cells))
    terminal.table(("run", "state", f"{split} top-1", "time"), rows, title=str(sweep.folder))
    failed = sum(how.state == FAILED for how in ended.values())
    complete = all(cell.is_finished for cell in sweep.cells)
    if not complete:
        why = f"{counted(failed, 'cell')} failed; to try again" if failed else "stopped; to go on"
        typer.echo(f"{why}:\n  {shlex.join(['hsvit', *sys.argv[1:]])}")
    typer.echo(f"Next:\n  hsvit compare {shlex.quote(str(sweep.folder))}")
    return Exit.FINISHED if complete else Exit.FAILED if failed else Exit.STOPPED


class _Screen:
    """What a person sees of a sweep: a line for each start and end, and on a terminal how far each cell is."""

    def __init__(self, sweep: Sweep) -> None:
        from rich.live import Live

        from ..run.report import Voice

        self.sweep, self.console = sweep, Voice()
        self._live = Live(console=self.console, transient=True, auto_refresh=False) if has_screen() else None
        self._drawn = 0.0

    def __enter__(self) -> _Screen:
        cells = self.sweep.cells
        finished = sum(cell.is_finished for cell in cells)
        self._say(f"{self.sweep.folder}: {counted(len(cells), 'cell')}, {finished} of them finished")
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def started(self, job: Job) -> None:
        self._say(f"{job.cell.name}: started")

    def waits(self, job: Job) -> None:
        self._say(f"{job.cell.name}: processes that were started before go on with it; waits for them")

    def ended(self, job: Job, ended: Ended) -> None:
        from ..run.report import duration
        from ..run.summary import FAILED, FINISHED

        cell, name = job.cell, job.cell.name
        took = duration(time.time() - job.began)
        if ended.state == FINISHED:
            top1 = "" if cell.top1 is None else f", {cell.recipe.data.test} top-1 {cell.top1:.2f}"
            self._say(f"{name}: finished{top1}, {took}")
        elif ended.state == FAILED:
            self._say(f"{name}: failed: {ended.why}; its output: {job.log}")
        else:
            self._say(f"{name}: {ended.state}, {ended.why}")

    def stopping(self, jobs: Sequence[Job], kills: bool) -> None:
        if jobs:
            what = "kills" if kills else "saves and stops; Ctrl-C again kills"
            self._say(f"{what}: {', '.join(job.cell.name for job in jobs)}")

    def going_on(self, jobs: Sequence[Job]) -> None:
        """A line for each, at most once a second."""
        if self._live is None or time.monotonic() - self._drawn < 1:
            return
        from rich.console import Group
        from rich.text import Text

        self._drawn = time.monotonic()
        width = self.console.width - 1
        self._live.update(Group(*(Text(_line(job, width)) for job in jobs)), refresh=True)

    def _say(self, text: str) -> None:
        self.console.print(text)


def _line(job: Job, width: int) -> str:
    """How far a cell is, in one line; of a long name the end, which tells it from others."""
    from ..run.report import duration

    step, steps, top1 = job.progress()
    words = "waits" if step is None else f"step {step}/{steps}"
    words += "" if top1 is None else f"  {job.cell.recipe.data.val} top-1 {top1:.2f}"
    words += f"  {duration(time.time() - job.began)}"
    name, room = job.cell.name, width - len(words) - 2
    name = name if len(name) <= room else "…" + name[len(name) - max(room, 1) + 1 :]
    return f"{name}  {words}"
