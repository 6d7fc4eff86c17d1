"""How a person is told that something is wrong: one line, an exit code, and a stack trace only when asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class RefusedError(Exception):
    """Bad input, or a run that cannot go on: the thing, its value, and what would be right."""


def first_line(error: Exception) -> str:
    """What a foreign error says, short enough for a line of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def shown(code: int, debug: bool) -> Iterator[None]:
    """Turn a refusal into one line and exit code `code` (2 before training, 1 during it).

    Ranks of one host are refused for the same reasons, so the first of them speaks. Anything that is not a refusal
    keeps its stack trace: it is a defect, and the trace is what has to be reported.
    """
    try:
        yield
    except RefusedError as error:
        if debug:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"hsvit: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None
