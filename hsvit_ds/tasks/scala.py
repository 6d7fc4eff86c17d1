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
from itertools import count
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
from ..models.slimmable import Width
from . import teacher
from .teacher import Teacher

SAMPLING = ("paper", "code", "sandwich", "single", "fixed")


@dataclass(frozen=True, kw_only=True)
class Config:
    kind: Literal["scala"] = "scala"
    sampling: str = "paper"
    """A step's widths. Full, one drawn from (mid, 1), one from (smallest, mid] and the smallest: "paper"; from [mid, 1)
    and (smallest, mid) with mid rounded down to a width, as in the published "code"; two from all between, "sandwich"
    (US-Net, arXiv 1903.05134). An empty range gives no pass. One of all: "single" (AutoFormer, arXiv 2107.00651).
    `width` alone: "fixed" (separate training)."""
    width: float = 1.0
    """The width of sampling = "fixed"."""
    same_widths: bool = True
    """Every micro batch of a step draws the same widths. False: each its own, as ranks do in the published code; then
    a run depends on the size of its micro batches."""
    transfer: str = "progressive"
    """Who teaches a smaller width: the next larger one ("progressive"), the "full" network (US-Net), or "none"."""
    label_weight: float = 1.0
    """Weight of the labels' loss at the smaller widths (Noise Calibration); 0 switches it off."""
    full_epochs: int = 0
    """First epochs that train full width only; 10 in the published code."""
    full_lr: float = 0.5
    """What the learning rate is multiplied with in these epochs."""
    teacher: teacher.Config = field(default_factory=teacher.Config)

    def __post_init__(self) -> None:
        for name, allowed in {"sampling": SAMPLING, "transfer": ("progressive", "full", "none")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} = "{getattr(self, name)}": must be one of {", ".join(allowed)}')
        for name in ("label_weight", "full_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if not 0 < self.full_lr <= 1:
            raise ValueError(f"full_lr = {self.full_lr}: must be above 0 and at most 1")
        if self.transfer == "none" and not self.label_weight:
            raise ValueError('transfer = "none" and label_weight = 0: the smaller widths would learn nothing')

    def check(self, widths: slimmable.Config) -> None:
        """Refuse what does not fit the model's widths."""
        if self.sampling == "fixed":
            widths.find(self.width)
        elif self.width != 1.0:
            raise ValueError(f'width = {self.width} is for sampling = "fixed"; this is "{self.sampling}"')


class Sampler:
    """Which widths a step trains: integer draws, a pure function of (seed, step, first sample of the micro batch)."""

    def __init__(self, config: Config, widths: slimmable.Config, seed: int, steps_per_epoch: int) -> None:
        self.config, self.family, self.seed = config, widths.family, seed
        self.full_steps = config.full_epochs * steps_per_epoch
        smallest, full = self.family[0], self.family[-1]
        between = self.family[1:-1]
        # mid lies at index (X - 1) / 2; the code rounds it down, and counts it among the large ones.
        last = len(self.family) - 1
        first_large = last // 2 if config.sampling == "code" else last // 2 + 1
        # The ranges that one width each is drawn from, the largest first.
        self.ranges: list[tuple[Width, ...]]
        if config.sampling == "fixed":
            self.ranges = [(widths.find(config.width),)]
        elif config.sampling == "single":
            self.ranges = [self.family]
        elif config.sampling == "sandwich":
            self.ranges = [(full,), *[between] * min(2, len(between)), (smallest,)]
        else:
            self.ranges = [(full,), self.family[first_large:-1], self.family[1:first_large], (smallest,)]
        if smallest == full:
            self.ranges = self.ranges[:1]
        self.ranges = [range_ for range_ in self.ranges if range_]

    def passes(self, step: int) -> int:
        return 1 if step < self.full_steps else len(self.ranges)

    def draw(self, step: int, first: int = 0) -> tuple[Width, ...]:
        """The widths of a micro batch in step `step`, the largest first. first: where its first sample stands in the
        global batch."""
        if step < self.full_steps:
            return self.family[-1:]
        key = 0 if self.config.same_widths else first
        luck = sequence(self.seed, Site.WIDTH, step, key, count=len(self.ranges)).tolist()
        chosen: list[Width] = []
        for range_, number in zip(self.ranges, luck, strict=True):
            left = [width for width in range_ if width not in chosen]  # the sandwich's two differ
            chosen.append(left[number * len(left) >> 32])
        return tuple(sorted(chosen, key=float, reverse=True))

    def trained(self, steps: int) -> tuple[Width, ...]:
        """The widths drawn in the first `steps` steps (by the first micro batch), the smallest first."""
        possible = {width for range_ in self.ranges for width in range_}
        if self.full_steps:
            possible.add(self.family[-1])
        found: set[Width] = set()
        for step in count():
            if step == steps or found == possible:
                break
            found.update(self.draw(step))
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

    def trained(self, steps: int) -> tuple[Width, ...]:
        return self.sampler.trained(steps)

    def losses(self, engine: Engine, batch: Batch) -> Iterator[Tensor]:
        images, soft = augment.prepare(batch, self.augmentation, self.facts)
        answers = self.teach(batch, images) if self.teach is not None else None
        larger: Tensor | None = None
        for pass_, width in enumerate(self.sampler.draw(batch.step, int(batch.index[0]))):
            z, u = _both(engine(images, draw=batch.draw(pass_, images.device), width=width))
            yield self._first(z, u, soft, answers) if larger is None else self._smaller(z, u, soft, larger)
            if larger is None or self.config.transfer == "progressive":
                larger = u.detach()

    def _first(self, z: Tensor, u: Tensor, soft: Tensor, answers: Tensor | None) -> Tensor:
        """Labels, and the teacher's answers to the same images, for the largest width of the step."""
        loss = F.cross_entropy(z, soft)
        if answers is None:
            return loss
        alpha = self.config.teacher.alpha
        return (1 - alpha) * loss + alpha * teacher.loss(self.config.teacher, u, answers)

    def _smaller(self, z: Tensor, u: Tensor, soft: Tensor, larger: Tensor) -> Tensor:
        """Labels and the larger network's distillation logits. A term with weight 0 is not computed."""
        terms = []
        if self.config.label_weight:
            terms.append(self.config.label_weight * F.cross_entropy(z, soft))
        if self.config.transfer != "none":
            terms.append(F.kl_div(u.log_softmax(-1), larger.log_softmax(-1), reduction="batchmean", log_target=True))
        return torch.stack(terms).sum()


def _both(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Class and distillation logits in fp32: one and the same without a distillation token."""
    z, u = (output, output) if isinstance(output, Tensor) else output
    return z.float(), u.float()
