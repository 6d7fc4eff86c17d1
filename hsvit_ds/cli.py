"""`hsvit`: what is done beside a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import shown
from .train import check_kernels

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Debug = Annotated[bool, typer.Option("--debug", help="Show stack traces of refusals.")]


@app.callback()
def about() -> None:
    """Vision transformers that scale sideways (HSViT) and down (Scala)."""


@app.command("recipe")
def show_recipe(
    file: Annotated[Path, typer.Argument(help="A recipe in TOML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    ranks: Annotated[int, typer.Option(help="Ranks to resolve for; the grid's own by default.")] = 0,
    debug: Debug = False,
) -> None:
    """Print a recipe with everything derived filled in."""
    with shown(2, debug):
        check_kernels()
        from . import recipe as recipes

        recipe = recipes.read(file, overrides)
        recipe, plan = recipes.resolve(recipe, ranks or recipe.grid.submodule_ranks)
        for key, value in vars(plan).items():
            typer.echo(f"# {key} = {value}")
        typer.echo("\n" + recipes.dumps(recipe), nl=False)


@app.command("import")
def import_weights(
    file: Annotated[Path, typer.Argument(help="Weights of the published HSViT code.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write .safetensors.")],
    image_size: Annotated[int, typer.Option(help="Side of the images, pixels.")],
    pool_strides: Annotated[str, typer.Option(help="Stride of each block's pool: 2,1,2,1")],
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 8,
    debug: Debug = False,
) -> None:
    """Turn weights of the published HSViT code into a model file of this project."""
    with shown(2, debug):
        check_kernels()
        from . import interop
        from .errors import RefusedError

        try:
            strides = tuple(int(stride) for stride in pool_strides.split(","))
        except ValueError as error:
            raise RefusedError(f"--pool-strides {pool_strides}: must be numbers as in 2,1,2,1") from error
        model = interop.import_hsvit(
            interop.read_foreign(file), image_size=image_size, pool_strides=strides, heads=heads
        )
        interop.save_model(model, out)
        count = sum(p.numel() for p in model.parameters())
        typer.echo(f"{out}: HSViT with {count:,} parameters, {model.config}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
