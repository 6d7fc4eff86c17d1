"""The Triton kernel of grouped attention; `attention_triton.py` launches it, kernels/README.md derives it.

One program computes one group of one image, the whole depth on chip. The N = K/G feature tokens form a tile of
NP >= N rows, CLS is apart: T = 33 so needs 32 rows and not 64. Heads are narrower than a tensor core's depth of 16,
hence heads share a slab of SW columns, SW / HPS for each, and a product for one head masks the others' columns of one
operand. The CLS queries of a slab's heads are the columns of one tile, each masked to its head; where every column is
the same, CLS has as many as a tensor core needs.

Weights are read as `attention_weight_kernels.fold` leaves them: slab by slab and padded, so without masks, LayerNorm's
factors and offsets in them, and without the key bias, which cancels.

Projections are computed transposed, [SW, NP] = weight [SW, DP] x y^T [DP, NP]: then y waits in shared memory instead of
registers, and most operands are already where the tensor core wants them. Every program is written for one warp's 255
registers; tests/kernels/test_compiled.py counts what the compiler makes of them.

Shape letters: N feature tokens, T = N + 1, D width, HD head width, SW slab width, HPS heads a slab; NP, DP: padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

CLS = tl.constexpr(255)  # place of CLS among the tokens in a dropout mask's counter
LOG2E = tl.constexpr(1.4426950408889634)
MULTIPLIER = tl.constexpr(1664525)
INCREMENT = tl.constexpr(1013904223)
ALL_BITS = tl.constexpr(0xFFFFFFFF)
ATTENTION_SITE = tl.constexpr(1 << 24)


@triton.jit
def hash_key(key, images, image, DROPOUT: tl.constexpr):
    """The words of pcg4d that do not depend on the counter, as they enter its first round; zeros without DROPOUT."""
    if DROPOUT:  # and not the other way round: after a return, too, Triton compiles the rest, and there is no key
        x = tl.load(key).to(tl.uint32, bitcast=True) * MULTIPLIER + INCREMENT
        y = (tl.load(key + 1).to(tl.uint32, bitcast=True) + ATTENTION_SITE) * MULTIPLIER + INCREMENT
        z = tl.load(images + image).to(tl.uint32, bitcast=True) * MULTIPLIER + INCREMENT
    else:
        x = tl.full((), 0, tl.uint32)
        y = x
        z = x
    return x, y, z


@triton.jit
def kept(p, words, calls, head, query, key, threshold, BITS: tl.constexpr):
    """p where dropout keeps it, else 0; `mask.Keep` defines the mask. The arguments broadcast to p's shape.

    Written element by element: what a tensor core's layout gives to one thread shares one hash or two, and the compiler
    sees that it does.
    """
    if BITS:
        return kept_by_bit(p, words, calls, head, query, key, threshold)
    x, y, z = words
    counter = ((calls + head // 2) * 256 + query) * 32 + (key // 32) * 4 + (key % 8) // 2
    x, y, z, w = pcg4d(x, y, z, counter.to(tl.uint32) * MULTIPLIER + INCREMENT)
    part = (key // 8) % 4
    word = tl.where(part < 2, tl.where(part == 0, x, y), tl.where(part == 2, z, w))
    byte = (key % 2) * 2 + head % 2
    return tl.where((word << (24 - byte * 8).to(tl.uint32)) >= (threshold << 24), p, 0.0)


@triton.jit
def kept_by_bit(p, words, calls, head, query, key, threshold):
    x, y, z = words
    place = (query // 32 * 8 + key // 32) * 32 + query % 8 * 4 + key % 8 // 2
    counter = ((calls + head) * 2048 + place).to(tl.uint32) * 2
    keep = tl.zeros_like(counter) | ALL_BITS
    for half in tl.static_range(2):
        a, b, c, d = pcg4d(x, y, z, (counter + half) * MULTIPLIER + INCREMENT)
        keep = one_more_bit(keep, a, threshold, half * 4)
        keep = one_more_bit(keep, b, threshold, half * 4 + 1)
        keep = one_more_bit(keep, c, threshold, half * 4 + 2)
        keep = one_more_bit(keep, d, threshold, half * 4 + 3)
    bit = key % 2 * 16 + query // 8 % 4 * 4 + key // 8 % 4
    return tl.where((keep >> bit.to(tl.uint32)) & 1 != 0, p, 0.0)


@triton.jit
def one_more_bit(keep, word, threshold, BIT: tl.constexpr):
    """Of numbers that are compared with `threshold`, from the lowest bit on."""
    word ^= word >> 16
    either = (((threshold >> BIT) & 1) ^ 1) * ALL_BITS  # where the threshold's bit is not set
    return (word & keep) | ((word | keep) & either)


@triton.jit
def pcg4d(x, y, z, w):
    """Its two rounds, of words that have been multiplied and added to."""
    x = y * w + x
    y = z * x + y
    z = x * y + z
    w = y * z + w
    x ^= x >> 16
    y ^= y >> 16
    z ^= z >> 16
    w ^= w >> 16
    x = y * w + x
    y = z * x + y
    z = x * y + z
    w = y * z + w
    return x, y, z, w


@triton.jit(do_not_specialize=["group", "layer", "threshold", "T"])
def dropout_mask(
    key, images, out, group, layer, threshold, T,
    HEADS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (images * HEADS, tiles of rows, tiles of columns). out: int8 [images, HEADS, T, T], 1 where `kept` keeps."""
    image, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    words = hash_key(key, images, image, True)
    ones = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    calls = group * 2048 + layer * (HEADS if BITS else (HEADS + 1) // 2)
    places = ((row + CLS) % 256, (column + CLS) % 256)
    found = kept(ones, words, calls, head, places[0], places[1], threshold.to(tl.uint32), BITS)
    tl.store(out + (tl.program_id(0) * T + row) * T + column, found.to(tl.int8), mask=(row < T) & (column < T))


@triton.jit
def load(pointers, mask, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def normalise(x, column, eps, D: tl.constexpr, DP: tl.constexpr):
    """(x - mean) / std of rows [R, DP] whose columns from D on are 0, and 1 / std."""
    x = x - (tl.sum(x, 1) / D)[:, None]
    if D < DP:
        x = tl.where(column[None, :] < D, x, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    return x * rstd[:, None], rstd


@triton.jit
def softmax(s, s_cls, token, AXIS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """Unnormalised weights of the feature keys (along AXIS) and of the CLS key, and the factor that normalises them.

    Scores are in units of log2(e).
    """
    if N < NP:
        s = tl.where(tl.expand_dims(token, 1 - AXIS) < N, s, float("-inf"))
    top = tl.maximum(tl.max(s, AXIS), s_cls)
    p = tl.exp2(s - tl.expand_dims(top, AXIS))
    p_cls = tl.exp2(s_cls - top)
    return p, p_cls, 1.0 / (tl.sum(p, AXIS) + p_cls)


@triton.jit
def attend_cls(
    q_cls, k, v, k_cls, v_cls, words, calls, head, threshold, keep_scale,
    N: tl.constexpr, NP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The CLS queries of a slab's heads, columns of q_cls [SW, CC], over all keys: k, v [SW, NP] to o [SW, CC]."""
    token = tl.arange(0, NP)
    s = tl.dot(tl.trans(k), q_cls.to(k.dtype), input_precision=PRECISION)
    p, p_cls, scale = softmax(s, tl.sum(q_cls * k_cls, 0), token, 0, N, NP)
    scale *= keep_scale
    if DROPOUT:
        p = kept(p, words, calls, head[None, :], CLS, token[:, None], threshold, NP == 32)
        p_cls = kept(p_cls, words, calls, head, CLS, CLS, threshold, NP == 32)
    o = tl.dot(v, (p * scale[None, :]).to(v.dtype), input_precision=PRECISION)
    return o + (p_cls * scale)[None, :] * v_cls


@triton.jit
def attend(
    q, k, v, k_cls, v_cls, words, calls, first, query, threshold, keep_scale,
    N: tl.constexpr, NP: tl.constexpr, HPS: tl.constexpr, SW: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A slab's heads for the feature queries `query`, over all keys: q [SW, Q], k, v [SW, NP], k_cls, v_cls [SW, CC] to
    o [Q, SW]."""
    dtype = k.dtype
    token = tl.arange(0, NP)
    lane_head = tl.arange(0, SW) // (SW // HPS)
    q = q.to(dtype)
    k_cls = k_cls.to(dtype)
    v_row = tl.max(v_cls, 1)  # all columns are the same
    o = tl.zeros((q.shape[1], SW), tl.float32)
    for head in tl.static_range(HPS):
        mine = lane_head == head
        q_head = tl.trans(tl.where(mine[:, None], q, 0.0).to(dtype))
        s = tl.dot(q_head, k, input_precision=PRECISION)
        s_cls = tl.max(tl.dot(q_head, k_cls, input_precision=PRECISION), 1)
        p, p_cls, scale = softmax(s, s_cls, token, 1, N, NP)
        scale *= keep_scale
        if DROPOUT:
            p = kept(p, words, calls, first + head, query[:, None], token[None, :], threshold, NP == 32)
            p_cls = kept(p_cls, words, calls, first + head, query, CLS, threshold, NP == 32)
        v_head = tl.trans(tl.where(mine[:, None], v, 0.0).to(dtype))
        o = tl.dot((p * scale[:, None]).to(dtype), v_head, o, input_precision=PRECISION)
        o += tl.where(mine[None, :], (p_cls * scale)[:, None] * v_row[None, :], 0.0)
    return o


@triton.jit
def again(number):
    """A loop's `number`, and 0, of which the compiler knows neither, but that the 0 is a multiple of 16.

    Otherwise LLVM keeps an address of every load in two registers through the loop and adds to each in every round, and
    more registers than there are end in a stack. Grids have two axes: the third place is always 0.
    """
    same = number ^ tl.program_id(2)
    return same, tl.maximum(same - number, 0) * 16


@triton.jit
def keys_and_values(w, b_v, y, y_cls, PRECISION: tl.constexpr):
    """Of y [DP, NP] in its dtype and of y_cls [DP, CC] in fp32, by a slab's weights [SW, DP] that begin at w."""
    SIZE: tl.constexpr = w.shape[0] * w.shape[1]
    w_k = tl.load(w + SIZE)
    k = tl.dot(w_k, y, input_precision=PRECISION).to(y.dtype)
    k_cls = tl.dot(w_k, y_cls, input_precision=PRECISION)
    w_v = tl.load(w + 2 * SIZE)
    v = (tl.dot(w_v, y, input_precision=PRECISION) + b_v[:, None]).to(y.dtype)
    v_cls = tl.dot(w_v, y_cls, input_precision=PRECISION) + b_v[:, None]
    return k, v, k_cls, v_cls


@triton.jit
def slab_heads(
    slab, nothing, y, y_cls, weights, biases, words, calls, threshold, keep_scale,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr,
    SW: tl.constexpr, CC: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A slab of y [DP, NP] and y_cls [DP, CC]: weights and biases of the queries, keys and values of both, and its part
    of CLS's o, [SW]."""
    HD: tl.constexpr = D // HEADS
    dtype = weights.dtype.element_ty
    lane = tl.arange(0, SW)
    head = tl.arange(0, CC)
    own = (lane // (SW // HPS))[:, None] == head[None, :]
    w = weights + slab * (4 * SW * DP) + (lane[:, None] * DP + tl.arange(0, DP)[None, :] + nothing)
    b_q = tl.load(biases + slab * (2 * SW) + (lane + nothing))
    b_v = tl.load(biases + slab * (2 * SW) + SW + (lane + nothing))
    k, v, k_cls, v_cls = keys_and_values(w, b_v, y, y_cls, PRECISION)
    w_q = tl.load(w)
    q_cls = (tl.dot(w_q, y_cls, input_precision=PRECISION) + b_q[:, None]) * (LOG2E / HD**0.5)
    o_cls = attend_cls(
        tl.where(own, q_cls, 0.0), k, v, k_cls, v_cls, words, calls, slab * HPS + head, threshold, keep_scale,
        N, NP, DROPOUT, PRECISION,
    )  # fmt: skip
    return w_q, b_q, k, v, k_cls, v_cls, tl.sum(tl.where(own, o_cls, 0.0), 1).to(dtype)


@triton.jit
def forward_layer(
    x, x_cls, words, calls, inner, threshold, keep_scale, eps, weights, biases,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr,
    SW: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [NP, DP], x_cls [DP] fp32 to the next layer's; without `inner` the features stay as they are."""
    HD: tl.constexpr = D // HEADS
    CC: tl.constexpr = 8
    dtype = weights.dtype.element_ty
    column = tl.arange(0, DP)
    lane = tl.arange(0, SW)
    y, _ = normalise(x, column, eps, D, DP)
    y = tl.trans(y).to(dtype)
    y_cls, _ = normalise(x_cls[None, :], column, eps, D, DP)
    y_cls = tl.broadcast_to(tl.trans(y_cls).to(dtype), (DP, CC))
    for number in range((HEADS + HPS - 1) // HPS):
        slab, nothing = again(number)
        w_q, b_q, k, v, k_cls, v_cls, o_cls = slab_heads(
            slab, nothing, y, y_cls, weights, biases, words, calls, threshold, keep_scale,
            N, NP, D, DP, HEADS, HPS, SW, CC, DROPOUT, PRECISION,
        )  # fmt: skip
        # w_o is loaded where it is used, and twice: held over the products between, its registers would spill.
        w = weights + slab * (4 * SW * DP) + 3 * SW * DP + (lane[:, None] * DP + column[None, :] + nothing)
        if inner:
            o = attend(
                (tl.dot(w_q, y, input_precision=PRECISION) + b_q[:, None]) * (LOG2E / HD**0.5), k, v, k_cls, v_cls,
                words, calls, slab * HPS, tl.arange(0, NP), threshold, keep_scale,
                N, NP, HPS, SW, DROPOUT, PRECISION,
            )  # fmt: skip
            x = tl.dot(o.to(dtype), tl.load(w), x, input_precision=PRECISION)
        w_o_cls = tl.load(w)
        o_cls = tl.broadcast_to(o_cls[:, None], (SW, CC))
        x_cls += tl.max(tl.dot(tl.trans(w_o_cls), o_cls, input_precision=PRECISION), 1)
    return x, x_cls


@triton.jit(do_not_specialize=["first_group", "threshold", "batch", "depth"])
def forward(
    tokens, stride_image, stride_token, stride_column, cls, positions, weights, biases, out_bias,
    key, images, out, saved, first_group, threshold, keep_scale, eps, batch, depth,
    N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr,
    SW: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr, ALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (batch, groups). out: [B, G, D], or [B, G, T, D] with ALL. saved: [G, depth, B, T, D], layers' inputs."""
    T: tl.constexpr = N + 1
    SLABS: tl.constexpr = (HEADS + HPS - 1) // HPS
    CALLS: tl.constexpr = HEADS if NP == 32 else (HEADS + 1) // 2
    FULL: tl.constexpr = N == NP and D == DP
    image = tl.program_id(0)
    group = tl.program_id(1)
    column = tl.arange(0, DP)
    inside = column < D
    token = tl.arange(0, NP)
    valid = (token < N)[:, None] & inside[None, :]
    words = hash_key(key, images, image, DROPOUT)
    threshold = threshold.to(tl.uint32)
    at = (group * N + token)[:, None] * stride_token + column[None, :] * stride_column
    x = load(tokens + image.to(tl.int64) * stride_image + at, valid, FULL).to(tl.float32)
    x += load(positions + (group * T + 1) * D + (token[:, None] * D + column[None, :]), valid, FULL).to(tl.float32)
    x_cls = load(cls + group * D + column, inside, D == DP).to(tl.float32)
    x_cls += load(positions + group * T * D + column, inside, D == DP).to(tl.float32)
    for number in tl.range(0, depth, disable_licm=True):
        layer, nothing = again(number)
        place = group * depth + layer
        if SAVE:
            to = saved + (place.to(tl.int64) * batch + image) * T * D
            tl.store(to + (column + nothing), x_cls.to(saved.dtype.element_ty), mask=inside)
            at = (token + nothing)[:, None] * D + column[None, :]
            tl.store(to + D + at, x.to(saved.dtype.element_ty), mask=valid)
        x, x_cls = forward_layer(
            x, x_cls, words, (first_group + group) * 2048 + layer * CALLS, True if ALL else number < depth - 1,
            threshold, keep_scale, eps,
            weights + place * (SLABS * 4 * SW * DP), biases + place * (SLABS * 2 * SW),
            N, NP, D, DP, HEADS, HPS, SW, DROPOUT, PRECISION,
        )  # fmt: skip
        # The same again, which the compiler does not know, and so need not hold through the layer.
        layer, nothing = again(number + 1)
        columns = column + nothing
        bias = load(out_bias + (group * depth + layer - 1) * D + columns, inside, D == DP).to(tl.float32)
        x += bias[None, :]
        x_cls += bias
        if number == depth - 1:  # in the loop, or its addresses would be held through it
            to = out + (image.to(tl.int64) * tl.num_programs(1) + group) * D * (T if ALL else 1)
            tl.store(to + columns, x_cls.to(out.dtype.element_ty), mask=inside)
            if ALL:
                tl.store(to + D + (token[:, None] * D + columns[None, :]), x.to(out.dtype.element_ty), mask=valid)
