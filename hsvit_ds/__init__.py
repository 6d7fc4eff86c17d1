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
    "import_mobilenet",
    "import_scala",
    "import_uniformer",
    "import_weights",
    "list_models",
    "load_model",
    "load_run",
    "save_model",
]

if TYPE_CHECKING:
    from .engine.foreign import (
        import_deit,
        import_hsvit,
        import_hydravit,
        import_mobilenet,
        import_scala,
        import_uniformer,
        import_weights,
    )
    from .engine.interop import load_model, load_run, save_model
    from .registry import create_model, list_models


def __getattr__(name: str) -> Any:
    """A public name's function, imported when it is asked for: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "engine.foreign" if name.startswith("import_") else "engine.interop"
    if name in ("create_model", "list_models"):
        room = "registry"
    return getattr(importlib.import_module(f".{room}", __name__), name)
