"""A vision transformer that can be sliced by width: DeiT (arXiv 2012.12877) under Scala (arXiv 2412.04786) or HydraViT
(arXiv 2409.17978).

Parameter names are timm's, so weights travel both ways. A width takes its share of the channels of every layer; depth,
patches and tokens stay, and either the number of heads (Scala) or their width (HydraViT).

Shape letters: B images, C channels, H x W pixels, n patches, T tokens (patches and 1 or 2 special ones), d embedding at
a width, Q classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_kernels import StepState
from hsvit_kernels.random import Draw, Site, generator
from hsvit_kernels.reference import attend

from ..spans import Part, span, spanned
from . import layers
from .network import AnyWidth, Distilled, Network, any_seed
from .slimmable import FULL, Width
from .vit_config import Architecture
from .weights import SizedStart


@dataclass(frozen=True, kw_only=True)
class Config(Architecture, SizedStart):
    """What a recipe's `model` says of a ViT; below the model, `Architecture` is enough."""

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
        grid: Any = None,
        exchange: str = "",
    ) -> ViT:
        """The model; `here`, `grid` and `exchange` are HSViT's."""
        return ViT(self, image_size=image_size, channels=channels, classes=classes, seed=seed)


class Attention(nn.Module):
    def __init__(self, config: Architecture, state: StepState) -> None:
        super().__init__()
        d, by_role, every = config.embedding, config.qkv == "per_role", config.sliced == "all"
        # Parts that are sliced one by one: the heads of each role, or where whole heads are taken, the roles.
        heads = config.heads if by_role and not config.slices_heads else 1
        self.heads, self.slices_heads = config.heads, config.slices_heads
        self.scale = (d // config.heads) ** -0.5 if config.softmax_scale == "full" else None
        ends: dict[str, Any] = {"slice_in": every, "slice_out": every, "state": state}
        self.qkv = layers.Linear(d, 3 * d, out_segments=3 * heads if by_role else 1, **ends)
        self.proj = layers.Linear(d, d, in_segments=heads, **ends)
        if by_role:
            # No key bias can change a softmax: its gradient is rounding noise, which Adam would turn into steps.
            self.qkv.bias.register_hook(_without_keys)

    @spanned(Part.ATTENTION)
    def forward(self, x: Tensor, width: Width, residual: Tensor | None, rows: int) -> Tensor:
        """x [B, T, d]; residual and the result hold the first `rows` tokens."""
        x = self._attend(self._heads(x, width), rows).transpose(1, 2).flatten(2)
        return self.proj(x, width, residual=residual)

    def queries_keys_values(self, x: Tensor, width: Width) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, d] to three of [B, heads, T, c]."""
        q, k, v = self._heads(x, width)
        return q, k, v

    def _heads(self, x: Tensor, width: Width) -> Tensor:
        """The same as one tensor [3, B, heads, T, c]."""
        heads = width.of(self.heads) if self.slices_heads else self.heads
        return self.qkv(x, width).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)

    def _attend(self, qkv: Tensor, rows: int) -> Tensor:
        """qkv [3, B, heads, T, c] to what the first `rows` tokens see, [B, heads, rows, c]."""
        if qkv.device.type != "cpu" or torch.compiler.is_compiling():
            q, k, v = qkv
            return F.scaled_dot_product_attention(q[:, :, :rows], k, v, scale=self.scale)
        # PyTorch's fused attention takes three times as long on CPUs, backward included (tools.benchmark scala).
        one_group = qkv[:, :, None]
        if rows == qkv.shape[3]:
            return attend(one_group, scale=self.scale)[:, 0]
        return attend(one_group[0, :, :, :, :rows], one_group[1:], scale=self.scale)[:, 0]


def _without_keys(grad: Tensor | None) -> Tensor | None:
    """The gradient [3d] of a qkv bias with zeros for k; None in passes that hand none over (see `StepState`)."""
    if grad is None:
        return None
    q, k, v = grad.chunk(3)
    return torch.cat((q, torch.zeros_like(k), v))


class Mlp(nn.Module):
    def __init__(self, config: Architecture, hidden: int, state: StepState) -> None:
        super().__init__()
        every = config.sliced == "all"
        self.fc1 = layers.Linear(config.embedding, hidden, slice_in=every, state=state)
        self.fc2 = layers.Linear(hidden, config.embedding, slice_out=every, state=state)

    @spanned(Part.MLP)
    def forward(self, x: Tensor, width: Width, residual: Tensor | None, rows: int) -> Tensor:
        return self.fc2(self.fc1(x, width, gelu=True), width, residual=residual)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); LayerScale and drop path on both branches."""

    def __init__(self, config: Architecture, hidden: int, state: StepState) -> None:
        super().__init__()
        d, eps, every = config.embedding, config.norm_eps, config.sliced == "all"
        self.norm1 = layers.LayerNorm(d, eps, every)
        self.attn = Attention(config, state)
        self.norm2 = layers.LayerNorm(d, eps, every)
        self.mlp = Mlp(config, hidden, state)
        self.ls1 = self.ls2 = None
        if config.layer_scale:
            self.ls1, self.ls2 = (layers.LayerScale(d, config.layer_scale, every) for _ in range(2))

    def forward(self, x: Tensor, width: Width, kept: Tensor | None, rows: int) -> Tensor:
        """x [B, T, d] to its first `rows` tokens; kept [2, B, 1, 1]: drop path's factors of both branches."""
        branches = ((self.norm1, self.attn, self.ls1), (self.norm2, self.mlp, self.ls2))
        for i, (norm, layer, scale) in enumerate(branches):
            if scale is None and kept is None:
                x = layer(norm(x, width), width, x[:, :rows], rows)  # the addition belongs to the last product
                continue
            branch = layer(norm(x, width), width, None, rows)
            if scale is not None:
                branch = scale(branch, width)
            x = x[:, :rows] + (branch if kept is None else branch * kept[i].to(branch.dtype))
        return x


class PatchEmbed(nn.Module):
    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        p, every = config.patch_size, config.sliced == "all"
        self.proj = layers.Conv2d(channels, config.embedding, p, stride=p, slice_in=False, slice_out=every)

    @spanned(Part.EMBEDDING)
    def forward(self, images: Tensor, width: Width) -> Tensor:
        """[B, C, H, W] to [B, n, d]."""
        return self.proj(images, width).flatten(2).transpose(1, 2)


class ViT(Network):
    """A slimmable ViT.

    Args:
        config: need not be resolved.
        image_size: side of the square images, pixels. channels: of an image. classes: Q. seed: of the initial weights.
    """

    def __init__(self, config: Config, *, image_size: int, channels: int, classes: int, seed: int = 0) -> None:
        c = config.resolved(image_size)
        super().__init__(c, image_size, channels, classes)
        self.step_state = StepState()
        d, every = c.embedding, c.sliced == "all"
        patches = (image_size // c.patch_size) ** 2
        self.patch_embed = PatchEmbed(c, channels)
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.dist_token = nn.Parameter(torch.empty(1, 1, d)) if c.distilled else None
        self.pos_embed = nn.Parameter(torch.empty(1, patches + c.special_tokens, d))
        self.blocks = nn.ModuleList(Block(c, hidden, self.step_state) for hidden in c.hidden)
        self.norm = layers.LayerNorm(d, c.norm_eps, every)
        self.head, self.head_dist = self._heads(classes)
        if not self.cls_token.is_meta:
            self._initialise(seed)

    def _heads(self, classes: int) -> tuple[layers.Linear, layers.Linear | None]:
        # Not gathered in place: a loss without the class head is possible in a step's last pass.
        ends = {"slice_in": self.config.sliced == "all", "slice_out": False}
        heads = [layers.Linear(self.config.embedding, classes, **ends) for _ in range(self.config.special_tokens)]
        return heads[0], heads[1] if self.config.distilled else None

    @torch.no_grad()
    def _initialise(self, seed: int, only: str = "") -> None:
        """DeiT's: truncated normals of 0.02, CLS of 1e-6, zero biases; the patch convolution keeps PyTorch's. only:
        parameters whose names begin so."""
        for name, parameter in self.named_parameters():
            if not name.startswith(only):
                continue
            source = generator(seed, Site.INIT, -1, *name.encode())
            if name.startswith("patch_embed"):
                bound = self.patch_embed.proj.weight[0].numel() ** -0.5
                parameter.uniform_(-bound, bound, generator=source)
            elif name == "cls_token":
                parameter.normal_(std=1e-6, generator=source)
            elif parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, generator=source)
            elif name.endswith("bias"):
                parameter.zero_()

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a distilled model in training answers with both heads' logits, as timm's do."""
        self.all_heads = enable

    def reset_classifier(self, num_classes: int) -> None:
        """Give the model new heads for so many classes, with random weights."""
        self.classes, before = num_classes, self.head.weight
        self.head, self.head_dist = self._heads(num_classes)
        self._initialise(any_seed(), only="head")
        self.to(before.device, before.dtype)

    def forward(self, images: Tensor, draw: Draw | None = None, width: AnyWidth = FULL) -> Tensor | Distilled:
        """Classify images.

        Args:
            images: [B, C, H, W], normalised.
            draw: the randomness of a training forward; on one rank by default keyed on PyTorch's generator.
            width: which subnet, as 0.5; where only MLPs are sliced, also a width a block, as [0.5, 1].

        Returns:
            Logits [B, Q], a distilled model's the mean of both heads'; in training, after `set_distilled_training`, its
            class and distillation logits.

        Raises:
            ValueError: images that do not fit, a width that the model cannot be cut to, or training under an engine
                without a draw.
        """
        width = self.width(width)
        x = self._tokens(images, draw, width, rows=self.config.special_tokens)
        outer = self._outer(width)
        with span(Part.HEAD):
            logits: Tensor = self.head(x[:, 0], outer)
            if self.head_dist is None:
                return logits
            distilled: Tensor = self.head_dist(x[:, 1], outer)
        return Distilled(logits, distilled) if self.training and self.all_heads else (logits + distilled) / 2

    def forward_features(self, images: Tensor, draw: Draw | None = None, width: AnyWidth = FULL) -> Tensor:
        """[B, C, H, W] to all tokens after the last norm, [B, T, d at the width], the special ones first."""
        return self._tokens(images, draw, self.width(width), rows=self.pos_embed.shape[1])

    def _outer(self, width: Width) -> Width:
        """That of what lies outside of MLPs' hidden features."""
        return width if self.config.sliced == "all" else FULL

    def _tokens(self, images: Tensor, draw: Draw | None, width: Width, rows: int) -> Tensor:
        """The first `rows` tokens after the last norm: of the last block only they are computed."""
        self._check(images)
        outer = self._outer(width)
        patches = self.patch_embed(images, outer)
        special = [t for t in (self.cls_token, self.dist_token) if t is not None]
        first = [outer.take(t, 2).to(patches.dtype).expand(images.shape[0], -1, -1) for t in special]
        x = torch.cat((*first, patches), dim=1) + outer.take(self.pos_embed, 2)
        kept = self._drop_path(images, draw, self.config.depth, 2)
        for index, block in enumerate(self.blocks):
            last = index == self.config.depth - 1
            own = width.layer(index)
            x = block(x, own, None if kept is None else kept[2 * index : 2 * index + 2], rows if last else x.shape[1])
        normed: Tensor = self.norm(x, outer)
        return normed

    @torch.no_grad()
    def subnet(self, width: AnyWidth) -> ViT:
        """The standalone network at a width, with copies of its weights."""
        width = self.width(width)
        small = (
            ViT(self.config.at(width), image_size=self.image_size, channels=self.channels, classes=self.classes)
            .train(self.training)
            .to(self.cls_token)
        )
        outer = self._outer(width)
        found = self._slices(lambda path: width.layer(int(path.split(".")[1])) if path.startswith("blocks.") else outer)
        for name in ("cls_token", "dist_token", "pos_embed"):
            if (parameter := getattr(self, name)) is not None:
                found[name] = outer.take(parameter, 2)
        if self.config.softmax_scale == "full":  # becomes a factor of the queries
            full, own = (c.embedding // c.heads for c in (self.config, small.config))
            for name in [name for name in found if ".qkv." in name]:
                q, k, v = found[name].chunk(3)
                found[name] = torch.cat((q * (own / full) ** 0.5, k, v))
        small.load_state_dict(found)
        return small
