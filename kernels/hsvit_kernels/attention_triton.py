"""Grouped attention by the Triton kernels: how they are launched for a problem."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import attention_gradient_kernels as gradient_kernels
from . import attention_kernels as kernels
from . import attention_row_kernels as row_kernels
from . import attention_weight_kernels as weight_kernels
from .configurations import Place
from .dispatch import launch, options

PROGRAMS = 528  # of the weights' products, four on each multiprocessor of an H200; fewer, and their rows are split
HELD = 2048  # numbers of an image's x that a warp can hold in its registers beside all else


def constants(features: int, width: int, heads: int) -> dict[str, int]:
    """The compile-time constants that follow from the shapes; attention_kernels.py explains them."""
    head = width // heads
    a_slab = 2 if head <= 8 else 1
    return {
        "N": features,
        "NP": max(16, triton.next_power_of_2(features)),
        "D": width,
        "DP": max(16, triton.next_power_of_2(width)),
        "HEADS": heads,
        "HPS": a_slab,
        "SW": max(16, triton.next_power_of_2(head * a_slab)),
    }


def place(kernel: str, shape: dict[str, int]) -> Place:
    """Where the table has a kernel's entry for a shape."""
    padded = max(64, shape["DP"])
    full = shape["D"] == shape["DP"] and shape["HPS"] * shape["D"] == shape["HEADS"] * shape["SW"]
    return kernel, ((padded,) if kernel == "attention_products" else (shape["NP"], padded, int(full)))


def folded(groups: int, depth: int, shape: dict[str, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the weights and biases as `fold` leaves them."""
    slabs = -(-shape["HEADS"] // shape["HPS"])
    weights = like.new_empty((groups, depth, slabs, 4, shape["SW"], shape["DP"]))
    return weights, like.new_empty((groups, depth, slabs, 2, shape["SW"]), dtype=torch.float32)


def fold(weights: Tensor, biases: Tensor, inputs: list[Tensor], shape: dict[str, int]) -> None:
    """`norm_weight` to `out_weight` as the kernels read them."""
    groups, depth, slabs = weights.shape[:3]
    launch(
        weight_kernels.fold, (groups * depth, slabs), weights, *(t.contiguous() for t in inputs), weights, biases,
        **{name: shape[name] for name in ("D", "DP", "HEADS", "HPS", "SW")},
    )  # fmt: skip


def forward(
    tokens: Tensor, cls: Tensor, positions: Tensor, weights: Tensor, biases: Tensor, out_bias: Tensor,
    key: Tensor | None, image: Tensor | None, out: Tensor, saved: Tensor, shape: dict[str, int],
    drop: int, first_group: int, eps: float, all_tokens: bool,
) -> None:  # fmt: skip
    """To `out` [B, G, D] or [B, G, T, D] and, where it has elements, `saved` [G, A, B, T, D]."""
    groups, depth, slabs = weights.shape[:3]
    kernel, rows = kernels.forward, []
    if shape["NP"] * shape["DP"] > HELD:
        kernel = row_kernels.forward_in_rows
        lead = (len(tokens), groups, shape["N"] + 1)
        rows = [
            tokens.new_empty((*lead, shape["DP"]), dtype=torch.float32),
            tokens.new_empty((*lead, shape["DP"])),
            tokens.new_empty((*lead, slabs * shape["SW"])),
        ]
    launch(
        kernel, (len(tokens), groups), tokens,
        tokens, *tokens.stride(), cls.contiguous(), positions.contiguous(), weights, biases, out_bias.contiguous(),
        key, image, out, saved, *rows, first_group, drop, 256 / (256 - drop), eps, len(tokens), depth,
        **shape, DROPOUT=drop > 0, SAVE=saved.numel() > 0, ALL=all_tokens, PRECISION=_precision(tokens),
        **options(place("attention_forward", shape), tokens),
    )  # fmt: skip


def backward(
    dout: Tensor, saved: Tensor, weights: Tensor, biases: Tensor, norm_weight: Tensor, qkv_weight: Tensor,
    key: Tensor | None, image: Tensor | None, shape: dict[str, int], drop: int, first_group: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the tokens [B, K, D], and of CLS by image [B, G, D]; what those of the weights are made of, in
    parts (`attention_weight_kernels.weight_products`)."""
    groups, depth, batch, length, width = saved.shape
    dtokens = saved.new_empty((batch, groups * (length - 1), width))
    dcls = saved.new_empty((batch, groups, width))
    dqkv = saved.new_empty((groups, depth, batch, length, 3 * width))
    y_rows, o_rows, dx_rows = (torch.empty_like(saved) for _ in range(3))
    rstds = saved.new_empty((batch, groups, length), dtype=torch.float32)
    precision = _precision(saved)
    launch(
        gradient_kernels.backward, (batch, groups), saved,
        dout.contiguous(), saved, weights, biases, norm_weight.contiguous(), qkv_weight,
        key, image, dtokens, dcls, y_rows, rstds, dqkv, o_rows, dx_rows,
        first_group, drop, 256 / (256 - drop), eps, batch, depth,
        **shape, DROPOUT=drop > 0, PRECISION=precision, **options(place("attention_backward", shape), saved),
    )  # fmt: skip
    layers, rows = groups * depth, batch * length
    launched = options(place("attention_products", shape), saved)
    splits, share = weight_splits(layers, rows, launched["BLOCK"])
    products = saved.new_empty((splits, layers, 4, width, width), dtype=torch.float32)
    sums = saved.new_empty((splits, layers, 4, width), dtype=torch.float32)
    launch(
        weight_kernels.weight_products, (4, splits, layers), saved,
        y_rows, dqkv, o_rows, dx_rows, products, sums, rows, share,
        D=width, DP=shape["DP"], PRECISION=precision, **launched,
    )  # fmt: skip
    return dtokens, dcls, products, sums


def weight_gradients(
    found: tuple[Tensor, ...], inputs: list[Tensor], qkv_weight: Tensor, shape: dict[str, int], batch: int
) -> list[Tensor]:
    """Of `cls` to `out_bias`, in their dtypes, from what a backward found, this one or `attention_cuda`'s."""
    dtokens, dcls_rows, products, sums = found
    _, positions, norm_weight, norm_bias = inputs[:4]
    groups, depth, _, width = qkv_weight.shape
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
    dcls, dpositions, *dweights = gradients
    columns, block, layers = 16, 128, groups * depth
    programs = layers * (shape["DP"] // columns) + groups * -(-positions.shape[1] * width // block)
    launch(
        weight_kernels.weight_gradients, (programs,), dtokens,
        products, sums, dtokens, dcls_rows, norm_weight.contiguous(), norm_bias.contiguous(), qkv_weight,
        *dweights, dcls, dpositions, len(products), layers, groups, batch,
        N=shape["N"], D=width, DP=shape["DP"], COLUMNS=columns, BLOCK=block,
    )  # fmt: skip
    return gradients


def weight_splits(layers: int, rows: int, block: int) -> tuple[int, int]:
    """Into how many parts the rows of the weights' products are split, and how many there are in one."""
    parts = max(1, min(PROGRAMS // (4 * layers), rows // (4 * block)))
    return parts, -(-rows // parts)


def _precision(tokens: Tensor) -> str:
    return "ieee" if tokens.dtype == torch.float32 else "tf32"  # the latter is not looked at for 16 bits
