"""The names of DeepSpeed's configuration, taken from its source: importing it takes six seconds."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import RefusedError


def check(keys: Mapping[str, Any], where: str = "engine.deepspeed") -> None:
    """Refuse keys that DeepSpeed's configuration has nowhere, which it would take without a word."""
    names = known()
    for key, value in keys.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f'did you mean "{near[0]}"?' if near else "its configuration has no such name"
            raise RefusedError(f"{where}.{key}: unknown to DeepSpeed; {hint}")
        if isinstance(value, dict):
            check(value, f"{where}.{key}")


@cache
def known() -> frozenset[str]:
    spec = find_spec("deepspeed")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    files = [file for file in root.rglob("*.py") if file.stem == "constants" or "config" in file.stem]
    return frozenset(name for file in files for name in _names(ast.parse(file.read_text("utf-8"))))


def _names(tree: ast.AST) -> Iterator[str]:
    """Strings that are words, and the fields of models."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
