"""Sliced linear layers equal F.linear on a slice; gradients of several passes gather in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_kernels import Case, StepState, dispatch, sliced_linear
from hsvit_kernels.trials import excess

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
N, K = 96, 64


def tensors(rows: int, n: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, k), (N, K), (N,), (rows, n))
    x, weight, bias, residual = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple(t.to(DEVICE, dtype).requires_grad_() for t in (x, weight / K**0.5, bias, residual))


def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, n: int, side: str, gelu: bool) -> Tensor:
    """What the layer means: F.linear on a slice, and autograd."""
    k = x.shape[-1]
    rows, columns = (slice(0, n), slice(0, k)) if side == "leading" else (slice(N - n, N), slice(K - k, K))
    y = F.linear(x, weight[rows, columns].to(x.dtype), bias[rows].to(x.dtype))
    return (F.gelu(y) if gelu else y) + residual


def gradients(y: Tensor, of: tuple[Tensor, ...]) -> list[Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.device)
    return [y.detach(), *torch.autograd.grad((y.double() * weight).sum(), of)]


def check(choice: str, rows: int, n: int, k: int, side: str, gelu: bool, dtype: torch.dtype, gather: bool) -> None:
    """Errors against fp64 are within what `trials` allows beside F.linear in the same dtype."""
    exact = tensors(rows, n, k)
    weight, bias = (t.detach().float().requires_grad_() for t in exact[1:3])
    x, residual = (t.detach().to(dtype).requires_grad_() for t in (exact[0], exact[3]))
    inputs = (x, weight, bias, residual)
    dispatch.force(choice)
    state = StepState() if gather else None
    ours = sliced_linear(x, weight, bias, out_features=n, side=side, gelu=gelu, residual=residual, state=state)
    found = gradients(ours, inputs)
    others = gradients(plain(*inputs, n=n, side=side, gelu=gelu), inputs)
    truth = gradients(plain(*exact, n=n, side=side, gelu=gelu), exact)
    for name, f, o, t in zip(("y", "x", "weight", "bias", "residual"), found, others, truth, strict=True):
        assert excess(f, o, t, gradient=name != "y", terms=rows) <= 1, name
    if gather:
        assert found[2].dtype == torch.float32


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("side", ["leading", "trailing"])
@pytest.mark.parametrize(("gelu", "gather"), [(True, True), (False, True), (True, False)])
def test_equals_the_linear_layer_on_a_slice(choice: str, side: str, gelu: bool, gather: bool) -> None:
    for dtype in DTYPES:
        check(choice, 70, 48, 32, side, gelu, dtype, gather)


@pytest.mark.parametrize("sixteenths", range(1, 17))
def test_every_sixteenth_from_either_end(sixteenths: int) -> None:
    for side in ("leading", "trailing"):
        check("triton", 20, N // 16 * sixteenths, K // 16 * sixteenths, side, True, torch.float32, True)


def test_many_rows_are_split_and_summed_in_order() -> None:
    check("triton", 3000, 48, 32, "leading", False, torch.float32, True)


def picked(full: int, used: int, segments: int, side: str) -> Tensor:
    """The features of every segment that a slice uses."""
    parts = torch.arange(full).view(segments, -1)
    part = used // segments
    return (parts[:, :part] if side == "leading" else parts[:, -part:]).flatten()


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize(("out_segments", "in_segments"), [(6, 1), (1, 4), (3, 2)])
def test_segments_are_sliced_one_by_one(choice: str, gather: bool, out_segments: int, in_segments: int) -> None:
    x, weight, bias, _ = tensors(20, 48, 32, torch.float32)
    dispatch.force(choice)
    for side in ("leading", "trailing"):
        rows, columns = picked(N, 48, out_segments, side), picked(K, 32, in_segments, side)
        expected = gradients(F.linear(x, weight[rows][:, columns], bias[rows]), (x, weight, bias))
        y = sliced_linear(
            x, weight, bias, out_features=48, side=side, out_segments=out_segments, in_segments=in_segments,
            state=StepState() if gather else None,
        )  # fmt: skip
        for found, other in zip(gradients(y, (x, weight, bias)), expected, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 1000, 50000])
def test_repeats_bit_for_bit_on_a_gpu(dtype: torch.dtype, rows: int) -> None:
    dispatch.force("triton")
    weight = torch.randn(1536, 384, device="cuda").requires_grad_()
    x = torch.randn(rows, 288, device="cuda", dtype=dtype).requires_grad_()
    runs = []
    for _ in range(3):
        y = sliced_linear(x, weight, out_features=1152, gelu=True, side="trailing", state=StepState())
        runs.append((y, *torch.autograd.grad(y.float().square().sum(), (x, weight))))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


class Slimmable(nn.Module):
    """Two sliced layers; the width of both is an argument of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(K, N), nn.Linear(N, K)
        self.step_state = StepState()

    def forward(self, x: Tensor, width: float, gather: bool) -> Tensor:
        state = self.step_state if gather else None
        n, k = int(N * width), int(K * width)
        y = sliced_linear(x[:, :k], self.first.weight, self.first.bias, out_features=n, gelu=True, state=state)
        return sliced_linear(y, self.second.weight, self.second.bias, out_features=k, residual=x[:, :k], state=state)


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_the_last_pass_hands_over_the_gradients_of_all(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Slimmable().to(DEVICE), torch.randn(20, K, device=DEVICE)
    gathered, main = set(), model.step_state.main

    def noted(*args: Any) -> Tensor:
        tensor = main(*args)
        gathered.add(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(model.step_state, "main", noted)
    found = []
    for gather in (False, True):
        dispatch.force("reference" if not gather else choice)
        model.zero_grad()
        for index, width in enumerate((1.0, 0.75, 0.5, 0.25)):
            model.step_state.last = index == 3
            model(x, width, gather).square().mean().backward()
            if gather and index < 3:
                assert all(p.grad is None for p in model.parameters())
        model.step_state.clear()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == 4
    assert gathered == {p.grad.data_ptr() for p in model.parameters() if p.grad is not None}  # no copies
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_weights_are_cast_once_a_step_for_all_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Slimmable().to(DEVICE), torch.randn(20, K, device=DEVICE, dtype=torch.float16)
    shapes, casts = sorted(p.shape for p in model.parameters()), []
    cast = Tensor.to

    def count(t: Tensor, *args: Any, **options: Any) -> Tensor:
        casts.extend([t.shape] * (t.shape in shapes))
        return cast(t, *args, **options)

    monkeypatch.setattr(Tensor, "to", count)
    for width in (1.0, 0.5):
        model(x, width, True)
    assert sorted(casts) == shapes
    with torch.no_grad():
        model.first.weight.mul_(0)
    model.step_state.clear()
    model(x, 1.0, True)
    assert sorted(casts) == sorted(shapes * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_programs_hold_the_operation_and_exported_ones_pytorchs_alone(dtype: torch.dtype) -> None:
    x, weight, bias, residual = tensors(20, 48, 32, dtype)
    dispatch.force("triton")

    class Layer(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            return sliced_linear(x, weight, bias, out_features=48, gelu=True, residual=residual)

    inputs = (x, weight, bias, residual)
    eager = gradients(Layer()(*inputs), inputs)
    compiled = gradients(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(*inputs), inputs)
    torch.testing.assert_close(compiled, eager)
    program = torch.export.export(Layer(), inputs)
    assert "hsvit" not in program.graph_module.code
    tolerance = {"rtol": 2e-3, "atol": 4e-3} if dtype == torch.float16 else {}  # a step or two of its numbers
    torch.testing.assert_close(gradients(program.module()(*inputs), inputs), eager, **tolerance)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32])
def test_the_choice_is_made_while_tracing(low: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(dispatch, "compiling", True)  # the graph is looked at, not its numbers
    x, weight, bias, residual = tensors(20, 48, 32, torch.float32)
    case = Case("linear_forward", low, low, (48, 32, 1, 1, 1, 1))
    monkeypatch.setitem(dispatch.models, x.device, "a device")
    monkeypatch.setitem(dispatch.verdicts, ("a device", case), "triton")

    def layer(*inputs: Tensor) -> Tensor:
        with torch.autocast(DEVICE, low, enabled=low != torch.float32):
            x, weight, bias, residual = inputs
            return sliced_linear(x, weight, bias, out_features=48, gelu=True, residual=residual)

    torch.compile(layer, fullgraph=True, backend="aot_eager")(x, weight, bias, residual).float().sum().backward()
    assert x.grad is not None


def test_the_operations_are_registered_as_pytorch_expects() -> None:
    x, weight, bias, residual = tensors(20, N, K, torch.float32)
    dz = torch.randn(20, N, device=DEVICE)
    operations = torch.ops.hsvit_kernels
    dispatch.force("triton")
    torch.library.opcheck(operations.sliced_linear.default, (x, weight, bias, residual, True, True))
    torch.library.opcheck(operations.sliced_linear_input_gradient.default, (dz, weight.detach()))


@pytest.mark.heavy
def test_gradients_are_those_of_the_function() -> None:
    inputs = tensors(3, 12, 8)
    dispatch.force("reference")  # fp64
    assert torch.autograd.gradcheck(
        lambda x, w, b, r: sliced_linear(x, w, b, out_features=12, gelu=True, residual=r, side="trailing"), inputs
    )


def test_an_empty_batch_and_leading_axes() -> None:
    _, weight, bias, _ = tensors(1, N, K, torch.float32)
    dispatch.force("triton")
    empty = sliced_linear(torch.zeros(0, 5, K, device=DEVICE), weight, bias, out_features=N, state=StepState())
    assert empty.shape == (0, 5, N)
    empty.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    x = torch.randn(2, 3, K, device=DEVICE)
    y = sliced_linear(x, weight, bias, out_features=16)
    torch.testing.assert_close(y, F.linear(x, weight[:16], bias[:16]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": "left"}, 'side = "left": must be "leading" or "trailing"'),
        ({"out_features": 97}, "out_features = 97: must be 1 to 96, the rows of weight"),
        ({"out_features": 0}, "out_features = 0: must be 1 to 96"),
        ({"x": torch.zeros(3, 65)}, "x has 65 features: must be 1 to 64, the columns of weight"),
        ({"weight": torch.zeros(3)}, r"weight has shape \(3,\): must be \[N, K\]"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\): must be \[96\], the rows of weight"),
        ({"residual": torch.zeros(3, 2)}, r"residual has shape \(3, 2\): must be \(3, 48\)"),
        ({"x": torch.zeros(3, 64, dtype=torch.int32)}, "x has dtype torch.int32: must be floating point"),
        ({"out_segments": 5}, "out_segments = 5: must divide 96, the rows of weight"),
        ({"in_segments": 3}, "in_segments = 3: must divide 64, the columns of weight"),
        ({"out_segments": 32}, "out_segments = 32: must divide 48, out_features"),
        ({"bias": torch.zeros(96, device="meta")}, "bias is on meta: must be on cpu, as x is"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(3, 64), "weight": torch.zeros(96, 64), "bias": torch.zeros(96), "out_features": 48}
    with pytest.raises(ValueError, match=message):
        sliced_linear(**{**good, **change})  # type: ignore[arg-type]
