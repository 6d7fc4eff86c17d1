"""UniFormer (arXiv 2201.09450) in plain PyTorch, with the published code's names: what ours is compared with.

Tokens are left out as Evo-ViT (arXiv 2108.01390) tells it: sorted by score, the better half and one token that stands
for the others computed, and everything sorted back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Tokens(nn.Module):
    """Attention over tokens; remembers its weights."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        self.weights = torch.softmax(torch.einsum("bhic,bhjc->bhij", q, k) / (d // self.heads) ** 0.5, -1)
        return self.proj(torch.einsum("bhij,bhjc->bihc", self.weights, v).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, d: int, hidden: int, convolutions: bool) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(d, hidden, 1) if convolutions else nn.Linear(d, hidden)
        self.fc2 = nn.Conv2d(hidden, d, 1) if convolutions else nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class ConvBlock(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.norm1, self.norm2 = nn.BatchNorm2d(d), nn.BatchNorm2d(d)
        self.conv1, self.conv2 = nn.Conv2d(d, d, 1), nn.Conv2d(d, d, 1)
        self.attn = nn.Conv2d(d, d, 5, padding=2, groups=d)
        self.mlp = Mlp(d, hidden, True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class TokenBlock(nn.Module):
    def __init__(self, d: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.norm1, self.norm2 = nn.LayerNorm(d, 1e-6), nn.LayerNorm(d, 1e-6)
        self.attn, self.mlp = Tokens(d, heads), Mlp(d, hidden, False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        tokens = self.both(x.flatten(2).transpose(1, 2))[0]
        return tokens.transpose(1, 2).reshape(x.shape)

    def both(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens after both branches, and what these have added to the last one."""
        a = self.attn(self.norm1(tokens))
        b = self.mlp(self.norm2(tokens + a))
        return tokens + a + b, (a + b)[:, -1]

    def light(self, cls: Tensor, x: Tensor, scores: list[Tensor] | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """cls [B, d], x [B, d, H, W], a score [n] for each image."""
        x = x + self.pos_embed(x)
        tokens = x.flatten(2).transpose(1, 2)
        if scores is None:
            everything, _ = self.both(torch.cat((cls[:, None], tokens), 1))
            seen = list(self.attn.weights.mean(1)[:, 0, 1:])
            return everything[:, 0], everything[:, 1:].transpose(1, 2).reshape(x.shape), seen
        maps, clses, after = [], [], []
        for image, one, score in zip(tokens, cls, scores, strict=True):
            order = sorted(range(len(score)), key=lambda i: -float(score[i].detach()))
            kept, left = order[: len(score) // 2], order[len(score) // 2 :]
            stand_in = (score[left, None] * image[left]).sum(0) / score[left].sum()
            out, change = self.both(torch.stack((one, *image[kept], stand_in))[None])
            now = self.attn.weights.mean(1)[0, 0, 1:-1]
            changed, scored = list(image), list(score)
            for place, token, value in zip(kept, out[0, 1:-1], now, strict=True):
                changed[place], scored[place] = token, 0.5 * score[place] + 0.5 * value
            for place in left:
                changed[place] = image[place] + change[0]
            maps.append(torch.stack(changed).T.reshape(x.shape[1:]))
            clses.append(out[0, 0])
            after.append(torch.stack(scored))
        return torch.stack(clses), torch.stack(maps), after


class Patches(nn.Module):
    def __init__(self, before: int, d: int, stride: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(before, d, stride, stride), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).movedim(1, -1)).movedim(-1, 1)


class Convolutions(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def embedding(before: int, d: int, stride: int, kind: str, stem: bool) -> nn.Module:
    if kind == "patches":
        return Patches(before, d, stride)
    if not stem:
        return Convolutions(nn.Conv2d(before, d, 3, stride, 1), nn.BatchNorm2d(d))
    first, second = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[stride]
    half = d // 2
    return Convolutions(
        nn.Conv2d(before, half, 3, first, 1), nn.BatchNorm2d(half), nn.GELU(), nn.Conv2d(half, d, 3, second, 1),
        nn.BatchNorm2d(d),
    )  # fmt: skip


class UniFormer(nn.Module):
    """config: a resolved one of ours."""

    def __init__(self, config: Any, channels: int, classes: int) -> None:
        super().__init__()
        self.config, before = config, channels
        for number, (d, depth, stride) in enumerate(
            zip(config.channels, config.depths, config.strides, strict=True), 1
        ):
            kind = config.stem if number == 1 else config.downsampling
            setattr(self, f"patch_embed{number}", embedding(before, d, stride, kind, number == 1))
            hidden = int(d * config.mlp_ratio)
            blocks = [
                ConvBlock(d, hidden) if number < 3 else TokenBlock(d, hidden, config.heads[number - 3])
                for _ in range(depth)
            ]
            setattr(self, f"blocks{number}", nn.ModuleList(blocks))
            before = d
        self.norm, self.head = nn.BatchNorm2d(before), nn.Linear(before, classes)
        if config.pruned:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.channels[2]))
            self.cls_upsample = nn.Linear(*config.channels[2:])
            self.norm_cls, self.head_cls = nn.LayerNorm(before), nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Any:
        cls, scores = None, None
        for number in range(1, 5):
            side = x.shape[-1]
            x = getattr(self, f"patch_embed{number}")(x)
            if self.config.pruned and number == 3:
                cls = self.cls_token[0].expand(len(x), -1)
            if scores is not None:
                cls = self.cls_upsample(cls)
                maps = [score.view(1, side, side) for score in scores]
                pooled = [nn.functional.avg_pool2d(m, self.config.strides[3])[0].flatten() for m in maps]
                scores = [p * (s.sum() / p.sum()) for p, s in zip(pooled, scores, strict=True)]
            for block in getattr(self, f"blocks{number}"):
                if cls is None:
                    x = block(x)
                else:
                    cls, x, scores = block.light(cls, x, scores)
        logits = self.head(self.norm(x).mean((2, 3)))
        return (logits, self.head_cls(self.norm_cls(cls))) if cls is not None and self.training else logits
