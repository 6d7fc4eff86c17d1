"""Which sample, when: the order of an epoch as a pure function of (seed, epoch), the same for every placement.

Global batch s of an epoch is samples [s B, (s + 1) B) of the epoch's permutation, for every number of ranks and
workers. A rank takes a contiguous part of it; the position of a run is (epoch, step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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

    @property
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
        order = self.epoch(epoch)
        distinct = -(-self.global_batch // self.repeats)
        slot = torch.arange(self.global_batch)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            return order[(step * distinct + slot % distinct) % self.samples], slot // distinct

        return batch

    def epoch(self, epoch: int) -> Tensor:
        """int64 [samples]: the epoch's permutation of the split; shards are shuffled, then windows of samples."""
        shards = sequence(self.seed, Site.ORDER, epoch, 0, count=len(self.shards)).argsort(stable=True)
        sizes = torch.tensor(self.shards)
        starts = sizes.cumsum(0) - sizes
        order = torch.cat([torch.arange(self.shards[s]) + starts[s] for s in shards.tolist()])
        window = torch.arange(self.samples) // self.window
        luck = sequence(self.seed, Site.ORDER, epoch, 1, count=self.samples)
        return order[(window * 2**32 + luck).argsort(stable=True)]


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
