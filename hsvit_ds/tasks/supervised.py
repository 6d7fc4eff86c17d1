"""Supervised classification: one pass, cross-entropy with soft targets."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from ..data import augment
from ..data.reader import Batch, Facts
from ..engine import Engine


class Supervised:
    """Cross-entropy of the whole model."""

    passes = 1
    """Forwards with a backward each, for one micro batch."""

    def __init__(self, config: augment.Config, facts: Facts) -> None:
        self.augment, self.facts = config, facts

    def losses(self, engine: Engine, batch: Batch) -> Iterator[Tensor]:
        """The loss of every pass over a micro batch, computed when asked for."""
        images, soft = augment.prepare(batch, self.augment, self.facts)
        logits = engine(images, draw=batch.draw(0, images.device))
        yield F.cross_entropy(logits.float(), soft)
