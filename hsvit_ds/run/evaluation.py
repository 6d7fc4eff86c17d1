"""Exact evaluation over all ranks: every sample once, the count asserted, all widths in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import augment
from ..data.reader import Reader
from ..errors import RefusedError, counted
from ..grid.exchange import Channel
from ..models.batchnorm import BatchNorm, recalibrate
from ..models.hsvit import HSViT
from ..models.slimmable import FULL, Width

BEST = 5
"""Answers of which one has to be right, for top5."""
CALIBRATION_STEPS = 16
"""Global batches of the training split that BatchNorm's statistics of a width are taken from."""


@dataclass(frozen=True)
class Score:
    top1: float
    """% of the images that can be read, as top5."""
    top5: float
    loss: float
    """Mean cross-entropy, nats."""
    unreadable: float
    """Images that cannot be read."""


@dataclass(frozen=True)
class Answers:
    """Images counted by what was answered, on the device.

    widths: evaluated. matrix: int64 [Q, Q], by label and answer of the largest width. right: int64 [widths, Q], those
    that were answered rightly, by label.
    """

    widths: tuple[Width, ...]
    matrix: Tensor
    right: Tensor

    @classmethod
    def of(cls, widths: Sequence[Width], classes: int, device: torch.device) -> Answers:
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        return cls(tuple(widths), matrix, torch.zeros(len(widths), classes, dtype=torch.int64, device=device))

    def add(self, place: int, labels: Tensor, logits: Tensor, counted: Tensor) -> None:
        """The images of a batch, of those that are `counted`, at the width of a place."""
        labels, answers = labels.clamp(min=0), logits.argmax(1)
        self.right[place].index_add_(0, labels, (counted & (labels == answers)).long())
        if self.widths[place] == max(self.widths, key=float):
            self.matrix.view(-1).index_add_(0, labels * len(self.matrix) + answers, counted.long())


@torch.no_grad()
def evaluate(
    forward: Callable[..., Tensor],
    module: nn.Module,
    reader: Reader,
    split: str,
    widths: Sequence[Width] = (FULL,),
    runs_differ: Channel | None = None,
    next_batch: Callable[[], None] = lambda: None,
    counts: Answers | None = None,
) -> dict[str, float]:
    """Score a model as it is now. Collective.

    Args:
        forward: computes `module`, an engine or the module itself.
        widths: each image is read and moved once for all of them.
        runs_differ: the ranks that see different batches, for BatchNorm's statistics of smaller widths.
        next_batch: called before each batch. counts: what the answers to these widths are added to.

    Returns:
        Of the largest width top1 and, of more than five classes, top5 (% of the images that can be read) and loss (mean
        cross-entropy, nats); where there are more, top1_w0.50 and so on for each of them; bad_samples, if some cannot
        be read.
    """

    def answers(images: Tensor) -> Iterator[Tensor]:
        next_batch()
        return (forward(images, width=width) for width in widths)

    # Eager also under torch.compile: the last batch would compile a second graph.
    with torch.compiler.set_stance("force_eager"):
        recalibrate_widths(forward, module, reader, widths, runs_differ)
        module.eval()
        scores = _scores(answers, len(widths), reader, split, counts)
    largest = scores[max(range(len(widths)), key=lambda i: float(widths[i]))]
    found = {"top1": largest.top1, "loss": largest.loss}
    if reader.facts.classes > BEST:
        found["top5"] = largest.top5
    if largest.unreadable:
        found["bad_samples"] = largest.unreadable
    if len(scores) > 1:
        found |= {f"top1_w{width}": score.top1 for width, score in zip(widths, scores, strict=True)}
    return found


@torch.no_grad()
def evaluate_subsets(
    model: HSViT,
    reader: Reader,
    split: str,
    subsets: Sequence[Sequence[int]],
    width: Width = FULL,
    runs_differ: Channel | None = None,
) -> list[Score]:
    """Score a whole model as each of the `subsets` of its submodules answers alone. Collective.

    Each image is read once, and its submodules are computed once, for all of them. Other arguments as of `evaluate`.
    """
    recalibrate_widths(model, model, reader, (width,), runs_differ)
    model.eval()
    numbers = range(model.config.submodules)
    present = [torch.tensor([number in subset for number in numbers]) for subset in subsets]

    def answers(images: Tensor) -> Iterator[Tensor]:
        sums = model.sums(images, width=width)
        return (model.answer(sums, subset, width) for subset in present)

    return _scores(answers, len(subsets), reader, split)


def _scores(
    answers: Callable[[Tensor], Iterable[Tensor]],
    count: int,
    reader: Reader,
    split: str,
    counts: Answers | None = None,
) -> list[Score]:
    """Score the `count` logits that `answers` gives, one after the other, for the images of a batch."""
    grid, facts = reader.grid, reader.facts
    # samples, top1, top5, loss, unreadable
    sums = torch.zeros(count, 5, dtype=torch.float64, device=grid.device)
    for images, labels, valid in reader.evaluation(split):
        images = augment.normalise(images, facts.mean, facts.std)
        for i, (row, logits) in enumerate(zip(sums, answers(images), strict=True)):
            row += _score(logits.float(), labels, valid)
            if counts is not None:
                counts.add(i, labels, logits, valid & (labels >= 0))
    if counts is not None:
        for tensor in (counts.matrix, counts.right):
            grid.sum_over_replicas(tensor)
    rows = grid.sum_over_replicas(sums).tolist()
    expected = reader.count(split)
    if any(row[0] + row[4] != expected for row in rows):
        raise AssertionError(f"evaluated {rows[0][0] + rows[0][4]:.0f} of the {counted(expected, 'sample')} of {split}")
    if rows[0][4] == expected:
        raise RefusedError(f"none of the {counted(expected, 'image')} of {split} can be read")
    return [
        Score(100 * top1 / samples, 100 * top5 / samples, loss / samples, unreadable)
        for samples, top1, top5, loss, unreadable in rows
    ]


def _score(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """fp64 [5]: samples, right at the first guess, within five, the sum of losses, and images without one."""
    unreadable, labels = labels < 0, labels.clamp(min=0)
    best = logits.topk(min(BEST, logits.shape[1])).indices == labels[:, None]
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
        for batches in reader.calibration(CALIBRATION_STEPS):
            for batch in batches:
                images = augment.pixels(batch, reader.augmentation, reader.facts)
                for width in smaller:
                    forward(images, width=width)
