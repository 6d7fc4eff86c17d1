"""Plain PyTorch references: what the kernels compute, what CPUs run, what the tests compare with.

Shape letters: B images, G groups, T tokens of a group with CLS, D embedding width, h heads, d = D / h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import is_listing, stand_in
from .random import Draw, Site, keep_scale, split_bytes, threshold

CLS_PLACE = 255


@dataclass(frozen=True)
class Keep:
    """Which attention weights survive dropout: the one definition of the mask.

    A weight's fate depends on (key, image, global group, layer, head, query, key token) only. The place of a token is
    its number among the feature tokens, 255 for CLS. Call layer * ceil(h / 2) + head // 2 of a query hashes the counter
    ((group * 2048 + call) * 256 + query's place) * 32 + lane in wrapping 32-bit arithmetic. Lane
    key's place // 32 * 4 + key's place % 8 // 2 gives sixteen bytes: word key's place // 8 % 4 of pcg4d, byte
    key's place % 2 * 2 + head % 2. So the eight keys of a row that lie in one GPU thread share a hash.
    """

    draw: Draw
    probability: float
    layer: int
    heads: int
    groups: range
    rows: int
    tokens: int

    def mask(self, images: slice) -> Tensor:
        """bool [images, G, h, rows, T]."""
        draw, device = self.draw.slice(images.start, images.stop), self.draw.key.device
        pairs, features = -(-self.heads // 2), self.tokens - 1
        call = torch.arange(self.layer * pairs, (self.layer + 1) * pairs, device=device)
        group = torch.arange(self.groups.start, self.groups.stop, device=device)
        query = (torch.arange(self.rows, device=device) + CLS_PLACE) % (CLS_PLACE + 1)
        counter = ((group.view(-1, 1, 1) * 2048 + call.view(-1, 1)) * 256 + query) * 32
        lane = torch.arange(-(-features // 32) * 4, device=device)
        words = draw.words(Site.ATTENTION, (counter.unsqueeze(-1) + lane).to(torch.int32))
        bytes_ = split_bytes(words).unflatten(-1, (2, 2)).unflatten(5, (-1, 4))
        # word, image, group, call, row, block of 32 keys, lane, key % 2, head % 2: word and head to their places
        bytes_ = bytes_.permute(1, 2, 3, 8, 4, 5, 0, 6, 7).flatten(5)[..., :features]
        of_cls = split_bytes(draw.words(Site.ATTENTION, (counter + 31).to(torch.int32))[3])[..., 2:]
        bytes_ = torch.cat((of_cls.movedim(-1, 3).unsqueeze(-1), bytes_), dim=-1)
        mask: Tensor = bytes_.flatten(2, 3)[:, :, : self.heads] >= threshold(self.probability)
        return mask


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
    x = tokens.unflatten(1, (groups, count // groups)).transpose(0, 1)
    x = torch.cat((cls[:, None, None].expand(-1, batch, -1, -1).to(x.dtype), x), dim=2)
    x = x + positions[:, None].to(x.dtype)
    here = range(first_group, first_group + groups)
    # The key bias shifts every score of a row alike and cancels in the softmax: leaving it out is exact and makes its
    # gradient an exact zero, where rounding noise would be turned into steps by Adam.
    key_free = torch.ones(3, width, dtype=qkv_bias.dtype, device=qkv_bias.device)
    key_free[1] = 0
    bias = qkv_bias * key_free.flatten()
    for layer in range(depth):
        rows = 1 if layer == depth - 1 and not all_tokens else x.shape[2]  # only CLS leaves the last layer
        keep = None
        if dropout and draw is not None:
            keep = Keep(draw, dropout, layer, heads, here, rows, x.shape[2])
        y = F.layer_norm(x, (width,), eps=eps)
        y = y * norm_weight[:, layer, None, None].to(y.dtype) + norm_bias[:, layer, None, None].to(y.dtype)
        weight, shift = qkv_weight[:, layer], bias[:, layer, None]
        q = _linear(y[:, :, :rows], weight[:, :width], shift[..., :width])
        k, v = _linear(y, weight[:, width:], shift[..., width:]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, width // heads)).permute(1, 0, 3, 2, 4) for t in (q, k, v))
        o = attend(q, k, v, keep).permute(1, 0, 3, 2, 4).flatten(-2)
        x = x[:, :, :rows] + _linear(o, out_weight[:, layer], out_bias[:, layer, None])
    x = x.transpose(0, 1)
    return x if all_tokens else x[:, :, 0]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [G, B, T, D] times weight [G, N, D] plus bias [G, 1, N], a group at a time in one batched product."""
    flat = torch.baddbmm(bias.to(x.dtype), x.flatten(1, 2), weight.to(x.dtype).transpose(1, 2))
    return flat.view(*x.shape[:3], weight.shape[1])


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Keep | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention with dropout of q [B, G, h, rows, d] over k, v [B, G, h, T, d]; scale: d^-1/2 by default."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_listing():
        return stand_in(q, q.shape, q.dtype, torch.is_grad_enabled() and q.requires_grad)
    if not torch.compiler.is_compiling():
        out: Tensor = _Attention.apply(q, k, v, keep, scale)
        return out
    # torch 2.11 compiles the function below to wrong gradients without a word; what it saves inductor saves too.
    weights = _weights(q, k, scale)
    if keep is not None:
        weights = weights * keep.mask(slice(0, len(q))) * keep_scale(keep.probability)
    return weights @ v


class _Attention(torch.autograd.Function):
    """`attend` by hand, because on a CPU autograd's temporaries cost more in page faults than the arithmetic does.

    Scores above the allocator's largest cached block (32 MiB) made C4A8's forward 2.7 times slower than the same
    computed a few images at a time.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # once, or every product copies them
        out = torch.empty_like(q)
        ctx.chunks, ctx.saved = _chunks(q, k), []
        for chunk in ctx.chunks:
            mask = None if keep is None else keep.mask(chunk)
            weights = _weights(q[chunk], k[chunk], scale)
            out[chunk] = (weights if mask is None else weights * mask) @ v[chunk]
            ctx.saved.append((weights, mask))
        ctx.softmax_scale = scale
        ctx.scale = 1.0 if keep is None else keep_scale(keep.probability)
        ctx.save_for_backward(q, k, v)
        return out if keep is None else out.mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        for chunk, (weights, mask) in zip(ctx.chunks, ctx.saved, strict=True):
            g = grad[chunk] if mask is None else grad[chunk] * ctx.scale
            kept = weights if mask is None else weights * mask
            grads[2][chunk] = kept.transpose(-1, -2) @ g
            slope = g @ v[chunk].transpose(-1, -2)
            if mask is not None:
                slope = slope.mul_(mask)
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype).mul_(ctx.softmax_scale)
            grads[0][chunk] = slope @ k[chunk]
            grads[1][chunk] = slope.transpose(-1, -2) @ q[chunk]
        return *grads, None, None


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention weights in q's dtype, computed in fp32 at least; under autocast torch.softmax would return fp32."""
    weights: Tensor = torch.ops.aten._softmax((q * scale) @ k.transpose(-1, -2), -1, False)
    return weights


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    """Images that are computed together: all on a GPU, as many as keep the scores below 8 MiB on a CPU."""
    images = q.shape[0]
    a_image = 4 * q.shape[1] * q.shape[2] * q.shape[3] * k.shape[3]
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
