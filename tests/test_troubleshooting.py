"""docs/troubleshooting.md quotes messages that the program has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from .ranks import ROOT

SHORTEST = 6
"""Letters of a part between two … that say something."""


def literals() -> Iterator[str]:
    """Every string of the packages, with … where a value is filled in."""
    for folder in ("hsvit_ds", "kernels/hsvit_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values)  # type: ignore[misc]


SAID = "\n".join(literals())
QUOTED = re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.M)


def missing(message: str) -> list[str]:
    """The parts of a quoted message that the program never says."""
    return [part for part in message.split("…") if len(part.strip()) >= SHORTEST and part not in SAID]


def test_every_quoted_message_is_said() -> None:
    assert {message: missing(message) for message in QUOTED if missing(message)} == {}
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("message", ["… samples of … are made of cheese", "nobody says this"])
def test_a_message_that_is_gone_is_found(message: str) -> None:
    assert missing(message)
