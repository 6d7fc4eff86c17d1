"""UniFormer (arXiv 2201.09450) that can be sliced by width, as in Scala (arXiv 2412.04786): convolutions in the first
two stages, attention in the last two, which in the light one (XS) leaves half of the tokens out.

Parameter names are the published code's (github Sense-X/UniFormer), so its weights are taken. A width takes its share
of every layer's channels; depth, heads and tokens stay, and each width ranks the tokens for itself.

Shape letters: B images, C channels, H x W pixels, n tokens (the pixels of a map), T tokens that attend, d channels at a
width, Q classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hsvit_kernels import StepState
from hsvit_kernels.dispatch import exporting
from hsvit_kernels.random import Draw, Site, generator

from ..spans import Part, spanned
from . import layers, vit, vit_config
from .batchnorm import BatchNorm, without_gradient
from .network import AnyWidth, Network, Twin, any_seed, counted_macs
from .slimmable import FULL, Width
from .uniformer_config import STAGES, Architecture
from .weights import Start


@dataclass(frozen=True, kw_only=True)
class Config(Architecture, Start):
    """What a recipe's `model` says of a UniFormer; below the model, `Architecture` is enough."""

    def at(self, width: Width) -> Self:
        return replace(super().at(width), weights="")

    def macs(self, image_size: int, channels: int, classes: int, width: Width = FULL) -> int:
        """Multiply-adds of one image, forward: convolutions and matrix products, attention's too."""
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
    ) -> UniFormer:
        """The model; `here`, `grid` and `exchange` are HSViT's."""
        return UniFormer(self, image_size=image_size, channels=channels, classes=classes, seed=seed)


class Convolutions(nn.Module):
    """3 x 3 convolutions with BatchNorm, GELU between them."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], of_image: bool) -> None:
        super().__init__()
        self.proj = nn.ModuleDict()  # numbered as in the published code, where every third layer is a GELU
        for number, ((c_in, c_out), stride) in enumerate(zip(pairwise(channels), strides, strict=True)):
            slice_in = number > 0 or not of_image
            conv = layers.Conv2d(c_in, c_out, 3, slice_in=slice_in, slice_out=True, stride=stride, padding=1)
            assert conv.bias is not None
            without_gradient(conv.bias)
            self.proj[str(3 * number)] = conv
            self.proj[str(3 * number + 1)] = BatchNorm(c_out)

    def forward(self, x: Tensor, width: Width) -> Tensor:
        for number, layer in enumerate(self.proj.values()):
            x = layer(F.gelu(x) if number and number % 2 == 0 else x, width)
        return x


class Patches(nn.Module):
    """A convolution of patches that do not overlap, and LayerNorm over the channels."""

    def __init__(self, c_in: int, c_out: int, stride: int, of_image: bool) -> None:
        super().__init__()
        self.norm = layers.LayerNorm(c_out, 1e-5)
        self.proj = layers.Conv2d(c_in, c_out, stride, slice_in=not of_image, slice_out=True, stride=stride)

    def forward(self, x: Tensor, width: Width) -> Tensor:
        x = self.proj(x, width).permute(0, 2, 3, 1)
        return self.norm(x, width).permute(0, 3, 1, 2)


def _depthwise(channels: int, kernel: int) -> layers.Conv2d:
    return layers.Conv2d(
        channels, channels, kernel, slice_in=False, slice_out=True, padding=kernel // 2, groups=channels
    )


def _pointwise(c_in: int, c_out: int) -> layers.Conv2d:
    return layers.Conv2d(c_in, c_out, 1, slice_in=True, slice_out=True)


class ConvMlp(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = _pointwise(channels, hidden), _pointwise(hidden, channels)

    def forward(self, x: Tensor, width: Width) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x, width)), width)
        return y


class ConvBlock(nn.Module):
    """x + 3 x 3 a channel (x), then x + 1 x 1 (5 x 5 a channel (1 x 1 (BN x))), then x + MLP (BN x)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.pos_embed = _depthwise(channels, 3)
        self.norm1 = BatchNorm(channels)
        self.conv1 = _pointwise(channels, channels)
        self.conv2 = _pointwise(channels, channels)
        self.attn = _depthwise(channels, 5)
        self.norm2 = BatchNorm(channels)
        self.mlp = ConvMlp(channels, hidden)

    @spanned(Part.TRUNK)
    def forward(self, x: Tensor, width: Width, kept: Tensor | None) -> Tensor:
        """x [B, d, H, W]; kept [2, B, 1, 1]: drop path's factors of both branches."""
        x = x + self.pos_embed(x, width)
        y = self.conv1(self.norm1(x, width), width)
        x = x + _dropped(self.conv2(self.attn(y, width), width), kept, 0)
        return x + _dropped(self.mlp(self.norm2(x, width), width), kept, 1)


def _dropped(branch: Tensor, kept: Tensor | None, number: int) -> Tensor:
    if kept is None:
        return branch
    return branch * kept[number].to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))


class TokenBlock(vit.Block):
    """x + 3 x 3 a channel (x), then a ViT's block of all pixels as tokens."""

    def __init__(self, channels: int, hidden: int, heads: int, state: StepState) -> None:
        super().__init__(vit_config.Architecture(embedding=channels, heads=heads, depth=1), hidden, state)
        self.pos_embed = _depthwise(channels, 3)

    def placed(self, x: Tensor, width: Width) -> Tensor:
        """[B, d, H, W] to tokens [B, n, d] that know their neighbours."""
        return (x + self.pos_embed(x, width)).flatten(2).transpose(1, 2)

    def map(self, x: Tensor, width: Width, kept: Tensor | None) -> Tensor:
        """x [B, d, H, W]; kept [2, B, 1, 1]: drop path's factors of both branches."""
        tokens = self(self.placed(x, width), width, kept, x.shape[2] * x.shape[3])
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class PrunedBlock(TokenBlock):
    """The same with a CLS token, for the better half of the tokens: the others are merged into one, weighted by their
    scores, and get the changes of that one (Evo-ViT, arXiv 2108.01390). A token's score is what CLS attends to it,
    averaged over the heads, and over the blocks with half of the weight to the last one that kept it."""

    def pruned(
        self, x: Tensor, cls: Tensor, scores: Tensor | None, width: Width, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, d, H, W], cls [B, 1, d], scores [B, n], None before the first block, which keeps all tokens: all three
        after the block."""
        tokens = self.placed(x, width)
        if scores is None:
            (cls, tokens), scores, _ = self._attend([cls, tokens], width, kept)
        else:
            half = tokens.shape[1] // 2
            best, rest = _ranked(scores).split([half, tokens.shape[1] - half], 1)
            left, weight = _at(tokens, rest), scores.gather(1, rest)
            share = (weight / weight.sum(1, keepdim=True))[:, :, None]
            merged = (share.to(left.dtype) * left).sum(1, keepdim=True)
            (cls, chosen, _), now, change = self._attend([cls, _at(tokens, best), merged], width, kept)
            order = torch.cat((best, rest), 1).argsort(1)
            tokens = _at(torch.cat((chosen, left + change), 1), order)
            before, now = scores.gather(1, best), now[:, :half]
            scores = torch.cat((0.5 * before + 0.5 * now, weight), 1).gather(1, order)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:]), cls, scores

    def _attend(
        self, parts: list[Tensor], width: Width, kept: Tensor | None
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """The parts of the tokens after attention and MLP, [B, T - 1] what the first token attends to the others, and
        the sum of what both branches add to the last token, [B, 1, d]."""
        x = torch.cat(parts, 1)
        q, k, v = self.attn.queries_keys_values(self.norm1(x, width), width)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        y = self.attn.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2), width)
        x = x + _dropped(y, kept, 0)
        z = self.mlp(self.norm2(x, width), width, None, x.shape[1])
        x = x + _dropped(z, kept, 1)
        return x.split([part.shape[1] for part in parts], 1), weights[:, :, 0, 1:].mean(1), y[:, -1:] + z[:, -1:]


def _ranked(scores: Tensor) -> Tensor:
    """[B, n] to where the tokens are, the highest score first; of tokens with one score, as those of an empty
    background, the first: so that the same are kept in every batch, on every rank and in an export."""
    if not exporting():
        return scores.argsort(dim=1, descending=True, stable=True)
    # ONNX has no stable sort.
    mine, others = scores[:, :, None], scores[:, None]
    first = torch.ones(scores.shape[1], scores.shape[1], dtype=torch.bool, device=scores.device).tril(-1)
    return ((others > mine) | ((others == mine) & first)).sum(-1).argsort(1)


def _at(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, n, d] at an index [B, k]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


class UniFormer(Network):
    """A slimmable UniFormer.

    Args:
        config: need not be resolved.
        image_size: side of the square images, pixels. channels: of an image. classes: Q; 0: no heads, as a backbone's.
        seed: of the initial weights.
    """

    head: layers.Linear
    head_cls: layers.Linear
    recomputes = False
    heads = ("head", "head_cls")
    """Layers that answer, the second in training alone."""

    def __init__(self, config: Config, *, image_size: int, channels: int, classes: int, seed: int = 0) -> None:
        c = config.resolved(image_size)
        super().__init__(c, image_size, channels, classes)
        self.step_state = StepState()
        for number, size in enumerate(c.channels, 1):
            self.add_module(f"patch_embed{number}", self._embedding(number, channels))
            hidden = c.hidden[number - 1]
            self.add_module(
                f"blocks{number}",
                nn.ModuleList(
                    ConvBlock(size, hidden)
                    if number < 3
                    else (PrunedBlock if c.pruned else TokenBlock)(size, hidden, c.heads[number - 3], self.step_state)
                    for _ in range(c.depths[number - 1])
                ),
            )
        d3, d4 = c.channels[2:]
        self.norm = BatchNorm(d4)
        if c.pruned:
            self.cls_token = nn.Parameter(torch.empty(1, 1, d3))
            self.cls_upsample = layers.Linear(d3, d4)
        if classes and c.pruned:
            self.norm_cls = layers.LayerNorm(d4, 1e-5)
        if classes:
            self._add_heads(classes)
        if not self.norm.weight.is_meta:
            self._initialise(seed)

    def _embedding(self, number: int, channels: int) -> nn.Module:
        """What makes a stage's map."""
        c = self.config
        stride, of_image, size = c.strides[number - 1], number == 1, c.channels[number - 1]
        before = channels if of_image else c.channels[number - 2]
        if (c.stem if of_image else c.downsampling) == "patches":
            return Patches(before, size, stride, of_image)
        if of_image:
            return Convolutions((before, size // 2, size), (min(stride, 2), max(stride // 2, 1)), of_image)
        return Convolutions((before, size), (stride,), of_image)

    def _add_heads(self, classes: int) -> None:
        for name in self.heads if self.config.pruned else self.heads[:1]:
            # Not gathered in place: a plain training loop has one head in its loss.
            self.add_module(name, layers.Linear(self.config.channels[-1], classes, slice_out=False))

    @torch.no_grad()
    def _initialise(self, seed: int, only: str = "") -> None:
        """As published: truncated normals of 0.02 and zero biases in linear layers, a CLS token of zeros, PyTorch's own
        in convolutions. only: parameters whose names begin so."""
        for name, parameter in self.named_parameters():
            if not name.startswith(only):
                continue
            source = generator(seed, Site.INIT, -1, *name.encode())
            layer = self.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, layers.Conv2d):
                bound = layer.weight[0].numel() ** -0.5
                parameter.uniform_(-bound, bound, generator=source)
            elif isinstance(layer, layers.Linear) and parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, generator=source)
            elif isinstance(layer, layers.Linear) or name == "cls_token":
                parameter.zero_()

    def reset_classifier(self, num_classes: int) -> None:
        """Give the model new heads for so many classes, with random weights."""
        self.classes, before = num_classes, self.norm.weight
        self._add_heads(num_classes)
        self._initialise(any_seed(), only="head")
        self.to(before.device, before.dtype)

    def forward(self, images: Tensor, draw: Draw | None = None, width: AnyWidth = FULL) -> Tensor | Twin:
        """Classify images.

        Args:
            images: [B, C, H, W], normalised.
            draw: the randomness of a training forward; on one rank by default keyed on PyTorch's generator.
            width: which subnet, as 0.5.

        Returns:
            Logits [B, Q]; of a pruned one in training, where `all_heads` is set, those of both heads. Without heads the
            last stage's map.

        Raises:
            ValueError: images that do not fit, a width that the model cannot be cut to, or training under an engine
                without a draw.
        """
        width = self.width(width)
        x, cls = self._map(images, draw, width)
        if not self.classes:
            return x
        logits: Tensor = self.head(x.flatten(2).mean(-1), width)
        if cls is None or not (self.training and self.all_heads):
            return logits
        return Twin(logits, self.head_cls(self.norm_cls(cls[:, 0], width), width))

    def forward_features(self, images: Tensor, draw: Draw | None = None, width: AnyWidth = FULL) -> Tensor:
        """[B, C, H, W] to the last stage's map after the last norm, [B, d, h, w]."""
        return self._map(images, draw, self.width(width))[0]

    def _map(self, images: Tensor, draw: Draw | None, width: Width) -> tuple[Tensor, Tensor | None]:
        """The last stage's map, and its CLS token [B, 1, d], None where there is none."""
        self._check(images)
        x = images.contiguous(memory_format=torch.channels_last)
        kept = self._drop_path(images, draw, sum(self.config.depths), 2)
        factors = iter([None] * sum(self.config.depths) if kept is None else kept.unflatten(0, (-1, 2)))
        recomputes = self.recomputes and torch.is_grad_enabled()
        compute: Any = partial(checkpoint, use_reentrant=False) if recomputes else lambda block, *given: block(*given)
        cls: Tensor | None = None
        scores: Tensor | None = None
        for number in range(1, STAGES + 1):
            x = getattr(self, f"patch_embed{number}")(x, width)
            if self.config.pruned and number > 2:
                cls, scores = self._entering(x, cls, scores, width)
            for block in getattr(self, f"blocks{number}"):
                if cls is not None:
                    x, cls, scores = compute(block.pruned, x, cls, scores, width, next(factors))
                else:
                    x = compute(block.map if number > 2 else block, x, width, next(factors))
        normed: Tensor = self.norm(x, width)
        return normed, cls

    def _entering(
        self, x: Tensor, cls: Tensor | None, scores: Tensor | None, width: Width
    ) -> tuple[Tensor, Tensor | None]:
        """CLS token and scores for a stage with the map x: at first none, then those of the stage before, averaged over
        the pixels that are one now, with the same sum."""
        if cls is None or scores is None:
            return width.take(self.cls_token, 2).to(x.dtype).expand(x.shape[0], -1, -1), None
        stride = self.config.strides[-1]
        side = self.config.sides(self.image_size)[-2]
        pooled = F.avg_pool2d(scores.view(-1, 1, side, side), stride, ceil_mode=True).flatten(1)
        scale = scores.sum(1, keepdim=True) / pooled.sum(1, keepdim=True)
        return self.cls_upsample(cls, width), pooled * scale

    @property
    def num_features(self) -> int:
        """Channels of the last stage's map, by timm's name."""
        return int(self.config.channels[-1])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a block's activations are computed anew in the backward pass, as timm's models say."""
        self.recomputes = enable

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Which layer or, coarse, stage a parameter belongs to, as timm's models tell it."""

        def place(name: str) -> tuple[float, ...]:
            if found := re.match(r"(?:patch_embed|blocks)(\d)\.(?:(\d+)\.)?", name):
                is_block = found[2] is not None and name.startswith("blocks")
                return (int(found[1]),) if coarse else (int(found[1]), 1 + int(found[2]) if is_block else 0)
            stage = {"cls_token": 3, "cls_upsample": 4}.get(name.partition(".")[0], math.inf)
            return (stage,) if coarse else (stage, 0)

        return place

    @torch.no_grad()
    def subnet(self, width: AnyWidth) -> UniFormer:
        """The standalone network at a width, with copies of its weights; BatchNorm's statistics are those in force."""
        width = self.width(width)
        small = self.config.at(width).build(
            image_size=self.image_size, channels=self.channels, classes=self.classes
        ).train(self.training).to(self.norm.weight)  # fmt: skip
        found = self._slices(lambda path: width)
        if self.config.pruned:
            found["cls_token"] = width.take(self.cls_token, 2)
        small.load_state_dict(found)
        return small
