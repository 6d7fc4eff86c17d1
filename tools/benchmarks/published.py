"""The published HSViT as plain PyTorch: one dense trunk, one attention stack a group, groups in a Python loop.

The yardstick of the tests (weights, logits, FLOPs) and of the benchmarks; written from the description in
arXiv 2404.05196 v2 with the parameter names of the published weights. Nothing in the framework imports it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hsvit_ds.models.hsvit import VARIANTS


class ConvUnit(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
        self.normalization = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalization(self.convolution(x)).relu()


class ConvBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        pool = nn.MaxPool2d(kernel, stride, kernel // 2) if stride > 1 else nn.Identity()
        self.layer = nn.Sequential(ConvUnit(c_in, c_out, kernel), ConvUnit(c_out, c_out, 3), pool, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class AttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layer_norm(x), self.layer_norm(x), self.layer_norm(x)
        return x + self.self_attn(q, k, v, need_weights=False)[0]


class AttentionLayer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn_block = AttentionBlock(width, heads, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn_block(x)


class Network(nn.Module):
    def __init__(
        self,
        channels: int,
        kernels: tuple[int, ...],
        kernel_sizes: tuple[int, ...],
        strides: tuple[int, ...],
        features: int,
        groups: int,
        depth: int,
        width: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.groups = groups
        c_in = (channels, *kernels[:-1])
        self.conv2d_layers = nn.ModuleList(
            ConvBlock(*block) for block in zip(c_in, kernels, kernel_sizes, strides, strict=True)
        )
        self.embed_projection = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Dropout(dropout))
        tokens = kernels[-1] // groups
        self.cls_token_embeddings = nn.Parameter(torch.randn(groups, 1, 1, width))
        self.position_embeddings = nn.Parameter(torch.randn(groups, 1, tokens + 1, width))
        self.attn_encoders = nn.ModuleList(
            nn.Sequential(*(AttentionLayer(width, heads, dropout) for _ in range(depth))) for _ in range(groups)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.conv2d_layers:
            x = block(x)
        tokens = self.embed_projection(x.flatten(2))
        out = []
        for g, chunk in enumerate(tokens.chunk(self.groups, dim=1)):
            cls = self.cls_token_embeddings[g].expand(len(x), -1, -1)
            sequence = torch.cat((cls, chunk), dim=1) + self.position_embeddings[g]
            out.append(self.attn_encoders[g](sequence)[:, 0])
        return torch.stack(out, dim=1).mean(dim=1)


class Classifier(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_head(x)


class PublishedHSViT(nn.Module):
    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 3,
        classes: int = 10,
        kernels: tuple[int, ...],
        depth: int,
        strides: tuple[int, ...],
        kernel_sizes: tuple[int, ...] | None = None,
        groups: int = 16,
        width: int = 64,
        heads: int = 8,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        side = image_size
        for stride in strides:
            side = -(-side // stride)
        sizes = kernel_sizes or (3,) * len(kernels)
        self.model = Network(channels, kernels, sizes, strides, side * side, groups, depth, width, heads, dropout)
        self.classifier = Classifier(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.model(x))


def published(variant: str, image_size: int = 32, **overrides: int | float) -> PublishedHSViT:
    """The variant `variant` of the paper for `image_size` pixels."""
    shape = VARIANTS[variant]
    return PublishedHSViT(
        image_size=image_size,
        kernels=shape.kernels,
        depth=shape.depth,
        strides=shape.pool_strides[image_size],
        **overrides,  # type: ignore[arg-type]
    )
