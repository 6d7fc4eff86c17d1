"""Every key of a recipe, as markdown: its default, and the docstring under its field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import Field, dataclass, replace
from functools import cache
from typing import Any

from ..run.recipe import Recipe


@dataclass(frozen=True)
class Key:
    path: str
    """As an override names it: "model.widths.smallest"."""
    default: str
    """In TOML, or "required"."""
    meaning: str


def tables() -> Iterator[tuple[str, list[Key]]]:
    """(heading, its keys) of every table of a recipe; one for each kind of a table that has kinds."""
    for field in dataclasses.fields(Recipe):
        hint = typing.get_type_hints(Recipe)[field.name]
        kinds = typing.get_args(hint)
        for config in kinds or (hint,):
            keys = list(_keys(config, f"{field.name}."))
            if kinds:
                keys[0] = replace(keys[0], meaning=f"One of {', '.join(k.kind for k in kinds)}.")
            yield f'{field.name} of kind "{config.kind}"' if kinds else field.name, keys


def markdown() -> str:
    """A heading and a table of keys for every table of a recipe."""
    lines = []
    for heading, keys in tables():
        lines += [f"## {heading}", "", "| key | default | meaning |", "| --- | --- | --- |"]
        for key in keys:
            meaning = key.meaning.replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{key.path}` | {key.default} | {meaning} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _keys(config: Any, prefix: str) -> Iterator[Key]:
    hints, said = typing.get_type_hints(config), _docstrings(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield Key(prefix + field.name, _default(field), said.get(field.name, ""))


def _default(field: Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return f"`{json.dumps(value)}`"  # which TOML writes alike


@cache
def _docstrings(config: type) -> dict[str, str]:
    """{field: the string under it}, those of the bases too."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found
