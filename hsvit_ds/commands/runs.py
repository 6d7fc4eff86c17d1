"""Runs that have ended: their accuracy at every width, and networks of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import shown
from ..train import check_kernels
from . import Debug, Ema, Root, Run


def evaluate_run(
    run: Run,
    widths: Annotated[str, typer.Option(help="all that were trained, or 0.25,0.5")] = "all",
    split: Annotated[str, typer.Option(help="Of the run's data.")] = "test",
    untrained: Annotated[bool, typer.Option("--untrained", help="Also widths that were never trained.")] = False,
    ema: Ema = False,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Score a run at several widths in one pass over the data."""
    with shown(2, debug):
        check_kernels()
        from .. import report, saved

        opened = saved.open_run(run, ema, root)
        chosen = opened.widths(widths, untrained)
        found = opened.evaluate(split, chosen)
        if opened.grid.is_main:
            rows = report.width_rows(opened.model, chosen, found)
            report.print_widths(rows, f"{run}, {split}")
            typer.echo(report.draw_widths(run / f"widths-{split}.png", rows, f"{run.name}, {split}"))
        opened.grid.close()


def export_run(
    run: Run,
    width: Annotated[str, typer.Option(help="Which subnet, as 0.5.")] = "",
    budget: Annotated[str, typer.Option(help="The widest subnet for 1.3G (multiply-adds), 6Mparams or 8ms.")] = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder; RUN/export-WIDTH by default.")] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="Also a width that was never trained.")] = False,
    ema: Ema = False,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Write the subnet of a width as a network of its own: safetensors, timm config, torch.export, ONNX, model card."""
    with shown(2, debug):
        check_kernels()
        from .. import export, saved

        opened = saved.open_run(run, ema, root)
        chosen = opened.choose(width, budget, untrained)
        folder = out or run / f"export-{chosen}"
        about = opened.about(chosen)
        files = export.export(opened.at(chosen), chosen, folder, opened.facts, opened.recipe.augment, about)
        opened.grid.close()
        for path in files:
            typer.echo(f"{path}: {path.stat().st_size:,} bytes")
