"""Grouped multi-head attention: every attention layer of every group of every image in one call."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .random import Draw


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
    dropout: float = 0.0,
    draw: Draw | None = None,
    first_group: int = 0,
    eps: float = 1e-5,
) -> Tensor:
    """Run A pre-LN attention layers x <- x + MHA(LN(x)) in G independent groups; return their CLS vectors.

    HSViT, arXiv 2404.05196, steps 3 to 6: group g owns tokens [g K/G, (g+1) K/G), its CLS and positions are added
    here, there is no MLP and no final LayerNorm. The key bias cancels in the softmax, is left out and gets an exact
    zero gradient.

    Args:
        tokens: [B, K, D], any strides; K a multiple of G.
        cls: [G, D]. positions: [G, T, D] with T = K/G + 1, CLS first.
        norm_weight, norm_bias: [G, A, D].
        qkv_weight: [G, A, 3D, D], rows q, k, v, heads contiguous. qkv_bias: [G, A, 3D].
        out_weight: [G, A, D, D]. out_bias: [G, A, D].
        heads: attention heads, a divisor of D; scores are scaled by (D / heads) ** -0.5.
        dropout: probability of dropping an attention weight, rounded to a multiple of 1/256.
        draw: the pass's randomness; None means no dropout.
        first_group: global index of group 0 here, so that masks do not depend on where a group is computed.

    Returns:
        [B, G, D], the CLS vectors.

    Raises:
        ValueError: a shape that does not fit, with its name, value and what is needed.
    """
    tensors = {
        "tokens": tokens,
        "cls": cls,
        "positions": positions,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "qkv_weight": qkv_weight,
        "qkv_bias": qkv_bias,
        "out_weight": out_weight,
        "out_bias": out_bias,
    }
    _check(tensors, heads)
    return reference.grouped_attention(
        **tensors, heads=heads, dropout=dropout, draw=draw, first_group=first_group, eps=eps
    )


def _check(tensors: dict[str, Tensor], heads: int) -> None:
    """Refuse shapes that do not fit, by name, before anything is computed."""
    tokens = tensors["tokens"]
    groups, depth, _, width = tensors["qkv_weight"].shape
    if tokens.dim() != 3 or tokens.shape[2] != width:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: must be [B, K, {width}]")
    if tokens.shape[1] % groups:
        raise ValueError(f"tokens: K = {tokens.shape[1]} is not divisible by {groups} groups")
    if width % heads:
        raise ValueError(f"heads = {heads} does not divide the embedding width {width}")
    length = tokens.shape[1] // groups + 1
    if length > 256:
        raise ValueError(f"tokens: {length} tokens a group with CLS: at most 256 are supported")
    expected = {
        "cls": (groups, width),
        "positions": (groups, length, width),
        "norm_weight": (groups, depth, width),
        "norm_bias": (groups, depth, width),
        "qkv_weight": (groups, depth, 3 * width, width),
        "qkv_bias": (groups, depth, 3 * width),
        "out_weight": (groups, depth, width, width),
        "out_bias": (groups, depth, width),
    }
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}: must be {shape}")
