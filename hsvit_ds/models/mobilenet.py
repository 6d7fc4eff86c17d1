"""MobileNetV2 (arXiv 1801.04381) that can be sliced by width: US-Net's (arXiv 1903.05134), and a baseline of Scala.

Parameter names are timm's, so weights travel both ways. A width takes its share of the channels of the stem, of every
stage and, times the expansion, inside every block, each rounded as MobileNetV2's are, so that several widths can be one
network; the last convolution's outputs and the classifier stay.

Shape letters: B images, C channels, H x W pixels, Q classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_kernels.random import Draw, Site, generator

from ..errors import counted
from ..spans import Part, spanned
from . import layers, slimmable
from .batchnorm import BatchNorm, without_gradient
from .network import AnyWidth, Network, OneRank, any_seed, counted_macs
from .slimmable import FULL, Mix, Rounding, Width
from .weights import Start

ROUNDING = Rounding(8)
"""Of channels between blocks."""


@dataclass(frozen=True)
class Variant:
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    strides: tuple[int, ...]


VARIANTS = {
    "MobileNetV2": Variant((32, 16, 24, 32, 64, 96, 160, 320), (1, 2, 3, 4, 3, 3, 1), (2, 1, 2, 2, 2, 1, 2, 1)),
}
TIMM = {0.35: "mobilenetv2_035", 0.5: "mobilenetv2_050", 0.75: "mobilenetv2_075", 1: "mobilenetv2_100"}
"""timm's names of MobileNetV2 at a share of its channels."""


@dataclass(frozen=True, kw_only=True)
class Config(Start, OneRank):
    """What a recipe's `model` says of a MobileNet."""

    kind: Literal["mobilenet"] = "mobilenet"
    variant: str = ""
    """The published network, MobileNetV2; gives channels, depths and strides where not set."""
    channels: tuple[int, ...] = ()
    """Channels that leave the stem and each stage, at full width."""
    depths: tuple[int, ...] = ()
    """Blocks of each stage."""
    strides: tuple[int, ...] = ()
    """Of the stem and of each stage's first block, 1 or 2: with fewer of 2 small images keep larger maps."""
    expansion: int = 6
    """Channels inside a block over those that enter it; 1 in the first stage."""
    features: int = 1280
    """Channels of the last convolution, at every width."""
    drop_path: float = 0.0
    """Probability of skipping a block for an image in training, from 0 linearly to this at the last block."""
    widths: slimmable.Config = field(default_factory=slimmable.Config)

    def __post_init__(self) -> None:
        if self.variant and self.variant not in VARIANTS:
            raise ValueError(f'variant = "{self.variant}": must be {", ".join(VARIANTS)}')
        if not self.variant and not (self.channels and self.depths and self.strides):
            raise ValueError("name a variant, or set channels, depths and strides")
        for name in ("channels", "depths", "strides"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"{name} = {list(getattr(self, name))}: each must be at least 1")
        for name in ("expansion", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if max(self.strides, default=1) > 2:
            raise ValueError(f"strides = {list(self.strides)}: each must be 1 or 2")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path = {self.drop_path}: must be in [0, 1)")
        if self.widths.slice != "channels":
            raise ValueError(f'widths.slice = "{self.widths.slice}": a MobileNet has no heads; leave it "channels"')

    def resolved(self, image_size: int) -> Self:
        """Fill what the variant gives; refuse stages that do not match, and images too small for the strides."""
        full = self
        if self.variant:
            known = VARIANTS[self.variant]
            given = {name: getattr(self, name) or getattr(known, name) for name in ("channels", "depths", "strides")}
            full = replace(self, **given)
        stages = len(full.depths)
        for name in ("channels", "strides"):
            found = len(getattr(full, name))
            if found != stages + 1:
                raise ValueError(
                    f"{name} has {counted(found, 'entry', 'entries')} for the stem and {counted(stages, 'stage')} "
                    f"(depths = {list(full.depths)}): must have {stages + 1}"
                )
        side = image_size
        for place, stride in enumerate(full.strides):
            if stride > 1 and side == 1:
                where = f"stage {place}" if place else "the stem"
                raise ValueError(
                    f"strides = {list(full.strides)}: images of {image_size} px have shrunk to 1 x 1 before {where}, "
                    "whose stride of 2 has nothing left to halve; set strides with fewer of 2"
                )
            side = -(-side // stride)
        return full

    def check_width(self, width: Width) -> None:
        """Refuse a mix; every width can be rounded."""
        if isinstance(width, Mix):
            raise ValueError(
                f"mix {width}: a MobileNet has one width for all layers; a mix needs a ViT that was trained with "
                'sliced = "mlp"'
            )

    def at(self, width: Width) -> Self:
        """The standalone network at a width."""
        own = {} if width.is_full else {"channels": tuple(width.of(c, ROUNDING) for c in self.channels)}
        return replace(self, variant="", **own, weights="", widths=slimmable.Config())  # type: ignore[arg-type]

    def macs(self, image_size: int, channels: int, classes: int, width: Width = FULL) -> int:
        """Multiply-adds of one image, forward: convolutions and the classifier."""
        own = self.resolved(image_size).at(width)
        return counted_macs(own, f'model.kind = "{self.kind}"', image_size, channels, classes)

    def build(
        self,
        *,
        image_size: int,
        channels: int,
        classes: int,
        seed: int = 0,
        here: range | None = None,
        grid: Any = None,
        exchange: str = "",
    ) -> MobileNet:
        """The model; `here`, `grid` and `exchange` are HSViT's."""
        return MobileNet(self, image_size=image_size, channels=channels, classes=classes, seed=seed)


def timm_name(config: Config) -> str:
    """What timm calls a resolved network; "" where it has none such."""
    known = VARIANTS["MobileNetV2"]
    if (config.depths, config.strides, config.expansion, config.features) != (known.depths, known.strides, 6, 1280):
        return ""
    for share, name in TIMM.items():
        width = Width(*slimmable.ratio(share).as_integer_ratio())
        if config.channels == tuple(width.of(c, ROUNDING) for c in known.channels):
            return name
    return ""


class Block(nn.Module):
    """1 x 1 to `expansion` times the channels, 3 x 3 a channel, 1 x 1 back, each with BatchNorm, ReLU6 after the first
    two; without expansion the first convolution is left out. adds: the input, as every block of a stage but its first
    does: at a small width rounding can give that one as many channels as enter it, which at full width it has not."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int, adds: bool) -> None:
        super().__init__()
        self.adds = adds
        inside, within = c_in * expansion, replace(ROUNDING, times=expansion)
        depthwise = _conv(inside, inside, 3, within, within, stride=stride, groups=inside)
        back = _conv(inside, c_out, 1, within, ROUNDING)
        if expansion > 1:
            convs = {"conv_pw": _conv(c_in, inside, 1, ROUNDING, within), "conv_dw": depthwise, "conv_pwl": back}
        else:
            convs = {"conv_dw": depthwise, "conv_pw": back}
        self.steps = list(zip(convs, (f"bn{number}" for number in (1, 2, 3)), strict=False))
        for (conv, norm), layer in zip(self.steps, convs.values(), strict=True):
            self.add_module(conv, layer)
            self.add_module(norm, BatchNorm(layer.out_channels, rounding=layer.round_out))
        # What it adds goes through sums and 1 x 1 convolutions alone, each of which has a BatchNorm behind it.
        without_gradient(getattr(self, self.steps[-1][1]).bias)

    @spanned(Part.TRUNK)
    def forward(self, x: Tensor, width: Width, kept: Tensor | None) -> Tensor:
        """kept [B, 1, 1, 1]: drop path's factors."""
        shortcut = x
        for number, (conv, norm) in enumerate(self.steps, 1):
            x = getattr(self, norm)(getattr(self, conv)(x, width), width)
            if number < len(self.steps):
                x = F.relu6(x, inplace=True)
        if not self.adds:
            return x
        return shortcut + (x if kept is None else x * kept.to(x.dtype))


def _conv(
    c_in: int, c_out: int, kernel: int, round_in: Rounding | None, round_out: Rounding | None, **options: Any
) -> layers.Conv2d:
    """Sliced at an axis that has a rounding; a depthwise one by its outputs alone."""
    return layers.Conv2d(
        c_in,
        c_out,
        kernel,
        slice_in=round_in is not None and "groups" not in options,
        slice_out=round_out is not None,
        round_in=round_in,
        round_out=round_out,
        padding=kernel // 2,
        bias=False,
        **options,
    )


class MobileNet(Network):
    """A slimmable MobileNetV2.

    Args:
        config: need not be resolved.
        image_size: side of the square images, pixels. channels: of an image. classes: Q. seed: of the initial weights.
    """

    def __init__(self, config: Config, *, image_size: int, channels: int, classes: int, seed: int = 0) -> None:
        c = config.resolved(image_size)
        super().__init__(c, image_size, channels, classes)
        self.conv_stem = _conv(channels, c.channels[0], 3, None, ROUNDING, stride=c.strides[0])
        self.bn1 = BatchNorm(c.channels[0], rounding=ROUNDING)
        self.blocks = nn.ModuleList()
        for stage, (c_in, c_out) in enumerate(zip(c.channels, c.channels[1:], strict=False)):
            expansion = c.expansion if stage else 1
            blocks = [Block(c_in, c_out, c.strides[stage + 1], expansion, adds=False)]
            blocks += [Block(c_out, c_out, 1, expansion, adds=True) for _ in range(c.depths[stage] - 1)]
            self.blocks.append(nn.ModuleList(blocks))
        self.conv_head = _conv(c.channels[-1], c.features, 1, ROUNDING, None)
        self.bn2 = BatchNorm(c.features, sliced=False)
        self.classifier = layers.Linear(c.features, classes, slice_in=False, slice_out=False)
        if not self.classifier.weight.is_meta:
            self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int, only: str = "") -> None:
        """He's normals by fan-out for convolutions, N(0, 0.01) for the classifier, as in US-Net's code. only:
        parameters whose names begin so."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or not name.startswith(only):
                continue
            source = generator(seed, Site.INIT, -1, *name.encode())
            layer = self.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, layers.Conv2d):
                fan_out = prod(layer.kernel_size) * layer.out_channels // layer.groups
                parameter.normal_(std=(2 / fan_out) ** 0.5, generator=source)
            else:
                parameter.normal_(std=0.01, generator=source)
        if self.classifier.bias is not None:
            self.classifier.bias.zero_()

    def reset_classifier(self, num_classes: int) -> None:
        """Give the model a new classifier for so many classes, with random weights."""
        self.classes, before = num_classes, self.classifier.weight
        self.classifier = layers.Linear(self.config.features, num_classes, slice_in=False, slice_out=False)
        self._initialise(any_seed(), only="classifier")
        self.to(before.device, before.dtype)

    def forward(self, images: Tensor, draw: Draw | None = None, width: AnyWidth = FULL) -> Tensor:
        """Classify images.

        Args:
            images: [B, C, H, W], normalised.
            draw: the randomness of a training forward; on one rank by default keyed on PyTorch's generator.
            width: which subnet, as 0.5.

        Returns:
            Logits [B, Q].

        Raises:
            ValueError: images that do not fit, a width that is none of the model's, or training under an engine without
                a draw.
        """
        x = self.forward_features(images, draw, width)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits

    def forward_features(self, images: Tensor, draw: Draw | None = None, width: AnyWidth = FULL) -> Tensor:
        """[B, C, H, W] to the last convolution's map, [B, `config.features`, h, w]."""
        width = self.width(width)
        self._check(images)
        x = images.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.bn1(self.conv_stem(x, width), width), inplace=True)
        blocks = [block for stage in self.blocks for block in stage]  # type: ignore[attr-defined]
        kept = self._drop_path(images, draw, len(blocks), 1)
        for number, block in enumerate(blocks):
            x = block(x, width, None if kept is None else kept[number, :, :, :, None])
        return F.relu6(self.bn2(self.conv_head(x, width), width), inplace=True)

    @torch.no_grad()
    def subnet(self, width: AnyWidth) -> MobileNet:
        """The standalone network at a width, with copies of its weights; BatchNorm's statistics are those in force."""
        width = self.width(width)
        small = self.config.at(width).build(
            image_size=self.image_size, channels=self.channels, classes=self.classes
        ).train(self.training).to(self.classifier.weight)  # fmt: skip
        small.load_state_dict(self._slices(lambda path: width))
        return small
