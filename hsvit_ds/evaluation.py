"""Exact evaluation over all ranks: every sample once, the count asserted."""

from __future__ import annotations

import torch

from .data import augment
from .data.reader import Reader
from .engine import Engine


@torch.no_grad()
def evaluate(engine: Engine, reader: Reader, split: str) -> dict[str, float]:
    """top1 and top5 (% of the split) and loss (mean cross-entropy, nats) of the model as it is now. Collective."""
    grid, facts = engine.grid, reader.facts
    engine.module.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=grid.device)  # samples, top1, top5, loss
    with engine.eager():
        for images, labels, valid in reader.evaluation(split):
            logits = engine(augment.normalise(images, facts.mean, facts.std)).float()
            best = logits.topk(min(5, facts.classes)).indices == labels[:, None]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            row = torch.stack((torch.ones_like(loss), best[:, 0].float(), best.any(1).float(), loss))
            sums += torch.where(valid, row, 0).double().sum(1)
    count, top1, top5, loss_sum = grid.sum_over_replicas(sums).tolist()
    if count != facts.count(split):
        raise AssertionError(f"evaluated {count:.0f} of the {facts.count(split)} samples of {split}")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count}
