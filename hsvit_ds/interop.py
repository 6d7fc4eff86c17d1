"""The name under which model cards and users import these; they live in `engine/interop.py`."""

from .engine.interop import import_deit, import_hsvit, import_scala, import_weights, load_model, load_run, save_model

__all__ = ["import_deit", "import_hsvit", "import_scala", "import_weights", "load_model", "load_run", "save_model"]
