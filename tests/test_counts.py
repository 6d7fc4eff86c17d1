"""Where there is one of a thing, its noun is singular: what is counted is said by `errors.counted`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from .ranks import ROOT

NOUNS = (
    *("checkpoint", "class", "epoch", "failure", "file", "group", "host", "image", "key", "line", "model", "process"),
    *("rank", "replica", "sample", "shard", "split", "step", "submodule", "tensor", "time", "token", "width", "worker"),
    *("micro batch", "submodule rank", "training image", "such shard"),
)
PLURALS = "|".join(noun + ("es" if noun.endswith(("s", "ch")) else "s") for noun in NOUNS)
COUNTED = re.compile(rf" (?:{PLURALS})\b(?!/)", re.IGNORECASE)


def plurals(text: str) -> Iterator[str]:
    """Each f-string's value that a plural noun follows, with the noun."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, after in zip(node.values, node.values[1:], strict=False):
            if not isinstance(value, ast.FormattedValue) or not isinstance(after, ast.Constant):
                continue
            if match := COUNTED.match(str(after.value)):
                yield f"{ast.unparse(value.value)}{match[0]}"


def test_a_number_in_a_message_never_stands_before_a_plural() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {plural}"
        for path in (ROOT / "hsvit_ds").rglob("*.py")
        for plural in plurals(path.read_text())
    }
    assert found == set()


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ('f"the {world} ranks started"', True),
        ('f"going back {STEPS_BACK} times"', True),
        ('f"{len(x):,} training images"', True),
        ("f\"{counted(world, 'rank')} started\"", False),
        ('f"{path}: images"', False),
        ('f"{speed:.0f} images/s"', False),
    ],
)
def test_such_an_f_string_is_found(line: str, is_found: bool) -> None:
    assert bool(list(plurals(line))) == is_found
