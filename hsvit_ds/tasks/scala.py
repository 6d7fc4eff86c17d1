"""Scala (arXiv 2412.04786): several widths of one network in every step, each taught by the next larger one.

A step trains four widths: full, a large and a small one that are drawn (Stable Sampling, equations 7 and 8), and the
smallest. The full network learns from the labels and, where there is one, a teacher; every smaller width from the
labels (Noise Calibration) and from the next larger width (Progressive Knowledge Transfer). The losses are added, each
backward follows its forward, and one step with one gradient reduction ends it. With parts switched off it is US-Net,
AutoFormer's random widths, or separate training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hsvit_kernels.random import Site, sequence

from ..data import augment
from ..data.batch import Batch
from ..data.sets import Facts
from ..engine.engine import Engine
from ..models import slimmable
from ..models.network import Distilled, Twin
from ..models.slimmable import Width
from . import teacher
from .teacher import Teacher

SAMPLING = ("paper", "code", "sandwich", "interior", "all", "single", "fixed")


@dataclass(frozen=True, kw_only=True)
class Config:
    kind: Literal["scala"] = "scala"
    sampling: str = "paper"
    """A step's widths. Full, one drawn from (mid, 1), one from (smallest, mid] and the smallest: "paper"; from [mid, 1)
    and (smallest, mid) with mid rounded down to a width, as in the published "code"; two from all between, "sandwich"
    (US-Net, arXiv 1903.05134). An empty range gives no pass. Full and three from all below it, so that the smallest is
    not in every step: "interior" (figure 4). Every one: "all" (MatFormer, arXiv 2310.07707). One of them: "single"
    (AutoFormer, arXiv 2107.00651). `width` alone: "fixed" (separate training)."""
    width: slimmable.Ratio = 1.0
    """The width of sampling = "fixed"."""
    pinned: tuple[slimmable.Ratio, ...] = ()
    """Of sampling = "paper" and "code": widths that every step trains, each instead of one drawn from the range that it
    lies in: [0.8125] or [0.4375] (figures 13 and 14)."""
    same_widths: bool = True
    """Every micro batch of a step draws the same widths. False: each its own, as ranks do in the published code; then
    a run depends on the size of its micro batches."""
    transfer: str = "progressive"
    """Who teaches a smaller width: the next larger one ("progressive"), the "full" network (US-Net), or "none"."""
    transfer_token: str = "distillation"
    """Whose logits pass it on in a distilled model: the "distillation" token's, or the "class" token's (the published
    code's default, which its scripts do not use)."""
    label_weight: float = 1.0
    """Weight of the labels' loss at the smaller widths (Noise Calibration); 0 switches it off."""
    full_epochs: int = 0
    """First epochs that train full width only; 10 in the published code."""
    full_lr: float = 0.5
    """What the learning rate is multiplied with in these epochs."""
    teacher: teacher.Config = field(default_factory=teacher.Config)

    def __post_init__(self) -> None:
        choices = {
            "sampling": SAMPLING,
            "transfer": ("progressive", "full", "none"),
            "transfer_token": ("distillation", "class"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} = "{getattr(self, name)}": must be one of {", ".join(allowed)}')
        for name in ("label_weight", "full_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if not 0 < self.full_lr <= 1:
            raise ValueError(f"full_lr = {self.full_lr}: must be above 0 and at most 1")
        if self.transfer == "none" and not self.label_weight:
            raise ValueError('transfer = "none" and label_weight = 0: the smaller widths would learn nothing')
        if self.sampling != "fixed" and slimmable.ratio(self.width, "width") != 1:
            raise ValueError(f'width = {self.width} is for sampling = "fixed"; this is "{self.sampling}"')
        if self.pinned and self.sampling not in ("paper", "code"):
            raise ValueError(
                f'pinned = {list(self.pinned)} is for sampling = "paper" or "code"; this is "{self.sampling}"'
            )

    def check(self, widths: slimmable.Config, distilled: bool) -> None:
        """Refuse what does not fit the model."""
        for _, family in widths.families:
            self.ranges(widths, family)
        if self.transfer_token == "class" and (not distilled or self.transfer == "none"):
            why = 'transfer = "none" passes nothing on' if distilled else "model.distilled = false has one output"
            raise ValueError(f'transfer_token = "class": {why}; leave it "distillation"')

    def ranges(self, widths: slimmable.Config, family: tuple[Width, ...]) -> list[tuple[Width, ...]]:
        """What a step draws one width each from while a family of the model's is trained, the largest first.

        Raises:
            ValueError: `width` or `pinned` does not lie there.
        """
        if self.sampling == "fixed":
            width = widths.find(self.width)
            if width not in family:
                near = slimmable.nearest(float(width), family)
                raise ValueError(f"width {width} is not in every family of model.widths.then; {near}")
            return [(width,)]
        smallest, full, between = family[0], family[-1], family[1:-1]
        if self.sampling == "single":
            found = [family]
        elif self.sampling == "all":
            found = [(width,) for width in reversed(family)]
        elif self.sampling == "sandwich":
            found = [(full,), *[between] * min(2, len(between)), (smallest,)]
        elif self.sampling == "interior":
            found = [(full,), *[family[:-1]] * min(3, len(family) - 1)]
        else:
            # The code rounds mid down to a width, and counts it among the large ones.
            middle = sum(not widths.is_large(width.ratio) for width in family) - (self.sampling == "code")
            first_large = max(middle, 1)
            found = [(full,), *self._pin(widths, [family[first_large:-1], family[1:first_large]]), (smallest,)]
        return [range_ for range_ in found[: 1 if smallest == full else None] if range_]

    def _pin(self, widths: slimmable.Config, ranges: list[tuple[Width, ...]]) -> list[tuple[Width, ...]]:
        """The two ranges between, with what is `pinned` alone in its own."""
        pinned = [widths.find(width) for width in self.pinned]
        at = {width: place for width in pinned for place, range_ in enumerate(ranges) if width in range_}
        known = " and ".join(f"{range_[0]} to {range_[-1]}" for range_ in ranges if range_)
        for width in pinned:
            if width not in at:
                drawn = f"they are {known}" if known else "this family has none; leave it out"
                raise ValueError(f"pinned = {list(self.pinned)}: width {width} is in neither range between: {drawn}")
        if len(set(at.values())) < len(pinned):
            raise ValueError(f"pinned = {list(self.pinned)}: two of one range; pin at most one of each of {known}")
        alone = {place: (width,) for width, place in at.items()}
        return [alone.get(place, range_) for place, range_ in enumerate(ranges)]


class Sampler:
    """Which widths a step trains: integer draws, a pure function of (seed, step, first sample of the micro batch)."""

    def __init__(self, config: Config, widths: slimmable.Config, seed: int, steps_per_epoch: int) -> None:
        self.config, self.seed, self.steps_per_epoch = config, seed, steps_per_epoch
        self.full, self.full_steps = widths.all[-1], config.full_epochs * steps_per_epoch
        self.phases = [(epoch * steps_per_epoch, config.ranges(widths, family)) for epoch, family in widths.families]
        """(First step, ranges) of each family."""

    def _ranges(self, step: int) -> list[tuple[Width, ...]]:
        if step < self.full_steps:
            return [(self.full,)]
        return next(ranges for first, ranges in reversed(self.phases) if first <= step)

    def passes(self, step: int) -> int:
        return len(self._ranges(step))

    def draw(self, step: int, first: int = 0) -> tuple[Width, ...]:
        """The widths of a micro batch in step `step`, the largest first. first: where its first sample stands in the
        global batch."""
        ranges = self._ranges(step)
        key = 0 if self.config.same_widths else first
        luck = sequence(self.seed, Site.WIDTH, step, key, count=len(ranges)).tolist()
        chosen: list[Width] = []
        for range_, number in zip(ranges, luck, strict=True):
            left = [width for width in range_ if width not in chosen]  # several of one range differ
            chosen.append(left[number * len(left) >> 32])
        return tuple(sorted(chosen, key=float, reverse=True))

    @property
    def possible(self) -> tuple[Width, ...]:
        """Every width that some step may train, the smallest first."""
        return tuple(sorted(set().union(*(self._in(ranges) for _, ranges in self.phases)), key=float))

    def _in(self, ranges: list[tuple[Width, ...]]) -> set[Width]:
        return {width for range_ in ranges for width in range_} | ({self.full} if self.full_steps else set())

    def expected_epochs(self, steps: int) -> dict[Width, float]:
        """How many epochs each width is trained for in the first `steps` steps, on average over seeds, the smallest
        first. In Scala those between are for 2 / (X - 2) of a run's each, their mean (equation 1)."""
        found = dict.fromkeys(self.possible, 0.0)
        starts = sorted({0, *(first for first, _ in self.phases), self.full_steps, steps})
        for start, end in pairwise(start for start in starts if start <= steps):
            for range_ in self._ranges(start):
                for width in range_:
                    found[width] += (end - start) / self.steps_per_epoch / len(range_)
        return found

    def trained(self, steps: int) -> tuple[Width, ...]:
        """The widths drawn in the first `steps` steps (by the first micro batch) and not abandoned since, the smallest
        first."""
        possible = self._in(self._ranges(steps - 1))
        found: set[Width] = set()
        for step in reversed(range(steps)):
            if found == possible:
                break
            found.update(possible.intersection(self.draw(step)))
        return tuple(sorted(found, key=float))


class Scala:
    """The task. Args: teach: the teacher's answers, None without one."""

    def __init__(
        self, config: Config, augmentation: augment.Config, facts: Facts, sampler: Sampler, teach: Teacher | None
    ) -> None:
        self.config, self.augmentation, self.facts = config, augmentation, facts
        self.sampler, self.teach = sampler, teach

    def passes(self, step: int) -> int:
        return self.sampler.passes(step)

    def lr_factor(self, step: int) -> float:
        return self.config.full_lr if step < self.sampler.full_steps else 1.0

    def widths(self, step: int) -> tuple[Width, ...]:
        return self.sampler.draw(step)

    @property
    def possible(self) -> tuple[Width, ...]:
        return self.sampler.possible

    def trained(self, steps: int) -> tuple[Width, ...]:
        return self.sampler.trained(steps)

    def losses(self, engine: Engine, batch: Batch) -> Iterator[Tensor]:
        images, soft = augment.prepare(batch, self.augmentation, self.facts)
        answers = self.teach(batch, images) if self.teach is not None else None
        larger: list[Tensor] | None = None
        for pass_, width in enumerate(self.sampler.draw(batch.step, int(batch.index[0]))):
            heads = self._heads(engine(images, draw=batch.draw(pass_, images.device), width=width))
            if larger is None:
                losses = [self._first(z, u, soft, answers) for z, u in heads]
            else:
                losses = [self._smaller(z, u, soft, theirs) for (z, u), theirs in zip(heads, larger, strict=True)]
            yield torch.stack(losses).mean()
            if larger is None or self.config.transfer == "progressive":
                larger = [self._passed(z, u).detach() for z, u in heads]

    def _passed(self, z: Tensor, u: Tensor) -> Tensor:
        """The logits that pass on what a width knows."""
        return u if self.config.transfer_token == "distillation" else z

    def _first(self, z: Tensor, u: Tensor, soft: Tensor, answers: Tensor | None) -> Tensor:
        """Labels, and the teacher's answers to the same images, for the largest width of the step."""
        loss = F.cross_entropy(z, soft)
        if answers is None:
            return loss
        alpha = self.config.teacher.alpha
        return (1 - alpha) * loss + alpha * teacher.loss(self.config.teacher, u, answers)

    def _smaller(self, z: Tensor, u: Tensor, soft: Tensor, larger: Tensor) -> Tensor:
        """Labels, and the larger network's logits of the token that passes on. A term with weight 0 is not computed."""
        terms = []
        if self.config.label_weight:
            terms.append(self.config.label_weight * F.cross_entropy(z, soft))
        if self.config.transfer != "none":
            mine, theirs = self._passed(z, u).log_softmax(-1), larger.log_softmax(-1)
            terms.append(F.kl_div(mine, theirs, reduction="batchmean", log_target=True))
        return torch.stack(terms).sum()

    @staticmethod
    def _heads(output: Tensor | Distilled | Twin) -> list[tuple[Tensor, Tensor]]:
        """Class and distillation logits in fp32, one and the same without a distillation token; of each of two heads
        that learn the same."""
        if isinstance(output, Distilled):
            return [(output.classes.float(), output.distillation.float())]
        return [(z.float(), z.float()) for z in (output if isinstance(output, Twin) else (output,))]
