"""`steps` for several recipes in one start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import steps


def main(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """arguments: {recipe: {case: overrides}}."""
    return {base: steps.main({"base": base, "cases": cases}, folder / base) for base, cases in arguments.items()}
