"""Train a recipe: `deepspeed --module hsvit_ds.train RECIPE [key=value …]`, `torchrun -m`, or `python -m`."""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import replace
from pathlib import Path

from . import __version__
from .errors import RefusedError, shown
from .hosts import secrets
from .run.tracking import METRICS


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("hsvit_ds.train", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the recipe's keys")
    parser.add_argument("--resume", action="store_true", help="continue the newest run of this name")
    parser.add_argument("--run", type=Path, help="this very folder: continued from its checkpoint if it has one")
    parser.add_argument("--debug", action="store_true", help="show stack traces of refusals")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    return parser.parse_intermixed_args(argv)


def check_kernels() -> None:
    """Refuse a package that merely has our name, before anything of it is used."""
    import hsvit_kernels

    found = getattr(hsvit_kernels, "__version__", None)
    if found != __version__ or not hasattr(hsvit_kernels, "grouped_attention"):
        where = getattr(hsvit_kernels, "__file__", None) or "a folder without __init__.py"
        raise RefusedError(
            f"hsvit_kernels at {where} is not the package of hsvit-ds {__version__} (its version: {found}); "
            "take it off PYTHONPATH or uninstall it, then reinstall hsvit-ds"
        )


def claim_folder(folder: Path, recipe_text: str) -> Path:
    """Make a run's folder, or go on in it with the recipe that it was started with; refused where not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "recipe.toml").exists():
            (folder / "recipe.toml").write_text(recipe_text)
        (folder / METRICS).open("a").close()
    except OSError as error:
        raise RefusedError(f"run folder {folder}: {error.strerror}; set run.root") from error
    return folder


def names_splits(folder: Path) -> bool:
    """Whether the recipe of the run in a folder says which splits are `data.val` and `data.test`; once none did."""
    try:
        return "val" in tomllib.loads((folder / "recipe.toml").read_text())["data"]
    except OSError:  # a new run
        return True


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with shown(2, args.debug):
        secrets.load()
        check_kernels()
        from .data.splits import check_splits, named_as_before
        from .grid.grid import Grid, world_size
        from .run import recipe as recipes

        recipe, plan = recipes.resolve(recipes.read(args.recipe, args.overrides), world_size())
        grid = Grid(recipe.grid, recipe.model.submodules)
        try:
            continued = args.resume or args.run is not None
            place = args.run or recipes.run_folder(recipe.run, args.resume)
            if continued and not grid.agree(lambda: names_splits(place)):
                recipe = replace(recipe, data=named_as_before(recipe.data))
            grid.together(lambda: check_splits(recipe.data))
            folder = grid.agree(lambda: claim_folder(place, recipes.dumps(recipe)))
        except RefusedError:
            grid.close()  # all ranks are refused, and gloo aborts where one exits before the others
            raise
        from .run.survival import last_words
        from .run.trainer import Trainer

        trainer = Trainer(recipe, plan, grid, folder, continued)
    with last_words(trainer.watch, args.debug):
        ended = trainer.fit()
        grid.close()
    if ended:
        raise SystemExit(int(ended))


if __name__ == "__main__":
    main()
