"""The Triton kernel of grouped attention's gradients for its inputs: the depth in reverse.

Layers are recomputed from their saved inputs as `attention_kernels.py` computes them, whose words and shape letters
hold here too. As in `attention_row_kernels.py` rows wait in memory between a layer's steps, [T, ..] with CLS first, and
what other threads wrote is read behind a barrier; the weights' gradients need these rows as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import CLS, LOG2E, again, hash_key, kept, keys_and_values, load, normalise, softmax


@triton.jit
def backward_attend(
    q, do, k, v, k_cls, v_cls, dk, dv, dk_cls, dv_cls, words, calls, first, query, threshold, keep_scale,
    N: tl.constexpr, NP: tl.constexpr, HPS: tl.constexpr, SW: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`attend` again with its gradients: q, do [SW, Q] to dq, o [SW, Q]; shares added to dk, dv [SW, NP] and to dk_cls,
    dv_cls [SW].

    dq and dk are those of the scores in units of log2(e), still to be scaled.
    """
    dtype = k.dtype
    token = tl.arange(0, NP)
    lane_head = tl.arange(0, SW) // (SW // HPS)
    q = q.to(dtype)
    do = do.to(dtype)
    k_rows = k_cls.to(dtype)
    v_rows = v_cls.to(dtype)
    k_column = tl.max(k_cls, 1)
    v_column = tl.max(v_cls, 1)
    dq = tl.zeros(q.shape, tl.float32)
    o = tl.zeros(q.shape, tl.float32)
    for head in tl.static_range(HPS):
        mine = (lane_head == head)[:, None]
        q_head = tl.where(mine, q, 0.0).to(dtype)
        do_head = tl.where(mine, do, 0.0).to(dtype)
        s = tl.dot(tl.trans(q_head), k, input_precision=PRECISION)
        s_cls = tl.max(tl.dot(tl.trans(q_head), k_rows, input_precision=PRECISION), 1)
        p, p_cls, scale = softmax(s, s_cls, token, 1, N, NP)
        p *= scale[:, None]
        p_cls *= scale
        used = p * keep_scale
        used_cls = p_cls * keep_scale
        if DROPOUT:
            used = kept(used, words, calls, first + head, query[:, None], token[None, :], threshold, NP == 32)
            used_cls = kept(used_cls, words, calls, first + head, query, CLS, threshold, NP == 32)
        used = used.to(dtype)
        v_head = tl.where(mine, v, 0.0).to(dtype)
        o = tl.dot(v_head, tl.trans(used), o, input_precision=PRECISION)
        o += tl.where(mine, v_column[:, None] * used_cls[None, :], 0.0)
        dv = tl.dot(do_head, used, dv, input_precision=PRECISION)
        dv_cls += tl.sum(do_head.to(tl.float32) * used_cls[None, :], 1)
        dp = tl.dot(tl.trans(do_head), v, input_precision=PRECISION) * keep_scale
        dp_cls = tl.max(tl.dot(tl.trans(do_head), v_rows, input_precision=PRECISION), 1) * keep_scale
        if DROPOUT:
            dp = kept(dp, words, calls, first + head, query[:, None], token[None, :], threshold, NP == 32)
            dp_cls = kept(dp_cls, words, calls, first + head, query, CLS, threshold, NP == 32)
        mean = tl.sum(p * dp, 1) + p_cls * dp_cls
        ds = (p * (dp - mean[:, None])).to(dtype)
        ds_cls = p_cls * (dp_cls - mean)
        k_head = tl.where(mine, k, 0.0).to(dtype)
        dq = tl.dot(k_head, tl.trans(ds), dq, input_precision=PRECISION)
        dq += tl.where(mine, k_column[:, None] * ds_cls[None, :], 0.0)
        dk = tl.dot(q_head, ds, dk, input_precision=PRECISION)
        dk_cls += tl.sum(q_head.to(tl.float32) * ds_cls[None, :], 1)
    return dq, o, dk, dv, dk_cls, dv_cls


@triton.jit
def backward_cls(
    q_cls, k, v, k_cls, v_cls, do_cls, words, calls, head, threshold, keep_scale,
    N: tl.constexpr, NP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The CLS queries of a slab's heads, columns of q_cls and do_cls [SW, CC]: the gradients of their scores, [NP, CC]
    and [CC] for the CLS key, and the weights that multiplied the values, likewise."""
    dtype = k.dtype
    token = tl.arange(0, NP)
    s = tl.dot(tl.trans(k), q_cls.to(dtype), input_precision=PRECISION)
    p, p_cls, scale = softmax(s, tl.sum(q_cls * k_cls, 0), token, 0, N, NP)
    p *= scale[None, :]
    p_cls *= scale
    dp = tl.dot(tl.trans(v), do_cls.to(dtype), input_precision=PRECISION) * keep_scale
    dp_cls = tl.sum(do_cls * v_cls, 0) * keep_scale
    used = p * keep_scale
    used_cls = p_cls * keep_scale
    if DROPOUT:
        dp = kept(dp, words, calls, head[None, :], CLS, token[:, None], threshold, NP == 32)
        dp_cls = kept(dp_cls, words, calls, head, CLS, CLS, threshold, NP == 32)
        used = kept(used, words, calls, head[None, :], CLS, token[:, None], threshold, NP == 32)
        used_cls = kept(used_cls, words, calls, head, CLS, CLS, threshold, NP == 32)
    mean = tl.sum(p * dp, 0) + p_cls * dp_cls
    ds = (p * (dp - mean[None, :])).to(dtype)
    ds_cls = p_cls * (dp_cls - mean)
    used = used.to(dtype)
    return ds, ds_cls, used, used_cls


@triton.jit
def widen(x):
    """[R, C] with a column of zeros after each, [R, 2 C]: a contraction over the columns needs 16 of them."""
    return tl.reshape(tl.join(x, tl.zeros_like(x)), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def backward_features(
    slab, nothing, inner, y, y_rows, dx_rows, dqkv, o_rows, weights, biases, words, calls, threshold, keep_scale,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr,
    SW: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A slab's heads for the features' queries: from y of the features [DP, NP], and rows of y and dx, to rows of dq
    and o, and to k, v, dk, dv [SW, NP], of CLS k and v [SW, CC], dk and dv [SW]."""
    HD: tl.constexpr = D // HEADS
    HW: tl.constexpr = SW // HPS
    CC: tl.constexpr = 8
    QUERIES: tl.constexpr = NP if NP <= 32 else 1024 // NP
    dtype = weights.dtype.element_ty
    column = tl.arange(0, DP)
    inside = (column < D)[:, None]
    lane = tl.arange(0, SW)
    first = slab * HPS
    # What is used once more later on, weights and CLS, is loaded again: held between, it would spill.
    w = weights + slab * (4 * SW * DP) + (lane[:, None] * DP + column[None, :] + nothing)
    b_v = tl.load(biases + slab * (2 * SW) + SW + (lane + nothing))
    y_cls = load(y_rows + (column[:, None] + tl.zeros((CC,), tl.int32)[None, :] + nothing), inside, D == DP)
    k, v, k_cls, v_cls = keys_and_values(w, b_v, y, y_cls, PRECISION)
    lanes = first * HD + (lane // HW * HD + lane % HW + nothing)
    mine = (lane % HW < HD) & (first + lane // HW < HEADS)
    dk_cls = tl.zeros((SW,), tl.float32)
    dv_cls = tl.zeros((SW,), tl.float32)
    dk = tl.zeros((SW, NP), tl.float32)
    dv = tl.zeros((SW, NP), tl.float32)
    for start in tl.range(0, NP, QUERIES, disable_licm=True):
        query = start + tl.arange(0, QUERIES)
        dq = tl.zeros((SW, QUERIES), tl.float32)
        o = tl.zeros((SW, QUERIES), tl.float32)
        if inner:
            at = D + (query[None, :] * D + column[:, None] + nothing)
            there = (query < N)[None, :] & inside
            y_query = y if QUERIES == NP else load(y_rows + at, there, N == NP and D == DP)
            dx_query = load(dx_rows + at, there, N == NP and D == DP)
            b_q = tl.load(biases + slab * (2 * SW) + (lane + nothing))
            dq, o, dk, dv, dk_cls, dv_cls = backward_attend(
                (tl.dot(tl.load(w), y_query, input_precision=PRECISION) + b_q[:, None]) * (LOG2E / HD**0.5),
                tl.dot(tl.load(w + 3 * SW * DP), dx_query, input_precision=PRECISION),
                k, v, k_cls, v_cls, dk, dv, dk_cls, dv_cls, words, calls, first, query, threshold, keep_scale,
                N, NP, HPS, SW, DROPOUT, PRECISION,
            )  # fmt: skip
        exists = mine[:, None] & (query < N)[None, :]
        to = dqkv + 3 * D + (lanes[:, None] + query[None, :] * (3 * D))
        tl.store(to, (dq * (1 / HD**0.5)).to(dtype), mask=exists)
        tl.store(o_rows + D + (lanes[:, None] + query[None, :] * D), o.to(dtype), mask=exists)
    return k, v, k_cls, v_cls, dk, dv, dk_cls, dv_cls


@triton.jit
def backward_rest(
    k, v, k_cls, v_cls, dk, dv, dk_cls, dv_cls,
    slab, nothing, y_rows, dx_rows, dqkv, o_rows, weights, biases, words, calls, threshold, keep_scale,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr,
    SW: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From what `backward_features` found to rows of dk and dv, with the share of CLS's query, whose dq and o it
    writes."""
    HD: tl.constexpr = D // HEADS
    HW: tl.constexpr = SW // HPS
    CC: tl.constexpr = 8
    SCALE: tl.constexpr = LOG2E / HD**0.5
    dtype = weights.dtype.element_ty
    column = tl.arange(0, DP)
    inside = (column < D)[:, None]
    token = tl.arange(0, NP)
    lane = tl.arange(0, SW)
    head = tl.arange(0, CC)
    own = (lane // HW)[:, None] == head[None, :]
    w = weights + slab * (4 * SW * DP) + (lane[:, None] * DP + column[None, :] + nothing)
    b_q = tl.load(biases + slab * (2 * SW) + (lane + nothing))
    same = column[:, None] + tl.zeros((CC,), tl.int32)[None, :] + nothing
    y_cls = load(y_rows + same, inside, D == DP)
    q_cls = (tl.dot(tl.load(w), y_cls, input_precision=PRECISION) + b_q[:, None]) * SCALE
    q_cls = tl.where(own, q_cls, 0.0)
    dx_cls = load(dx_rows + same, inside, D == DP)
    do_cls = tl.where(own, tl.dot(tl.load(w + 3 * SW * DP), dx_cls, input_precision=PRECISION), 0.0)
    first = slab * HPS
    ds, ds_cls, used, used_cls = backward_cls(
        q_cls, k, v, k_cls, v_cls, do_cls, words, calls, first + head, threshold, keep_scale, N, NP, DROPOUT, PRECISION
    )
    lanes = first * HD + (lane // HW * HD + lane % HW + nothing)
    mine = (lane % HW < HD) & (first + lane // HW < HEADS)
    dq_cls = tl.where(own, tl.dot(k, ds, input_precision=PRECISION) + ds_cls[None, :] * k_cls, 0.0)
    tl.store(dqkv + lanes, (tl.sum(dq_cls, 1) * (SCALE / LOG2E)).to(dtype), mask=mine)
    o_cls = tl.where(own, tl.dot(v, used, input_precision=PRECISION) + used_cls[None, :] * v_cls, 0.0)
    tl.store(o_rows + lanes, tl.sum(o_cls, 1).to(dtype), mask=mine)
    dk_cls += tl.sum(q_cls * ds_cls[None, :], 1)
    dv_cls += tl.sum(do_cls * used_cls[None, :], 1)
    dk = tl.dot(widen(q_cls.to(dtype)), tl.trans(widen(ds)), dk, input_precision=PRECISION)
    dv = tl.dot(widen(do_cls.to(dtype)), tl.trans(widen(used)), dv, input_precision=PRECISION)
    tl.store(dqkv + D + lanes, (dk_cls / LOG2E).to(dtype), mask=mine)
    tl.store(dqkv + 2 * D + lanes, dv_cls.to(dtype), mask=mine)
    exists = mine[:, None] & (token < N)[None, :]
    to = dqkv + 4 * D + (lanes[:, None] + token[None, :] * (3 * D))
    tl.store(to, (dk / LOG2E).to(dtype), mask=exists)
    tl.store(to + D, dv.to(dtype), mask=exists)


@triton.jit
def normal_rows(
    nothing, saved, y_rows, rstds, eps, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr
):
    """What a layer read, normalised; rstds [T]: what each row was multiplied by."""
    column = tl.arange(0, DP)
    for start in tl.range(0, T, ROWS, disable_licm=True):
        row = start + nothing + tl.arange(0, ROWS)
        exists = (row < T)[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        x = tl.load(saved + at, mask=exists, other=0.0)
        y, rstd = normalise(x.to(tl.float32), column, eps, D, DP)
        tl.store(y_rows + at, y.to(y_rows.dtype.element_ty), mask=exists)
        tl.store(rstds + row, rstd, mask=row < T)


@triton.jit
def last_rows(nothing, dout, dx_rows, N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """dx of the last layer's output: that of CLS, and zeros."""
    dtype = dx_rows.dtype.element_ty
    column = tl.arange(0, DP) + nothing
    token = tl.arange(0, NP)
    tl.store(dx_rows + column, tl.load(dout + column, mask=column < D, other=0.0).to(dtype), mask=column < D)
    at = D + (token[:, None] * D + column[None, :])
    tl.store(dx_rows + at, tl.zeros((NP, DP), dtype), mask=(token < N)[:, None] & (column < D)[None, :])


@triton.jit
def add_product(
    dy, row, first, nothing, dqkv, qkv_weight,
    T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dy [R, DP] of rows of dqkv, by BLOCK of its columns."""
    column = tl.arange(0, DP)
    block = tl.arange(0, BLOCK)
    there = first + block < 3 * D
    at = block[:, None] * D + column[None, :] + nothing
    w = load(qkv_weight + first * D + at, there[:, None] & (column < D)[None, :], D == DP and 3 * D % BLOCK == 0)
    at = row[:, None] * (3 * D) + block[None, :]
    part = tl.load(dqkv + first + at, mask=(row < T)[:, None] & there[None, :], other=0.0)
    return tl.dot(part, w, dy, input_precision=PRECISION)


@triton.jit
def input_rows(
    nothing, y_rows, rstds, dqkv, dx_rows, to_cls, to, norm_weight, qkv_weight,
    T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of a layer's output to that of its input, to_cls [D] and to [N, D]: dqkv through the projections and LayerNorm
    is added."""
    BLOCK: tl.constexpr = 16
    column = tl.arange(0, DP)
    inside = (column < D)[None, :]
    for start in tl.range(0, T, ROWS, disable_licm=True):
        row = start + nothing + tl.arange(0, ROWS)
        exists = (row < T)[:, None] & inside
        dy = tl.zeros((ROWS, DP), tl.float32)
        if DP == 64:
            for first in tl.static_range(0, 3 * D, BLOCK):
                dy = add_product(dy, row, first, nothing, dqkv, qkv_weight, T, D, DP, BLOCK, PRECISION)
        else:  # a loop, or at DP = 128 loads that are begun early would fill the registers
            for first in tl.range(0, 3 * D, BLOCK, disable_licm=True):
                dy = add_product(dy, row, first, nothing, dqkv, qkv_weight, T, D, DP, BLOCK, PRECISION)
        dy *= load(norm_weight + (column + nothing), column < D, D == DP).to(tl.float32)[None, :]
        at = row[:, None] * D + column[None, :]
        y = tl.load(y_rows + at, mask=exists, other=0.0).to(tl.float32)
        slope = tl.sum(dy * y, 1) / D
        dy -= y * slope[:, None] + (tl.sum(dy, 1) / D)[:, None]
        dx = tl.load(dx_rows + at, mask=exists, other=0.0).to(tl.float32)
        dx += dy * tl.load(rstds + row, mask=row < T, other=0.0)[:, None]
        tl.store(to_cls + at, dx.to(to_cls.dtype.element_ty), mask=(row == 0)[:, None] & inside)
        tl.store(to + (at - D), dx.to(to.dtype.element_ty), mask=exists & (row > 0)[:, None])


@triton.jit
def places(back, nothing, batch, depth, T: tl.constexpr):
    """Of this program: its image and group, its group and layer, and its first row among all layers' rows."""
    image = tl.program_id(0) + nothing
    group = tl.program_id(1)
    place = group * depth + depth - 1 - back
    return image.to(tl.int64) * tl.num_programs(1) + group, place, (place.to(tl.int64) * batch + image) * T


@triton.jit
def backward_heads(
    back, nothing, batch, depth, inner, y_rows, dx_rows, dqkv, o_rows, weights, biases, words, calls, threshold,
    keep_scale,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr,
    SW: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From rows of y and dx to those of dqkv and o; without `inner` only CLS has been a query."""
    T: tl.constexpr = N + 1
    SLABS: tl.constexpr = (HEADS + HPS - 1) // HPS
    column = tl.arange(0, DP)
    token = tl.arange(0, NP)
    _pair, place, row = places(back, nothing, batch, depth, T)
    at = D + (token[None, :] * D + column[:, None] + nothing)
    y = load(y_rows + row * D + at, (token < N)[None, :] & (column < D)[:, None], N == NP and D == DP)
    for number in tl.range(0, SLABS, disable_licm=True):
        slab, naught = again(number)
        _pair, place, row = places(back, naught, batch, depth, T)
        k, v, k_cls, v_cls, dk, dv, dk_cls, dv_cls = backward_features(
            slab, naught, inner, y, y_rows + row * D, dx_rows + row * D, dqkv + row * (3 * D), o_rows + row * D,
            weights + place * (SLABS * 4 * SW * DP), biases + place * (SLABS * 2 * SW), words, calls, threshold,
            keep_scale, N, NP, D, DP, HEADS, HPS, SW, DROPOUT, PRECISION,
        )  # fmt: skip
        backward_rest(
            k, v, k_cls, v_cls, dk, dv, dk_cls, dv_cls,
            slab, naught, y_rows + row * D, dx_rows + row * D, dqkv + row * (3 * D), o_rows + row * D,
            weights + place * (SLABS * 4 * SW * DP), biases + place * (SLABS * 2 * SW), words, calls, threshold,
            keep_scale, N, NP, D, DP, HEADS, HPS, SW, DROPOUT, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_group", "threshold", "batch", "depth"])
def backward(
    dout, saved, weights, biases, norm_weight, qkv_weight,
    key, images, dtokens, dcls, y_rows, rstds, dqkv, o_rows, dx_rows,
    first_group, threshold, keep_scale, eps, batch, depth,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr,
    SW: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (batch, groups), the depth in reverse. dout [B, G, D] to dtokens [B, K, D] and dcls [B, G, D].

    For the weights: dqkv [G, depth, B, T, 3 D], and [G, depth, B, T, D] of what a layer read, normalised (y_rows), of
    its heads (o_rows) and of its output's gradient (dx_rows). rstds [B, G, T] are only in between.
    """
    T: tl.constexpr = N + 1
    CALLS: tl.constexpr = HEADS if NP == 32 else (HEADS + 1) // 2
    ROWS: tl.constexpr = 16
    words = hash_key(key, images, tl.program_id(0), DROPOUT)
    threshold = threshold.to(tl.uint32)
    for number in tl.range(0, depth, disable_licm=True):
        back, nothing = again(number)
        pair, place, row = places(back, nothing, batch, depth, T)
        if number == 0:  # in the loop, or its addresses would be held through it
            last_rows(nothing, dout + pair * D, dx_rows + row * D, N, NP, D, DP)
        normal_rows(nothing, saved + row * D, y_rows + row * D, rstds + pair * T, eps, T, D, DP, ROWS)
        tl.debug_barrier()  # what other threads have written is read below
        backward_heads(
            back, nothing, batch, depth, number > 0, y_rows, dx_rows, dqkv, o_rows, weights, biases,
            words, (first_group + tl.program_id(1)) * 2048 + (depth - 1 - back) * CALLS, threshold, keep_scale,
            N, NP, D, DP, HEADS, HPS, SW, DROPOUT, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        # The same places, which the compiler does not know, and so need not hold through the heads.
        back, nothing = again(number + 1)
        pair, place, row = places(back - 1, nothing, batch, depth, T)
        below = dx_rows + (row - batch.to(tl.int64) * T) * D
        last = number == depth - 1
        input_rows(
            nothing, y_rows + row * D, rstds + pair * T, dqkv + row * (3 * D), dx_rows + row * D,
            tl.where(last, dcls + pair * D, below), tl.where(last, dtokens + pair * (N * D), below + D),
            norm_weight + place * D, qkv_weight + place * (3 * D * D), T, D, DP, ROWS, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
