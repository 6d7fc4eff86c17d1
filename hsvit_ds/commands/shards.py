"""Tar shards: made, indexed, checked, described."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RefusedError, counted, shown
from . import Debug, terminal

app = typer.Typer(no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="Folder of NAME-SPLIT-0000.tar, of SPLIT-0000.tar, or of SPLIT/0000.tar.")]
Named = Annotated[
    list[str] | None,
    typer.Option(
        "--shards",
        metavar="SPLIT=PATTERN",
        help="A split's shards of other names, as 'train=train-{000..146}.tar' or 'val=a/*.tar'; repeatable.",
    ),
]
Processes = Annotated[int, typer.Option(help="How many work at once; 0 is one for each core.")]
Image = Annotated[
    str, typer.Option(help="Extension of a sample's image where it has two, as jpg or rgb.png; jpg;png: else a png.")
]


@app.command("make")
def make_shards(
    source: Annotated[
        Path, typer.Argument(help="One sub-folder a class, a CSV, or a set as it is published: docs/data.md.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    split: Annotated[str, typer.Option(help="What SOURCE is: train, val, … Of ImageNet's archives: which.")],
    name: Annotated[str, typer.Option(help="Of the data set, as imagenet1k.")],
    shards: Annotated[int, typer.Option(help="How many tars; 0: one for a thousand images.")] = 0,
    resize: Annotated[
        int | None, typer.Option(help="Shrink to this shorter side, pixels; otherwise images are copied as they are.")
    ] = None,
    quality: Annotated[int, typer.Option(help="Of the JPEGs that --resize writes.")] = 87,
    seed: Annotated[int, typer.Option(help="Of the order of the samples, and of what is held out.")] = 0,
    holdout: Annotated[
        float, typer.Option(help="Share of each class that becomes a split of its own, val; 0.15, for instance.")
    ] = 0.0,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse images that cannot be read.")] = False,
    processes: Processes = 0,
    debug: Debug = False,
) -> None:
    """Turn images into shuffled shards; stopped and started again, it goes on. Any number of processes: same bytes.

    Example: hsvit shards make photos/train shards --split train --name photos
    """
    with shown(2, debug):
        from ..data.shards.make import Options, make
        from ..run.report import duration

        started, left_out = time.perf_counter(), list[str]()
        options = Options(name, split, shards, resize, quality, seed, holdout, strict)
        with terminal.progress("shards") as done:
            made = list(make(source, out, options, terminal.cores(processes), done))
        for found, bad in made:
            named, size = found.shards[0].rsplit("-", 1)[0], terminal.size(int(found.bytes.sum()))
            held = f"{counted(len(found), 'sample')} of {named} in {counted(len(found.shards), 'shard')}"
            typer.echo(f"{out}: {held}, {size}")
            left_out += bad
        typer.echo(f"{counted(len(made[0][0].classes), 'class', 'classes')}, {duration(time.perf_counter() - started)}")
        if left_out:
            terminal.lines(left_out, 50)
            typer.echo(
                f"hsvit: images of {source} that could not be read and are left out: {len(left_out):,}", err=True
            )


@app.command("index")
def index_shards(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Folder for SPLIT.index.safetensors; FOLDER by default.")] = None,
    shards: Named = None,
    image: Image = "",
    processes: Processes = 0,
    debug: Debug = False,
) -> None:
    """Index each split's shards, which a training run needs. Reads headers, no images; stopped and started again, it
    goes on, and of a set that has grown it reads what is new.

    Example: hsvit shards index shards
    """
    with shown(2, debug):
        from ..data import indexing
        from ..data.layouts import options, parsed
        from ..data.shards.check import shards_in
        from ..data.shards.make import class_names

        names, patterns = class_names(folder), parsed(shards or [])
        splits, rows, problems, empty = shards_in(folder, patterns), [], list[str](), list[str]()
        if out is not None:
            _made_folder(out)
        total = sum(map(len, splits.values()))
        with terminal.progress("shards") as done:
            read = 0
            for split in splits:

                def one() -> None:
                    nonlocal read
                    done(read := read + 1, total)

                made = indexing.make(
                    folder,
                    split,
                    where=out,
                    processes=terminal.cores(processes),
                    done=one,
                    classes=names,
                    image=image,
                    patterns=patterns,
                )
                problems += made.problems
                if not len(made):
                    empty.append(split)
                    continue
                counts = len(made), len(made.shards), len(made.label_counts()), made.path.stat().st_size
                rows.append((split, *(f"{count:,}" for count in counts)))
        if rows:
            terminal.table(("split", "samples", "shards", "classes", "index bytes"), rows, str(out or folder))
        if problems:
            terminal.lines(problems, 20)
            more = f"hsvit shards check {folder}{options(patterns)}"
            typer.echo(f"hsvit: problems: {len(problems):,}; what they name is left out; more: {more}", err=True)
        if empty:
            raise RefusedError(f"{folder}: no sample of {', '.join(empty)} can be used, so it gets no index")


@app.command("check")
def check_shards(
    folder: Folder,
    classes: Annotated[int, typer.Option(help="Labels must be below it; 0: the classes of _info.json.")] = 0,
    shards: Named = None,
    image: Image = "",
    processes: Processes = 0,
    debug: Debug = False,
) -> None:
    """Read all shards and decode every image; exit code 1 if anything is wrong.

    Example: hsvit shards check shards --classes 10
    """
    with shown(2, debug):
        from ..data.layouts import parsed
        from ..data.shards.check import WARNINGS, check

        with terminal.progress("shards") as done:
            findings, samples = check(folder, classes, image, terminal.cores(processes), done, parsed(shards or []))
        findings.sort(key=lambda finding: not finding.is_error)
        errors = sum(finding.is_error for finding in findings)
        if findings:
            kinds = list(dict.fromkeys(finding.kind for finding in findings))
            counts = [sum(finding.kind == kind for finding in findings) for kind in kinds]
            rows = [
                (kind, "warning" if kind in WARNINGS else "error", f"{count:,}")
                for kind, count in zip(kinds, counts, strict=True)
            ]
            terminal.table(("kind", "", "count"), rows, str(folder))
            terminal.lines([f"{finding.kind}: {finding.text}" for finding in findings], 50)
        read = ", ".join(f"{count:,} of {split}" for split, count in samples.items())
        typer.echo(f"{folder}: errors: {errors:,}, warnings: {len(findings) - errors:,}; usable samples: {read}")
        if errors:
            raise typer.Exit(1)


@app.command("info")
def show_shards(folder: Folder, shards: Named = None, debug: Debug = False) -> None:
    """What the indexes of a folder say of its splits.

    Example: hsvit shards info shards
    """
    with shown(2, debug):
        from statistics import fmean

        from ..data import index
        from ..data.layouts import parsed
        from ..data.shards.make import INFO, disagreement, read_info

        patterns = parsed(shards or [])
        names = index.splits_in(folder)
        if not names:
            raise RefusedError(f"{folder}: no index there; make it: {index.command(folder, patterns=patterns)}")
        info, columns = read_info(folder), []
        for split in names:
            opened = index.open_index(folder, split, patterns=patterns)
            counts = list(opened.label_counts().values())
            some = len(opened) > 0
            differs = disagreement(info, split, opened.shards, opened.lengths)
            agrees = "agrees" if split in info.get("splits", {}) else "does not name it"
            columns.append(
                (
                    f"{len(opened):,}",
                    f"{len(opened.shards):,}",
                    f"{len(counts):,}",
                    f"{min(counts):,} / {fmean(counts):,.1f} / {max(counts):,}" if some else "",
                    terminal.size(int(opened.bytes.sum())),
                    f"{opened.image_bytes() / len(opened):,.0f}" if some else "",
                    opened.fingerprint,
                    f"{len(opened.problems):,}",
                    differs or agrees if info else "none",
                )
            )
        facts = (
            "samples",
            "shards",
            "classes",
            "images a class: least / mean / most",
            "bytes of the shards",
            "mean bytes of an image",
            "fingerprint",
            "problems when indexed",
            INFO,
        )
        terminal.table(("", *names), list(zip(facts, *columns, strict=True)), str(folder))


def _made_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(f"{folder}: {error.strerror}") from error
