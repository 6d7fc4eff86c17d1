"""Train vision transformers that scale sideways (HSViT) and down (Scala) with one DeepSpeed engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "create_model",
    "import_deit",
    "import_hsvit",
    "import_hydravit",
    "import_scala",
    "import_weights",
    "list_models",
    "load_model",
    "load_run",
    "save_model",
]

if TYPE_CHECKING:
    from .engine.interop import (
        import_deit,
        import_hsvit,
        import_hydravit,
        import_scala,
        import_weights,
        load_model,
        load_run,
        save_model,
    )
    from .registry import create_model, list_models


def __getattr__(name: str) -> Any:
    """A public name's function, imported when it is asked for: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "registry" if name in ("create_model", "list_models") else "engine.interop"
    return getattr(importlib.import_module(f".{room}", __name__), name)
