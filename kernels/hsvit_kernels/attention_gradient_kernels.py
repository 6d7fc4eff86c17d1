"""The Triton kernel of grouped attention's gradients for its inputs: the depth in reverse.

Layers are recomputed from their saved inputs as `attention_kernels.py` computes them, whose words and shape letters
hold here too. Rows that the weights need are written by the way; what another thread of the program wrote is read
behind a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import CLS, LOG2E, hash_key, kept, load, normalise, softmax


@triton.jit
def backward_attend(
    q, k, v, do, k_cls, v_cls, dk_cls, dv_cls, words, calls, first, threshold, keep_scale,
    HD: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, HPS: tl.constexpr, SW: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`attend` again with its gradients: do [SW, NP] to dq, o, dk, dv [SW, NP]; shares added to dk_cls, dv_cls [SW].

    dq and dk are those of the scores in units of log2(e), still to be scaled.
    """
    dtype = k.dtype
    token = tl.arange(0, NP)
    lane_head = tl.arange(0, SW) // HD
    q = q.to(dtype)
    do = do.to(dtype)
    k_rows = k_cls.to(dtype)
    v_rows = v_cls.to(dtype)
    k_column = tl.max(k_cls, 1)
    v_column = tl.max(v_cls, 1)
    dq = tl.zeros((SW, NP), tl.float32)
    dk = tl.zeros((SW, NP), tl.float32)
    dv = tl.zeros((SW, NP), tl.float32)
    o = tl.zeros((SW, NP), tl.float32)
    for head in tl.static_range(HPS):
        mine = (lane_head == head)[:, None]
        q_head = tl.where(mine, q, 0.0).to(dtype)
        do_head = tl.where(mine, do, 0.0).to(dtype)
        s = tl.dot(tl.trans(q_head), k, input_precision=PRECISION)
        s_cls = tl.max(tl.dot(tl.trans(q_head), k_rows, input_precision=PRECISION), 1)
        p, p_cls, scale = softmax(s, s_cls, token, 1, N, NP)
        p *= scale[:, None]
        p_cls *= scale
        dp = tl.dot(tl.trans(do_head), v, input_precision=PRECISION) * keep_scale
        dp_cls = tl.max(tl.dot(tl.trans(do_head), v_rows, input_precision=PRECISION), 1) * keep_scale
        used = p * keep_scale
        used_cls = p_cls * keep_scale
        if DROPOUT:
            dp = kept(dp, words, calls, first + head, token[:, None], token[None, :], threshold, NP == 32)
            dp_cls = kept(dp_cls, words, calls, first + head, token, CLS, threshold, NP == 32)
            used = kept(used, words, calls, first + head, token[:, None], token[None, :], threshold, NP == 32)
            used_cls = kept(used_cls, words, calls, first + head, token, CLS, threshold, NP == 32)
        mean = tl.sum(p * dp, 1) + p_cls * dp_cls
        ds = (p * (dp - mean[:, None])).to(dtype)
        ds_cls = p_cls * (dp_cls - mean)
        used = used.to(dtype)
        k_head = tl.where(mine, k, 0.0).to(dtype)
        v_head = tl.where(mine, v, 0.0).to(dtype)
        dq = tl.dot(k_head, tl.trans(ds), dq, input_precision=PRECISION)
        dq += tl.where(mine, k_column[:, None] * ds_cls[None, :], 0.0)
        o = tl.dot(v_head, tl.trans(used), o, input_precision=PRECISION)
        o += tl.where(mine, v_column[:, None] * used_cls[None, :], 0.0)
        dk = tl.dot(q_head, ds, dk, input_precision=PRECISION)
        dv = tl.dot(do_head, used, dv, input_precision=PRECISION)
        dk_cls += tl.sum(q_head.to(tl.float32) * ds_cls[None, :], 1)
        dv_cls += tl.sum(do_head.to(tl.float32) * used_cls[None, :], 1)
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
def normalise_backward(x, dy, gamma, column, eps, D: tl.constexpr, DP: tl.constexpr):
    """Gradient of rows x [R, DP] through LayerNorm, from dy [R, DP]."""
    normal, rstd = normalise(x, column, eps, D, DP)
    dy = dy * gamma[None, :]
    mean = tl.sum(dy, 1) / D
    slope = tl.sum(dy * normal, 1) / D
    return (dy - mean[:, None] - normal * slope[:, None]) * rstd[:, None]


@triton.jit
def widen(x):
    """[R, C] with a column of zeros after each, [R, 2 C]: a contraction over the columns needs 16 of them."""
    return tl.reshape(tl.join(x, tl.zeros_like(x)), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def layer_input_gradient(
    dx_cls, saved, dqkv, dx_rows, norm_weight, qkv_weight, eps,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CC: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dqkv [T, 3 D] through the projections and LayerNorm, added to the gradient of the layer's output."""
    column = tl.arange(0, DP)
    inside = column < D
    token = tl.arange(0, NP)
    valid = (token < N)[:, None] & inside[None, :]
    at_rows = D + (token[:, None] * D + column[None, :])
    rows_cls = saved + (column[None, :] + tl.zeros((CC,), tl.int32)[:, None])
    WHOLE: tl.constexpr = 3 * D % BLOCK == 0
    dy = tl.zeros((NP, DP), tl.float32)
    dy_cls = tl.zeros((DP, CC), tl.float32)
    same = tl.zeros((CC,), tl.int32)
    for start in range(0, 3 * D, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = (k < 3 * D)[:, None] & inside[None, :]
        w = load(qkv_weight + start * D + (tl.arange(0, BLOCK)[:, None] * D + column[None, :]), mask, D == DP and WHOLE)
        exists = (token < N)[:, None] & (k < 3 * D)[None, :]
        part = load(dqkv + 3 * D + (token[:, None] * (3 * D) + k[None, :]), exists, N == NP and WHOLE)
        dy = tl.dot(part, w, dy, input_precision=PRECISION)
        part = load(dqkv + k[:, None] + same[None, :], (k < 3 * D)[:, None], WHOLE)
        dy_cls = tl.dot(tl.trans(w), part, dy_cls, input_precision=PRECISION)
    gamma = load(norm_weight + column, inside, D == DP).to(tl.float32)
    x = load(saved + at_rows, valid, N == NP and D == DP).to(tl.float32)
    dx = load(dx_rows + at_rows, valid, N == NP and D == DP).to(tl.float32)
    dx += normalise_backward(x, dy, gamma, column, eps, D, DP)
    x_cls = load(rows_cls, inside[None, :], D == DP).to(tl.float32)
    dx_cls += tl.trans(normalise_backward(x_cls, tl.trans(dy_cls), gamma, column, eps, D, DP))
    return dx, dx_cls


@triton.jit
def store_rows(to_cls, to, x_cls, x, is_first, valid):
    """x_cls [DP, CC], whose columns are the same, and x [NP, DP]."""
    tl.store(to_cls, x_cls.to(to_cls.dtype.element_ty), mask=is_first)
    tl.store(to, x.to(to.dtype.element_ty), mask=valid)


@triton.jit
def store_slab(
    dqkv, o_rows, mine, dq, dk, dv, o, dk_cls, dv_cls,
    HD: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, SW: tl.constexpr,
):  # fmt: skip
    """What the weights need of a slab's heads: dq, dk, dv and o [SW, NP] of the features, dk and dv [SW] of CLS."""
    dtype = dqkv.dtype.element_ty
    lane = tl.arange(0, SW)
    token = tl.arange(0, NP)
    tl.store(dqkv + D + lane, (dk_cls / LOG2E).to(dtype), mask=mine)
    tl.store(dqkv + 2 * D + lane, dv_cls.to(dtype), mask=mine)
    exists = mine[:, None] & (token < N)[None, :]
    to = dqkv + 3 * D + (lane[:, None] + token[None, :] * (3 * D))
    tl.store(to, (dq * (1 / HD**0.5)).to(dtype), mask=exists)
    tl.store(to + D, (dk / LOG2E).to(dtype), mask=exists)
    tl.store(to + 2 * D, dv.to(dtype), mask=exists)
    tl.store(o_rows + D + (lane[:, None] + token[None, :] * D), o.to(dtype), mask=exists)


@triton.jit
def layer_input(
    saved, gamma, beta, eps, N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CC: tl.constexpr
):
    """LayerNorm of what a layer read [T, D]: of the features [DP, NP] and of CLS [DP, CC], fp32."""
    column = tl.arange(0, DP)
    token = tl.arange(0, NP)
    inside = column < D
    valid = (token < N)[:, None] & inside[None, :]
    at_rows = D + (token[:, None] * D + column[None, :])
    rows_cls = saved + (column[None, :] + tl.zeros((CC,), tl.int32)[:, None])
    y, _ = normalise(load(saved + at_rows, valid, N == NP and D == DP).to(tl.float32), column, eps, D, DP)
    y_cls, _ = normalise(load(rows_cls, inside[None, :], D == DP).to(tl.float32), column, eps, D, DP)
    return tl.trans(y * gamma[None, :] + beta[None, :]), tl.trans(y_cls * gamma[None, :] + beta[None, :])


@triton.jit
def backward_slab(
    slab, y, y_cls, dx_low, dx_cls_low, inside, lane, lane_head, cls_head, own, offset, offset_out,
    words, calls, inner, threshold, keep_scale, dqkv, o_rows, qkv_weight, qkv_bias, out_weight,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr, SW: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A slab's heads: from their outputs' gradients, by dx_low [DP, NP] and dx_cls_low [DP, CC], to dqkv and o.

    What does not change between slabs is given, so that the loop decides whether it is hoisted.
    """
    HD: tl.constexpr = D // HEADS
    FULL: tl.constexpr = y.shape[0] == D and HPS * HD == SW and HEADS % HPS == 0
    SCALE: tl.constexpr = LOG2E / HD**0.5
    dtype = qkv_weight.dtype.element_ty
    first = tl.multiple_of(slab * HPS, HPS)
    mine = (lane_head < HPS) & (first + lane_head < HEADS)
    both = mine[:, None] & inside[None, :]
    # Weights are loaded where they are used, and again for the features: held between, they would spill.
    w_k = load(qkv_weight + (first * HD + D) * D + offset, both, FULL)
    w_v = load(qkv_weight + (first * HD + 2 * D) * D + offset, both, FULL)
    w_o = load(out_weight + first * HD + offset_out, inside[:, None] & mine[None, :], FULL)
    b_q = load(qkv_bias + first * HD + lane, mine, FULL).to(tl.float32)
    b_v = load(qkv_bias + (first * HD + 2 * D) + lane, mine, FULL).to(tl.float32)
    k = tl.dot(w_k, y, input_precision=PRECISION).to(dtype)
    v = (tl.dot(w_v, y, input_precision=PRECISION) + b_v[:, None]).to(dtype)
    w_q = load(qkv_weight + first * HD * D + offset, both, FULL)
    q_cls = (tl.dot(w_q, y_cls, input_precision=PRECISION) + b_q[:, None]) * SCALE
    q_cls = tl.where(own, q_cls, 0.0)
    k_cls = tl.dot(w_k, y_cls, input_precision=PRECISION)
    v_cls = tl.dot(w_v, y_cls, input_precision=PRECISION) + b_v[:, None]
    do_cls = tl.where(own, tl.dot(tl.trans(w_o), dx_cls_low, input_precision=PRECISION), 0.0)

    ds, ds_cls, used, used_cls = backward_cls(
        q_cls, k, v, k_cls, v_cls, do_cls, words, calls, first + cls_head, threshold,
        keep_scale, N, NP, DROPOUT, PRECISION,
    )  # fmt: skip
    dq_cls = tl.where(own, tl.dot(k, ds, input_precision=PRECISION) + ds_cls[None, :] * k_cls, 0.0)
    tl.store(dqkv + first * HD + lane, (tl.sum(dq_cls, 1) * (SCALE / LOG2E)).to(dtype), mask=mine)
    o_cls = tl.where(own, tl.dot(v, used, input_precision=PRECISION) + used_cls[None, :] * v_cls, 0.0)
    tl.store(o_rows + first * HD + lane, tl.sum(o_cls, 1).to(dtype), mask=mine)
    dk_cls = tl.sum(q_cls * ds_cls[None, :], 1)
    dv_cls = tl.sum(do_cls * used_cls[None, :], 1)
    dq = tl.zeros((SW, NP), tl.float32)
    dk = tl.zeros((SW, NP), tl.float32)
    dv = tl.zeros((SW, NP), tl.float32)
    o = tl.zeros((SW, NP), tl.float32)
    if inner:
        w_q = load(qkv_weight + first * HD * D + offset, both, FULL)
        w_o = load(out_weight + first * HD + offset_out, inside[:, None] & mine[None, :], FULL)
        dq, o, dk, dv, dk_cls, dv_cls = backward_attend(
            (tl.dot(w_q, y, input_precision=PRECISION) + b_q[:, None]) * SCALE, k, v,
            tl.dot(tl.trans(w_o), dx_low, input_precision=PRECISION),
            k_cls, v_cls, dk_cls, dv_cls, words, calls, first, threshold, keep_scale,
            HD, N, NP, HPS, SW, DROPOUT, PRECISION,
        )  # fmt: skip

    dk = tl.dot(widen(q_cls.to(dtype)), tl.trans(widen(ds)), dk, input_precision=PRECISION)
    dv = tl.dot(widen(do_cls.to(dtype)), tl.trans(widen(used)), dv, input_precision=PRECISION)

    store_slab(dqkv + first * HD, o_rows + first * HD, mine, dq, dk, dv, o, dk_cls, dv_cls, HD, N, NP, D, SW)


@triton.jit
def backward_layer(
    dx_cls, words, group, layer, inner, threshold, keep_scale, eps, saved, dqkv, o_rows, dx_rows,
    norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr,
    SW: tl.constexpr, CC: tl.constexpr, BLOCK: tl.constexpr, HOIST: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a layer's output, dx_rows [T, D] and dx_cls [DP, CC], to those of its input.

    Writes dqkv [T, 3 D] and o [T, D], and reads dx and dqkv again rather than to hold them in registers.
    """
    HD: tl.constexpr = D // HEADS
    CALLS: tl.constexpr = HEADS if NP == 32 else (HEADS + 1) // 2
    dtype = qkv_weight.dtype.element_ty
    column = tl.arange(0, DP)
    inside = column < D
    token = tl.arange(0, NP)
    lane = tl.arange(0, SW)
    lane_head = lane // HD
    cls_head = tl.arange(0, CC)
    own = lane_head[:, None] == cls_head[None, :]
    valid = (token < N)[:, None] & inside[None, :]
    offset = lane[:, None] * D + column[None, :]
    offset_out = column[:, None] * D + lane[None, :]
    gamma = load(norm_weight + column, inside, D == DP).to(tl.float32)
    beta = load(norm_bias + column, inside, D == DP).to(tl.float32)
    at_rows = D + (token[:, None] * D + column[None, :])
    y, y_cls = layer_input(saved, gamma, beta, eps, N, NP, D, DP, CC)
    y = y.to(dtype)
    y_cls = y_cls.to(dtype)
    dx_low = tl.trans(load(dx_rows + at_rows, valid, N == NP and D == DP))
    dx_cls_low = dx_cls.to(dtype)
    for slab in tl.range(0, (HEADS + HPS - 1) // HPS, disable_licm=not HOIST):
        backward_slab(
            slab, y, y_cls, dx_low, dx_cls_low, inside, lane, lane_head, cls_head, own, offset, offset_out,
            words, group * 2048 + layer * CALLS, inner, threshold, keep_scale, dqkv, o_rows, qkv_weight, qkv_bias,
            out_weight, N, NP, D, HEADS, HPS, SW, DROPOUT, PRECISION,
        )  # fmt: skip
    tl.debug_barrier()  # what other threads have written is read below
    return layer_input_gradient(
        dx_cls, saved, dqkv, dx_rows, norm_weight, qkv_weight, eps, N, NP, D, DP, CC, BLOCK, PRECISION
    )


@triton.jit(do_not_specialize=["first_group", "threshold", "batch", "depth"])
def backward(
    dout, saved, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight,
    key, images, dtokens, dcls, dqkv, o_rows, dx_rows, first_group, threshold, keep_scale, eps, batch, depth,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr,
    SW: tl.constexpr, BLOCK: tl.constexpr, HOIST: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (batch, groups), the depth in reverse. dout [B, G, D] to dtokens [B, K, D] and dcls [B, G, D].

    For the weights: dqkv [G, depth, B, T, 3 D], o_rows and dx_rows [G, depth, B, T, D], the latter the gradient of a
    layer's output.
    """
    T: tl.constexpr = N + 1
    CC: tl.constexpr = 8
    image = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    column = tl.arange(0, DP)
    inside = column < D
    token = tl.arange(0, NP)
    rows = tl.zeros((CC,), tl.int32)[None, :] + column[:, None]
    is_first = (tl.arange(0, CC) == 0)[None, :] & inside[:, None]
    valid = (token < N)[:, None] & inside[None, :]
    place = image.to(tl.int64) * groups + group
    dx_cls = load(dout + place * D + rows, inside[:, None], D == DP).to(tl.float32)
    last = group * depth + depth - 1
    norm_weight += last * D
    norm_bias += last * D
    qkv_weight += last * 3 * D * D
    qkv_bias += last * 3 * D
    out_weight += last * D * D
    step = batch.to(tl.int64) * T * D
    at = (last.to(tl.int64) * batch + image) * T * D
    saved += at
    dqkv += at * 3
    o_rows += at
    dx_rows += at
    words = hash_key(key, images, image, DROPOUT)
    threshold = threshold.to(tl.uint32)
    at = token[:, None] * D + column[None, :]
    store_rows(dx_rows + rows, dx_rows + D + at, dx_cls, tl.zeros((NP, DP), tl.float32), is_first, valid)
    for back in tl.range(0, depth, disable_licm=True):
        tl.debug_barrier()
        dx, dx_cls = backward_layer(
            dx_cls, words, first_group + group, depth - 1 - back, back > 0, threshold, keep_scale, eps,
            saved, dqkv, o_rows, dx_rows, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight,
            N, NP, D, DP, HEADS, HPS, SW, CC, BLOCK, HOIST, DROPOUT, PRECISION,
        )  # fmt: skip
        norm_weight -= D
        norm_bias -= D
        qkv_weight -= 3 * D * D
        qkv_bias -= 3 * D
        out_weight -= D * D
        saved -= step
        dqkv -= step * 3
        o_rows -= step
        dx_rows -= step
        if back < depth - 1:
            store_rows(dx_rows + rows, dx_rows + D + at, dx_cls, dx, is_first, valid)
        else:
            store_rows(dcls + place * D + rows, dtokens + place * N * D + at, dx_cls, dx, is_first, valid)
