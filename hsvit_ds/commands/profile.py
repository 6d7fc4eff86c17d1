"""Where the time of a run's steps goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import Exit, RefusedError, counted, shown
from ..train import check_kernels
from . import Debug, terminal

if TYPE_CHECKING:
    from ..results.profile import Rank
    from ..run.recipe import Recipe

SHOWN = 4
"""Ranks that get a column each; of more those that wait least and most do."""
MOST = 3
"""Changes that are named."""


def profile_run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    ranks: Annotated[int, typer.Option(min=0, help="Ranks on this machine; the grid's own by default.")] = 0,
    hostfile: Annotated[Path | None, typer.Option(help="A line `NAME slots=N` for every host, instead.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="That are traced, after ten others.")] = 20,
    debug: Debug = False,
) -> None:
    """Trace a run's first steps: where their time goes, and what could change.

    Example: hsvit profile recipes/digits/hsvit.toml --ranks 2 --steps 20
    """
    with shown(Exit.REFUSED, debug):
        check_kernels()
        if ranks and hostfile is not None:
            raise RefusedError("--ranks and --hostfile: the file says how many ranks each host has; leave --ranks out")
        from ..run import recipe as recipes

        asked = [*(overrides or []), f"tracking.profile={steps}", "tracking.mlflow=false"]
        read = recipes.read(recipe, asked)
        asked.append(f"run.name={read.run.name}-profile")
        read = replace(read, run=replace(read.run, name=f"{read.run.name}-profile"))
        if hostfile is None:
            ranks = ranks or read.grid.submodule_ranks
            recipes.resolve(read, ranks)
            folder = _run_here(recipe, read, asked, ranks, steps)
        else:
            folder = _run_there(recipe, asked, hostfile)
        show(folder, steps)


def _run_here(file: Path, recipe: Recipe, overrides: list[str], ranks: int, steps: int) -> Path:
    """The folder of the run, once it has ended: by itself, or as asked."""
    from ..results import profile
    from ..run import folders
    from ..run.processes import Processes, Stops, command, complaint

    folder, words, stops = folders.claim(recipe.run), "words.txt", Stops()
    with (folder / words).open("wb") as output, stops.heard(), terminal.progress("steps traced") as told:
        run = Processes(command(file, [*overrides, "--run", str(folder)], ranks), output, ranks)
        asked = 0
        while (code := run.poll()) is None:
            if stops.count > asked:
                (run.kill if asked else run.ask)()
                asked = stops.count
            told(profile.steps_of(folder), steps)
            time.sleep(0.2)
    if code and not asked:
        said = complaint((folder / words).read_text("utf-8", "replace"))
        typer.echo(f"hsvit: warning: the run ended before: {said or f'exit code {code}'}", err=True)
    return folder


def _run_there(file: Path, overrides: list[str], hostfile: Path) -> Path:
    from ..hosts.cluster import read_hostfile
    from ..hosts.launch import Options, prepare

    options = Options(recipe=file, overrides=overrides, hosts=0, max_restarts=0, shrink=False, resume=False)
    launch = prepare(options, read_hostfile(hostfile))
    try:
        launch.run()
    except RefusedError as error:  # what was traced by then is shown all the same
        typer.echo(f"hsvit: warning: the run ended before: {error}", err=True)
    return launch.folder


def show(folder: Path, steps: int) -> None:
    """Print what the ranks of a run have traced, and write it as one file for Perfetto."""
    from ..results import advice, profile, trace
    from ..run import recipe as recipes

    ranks = profile.read(folder)
    trace.write(ranks, folder / trace.FILE)
    recipe, plan = recipes.resolve(recipes.read(folder / "recipe.toml"), ranks[0].ranks)
    traced = min(len(rank.steps) for rank in ranks)
    if traced < steps:
        typer.echo(f"hsvit: warning: {traced} of {counted(steps, 'step')} traced, see {folder}", err=True)
    if len(ranks) < plan.ranks:
        typer.echo(
            f"hsvit: warning: {len(ranks)} of {counted(plan.ranks, 'rank')} are in {folder}; the others' hosts do not "
            "share run.root",
            err=True,
        )
    hosts, precision = counted(len({rank.host for rank in ranks}), "host"), "bf16" if plan.bf16 else "fp32"
    title = f"{recipe.run.name}: {counted(traced, 'step')}, {counted(len(ranks), 'rank')} on {hosts}, {precision}"
    _print_times(ranks, title)
    _print_operations(ranks[0])
    _print_figures(ranks, recipe.run.global_batch)
    if found := advice.changes(recipe, plan, profile.shares(ranks)):
        typer.echo("what could change most, of a step's time:")
    for change in found[:MOST]:
        typer.echo(f"{change.share:6.1%}  {change.what}: {change.key}")
    typer.echo(f"trace, for ui.perfetto.dev: {folder / trace.FILE}")


def _print_times(ranks: Sequence[Rank], title: str) -> None:
    from ..results import profile
    from ..spans import Part

    columns = {f"rank {rank.rank}": place for place, rank in enumerate(ranks)}
    if len(ranks) > SHOWN:  # the last to come waits least
        waits = [profile.by_part(rank).get((Part.WAITING,), 0.0) for rank in ranks]
        columns = {f"rank {ranks[i].rank}, {word}": i for word, i in _extremes(waits)}
    if len(ranks) == 1:
        columns = {}
    rows = []
    step = profile.rows(ranks)[-1].seconds
    for row in profile.rows(ranks):
        mean = sum(row.seconds) / len(ranks)
        own = [f"{1000 * row.seconds[place]:.2f}" for place in columns.values()]
        share = f"{mean * len(ranks) / sum(step):.1%}"
        rows.append(("  " * row.depth + row.name, f"{1000 * mean:.2f}", share, *own))
    head = ("of a step", "ms", "share", *(f"{name}, ms" for name in columns))
    terminal.table(head, rows, title, numbers=head[1:])


def _extremes(waits: Sequence[float]) -> list[tuple[str, int]]:
    order = sorted(range(len(waits)), key=waits.__getitem__)
    return [("waits least", order[0]), ("waits most", order[-1])]


def _print_operations(rank: Rank) -> None:
    whole = sum(seconds for seconds, _ in rank.operations.values())
    rows = [
        (kind, f"{1000 * seconds / rank.counted:.2f}", f"{seconds / whole:.1%}", f"{calls / rank.counted:,.0f}")
        for kind, (seconds, calls) in sorted(rank.operations.items(), key=lambda item: -item[1][0])
    ]
    if rows:
        head = ("operations of rank 0, of a step", "ms", "share", "calls")
        terminal.table(head, rows, numbers=head[1:])


def _print_figures(ranks: Sequence[Rank], images: int) -> None:
    """What the steps amount to. images: of one step, in all."""
    steps = ranks[0].steps
    macs, step = sum(step.macs for step in steps) / len(steps), ranks[0].seconds / len(steps)
    each = macs / len(ranks) / step
    line = f"{images / step:,.1f} images/s; {macs / 1e9:,.2f} GMACs a step, {each / 1e9:,.1f} GMACs/s a rank"
    if peak := ranks[0].peak:
        line += f", {2 * each / peak:.1%} of the device's peak (MFU)"
    typer.echo(line)
    most = max(ranks, key=lambda rank: rank.memory)
    if most.memory:
        typer.echo(f"memory at most: {terminal.size(most.memory)}, rank {most.rank}")
