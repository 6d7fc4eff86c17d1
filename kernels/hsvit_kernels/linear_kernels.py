"""The Triton kernels of sliced linear layers; `sliced_linear.py` launches them, kernels/README.md derives them.

Slices are read and written where they lie, through tensor descriptors: what is outside the slice loads as 0 and is
never stored, so there are no masks, and no registers for pointers.

Shape letters: M rows of x, k input and n output features of the slice; BM, BN, BK tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(8)  # rows of tiles that run together, so that they find the weights in the L2 cache


@triton.jit
def tile(program, rows, columns):
    """Row and column of a program's tile among rows x columns, GROUP rows at a time."""
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = program % (GROUP * columns)
    return first + within % height, within // height


@triton.jit(do_not_specialize=["M", "n", "k"])
def forward(
    x, weight, bias, residual, y, z, M, n, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    RESIDUAL: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M, n] = act(x [M, k] weight [n, k]^T + bias) + residual; z keeps what the activation saw."""
    m, column = tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(n, BN))
    m, column = m * BM, column * BN
    total = tl.zeros((BM, BN), tl.float32)
    for at in range(0, k, BK):
        total = tl.dot(x.load([m, at]), weight.load([column, at]).T, total, input_precision=PRECISION)
    if BIAS:
        lane = column + tl.arange(0, BN)
        total += tl.load(bias + lane, mask=lane < n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        if SAVE:
            z.store([m, column], total.to(z.dtype))
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    if RESIDUAL:
        total += residual.load([m, column]).to(tl.float32)
    y.store([m, column], total.to(y.dtype))


@triton.jit(do_not_specialize=["M", "n", "k"])
def input_gradient(
    dz, weight, dx, M, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """dx [M, k] = dz [M, n] weight [n, k]; tiles of dx are [BM, BN]."""
    m, column = tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(k, BN))
    m, column = m * BM, column * BN
    total = tl.zeros((BM, BN), tl.float32)
    for at in range(0, n, BK):
        total = tl.dot(dz.load([m, at]), weight.load([at, column]), total, input_precision=PRECISION)
    dx.store([m, column], total.to(dx.dtype))


@triton.jit(do_not_specialize=["M", "n", "k", "share"])
def weight_gradient(
    dz, x, out, bias_out, M, n, k, share,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dz [M, n]^T x [M, k] and the column sums of dz, over `share` rows a split; tiles are [BN, BK].

    ADD: added to out [1, n, k] and bias_out [n], the slices of the main gradients. Else stored to out [splits, n, k]
    and bias_out [splits, n], for `add_splits`.
    """
    split = tl.program_id(1)
    row, column = tile(tl.program_id(0), tl.cdiv(n, BN), tl.cdiv(k, BK))
    row, column = row * BN, column * BK
    total = tl.zeros((BN, BK), tl.float32)
    sums = tl.zeros((BN,), tl.float32)
    for m in range(split * share, tl.minimum((split + 1) * share, M), BM):
        part = dz.load([m, row])
        total = tl.dot(part.T, x.load([m, column]), total, input_precision=PRECISION)
        if BIAS:
            sums += tl.sum(part.to(tl.float32), 0)
    if ADD:
        total += out.load([0, row, column]).reshape(BN, BK)
    out.store([split, row, column], total.reshape(1, BN, BK))
    if BIAS:
        lane = row + tl.arange(0, BN)
        mask = (lane < n) & (column == 0)
        if ADD:
            sums += tl.load(bias_out + lane, mask=mask, other=0.0)
        tl.store(bias_out + split * n + lane, sums, mask=mask)


@triton.jit(do_not_specialize=["stride", "n", "k", "splits"])
def add_splits(out, bias_out, partial, bias_partial, stride, n, k, splits, BN: tl.constexpr, BIAS: tl.constexpr):
    """out [n, k] (rows `stride` apart) += the sum over splits of partial, in their order; bias_out [n] likewise."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = column < k
    total = tl.load(out + row * stride + column, mask=mask, other=0.0)
    for split in range(splits):
        total += tl.load(partial + (split * n + row) * k + column, mask=mask, other=0.0)
    tl.store(out + row * stride + column, total, mask=mask)
    if BIAS and tl.program_id(1) == 0:
        sums = tl.load(bias_out + row)
        for split in range(splits):
            sums += tl.load(bias_partial + split * n + row)
        tl.store(bias_out + row, sums)
