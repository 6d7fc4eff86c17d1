"""The commands of `hsvit`, by what they are about. Heavy imports wait until one runs."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RefusedError

Debug = Annotated[bool, typer.Option("--debug", help="Show stack traces of refusals.")]
Run = Annotated[Path, typer.Argument(help="A run's folder.")]
Root = Annotated[str, typer.Option("--root", help="Of the run's data: its data.root by default.")]
Checkpoint = Annotated[str, typer.Option("--checkpoint", help="latest, best, or the step that it was saved after.")]
Force = Annotated[bool, typer.Option("--force", help="Write over what is there.")]
Ema = Annotated[bool, typer.Option("--ema", help="Its averaged weights.")]


def refuse_to_overwrite(out: Path, force: bool) -> None:
    """Refuse a file that is there, or a folder with something in it."""
    if not force and (any(out.iterdir()) if out.is_dir() else out.exists()):
        raise RefusedError(f"--out {out}: there is something already; name another, or write over it with --force")
