"""Which sample, when: the order of an epoch as a pure function of (seed, epoch), the same for every placement.

Global batch s of an epoch is samples [s B, (s + 1) B) of the epoch's permutation, for every number of ranks and
workers. A rank takes a contiguous part of it; the position of a run is (epoch, step).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsvit_kernels.random import Site, sequence


@dataclass(frozen=True)
class Order:
    """The order of a training split.

    shards: samples in each shard, in the order of the index. window: samples that are shuffled together after the
    shards were, so that reads stay almost sequential. global_batch: samples of one optimizer step.
    """

    shards: tuple[int, ...]
    window: int
    global_batch: int
    seed: int

    @property
    def samples(self) -> int:
        return sum(self.shards)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches; the last incomplete one is left out."""
        return self.samples // self.global_batch

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
