"""What a trained network looks at, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RefusedError, counted, shown
from ..train import check_kernels
from . import Checkpoint, Debug, Ema, Root
from .predict import named_files
from .terminal import progress, write_report

MOST = 50
"""Images of a page."""


def explain_images(
    model: Annotated[Path, typer.Argument(help="The folder of a run or of an export.", metavar="RUN|EXPORT")],
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, patterns in quotes, or - for an image from stdin.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page.")] = Path("explain.html"),
    width: Annotated[
        str, typer.Option(help="Which subnets, as 0.25,0.5; by default all of a ViT, the largest of an HSViT.")
    ] = "",
    checkpoint: Checkpoint = "latest",
    ema: Ema = False,
    root: Root = "",
    debug: Debug = False,
) -> None:
    """Show what a network looks at on images: attention, feature maps, what each submodule or width answers.

    Example: hsvit explain runs/digits-hsvit-001 photo.jpg -o explain.html
    """
    with shown(2, debug):
        check_kernels()
        files = list(named_files(images))
        if len(files) > MOST:
            raise RefusedError(f"{counted(len(files), 'image')}: a page shows at most {MOST}; name fewer")
        from ..results import explain, explain_page

        networks = explain.open_networks(model, width, checkpoint, ema, root)
        found = []
        with progress("images") as told:
            for name, content in files:
                found.append(explain.explain(networks, name, content))
                told(len(found), len(files))
        if any(image.pixels is not None for image in found):
            words = [network.chosen for network in networks.values()]
            page = explain_page.html(found, words, model.resolve().name)
            write_report(page, out, explain_page.MARK, "hsvit explain")
        if wrong := [image for image in found if image.wrong]:
            for image in wrong:
                typer.echo(f"hsvit: {image.name}: not read: {image.wrong}", err=True)
            raise typer.Exit(1)
