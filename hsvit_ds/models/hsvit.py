"""HSViT (arXiv 2404.05196): channels as tokens, disjoint attention groups, and M submodules that ranks can own.

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

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hsvit_kernels import grouped_attention
from hsvit_kernels.random import Draw, Site, generator, keep_scale, threshold

from . import slimmable
from .batchnorm import BatchNorm2d
from .slimmable import FULL, Width


@dataclass(frozen=True)
class Variant:
    kernels: tuple[int, ...]
    depth: int
    pool_strides: dict[int, tuple[int, ...]]  # by image side, pixels


_C4A8_32 = (2, 1, 2, 1)
VARIANTS = {
    "C2A2": Variant((64, 128), 2, {28: (2, 2), 32: (2, 2), 64: (4, 2), 128: (4, 4)}),
    "C3A4": Variant((64, 128, 256), 4, {28: (2, 1, 2), 32: (2, 1, 2), 64: (2, 2, 2), 128: (4, 2, 2)}),
    "C4A8": Variant(
        (64, 128, 256, 512),
        8,
        {28: _C4A8_32, 32: _C4A8_32, 64: (2, 2, 2, 1), 128: (2, 2, 2, 2)},
    ),
    "ImageNet-256": Variant((32, 64, 128, 256, 512), 8, {256: (2, 2, 2, 2, 2)}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    kind: Literal["hsvit"] = "hsvit"
    variant: str = ""
    """A published variant: C2A2, C3A4, C4A8, ImageNet-256; gives kernels, depth and pool_strides where not set."""
    kernels: tuple[int, ...] = ()
    """Output channels of each conv block (K_l); the last is the number of tokens."""
    kernel_sizes: tuple[int, ...] = ()
    """Side of each block's first convolution and of its pool, pixels; 3 each by default."""
    pool_strides: tuple[int, ...] = ()
    """Stride of each block's pool; 1 means no pool."""
    convolution: bool = True
    """False: the ablation without trunk and projection; colour planes of `embedding` pixels become the tokens."""
    groups: int = 16
    """Attention groups (G)."""
    depth: int = -1
    """Attention layers of each group (A); 0 is the ablation without attention, CLS and positions; -1: the variant's."""
    heads: int = 8
    """Attention heads; a divisor of `embedding`."""
    embedding: int = 64
    """Width of a token (D)."""
    dropout: float = 0.2
    """Probability of dropping an attention weight or an embedded feature, rounded to 1/256."""
    submodules: int = 1
    """Independent shares of the model (M); divides every K_l and G. 1 is the published model."""
    submodule_drop: float = 0.0
    """Probability that a submodule is absent for an image in training; at least one stays."""
    widths: slimmable.Config = field(default_factory=slimmable.Config)

    def __post_init__(self) -> None:
        for name in ("groups", "heads", "embedding", "submodules"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("dropout", "submodule_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1)")
        if self.embedding % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide embedding = {self.embedding}")
        if self.variant and self.variant not in VARIANTS:
            raise ValueError(f'variant = "{self.variant}": must be one of {", ".join(VARIANTS)}')
        if not self.variant and (not self.kernels or self.depth < 0):
            raise ValueError("name a variant, or set both kernels and depth")

    def resolved(self, image_size: int) -> Config:
        """Fill what the variant and the image side give; refuse what cannot be divided, with the arithmetic."""
        kernels, depth, strides = self.kernels, self.depth, self.pool_strides
        if self.variant:
            variant = VARIANTS[self.variant]
            kernels = kernels or variant.kernels
            depth = variant.depth if depth < 0 else depth
            if not strides and len(kernels) == len(variant.kernels):
                strides = variant.pool_strides.get(image_size, ())
        if not self.convolution:
            strides = (1,) * len(kernels)
        if not strides:
            known = (
                f"; {self.variant} has them for {list(VARIANTS[self.variant].pool_strides)} px" if self.variant else ""
            )
            raise ValueError(f"pool_strides is not set and not known for {image_size} px{known}")
        full = replace(
            self,
            kernels=kernels,
            depth=depth,
            pool_strides=strides,
            kernel_sizes=self.kernel_sizes or (3,) * len(kernels),
        )
        full._check(image_size)
        return full

    def _check(self, image_size: int) -> None:
        for name in ("kernel_sizes", "pool_strides"):
            if len(getattr(self, name)) != len(self.kernels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {len(self.kernels)} conv blocks "
                    f"(kernels = {list(self.kernels)})"
                )
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} = {list(getattr(self, name))}: each must be at least 1")
        if min(self.kernels) < 1:
            raise ValueError(f"kernels = {list(self.kernels)}: each must be at least 1")
        if self.groups % self.submodules:
            raise ValueError(f"submodules = {self.submodules} does not divide groups = {self.groups}")
        for kernels in self.kernels:
            if kernels % self.submodules:
                raise ValueError(f"submodules = {self.submodules} does not divide kernels {kernels}")
        if self.kernels[-1] % self.groups:
            raise ValueError(f"groups = {self.groups} does not divide the {self.kernels[-1]} kernels of the last block")
        for width in self.widths.family:
            self.check_width(width)
        if not self.convolution and image_size**2 != self.embedding:
            raise ValueError(
                f"convolution = false needs images of embedding = {self.embedding} pixels; "
                f"{image_size} x {image_size} = {image_size**2}"
            )

    def check_width(self, width: Width) -> None:
        """Refuse a width that the groups or a block's kernels cannot be cut to, with the nearest that they can."""
        if not self.convolution and not width.is_full:
            raise ValueError("widths.smallest: without convolutions (convolution = false) there is nothing to slice")
        for name, size in (("groups", self.groups), *(("kernels", k) for k in self.kernels)):
            share = size // self.submodules
            if share * width.numerator % width.denominator:
                valid = tuple(Width(n, share) for n in range(1, share + 1))
                raise ValueError(
                    f"width {width}: {float(width):g} x {share} {name} of a submodule = {share * float(width):g} is "
                    f"not a whole number; {slimmable.nearest(float(width), valid)}"
                )

    def at(self, width: Width) -> Config:
        """The standalone network at a width."""
        kernels = tuple(width.of(k) for k in self.kernels)
        return replace(self, variant="", kernels=kernels, groups=width.of(self.groups), widths=slimmable.Config())

    def macs(self, image_size: int, channels: int, classes: int, width: Width = FULL) -> int:
        """Multiply-adds of one image, forward."""
        return self.resolved(image_size).at(width).flops(image_size, channels, classes) // 2

    def build(
        self,
        *,
        image_size: int,
        channels: int,
        classes: int,
        seed: int = 0,
        here: range | None = None,
        exchange: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> HSViT:
        """The model, or a rank's share of it; see `HSViT`."""
        return HSViT(
            self, image_size=image_size, channels=channels, classes=classes, seed=seed, here=here, exchange=exchange
        )

    def map_sides(self, image_size: int) -> list[int]:
        """Side of the maps that leave each conv block, by the pools' real output (they round up, not down)."""
        sides, side = [], image_size
        for kernel, stride in zip(self.kernel_sizes, self.pool_strides, strict=True):
            side = _output(side, kernel, 1)
            side = _output(side, kernel, stride) if stride > 1 else side
            sides.append(side)
        return sides

    def flops(self, image_size: int, channels: int, classes: int) -> int:
        """FLOPs of one image, forward: 2 a multiply-add; BN, LN, softmax, pooling and additions not counted.

        The published architecture's closed form. The last attention layer is counted for all tokens although only
        CLS leaves it and only CLS is computed.
        """
        c = self.resolved(image_size)
        m, total, c_in, side = c.submodules, 0, channels, image_size
        if c.convolution:
            outs = c.map_sides(image_size)
            for block, (c_out, kernel) in enumerate(zip(c.kernels, c.kernel_sizes, strict=True)):
                side = _output(side, kernel, 1)
                fan_in = c_in if block == 0 else c_in // m
                total += 2 * side * side * (kernel**2 * fan_in * c_out + 9 * c_out // m * c_out)
                c_in, side = c_out, outs[block]
            total += 2 * c.kernels[-1] * side**2 * c.embedding
        n, d = c.kernels[-1] // c.groups + 1, c.embedding
        total += c.groups * c.depth * (8 * n * d**2 + 4 * n**2 * d)
        return total + 2 * d * classes


def _output(side: int, kernel: int, stride: int) -> int:
    return (side + 2 * (kernel // 2) - kernel) // stride + 1


class ConvBlock(nn.Module):
    """conv k x k -> BN -> ReLU -> conv 3 x 3 -> BN -> max-pool -> ReLU.

    The published block has a ReLU before the pool too. Both orders give the same numbers and gradients, since the
    largest of several rectified values is the rectified largest; after the pool there are fewer to rectify.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, submodules: int, first: bool) -> None:
        super().__init__()
        groups = 1 if first else submodules  # every submodule's first convolution sees the full image
        self.conv1 = _conv(c_in, c_out, kernel, groups, submodules, slice_in=not first)
        self.norm1 = BatchNorm2d(c_out, segments=submodules)
        self.conv2 = _conv(c_out, c_out, 3, submodules, submodules, slice_in=True)
        self.norm2 = BatchNorm2d(c_out, segments=submodules)
        self.pool = nn.MaxPool2d(kernel, stride, kernel // 2) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor, width: Width) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x, width), width), inplace=True)
        return F.relu(self.pool(self.norm2(self.conv2(x, width), width)), inplace=True)


def _conv(c_in: int, c_out: int, kernel: int, groups: int, submodules: int, slice_in: bool) -> slimmable.Conv2d:
    return slimmable.Conv2d(
        c_in,
        c_out,
        kernel,
        slice_in=slice_in,
        slice_out=True,
        out_segments=submodules,
        padding=kernel // 2,
        groups=groups,
        bias=False,
    )


class Submodules(nn.Module):
    """The submodules of this rank, computed together. Every parameter stacks them on its first axis."""

    def __init__(self, config: Config, here: range, image_size: int, channels: int) -> None:
        super().__init__()
        c = config
        self.config, self.here, self.count = c, here, len(here)
        share, d = len(here), c.embedding
        if c.convolution:
            outs = [k // c.submodules * share for k in c.kernels]
            self.trunk = nn.ModuleList(
                ConvBlock(c_in, c_out, kernel, stride, share, first=block == 0)
                for block, (c_in, c_out, kernel, stride) in enumerate(
                    zip((channels, *outs), outs, c.kernel_sizes, c.pool_strides, strict=False)
                )
            )
            features = c.map_sides(image_size)[-1] ** 2
            self.projection_weight = nn.Parameter(torch.empty(share, d, features))
            self.projection_bias = nn.Parameter(torch.empty(share, d))
        if c.depth:
            groups, length = c.groups // c.submodules * share, c.kernels[-1] // c.groups + 1
            self.cls = nn.Parameter(torch.empty(groups, d))
            self.positions = nn.Parameter(torch.empty(groups, length, d))
            self.norm_weight = nn.Parameter(torch.empty(groups, c.depth, d))
            self.norm_bias = nn.Parameter(torch.empty(groups, c.depth, d))
            self.qkv_weight = nn.Parameter(torch.empty(groups, c.depth, 3 * d, d))
            self.qkv_bias = nn.Parameter(torch.empty(groups, c.depth, 3 * d))
            self.out_weight = nn.Parameter(torch.empty(groups, c.depth, d, d))
            self.out_bias = nn.Parameter(torch.empty(groups, c.depth, d))
        for parameter in self.parameters():
            # DeepSpeed's marks of a parameter that differs between the ranks of a replica; without them the
            # gradient norm misses every rank's share but the first.
            parameter.model_parallel = True  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """PyTorch's defaults, CLS and positions N(0, 1), as published; keyed on the global submodule."""
        for name, parameter in self.named_parameters():
            for submodule, part in zip(self.here, parameter.chunk(self.count), strict=True):
                source = generator(seed, Site.INIT, submodule, *name.encode())
                leaf = name.rsplit(".", 1)[-1]
                if leaf in ("cls", "positions"):
                    part.normal_(generator=source)
                elif leaf == "qkv_weight":  # Xavier over the stacked [3D, D]
                    bound = math.sqrt(6 / (4 * self.config.embedding))
                    part.uniform_(-bound, bound, generator=source)
                elif leaf in ("projection_weight", "projection_bias"):
                    bound = self.projection_weight.shape[-1] ** -0.5
                    part.uniform_(-bound, bound, generator=source)
                elif leaf == "out_weight" or ".conv" in name:  # fan-in of an output row
                    row = part[0, 0] if leaf == "out_weight" else part
                    bound = row[0].numel() ** -0.5
                    part.uniform_(-bound, bound, generator=source)
                elif leaf == "norm_weight" or (".norm" in name and leaf == "weight"):
                    part.fill_(1)
                else:
                    part.zero_()

    def slices(self, width: Width) -> dict[str, Tensor]:
        """Every parameter of the groups, and the projections, which all widths share."""
        shared = ("projection_weight", "projection_bias")
        own = dict(self.named_parameters(recurse=False))
        return {n: p if n in shared else width.take(p, 0, self.count) for n, p in own.items()}

    def forward(self, images: Tensor, draw: Draw | None, width: Width = FULL) -> Tensor:
        """images [B, C, H, W] to [B, M, D]: for each submodule the sum over its groups' CLS tokens."""
        c = self.config
        tokens = self._tokens(images, draw, width)
        if not c.depth:
            return self._sum(tokens)
        own: dict[str, Any] = self.slices(width)
        cls = grouped_attention(
            tokens,
            **{name: p for name, p in own.items() if not name.startswith("projection")},
            heads=c.heads,
            dropout=c.dropout if self.training else 0.0,
            draw=draw,
            first_group=width.of(c.groups // c.submodules) * self.here.start,
        )
        return self._sum(cls)

    def _sum(self, vectors: Tensor) -> Tensor:
        """[B, M x n, D] to [B, M, D], in fp32 at least: this is what travels."""
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        return rearrange(vectors, "b (m n) d -> b m n d", m=self.count).sum(2, dtype=dtype)

    def _tokens(self, images: Tensor, draw: Draw | None, width: Width = FULL) -> Tensor:
        """images to channel tokens [B, K, D] of the submodules here."""
        c = self.config
        first = width.of(c.kernels[-1] // c.submodules) * self.here.start
        if not c.convolution:
            count = c.kernels[-1] // c.submodules * self.count
            plane = torch.arange(first, first + count, device=images.device) % images.shape[1]
            return images.flatten(2)[:, plane]
        # The activations' format decides the convolutions'; weights stay as DeepSpeed's flat buffers keep them.
        x = images.contiguous(memory_format=torch.channels_last)
        for block in self.trunk:
            x = block(x, width)
        maps = rearrange(x, "b (m k) h w -> m (b k) (h w)", m=self.count)
        weight = self.projection_weight.transpose(1, 2)
        tokens = torch.baddbmm(self.projection_bias[:, None], maps, weight)
        tokens = F.relu(rearrange(tokens, "m (b k) d -> b (m k) d", b=images.shape[0]))
        if self.training and c.dropout:
            tokens = tokens * self._embedding_keep(tokens, draw, first).mul_(keep_scale(c.dropout))
        return tokens

    def _embedding_keep(self, tokens: Tensor, draw: Draw | None, first: int) -> Tensor:
        """Which features of tokens [B, K, D] survive dropout, as 0 or 1: sixteen features share a hash call."""
        assert draw is not None
        count, width = tokens.shape[1:]
        channel = torch.arange(first, first + count, device=tokens.device).view(-1, 1)
        call = torch.arange(-(-width // 16), device=tokens.device)
        element = (channel * 4096 + call).to(torch.int32)
        bytes_ = draw.bytes(Site.EMBEDDING, element).flatten(2)[..., :width]
        return (bytes_ >= threshold(self.config.dropout)).to(tokens.dtype)


class Head(nn.Module):
    """The aggregator: LayerNorm and Linear of the mean CLS token; every rank of a replica computes it."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        bound = self.linear.in_features**-0.5
        for name, parameter in self.linear.named_parameters():
            source = generator(seed, Site.INIT, -1, *f"head.{name}".encode())
            parameter.uniform_(-bound, bound, generator=source)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class HSViT(nn.Module):
    """The submodules of this rank, the exchange with the replica's other ranks, and the head.

    Args:
        config: need not be resolved.
        image_size: side of the square images, pixels. channels: 1 or 3. classes: Q.
        here: global indices of the submodules to hold; all of them by default.
        exchange: sums [B, D] over the ranks of the replica (`Grid.exchange`); the identity by default.
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
        exchange: Callable[[Tensor], Tensor] = lambda x: x,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config.resolved(image_size)
        self.image_size, self.channels, self.classes = image_size, channels, classes
        self.exchange = exchange
        here = range(config.submodules) if here is None else here
        self.submodules = Submodules(self.config, here, image_size, channels)
        self.head = Head(config.embedding, classes)
        if not self.head.linear.weight.is_meta:
            self.submodules.initialise(seed)
            self.head.initialise(seed)

    def forward(
        self,
        images: Tensor,
        draw: Draw | None = None,
        present: Tensor | None = None,
        width: Width = FULL,
    ) -> Tensor:
        """Classify images.

        Args:
            images: [B, C, H, W], normalised.
            draw: the pass's randomness; needed in training where dropout or submodule_drop is on.
            present: bool [M] or [B, M], which submodules (global index) answered; all of them by default.
            width: which subnet.

        Returns:
            Logits [B, Q].

        Raises:
            ValueError: a width that the model cannot be cut to, or training without a draw.
        """
        c = self.config
        c.check_width(width)
        if self.training and draw is None and (c.dropout or c.submodule_drop):
            raise ValueError("training with dropout or submodule_drop needs draw=Draw.of(seed, step, …)")
        if present is None and self.training and c.submodule_drop and draw is not None:
            present = self._drop_submodules(draw)
        sums = self.submodules(images, draw, width)  # [B, M here, D]
        answers = width.of(c.groups if c.depth else c.kernels[-1])
        if present is None:
            return self.head(self.exchange(sums.sum(1)) / answers)
        here = self.submodules.here
        present = present.to(sums.device).expand(sums.shape[0], c.submodules)
        sums = sums * present[:, here.start : here.stop, None]
        count = present.sum(1, keepdim=True) * (answers // c.submodules)
        return self.head(self.exchange(sums.sum(1)) / count)

    def _drop_submodules(self, draw: Draw) -> Tensor:
        """bool [B, M]: each submodule present with probability 1 - submodule_drop; the luckiest one always is."""
        index = torch.arange(self.config.submodules, dtype=torch.int32, device=draw.key.device)
        luck = draw.uniform(Site.SUBMODULE, index)
        return (luck >= self.config.submodule_drop) | (luck == luck.amax(1, keepdim=True))

    @torch.no_grad()
    def subnet(self, width: Width) -> HSViT:
        """The standalone network at a width, with copies of its weights; BatchNorm's statistics are those in force."""
        self.config.check_width(width)
        small = self.config.at(width).build(
            image_size=self.image_size, channels=self.channels, classes=self.classes, here=self.submodules.here,
            exchange=self.exchange,
        ).train(self.training)  # fmt: skip
        found = dict(self.head.state_dict(prefix="head."))
        for name, module in self.named_modules():
            if hasattr(module, "slices"):
                found |= {f"{name}.{key}": value for key, value in module.slices(width).items()}
        small.load_state_dict(found)
        return small
