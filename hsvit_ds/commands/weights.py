"""Weights of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import shown
from ..train import check_kernels
from . import Debug, Force, refuse_to_overwrite


def import_weights(
    file: Annotated[
        Path, typer.Argument(help="Of the published HSViT, Scala, HydraViT, UniFormer, or timm's DeiT, MobileNetV2.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write .safetensors.")],
    image_size: Annotated[int, typer.Option(help="HSViT, UniFormer, MobileNetV2: side of the images, pixels.")] = 0,
    pool_strides: Annotated[str, typer.Option(help="HSViT: stride of each block's pool: 2,1,2,1")] = "",
    heads: Annotated[
        int,
        typer.Option(help="Attention heads; 8 for HSViT, one for 64 channels of a DeiT; of a UniFormer's third stage."),
    ] = 0,
    smallest: Annotated[
        float, typer.Option(help="Scala, HydraViT: the smallest width; without it the weights are a DeiT's.")
    ] = 1.0,
    granularity: Annotated[float, typer.Option(help="Scala, HydraViT: the step between widths.")] = 0.0625,
    side: Annotated[str, typer.Option(help="Scala: the smallest width's channels, leading or trailing.")] = "leading",
    hydravit: Annotated[bool, typer.Option("--hydravit", help="HydraViT: a width is whole heads.")] = False,
    force: Force = False,
    trust: Annotated[bool, typer.Option("--trust", help="Unpickle a file that could run code.")] = False,
    debug: Debug = False,
) -> None:
    """Turn published weights, told apart by their keys, into a model file of this project.

    Example: hsvit import scala.pth -o model.safetensors --smallest 0.25
    """
    with shown(2, debug):
        check_kernels()
        refuse_to_overwrite(out, force)
        from ..engine import foreign, interop
        from ..errors import RefusedError
        from ..models import weights

        try:
            strides = tuple(int(stride) for stride in pool_strides.split(",") if pool_strides)
        except ValueError as error:
            raise RefusedError(f"--pool-strides {pool_strides}: must be numbers as in 2,1,2,1") from error
        model = foreign.import_weights(
            weights.read_foreign(file, trust=trust, way_out="add --trust"),
            image_size=image_size,
            pool_strides=strides,
            heads=heads,
            smallest=smallest,
            granularity=granularity,
            side=side,
            hydravit=hydravit,
        )
        interop.save_model(model, out)
        count = sum(p.numel() for p in model.parameters())
        typer.echo(f"{out}: {type(model).__name__} with {count:,} parameters, {model.config}")
