"""Runs that have ended: their accuracy at every width, and networks of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import shown
from ..train import check_kernels
from . import Checkpoint, Debug, Ema, Force, Root, Run, refuse_to_overwrite

if TYPE_CHECKING:
    from ..models.slimmable import Width
    from ..results.saved import SavedRun


def evaluate_run(
    run: Run,
    widths: Annotated[str, typer.Option(help="0.25,0.5; by default all that were trained.")] = "",
    mix: Annotated[
        list[str] | None, typer.Option(help="A width for each block, 0.25x6,1x6; may be given several times.")
    ] = None,
    present: Annotated[
        str, typer.Option(help="Submodules that answer alone, 0,2,3; or sweep: by how many of them answer.")
    ] = "",
    split: Annotated[str, typer.Option(help="train, val or test, as the run's recipe names them.")] = "test",
    untrained: Annotated[bool, typer.Option("--untrained", help="Also widths that were never trained.")] = False,
    checkpoint: Checkpoint = "latest",
    ema: Ema = False,
    root: Root = "",
    debug: Debug = False,
) -> None:
    """Score a run at several widths, or with some of its submodules, in one pass over the data.

    Example: hsvit evaluate runs/digits-scala-001 --widths 0.25,0.5 --split val
    """
    with shown(2, debug):
        check_kernels()
        from ..results import saved
        from ..run import mlflow_copy, pictures, report, title

        opened = saved.open_run(run, ema, root, checkpoint)
        split = opened.split(split)
        chosen = opened.mixes(mix or [], untrained)
        if present:
            _evaluate_present(opened, present, split, widths, untrained)
        else:
            if widths or not mix:
                chosen = tuple(sorted((*opened.widths(widths or "all", untrained), *chosen), key=float))
            found, counts = opened.evaluate(split, chosen)
            if opened.grid.is_main:
                rows = report.width_rows(opened.model, chosen, found, opened.trained)
                report.print_widths(rows, f"{run}, {split}, {opened.read}")
                some = chosen if widths or mix else ()
                name = _picture(opened, "widths", split, some)
                heading, accuracy = f"{title.of(run)}, {split}, {opened.read}", opened.accuracy_of(split)
                files = [pictures.draw_widths(name, rows, heading, accuracy)]
                files.append(pictures.write_widths(name.with_suffix(".csv"), rows))
                heading += f", {chosen[-1].words}" if len(chosen) > 1 else ""
                name = _picture(opened, "classes", split, some)
                files += pictures.write_classes(name, counts, opened.classes, heading)
                for file in files:
                    typer.echo(file)
                mlflow_copy.add(run, files)
        opened.grid.close()


def _evaluate_present(run: SavedRun, present: str, split: str, widths: str, untrained: bool) -> None:
    """widths: as the option; "" for the largest."""
    from ..results import present as sweeps
    from ..run import mlflow_copy, pictures, report, title

    subsets, chosen = run.subsets(present), run.widths(widths, untrained) if widths else run.trained[-1:]
    found = run.evaluate_subsets(split, subsets, chosen)
    if not run.grid.is_main:
        return
    for width, scores in zip(chosen, found, strict=True):
        at = f", width {width}" if widths else ""
        top1, where = [score.top1 for score in scores], f"{split}, {run.read}{at}"
        if present == "sweep":
            rows = report.present_rows(subsets, top1)
            report.print_present(rows, f"{run.folder}, {where}")
            name = _picture(run, "present", split, (width,) if widths else ())
            heading, accuracy = f"{title.of(run.folder)}, {where}", run.accuracy_of(split)
            files = [pictures.draw_present(name, rows, heading, accuracy)]
            files.append(sweeps.write(name.with_suffix(".csv"), subsets, top1))
            for file in files:
                typer.echo(file)
            mlflow_copy.add(run.folder, files)
        else:
            names = ", ".join(str(number) for number in subsets[0])
            typer.echo(
                f"{run.folder}, {where}, submodules {names} of {run.recipe.model.submodules}: "
                f"top-1 {scores[0].top1:.2f} %, loss {scores[0].loss:.4f}"
            )


def _picture(run: SavedRun, what: str, split: str, widths: Sequence[Width]) -> Path:
    from ..results.saved import drawn_name

    return run.folder / f"{drawn_name(run, what, split, widths)}.png"


def export_run(
    run: Run,
    width: Annotated[str, typer.Option(help="Which subnet, as 0.5; by default the largest.")] = "",
    mix: Annotated[str, typer.Option(help="Instead, a width for each block, as 0.25x6,1x6.")] = "",
    budget: Annotated[
        str, typer.Option(help="The best measured subnet within 1.3G (multiply-adds), 6Mparams or 8ms.")
    ] = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder; RUN/export-WIDTH by default.")] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="Also a width that was never trained.")] = False,
    force: Force = False,
    checkpoint: Checkpoint = "latest",
    ema: Ema = False,
    root: Root = "",
    debug: Debug = False,
) -> None:
    """Write the subnet of a width as a network of its own: safetensors, timm config, torch.export, ONNX, model card.

    Example: hsvit export runs/digits-scala-001 --width 0.5 -o half
    """
    with shown(2, debug):
        check_kernels()
        from ..results import export, saved
        from ..run import mlflow_copy

        opened = saved.open_run(run, ema, root, checkpoint)
        chosen = opened.choose(width, budget, untrained, mix)
        folder = out or run / f"export-{chosen.width}"
        refuse_to_overwrite(folder, force)
        typer.echo(chosen.words)
        model, card = opened.at(chosen.width), opened.card(chosen.width)
        files = export.export(model, chosen.width, folder, card)
        opened.grid.close()
        for path in files:
            typer.echo(f"{path}: {path.stat().st_size:,} bytes")
        mlflow_copy.add(run, [folder])
