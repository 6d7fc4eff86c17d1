"""Several hosts: looked at before a long run, and trained on."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import Exit, RefusedError, counted, shown
from ..train import check_kernels
from . import Debug

if TYPE_CHECKING:
    from ..hosts.cluster import Host
    from ..hosts.doctor import Examination

Hostfile = Annotated[Path, typer.Argument(help="A line `NAME slots=N` for every host.")]


def examine_hosts(
    hostfile: Hostfile,
    recipe: Annotated[Path | None, typer.Argument(help="The recipe that is to run.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    debug: Debug = False,
) -> None:
    """Look at every host before a long run; exit code 1 if anything is wrong.

    Example: hsvit doctor hostfile recipes/digits/hsvit.toml
    """
    with shown(Exit.REFUSED, debug):
        check_kernels()
        from ..hosts.cluster import read_hostfile
        from ..hosts.doctor import examine

        hosts = read_hostfile(hostfile)
        found = examine(hosts, recipe, overrides or [], quick=False)
        for warning in found.warnings:
            typer.echo(f"hsvit: warning: {warning}", err=True)
        _print(hosts, found)
        if found.wrote:
            typer.echo(found.wrote)
        for failure in found.failures:
            typer.echo(failure)
        if found.failures:
            if debug:
                typer.echo(found.log, err=True)
            raise typer.Exit(Exit.FAILED)


def _print(hosts: list[Host], found: Examination) -> None:
    """A row for each check and answer, with the hosts that gave it: as readable for 64 hosts as for two."""
    from rich.console import Console
    from rich.table import Column, Table

    rows: dict[tuple[str, str, bool], list[str]] = {}
    for check in dict.fromkeys(cell.check for cell in found.cells):
        for cell in (cell for cell in found.cells if cell.check == check):
            rows.setdefault((check, cell.value, bool(cell.remedy)), []).append(cell.host)
    place = f", rank 0 at {found.master}" if found.master else ""
    columns = [Column(name, overflow="fold") for name in ("check", "found", "on")]
    table = Table(
        *columns, title=f"{counted(len(hosts), 'host')}, {counted(sum(h.slots for h in hosts), 'rank')}{place}"
    )
    for (check, value, wrong), names in rows.items():
        where = ", ".join(names) if wrong or len(names) <= 4 else counted(len(names), "host")
        where = "all hosts" if len(names) == len(hosts) > 1 else where
        table.add_row(check, f"WRONG: {value}" if wrong else value, where, style="red" if wrong else None)
    Console(highlight=False, markup=False, emoji=False).print(table)


class Printed(StrEnum):
    """Who else can start the run."""

    slurm = "slurm"
    torchrun = "torchrun"


def launch_run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML.")],
    hostfile: Annotated[Path, typer.Option(help="A line `NAME slots=N` for every host.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    hosts: Annotated[int, typer.Option(min=0, help="That take ranks; the others are spares. 0: all of them.")] = 0,
    max_restarts: Annotated[int, typer.Option(min=0, help="After a failure, in all.")] = 10,
    shrink: Annotated[bool, typer.Option("--shrink", help="Go on with fewer ranks where no spare is left.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest run of this name.")] = False,
    printed: Annotated[Printed | None, typer.Option("--print", help="What starts it without this command.")] = None,
    debug: Debug = False,
) -> None:
    """Start a run on several hosts and keep it going; exit code 75: saved and stopped as asked.

    Example: hsvit launch recipes/digits/hsvit.toml --hostfile hostfile
    """
    with shown(Exit.REFUSED, debug):
        check_kernels()
        from ..hosts import checks, schedulers
        from ..hosts.cluster import read_hostfile
        from ..hosts.launch import Options, prepare
        from ..hosts.secrets import check_overrides
        from ..run import recipe as recipes

        listed, changes = read_hostfile(hostfile), overrides or []
        check_overrides(changes)
        if printed is not None:
            if hosts > len(listed):
                raise RefusedError(f"--hosts {hosts}: the hostfile names {len(listed)}; add hosts to it")
            taken, read = listed[: hosts or None], recipes.read(recipe, changes)
            if (cell := checks.training(read, sum(host.slots for host in taken))).remedy:
                raise RefusedError(cell.value)
            if printed == Printed.slurm:
                typer.echo(schedulers.slurm(taken, read, recipe, changes, resume))
            else:
                typer.echo(schedulers.torchrun(taken, recipe, changes, resume))
            return
        options = Options(
            recipe=recipe,
            overrides=changes,
            hosts=hosts,
            max_restarts=max_restarts,
            shrink=shrink,
            resume=resume,
        )
        launch = prepare(options, listed)
    with shown(Exit.FAILED, debug):
        raise typer.Exit(launch.run())
