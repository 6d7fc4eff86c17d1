"""A rank's model of a recipe on fake tensors: its forwards compute nothing, but show what they would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hsvit_kernels.random import Draw

from .. import models
from ..data import splits
from ..engine import engine
from ..grid import rounding
from ..grid.grid import Config, shares
from .recipe import Plan, Recipe


class Rehearsal(NamedTuple):
    model: Any
    """In training mode."""
    images: Tensor
    """[micro batch, C, H, W]."""
    draw: Draw


class _OneRank:
    """Stands for a grid of which only the first rank of a replica exists."""

    def __init__(self, config: Config) -> None:
        self.submodule_ranks, self.absent = config.submodule_ranks, config.absent

    def share_of(self, images: int) -> slice:
        return slice(images // self.submodule_ranks)

    def exchange_features(self, maps: Tensor) -> Tensor:
        return maps[:, : maps.shape[1] // self.submodule_ranks].repeat(self.submodule_ranks, 1, 1)

    def exchange(self, sums: Tensor, form: str) -> Tensor:
        return rounding.rounded(sums, form).sum(1)


def first_share(recipe: Recipe) -> range:
    """The submodules of the first rank of a replica."""
    return shares(recipe.grid.submodule_ranks, recipe.model.submodules, recipe.grid.absent)[0]


@contextmanager
def rehearsal(recipe: Recipe, plan: Plan) -> Iterator[Rehearsal]:
    """Within the block every tensor is fake, and the run's precision is in force."""
    facts = splits.facts(recipe.data)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = models.without_weights(recipe.model).build(
            image_size=facts.image_size,
            channels=facts.channels,
            classes=facts.classes,
            here=first_share(recipe),
            grid=_OneRank(recipe.grid),  # type: ignore[arg-type]
            exchange=recipe.grid.exchange,
        )
        engine.prepare(model.train(), recipe.engine.checkpoint_activations, plan.bf16)
        images = torch.empty(plan.micro_batch, facts.channels, facts.image_size, facts.image_size)
        draw = Draw.of(0, image=torch.arange(plan.micro_batch))
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16):
            yield Rehearsal(model, images, draw)
