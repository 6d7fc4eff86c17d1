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
    file: Annotated[Path, typer.Argument(help="Weights of the published HSViT or Scala code, or of timm's DeiT.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write .safetensors.")],
    image_size: Annotated[int, typer.Option(help="HSViT: side of the images, pixels.")] = 0,
    pool_strides: Annotated[str, typer.Option(help="HSViT: stride of each block's pool: 2,1,2,1")] = "",
    heads: Annotated[int, typer.Option(help="Attention heads; 8 for HSViT, one for 64 channels of a DeiT.")] = 0,
    smallest: Annotated[
        float, typer.Option(help="Scala: the smallest width; without it the weights are a DeiT's.")
    ] = 1.0,
    granularity: Annotated[float, typer.Option(help="Scala: the step between widths.")] = 0.0625,
    side: Annotated[str, typer.Option(help="Scala: the smallest width's channels, leading or trailing.")] = "leading",
    debug: Debug = False,
) -> None:
    """Turn published weights, told apart by their keys, into a model file of this project."""
    with shown(2, debug):
        check_kernels()
        from . import interop
        from .errors import RefusedError

        try:
            strides = tuple(int(stride) for stride in pool_strides.split(",") if pool_strides)
        except ValueError as error:
            raise RefusedError(f"--pool-strides {pool_strides}: must be numbers as in 2,1,2,1") from error
        model = interop.import_weights(
            interop.read_foreign(file),
            image_size=image_size,
            pool_strides=strides,
            heads=heads,
            smallest=smallest,
            granularity=granularity,
            side=side,
        )
        interop.save_model(model, out)
        count = sum(p.numel() for p in model.parameters())
        typer.echo(f"{out}: {type(model).__name__} with {count:,} parameters, {model.config}")


Run = Annotated[Path, typer.Argument(help="A run's folder.")]
Ema = Annotated[bool, typer.Option("--ema", help="Its averaged weights.")]


@app.command("evaluate")
def evaluate_run(
    run: Run,
    widths: Annotated[str, typer.Option(help="all that were trained, or 0.25,0.5")] = "all",
    split: Annotated[str, typer.Option(help="Of the run's data.")] = "test",
    untrained: Annotated[bool, typer.Option("--untrained", help="Also widths that were never trained.")] = False,
    ema: Ema = False,
    debug: Debug = False,
) -> None:
    """Score a run at several widths in one pass over the data."""
    with shown(2, debug):
        check_kernels()
        from . import report, saved

        opened = saved.open_run(run, ema)
        chosen = opened.widths(widths, untrained)
        found = opened.evaluate(split, chosen)
        if opened.grid.is_main:
            rows = report.width_rows(opened.model, chosen, found)
            report.print_widths(rows, f"{run}, {split}")
            typer.echo(report.draw_widths(run / f"widths-{split}.png", rows, f"{run.name}, {split}"))
        opened.grid.close()


@app.command("export")
def export_run(
    run: Run,
    width: Annotated[str, typer.Option(help="Which subnet, as 0.5.")] = "",
    budget: Annotated[str, typer.Option(help="The widest subnet for 1.3G (multiply-adds), 6Mparams or 8ms.")] = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder; RUN/export-WIDTH by default.")] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="Also a width that was never trained.")] = False,
    ema: Ema = False,
    debug: Debug = False,
) -> None:
    """Write the subnet of a width as a network of its own: safetensors, timm config, torch.export, ONNX, model card."""
    with shown(2, debug):
        check_kernels()
        from . import export, saved

        opened = saved.open_run(run, ema)
        chosen = opened.choose(width, budget, untrained)
        folder = out or run / f"export-{chosen}"
        files = export.export(opened.at(chosen), chosen, folder, opened.reader.facts, opened.about(chosen))
        opened.grid.close()
        for path in files:
            typer.echo(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
