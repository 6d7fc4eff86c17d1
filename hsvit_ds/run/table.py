"""A recipe's TOML file as a table, with overrides; read before PyTorch is imported."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import RefusedError, counted, out, read_text

TRAINED: dict[str, Collection[str] | None] = {
    **dict.fromkeys(("model", "task", "augment", "optimizer", "ema")),
    "run": ("seed", "epochs", "global_batch", "bn_batch", "step_back"),
    "data": ("name", "classes", "image_size", "window", "last_batch"),
    "engine": ("precision",),
    "grid": ("exchange",),
}
"""The tables that say what is trained, whole; of those that also say where and how, the keys that do. The others say
where and how alone."""
_MODELS = {"hsvit": "HSViT", "vit": "ViT", "timm": "timm model"}
_MODELS |= {"mobilenet": "MobileNet", "uniformer": "UniFormer"}


def read(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Refuses what is no TOML, and overrides that are none; nothing else of it is checked."""
    try:
        text = read_text(path)
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RefusedError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _override(table, override)
    keys = [override.partition("=")[0].strip() for override in overrides]
    if twice := [key for key in keys if key.startswith("data.shards.") and keys.count(key) > 1]:
        raise RefusedError(
            f"{twice[0]} is given {counted(len(twice), 'time')}; quote its braces, which the shell expands"
        )
    return table


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.groups": 16, …}: the values of a nested table by their whole keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def is_trained(key: str) -> bool:
    """Whether a key says what is trained, not where and how alone."""
    top, _, rest = key.partition(".")
    return top in TRAINED and (TRAINED[top] is None or rest in (TRAINED[top] or ()))


def short(key: str, keys: Collection[str]) -> str:
    """The shortest end of a key that no other key has."""
    parts = key.split(".")
    for first in range(len(parts) - 1, 0, -1):
        end = ".".join(parts[first:])
        if sum(f".{other}".endswith(f".{end}") for other in keys) == 1:
            return end
    return key


def text(value: Any) -> str:
    """A key's value as a person writes it: of a path, which a fraction is not, its last part."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ",".join(map(text, value))
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}={text(inner)}' for key, inner in value.items())}}}"
    is_path = isinstance(value, str) and "/" in value and not re.fullmatch(r"\d+/\d+", value)
    return Path(value).name if is_path else str(value)


def find(name: str, names: Collection[str], asked: str) -> str:
    """The one of some keys or metrics that is called so, or ends so: "lr" for "optimizer.lr".

    Args:
        asked: how it was asked for, as a refusal repeats it: "--by lr".

    Raises:
        RefusedError: none, with the nearest, or several.
    """
    ends = {full: re.split(r"[./]", full) for full in names}
    words = re.split(r"[./]", name)
    found = [full for full, parts in ends.items() if full == name] or [
        full for full, parts in ends.items() if parts[-len(words) :] == words
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise RefusedError(f"{asked}: {name} may be {' or '.join(sorted(found))}; name one whole")
    likeness = {
        full: max(_alike(name, full), _alike(words[-1], parts[-1]) if len(words) == 1 else 0.0)
        for full, parts in ends.items()
    }
    near = [full for full in sorted(names, key=lambda full: (-likeness[full], full)) if likeness[full] > 0.6]
    offered = f"near: {', '.join(near[:3])}" if near else f"there are {', '.join(sorted(names)[:5])} and others"
    raise RefusedError(f"{asked}: no run here has {name}; {offered}")


def _alike(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def run_name(path: Path) -> str:
    """Of a recipe that has none: digits/hsvit.toml is "digits-hsvit"."""
    return f"{path.resolve().parent.name}-{path.stem}"


def split(override: str) -> tuple[list[str], Any]:
    """The parts of the key and the value of "key.path=value"."""
    path, sign, value = override.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise RefusedError(f'override "{override}": must have the form key.path=value')
    try:
        return keys, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, value.strip()  # a bare word is a string, as on any command line


def _override(table: dict[str, Any], text: str) -> None:
    keys, value = split(text)
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RefusedError(f'override "{text}": {key} is not a table')
    table[keys[-1]] = value


def first_words(path: Path, overrides: list[str], ranks: int) -> str:
    """What is to be trained on what, as far as the table says it; "" for one that will be refused."""
    try:
        table = read(path, overrides)
        model, data = table["model"], table.get("data", {})
        kind, named = _MODELS[model["kind"]], model.get("name" if model["kind"] == "timm" else "variant")
        widths = model.get("widths", {})
        slimmable = bool(widths.get("family")) or widths.get("smallest", 1) != 1
        article = "a slimmable" if slimmable else "an" if kind == "HSViT" else "a"
        of = f"{article} {kind}{f' ({named})' if named else ''}"
        name = table.get("run", {}).get("name") or run_name(path)
        return f"{name}: {of} on {data.get('name', 'digits')}, {counted(ranks, 'rank')}"
    except (RefusedError, AttributeError, KeyError, TypeError):
        return ""  # the reader of recipes says what is wrong


def say_first_words(path: Path, overrides: list[str]) -> None:
    """On rank 0, before anything that takes seconds to import."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("RANK", "0") == "0" and (words := first_words(path, overrides, ranks)):
        print(f"hsvit-ds {__version__}: {words}", file=out(), flush=True)
