"""Plain PyTorch references: what the kernels compute, what CPUs run, what the tests compare with.

Shape letters: B images, G groups, T tokens of a group with CLS, D embedding width, h heads, d = D / h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .random import Draw, Site, keep_scale, threshold

SLOTS_A_CALL = 16  # one hash call gives the bytes of 16 (layer, head) slots


def attention_keep(
    draw: Draw, probability: float, layer: int, heads: int, groups: range, queries: int, tokens: int
) -> Tensor:
    """Which attention weights of `layer` survive dropout: bool [G, B, h, queries, T].

    The one definition of the mask. Slot layer * heads + head picks byte slot % 16 of the call counted by
    ((group * 2**8 + slot // 16) * 2**8 + row) * 2**8 + column, in wrapping 32-bit arithmetic; `groups` are global
    indices. So it depends on (key, image, group, layer, head, row, column) only.
    """
    device = draw.key.device
    first = layer * heads
    calls = torch.arange(first // SLOTS_A_CALL, (first + heads - 1) // SLOTS_A_CALL + 1, device=device)
    group = torch.arange(groups.start, groups.stop, device=device).view(-1, 1, 1, 1)
    row = torch.arange(queries, device=device).view(-1, 1)
    column = torch.arange(tokens, device=device)
    counter = ((group * 256 + calls.view(-1, 1, 1)) * 256 + row) * 256 + column
    words = draw.words(Site.ATTENTION, counter.to(torch.int32))  # [4, B, G, calls, queries, T]
    offset = first - SLOTS_A_CALL * (first // SLOTS_A_CALL)
    bytes_ = words.view(torch.uint8).unflatten(-1, (tokens, 4))
    bytes_ = bytes_.permute(2, 1, 3, 0, 6, 4, 5).flatten(2, 4)  # [G, B, calls * 16, queries, T]
    keep: Tensor = bytes_[:, :, offset : offset + heads] >= threshold(probability)
    return keep


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
        rows = 1 if layer == depth - 1 else x.shape[2]  # only CLS leaves the last layer
        keep = None
        if dropout and draw is not None:
            keep = attention_keep(draw, dropout, layer, heads, here, rows, x.shape[2])
        y = F.layer_norm(x, (width,), eps=eps)
        y = y * norm_weight[:, layer, None, None].to(y.dtype) + norm_bias[:, layer, None, None].to(y.dtype)
        weight, shift = qkv_weight[:, layer], bias[:, layer, None]
        if rows == y.shape[2]:
            q, k, v = _linear(y, weight, shift).unflatten(-1, (3, heads, width // heads)).unbind(-3)
        else:
            q = _linear(y[:, :, :rows], weight[:, :width], shift[..., :width])
            q = q.unflatten(-1, (heads, width // heads))
            k, v = (
                _linear(y, weight[:, width:], shift[..., width:]).unflatten(-1, (2, heads, width // heads)).unbind(-3)
            )
        o = _attend(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3), keep, keep_scale(dropout))
        o = _linear(o.transpose(2, 3).flatten(-2), out_weight[:, layer], out_bias[:, layer, None])
        x = x[:, :, :rows] + o
    return x[:, :, 0].transpose(0, 1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [G, B, T, D] times weight [G, N, D] plus bias [G, 1, N], a group at a time in one batched product."""
    flat = torch.baddbmm(bias.to(x.dtype), x.flatten(1, 2), weight.to(x.dtype).transpose(1, 2))
    return flat.view(*x.shape[:3], weight.shape[1])


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """Softmax attention over [..., T, d] with an explicit dropout mask."""
    weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
    if keep is not None:
        weights = weights * keep.to(weights.dtype).mul_(scale)
    return weights @ v
