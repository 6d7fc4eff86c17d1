"""HSViT (arXiv 2404.05196): channels as tokens, disjoint attention groups, and M submodules that ranks can own.

The trunk can be a CNN of timm instead (`backbone`): then a submodule is its share of the last map's channels with their
groups, and the ranks of a replica compute the CNN for a share of the images each and exchange channels.

A width takes its share of every submodule's kernels and groups, so that tokens per group and the embedding stay, and
one model serves every width and every subset of submodules.

A submodule has its own conv trunk (K_l / M kernels a block), embedding projection and G / M groups; it sends the sum
of its CLS tokens, nothing else. M = 1 is the published model; M > 1 equals it with every convolution but the first
grouped into M and a projection for each submodule. A rank computes its M / S submodules together: grouped
convolutions, groups stacked on an axis.

Shape letters: B images, C channels, H x W pixels, K kernels of the last block = channel tokens, f pixels of its map,
M submodules here, G groups here, T = K/G + 1 tokens of a group, A attention layers, D embedding width, Q classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from hsvit_kernels.random import Draw, Site

from ..grid import rounding
from ..grid.grid import Grid
from .backbone import Backbone
from .hsvit_config import VARIANTS as VARIANTS
from .hsvit_config import Architecture
from .network import Network, any_seed
from .slimmable import FULL, Width
from .submodules import Head, Submodules
from .weights import SizedStart


@dataclass(frozen=True, kw_only=True)
class Config(Architecture, SizedStart):
    """What a recipe's `model` says of an HSViT; below the model, `Architecture` is enough."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights and self.backbone.weights:
            raise ValueError(
                f'weights = "{self.weights}" has those of the backbone too; leave backbone.weights empty, here '
                f'"{self.backbone.weights}"'
            )

    def at(self, width: Width) -> Self:
        return replace(super().at(width), weights="", resize=False)

    def build(
        self,
        *,
        image_size: int,
        channels: int,
        classes: int,
        seed: int = 0,
        here: range | None = None,
        grid: Grid | None = None,
        exchange: str = "fp32",
    ) -> HSViT:
        """The model, or a rank's share of it; see `HSViT`."""
        return HSViT(
            self, image_size=image_size, channels=channels, classes=classes, seed=seed, here=here, grid=grid,
            exchange=exchange,
        )  # fmt: skip


class HSViT(Network):
    """The submodules of this rank, the exchange with the replica's other ranks, the head, and the backbone if any.

    Args:
        config: need not be resolved.
        image_size: side of the square images, pixels. channels: 1 or 3. classes: Q.
        here: global indices of the submodules to hold; all of them by default.
        grid: of the replica's other ranks, None without any.
        exchange: what each submodule's CLS sum is rounded to, on one rank too: "fp32", "bf16" or "int8".
        seed: of the initial weights, which depend on (seed, global submodule) only.
    """

    def __init__(
        self,
        config: Config,
        *,
        image_size: int,
        channels: int,
        classes: int,
        here: range | None = None,
        grid: Grid | None = None,
        exchange: str = "fp32",
        seed: int = 0,
    ) -> None:
        super().__init__(config.resolved(image_size), image_size, channels, classes)
        self.grid, self.exchange = grid, exchange
        self.absent = () if grid is None else grid.absent
        here = range(config.submodules) if here is None else here
        self.backbone = None
        if config.backbone.name:
            self.backbone = Backbone(config.backbone, image_size=image_size, channels=channels, seed=seed)
            for parameter in self.backbone.parameters():
                # A rank sees a share of its replica's images, so its gradient is a part of a sum (see Engine).
                parameter.partial_in_replica = self.splits_images  # type: ignore[attr-defined]
        self.submodules = Submodules(self.config, here, image_size, channels)
        self.head = Head(self.config.embedding, classes)
        if not self.head.linear.weight.is_meta:
            self.submodules.initialise(seed)
            self.head.initialise(seed)

    def forward(
        self,
        images: Tensor,
        draw: Draw | None = None,
        present: Tensor | None = None,
        width: Width | float = FULL,
        maps: Tensor | None = None,
    ) -> Tensor:
        """Classify images.

        Args:
            images: [B, C, H, W], normalised.
            draw: the randomness of a training forward; on one rank by default keyed on PyTorch's generator.
            present: bool [M] or [B, M], which of the grid's submodules (global index) answered; all by default.
            width: which subnet, as 0.5.
            maps: [B / S, K, f], what the backbone gives for this rank's own images, where that is known.

        Returns:
            Logits [B, Q].

        Raises:
            ValueError: images that do not fit, a width that the model cannot be cut to, or training on several ranks
                without a draw.
        """
        c, width = self.config, self.width(width)
        self._check(images)
        if self.training and (c.dropout or c.submodule_drop or c.backbone.drop_path):
            draw = self._draw(images, draw, self.grid)
        if present is None and self.training and c.submodule_drop and draw is not None:
            present = self._drop_submodules(draw)
        return self.answer(self.sums(images, draw, width, maps), present, width)

    def forward_features(self, images: Tensor, draw: Draw | None = None, width: Width | float = FULL) -> Tensor:
        """[B, C, H, W] to what the head takes the mean of, for the submodules here: the CLS token of each group
        [B, G, D], or without attention the channel tokens [B, K, D]."""
        self._check(images)
        width = self.width(width)
        if self.training and (self.config.dropout or self.config.backbone.drop_path):
            draw = self._draw(images, draw, self.grid)
        if self.backbone is not None:
            images = self._features(self.backbone, images, draw, None)
        return self.submodules.vectors(images, draw, width)

    def reset_classifier(self, num_classes: int) -> None:
        """Give the model a new head for so many classes, with random weights."""
        self.classes = num_classes
        self.head = Head(self.config.embedding, num_classes).to(self.head.linear.weight)
        self.head.initialise(any_seed())

    def sums(
        self, images: Tensor, draw: Draw | None = None, width: Width | float = FULL, maps: Tensor | None = None
    ) -> Tensor:
        """[B, M here, D]: for each submodule the sum over its groups' CLS tokens. Arguments as of `forward`."""
        width = self.width(width)
        if self.backbone is not None:
            images = self._features(self.backbone, images, draw, maps)
        return self.submodules(images, draw, width)

    def answer(self, sums: Tensor, present: Tensor | None = None, width: Width | float = FULL) -> Tensor:
        """Logits [B, Q] from the `sums` of this rank and the replica's others. Arguments as of `forward`."""
        c, here, width = self.config, self.submodules.here, self.width(width)
        each = width.of(c.groups if c.depth else c.kernels[-1]) // c.submodules
        if present is None:
            return self.head(self._exchange(sums) / (each * (c.submodules - len(self.absent))))
        present = self._without_absent(present.to(sums.device).expand(sums.shape[0], c.submodules), False)
        sums = sums * present[:, here.start : here.stop, None]
        return self.head(self._exchange(sums) / (present.sum(1, keepdim=True) * each))

    def _without_absent(self, x: Tensor, value: float) -> Tensor:
        """[B, M] with `value` at the absent submodules."""
        return x.index_fill(1, torch.tensor(self.absent, device=x.device), value) if self.absent else x

    @property
    def splits_images(self) -> bool:
        """Whether the ranks of a replica compute a backbone for a share of its images each."""
        return self.config.splits_images and self.grid is not None and self.grid.submodule_ranks > 1

    def _exchange(self, sums: Tensor) -> Tensor:
        """[B, M here, D] to the sum over all submodules [B, D], each rounded by itself."""
        # Not by way of the grid where there is nothing to exchange: there a compiled graph would break.
        if self.grid is None or self.grid.submodule_ranks == 1:
            return rounding.rounded(sums, self.exchange).sum(1)
        return self.grid.exchange(sums, self.exchange)

    def _features(self, backbone: Backbone, images: Tensor, draw: Draw | None, maps: Tensor | None) -> Tensor:
        """[B, C, H, W] to the maps [B, K, f] of the channels that the submodules here take."""
        if self.grid is None or not self.splits_images:
            maps = backbone(images, draw).flatten(2) if maps is None else maps
            here, share = self.submodules.here, maps.shape[1] // self.config.submodules
            return maps[:, here.start * share : here.stop * share]
        own = self.grid.share_of(len(images))
        own_draw = None if draw is None else draw.slice(own.start, own.stop)
        maps = backbone(images[own], own_draw).flatten(2) if maps is None else maps
        if self.absent:  # nobody takes their channels
            m = self.config.submodules
            maps = maps.unflatten(1, (m, -1))[:, [i for i in range(m) if i not in self.absent]].flatten(1, 2)
        return self.grid.exchange_features(maps)

    def _drop_submodules(self, draw: Draw) -> Tensor:
        """bool [B, M]: each that the grid has is present with probability 1 - submodule_drop; the luckiest always."""
        index = torch.arange(self.config.submodules, dtype=torch.int32, device=draw.key.device)
        luck = self._without_absent(draw.uniform(Site.SUBMODULE, index), -1)
        return (luck >= self.config.submodule_drop) | (luck == luck.amax(1, keepdim=True))

    @torch.no_grad()
    def subnet(self, width: Width | float) -> HSViT:
        """The standalone network at a width, with copies of its weights; BatchNorm's statistics are those in force."""
        width = self.width(width)
        small = self.config.at(width).build(
            image_size=self.image_size, channels=self.channels, classes=self.classes, here=self.submodules.here,
            grid=self.grid, exchange=self.exchange,
        ).train(self.training).to(self.head.linear.weight)  # fmt: skip
        found = dict(self.head.state_dict(prefix="head."))
        if self.backbone is not None:
            found |= self.backbone.state_dict(prefix="backbone.")
        found |= self._slices(lambda path: width)
        small.load_state_dict(found)
        return small
