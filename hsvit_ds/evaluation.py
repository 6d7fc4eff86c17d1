"""Exact evaluation over all ranks: every sample once, the count asserted, all widths in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from .data import augment
from .data.reader import Reader
from .errors import RefusedError
from .grid import Channel
from .models.batchnorm import BatchNorm, recalibrate
from .models.slimmable import FULL, Width

CALIBRATION_STEPS = 16
"""Global batches of the training split that BatchNorm's statistics of a width are taken from."""


@torch.no_grad()
def evaluate(
    forward: Callable[..., Tensor],
    module: nn.Module,
    reader: Reader,
    split: str,
    widths: Sequence[Width] = (FULL,),
    runs_differ: Channel | None = None,
) -> dict[str, float]:
    """Score a model as it is now. Collective.

    Args:
        forward: computes `module`, an engine or the module itself.
        widths: each image is read and moved once for all of them.
        runs_differ: the ranks that see different batches, for BatchNorm's statistics of smaller widths.

    Returns:
        Of the largest width top1 and top5 (% of the images that can be read) and loss (mean cross-entropy, nats); where
        there are more, top1_w0.50 and so on for each of them; bad_samples, if some cannot be read.
    """
    grid, facts = reader.grid, reader.facts
    # Eager also under torch.compile: the last batch would compile a second graph.
    with torch.compiler.set_stance("force_eager"):
        recalibrate_widths(forward, module, reader, widths, runs_differ)
        module.eval()
        # samples, top1, top5, loss, unreadable
        sums = torch.zeros(len(widths), 5, dtype=torch.float64, device=grid.device)
        for images, labels, valid in reader.evaluation(split):
            images = augment.normalise(images, facts.mean, facts.std)
            for row, width in zip(sums, widths, strict=True):
                row += _score(forward(images, width=width).float(), labels, valid)
    rows = grid.sum_over_replicas(sums).tolist()
    expected = reader.count(split)
    if any(row[0] + row[4] != expected for row in rows):
        raise AssertionError(f"evaluated {rows[0][0] + rows[0][4]:.0f} of the {expected} samples of {split}")
    count, top1, top5, loss, unreadable = rows[max(range(len(rows)), key=lambda i: float(widths[i]))]
    if not count:
        raise RefusedError(f"none of the {expected} images of {split} can be read")
    found = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}
    if unreadable:
        found["bad_samples"] = unreadable
    if len(rows) > 1:
        found |= {f"top1_w{width}": 100 * row[1] / count for width, row in zip(widths, rows, strict=True)}
    return found


def _score(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """fp64 [5]: samples, right at the first guess, within five, the sum of losses, and images without one."""
    unreadable, labels = labels < 0, labels.clamp(min=0)
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    row = torch.stack((torch.ones_like(loss), best[:, 0].float(), best.any(1).float(), loss, torch.zeros_like(loss)))
    row = torch.where(unreadable, torch.tensor([0.0, 0, 0, 0, 1], device=row.device)[:, None], row)
    return torch.where(valid, row, 0).double().sum(1)


def needs_calibration(module: nn.Module, widths: Sequence[Width]) -> bool:
    """Whether BatchNorm has no statistics of its own for some of the widths."""
    return any(not width.is_full for width in widths) and any(isinstance(m, BatchNorm) for m in module.modules())


def recalibrate_widths(
    forward: Callable[..., Tensor],
    module: nn.Module,
    reader: Reader,
    widths: Sequence[Width],
    runs_differ: Channel | None,
) -> None:
    """Take BatchNorm's statistics of every width but the full one from the training split. Collective."""
    if not needs_calibration(module, widths):
        return
    smaller = [width for width in widths if not width.is_full]
    with recalibrate(module, smaller, runs_differ):
        for batches in islice(reader.train(0, 0), CALIBRATION_STEPS):
            for batch in batches:
                images = augment.pixels(batch, reader.augmentation, reader.facts)
                for width in smaller:
                    forward(images, width=width)
