"""Grouped attention equals PyTorch's attention, group by group, and its dropout does not depend on placement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hsvit_kernels import grouped_attention, reference
from hsvit_kernels.mask import Keep
from hsvit_kernels.random import Draw, keep_scale, threshold

NAMES = ("cls", "positions", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "out_weight", "out_bias")


def arguments(
    batch: int = 3, groups: int = 4, tokens: int = 5, depth: int = 2, width: int = 16, dtype: Any = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "tokens": (batch, groups * tokens, width),
        "cls": (groups, width),
        "positions": (groups, tokens + 1, width),
        "norm_weight": (groups, depth, width),
        "norm_bias": (groups, depth, width),
        "qkv_weight": (groups, depth, 3 * width, width),
        "qkv_bias": (groups, depth, 3 * width),
        "out_weight": (groups, depth, width, width),
        "out_bias": (groups, depth, width),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype).mul_(0.5).requires_grad_()
        for name, shape in shapes.items()
    }


def loop(a: dict[str, Tensor], heads: int, keep: list[Tensor] | None = None, scale: float = 1.0) -> Tensor:
    """The definition: one group at a time, one layer at a time, with PyTorch's own attention module where it can."""
    groups, depth, _, width = a["qkv_weight"].shape
    out = []
    for g, chunk in enumerate(a["tokens"].chunk(groups, dim=1)):
        x = torch.cat((a["cls"][g].expand(len(chunk), 1, -1), chunk), dim=1) + a["positions"][g]
        for layer in range(depth):
            y = nn.functional.layer_norm(x, (width,), a["norm_weight"][g, layer], a["norm_bias"][g, layer])
            qkv = nn.functional.linear(y, a["qkv_weight"][g, layer], a["qkv_bias"][g, layer])
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
            weights = (q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1)
            if keep is not None:
                weights = weights * keep[layer][:, g] * scale
            o = (weights @ v).transpose(1, 2).flatten(2)
            x = x + nn.functional.linear(o, a["out_weight"][g, layer], a["out_bias"][g, layer])
        out.append(x[:, 0])
    return torch.stack(out, dim=1)


def compare(found: Tensor, expected: Tensor, inputs: dict[str, Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(found, expected, **tolerance)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    gradients = [torch.autograd.grad((y * weight).sum(), list(inputs.values())) for y in (found, expected)]
    for name, ours, theirs in zip(inputs, *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("groups", "depth", "width", "heads"), [(1, 1, 8, 1), (4, 2, 16, 2), (2, 3, 21, 3)])
def test_equals_the_loop_over_groups(groups: int, depth: int, width: int, heads: int) -> None:
    a = arguments(groups=groups, depth=depth, width=width)
    compare(grouped_attention(**a, heads=heads), loop(a, heads), a)


def test_equals_the_loop_with_dropout() -> None:
    a, draw = arguments(), Draw.of(1, 2, 3, image=torch.arange(3))
    keep = [Keep(draw, 0.2, layer, 2, range(4), 6, 6).mask(slice(0, 3)) for layer in range(2)]
    compare(
        grouped_attention(**a, heads=2, dropout=0.2, draw=draw),
        loop(a, 2, keep, keep_scale(0.2)),
        a,
    )


def test_the_key_bias_gets_an_exact_zero() -> None:
    a = arguments(dtype=torch.float32)
    (gradient,) = torch.autograd.grad(grouped_attention(**a, heads=2).square().sum(), a["qkv_bias"])
    q, k, v = gradient.chunk(3, dim=-1)
    assert not k.any()
    assert q.abs().min() > 0
    assert v[:, :, :].abs().max() > 0


@pytest.mark.heavy
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 0.1)])
def test_compiled_equals_eager(dtype: torch.dtype, tolerance: float) -> None:
    """Tracing alone, where gradients once went wrong; tests/engine/test_engine.py goes through inductor."""
    a, draw = arguments(dtype=dtype), Draw.of(1, 2, image=torch.arange(3))

    def attention(a: dict[str, Tensor]) -> Tensor:
        return grouped_attention(**a, heads=2, dropout=0.2, draw=draw)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    compare(compiled(a), attention(a), a, rtol=tolerance, atol=tolerance)


def test_dropout_is_the_same_wherever_a_group_and_an_image_are_computed() -> None:
    a, draw = arguments(batch=6), Draw.of(5, image=torch.arange(6))
    whole = grouped_attention(**a, heads=2, dropout=0.2, draw=draw)
    part = {name: a[name][2:] for name in NAMES}
    tokens = a["tokens"][3:, 10:]
    here = grouped_attention(tokens, **part, heads=2, dropout=0.2, draw=draw.slice(3, 6), first_group=2)
    torch.testing.assert_close(here, whole[3:, 2:])
    shifted = grouped_attention(tokens, **part, heads=2, dropout=0.2, draw=draw.slice(3, 6))
    assert not torch.allclose(shifted, whole[3:, 2:])


def test_the_keep_rate_is_the_promised_one_for_every_head_row_and_column() -> None:
    draw = Draw.of(9, image=torch.arange(64))
    keeps = [Keep(draw, 0.2, layer, 6, range(8), 9, 9) for layer in range(4)]
    keep = torch.stack([keep.mask(slice(0, 64)) for keep in keeps])
    rate = 1 - threshold(0.2) / 256
    for dims in [(0, 1, 2, 4, 5), (0, 1, 2, 3, 5), (0, 1, 2, 3, 4), (1, 2, 3, 4, 5), (0, 1, 3, 4, 5)]:  # all but one
        counted = keep.double().mean(dims)
        samples = keep.numel() / counted.numel()
        assert (counted - rate).abs().max() < 4 * (rate * (1 - rate) / samples) ** 0.5


def test_strided_input_and_an_empty_batch() -> None:
    a = arguments()
    wide = torch.randn(3, 20, 32, dtype=torch.float64)
    strided = wide[..., ::2]
    rest = {name: a[name] for name in NAMES}
    torch.testing.assert_close(
        grouped_attention(strided, **rest, heads=2), grouped_attention(strided.contiguous(), **rest, heads=2)
    )
    empty = grouped_attention(a["tokens"][:0], **rest, heads=2)
    assert empty.shape == (0, 4, 16)
    empty.sum().backward()


class _Casts(TorchDispatchMode):
    """Counts the casts to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
        return func(*args, **kwargs)


def test_weights_are_cast_once_a_forward_however_many_layers() -> None:
    counts = []
    for depth in (1, 5):
        a = arguments(depth=depth, dtype=torch.float32)
        with _Casts() as casts, torch.autocast("cpu", torch.bfloat16):
            grouped_attention(**a, heads=2)
        counts.append(casts.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_attention_is_the_same_in_whatever_order_heads_lie(dtype: torch.dtype, dropout: float) -> None:
    """Features of a token side by side, as of a ViT, or tokens of a feature, as of the groups; gradients too."""
    draw, shape = Draw.of(1, image=torch.arange(3)), (3, 3, 4, 2, 6, 8)
    keep = Keep(draw, dropout, 0, 2, range(4), 6, 6) if dropout else None
    by_token = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    by_feature = by_token.mT.contiguous().mT
    found = []
    for qkv in (by_token.requires_grad_(), by_feature.requires_grad_()):
        y = reference.attend(qkv[0], qkv[1:], keep=keep)
        found += [y, *torch.autograd.grad(y.square().sum(), qkv)]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found[0], found[2], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], found[3], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_attention_of_one_tensor_is_that_of_its_parts_and_the_gradient_lies_as_it_does(dropout: float) -> None:
    draw = Draw.of(1, image=torch.arange(3))
    keep = Keep(draw, dropout, 0, 2, range(1), 6, 6) if dropout else None
    qkv = torch.randn(3, 6, 3, 1, 2, 8, generator=torch.Generator().manual_seed(0)).permute(2, 0, 3, 4, 1, 5)
    qkv.requires_grad_()
    found = []
    for parts in ((qkv,), (qkv[0], qkv[1:])):
        y = reference.attend(*parts, keep=keep)
        found.append((y, *torch.autograd.grad(y.square().sum(), qkv)))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert found[0][1].stride() == qkv.stride()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads = 3 does not divide the embedding width 16"),
        ({"tokens": torch.zeros(3, 21, 16)}, "K = 21 is not divisible by 4 groups"),
        ({"tokens": torch.zeros(3, 20, 8)}, r"tokens has shape \(3, 20, 8\): must be \[B, K, 16\]"),
        ({"cls": torch.zeros(4, 8)}, r"cls has shape \(4, 8\): must be \(4, 16\)"),
        ({"tokens": torch.zeros(1, 1200, 16)}, "301 tokens a group with CLS: at most 256"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_attention(**{**arguments(), "heads": 2, **change})
