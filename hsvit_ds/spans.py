"""Where a rank's time goes: spans, which do nothing until a profile records them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


class Part(StrEnum):
    """What a span is of. Those of a forward lie in it, as an exchange may in a forward or a backward. How much of an
    exchange or a reduction is waiting for others is known when the spans of all ranks are."""

    IMAGES = "waiting for images"
    COPY = "copy"
    AUGMENTATION = "augmentation"
    TEACHER = "teacher"
    FORWARD = "forward"
    BACKBONE = "backbone"
    TRUNK = "trunk"
    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "MLP"
    HEAD = "head"
    EXCHANGE = "exchange"
    WAITING = "waiting for other ranks"
    STATISTICS = "batch statistics"
    LOSS = "loss"
    BACKWARD = "backward"
    REDUCTION = "reduction"
    OPTIMIZER = "optimizer"
    AVERAGE = "EMA"
    LOG = "log"
    CHECKPOINT = "checkpoint"
    EVALUATION = "evaluation"


class Span(NamedTuple):
    """start, end: moments. depth: how many spans it lies in."""

    part: Part
    depth: int
    start: Any
    end: Any


class Recorder:
    """Notes the spans of one rank.

    Args:
        mark: gives the present moment, or None where there is none to be had (then nothing is noted).
    """

    def __init__(self, mark: Callable[[], Any]) -> None:
        self.mark = mark
        self._open: list[tuple[Part, Any]] = []
        self._done: list[Span] = []

    def begin(self, part: Part) -> None:
        self._open.append((part, self.mark()))

    def end(self) -> None:
        part, start = self._open.pop()
        end = self.mark()
        if start is not None and end is not None:
            self._done.append(Span(part, len(self._open), start, end))

    def take(self) -> list[Span]:
        """Those that have ended since the last call, in the order of their ends."""
        taken, self._done = self._done, []
        return taken


class _Noted:
    """A span for the recorder that is on."""

    def __init__(self, recorder: Recorder, part: Part) -> None:
        self.recorder, self.part = recorder, part

    def __enter__(self) -> None:
        self.recorder.begin(self.part)

    def __exit__(self, *_: object) -> None:
        self.recorder.end()


_NOTHING = nullcontext()
_recorder: Recorder | None = None


def record(recorder: Recorder | None) -> None:
    """Have spans noted from now on, or no more."""
    global _recorder
    _recorder = recorder


def span(part: Part) -> AbstractContextManager[None]:
    """What happens within the block is `part`; what torch.compile has compiled is not told apart."""
    if torch.compiler.is_compiling() or _recorder is None:
        return _NOTHING
    return _Noted(_recorder, part)


def each(part: Part, items: Iterable[T]) -> Iterator[T]:
    """The items; waiting for each of them is `part`."""
    iterator = iter(items)
    while True:
        with span(part):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def spanned(part: Part) -> Callable[[Function], Function]:
    """A decorator: each call of the function is `part`."""

    def decorated(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with span(part):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorated
