"""The Triton kernels of grouped attention that touch weights: as the others read them, and their gradients.

The gradients are made of the rows that the reversed depth wrote: products over split rows, then their sums in a fixed
order; no atomics, so results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold(
    norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, weights, biases,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, HPS: tl.constexpr, SW: tl.constexpr,
):  # fmt: skip
    """Grid (G * depth, SLABS): a slab's weights, padded with zeros, LayerNorm's factors and offsets in them.

    weights [G * depth, SLABS, 4, SW, DP]: of q, k, v and, transposed, of the output. biases [G * depth, SLABS, 2, SW],
    fp32: of q and v.
    """
    HD: tl.constexpr = D // HEADS
    HW: tl.constexpr = SW // HPS
    layer = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    place = layer * tl.num_programs(1) + slab
    column = tl.arange(0, DP)
    lane = tl.arange(0, SW)
    head = slab * HPS + lane // HW
    row = head * HD + lane % HW
    exists = (lane % HW < HD) & (head < HEADS)
    both = exists[:, None] & (column < D)[None, :]
    gamma = tl.load(norm_weight + layer * D + column, mask=column < D, other=0.0).to(tl.float32)
    beta = tl.load(norm_bias + layer * D + column, mask=column < D, other=0.0).to(tl.float32)
    to = weights + place * (4 * SW * DP) + (lane[:, None] * DP + column[None, :])
    for part in tl.static_range(3):
        at = (layer * 3 + part) * D
        w = tl.load(qkv_weight + at * D + (row[:, None] * D + column[None, :]), mask=both, other=0.0).to(tl.float32)
        tl.store(to + part * (SW * DP), (w * gamma[None, :]).to(weights.dtype.element_ty))
        if part != 1:
            bias = tl.load(qkv_bias + at + row, mask=exists, other=0.0).to(tl.float32)
            tl.store(biases + place * (2 * SW) + part // 2 * SW + lane, bias + tl.sum(w * beta[None, :], 1))
    w = tl.load(out_weight + layer * D * D + (column[None, :] * D + row[:, None]), mask=both, other=0.0)
    tl.store(to + 3 * SW * DP, w.to(weights.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "share"])
def weight_products(
    y_rows, dqkv, o_rows, dx_rows, products, sums, rows, share,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (4, splits, G * depth): what the weights' gradients are made of, over `share` of the B * T rows.

    Part 0 to 2: dq, dk, dv^T times the normalised input, [D, D]; part 3: dx^T times o. Their column sums beside them.
    products [splits, G * depth, 4, D, D], sums [splits, G * depth, 4, D], fp32.
    """
    part = tl.program_id(0)
    split = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, DP)
    inside = column < D
    row = tl.arange(0, BLOCK)
    # Pointers are chosen, not branches: loads inside one would not be pipelined.
    of_out = part == 3
    left_rows = tl.where(of_out, dx_rows + layer * rows * D, dqkv + (layer * rows * 3 * D + part * D))
    left_stride = tl.where(of_out, D, 3 * D)
    right_rows = tl.where(of_out, o_rows, y_rows) + layer * rows * D
    product = tl.zeros((DP, DP), tl.float32)
    total = tl.zeros((DP,), tl.float32)
    stop = tl.minimum((split + 1) * share, rows)
    for start in range(split * share, stop, BLOCK):
        at = (start + row)[:, None]
        mask = (at < stop) & inside[None, :]
        left = tl.load(left_rows + at * left_stride + column[None, :], mask=mask, other=0.0)
        right = tl.load(right_rows + at * D + column[None, :], mask=mask, other=0.0)
        product = tl.dot(tl.trans(left), right, product, input_precision=PRECISION)
        total += tl.sum(left.to(tl.float32), 0)
    place = (split * tl.num_programs(2) + layer) * 4 + part
    at = column[:, None] * D + column[None, :]
    tl.store(products + place * D * D + at, product, mask=inside[:, None] & inside[None, :])
    tl.store(sums + place * D + column, total, mask=inside)


@triton.jit
def layer_weights(
    program, products, sums, norm_weight, norm_bias, qkv_weight,
    dnorm_weight, dnorm_bias, dqkv_weight, dqkv_bias, dout_weight, dout_bias, splits, layers,
    D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of COLUMNS columns of a layer's weights.

    With y = gamma * normal + beta and P = dqkv^T normal, b = dqkv^T 1: dW = P * gamma + b beta^T, and LayerNorm's own
    gradients need no pass over the rows either, dgamma = sum_o W * P, dbeta = W^T b. The key bias cancels in the
    softmax: its gradient, and b of the keys, is an exact zero.
    """
    BLOCKS: tl.constexpr = DP // COLUMNS
    layer = (program // BLOCKS).to(tl.int64)
    column = (program % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, DP)
    inside = (row < D)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    gamma = tl.load(norm_weight + layer * D + column, mask=column < D, other=0.0).to(tl.float32)
    beta = tl.load(norm_bias + layer * D + column, mask=column < D, other=0.0).to(tl.float32)
    dgamma = tl.zeros((COLUMNS,), tl.float32)
    dbeta = tl.zeros((COLUMNS,), tl.float32)
    for part in tl.static_range(4):
        product = tl.zeros((DP, COLUMNS), tl.float32)
        total = tl.zeros((DP,), tl.float32)
        for split in range(splits):
            place = (split * layers + layer) * 4 + part
            product += tl.load(products + place * D * D + at, mask=inside, other=0.0)
            total += tl.load(sums + place * D + row, mask=row < D, other=0.0)
        if part == 3:
            tl.store(dout_weight + layer * D * D + at, product, mask=inside)
            tl.store(dout_bias + layer * D + row, total, mask=(row < D) & (program % BLOCKS == 0))
        else:
            if part == 1:
                total = tl.zeros((DP,), tl.float32)
            weight = tl.load(qkv_weight + (layer * 3 + part) * D * D + at, mask=inside, other=0.0).to(tl.float32)
            dgamma += tl.sum(weight * product, 0)
            dbeta += tl.sum(weight * total[:, None], 0)
            gradient = product * gamma[None, :] + total[:, None] * beta[None, :]
            tl.store(dqkv_weight + (layer * 3 + part) * D * D + at, gradient, mask=inside)
            to = dqkv_bias + (layer * 3 + part) * D + row
            tl.store(to, total, mask=(row < D) & (program % BLOCKS == 0))
    tl.store(dnorm_weight + layer * D + column, dgamma, mask=column < D)
    tl.store(dnorm_bias + layer * D + column, dbeta, mask=column < D)


@triton.jit
def first_tokens(
    program, dtokens, dcls_rows, dcls, dpositions, groups, batch, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradients of BLOCK numbers of a group's positions, and of its CLS among them: sums over the images."""
    IMAGES: tl.constexpr = 16
    T: tl.constexpr = N + 1
    BLOCKS: tl.constexpr = (T * D + BLOCK - 1) // BLOCK
    group = program // BLOCKS
    element = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    is_cls = element < D
    exists = element < T * D
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, batch, IMAGES):
        image = start + tl.arange(0, IMAGES)
        place = (image.to(tl.int64) * groups + group)[:, None]
        mask = (image < batch)[:, None] & exists[None, :]
        from_cls = mask & is_cls[None, :]
        from_tokens = mask & (element >= D)[None, :]
        part = tl.load(dcls_rows + place * D + element[None, :], mask=from_cls, other=0.0).to(tl.float32)
        at = place * (N * D) + (element - D)[None, :]
        part += tl.load(dtokens + at, mask=from_tokens, other=0.0).to(tl.float32)
        total += tl.sum(part, 0)
    tl.store(dpositions + group * T * D + element, total, mask=exists)
    tl.store(dcls + group * D + element, total, mask=exists & is_cls)


@triton.jit(do_not_specialize=["splits", "layers", "groups", "batch"])
def weight_gradients(
    products, sums, dtokens, dcls_rows, norm_weight, norm_bias, qkv_weight,
    dnorm_weight, dnorm_bias, dqkv_weight, dqkv_bias, dout_weight, dout_bias, dcls, dpositions,
    splits, layers, groups, batch,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums in a fixed order: `layers` * DP / COLUMNS programs for the layers' weights, the others for positions, CLS.

    What a branch defines stays in a function of its own: Triton merges equal names of both, whatever their shapes.
    """
    program = tl.program_id(0)
    of_layers = layers * (DP // COLUMNS)
    if program < of_layers:
        layer_weights(
            program, products, sums, norm_weight, norm_bias, qkv_weight,
            dnorm_weight, dnorm_bias, dqkv_weight, dqkv_bias, dout_weight, dout_bias, splits, layers, D, DP, COLUMNS,
        )  # fmt: skip
    else:
        first_tokens(program - of_layers, dtokens, dcls_rows, dcls, dpositions, groups, batch, N, D, BLOCK)
