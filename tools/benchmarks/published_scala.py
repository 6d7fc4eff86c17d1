"""The published Scala as plain PyTorch: a DeiT whose every layer slices its weights with autograd, fused qkv, head
scale of the full network, LayerNorm eps 1e-5, the smallest width leading and the others trailing.

The yardstick of the tests (logits, gradients) and of the benchmark; written from the description of the method with the
parameter names of the published weights. Nothing in the framework imports it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATIOS = (1.0, 0.75, 0.5, 0.25)


def cut(parameter: Tensor, ratio: float, smallest: float, axes: tuple[int, ...]) -> Tensor:
    """int(ratio * size) of each axis: leading for the smallest ratio and for 1, trailing between."""
    leading = ratio in (smallest, 1.0)
    for axis in axes:
        used = int(ratio * parameter.shape[axis])
        index = slice(0, used) if leading else slice(-used, None)
        parameter = parameter[(slice(None),) * axis + (index,)]
    return parameter


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)


class Network(nn.Module):
    """A distilled DeiT; `forward(images, ratio)` returns (class logits, distillation logits)."""

    def __init__(
        self, width: int, heads: int, depth: int, image_size: int, patch: int, classes: int, smallest: float = 0.25
    ) -> None:
        super().__init__()
        self.smallest, self.patch = smallest, patch
        self.patch_embed = PatchEmbed(3, width, patch)
        self.cls_token, self.dist_token = (nn.Parameter(torch.randn(1, 1, width) * 0.02) for _ in range(2))
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch) ** 2 + 2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head, self.head_dist = nn.Linear(width, classes), nn.Linear(width, classes)

    def forward(self, images: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        def of(parameter: Tensor | None, *axes: int) -> Tensor:
            assert parameter is not None
            return cut(parameter, ratio, self.smallest, axes)

        def linear(x: Tensor, layer: nn.Linear) -> Tensor:
            return F.linear(x, of(layer.weight, 0, 1), of(layer.bias, 0))

        def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], of(layer.weight, 0), of(layer.bias, 0))

        conv = self.patch_embed.proj
        x = F.conv2d(images, of(conv.weight, 0), of(conv.bias, 0), conv.stride).flatten(2).transpose(1, 2)
        special = [of(token, 2).expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token)]
        x = torch.cat((*special, x), 1) + of(self.pos_embed, 2)
        for block in self.blocks:
            assert isinstance(block, Block)
            a, m = block.attn, block.mlp
            b, t, k = x.shape
            q, key, v = (
                linear(norm(x, block.norm1), a.qkv).reshape(b, t, 3, a.heads, k // a.heads).permute(2, 0, 3, 1, 4)
            )
            weights = (q @ key.transpose(-2, -1) * a.scale).softmax(-1)
            x = x + linear((weights @ v).transpose(1, 2).reshape(b, t, k), a.proj)
            x = x + linear(F.gelu(linear(norm(x, block.norm2), m.fc1)), m.fc2)
        x = norm(x, self.norm)
        z, u = (F.linear(x[:, i], of(h.weight, 1), h.bias) for i, h in enumerate((self.head, self.head_dist)))
        return z, u


def total(outputs: Iterator[tuple[Tensor, Tensor]], labels: Tensor) -> Iterator[Tensor]:
    """The four losses of a step, the larger width's logits as the smaller one's target."""
    larger: Tensor | None = None
    for z, u in outputs:
        loss = F.cross_entropy(z.float(), labels)
        if larger is not None:
            loss = loss + F.kl_div(u.float().log_softmax(-1), larger, reduction="batchmean", log_target=True)
        larger = u.detach().float().log_softmax(-1)
        yield loss
