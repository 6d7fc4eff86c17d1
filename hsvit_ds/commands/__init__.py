"""The commands of `hsvit`, by what they are about. Heavy imports wait until one runs."""

from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show stack traces of refusals.")]
Run = Annotated[Path, typer.Argument(help="A run's folder.")]
Root = Annotated[str, typer.Option("--root", help="Of the run's data: its data.root by default.")]
Ema = Annotated[bool, typer.Option("--ema", help="Its averaged weights.")]
