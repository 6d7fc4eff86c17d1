"""From a folder of images to a recipe."""

from __future__ import annotations

import re
import shlex
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RefusedError, shown
from ..new.goals import Goal
from ..train import check_kernels
from . import Debug, terminal

if TYPE_CHECKING:
    from ..new.survey import Survey

SEED = 0
SHOWN = 30
"""Classes, and images that are left out, that are listed."""


def make_recipe(
    folder: Annotated[Path, typer.Argument(help="Class folders, with or without train, val, test; a CSV; or tars.")],
    goal: Annotated[
        Goal, typer.Option(help="small: quick; accurate: larger; elastic: a network for every budget.")
    ] = Goal.small,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The recipe; NAME.toml here by default.")] = None,
    debug: Debug = False,
) -> None:
    """Look at a folder of images, make shards of it, and write a recipe that is sized to them and to this machine.

    Example: hsvit new photos --goal elastic
    """
    with shown(2, debug):
        check_kernels()
        name = _name(folder)
        recipe = out or Path(f"{name}.toml")
        shards = recipe.parent / f"{name}-shards"
        _refuse(folder, recipe)
        import torch

        from ..new import proposal
        from ..new.survey import survey
        from ..run import timing

        with terminal.progress("images") as done:
            found = survey(folder, SEED, terminal.cores(0), done)
        _print(found, folder)
        index = _make(found, folder, shards, name)
        root = folder.resolve() if found.tars else shards.resolve()
        first = proposal.Proposal.of(goal, name, root, index, found, torch.cuda.is_available())
        typer.echo("timing the first steps of a trial run …")
        timed = first.within(timing.first_steps(first.text()).images_per_second)
        recipe.write_text(timed.text(), "utf-8")
        typer.echo(f"{recipe}: {timed.words}")
        count = torch.cuda.device_count()
        start = f"deepspeed --num_accelerators {count} --module" if count > 1 else "python -m"
        typer.echo(f"\nNext:\n  {start} hsvit_ds.train {shlex.quote(str(recipe))}")


def _name(folder: Path) -> str:
    """Of the data set and its runs: the folder's, in letters that a shard's name may have."""
    letters = unicodedata.normalize("NFKD", folder.resolve().stem.casefold())  # ü is u and two dots, ß is ss
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    plain = re.sub(r"[^a-z0-9]+", "-", letters).strip("-") or "images"
    from ..data.sets import SETS

    return f"my-{plain}" if plain in SETS else plain


def _refuse(folder: Path, recipe: Path) -> None:
    if recipe.exists():
        raise RefusedError(f"{recipe}: is there already; train it, or name another with -o")
    if not recipe.parent.is_dir():
        raise RefusedError(f"-o {recipe}: no folder {recipe.parent}")
    if folder.is_dir() and recipe.resolve().is_relative_to(folder.resolve()):
        raise RefusedError(f"-o {recipe}: is inside {folder}, which is left as it is; name a recipe elsewhere")


def _print(found: Survey, folder: Path) -> None:
    from ..new.proposal import found as words

    for line in words(found, folder):
        typer.echo(line)
    counts = found.counts()
    splits = [split for split in ("train", "val", "test") if split in counts]
    rows = [
        (title, *(f"{counts[split][label]:,}" for split in splits)) for label, title in enumerate(found.classes[:SHOWN])
    ]
    if len(found.classes) > SHOWN:
        rows.append((f"… and {len(found.classes) - SHOWN:,} more", *("" for _ in splits)))
    terminal.table(("class", *splits), rows)
    if left_out := [*found.damaged, *found.copies]:
        typer.echo("left out:")
        terminal.lines([f"  {text}" for text in left_out], SHOWN)


def _make(found: Survey, folder: Path, shards: Path, name: str) -> Path | None:
    """Make the shards; of tars that stay as they are the indexes, whose folder is given."""
    from ..data import indexing
    from ..data.layouts import split_shards
    from ..data.shards.make import Options, class_names, make_split

    processes = terminal.cores(0)
    if found.tars:
        shards.mkdir(parents=True, exist_ok=True)
        for split in split_shards(folder):
            indexing.make(folder, split, where=shards, processes=processes, classes=class_names(folder))
        typer.echo(f"{shards}: the indexes of the shards in {folder}")
        return shards.resolve()
    with terminal.progress("shards") as done:
        for split, source in found.splits.items():
            made, _ = make_split(source, shards, Options(name, split, seed=SEED), processes, done)
            typer.echo(f"{shards}: {len(made):,} of {split}, {terminal.size(int(made.bytes.sum()))}")
    return None
