"""Grouped attention in CUDA C++ computes what the reference does: its source runs here on a CPU, by a compiler for one.

What first use compares on a GPU is compared here, by its rule. test_compiled.py has what NVRTC makes of it.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from hsvit_kernels import Case, attention_cuda, attention_triton, dispatch, grouped_attention, prepare
from hsvit_kernels.cases import Cases
from hsvit_kernels.findings import tried
from hsvit_kernels.random import Draw
from hsvit_kernels.trials import AttentionTrial, excess
from tests.kernels import emulator
from tests.kernels import test_first_use as first
from tests.kernels.test_attention_kernels import checked_by
from tests.kernels.test_first_use import StandIn

pytestmark = pytest.mark.heavy
nothing_is_known = first.nothing_is_known
grouped = sys.modules["hsvit_kernels.grouped_attention"]


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is not None:
        return
    monkeypatch.setattr(attention_cuda, "launch", emulator.launch)
    monkeypatch.setattr(dispatch, "capability", lambda device: "90")


def case(depth: int, dropout: bool = True, training: bool = True, weights: torch.dtype = torch.float32) -> Case:
    return Case("grouped_attention", torch.bfloat16, weights, (33, 64, 8, depth, int(dropout), int(training), 0))


CASES = [
    (case(1, dropout=False), 1, 1),
    (case(3), 11, 2),  # a block of eight images, and one of three
    (case(2, weights=torch.bfloat16), 8, 1),
    (case(2, training=False), 9, 2),
]
GPU_CASES = [*CASES, (case(8), 64, 16), (case(8, dropout=False, weights=torch.bfloat16), 61, 64)]


def check(asked: Case, images: int, groups: int, device: str = "cpu") -> None:
    problem = AttentionTrial(asked, images, groups, torch.device(device))
    with dispatch.forcing("cuda"):
        ours = problem.results(asked.dtype)
        again = problem.results(asked.dtype)
    with dispatch.forcing("reference"):
        plain, exact = problem.results(asked.dtype), problem.results(torch.float64)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        gradient = name not in ("result", "mask")
        assert excess(value, plain[name], exact[name], gradient=gradient, terms=problem.terms) <= 1, name
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize(("asked", "images", "groups"), CASES, ids=str)
def test_results_and_gradients_are_within_what_first_use_allows(asked: Case, images: int, groups: int) -> None:
    check(asked, images, groups)


def test_a_block_of_the_backward_goes_through_its_images_eight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "BLOCKS", 1)
    assert attention_cuda.splits(19, 1) == (1, 24)
    check(case(2), 19, 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("asked", "images", "groups"), GPU_CASES, ids=str)
def test_so_they_are_on_a_gpu(asked: Case, images: int, groups: int) -> None:
    if not attention_cuda.fits(asked, torch.device("cuda", 0)):
        pytest.skip("this GPU has no kernel for it")
    check(asked, images, groups, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_memory_checker_finds_nothing(tool: str) -> None:
    if not all(attention_cuda.fits(asked, torch.device("cuda", 0)) for asked, *_ in CASES):
        pytest.skip("this GPU has no kernel for training")
    checked_by(tool, "from tests.kernels import test_attention_cuda as t; [t.check(*case, 'cuda') for case in t.CASES]")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """What a step of seventeen images launches, by namespace: in the backward one block has all of them."""
    found: dict[str, tuple[Any, ...]] = {}

    def launch(entry: attention_cuda.Entry, *rest: Any) -> None:
        found[entry.namespace] = entry, *rest
        emulator.launch(entry, *rest)

    monkeypatch.setattr(attention_cuda, "launch", launch)
    monkeypatch.setattr(attention_cuda, "BLOCKS", 1)
    with dispatch.forcing("cuda"):
        AttentionTrial(case(2), 17, 1, torch.device("cpu")).results(torch.bfloat16)
    return found


def test_a_barrier_is_between_two_warps_that_touch_one_place(launches: dict[str, tuple[Any, ...]]) -> None:
    assert launches.keys() == attention_cuda.ENTRIES.keys()
    for entry, *rest in launches.values():
        assert emulator.races(entry, *rest) == "", entry


BARRIER = re.compile(r"\bbarrier\(\);")
BARRIERS = [
    (header, at)
    for header in attention_cuda.headers()
    if header.stem in attention_cuda.ENTRIES
    for at in range(len(BARRIER.findall(header.read_text())))
]


@pytest.mark.slow
@pytest.mark.parametrize(("header", "at"), BARRIERS, ids=lambda value: getattr(value, "stem", str(value)))
def test_without_a_barrier_there_is_none(
    header: Path, at: int, tmp_path: Path, launches: dict[str, tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in attention_cuda.headers():
        shutil.copy(other, tmp_path)
    text = header.read_text()
    found = list(BARRIER.finditer(text))[at]
    (tmp_path / header.name).write_text(text[: found.start()] + text[found.end() :])
    monkeypatch.setattr(attention_cuda, "headers", lambda: sorted(tmp_path.glob("*.h")))
    entry, *rest = launches[header.stem]
    assert "data race" in emulator.races(entry, *rest)


@pytest.fixture
def inputs() -> dict[str, Any]:
    problem = AttentionTrial(case(2), 3, 2, torch.device("cpu"))
    return problem._typed(problem._inputs(3), torch.bfloat16)


def attention(inputs: dict[str, Any], kernel: str) -> torch.Tensor:
    with dispatch.forcing(kernel):
        return grouped_attention(
            **inputs, heads=8, dropout=0.2, draw=Draw.of(1, image=torch.arange(len(inputs["tokens"])))
        )


@pytest.mark.parametrize("strides", ["columns furthest apart", "not in pairs"])
def test_tokens_may_lie_anyhow(strides: str, inputs: dict[str, Any]) -> None:
    tokens = inputs.pop("tokens").detach()
    room = torch.zeros(3, 64, 65, dtype=torch.bfloat16)[..., 1:]
    moved = tokens.mT.contiguous().mT if strides == "columns furthest apart" else room.copy_(tokens)
    assert torch.equal(attention({"tokens": moved, **inputs}, "cuda"), attention({"tokens": tokens, **inputs}, "cuda"))


def test_weights_may_lie_anywhere_in_a_buffer_and_be_of_two_dtypes(inputs: dict[str, Any]) -> None:
    expected = attention(inputs, "cuda")
    for name in ("qkv_weight", "positions"):
        whole = torch.zeros(inputs[name].numel() + 1, dtype=torch.bfloat16)
        inputs[name] = whole[1:].view_as(inputs[name]).copy_(inputs[name].detach())
    assert torch.equal(attention(inputs, "cuda"), expected)
    inputs["norm_weight"] = inputs["norm_weight"].float()
    assert torch.equal(attention(inputs, "cuda"), expected)


def test_a_step_is_one_launch_forward_and_two_backward_beside_the_weights(
    inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[str] = []

    def count(entry: attention_cuda.Entry, *rest: Any) -> None:
        launches.append(entry.namespace)
        emulator.launch(entry, *rest)

    def count_triton(kernel: Any, *rest: Any, **constants: Any) -> None:
        launches.append(kernel.fn.__name__)
        launch(kernel, *rest, **constants)

    launch = attention_triton.launch
    monkeypatch.setattr(attention_cuda, "launch", count)
    monkeypatch.setattr(attention_triton, "launch", count_triton)
    attention(inputs, "cuda").sum().backward()
    assert launches == ["weights", "forward", "backward", "weight_gradients"]


def test_an_empty_batch_and_other_shapes_are_not_launched(
    inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cuda, "launch", None)
    empty = attention({**inputs, "tokens": inputs["tokens"][:0]}, "cuda")
    assert empty.shape == (0, 2, 64)
    device = torch.device("cpu")
    assert attention_cuda.fits(case(2), device)
    for place, size in ((0, 17), (1, 32), (2, 4), (6, 1)):
        sizes = list(case(2).sizes)
        sizes[place] = size
        assert not attention_cuda.fits(case(2)._replace(sizes=tuple(sizes)), device)
    assert not attention_cuda.fits(case(2)._replace(dtype=torch.float16), device)
    for capability, training, fits in (("80", True, False), ("80", False, True), ("75", False, False)):
        monkeypatch.setattr(dispatch, "capability", lambda device, capability=capability: capability)
        assert attention_cuda.fits(case(2, training=training), device) == fits


def test_the_operation_is_registered_as_pytorch_expects(inputs: dict[str, Any]) -> None:
    draw = Draw.of(1, 2, image=torch.arange(3))
    operation, mode = torch.ops.hsvit_kernels.grouped_attention, (8, 51, 0, 1e-5)
    torch.library.opcheck(operation.default, (*inputs.values(), draw.key, draw.image, *mode, False, True, True))
    tensors = [x.detach() for x in inputs.values()]
    out, *saved = operation(*tensors, draw.key, draw.image, *mode, False, True, True)
    backward = torch.ops.hsvit_kernels.grouped_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), *tensors, draw.key, draw.image, *saved, *mode))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_calls_it(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    device = inputs["tokens"].device
    monkeypatch.setitem(dispatch.models, device, "a device")
    monkeypatch.setitem(dispatch.verdicts, ("a device", case(2)), "cuda")
    eager, compiled = attention(inputs, "auto"), torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(eager, attention(inputs, "cuda"))
    assert torch.equal(compiled(inputs, "auto"), eager)


# First use


@pytest.mark.usefixtures("nothing_is_known")
class TestFirstUse:
    asked = case(1)
    cases: ClassVar[Cases] = {asked: (2, 1)}
    name = tried(str(asked), "cuda")

    @pytest.fixture(autouse=True)
    def triton_is_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its interpreter rounds to bf16 otherwise than GPUs do."""
        choose = grouped.choose
        monkeypatch.setattr(grouped, "choose", lambda *a, **k: choose(*a, **k).replace("triton", "reference"))

    def used(self) -> str:
        return dispatch.choose(self.asked, torch.device("cpu"), "")

    def test_the_faster_one_of_two_kernels_is_used(self) -> None:
        class Faster(StandIn):
            def milliseconds(self, step: Any) -> float:
                return 0.25 if dispatch.forced() == "cuda" else super().milliseconds(step)

        for machine, winner in ((Faster(), "cuda"), (StandIn("another"), "triton")):
            found = prepare(self.cases, machine=machine)
            assert [v.state for v in found.verdicts.values()] == ["right", "right"]
            assert self.used() == winner

    def test_what_is_wrong_or_raises_is_left_to_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(entry: attention_cuda.Entry, grid: Any, near: Any, tensors: Any, *numbers: float) -> None:
            emulator.launch(entry, grid, near, tensors, *numbers)
            if entry.namespace == "backward":
                tensors[-1][0, 0, 2, 5] += 1  # a bias of a value

        def refused(*_: Any) -> None:
            raise RuntimeError("CUDA: CUDA_ERROR_INVALID_VALUE")

        for number, (launch, state) in enumerate(((wrong, "wrong"), (refused, "raised"))):
            monkeypatch.setattr(attention_cuda, "launch", launch)
            found = prepare(self.cases, machine=StandIn(str(number)))
            assert found.verdicts[self.name].state == state
            assert self.used() == "triton"
