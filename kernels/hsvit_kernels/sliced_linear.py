"""Linear layers on a slice of their weight, for networks that are trained at several widths in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import linear_kernels as kernels
from . import reference
from .cases import Case, is_listing, note, stand_in
from .configurations import Options, Place
from .dispatch import choose, exporting, forced, launch, low_dtype, models, options
from .step_state import StepState

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROGRAMS = 256  # fewer tiles of a weight gradient than this, and its rows are split among more


def sliced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    side: str = "leading",
    out_segments: int = 1,
    in_segments: int = 1,
    gelu: bool = False,
    residual: Tensor | None = None,
    state: StepState | None = None,
) -> Tensor:
    """act(x W_s^T + b_s) + residual, where W_s are the leading or trailing rows and columns of the full weight.

    Scala, arXiv 2412.04786, equations 2 and 3. A slice is used where it lies; only one of several segments, which no
    matrix product can address, is copied. Without `state`, autograd gives a full-size gradient, as for any slice.
    Computed in x's dtype, or autocast's.

    Args:
        x: [..., k]; k says how many columns of the weight are used.
        weight: [N, K], full. bias: [N], full.
        out_features: n, the rows of the weight that are used.
        side: which end of both axes, "leading" or "trailing".
        out_segments, in_segments: the rows and the columns are so many equal parts (the heads of attention, say), and
            `side` is the end of each part; both divide the full and the used features.
        gelu: apply the exact GELU. residual: [..., n], added at the end.
        state: gathers the gradients of several passes in place.

    Returns:
        [..., n].

    Raises:
        ValueError: a shape, dtype, device or slice that does not fit, with its name, value and limit.
    """
    _check(x, weight, bias, out_features, side, residual)
    _check_segments(weight, out_features, x.shape[-1], out_segments, in_segments)
    x = x.to(low_dtype(x))
    residual = None if residual is None else residual.to(x.dtype)
    cut = _Cut(out_features, x.shape[-1], side == "leading", out_segments, in_segments)
    flat = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(-1, out_features)
    if is_listing():
        differentiable = _list(flat, weight, bias, cut, gelu, residual, state)
        return stand_in(x, (*x.shape[:-1], out_features), x.dtype, differentiable)
    if torch.compiler.is_compiling():
        state = None  # which pass is the last is not known to a graph; the compiler has its own way with slices
    if state is not None and torch.is_grad_enabled() and weight.requires_grad:
        y: Tensor = _Accumulating.apply(flat, weight, bias, added, cut, gelu, state)
    else:
        low = weight.to(x.dtype)
        b = None if bias is None else cut.vector(bias).to(x.dtype)
        save = torch.is_grad_enabled() and (flat.requires_grad or low.requires_grad)
        layer = reference.sliced_linear if exporting() else _linear
        y, _ = layer(flat, cut.matrix(low), b, added, gelu, save)
    return y.view(*x.shape[:-1], out_features)


@dataclass(frozen=True)
class _Cut:
    """Which n rows and k columns of a weight are used."""

    n: int
    k: int
    leading: bool
    out_segments: int
    in_segments: int

    @property
    def in_place(self) -> bool:
        """Whether the slice is a matrix where it lies."""
        return self.out_segments == self.in_segments == 1

    def segments(self, matrix: Tensor) -> Tensor:
        """[N, K] to a view [out segments, rows, in segments, columns] of what is used."""
        parts: Tensor = matrix.unflatten(0, (self.out_segments, -1)).unflatten(2, (self.in_segments, -1))
        rows = self._within(parts.shape[1], self.n // self.out_segments)
        return parts[:, rows, :, self._within(parts.shape[3], self.k // self.in_segments)]

    def matrix(self, matrix: Tensor) -> Tensor:
        """[N, K] to [n, k]: a view where one can be."""
        if self.in_place:
            return matrix[self._within(matrix.shape[0], self.n), self._within(matrix.shape[1], self.k)]
        return self.segments(matrix).reshape(self.n, self.k)

    def rows(self, vector: Tensor) -> Tensor:
        """[N] to a view [out segments, rows] of what is used."""
        parts: Tensor = vector.unflatten(0, (self.out_segments, -1))
        return parts[:, self._within(parts.shape[1], self.n // self.out_segments)]

    def vector(self, vector: Tensor) -> Tensor:
        """[N] to [n]: a view where one can be."""
        if self.out_segments == 1:
            return vector[self._within(len(vector), self.n)]
        return self.rows(vector).reshape(self.n)

    def _within(self, size: int, used: int) -> slice:
        return slice(0, used) if self.leading else slice(size - used, size)

    def add(self, main: Tensor, bias_main: Tensor | None, dz: Tensor, x: Tensor) -> None:
        """main [N, K] += dz [M, n]^T x [M, k], and bias_main [N] += dz's column sums, in what is used."""
        if self.in_place:
            bias = None if bias_main is None else self.vector(bias_main)
            accumulate(self.matrix(main), bias, dz, x)
            return
        dweight = main.new_zeros(self.n, self.k)
        dbias = None if bias_main is None else main.new_zeros(self.n)
        accumulate(dweight, dbias, dz, x)
        part = self.segments(main)
        part.add_(dweight.view(part.shape))
        if bias_main is not None and dbias is not None:
            rows = self.rows(bias_main)
            rows.add_(dbias.view(rows.shape))


def _check_segments(weight: Tensor, n: int, k: int, out_segments: int, in_segments: int) -> None:
    for name, segments, sizes in (
        ("out_segments", out_segments, {"the rows of weight": weight.shape[0], "out_features": n}),
        ("in_segments", in_segments, {"the columns of weight": weight.shape[1], "the features of x": k}),
    ):
        for what, size in sizes.items():
            if segments < 1 or size % segments:
                raise ValueError(f"{name} = {segments}: must divide {size}, {what}")


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, side: str, residual: Tensor | None
) -> None:
    if side not in ("leading", "trailing"):
        raise ValueError(f'side = "{side}": must be "leading" or "trailing"')
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: must be [N, K]")
    if not 0 < x.shape[-1] <= weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features: must be 1 to {weight.shape[1]}, the columns of weight")
    if not 0 < out_features <= weight.shape[0]:
        raise ValueError(f"out_features = {out_features}: must be 1 to {weight.shape[0]}, the rows of weight")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: must be [{weight.shape[0]}], the rows of weight")
    expected = (*x.shape[:-1], out_features)
    if residual is not None and tuple(residual.shape) != expected:
        raise ValueError(f"residual has shape {tuple(residual.shape)}: must be {expected}")
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "residual": residual}.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: must be floating point")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {x.device}, as x is")


class _Accumulating(torch.autograd.Function):
    """A pass whose weight gradients go to a StepState. Eager only, so it calls the functions behind the operations:
    a custom operation's dispatch costs 50 us, as much as a small layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        cut: _Cut,
        gelu: bool,
        state: StepState,
    ) -> Tensor:
        low = state.low(weight, x.dtype)
        b = None if bias is None else cut.vector(state.low(bias, x.dtype))
        part = cut.matrix(low)
        y: Tensor
        y, z = forward(x, part, b, residual, gelu, True)
        ctx.save_for_backward(x, z, part)
        ctx.full, ctx.shape, ctx.state, ctx.cut, ctx.gelu = (weight, bias), low.shape, state, cut, gelu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, z, part = ctx.saved_tensors
        (weight, bias), state = ctx.full, ctx.state
        dz = _gelu_gradient(dy, z) if ctx.gelu else dy.contiguous()
        dx = input_gradient(dz, part) if ctx.needs_input_grad[0] else None
        bias_main = None if bias is None else state.main(bias, ctx.shape[:1])
        ctx.cut.add(state.main(weight, ctx.shape), bias_main, dz, x)
        whole = [None if parameter is None else state.handed(parameter) for parameter in ctx.full]
        return dx, *whole, dy if ctx.needs_input_grad[3] else None, *(None,) * 3


def _gelu_gradient(dy: Tensor, z: Tensor) -> Tensor:
    dz: Tensor = torch.ops.aten.gelu_backward(dy.contiguous(), z)
    return dz


def _list(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cut: _Cut,
    gelu: bool,
    residual: Tensor | None,
    state: StepState | None,
) -> bool:
    """Note the kernels of a call and of its backward, where they can be launched; whether it has one."""
    ends = (cut.n, cut.k, *(weight.shape[1], weight.shape[1] - cut.k) * cut.in_place)
    fits = x.numel() and x.dtype in DTYPES and not any(end * x.itemsize % 16 for end in ends)

    def add(kernel: str, *flags: bool) -> None:
        if fits:
            note(Case(f"linear_{kernel}", x.dtype, x.dtype, (cut.n, cut.k, *map(int, flags))), len(x))

    through, trained = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    has_bias = bias is not None
    add("forward", has_bias, gelu, residual is not None, gelu and (through or trained))
    if through:
        add("input_gradient")
    if trained and state is not None:
        add("weight_gradient", has_bias)
    return through or trained or (torch.is_grad_enabled() and residual is not None and residual.requires_grad)


def _why_not(*matrices: Tensor, made: int = 0) -> str:
    """Why tensor descriptors cannot address these matrices, and one to be made with `made` columns; empty where they
    can."""
    for matrix in matrices:
        if not matrix.numel():
            return "nothing to compute"
        if matrix.dtype not in DTYPES:
            return f"dtype {matrix.dtype}"
        if matrix.stride(1) != 1 or matrix.data_ptr() % 16 or matrix.stride(0) * matrix.itemsize % 16:
            return f"a slice of {tuple(matrix.shape)} is not aligned to 16 bytes"
    if made * matrices[0].itemsize % 16:
        return f"a row of {made} is not a multiple of 16 bytes"
    return ""


def place(kernel: str, n: int, k: int) -> Place:
    """The entry of the table that a kernel is launched with."""
    return kernel, (int(min(n, k) >= 256),)


def _options(
    kernel: str, weight: Tensor, x: Tensor, *others: Tensor, flags: tuple[bool, ...] = (), made: int = 0
) -> Options | None:
    """The launch options of a kernel for a slice [n, k], None where PyTorch computes it. `made` as of `_why_not`."""
    n, k = weight.shape
    case = Case(kernel, x.dtype, x.dtype, (n, k, *map(int, flags)))
    # This is called for every layer: what only kernels ask for is looked at only where there may be one.
    why_not = _why_not(x, weight, *others, made=made) if x.device in models or forced() == "triton" else ""
    return options(place(kernel, n, k), x) if choose(case, x.device, why_not) == "triton" else None


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _describe(matrix: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool, save: bool
) -> tuple[Tensor, Tensor]:
    """The layer on a slice, and what GELU saw, empty unless saved. x [M, k], weight [n, k], any row stride."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    flags = (bias is not None, gelu, residual is not None, gelu and save)
    others = [] if residual is None else [residual]
    launched = _options("linear_forward", weight, x, *others, flags=flags, made=len(weight))
    if launched is None:
        return reference.sliced_linear(x, weight, bias, residual, gelu, save)
    (m, k), n = x.shape, len(weight)
    y = x.new_empty(m, n)
    z = torch.empty_like(y) if gelu and save else x.new_empty(0)
    bm, bn, bk = launched["BM"], launched["BN"], launched["BK"]
    y_ = _describe(y, bm, bn)
    launch(
        kernels.forward, (triton.cdiv(m, bm) * triton.cdiv(n, bn),), x,
        _describe(x, bm, bk), _describe(weight, bn, bk), bias,
        y_ if residual is None else _describe(residual, bm, bn), y_,
        _describe(z, bm, bn) if z.numel() else y_, m, n, k,
        BIAS=bias is not None, GELU=gelu, RESIDUAL=residual is not None, SAVE=z.numel() > 0,
        PRECISION=_precision(x), **launched,
    )  # fmt: skip
    return y, z


_linear = torch.library.custom_op("hsvit_kernels::sliced_linear", forward, mutates_args=())


@_linear.register_fake
def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool, save: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if gelu and save else x.new_empty(0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, residual, ctx.gelu, _ = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, _dz: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    x, weight, z = ctx.saved_tensors
    dz = _gelu_gradient(dy, z) if ctx.gelu else dy.contiguous()
    dx = _input_gradient(dz, weight) if ctx.needs_input_grad[0] else None
    dweight = dz.t() @ x if ctx.needs_input_grad[1] else None
    return dx, dweight, dz.sum(0) if ctx.has_bias else None, dy if ctx.has_residual else None, None, None


_linear.register_autograd(_gradients, setup_context=_remember)


def input_gradient(dz: Tensor, weight: Tensor) -> Tensor:
    """dz [M, n] times the slice weight [n, k]."""
    launched = _options("linear_input_gradient", weight, dz, made=weight.shape[1])
    if launched is None:
        return dz @ weight
    dx = dz.new_empty(len(dz), weight.shape[1])
    bm, bn, bk = launched["BM"], launched["BN"], launched["BK"]
    (m, n), k = dz.shape, weight.shape[1]
    launch(
        kernels.input_gradient, (triton.cdiv(m, bm) * triton.cdiv(k, bn),), dz,
        _describe(dz, bm, bk), _describe(weight, bk, bn), _describe(dx, bm, bn), m, n, k,
        PRECISION=_precision(dz), **launched,
    )  # fmt: skip
    return dx


_input_gradient = torch.library.custom_op(
    "hsvit_kernels::sliced_linear_input_gradient", input_gradient, mutates_args=()
)


@_input_gradient.register_fake
def _input_gradient_fake(dz: Tensor, weight: Tensor) -> Tensor:
    return dz.new_empty(dz.shape[0], weight.shape[1])


def accumulate(main: Tensor, bias_main: Tensor | None, dz: Tensor, x: Tensor) -> None:
    """main [n, k] += dz [M, n]^T x [M, k] and bias_main [n] += dz's column sums: slices of fp32 gradients, in place."""
    x = x.contiguous()
    launched = _options("linear_weight_gradient", main, x, dz, flags=(bias_main is not None,))
    if launched is None:
        reference.accumulate(main, bias_main, dz, x)
        return
    bm, bn, bk = launched["BM"], launched["BN"], launched["BK"]
    m, (n, k) = len(x), main.shape
    tiles = triton.cdiv(n, bn) * triton.cdiv(k, bk)
    splits = max(1, min(PROGRAMS // tiles, m // (8 * bm)))
    share = triton.cdiv(triton.cdiv(m, splits), bm) * bm  # whole tiles: a split would read its neighbour's rows else
    splits = triton.cdiv(m, share)
    add, has_bias = splits == 1, bias_main is not None
    out = main.unsqueeze(0) if add else x.new_empty(splits, n, k, dtype=torch.float32)
    sums = x.new_empty(splits, n, dtype=torch.float32) if has_bias and not add else bias_main
    launch(
        kernels.weight_gradient, (tiles, splits), x,
        _describe(dz, bm, bn), _describe(x, bm, bk), _describe(out, 1, bn, bk), sums, m, n, k, share,
        BIAS=has_bias, ADD=add, PRECISION=_precision(x), **launched,
    )  # fmt: skip
    if not add:
        block = min(1024, triton.next_power_of_2(k))
        launch(
            kernels.add_splits, (n, triton.cdiv(k, block)), x,
            main, bias_main, out, sums, main.stride(0), n, k, splits, BN=block, BIAS=has_bias,
        )  # fmt: skip
