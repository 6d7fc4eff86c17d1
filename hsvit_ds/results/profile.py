"""Where the time of a profiled run's steps went, from the spans that its ranks wrote (`run/profiling.py`)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RefusedError
from ..run.profiling import FOLDER, OTHERS, file_name
from ..spans import Part, Span

BETWEEN = "between spans"
GROUPS = {Part.EXCHANGE: "replica", Part.REDUCTION: "submodule_rank"}
"""Collectives that ranks with the same number of this kind do together."""


@dataclass(frozen=True)
class Step:
    """start, end: seconds since the trace began on rank 0. macs: of all ranks, forward and backward."""

    number: int
    start: float
    end: float
    macs: int
    spans: list[Span]


@dataclass
class Rank:
    """What one rank wrote.

    ranks: of the run. peak: of the device, FLOPs/s of bf16 products, where known. offset: of its clock to rank 0's,
    seconds. memory: bytes at most, 0 where it was killed. counted: steps whose operations it counted, rank 0 alone.
    """

    rank: int
    ranks: int
    host: str
    device: str
    replica: int
    submodule_rank: int
    peak: float | None
    offset: float
    steps: list[Step] = field(default_factory=list)
    memory: int = 0
    counted: int = 0
    operations: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of its steps."""
        return sum(step.end - step.start for step in self.steps)


class Row(NamedTuple):
    """seconds: a step, by rank. depth: 1 for what lies in the row above."""

    name: str
    depth: int
    seconds: list[float]


def read(folder: Path) -> list[Rank]:
    """The ranks of a run whose folder this is, with the clocks of their hosts set by rank 0's.

    Raises:
        RefusedError: no rank has traced a step.
    """
    files = [_lines(path) for path in sorted((folder / FOLDER).glob("rank-*.jsonl"))]
    started = [lines for lines in files if lines]
    ranks = [rank for lines in started if (rank := _rank(lines, started[0][0])).steps]
    if not ranks:
        raise RefusedError(f"{folder / FOLDER}: no step was traced; the run ended before, see {folder}")
    _add_waiting(ranks)
    return ranks


def _rank(lines: list[dict[str, Any]], first: dict[str, Any]) -> Rank:
    """first: the first line of the rank whose clock the others are set by."""
    head, *others = lines
    offset = head["began"] - first["began"]
    if head["host"] != first["host"]:  # of another host's clock it is known when all had met alone
        offset = first["met"] - head["met"]
    rank = Rank(offset=offset, **{name: head[name] for name in head if name not in ("began", "met")})
    for line in others:
        if "spans" in line:
            spans = [Span(Part(part), depth, a + offset, b + offset) for part, depth, a, b in line["spans"]]
            rank.steps.append(Step(line["step"], line["start"] + offset, line["end"] + offset, line["macs"], spans))
        rank.memory = line.get("memory", rank.memory)
        rank.counted = line.get("counted", rank.counted)
        rank.operations = line.get("operations", rank.operations)
    return rank


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines: the last one of a killed rank may be a half."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _add_waiting(ranks: Sequence[Rank]) -> None:
    """Within each collective, the span from its begin on this rank to that on the last rank to come."""
    for part, kind in GROUPS.items():
        calls: dict[tuple[int, int, int], list[tuple[Step, Span]]] = defaultdict(list)
        for rank in ranks:
            for step in rank.steps:
                for number, span in enumerate(span for span in step.spans if span.part == part):
                    calls[getattr(rank, kind), step.number, number].append((step, span))
        for together in calls.values():
            last = max(span.start for _, span in together)
            for step, span in together:
                if last > span.start:
                    step.spans.append(Span(Part.WAITING, span.depth + 1, span.start, min(last, span.end)))


def seconds(spans: Sequence[Span]) -> dict[tuple[Part, ...], float]:
    """Seconds by part: what a rank does one after the other, and (forward, what lies in it), as in a backward.

    Each moment counts once, for the innermost span; what an evaluation or a checkpoint consists of is not told apart.
    """
    found: dict[tuple[Part, ...], float] = defaultdict(float)
    path: list[Part] = []
    for span in sorted(spans, key=lambda span: (span.start, span.depth)):
        del path[span.depth :]
        length = span.end - span.start
        if path:
            found[_shown(path)] -= length
        path.append(span.part)
        found[_shown(path)] += length
    return dict(found)


def _shown(path: Sequence[Part]) -> tuple[Part, ...]:
    """Where a table has a span that lies in others."""
    for whole in (Part.EVALUATION, Part.CHECKPOINT, Part.LOG, Part.WAITING, Part.REDUCTION):
        if whole in path:
            return (whole,)
    for pass_ in (Part.FORWARD, Part.BACKWARD):
        if pass_ in path:
            return (pass_,) if path[-1] == pass_ else (pass_, path[-1])
    return (path[-1],)  # a loss and waiting for images have other things in them, which come before or after


def by_part(rank: Rank) -> dict[tuple[Part, ...], float]:
    """Mean seconds a step of a rank, by part."""
    found = seconds([span for step in rank.steps for span in step.spans])
    return {path: total / len(rank.steps) for path, total in found.items()}


def rows(ranks: Sequence[Rank]) -> list[Row]:
    """Where a step's time goes, by rank; what lies in no span is the last but one, the whole step the last."""
    found = [by_part(rank) for rank in ranks]
    paths = {path for own in found for path in own}
    made = []
    for part in Part:
        below = [(part, inner) for inner in Part if (part, inner) in paths]
        if below or (part,) in paths:
            made.append(Row(str(part), 0, [sum(s for path, s in own.items() if path[0] == part) for own in found]))
            made += [Row(str(path[1]), 1, [own.get(path, 0.0) for own in found]) for path in below]
        if below:
            made.append(Row(OTHERS, 1, [own.get((part,), 0.0) for own in found]))
    whole = [rank.seconds / len(rank.steps) for rank in ranks]
    between = [step - sum(own.values()) for step, own in zip(whole, found, strict=True)]
    return [*made, Row(BETWEEN, 0, between), Row("step", 0, whole)]


def shares(ranks: Sequence[Rank]) -> dict[tuple[Part, ...], float]:
    """Of a step's time in all ranks, by part."""
    whole: dict[tuple[Part, ...], float] = defaultdict(float)
    for rank in ranks:
        for path, own in by_part(rank).items():
            whole[path] += own / len(ranks)
    step = sum(rank.seconds / len(rank.steps) for rank in ranks) / len(ranks)
    return {path: own / step for path, own in whole.items()}


def steps_of(folder: Path) -> int:
    """How many steps rank 0 has traced so far."""
    return sum("spans" in line for line in _lines(folder / FOLDER / file_name(0)))
