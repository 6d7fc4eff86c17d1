"""Train a recipe: `deepspeed --module hsvit_ds.train RECIPE [key=value …]`, `torchrun -m`, or `python -m`."""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from . import __version__
from .errors import Log, RefusedError, out, shown
from .hosts import secrets
from .run.table import say_first_words

EXAMPLE = "deepspeed --num_accelerators 2 --module hsvit_ds.train recipes/digits/hsvit.toml run.seed=1"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("hsvit_ds.train", description=__doc__, epilog=f"Example: {EXAMPLE}")
    parser.add_argument("recipe", type=Path, help="a file in TOML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the recipe's keys")
    parser.add_argument("--resume", action="store_true", help="continue the newest run of this name")
    parser.add_argument("--run", type=Path, help="this very folder: continued from its checkpoint if it has one")
    parser.add_argument("--debug", action="store_true", help="show stack traces of refusals, and what libraries print")
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
    log = Log(args.debug)
    with log.kept():
        with shown(2, args.debug):
            say_first_words(args.recipe, args.overrides)
            secrets.load()
            check_kernels()
            from .run.start import start

            trainer = start(args.recipe, args.overrides, args.run, args.resume, log)
        log.is_set_up()
        from .run.commands import again
        from .run.survival import last_words

        with last_words(trainer.watch, args.debug):
            ended = trainer.fit()
            trainer.grid.close()
        if ended and trainer.grid.is_main and (command := again(args.recipe, args.overrides, trainer.folder)):
            print(command, file=out(), flush=True)
    if ended:
        raise SystemExit(int(ended))


def leave(code: int) -> NoReturn:
    """End this process as Python would, but for taking the interpreter apart.

    A thread of gloo that still holds a tensor then, of a collective that is over, aborts the process: a run that has
    finished would have failed (PyTorch's issue 190489).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # who listened may be gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save Ctrl-C ends it, without a trace
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    if "WORLD_SIZE" in os.environ:  # a launcher's rank
        leave(code)
    raise SystemExit(code)
