"""Grouped attention of images whose x has more numbers than a warp has registers for: rows wait in memory.

As `attention_kernels.py`, whose words and shape letters hold here too, but between its steps a layer has its rows
[T, ..], CLS first, in memory that its program alone reads and writes, and so in the caches: x in fp32, y (x normalised)
and o in the input's dtype. Registers hold a slab's keys and values and a few queries, or a few rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import LOG2E, again, attend, hash_key, load, normalise, slab_heads


@triton.jit
def put_rows(
    x, row, stop, nothing, more, x_rows, y_rows, saved, eps,
    D: tl.constexpr, DP: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Rows x [R, DP] before `stop` of a layer's input: x itself, normalised, and with SAVE, if there are `more` layers,
    saved."""
    column = tl.arange(0, DP)
    exists = (row < stop)[:, None]
    at = row[:, None] * DP + column[None, :] + nothing
    y, _ = normalise(x, column, eps, D, DP)
    tl.store(x_rows + at, x, mask=exists)
    tl.store(y_rows + at, y.to(y_rows.dtype.element_ty), mask=exists)
    if SAVE:
        at = row[:, None] * D + column[None, :] + nothing
        tl.store(saved + at, x.to(saved.dtype.element_ty), mask=exists & (column < D)[None, :] & more)


@triton.jit
def layer_rows(
    stop, nothing, more, x_rows, y_rows, o_rows, saved, weights, out_bias, eps,
    D: tl.constexpr, DP: tl.constexpr, SLABS: tl.constexpr, SW: tl.constexpr, ROWS: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to x, before row `stop`, what the heads found: o, multiplied."""
    column = tl.arange(0, DP)
    lane = tl.arange(0, SW)
    for start in tl.range(0, stop, ROWS, disable_licm=True):
        row = start + tl.arange(0, ROWS)
        exists = (row < stop)[:, None]
        x = tl.load(x_rows + (row[:, None] * DP + column[None, :] + nothing), mask=exists, other=0.0)
        x += load(out_bias + (column + nothing), column < D, D == DP).to(tl.float32)[None, :]
        for slab in tl.range(0, SLABS, disable_licm=True):
            w = weights + slab * (4 * SW * DP) + 3 * SW * DP + (lane[:, None] * DP + column[None, :] + nothing)
            at = row[:, None] * (SLABS * SW) + slab * SW + lane[None, :] + nothing
            x = tl.dot(tl.load(o_rows + at, mask=exists, other=0.0), tl.load(w), x, input_precision=PRECISION)
        put_rows(x, row, stop, nothing, more, x_rows, y_rows, saved, eps, D, DP, SAVE)


@triton.jit
def layer_heads(
    nothing, inner, y_rows, o_rows, weights, biases, words, calls, threshold, keep_scale,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr,
    SW: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From y to o; without `inner` that of CLS alone."""
    HD: tl.constexpr = D // HEADS
    CC: tl.constexpr = 8
    QUERIES: tl.constexpr = NP if NP <= 32 else 1024 // NP
    STRIDE: tl.constexpr = (HEADS + HPS - 1) // HPS * SW
    dtype = weights.dtype.element_ty
    column = tl.arange(0, DP)
    lane = tl.arange(0, SW)
    token = tl.arange(0, NP)
    at = column[:, None] + nothing
    y = load(y_rows + DP + (token[None, :] * DP + at), (token < N)[None, :], N == NP)
    y_cls = tl.load(y_rows + (tl.zeros((CC,), tl.int32)[None, :] + at))
    for number in range(STRIDE // SW):
        slab, nothing = again(number)
        w_q, b_q, k, v, k_cls, v_cls, o_cls = slab_heads(
            slab, nothing, y, y_cls, weights, biases, words, calls, threshold, keep_scale,
            N, NP, D, DP, HEADS, HPS, SW, CC, DROPOUT, PRECISION,
        )  # fmt: skip
        to = o_rows + slab * SW
        tl.store(to + (lane + nothing), o_cls)
        if inner:
            for start in range(0, NP, QUERIES):
                query = start + tl.arange(0, QUERIES)
                exists = query < N
                if QUERIES == NP:
                    y_query = y
                else:
                    place = query[None, :] * DP + column[:, None] + nothing
                    y_query = load(y_rows + DP + place, exists[None, :], N == NP)
                o = attend(
                    (tl.dot(w_q, y_query, input_precision=PRECISION) + b_q[:, None]) * (LOG2E / HD**0.5),
                    k, v, k_cls, v_cls, words, calls, slab * HPS, query, threshold, keep_scale,
                    N, NP, HPS, SW, DROPOUT, PRECISION,
                )  # fmt: skip
                tl.store(
                    to + STRIDE + (query[:, None] * STRIDE + lane[None, :] + nothing), o.to(dtype), mask=exists[:, None]
                )


@triton.jit(do_not_specialize=["first_group", "threshold", "batch", "depth"])
def forward_in_rows(
    tokens, stride_image, stride_token, stride_column, cls, positions, weights, biases, out_bias,
    key, images, out, saved, x_rows, y_rows, o_rows, first_group, threshold, keep_scale, eps, batch, depth,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr,
    SW: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr, ALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `forward`; of each program x_rows [T, DP] fp32, y_rows [T, DP] and o_rows [T, SLABS * SW]."""
    T: tl.constexpr = N + 1
    SLABS: tl.constexpr = (HEADS + HPS - 1) // HPS
    CALLS: tl.constexpr = HEADS if NP == 32 else (HEADS + 1) // 2
    ROWS: tl.constexpr = 16
    image = tl.program_id(0)
    group = tl.program_id(1)
    column = tl.arange(0, DP)
    inside = (column < D)[None, :]
    pair = image.to(tl.int64) * tl.num_programs(1) + group
    x_rows += pair * (T * DP)
    y_rows += pair * (T * DP)
    o_rows += pair * (T * SLABS * SW)
    out += pair * (T * D if ALL else D)
    tokens += image.to(tl.int64) * stride_image
    words = hash_key(key, images, image, DROPOUT)
    threshold = threshold.to(tl.uint32)
    to = saved + ((group * depth).to(tl.int64) * batch + image) * (T * D)
    for start in tl.range(0, T, 1024 // DP, disable_licm=True):
        row = start + tl.arange(0, 1024 // DP)
        exists = (row < T)[:, None] & inside
        is_cls = (row == 0)[:, None]
        at = row[:, None] * D + column[None, :]
        x = tl.load(positions + group * (T * D) + at, mask=exists, other=0.0).to(tl.float32)
        x += tl.load(cls + group * D + at, mask=exists & is_cls, other=0.0).to(tl.float32)
        at = (group * N + row - 1)[:, None] * stride_token + column[None, :] * stride_column
        x += tl.load(tokens + at, mask=exists & ~is_cls, other=0.0).to(tl.float32)
        put_rows(x, row, T, 0, True, x_rows, y_rows, to, eps, D, DP, SAVE)
    for number in tl.range(0, depth, disable_licm=True):
        layer, nothing = again(number)
        place = group * depth + layer
        w = weights + place * (SLABS * 4 * SW * DP)
        more = number < depth - 1
        inner = True if ALL else more
        tl.debug_barrier()  # what other threads have written is read below
        layer_heads(
            nothing, inner, y_rows, o_rows, w, biases + place * (SLABS * 2 * SW),
            words, (first_group + group) * 2048 + layer * CALLS, threshold, keep_scale,
            N, NP, D, DP, HEADS, HPS, SW, DROPOUT, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        layer_rows(
            tl.where(inner, T, 1), nothing, more, x_rows, y_rows, o_rows,
            saved + ((place + 1).to(tl.int64) * batch + image) * (T * D), w, out_bias + place * D, eps,
            D, DP, SLABS, SW, ROWS, SAVE, PRECISION,
        )  # fmt: skip
    tl.debug_barrier()
    for token in range(T if ALL else 1):
        found = tl.load(x_rows + token * DP + column)
        tl.store(out + token * D + column, found.to(out.dtype.element_ty), mask=column < D)
