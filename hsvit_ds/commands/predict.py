"""Asking a trained network what is on an image."""

from __future__ import annotations

import csv
import glob
import json
import sys
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RefusedError, counted, shown
from ..train import check_kernels
from . import Checkpoint, Debug, Ema, Root

if TYPE_CHECKING:
    from ..results.predict import Prediction


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


def predict_images(
    model: Annotated[Path, typer.Argument(help="The folder of a run or of an export.", metavar="RUN|EXPORT")],
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, patterns in quotes, or - for an image from stdin.")
    ],
    width: Annotated[str, typer.Option(help="Which subnet, as 0.5; by default the largest.")] = "",
    budget: Annotated[str, typer.Option(help="The best measured subnet within 1.3G, 6Mparams or 2ms.")] = "",
    top: Annotated[int, typer.Option(min=1, help="Classes to show of each image.")] = 5,
    format: Annotated[Format, typer.Option(help="table, json or csv.")] = Format.table,
    checkpoint: Checkpoint = "latest",
    ema: Ema = False,
    root: Root = "",
    debug: Debug = False,
) -> None:
    """Say what is on images: class names and probabilities, by the way that evaluation reads an image.

    Example: hsvit predict runs/flowers-001 photo.jpg --top 3
    """
    with shown(2, debug):
        check_kernels()
        files = list(named_files(images))
        from ..results.predict import open_predictor

        opened = open_predictor(model, width, budget, checkpoint, ema, root)
        typer.echo(opened.chosen, err=format != Format.table)
        began, found = time.perf_counter(), list(_with_bar(opened.predict(files, top), len(files)))
        spent = time.perf_counter() - began
        {Format.table: _table, Format.json: _json, Format.csv: _csv}[format](found)
        rate = f"{len(found) / spent:.1f} images/s"
        typer.echo(f"{counted(len(found), 'image')} in {spent:.2f} s, {rate}", err=format != Format.table)
        if wrong := [prediction for prediction in found if prediction.wrong]:
            for prediction in wrong:
                typer.echo(f"hsvit: {prediction.image}: not read: {prediction.wrong}", err=True)
            raise typer.Exit(1)


def named_files(images: list[str]) -> Iterator[tuple[str, Path | bytes]]:
    """(name, where its content is) of everything that was asked for, folders and patterns in the order of names."""
    from ..data.members import IMAGES
    from ..data.shards.sources import images_in

    for text in images:
        path = Path(text)
        if text == "-":
            yield "-", sys.stdin.buffer.read()
        elif path.is_file():
            yield text, path
        elif path.is_dir():
            inside = sorted(images_in(path))
            if not inside:
                raise RefusedError(f"{text}: no images ({', '.join(IMAGES)}) in this folder")
            yield from ((name, Path(name)) for name in inside)
        elif there := sorted(Path(p) for p in glob.glob(text, recursive=True) if Path(p).is_file()):
            yield from ((str(p), p) for p in there)
        else:
            raise RefusedError(f"{text}: no such file, folder or pattern of files")


def _with_bar(predictions: Iterator[Prediction], total: int) -> Iterator[Prediction]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return iter(track(predictions, "images", total, console=console, transient=True, disable=not console.is_terminal))


def _table(found: list[Prediction]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("image", "class", "probability, %", "ms")
    for prediction in found:
        for rank, (name, probability) in enumerate(prediction.answers):
            first = (prediction.image, f"{prediction.ms:.1f}") if rank == 0 else ("", "")
            table.add_row(first[0], name, f"{100 * probability:.2f}", first[1], end_section=False)
        table.add_section()
    Console(highlight=False, soft_wrap=True, markup=False, emoji=False).print(table)


def _json(found: list[Prediction]) -> None:
    rows = [
        {
            "image": prediction.image,
            "predictions": [{"class": name, "probability": probability} for name, probability in prediction.answers],
            "ms": round(prediction.ms, 3),
            **({"error": prediction.wrong} if prediction.wrong else {}),
        }
        for prediction in found
    ]
    typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))


def _csv(found: list[Prediction]) -> None:
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["image", "rank", "class", "probability", "ms"])
    for prediction in found:
        for rank, (name, probability) in enumerate(prediction.answers, 1):
            rows.writerow([prediction.image, rank, name, f"{probability:.6f}", f"{prediction.ms:.3f}"])
