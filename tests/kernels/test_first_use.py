"""On a device model that is new, kernels prove themselves: what is wrong, slower or raises is left to the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hsvit_kernels import (
    Case,
    StepState,
    configurations,
    dispatch,
    first_use,
    grouped_attention,
    listing,
    prepare,
    sliced_linear,
)
from hsvit_kernels import findings as files
from hsvit_kernels.cases import Cases
from hsvit_kernels.random import Draw
from tests.kernels.test_grouped_attention import arguments

LAYER = Case("linear_forward", torch.float16, torch.float16, (16, 16, 1, 0, 0, 0))
INPUT = Case("linear_input_gradient", torch.float16, torch.float16, (16, 16))
WEIGHT = Case("linear_weight_gradient", torch.float16, torch.float16, (16, 16, 1))
ATTENTION = Case("grouped_attention", torch.float16, torch.float32, (3, 16, 2, 1, 1, 1, 0))
ALL: Cases = {LAYER: (8,), INPUT: (8,), WEIGHT: (8,), ATTENTION: (1, 1)}
ONE: Cases = {LAYER: (8,)}


class StandIn(first_use.Machine):
    """A device that interprets kernels, and takes `ms` for one where the reference takes 1."""

    def __init__(self, name: str = "stand-in", ms: float = 0.5, driver: str = "1") -> None:
        super().__init__("cpu")
        self.name, self.ms, self.driver = name, ms, driver

    @property
    def about(self) -> dict[str, str]:
        return {"device": self.name, "driver": self.driver}

    def milliseconds(self, step: Callable[[], Any]) -> float:
        return 1.0 if dispatch.forced() == "reference" else self.ms

    def wait(self) -> None:
        pass

    def release(self) -> None:
        pass


@pytest.fixture(autouse=True)
def nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    if not dispatch.INTERPRETED and request.node.get_closest_marker("gpu") is None:
        pytest.skip("stand-in devices need Triton's interpreter, which is not chosen where there is a GPU")
    monkeypatch.setenv("HSVIT_KERNELS_CACHE", str(tmp_path / "cache"))
    known: tuple[dict[Any, Any], ...] = (dispatch.models, dispatch.verdicts, configurations.chosen)
    before = [dict(of) for of in known]
    for of in known:
        of.clear()
    yield
    for of, was in zip(known, before, strict=True):
        of.clear()
        of.update(was)


def spoil(monkeypatch: pytest.MonkeyPatch, what: Callable[..., None]) -> None:
    """Let `what` happen behind every launch of a linear layer's kernel: it gets the output and how many went before."""
    launch, count = dispatch.launch, [0]

    def spoiled(kernel: Any, grid: Any, near: Any, *args: Any, **constants: Any) -> None:
        launch(kernel, grid, near, *args, **constants)
        what(args[4].base, count[0])
        count[0] += 1

    monkeypatch.setattr(sys.modules["hsvit_kernels.sliced_linear"], "launch", spoiled)


def verdict(machine: first_use.Machine, cases: Cases = ONE) -> files.Verdict:
    return prepare(cases, machine=machine).verdicts[str(next(iter(cases)))]


def layer(bias: bool = True) -> str:
    """Which implementation computes the layer of LAYER when nothing is forced."""
    launches: list[Any] = []
    module = sys.modules["hsvit_kernels.sliced_linear"]
    launch = module.launch
    module.launch = lambda *args, **constants: (launches.append(args[0]), launch(*args, **constants))
    try:
        x, weight = torch.randn(8, 16).half(), torch.randn(32, 32).half()
        sliced_linear(x, weight, torch.zeros(32).half() if bias else None, out_features=16)
    finally:
        module.launch = launch
    return "kernel" if launches else "reference"


def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr(first_use, "trial", fail)


def test_what_is_right_and_faster_is_used_and_nothing_else() -> None:
    assert layer() == "reference"
    found = prepare(ALL, machine=StandIn())
    assert {name: v.state for name, v in found.verdicts.items()} == dict.fromkeys(map(str, ALL), "right")
    assert all(v.wins and 0 < v.excess < 1 and (v.ms, v.reference_ms) == (0.5, 1.0) for v in found.verdicts.values())
    assert set(found.launches) == {
        "linear_forward 0", "linear_input_gradient 0", "linear_weight_gradient 0",
        "attention_forward 16x64x1", "attention_backward 16x64x1", "attention_products 64",
    }  # fmt: skip
    assert layer() == "kernel"
    assert layer(bias=False) == "reference"  # another case


def test_slower_kernels_are_right_but_not_used() -> None:
    found = verdict(StandIn(ms=1.5))
    assert (found.state, found.why, found.wins) == ("right", "slower", False)
    assert layer() == "reference"


def test_wrong_numbers_are_never_used_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda y, _: y[3, 5].add_(0.5))
    found = verdict(StandIn())
    assert (found.state, found.wins) == ("wrong", False)
    assert found.why == f"result: {found.excess:.3g} times the error that is allowed"
    assert found.excess > 1
    assert layer() == "reference"


def test_numbers_that_are_not_finite_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda y, _: y[0, 0].fill_(float("nan")))
    assert verdict(StandIn()).why == "result: inf times the error that is allowed"


def test_bits_that_move_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda y, count: y[0, 0].add_(2.0**-9 * (count % 2)))
    found = verdict(StandIn())
    assert (found.state, found.why) == ("wrong", "result: other bits when computed again")


def test_a_wrong_mask_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["hsvit_kernels.trials"]
    mask = module.dropout_mask
    monkeypatch.setattr(module, "dropout_mask", lambda *a, **k: mask(*a, **k) ^ (dispatch.forced() == "triton"))
    assert verdict(StandIn(), {ATTENTION: (1, 1)}).why == "mask: inf times the error that is allowed"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
            "RuntimeError: Failed",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "OutOfMemoryError: CUDA out of memory"),
        (ValueError("\n  fp8 is not for this GPU\nmore"), "ValueError: fp8 is not for this GPU"),
    ],
    ids=["no compiler", "no memory", "too old"],
)
def test_what_raises_is_left_to_the_reference_and_tried_at_the_next_start(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as broken:
        spoil(broken, fail)
        found = prepare(ONE, machine=StandIn())
    assert found.verdicts[str(LAYER)].state == "raised"
    assert found.verdicts[str(LAYER)].why.startswith(said)
    assert "\n" not in found.verdicts[str(LAYER)].why
    assert found.notes == []
    assert layer() == "reference"
    assert verdict(StandIn()).wins
    assert layer() == "kernel"


def test_an_entry_of_the_table_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    place = ("linear_forward", (0,))
    good, bad = {"BM": 16, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 1}, {"BM": 3, "num_warps": 4}
    monkeypatch.setitem(configurations.TABLE, place, {"80": bad, "any": good})
    found = prepare(ONE, machine=StandIn())
    assert found.verdicts[str(LAYER)].wins
    assert found.launches == {"linear_forward 0": good}


def test_the_fastest_of_the_tables_entries_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    place = ("linear_forward", (0,))
    entries = [{"BM": 16 * n, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 1} for n in (1, 2, 4, 8)]
    names = ("any", "80", "90", "100")
    monkeypatch.setitem(configurations.TABLE, place, dict(zip(names, entries, strict=True)))

    class Timed(StandIn):
        def milliseconds(self, step: Callable[[], Any]) -> float:
            step()
            rows = configurations.chosen[self.name, place]["BM"]
            return 0.1 * abs(rows - 32) if dispatch.forced() == "triton" else 5.0

    assert verdict(Timed()).ms == 0
    assert configurations.chosen["stand-in", place] == entries[1]


def test_fp32_is_tried_with_its_own_launches() -> None:
    case = Case("linear_forward", torch.float32, torch.float32, LAYER.sizes)
    found = prepare({case: (8,)}, machine=StandIn())
    assert found.verdicts[str(case)].wins
    assert not found.launches


def test_listing_gives_every_case_once_with_its_largest_extent() -> None:
    a: dict[str, Any] = {**arguments(dtype=torch.float32), "heads": 2}
    weight, bias = torch.zeros(96, 64, requires_grad=True), torch.zeros(96)
    with listing() as found, torch.autocast("cpu", torch.bfloat16):
        draw = Draw.of(0, image=torch.arange(len(a["tokens"])))
        y = grouped_attention(**a, dropout=0.2, draw=draw)
        assert y.dtype == torch.bfloat16
        assert y.requires_grad
        for rows in (5, 7, 6):
            y = sliced_linear(torch.zeros(rows, 64), weight, bias, out_features=48, gelu=True, state=StepState())
            assert not y.any()
        y = sliced_linear(y, weight, out_features=64, side="trailing")
        sliced_linear(y[:, :3], weight, out_features=64)  # 6 bytes: not for the kernels
        with torch.no_grad():
            grouped_attention(**a)
        grouped_attention(**{name: t if name == "heads" else t.double() for name, t in a.items()})
    assert [str(case) for case in found] == [
        "grouped_attention bf16 (weights fp32) T6 D16 heads2 depth2 dropout training",
        "linear_forward bf16 n48 k64 bias gelu saved",
        "linear_weight_gradient bf16 n48 k64 bias",
        "linear_forward bf16 n64 k48",
        "linear_input_gradient bf16 n64 k48",
        "grouped_attention bf16 (weights fp32) T6 D16 heads2 depth2",
    ]
    assert found[next(c for c in found if "gelu" in str(c))] == (7,)


def test_without_the_first_use_the_log_says_what_to_call(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._told.clear()
    with caplog.at_level("INFO", logger="hsvit_kernels"):
        assert dispatch.choose(LAYER, torch.device("cuda", 0), "") == "reference"
        prepare(ONE, machine=StandIn(ms=2))
        layer()
    assert [record.message for record in caplog.records] == [
        "linear_forward: reference (not tried here: hsvit_kernels.prepare)",
        "linear_forward: reference (as the first use decided)",
    ]


@pytest.mark.gpu
def test_every_case_of_the_table_proves_itself_on_a_gpu() -> None:
    cases: Cases = {}
    for kernel, shape in configurations.TABLE:
        if kernel == "attention_forward":
            tile, padded, full = shape
            width, heads = (padded, padded // 8) if full else (padded - 8, 8)
            sizes = (tile + 1, width, heads, 2, 1, 1, 0)
            cases[Case("grouped_attention", torch.bfloat16, torch.float32, sizes)] = (64, 16)
    for n, k in ((1536, 384), (96, 96)):
        cases[Case("linear_forward", torch.bfloat16, torch.bfloat16, (n, k, 1, 1, 1, 1))] = (8192,)
        cases[Case("linear_input_gradient", torch.bfloat16, torch.bfloat16, (n, k))] = (8192,)
        cases[Case("linear_weight_gradient", torch.bfloat16, torch.bfloat16, (n, k, 1))] = (8192,)
    found = prepare(cases)
    assert {name: v.why for name, v in found.verdicts.items() if v.state != "right"} == {}
    assert not found.notes
