"""What joins ranks, as a TOML file says it, and how long a collective takes there."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..errors import RefusedError, read_text
from . import recipe as recipes

Floats = NDArray[np.float64]
STEPS = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
"""Times that each collective goes around a ring."""
_NUMBER = 8
"""Bytes, of the largest."""


def _check(config: object, **remedies: str) -> None:
    """Refuse negative numbers, and zeros of those that have a remedy."""
    for entry in fields(config):  # type: ignore[arg-type]
        value = getattr(config, entry.name)
        if entry.name in remedies and not value > 0:
            raise ValueError(f"{entry.name} = {value:g}: must be above 0; {remedies[entry.name]}")
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{entry.name} = {value:g}: must not be negative; leave it out for 0")


_TIMED = "leave [passes] out to have them timed here"
_DOCTOR = "hsvit doctor measures it between hosts"


@dataclass(frozen=True, kw_only=True)
class Inside:
    """Between two ranks of a host."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    bandwidth: float
    """Of a message, bytes/s."""
    latency: float = 0.0
    """Of a message of no length, s."""
    at_once: int = 0
    """Messages that take as long at the same time; of more, each takes longer: on loopback, where cores carry them, as
    many as there are cores. 0: any number, as a switch of their own carries them."""

    def __post_init__(self) -> None:
        _check(self, bandwidth=_DOCTOR)


@dataclass(frozen=True, kw_only=True)
class Between:
    """Between a host and the others."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    bandwidth: float
    """Of a host in each direction, bytes/s; messages of its ranks that leave it at the same time share it."""
    latency: float = 0.0
    """Of a message of no length, s."""

    def __post_init__(self) -> None:
        _check(self, bandwidth=_DOCTOR)


@dataclass(frozen=True, kw_only=True)
class Host:
    __pydantic_config__ = ConfigDict(extra="forbid")

    ranks: int = 1
    """That it has."""
    images: float = math.inf
    """That it reads, decodes and augments in a second; by default nothing waits for them."""
    call: float = 0.0
    """Seconds that a collective takes beside its messages, whatever it sends."""
    together: float = 1.0
    """Part of its messages' time that a collective takes which is begun before others are through."""

    def __post_init__(self) -> None:
        _check(
            self,
            ranks="a host has one at least",
            images="leave it out where nothing waits for them",
            together="leave it out where none helps another",
        )


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Seconds that one rank computes, with its share of the model and every core of its host at work."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    forward: float
    """Of one micro batch, until its CLS sums are there."""
    backward: float
    """Of one micro batch, without the head."""
    head: float = 0.0
    """Forward and backward of what every rank of a replica computes after the exchange, for one micro batch."""
    update: float = 0.0
    """Of the optimizer, once a step."""

    def __post_init__(self) -> None:
        _check(self, forward=_TIMED, backward=_TIMED)


@dataclass(frozen=True, kw_only=True)
class Links:
    __pydantic_config__ = ConfigDict(extra="forbid")

    inside: Inside
    between: Between
    host: Host = field(default_factory=Host)
    stragglers: float = 0.0
    """Coefficient of variation of a rank's computing time from step to step."""
    passes: Passes | None = None
    """Of the recipe that is asked for, where they were measured elsewhere; timed on this machine by default."""

    def __post_init__(self) -> None:
        _check(self)


FREE = Links(inside=Inside(bandwidth=math.inf), between=Between(bandwidth=math.inf))
"""Where nothing that travels takes time."""


def read(path: Path) -> Links:
    """Links in a TOML file.

    Raises:
        RefusedError: no TOML, an unknown key, with the nearest one, or a number that cannot be.
    """
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read ({error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        raise RefusedError(f"{path}: not valid TOML: {error}") from error
    try:
        return TypeAdapter(Links).validate_json(json.dumps(table), strict=True)
    except ValidationError as error:
        raise RefusedError(f"{path}: {'; '.join(map(_explain, error.errors()))}") from error
    except TypeError as error:  # a TOML date, which JSON does not have
        raise RefusedError(f"{path}: {error}") from error


_TABLES: dict[str, Any] = {"": Links, "inside": Inside, "between": Between, "host": Host, "passes": Passes}


def _explain(error: Any) -> str:
    if error["type"] != "unexpected_keyword_argument":
        return recipes.explain(error)
    *above, key = map(str, error["loc"])
    known = [entry.name for entry in fields(_TABLES["".join(above)])]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f'did you mean "{".".join([*above, *near])}"?' if near else f"known: {', '.join(sorted(known))}"
    return f'unknown key "{".".join([*above, key])}"; {hint}'


class Rings:
    """The rings of equal groups of ranks, all of which send at the same time.

    Args:
        members: int [groups, size], ranks by their number; host n has those from n * `links.host.ranks` on.
    """

    def __init__(self, members: NDArray[np.int64], links: Links) -> None:
        self.members, self.size = members, members.shape[1]
        host = members // links.host.ranks
        leaves = host != np.roll(host, -1, axis=1)
        hosts = int(host.max()) + 1
        leaving = np.bincount(host[leaves], minlength=hosts)[host]
        staying = np.bincount(host[~leaves], minlength=hosts)[host]
        at_once = links.inside.at_once or max(int(staying.max()), 1)
        self._host, self._in_turn = links.host, np.where(leaves, 0.0, staying / at_once)
        self._latency: Floats = np.where(leaves, links.between.latency, links.inside.latency)
        self._each_byte: Floats = np.where(leaves, leaving / links.between.bandwidth, 1 / links.inside.bandwidth)

    def seconds(self, kind: str, size: int, together: bool = False) -> Floats:
        """[groups]: of a collective over `size` bytes in all, by a ring, in which the slowest hop sets the pace: of an
        all-reduce over N ranks 2 (N - 1) messages of size / N bytes one after another, of a reduce-scatter or an
        all-gather half as many. Where there are fewer numbers than ranks, so many ranks send at the same time.

        Args:
            together: whether it is one of several that are begun before the first is waited for.
        """
        sending = min(max(size // _NUMBER, 1) / self.size, 1.0)
        hop = (self._latency + self._each_byte * (size / self.size)) * np.maximum(self._in_turn * sending, 1.0)
        slowest: Floats = hop.max(axis=1)
        return self._host.call + (self._host.together if together else 1.0) * STEPS[kind] * (self.size - 1) * slowest
