"""When ranks enter and leave their collectives, and what of a step was computing, waiting and transfer.

`time.perf_counter` is one clock for all processes of a machine. A collective's transfer begins when the last rank of
its group has entered it; before that the others wait.
"""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, NamedTuple

import torch.distributed as dist

GIVEN = {
    "all_reduce": "tensor",
    "broadcast": "tensor",
    "reduce": "tensor",
    "all_gather": "tensor",
    "all_gather_into_tensor": "input_tensor",
    "reduce_scatter_tensor": "input",
    "barrier": "",
    "isend": "tensor",
    "recv": "",
}
"""Each collective's argument that a rank puts in."""


@dataclass
class Call:
    """Of one rank. group: the ranks, or of what one sends to another (from, to). given: bytes that it puts in.

    Seconds: when it entered, and from when to when it could do nothing else.
    """

    group: tuple[int, ...]
    given: int
    entered: float
    blocked: float = 0.0
    left: float = 0.0


@dataclass
class Step:
    """Of one rank. Seconds by its clock."""

    began: float
    ended: float = 0.0
    calls: list[Call] = field(default_factory=list)


class Parts(NamedTuple):
    """Of a step, seconds: means over the ranks. given: bytes of the first rank."""

    seconds: float
    compute: float
    transfer: float
    waiting: float
    given: float


class _Pending:
    """A collective that goes on: only waiting for it blocks."""

    def __init__(self, work: Any, call: Call) -> None:
        self._work, self._call = work, call

    def wait(self, *args: Any) -> Any:
        self._call.blocked = time.perf_counter()
        result = self._work.wait(*args)
        self._call.left = time.perf_counter()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Watch:
    """Notes this rank's collectives; made before DeepSpeed takes references to them."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._calls: list[Call] = []
        for name, argument in GIVEN.items():
            setattr(dist, name, self._watched(name, argument))

    def _watched(self, name: str, argument: str) -> Any:
        original = getattr(dist, name)
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            group = dist.get_process_group_ranks(given.arguments["group"] or dist.group.WORLD)
            if name in ("isend", "recv"):
                me, other = dist.get_rank(), given.arguments["dst" if name == "isend" else "src"]
                group = [me, other] if name == "isend" else [other, me]
            noted = Call(tuple(group), given.arguments[argument].nbytes if argument else 0, time.perf_counter())
            if len(group) > 1:
                self._calls.append(noted)
            result = original(*args, **kwargs)
            if name == "isend" or given.arguments.get("async_op"):
                noted.blocked = noted.left = noted.entered
                return _Pending(result, noted)
            noted.blocked, noted.left = noted.entered, time.perf_counter()
            return result

        return call

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step is what happens within the block."""
        self._calls = []
        made = Step(time.perf_counter(), calls=self._calls)
        yield
        made.ended = time.perf_counter()
        self.steps.append(made)


def parts(ranks: list[list[Step]], warm: int) -> Parts:
    """Of the steps of all ranks after the first `warm`, of each figure the median over the steps."""
    rows = [_parts([steps[number] for steps in ranks]) for number in range(warm, len(ranks[0]))]
    return Parts(*map(median, zip(*rows, strict=True)))


def _parts(ranks: list[Step]) -> Parts:
    entries: dict[tuple[tuple[int, ...], int], list[float]] = defaultdict(list)
    numbered = [list(_numbered(step.calls)) for step in ranks]
    for calls in numbered:
        for key, call in calls:
            entries[key].append(call.entered)
    transfer, waiting = [], []
    for calls in numbered:
        transfer.append(sum(max(call.left - max(call.blocked, max(entries[key])), 0) for key, call in calls))
        waiting.append(sum(max(min(call.left, max(entries[key])) - call.blocked, 0) for key, call in calls))
    seconds = fmean(step.ended - step.began for step in ranks)
    given = float(sum(call.given for call in ranks[0].calls))
    return Parts(seconds, seconds - fmean(transfer) - fmean(waiting), fmean(transfer), fmean(waiting), given)


def _numbered(calls: list[Call]) -> Iterator[tuple[tuple[tuple[int, ...], int], Call]]:
    """With the how manieth call of its group each is, which is the same on all its ranks."""
    count: dict[tuple[int, ...], int] = defaultdict(int)
    for call in calls:
        yield (call.group, count[call.group]), call
        count[call.group] += 1
