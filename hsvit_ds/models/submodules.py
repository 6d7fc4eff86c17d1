"""What a rank computes of an HSViT: its submodules' conv trunks, projections and attention groups, and the head.

Shape letters as in `hsvit`: B images, C channels, K channel tokens, M submodules here, G groups here, T tokens of a
group, A attention layers, D embedding width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_kernels import grouped_attention
from hsvit_kernels.random import Draw, Site, generator, keep_scale, threshold

from ..spans import Part, span, spanned
from . import layers
from .batchnorm import BatchNorm
from .hsvit_config import Architecture
from .slimmable import FULL, Width


class ConvBlock(nn.Module):
    """conv k x k -> BN -> ReLU -> conv 3 x 3 -> BN -> max-pool -> ReLU.

    The published block has a ReLU before the pool too. Both orders give the same numbers and gradients, since the
    largest of several rectified values is the rectified largest; after the pool there are fewer to rectify.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, submodules: int, image_groups: int) -> None:
        """image_groups: of the convolution that sees the images; 0 in a block behind it."""
        super().__init__()
        self.conv1 = _conv(c_in, c_out, kernel, image_groups or submodules, submodules, slice_in=not image_groups)
        self.norm1 = BatchNorm(c_out, segments=submodules)
        self.conv2 = _conv(c_out, c_out, 3, submodules, submodules, slice_in=True)
        self.norm2 = BatchNorm(c_out, segments=submodules)
        self.pool = nn.MaxPool2d(kernel, stride, kernel // 2) if stride > 1 else nn.Identity()

    @spanned(Part.TRUNK)
    def forward(self, x: Tensor, width: Width) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x, width), width), inplace=True)
        return F.relu(self.pool(self.norm2(self.conv2(x, width), width)), inplace=True)


class SeparableBlock(nn.Module):
    """The same with each convolution depthwise-separable (the paper's section 4.5; Howard et al., arXiv 1704.04861): a
    kernel a channel -> BN -> ReLU -> 1 x 1 -> BN -> ReLU. The first convolution of an image stays dense."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, submodules: int, image_groups: int) -> None:
        """Arguments as of `ConvBlock`."""
        super().__init__()
        self.first = image_groups > 0
        between = c_out if self.first else c_in
        self.conv1 = _conv(c_in, between, kernel, image_groups or c_in, submodules, slice_in=False)
        self.norm1 = BatchNorm(between, segments=submodules)
        if not self.first:
            self.conv1_pointwise = _conv(c_in, c_out, 1, submodules, submodules, slice_in=True)
            self.norm1_pointwise = BatchNorm(c_out, segments=submodules)
        self.conv2 = _conv(c_out, c_out, 3, c_out, submodules, slice_in=False)
        self.norm2 = BatchNorm(c_out, segments=submodules)
        self.conv2_pointwise = _conv(c_out, c_out, 1, submodules, submodules, slice_in=True)
        self.norm2_pointwise = BatchNorm(c_out, segments=submodules)
        self.pool = nn.MaxPool2d(kernel, stride, kernel // 2) if stride > 1 else nn.Identity()

    @spanned(Part.TRUNK)
    def forward(self, x: Tensor, width: Width) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x, width), width), inplace=True)
        if not self.first:
            x = F.relu(self.norm1_pointwise(self.conv1_pointwise(x, width), width), inplace=True)
        x = F.relu(self.norm2(self.conv2(x, width), width), inplace=True)
        x = self.norm2_pointwise(self.conv2_pointwise(x, width), width)
        return F.relu(self.pool(x), inplace=True)


def _conv(c_in: int, c_out: int, kernel: int, groups: int, submodules: int, slice_in: bool) -> layers.Conv2d:
    return layers.Conv2d(
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

    def __init__(self, config: Architecture, here: range, image_size: int, channels: int) -> None:
        super().__init__()
        c = config
        self.config, self.here, self.count = c, here, len(here)
        share, d = len(here), c.embedding
        if c.convolution and not c.backbone.name:
            outs = [k // c.submodules * share for k in c.kernels]
            block_of = SeparableBlock if c.depthwise else ConvBlock
            # Every submodule's first convolution sees all channels: of the image, or of a tile of its own.
            seen, groups = (channels * share, share) if c.tiles > 1 else (channels, 1)
            self.trunk = nn.ModuleList(
                block_of(c_in, c_out, kernel, stride, share, groups if block == 0 else 0)
                for block, (c_in, c_out, kernel, stride) in enumerate(
                    zip((seen, *outs), outs, c.kernel_sizes, c.pool_strides, strict=False)
                )
            )
        if c.convolution:
            self.projection_weight = nn.Parameter(torch.empty(share, d, c.features(image_size)))
            self.projection_bias = nn.Parameter(torch.empty(share, d))
        if c.depth:
            groups = c.groups // c.submodules * share
            self.cls = nn.Parameter(torch.empty(groups, d))
            self.positions = nn.Parameter(torch.empty(groups, c.tokens, d))
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
        """images [B, C, H, W], or a backbone's maps [B, K, f], to [B, M, D]: for each submodule the sum over its
        groups' CLS tokens."""
        return self._sum(self.vectors(images, draw, width))

    def vectors(self, images: Tensor, draw: Draw | None, width: Width = FULL) -> Tensor:
        """The same to every group's CLS token [B, G, D], or without attention to the channel tokens [B, K, D]."""
        c = self.config
        tokens = self.tokens(images, draw, width)
        if not c.depth:
            return tokens
        own: dict[str, Any] = self.slices(width)
        with span(Part.ATTENTION):
            return grouped_attention(
                tokens,
                **{name: p for name, p in own.items() if not name.startswith("projection")},
                heads=c.heads,
                dropout=c.dropout if self.training else 0.0,
                draw=draw,
                first_group=width.of(c.groups // c.submodules) * self.here.start,
            )

    def _sum(self, vectors: Tensor) -> Tensor:
        """[B, M x n, D] to [B, M, D], in fp32 at least: this is what travels."""
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        return vectors.unflatten(1, (self.count, -1)).sum(2, dtype=dtype)

    @spanned(Part.EMBEDDING)
    def tokens(self, images: Tensor, draw: Draw | None = None, width: Width = FULL) -> Tensor:
        """images or a backbone's maps to channel tokens [B, K, D] of the submodules here."""
        c = self.config
        first = width.of(c.kernels[-1] // c.submodules) * self.here.start
        if not c.convolution:
            count = c.kernels[-1] // c.submodules * self.count
            plane = torch.arange(first, first + count, device=images.device) % images.shape[1]
            return images.flatten(2)[:, plane]
        # The activations' format decides the convolutions'; weights stay as DeepSpeed's flat buffers keep them.
        x = images
        if not c.backbone.name:
            x = self._seen(images).contiguous(memory_format=torch.channels_last)
            for block in self.trunk:
                x = block(x, width)
            x = x.flatten(2)
        maps = x.unflatten(1, (self.count, -1)).transpose(0, 1)  # [M, B, K, F]
        weight = self.projection_weight.transpose(1, 2)
        tokens = torch.baddbmm(self.projection_bias[:, None], maps.flatten(1, 2), weight)
        tokens = F.relu(tokens.unflatten(1, maps.shape[1:3]).transpose(0, 1).flatten(1, 2))
        if self.training and c.dropout:
            tokens = tokens * self._embedding_keep(tokens, draw, first).mul_(keep_scale(c.dropout))
        return tokens

    def _seen(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to what the submodules here see: the same, or their tiles [B, M x C, h, w]."""
        t = self.config.tiles
        if t == 1:
            return images
        tiles = images.unflatten(3, (t, -1)).unflatten(2, (t, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        return tiles[:, [submodule % t**2 for submodule in self.here]].flatten(1, 2)

    def _embedding_keep(self, tokens: Tensor, draw: Draw | None, first: int) -> Tensor:
        """Which features of tokens [B, K, D] survive dropout, as 0 or 1: sixteen features share a hash call."""
        assert draw is not None
        count, width = tokens.shape[1:]
        channel = torch.arange(first, first + count, device=tokens.device).view(-1, 1)
        call = torch.arange(-(-width // 16), device=tokens.device)
        element = (channel * 4096 + call).to(torch.int32)
        bytes_ = draw.bytes(Site.EMBEDDING, element).flatten(2)[..., :width]
        # By way of 16 bits: a CPU casts bools to bf16 an order of magnitude more slowly.
        return bytes_.ge_(threshold(self.config.dropout)).to(torch.int16).to(tokens.dtype)


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

    @spanned(Part.HEAD)
    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.norm.weight.dtype)  # what travelled is fp32, also of a model in bf16
        y: Tensor = self.linear(self.norm(x))
        return y
