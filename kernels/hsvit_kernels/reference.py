"""Plain PyTorch references: what the kernels compute, what CPUs run, what the tests compare with.

Shape letters: B images, G groups, T tokens of a group with CLS, D embedding width, h heads, d = D / h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import is_listing, stand_in
from .dispatch import low_dtype
from .mask import Keep
from .random import Draw, keep_scale


def grouped_attention(
    tokens: Tensor,
    cls: Tensor,
    positions: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    heads: int,
    dropout: float,
    draw: Draw | None,
    first_group: int,
    eps: float,
    all_tokens: bool = False,
) -> Tensor:
    """All groups at once, batched on the leading axis; `hsvit_kernels.grouped_attention` documents the arguments."""
    groups, depth = qkv_weight.shape[:2]
    batch, count, width = tokens.shape
    low = low_dtype(tokens)
    x = tokens.to(low).unflatten(1, (groups, count // groups)).transpose(0, 1)
    x = torch.cat((cls[:, None, None].expand(-1, batch, -1, -1).to(low), x), dim=2)
    x = x + positions[:, None].to(low)
    here = range(first_group, first_group + groups)
    layers = _layers(norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, low)
    for layer, (q_weight, kv_weight, q_bias, kv_bias, weight, bias) in enumerate(layers):
        rows = 1 if layer == depth - 1 and not all_tokens else x.shape[2]  # only CLS leaves the last layer
        keep = None
        if dropout and draw is not None:
            keep = Keep(draw, dropout, layer, heads, here, rows, x.shape[2])
        y = F.layer_norm(x, (width,), eps=eps)
        q = _projected(y[:, :, :rows], q_weight, q_bias, heads).squeeze(0)
        kv = _projected(y, kv_weight, kv_bias, heads)
        o = attend(q, kv, keep=keep).permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2).mT
        x = _joined(x[:, :, :rows].flatten(1, 2), o, weight, bias).unflatten(1, (batch, rows))
    out: Tensor = x.transpose(0, 1) if all_tokens else x[:, :, 0].transpose(0, 1)
    return out


def _layers(
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    low: torch.dtype,
) -> Iterator[tuple[Tensor, ...]]:
    """For each layer W [G, D, D] of q and [G, 2D, D] of k and v, their biases [G, N, 1], W [G, D, D] and bias
    [G, 1, D] of the output, in `low`.

    The LayerNorm's factors w and offsets b are in the former: W (w y + b) + c = (W w) y + (W b + c). All layers are
    cast together, once a forward, and lie one behind the other, as products want them.
    """
    width = qkv_weight.shape[-1]
    # The key bias shifts every score of a row alike and cancels in the softmax: leaving it out is exact and makes its
    # gradient an exact zero, where rounding noise would be turned into steps by Adam.
    key_free = torch.ones(3, width, dtype=qkv_bias.dtype, device=qkv_bias.device)
    key_free[1] = 0
    bias = ((qkv_weight * norm_bias.unsqueeze(2)).sum(-1) + qkv_bias) * key_free.flatten()
    shares = (width, 2 * width)
    weights = (qkv_weight * norm_weight.unsqueeze(2)).split(shares, dim=2)
    every = (*weights, *bias.unsqueeze(-1).split(shares, dim=2), out_weight, out_bias.unsqueeze(2))
    return zip(*(w.transpose(0, 1).to(low, memory_format=torch.contiguous_format).unbind() for w in every), strict=True)


def _projected(y: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """y [G, B, T, D] by weight [G, n h d, D] and bias [G, n h d, 1] to heads [n, B, G, h, T, d].

    They lie [G, n, h, d, B, T]: an image's tokens are a run of memory, longer than a head's features.
    """
    (groups, batch, count, width), parts = y.shape, weight.shape[1] // weight.shape[2]
    if torch.compiler.is_compiling():  # in that order the strides of an export would depend on the batch, which is free
        flat = torch.baddbmm(bias.mT, y.flatten(1, 2), weight.mT)
        return flat.view(groups, batch, count, parts, heads, width // heads).permute(3, 1, 0, 4, 2, 5)
    out: Tensor = _ToHeads.apply(y.flatten(1, 2), weight, bias)
    return out.view(groups, parts, heads, width // heads, batch, count).permute(1, 4, 0, 2, 5, 3)


def _joined(x: Tensor, o: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `_FromHeads`."""
    if torch.compiler.is_compiling():
        return torch.baddbmm(x + bias, o.mT, weight.mT)
    out: Tensor = _FromHeads.apply(x, o, weight, bias)
    return out


class _ToHeads(torch.autograd.Function):
    """y [G, n, D], weight [G, N, D], bias [G, N, 1] to weight y^T + bias [G, N, n].

    By hand, as the next one, so that gradients too lie as the next product wants them. Not for torch.compile, which
    chooses that itself: torch 2.11 compiles some functions with a hand-written backward to wrong gradients without a
    word.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(y, weight)
        return torch.baddbmm(bias, weight, y.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, weight = ctx.saved_tensors
        return grad.mT @ weight, grad @ y, grad.sum(-1, keepdim=True)


class _FromHeads(torch.autograd.Function):
    """x [G, n, D], o [G, D, n], weight [G, D, D], bias [G, 1, D] to x + o^T weight^T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, o: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(o, weight)
        return (x + bias).baddbmm_(o.mT, weight.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        o, weight = ctx.saved_tensors
        return grad, weight.mT @ grad.mT, grad.mT @ o.mT, grad.sum(1, keepdim=True)


def attend(*parts: Tensor, keep: Keep | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention with dropout.

    Args:
        parts: q [B, G, h, rows, d] and kv [2, B, G, h, T, d], or q, k and v as one [3, B, G, h, T, d]. What comes
            together has its gradient together, in the order in which it lies: nothing need be joined.
        keep: which weights survive dropout; None: all.
        scale: of the scores; d^-1/2 by default.

    Returns:
        [B, G, h, rows, d].
    """
    q, kv = _split(parts)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_listing():
        return stand_in(q, q.shape, q.dtype, torch.is_grad_enabled() and q.requires_grad)
    out: Tensor
    if not torch.compiler.is_compiling():
        out = _Attention.apply(keep, scale, *parts)
        return out
    # torch 2.11 compiles the function below to wrong gradients without a word; what it saves inductor saves too.
    k, v = kv
    weights = _softmax((q * scale) @ k.mT)
    if keep is not None:
        weights = weights * keep.mask(slice(0, len(q))) * keep_scale(keep.probability)
    out = weights @ v
    return out


class _Attention(torch.autograd.Function):
    """`attend` by hand, because on a CPU autograd's temporaries cost more in page faults than the arithmetic does.

    Scores above the allocator's largest cached block (32 MiB) made C4A8's forward 2.7 times slower than the same
    computed a few images at a time.
    """

    @staticmethod
    def forward(ctx: Any, keep: Keep | None, scale: float, *parts: Tensor) -> Tensor:
        q, kv = _split(parts)
        out = torch.empty_like(q)
        ctx.like = [torch.empty_like(part, device="meta") for part in parts]  # how gradients lie; the data may go
        ctx.chunks, ctx.saved = _chunks(q, kv), []
        ctx.scale, ctx.keep_scale = scale, None if keep is None else keep_scale(keep.probability)
        for chunk in ctx.chunks:
            q_, (k, v) = _dense(q[chunk]) * scale, _dense(kv[:, chunk])
            weights = kept = _softmax(q_ @ k.mT)
            if keep is not None:
                # One tensor is saved for both: a weight that is dropped has a negative sign.
                kept = weights.copysign_(keep.margin(chunk)).relu()
            found = _product(kept, v)
            out[chunk] = found if keep is None else found.mul_(ctx.keep_scale)
            ctx.saved.append((q_, k, v, weights))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = tuple(torch.empty_like(like, device=grad.device) for like in ctx.like)
        dq, dkv = _split(gradients)
        for chunk, (q, k, v, weights) in zip(ctx.chunks, ctx.saved, strict=True):
            g, kept = _dense(grad[chunk]), weights
            if ctx.keep_scale is not None:
                g, kept, weights = g * ctx.keep_scale, weights.relu(), weights.abs()
            dkv[1, chunk] = _product(kept.mT, g)
            slope = g @ v.mT
            if ctx.keep_scale is not None:
                slope = torch.ops.aten.threshold_backward(slope, kept, 0)
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
            dq[chunk] = _product(slope, k).mul_(ctx.scale)
            dkv[0, chunk] = _product(slope.mT, q)
        return None, None, *gradients


def _split(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """q and kv, see `attend`."""
    if len(parts) == 1:
        return parts[0][0], parts[0][1:]
    q, kv = parts
    return q, kv


def _softmax(scores: Tensor) -> Tensor:
    """In the dtype of the scores, computed in fp32 at least; under autocast torch.softmax would return fp32."""
    weights: Tensor = torch.ops.aten._softmax(scores, -1, False)
    return weights


def _dense(x: Tensor) -> Tensor:
    """x [..., n, d] without gaps, with the last two axes in the order in which they lie."""
    return x.contiguous() if x.stride(-1) == 1 else x.mT.contiguous().mT


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, which lies as b does: a CPU multiplies matrices of few columns slowly, of few rows fast."""
    return a @ b if b.stride(-1) == 1 else (b.mT @ a.mT).mT


def _chunks(q: Tensor, kv: Tensor) -> list[slice]:
    """Images that are computed together: all on a GPU, as many as keep the scores below 8 MiB on a CPU."""
    images = q.shape[0]
    a_image = 4 * q.shape[1] * q.shape[2] * q.shape[3] * kv.shape[4]
    size = max(images, 1) if q.is_cuda else max(2**23 // a_image, 1)
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


def sliced_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool, save: bool
) -> tuple[Tensor, Tensor]:
    """act(x weight^T + bias) + residual, and what the activation saw, empty unless saved. weight: the slice [n, k]."""
    z = F.linear(x, weight, bias)
    y = F.gelu(z) if gelu else z
    if residual is not None:
        y = y + residual
    return y, z if gelu and save else x.new_empty(0)


def accumulate(main: Tensor, bias_main: Tensor | None, dz: Tensor, x: Tensor) -> None:
    """main [n, k] += dz [M, n]^T x [M, k], bias_main [n] += dz's column sums; both slices of fp32 gradients."""
    if x.dtype == main.dtype:
        main.addmm_(dz.t(), x)
    elif x.is_cuda:
        main.add_(torch.mm(dz.t(), x, out_dtype=main.dtype))
    else:  # on CPUs an fp32 result means fp32 inputs, which take twice the time; autograd's own is rounded alike
        main.add_(torch.mm(dz.t(), x))
    if bias_main is not None:
        bias_main.add_(dz.sum(0, dtype=main.dtype if x.is_cuda else None))
