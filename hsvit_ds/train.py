"""Train a recipe: `deepspeed --module hsvit_ds.train RECIPE [key=value …]`, `torchrun -m`, or `python -m`."""

from __future__ import annotations

import argparse
import signal
from dataclasses import replace
from pathlib import Path

from . import __version__
from .errors import RefusedError, shown
from .hosts import secrets


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


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with shown(2, args.debug):
        secrets.load()
        check_kernels()
        from .data.splits import named_as_before
        from .grid.grid import Grid, world_size
        from .run import folders
        from .run import recipe as recipes

        recipe = recipes.read(args.recipe, args.overrides)
        if not folders.names_splits(recipe.run, args.run, args.resume):
            recipe = replace(recipe, data=named_as_before(recipe.data))
        recipe, plan = recipes.resolve(recipe, world_size())
        grid = Grid(recipe.grid, recipe.model.submodules)
        try:
            text = recipes.dumps(recipe)
            folder = grid.agree(lambda: folders.open_folder(recipe.run, args.run, args.resume, text))
        except RefusedError:
            grid.close()  # all ranks are refused, and gloo aborts where one exits before the others
            raise
        from .run.survival import last_words
        from .run.trainer import Trainer

        trainer = Trainer(recipe, plan, grid, folder, args.resume or args.run is not None)
    with last_words(trainer.watch, args.debug):
        ended = trainer.fit()
        grid.close()
    if ended:
        raise SystemExit(int(ended))


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save Ctrl-C ends it, without a trace
    main()
