"""What a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import counted, shown
from ..train import check_kernels
from . import Debug


def _print_keys(asked: bool) -> None:
    if asked:
        from .keys import markdown

        typer.echo(markdown(), nl=False)
        raise typer.Exit


def show_recipe(
    file: Annotated[Path, typer.Argument(help="A recipe in TOML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    ranks: Annotated[int, typer.Option(help="Ranks to resolve for; the grid's own by default.")] = 0,
    memory: Annotated[bool, typer.Option("--memory", help="What each rank will need, instead of the recipe.")] = False,
    keys: Annotated[
        bool, typer.Option("--keys", is_eager=True, callback=_print_keys, help="Every key of a recipe, as markdown.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print a recipe with everything derived filled in.

    Example: hsvit recipe recipes/digits/hsvit.toml model.submodules=4 --memory
    """
    with shown(2, debug):
        check_kernels()
        from ..run import recipe as recipes

        recipe = recipes.read(file, overrides)
        recipe, plan = recipes.resolve(recipe, ranks or recipe.grid.submodule_ranks)
        if memory:
            from ..run import report
            from ..run.memory import needed

            title = (
                f"{recipe.run.name}: {counted(plan.replicas, 'replica')} x "
                f"{counted(recipe.grid.submodule_ranks, 'submodule rank')}, "
                f"ZeRO-{recipe.engine.zero_stage}, micro batch {plan.micro_batch}, {'bf16' if plan.bf16 else 'fp32'}"
            )
            report.print_memory(vars(needed(recipe, plan)), title)
            return
        for key, value in vars(plan).items():
            typer.echo(f"# {key} = {value}")
        typer.echo("\n" + recipes.dumps(recipe), nl=False)
