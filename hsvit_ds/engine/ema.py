"""An exponential moving average of the fp32 masters, sharded like the optimizer; BatchNorm's buffers included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .zero import Shards


@dataclass(frozen=True, kw_only=True)
class Config:
    decay: float = 0.0
    """Share of the average that stays at every step, for example 0.9999; 0 switches the average off."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay = {self.decay}: must be in [0, 1)")


class EMA:
    """Averages in fp32 from the fp32 masters: in bf16 a decay of 0.9999 would never move."""

    def __init__(self, decay: float, shards: Shards, module: nn.Module) -> None:
        self.decay, self.shards = decay, shards
        self.flats = [master.detach().clone() for master in shards.masters]
        self.live = dict(module.named_buffers())
        self.buffers = {name: buffer.clone() for name, buffer in self.live.items()}

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """End a step. applied: a bool, on the device; after a step that was not, the averages stay."""
        averages = [*self.flats, *self.buffers.values()]
        live = [*(master.detach() for master in self.shards.masters), *(self.live[name] for name in self.buffers)]
        moves = torch._foreach_sub(live, averages)
        torch._foreach_mul_(moves, applied * (1 - self.decay))
        torch._foreach_add_(averages, moves)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the averages inside the block. Collective."""
        pairs: list[tuple[Tensor, Tensor]] = list(zip(self.flats, self.shards.masters, strict=True))
        pairs += [(self.buffers[name], self.live[name]) for name in self.buffers]
        kept = [live.detach().clone() for _, live in pairs]
        try:
            self._write([(average, live) for average, live in pairs])
            yield
        finally:
            self._write([(old, live) for old, (_, live) in zip(kept, pairs, strict=True)])

    @torch.no_grad()
    def _write(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for source, target in pairs:
            target.copy_(source)
        self.shards.publish()
