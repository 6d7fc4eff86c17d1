"""The Triton kernels of grouped attention, in the interpreter or on a GPU, equal the reference within rounding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hsvit_kernels import Case as CompileCase
from hsvit_kernels import StepState, configurations, dispatch, grouped_attention, linear_kernels, sliced_linear
from hsvit_kernels import attention_gradient_kernels as gradient_kernels
from hsvit_kernels import attention_kernels as kernels
from hsvit_kernels import attention_row_kernels as row_kernels
from hsvit_kernels import attention_weight_kernels as weight_kernels
from hsvit_kernels.grouped_attention import dropout_mask
from hsvit_kernels.mask import Keep
from hsvit_kernels.random import Draw, keep_scale, threshold
from hsvit_kernels.trials import excess
from tests.kernels.test_grouped_attention import NAMES, arguments
from tests.ranks import ROOT

pytestmark = pytest.mark.heavy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    batch: int
    groups: int
    tokens: int  # of a group, without CLS
    depth: int
    width: int = 64
    heads: int = 8
    dropout: float = 0.2
    dtype: torch.dtype = torch.float32


CASES = [
    Case(1, 1, 8, 1, dropout=0.0),
    Case(3, 1, 16, 2, width=56),
    Case(1, 2, 32, 2, dtype=torch.float16),
    Case(5, 1, 21, 1, dtype=torch.float16),
    Case(1, 1, 32, 8, width=56, dropout=0.0),
    Case(1, 16, 8, 1, width=16, heads=2),
    Case(1, 1, 64, 2, width=32, heads=4),
    Case(1, 1, 32, 2, width=128, heads=8, dtype=torch.float16),
    Case(2, 1, 33, 2, width=60, heads=5),
    Case(2, 2, 5, 2, width=24, heads=6),
    Case(2, 1, 1, 2, width=21, heads=3),
]
HELD_AND_NOT = [(9, 16), (35, 60)]
"""Tokens and width of a problem whose x is held in registers, and of one whose rows wait in memory."""
GPU_CASES = [  # tokens, width, dropout and dtype are compiled, a few seconds each; the others are not
    Case(batch, groups, tokens, depth, width, dropout=dropout, dtype=dtype)
    for dtype, lengths in {torch.bfloat16: (8, 16, 21, 32), torch.float16: (32,), torch.float32: (32,)}.items()
    for tokens in lengths
    for width in (64, 56)
    for dropout in (0.0, 0.2)
    for batch, groups, depth in [(1, 1, 8), (3, 16, 2), (5, 2, 1), (64, 16, 8)]
]
TABLE_CASES = [
    Case(5, 3, tile, 2, padded if full else padded - 8, padded // 8 if full else 8, dtype=torch.bfloat16)
    for kernel, (tile, padded, full) in (key for key in configurations.TABLE if key[0] == "attention_forward")
]


def inputs(case: Case) -> dict[str, Tensor]:
    """Weights of a trained layer's size, so that errors are rounding's and not chaos."""
    found = arguments(case.batch, case.groups, case.tokens, case.depth, case.width)
    with torch.no_grad():
        for name in ("qkv_weight", "out_weight"):
            found[name].mul_(2 * case.width**-0.5)
    return {name: t.detach().to(DEVICE, case.dtype).requires_grad_() for name, t in found.items()}


def run(
    choice: str, a: dict[str, Tensor], case: Case, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The result and the gradients of all inputs, computed in `dtype`."""
    dispatch.force(choice)
    a = {name: t.detach().to(dtype).requires_grad_() for name, t in a.items()}
    draw = Draw.of(1, 2, 3, image=torch.arange(7, 7 + case.batch), device=DEVICE)
    y = grouped_attention(**a, heads=case.heads, dropout=case.dropout, draw=draw, first_group=3, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    return y.detach(), list(torch.autograd.grad((y.double() * weight).sum(), list(a.values())))


def check(case: Case) -> None:
    """Errors against fp64 are within what `trials` allows beside plain PyTorch in the same dtype."""
    a = inputs(case)
    exact, ours, plain = (
        run(choice, a, case, dtype)
        for choice, dtype in [("reference", torch.float64), ("triton", case.dtype), ("reference", case.dtype)]
    )
    names = ["result", *a]
    for name, e, o, p in zip(names, (exact[0], *exact[1]), (ours[0], *ours[1]), (plain[0], *plain[1]), strict=True):
        terms = case.batch * (case.tokens + 1)
        assert excess(o, p, e, gradient=name != "result", terms=terms) <= 1, name
        assert o.dtype == case.dtype


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_within_rounding(case: Case) -> None:
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES + TABLE_CASES, ids=str)
def test_results_and_gradients_are_within_rounding_on_a_gpu(case: Case) -> None:
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", TABLE_CASES, ids=str)
def test_every_table_entry_repeats_bit_for_bit_on_a_gpu(case: Case) -> None:
    a = inputs(case)
    first, *others = (run("triton", a, case, case.dtype) for _ in range(3))
    for other in others:
        assert torch.equal(first[0], other[0])
        for x, y in zip(first[1], other[1], strict=True):
            assert torch.equal(x, y)


def checked_by(tool: str, code: str) -> None:
    """A tool of compute-sanitizer finds nothing in a program."""
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [checker, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", code]
    if tool == "memcheck":  # NVIDIA's bindings ask for functions that a driver may not have
        command[1:1] = ["--report-api-errors", "no"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or it would not see where tensors end
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]


@pytest.mark.gpu
def test_the_memory_checker_finds_nothing_in_any_table_entry() -> None:
    code = "from tests.kernels import test_attention_kernels as t; [t.check(case) for case in t.TABLE_CASES]"
    checked_by("memcheck", code)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (32, 8), (64, 128)])
@pytest.mark.parametrize("tokens", [2, 17, 18, 33, 34, 70])
def test_the_dropout_mask_is_the_references_for_every_tiling(tokens: int, rows: int, columns: int) -> None:
    heads, layer, group = 5, 3, 9
    draw = Draw.of(4, 5, image=torch.tensor([2, 300]), device=DEVICE)
    where: dict[str, Any] = {"layer": layer, "heads": heads, "group": group, "tokens": tokens}
    with dispatch.forcing("reference"):
        expected = dropout_mask(draw, 0.2, **where)
    with dispatch.forcing("triton"):
        found = dropout_mask(draw, 0.2, **where, tile=(rows, columns))
    assert torch.equal(found, expected)
    rate = 1 - threshold(0.2) / 256
    assert abs(found.double().mean().item() - rate) < 3 * (rate * (1 - rate) / found.numel()) ** 0.5
    assert keep_scale(0.2) == 1 / rate


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [1, 28])
def test_a_compiled_reference_draws_the_same_mask(rows: int) -> None:
    torch._dynamo.reset()
    keep = Keep(Draw.of(4, 5, image=torch.tensor([2, 300]), device=DEVICE), 0.2, 3, 5, range(9, 11), rows, 28)
    compiled = torch.compile(lambda: keep.mask(slice(0, 2)), fullgraph=True)
    assert torch.equal(compiled(), keep.mask(slice(0, 2)))


@pytest.mark.parametrize(("tokens", "width"), HELD_AND_NOT)
def test_strided_tokens_and_an_empty_batch(tokens: int, width: int) -> None:
    case = Case(2, 2, tokens, 1, width=width, heads=2)
    a = inputs(case)
    wide = torch.randn(2, width, 2 * tokens, device=DEVICE).mT  # [B, K, D] whose columns lie furthest apart
    rest = {name: a[name] for name in NAMES}
    dispatch.force("triton")
    strided = grouped_attention(wide, **rest, heads=2)
    torch.testing.assert_close(strided, grouped_attention(wide.contiguous(), **rest, heads=2))
    empty = grouped_attention(a["tokens"][:0], **rest, heads=2)
    assert empty.shape == (0, 2, width)
    empty.sum().backward()


@pytest.mark.parametrize(("tokens", "width"), HELD_AND_NOT)
def test_all_tokens_are_those_of_the_reference(tokens: int, width: int) -> None:
    case = Case(2, 2, tokens, 2, width=width, heads=2)
    a = inputs(case)
    with torch.no_grad():
        found = []
        for choice in ("triton", "reference"):
            dispatch.force(choice)
            found.append(grouped_attention(**a, heads=2, all_tokens=True))
    assert found[0].shape == (2, 2, tokens + 1, width)
    torch.testing.assert_close(*found)
    dispatch.force("reference")
    torch.testing.assert_close(found[0][:, :, 0], grouped_attention(**a, heads=2))


def test_the_key_bias_gets_an_exact_zero() -> None:
    case = Case(2, 1, 8, 1, width=16, heads=2)
    _, gradients = run("triton", inputs(case), case, torch.float32)
    bias = gradients[1 + NAMES.index("qkv_bias")]
    assert not bias[..., 16:32].any()
    assert bias[..., :16].abs().min() > 0


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double")
def test_gradients_are_those_of_the_function() -> None:
    case = Case(1, 1, 3, 1, width=8, heads=2)
    a = inputs(case)
    draw = Draw.of(1, image=torch.arange(1), device=DEVICE)
    dispatch.force("triton")

    def attention(*values: Tensor) -> Tensor:
        return grouped_attention(**dict(zip(a, values, strict=True)), heads=2, dropout=0.2, draw=draw)

    # fp32 needs a wide step; the key bias moves every score of a row alike, so its true gradient is zero too
    assert torch.autograd.gradcheck(attention, tuple(a.values()), eps=1e-2, atol=5e-3, rtol=2e-2, fast_mode=True)


def test_a_step_of_eight_layers_is_one_launch_forward_and_three_backward_beside_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches: list[str] = []

    def count(kernel: Any) -> None:
        launch = kernel.run
        monkeypatch.setattr(
            kernel, "run", lambda *args, **kwargs: (launches.append(kernel.fn.__name__), launch(*args, **kwargs))
        )

    modules = kernels, row_kernels, gradient_kernels, weight_kernels
    for kernel in {id(k): k for module in modules for k in vars(module).values() if hasattr(k, "arg_names")}.values():
        count(kernel)
    dispatch.force("triton")
    for tokens, width, forward in ((1, 8, "forward"), (33, 64, "forward_in_rows")):
        a = inputs(Case(1, 2, tokens, 8, width=width, heads=1))  # one head, as only the launches are counted
        y = grouped_attention(**a, heads=1)
        assert launches == ["fold", forward]
        y.sum().backward()
        assert launches[2:] == ["backward", "weight_products", "weight_gradients"]
        launches.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_programs_hold_the_operation_and_exported_ones_pytorchs_alone(dtype: torch.dtype) -> None:
    case = Case(2, 2, 4, 1, width=16, heads=2, dtype=dtype)
    a = inputs(case)
    draw = Draw.of(1, 2, image=torch.arange(2), device=DEVICE)
    dispatch.force("triton")

    class Model(torch.nn.Module):
        def forward(self, a: dict[str, Tensor]) -> Tensor:
            return grouped_attention(**a, heads=2, dropout=0.2, draw=draw)

    eager = Model()(a)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")(a)
    torch.testing.assert_close(compiled, eager)
    weight = torch.linspace(-1, 1, eager.numel(), device=DEVICE, dtype=dtype).view_as(eager)
    gradients = [torch.autograd.grad((y * weight).sum(), list(a.values())) for y in (compiled, eager)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    exported = torch.export.export(Model(), (a,))
    assert "hsvit" not in exported.graph_module.code
    tolerance = {"rtol": 2e-3, "atol": 4e-3} if dtype == torch.float16 else {}  # a step or two of its numbers
    torch.testing.assert_close(exported.module()(a), eager, **tolerance)


@pytest.mark.parametrize("choice", ["triton", "reference", "auto"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32])
def test_the_choice_is_made_while_tracing(choice: str, low: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bit the launch is looked up in a table; a verdict is found by the case."""
    torch._dynamo.reset()
    monkeypatch.setattr(dispatch, "compiling", True)  # the graph is looked at, not its numbers
    a = inputs(Case(2, 2, 4, 1, width=16, heads=2))
    case = CompileCase("grouped_attention", low, torch.float32, (5, 16, 2, 1, 0, 1, 0))
    monkeypatch.setitem(dispatch.models, a["tokens"].device, "a device")
    monkeypatch.setitem(dispatch.verdicts, ("a device", case), "triton")
    dispatch.force(choice)
    graphs: list[str] = []

    def look(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    def attention(a: dict[str, Tensor]) -> Tensor:
        with torch.autocast(DEVICE, low, enabled=low != torch.float32):
            return grouped_attention(**a, heads=2)

    torch.compile(attention, fullgraph=True, backend=look)(a)
    (code,) = graphs
    assert ("hsvit_kernels.grouped_attention" in code) == (choice != "reference")


def test_the_operations_are_registered_as_pytorch_expects() -> None:
    case = Case(2, 2, 4, 1, width=16, heads=2)
    a = list(inputs(case).values())
    draw = Draw.of(1, 2, image=torch.arange(2), device=DEVICE)
    operations = torch.ops.hsvit_kernels
    mode = (2, threshold(0.2), 0, 1e-5)
    torch.library.opcheck(operations.grouped_attention.default, (*a, draw.key, draw.image, *mode, False, True, False))
    a = [t.detach() for t in a]
    torch.library.opcheck(operations.grouped_attention.default, (*a, None, None, 2, 0, 0, 1e-5, False, False, False))
    _, *saved = operations.grouped_attention(*a, draw.key, draw.image, *mode, False, True, False)
    dout = torch.randn(2, 2, 16, device=DEVICE)
    gradient = operations.grouped_attention_backward.default
    torch.library.opcheck(gradient, (dout, *a, draw.key, draw.image, *saved, *mode))


def test_autocast_computes_in_its_dtype_and_keeps_the_weights_gradients_in_theirs() -> None:
    case = Case(1, 1, 8, 1, width=16, heads=2)
    a = inputs(case)
    low = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter's bf16 is not to be trusted
    dispatch.force("triton")
    with torch.autocast(DEVICE, low):
        y = grouped_attention(**a, heads=2)
    assert y.dtype == low
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in a.values())


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device; here it is looked at, on two GPUs below it is tried."""
    entered: list[Tensor] = []
    outside: list[str] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield
        entered.pop()

    def look(kernel: Any) -> None:
        monkeypatch.setattr(kernel, "run", lambda *_, **__: entered or outside.append(kernel.fn.__name__))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (kernels, gradient_kernels, weight_kernels, linear_kernels):
        for value in [value for value in vars(module).values() if hasattr(value, "arg_names")]:
            look(value)
    dispatch.force("triton")
    grouped_attention(**inputs(Case(1, 1, 4, 1, width=16, heads=2)), heads=2).sum().backward()
    weight = torch.randn(64, 64, device=DEVICE, requires_grad=True)
    for rows in (8, 4096):
        x = torch.randn(rows, 64, device=DEVICE, requires_grad=True)
        sliced_linear(x, weight, out_features=64, state=StepState()).sum().backward()
    assert outside == []


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_may_be_on_a_device_that_is_not_the_current_one() -> None:
    a = {name: t.detach().to("cuda:1") for name, t in inputs(Case(2, 2, 8, 2, width=16, heads=2)).items()}
    found = []
    for choice in ("triton", "reference"):
        dispatch.force(choice)
        found.append(grouped_attention(**a, heads=2))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, 20, 16, dtype=torch.int64)}, "tokens has dtype torch.int64: must be floating point"),
        ({"cls": torch.zeros(4, 16, device="meta")}, "cls is on meta: must be on cpu, as tokens is"),
        ({"qkv_weight": torch.zeros(4, 48, 16)}, r"qkv_weight has shape \(4, 48, 16\): must be \[G, A, 3D, D\]"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_attention(**{**arguments(), "heads": 2, **change})


def test_too_many_tokens_go_to_the_reference_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.force("triton")
    dispatch._told.clear()
    a = inputs(Case(1, 1, 70, 1, width=16, heads=2))
    with caplog.at_level("INFO", logger="hsvit_kernels"):
        grouped_attention(**a, heads=2)
        grouped_attention(**a, heads=2)
    told = [record.message for record in caplog.records]
    assert told == [
        "grouped_attention: reference (D = 16 with T = 71: fused are D <= 64 with T <= 65 and D <= 128 with T <= 33)"
    ]


def test_the_choice_can_be_forced_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='kernels = "cuda": must be one of auto, triton, reference'):
        dispatch.force("cuda")
    monkeypatch.setenv("HSVIT_KERNELS", "fast")
    with pytest.raises(ValueError, match='HSVIT_KERNELS = "fast": must be one of'):
        dispatch.forced()
    monkeypatch.setenv("HSVIT_KERNELS", "reference")
    dispatch.force("triton")
    assert dispatch.forced() == "reference"


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    dispatch.force("triton")
    with pytest.raises(
        ValueError, match="kernels = triton, but the tensors are on cpu; Triton needs CUDA or TRITON_INTERPRET=1"
    ):
        grouped_attention(**arguments(), heads=2)
