"""`hsvit`: what is done beside a training run."""

from __future__ import annotations

from typing import Annotated

import typer

from . import __version__
from .commands import clusters, compare, explain, listing, new, predict, profile, recipes, runs, shards, sweep, weights

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("new")(new.make_recipe)
app.command("recipe")(recipes.show_recipe)
app.command("runs")(listing.list_runs)
app.command("compare")(compare.compare_runs)
app.command("evaluate")(runs.evaluate_run)
app.command("export")(runs.export_run)
app.command("predict")(predict.predict_images)
app.command("explain")(explain.explain_images)
app.command("import")(weights.import_weights)
app.command("doctor")(clusters.examine_hosts)
app.command("launch")(clusters.launch_run)
app.command("profile")(profile.profile_run)
app.command("sweep")(sweep.run_sweep)
app.add_typer(shards.app, name="shards", help="Data sets as tar shards.")


def show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hsvit-ds {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Vision transformers that scale sideways (HSViT) and down (Scala)."""


def main() -> None:
    app()


if __name__ == "__main__":
    main()
