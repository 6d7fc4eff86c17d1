"""Which sample, when: the order of an epoch as a pure function of (seed, epoch), the same for every placement.

Global batch s of an epoch is samples [s B, (s + 1) B) of the epoch's permutation, for every number of ranks and
workers. A rank takes a contiguous part of it; the position of a run is (epoch, step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hsvit_kernels.random import Site, sequence


@dataclass(frozen=True)
class Order:
    """The order of a training split.

    shards: samples in each shard, in the order of the index. window: samples that are shuffled together after the
    shards were, so that reads stay almost sequential. global_batch: samples of one optimizer step. repeats: times that
    a sample stands in its global batch, each augmented anew (Hoffer et al., arXiv 1901.09335); an epoch then has as
    many steps and fewer distinct samples. fill: complete the last global batch with the epoch's first samples,
    otherwise leave it out.
    """

    shards: tuple[int, ...]
    window: int
    global_batch: int
    seed: int
    repeats: int = 1
    fill: bool = False

    @cached_property
    def samples(self) -> int:
        return sum(self.shards)

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.samples, self.global_batch)
        return whole + (self.fill and rest > 0)

    def batches(self, epoch: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Gives step s of an epoch its (samples, copies), int64 [global_batch] each.

        With repetitions a global batch is its distinct samples, then all of them again, so that copies are far apart.
        """
        permutation = Permutation(self, epoch)
        distinct = -(-self.global_batch // self.repeats)
        slot = torch.arange(self.global_batch)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            return permutation(step * distinct, distinct)[slot % distinct], slot // distinct

        return batch

    def epoch(self, epoch: int) -> Tensor:
        """int64 [samples]: all of the epoch's permutation."""
        return Permutation(self, epoch)(0, self.samples)


class Permutation:
    """An epoch's permutation of the split, computed where it is asked for: shards are shuffled, then windows.

    It takes time and memory for the shards once, and for the windows that a part of it lies in; that of the last one
    is kept for the next part.
    """

    def __init__(self, order: Order, epoch: int) -> None:
        self._keys = order.seed, Site.ORDER, epoch
        self._samples, self._window = order.samples, min(order.window, max(order.samples, 1))
        shuffled = sequence(*self._keys, 0, count=len(order.shards)).argsort(stable=True)
        lengths = torch.tensor(order.shards, dtype=torch.int64)
        firsts, lengths = (lengths.cumsum(0) - lengths)[shuffled], lengths[shuffled]
        self._ends = lengths.cumsum(0)
        self._shift = firsts - (self._ends - lengths)
        """By which a sample's number is above its place among the shuffled shards."""
        self._last = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, first: int, count: int) -> Tensor:
        """int64 [count]: what stands at places first, first + 1, …; after the last one it begins anew."""
        parts = []
        while count:
            first %= self._samples
            part = min(count, self._samples - first)
            parts.append(self._part(first, part))
            first, count = first + part, count - part
        return torch.cat(parts)

    def _part(self, first: int, count: int) -> Tensor:
        begin, end = first // self._window, -(-(first + count) // self._window)
        kept = [self._last[1]] if self._last[0] == begin else []
        if begin + len(kept) < end:
            kept.append(self._windows(begin + len(kept), end))
        found = torch.cat(kept)
        self._last = end - 1, found[(end - 1 - begin) * self._window :].clone()
        return found[first - begin * self._window :][:count]

    def _windows(self, begin: int, end: int) -> Tensor:
        """The samples of some windows."""
        place = torch.arange(begin * self._window, min(end * self._window, self._samples))
        samples = place + self._shift[torch.searchsorted(self._ends, place, right=True)]
        luck = sequence(*self._keys, 1, first=begin * self._window, count=len(place))
        return samples[((place // self._window - begin) * 2**32 + luck).argsort(stable=True)]


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one replica works on: micro batch a of the step is samples
    [a B/A + r b, a B/A + (r + 1) b) of the global batch of B, for replica r and micro batches of b."""

    global_batch: int
    accumulation: int
    replicas: int
    replica: int

    @property
    def micro_batch(self) -> int:
        return self.global_batch // (self.accumulation * self.replicas)

    def indices(self, micro: int) -> Tensor:
        """int64 [b]: where the samples of micro batch `micro` stand in the global batch."""
        start = micro * (self.global_batch // self.accumulation) + self.replica * self.micro_batch
        return torch.arange(start, start + self.micro_batch)
