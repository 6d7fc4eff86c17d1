"""Supervised classification: one pass, cross-entropy with soft targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..data import augment
from ..data.batch import Batch
from ..data.sets import Facts
from ..engine import Engine
from ..models.slimmable import FULL, Width


@dataclass(frozen=True, kw_only=True)
class Config:
    kind: Literal["supervised"] = "supervised"


class Supervised:
    """Cross-entropy of the whole model."""

    def __init__(self, augmentation: augment.Config, facts: Facts) -> None:
        self.augmentation, self.facts = augmentation, facts

    def passes(self, step: int) -> int:
        return 1

    def losses(self, engine: Engine, batch: Batch) -> Iterator[Tensor]:
        images, soft = augment.prepare(batch, self.augmentation, self.facts)
        logits = engine(images, draw=batch.draw(0, images.device))
        yield F.cross_entropy(logits.float(), soft)

    def lr_factor(self, step: int) -> float:
        return 1.0

    def widths(self, step: int) -> tuple[Width, ...]:
        return (FULL,)

    def trained(self, steps: int) -> tuple[Width, ...]:
        return (FULL,)
