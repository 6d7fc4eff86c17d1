"""Supervised classification: one pass, cross-entropy with soft targets, the mean of both where two heads learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import augment
from ..data.batch import Batch
from ..data.sets import Facts
from ..engine.engine import Engine
from ..models.network import Twin
from ..models.slimmable import FULL, Width
from .features import Features


@dataclass(frozen=True, kw_only=True)
class Config:
    kind: Literal["supervised"] = "supervised"


class Supervised:
    """Cross-entropy of the whole model. Args: features: known maps of a backbone, None without."""

    def __init__(self, augmentation: augment.Config, facts: Facts, features: Features | None = None) -> None:
        self.augmentation, self.facts, self.features = augmentation, facts, features

    def passes(self, step: int) -> int:
        return 1

    def losses(self, engine: Engine, batch: Batch) -> Iterator[Tensor]:
        images, soft = augment.prepare(batch, self.augmentation, self.facts)
        known = {} if self.features is None else {"maps": self.features(batch, images)}
        output = engine(images, draw=batch.draw(0, images.device), **known)
        heads = output if isinstance(output, Twin) else (output,)
        yield torch.stack([F.cross_entropy(logits.float(), soft) for logits in heads]).mean()

    def lr_factor(self, step: int) -> float:
        return 1.0

    def widths(self, step: int) -> tuple[Width, ...]:
        return (FULL,)

    @property
    def possible(self) -> tuple[Width, ...]:
        return (FULL,)

    def trained(self, steps: int) -> tuple[Width, ...]:
        return (FULL,)
