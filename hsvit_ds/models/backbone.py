"""A CNN of timm, or a UniFormer, in the place of HSViT's conv trunk (arXiv 2404.05196, section on existing CNNs and
table 3).

Its last feature map has K channels, which become HSViT's tokens as its own kernels' would. It is frozen, or trained
from some stage on.

Shape letters: B images, C channels, K channels of the map, H x W its pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsvit_kernels.random import Draw

from ..spans import Part, spanned
from . import timm_models, uniformer
from .network import count_macs
from .uniformer import UniFormer
from .uniformer_config import NAMES
from .weights import load_exactly, read_foreign, unwrapped


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = ""
    """Of a timm model that ends in a feature map: resnet50, efficientnet_b4, convnext_tiny, …; or of a UniFormer:
    uniformer_small, uniformer_small_plus, uniformer_xs; empty: no backbone."""
    weights: str = ""
    """A timm tag ("tv_in1k", or "default"), a local file (.safetensors, .pth), or empty for random ones."""
    trained_stages: int = 0
    """The last so many of its stages are trained, -1: all. What is not trained is frozen: no gradient, no optimizer
    state, nothing kept for a backward pass, BatchNorm with the statistics that it came with."""
    output_stride: int = 32
    """Pixels of the image to one of the map, on a side: 8 and 16 keep a larger map, with dilated convolutions."""
    cache: str = ""
    """Folder for the maps of a frozen backbone, each computed once: for runs without random augmentation. Takes
    K x f numbers an image."""
    drop_path: float = 0.0
    """Probability of skipping a block for an image in training, as timm spreads it over the blocks."""

    def __post_init__(self) -> None:
        if self.trained_stages < -1:
            raise ValueError(f"trained_stages = {self.trained_stages}: must be -1 (all) or more")
        if self.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride = {self.output_stride}: must be 8, 16 or 32")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path = {self.drop_path}: must be in [0, 1)")


@dataclass(frozen=True)
class Shape:
    """What a backbone gives for one image: a map of `channels` x `height` x `width`, for so many multiply-adds."""

    channels: int
    height: int
    width: int
    macs: int
    channels_last: bool
    """Whether timm's model answers [B, H, W, K]."""
    stages: int


class Backbone(nn.Module):
    """The network, without pooling and classifier."""

    def __init__(self, config: Config, *, image_size: int, channels: int, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.randomness = timm_models.Randomness()
        build = self._uniformer if config.name in NAMES else self._timm
        self.net = build(image_size, channels, seed)
        self._freeze()
        self.channels_last = False if self.is_meta else shape(config, image_size, channels).channels_last

    def _timm(self, image_size: int, channels: int, seed: int) -> nn.Module:
        config, options = self.config, dict[str, Any]()
        if config.drop_path:
            options["drop_path_rate"] = config.drop_path
        if config.output_stride != 32:
            options["output_stride"] = config.output_stride
        return timm_models.create(
            "model.backbone.name",
            config.name,
            weights=config.weights,
            randomness=self.randomness,
            classes=0,
            channels=channels,
            image_size=image_size,
            seed=seed,
            **options,
        )

    def _uniformer(self, image_size: int, channels: int, seed: int) -> nn.Module:
        c = self.config
        if c.output_stride != 32:
            raise ValueError(f"model.backbone.output_stride = {c.output_stride}: {c.name} has 32 alone")
        if c.weights and Path(c.weights).suffix not in timm_models.FILES:
            raise ValueError(
                f'model.backbone.weights = "{c.weights}": those of {c.name} are a file ({", ".join(timm_models.FILES)})'
            )
        net = uniformer.Config(variant=NAMES[c.name], drop_path=c.drop_path).build(
            image_size=image_size, channels=channels, classes=0, seed=seed
        )
        if c.weights and not net.norm.weight.is_meta:
            found = unwrapped(read_foreign(Path(c.weights)))
            unused = (*net.heads, "norm_cls")
            found = {name: tensor for name, tensor in found.items() if name.partition(".")[0] not in unused}
            load_exactly(net, found, f"model.backbone.weights = {c.weights} does not fit {c.name}")
        return net

    @property
    def is_meta(self) -> bool:
        return next(self.parameters()).is_meta

    def _freeze(self) -> None:
        count, trained = len(self.stages), self.config.trained_stages
        if trained > count:
            raise ValueError(
                f"model.backbone.trained_stages = {trained}: {self.config.name} has {count} stages "
                f"({', '.join(self.stages)}); set at most so many, or -1 for all"
            )
        first = 0 if trained == -1 else count - trained
        numbers = timm_models.layer_numbers(self.net, stages=True)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(numbers[name] >= first)

    @property
    def stages(self) -> list[str]:
        """The first parameter of every stage, the nearest to the images first."""
        firsts: dict[int, str] = {}
        for name, number in timm_models.layer_numbers(self.net, stages=True).items():
            firsts.setdefault(number, name)
        return [firsts[number] for number in sorted(firsts)]

    @property
    def is_frozen(self) -> bool:
        return self.config.trained_stages == 0

    def train(self, mode: bool = True) -> Backbone:
        """Frozen parts stay in eval mode: their BatchNorm neither uses nor moves with a batch's statistics."""
        super().train(mode)
        for module in self.net.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    @spanned(Part.BACKBONE)
    def forward(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """images [B, C, H, W], normalised, to maps [B, K, H, W]. draw: needed in training with drop_path."""
        self.randomness.draw = draw
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            if isinstance(self.net, UniFormer):
                return self.net.forward_features(images, draw)
            maps: Tensor = self.net(images.contiguous(memory_format=torch.channels_last))
        return maps.movedim(-1, 1) if self.channels_last else maps


@lru_cache(maxsize=32)
def shape(config: Config, image_size: int, channels: int) -> Shape:
    """What the backbone gives for an image.

    Raises:
        ValueError: no feature map, an empty one, or none for images of this size.
    """
    with torch.device("meta"):
        model = Backbone(config, image_size=image_size, channels=channels)
    what = f'model.backbone.name = "{config.name}"'
    macs, answer = count_macs(model.net, what, image_size, channels)
    if not isinstance(answer, Tensor) or answer.dim() != 4:
        found = list(answer.shape[1:]) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"{what} has no feature map: its answer to an image is {found}")
    features = model.net.num_features
    channels_last = answer.shape[1] != features and answer.shape[3] == features
    k, height, width = (answer.movedim(-1, 1) if channels_last else answer).shape[1:]
    if not height * width:
        raise ValueError(f"{what} has an empty map ({height} x {width}) for images of {image_size} px")
    return Shape(k, height, width, macs, channels_last, len(model.stages))
