"""What a recipe says."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RefusedError, counted, shown
from ..train import check_kernels
from . import Debug, terminal

if TYPE_CHECKING:
    from ..run.recipe import Plan, Recipe
    from ..run.widths import Hours


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"


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
    links: Annotated[
        Path | None,
        typer.Option(help="What a run will take of time and memory over these links (TOML), instead of the recipe."),
    ] = None,
    hours: Annotated[
        bool, typer.Option("--hours", help="What each width alone would take here, timed, instead of the recipe.")
    ] = False,
    form: Annotated[Format, typer.Option("--format", help="Of --hours: table or json.")] = Format.TABLE,
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
        asked = [name for name, is_set in (("memory", memory), ("links", links), ("hours", hours)) if is_set]
        if len(asked) > 1:
            raise RefusedError(f"{' and '.join(f'--{n}' for n in asked)}: each takes the recipe's place; ask for one")
        if form != Format.TABLE and not hours:
            raise RefusedError(f"--format {form}: only --hours has one; leave it out")
        from ..run import recipe as recipes

        recipe = recipes.read(file, overrides)
        recipe, plan = recipes.resolve(recipe, ranks or recipe.grid.submodule_ranks)
        if memory:
            _print_memory(recipe, plan)
        elif links:
            _print_prediction(recipe, plan, links)
        elif hours:
            _print_hours(recipe, plan, form)
        else:
            _print_recipe(recipe, plan)


def _print_recipe(recipe: Recipe, plan: Plan) -> None:
    from ..run import recipe as recipes
    from ..run import widths

    for key, value in vars(plan).items():
        typer.echo(f"# {key} = {value}")
    if len(epochs := widths.expected_epochs(recipe, plan)) > 1:
        typer.echo(f"# expected epochs of each width = {widths.words(epochs)}")
    if same := widths.alike(recipe):
        typer.echo(f"# widths that rounding gives the same channels = {same}")
    typer.echo("\n" + recipes.dumps(recipe), nl=False)


def _print_memory(recipe: Recipe, plan: Plan) -> None:
    from ..run import report
    from ..run.memory import needed

    title = (
        f"{recipe.run.name}: {counted(plan.replicas, 'replica')} x "
        f"{counted(recipe.grid.submodule_ranks, 'submodule rank')}, "
        f"ZeRO-{recipe.engine.zero_stage}, micro batch {plan.micro_batch}, {'bf16' if plan.bf16 else 'fp32'}"
    )
    report.print_memory(vars(needed(recipe, plan)), title)


def _print_prediction(recipe: Recipe, plan: Plan, file: Path) -> None:
    from ..run import links, prediction
    from ..run.report import duration

    joined = links.read(file)
    shape = prediction.shape(recipe, plan)
    _print_memory(recipe, plan)
    passes = joined.passes or prediction.timed(recipe, plan, joined)
    step = prediction.simulate(shape, joined, passes)
    sent = {name.removeprefix("comm/").replace("_", " "): size for name, size in prediction.traffic(shape).items()}
    rows = [
        ("images/s", f"{shape.global_batch / step.seconds:,.1f}"),
        ("all steps", duration(plan.steps * step.seconds)),
        ("a step, ms", f"{1000 * step.seconds:.3f}"),
        *((f"{name}, ms", f"{1000 * getattr(step, name):.3f}") for name in prediction.PARTS),
        ("idle, % of a step", f"{100 * step.idle:.2f}"),
        *((f"{name} of a rank and step", f"{size:,.0f}") for name, size in sent.items() if size),
    ]
    source = f"passes as {file} has them" if joined.passes else "passes timed here"
    title = f"{recipe.run.name}: {counted(plan.ranks, 'rank')} on hosts of {joined.host.ranks}, {source}"
    terminal.table(("predicted", ""), rows, title=title)


def _print_hours(recipe: Recipe, plan: Plan, form: Format) -> None:
    from ..run import widths
    from ..run.report import duration

    with terminal.progress("trainings timed") as told:
        found = widths.hours(recipe, plan, told)
    if form == Format.JSON:
        typer.echo(json.dumps(_as_json(recipe, plan, found), indent=1))
        return
    rows = [
        (
            *(str(one.width), f"{one.parameters:,}", f"{one.macs / 1e9:.4f}", f"{one.epochs:.4g}"),
            *(f"{one.step:.4g}", duration(found.steps * one.step)),
        )
        for one in found.alone
    ]
    rows.append(("one by one", "", "", "", "", duration(3600 * found.separate)))
    rows.append(("together", "", "", "", f"{found.step:.4g}", duration(3600 * found.together)))
    head = ("width", "parameters", "GMACs", "expected epochs", "s a step alone", "time alone")
    steps, ranks = counted(found.steps, "step"), counted(plan.ranks, "rank")
    terminal.table(head, rows, title=f"{recipe.run.name}: {steps} on {ranks}")
    alone, ratio = counted(len(found.alone), "width"), found.separate / found.together
    typer.echo(
        f"one by one {alone} take {ratio:.2f}x as long as together; by first steps timed here, without starts and "
        "evaluations"
    )


def _as_json(recipe: Recipe, plan: Plan, found: Hours) -> dict[str, object]:
    return {
        "recipe": recipe.run.name,
        "ranks": plan.ranks,
        "steps": found.steps,
        "widths": [
            {
                "width": str(one.width),
                "parameters": one.parameters,
                "macs": one.macs,
                "expected_epochs": one.epochs,
                "seconds_a_step": one.step,
                "hours": found.steps * one.step / 3600,
            }
            for one in found.alone
        ],
        "separate_hours": found.separate,
        "seconds_a_step": found.step,
        "hours": found.together,
    }
