"""A profile as a file for Perfetto: the ranks one below the other, their spans in the project's words.

The trace event format, which ui.perfetto.dev and chrome://tracing open.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RefusedError
from ..spans import Span
from .profile import Rank, Step

FILE = "trace.json"


def write(ranks: Sequence[Rank], path: Path) -> None:
    """Raises: RefusedError: it cannot be written."""
    try:
        with path.open("w", encoding="utf-8") as file:
            json.dump({"traceEvents": events(ranks), "displayTimeUnit": "ms"}, file)
    except OSError as error:
        raise RefusedError(f"{path}: cannot be written ({error.strerror}); set run.root") from error


def events(ranks: Sequence[Rank]) -> list[dict[str, Any]]:
    """A process for each rank; times are microseconds."""
    found: list[dict[str, Any]] = []
    for rank in ranks:
        place = f"replica {rank.replica}, submodule rank {rank.submodule_rank}"
        found.append(_named(rank, "process_name", f"rank {rank.rank} ({place}) on {rank.host}, {rank.device}"))
        found.append({"ph": "M", "pid": rank.rank, "name": "process_sort_index", "args": {"sort_index": rank.rank}})
        found.append(_named(rank, "thread_name", "steps"))
        for step in rank.steps:
            found.append(_event(rank, f"step {step.number}", step))
            found += [
                _event(rank, str(span.part), span) for span in sorted(step.spans, key=lambda s: (s.start, s.depth))
            ]
    return found


def _named(rank: Rank, what: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": rank.rank, "tid": 0, "name": what, "args": {"name": name}}


def _event(rank: Rank, name: str, of: Step | Span) -> dict[str, Any]:
    start, length = 1e6 * of.start, 1e6 * (of.end - of.start)
    return {"ph": "X", "pid": rank.rank, "tid": 0, "name": name, "ts": round(start, 3), "dur": round(length, 3)}
