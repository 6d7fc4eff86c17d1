"""A document's generated part: all that stands below its line `<!-- written by …, from here on -->`."""

from __future__ import annotations

import re

MARK = re.compile(r"^<!-- written by .*, from here on -->\n", re.M)


def filled(page: str, part: str) -> str:
    """A page with another generated part.

    Raises:
        ValueError: the page has no mark.
    """
    found = MARK.search(page)
    if not found:
        raise ValueError(f"no line {MARK.pattern}")
    return f"{page[: found.end()]}\n{part}"
