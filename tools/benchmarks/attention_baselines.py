"""Grouped attention as a user could compute it today: in a loop, batched, batched and compiled, and fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_kernels import Case, attention_cuda, dispatch, grouped_attention
from hsvit_kernels.random import Draw

Run = Callable[[], Any]


@dataclass(frozen=True)
class Attention:
    """A grouped attention problem; the last layer is counted for what leaves it, CLS."""

    batch: int
    groups: int
    tokens: int  # of a group, with CLS
    width: int
    depth: int
    heads: int = 8

    @property
    def name(self) -> str:
        return f"B{self.batch} G{self.groups} T{self.tokens} D{self.width} L{self.depth}"

    def flops(self) -> float:
        t, d = self.tokens, self.width
        inner = 8 * t * d**2 + 4 * t**2 * d
        last = 4 * t * d**2 + 4 * d**2 + 4 * t * d
        return float(self.batch * self.groups * ((self.depth - 1) * inner + last))

    def bytes(self, backward: bool) -> float:
        """Least traffic in bf16: tokens and weights; in training also what `kernels/README.md` counts."""
        rows = self.batch * self.groups * self.tokens * self.width
        weights = self.groups * self.depth * 4 * self.width**2
        forward = 2 * rows + 2 * weights
        if not backward:
            return float(forward)
        return float(forward + 2 * rows + 6 * weights + 2 * rows * self.depth * 13)


ATTENTION = (
    Attention(512, 16, 33, 64, 8),
    Attention(512, 64, 33, 64, 8),
    Attention(512, 64, 33, 56, 2),
    Attention(512, 16, 17, 64, 4),
    Attention(512, 16, 9, 64, 2),
)


def attention_inputs(case: Attention, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    g, d, a, t = case.groups, case.width, case.depth, case.tokens
    torch.manual_seed(0)
    found = {
        "tokens": torch.randn(case.batch, g * (t - 1), d),
        "cls": torch.randn(g, d),
        "positions": torch.randn(g, t, d),
        "norm_weight": torch.ones(g, a, d),
        "norm_bias": torch.zeros(g, a, d),
        "qkv_weight": torch.randn(g, a, 3 * d, d) * d**-0.5,
        "qkv_bias": torch.zeros(g, a, 3 * d),
        "out_weight": torch.randn(g, a, d, d) * d**-0.5,
        "out_bias": torch.zeros(g, a, d),
    }
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in found.items()}


def with_cls(a: dict[str, Tensor], groups: int) -> Tensor:
    """[G, B, T, D]: every group's tokens behind its CLS, positions added."""
    x = a["tokens"].unflatten(1, (groups, -1)).transpose(0, 1)
    x = torch.cat((a["cls"][:, None, None].expand(-1, x.shape[1], -1, -1), x), dim=2)
    return x + a["positions"][:, None]


def batched(
    a: dict[str, Tensor], case: Attention, dropout: float, attend: Any = F.scaled_dot_product_attention
) -> Tensor:
    """All groups in one batched product, attention by a function as scaled_dot_product_attention."""
    x = with_cls(a, case.groups)
    for layer in range(case.depth):
        y = (
            F.layer_norm(x, (case.width,)) * a["norm_weight"][:, layer, None, None]
            + a["norm_bias"][:, layer, None, None]
        )
        bias = a["qkv_bias"][:, layer, None]
        qkv = torch.baddbmm(bias, y.flatten(1, 2), a["qkv_weight"][:, layer].transpose(1, 2))
        q, k, v = qkv.view(case.groups * case.batch, case.tokens, 3, case.heads, -1).permute(2, 0, 3, 1, 4)
        if layer == case.depth - 1:
            q, x = q[:, :, :1], x[:, :, :1]
        o = attend(q, k, v, dropout_p=dropout)
        o = o.transpose(1, 2).reshape(case.groups, -1, case.width)
        out = torch.baddbmm(a["out_bias"][:, layer, None], o, a["out_weight"][:, layer].transpose(1, 2))
        x = x + out.view_as(x)
    return x[:, :, 0].transpose(0, 1)


def flexible(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """flex_attention, whose heads have at least 16 features; it drops nothing."""
    from torch.nn.attention.flex_attention import flex_attention

    assert not dropout_p
    width = q.shape[-1]
    q, k, v = (F.pad(x, (0, max(16 - width, 0))) for x in (q, k, v))
    out: Any = flex_attention(q, k, v, scale=width**-0.5)
    return out[..., :width]


def loop(a: dict[str, Tensor], case: Attention, dropout: float) -> tuple[Run, list[nn.Module]]:
    """One nn.MultiheadAttention a group and layer, as the published code has them, and these modules."""
    tokens = a["tokens"]
    norms: list[nn.Module] = [nn.LayerNorm(case.width).to(tokens) for _ in range(case.groups * case.depth)]
    layers: list[nn.Module] = [
        nn.MultiheadAttention(case.width, case.heads, dropout, batch_first=True).to(tokens)
        for _ in range(case.groups * case.depth)
    ]

    def run() -> Tensor:
        found = []
        for group, x in enumerate(with_cls(a, case.groups)):
            for layer in range(group * case.depth, (group + 1) * case.depth):
                y = norms[layer](x)
                x = x + layers[layer](y, y, y, need_weights=False)[0]
            found.append(x[:, 0])
        return torch.stack(found, 1)

    return run, [*norms, *layers]


def attention(a: dict[str, Any], case: Attention, dropout: float = 0.0, draw: Draw | None = None) -> Tensor:
    return grouped_attention(**a, heads=case.heads, dropout=dropout, draw=draw)


def attention_runs(
    case: Attention, dropout: float, device: str, dtype: torch.dtype
) -> Iterator[tuple[str, Run, list[Tensor]]]:
    """The forward of every implementation, and what gets a gradient."""
    a = attention_inputs(case, device, dtype)
    draw = Draw.of(0, image=torch.arange(case.batch), device=device)

    def ours(choice: str) -> Run:
        def run() -> Tensor:
            with dispatch.forcing(choice):
                return attention(a, case, dropout, draw)

        return run

    leaves = list(a.values())
    yield "hsvit_kernels", ours("triton"), leaves
    sizes = (case.tokens, case.width, case.heads, case.depth, int(dropout > 0), 1, 0)
    if device == "cuda" and attention_cuda.fits(Case("grouped_attention", dtype, dtype, sizes), torch.device(device)):
        yield "hsvit_kernels, CUDA C++", ours("cuda"), leaves
    yield "batched reference", ours("reference"), leaves
    yield "batched, SDPA", lambda: batched(a, case, dropout), leaves
    if device == "cuda" and not dropout:
        yield "batched, flex_attention", torch.compile(partial(batched, a, case, 0.0, flexible)), leaves
    if device == "cuda" and case == ATTENTION[0] and dropout:  # a compilation takes a minute
        compiled = torch.compile(lambda: batched(a, case, dropout), mode="reduce-overhead", fullgraph=True)
        yield "batched, SDPA, compiled with CUDA graphs", compiled, leaves
    run, modules = loop(a, case, dropout)
    yield "loop over groups", run, leaves[:3] + [p for module in modules for p in module.parameters()]
