"""CLS sums may travel in fewer bits: what arrives is the same wherever submodules are."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hsvit_ds.grid.rounding import FORMATS, pack, rounded, size, unpack

from ..ranks import work

IMAGES, SUBMODULES, FEATURES = 6, 4, 64


def sums() -> Tensor:
    """[B, M, D] of very different sizes, with what overflows and what is nothing among them."""
    x = torch.randn(IMAGES, SUBMODULES, FEATURES, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1e-30, 1e-3, 1.0, 1e6])[:, None]
    x[0] = 0
    x[1, 2, 3], x[2, 0, 0], x[3, 3, 5] = float("nan"), float("inf"), float("-inf")
    return x


@pytest.mark.parametrize("form", FORMATS[1:])
def test_what_is_unpacked_is_what_is_rounded(form: str) -> None:
    packed = pack(sums(), form)
    assert packed.shape == (IMAGES, SUBMODULES, size(FEATURES, form))
    torch.testing.assert_close(unpack(packed, form), rounded(sums(), form), rtol=0, atol=0, equal_nan=True)


def test_int8_has_a_scale_for_each_submodule_and_halves_go_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 0.49], [1270.0, 5.0, 15.0, -126.0, 1.0]])
    assert rounded(x, "int8").tolist() == [[127, 0, 2, -2, 0], [1270, 0, 20, -130, 0]]
    drawn = torch.randn(100, FEATURES, generator=torch.Generator().manual_seed(0))
    step = drawn.abs().amax(-1, keepdim=True) / 127
    assert float(((rounded(drawn, "int8") - drawn).abs() / step).max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_finite_stays_so(form: str) -> None:
    x, y = sums(), rounded(sums(), form)
    assert torch.equal(y.isfinite().all(-1), x.isfinite().all(-1))
    assert torch.equal(y[0], torch.zeros_like(y[0]))


@pytest.mark.parametrize("form", FORMATS)
def test_the_gradient_passes_the_rounding_as_it_is(form: str) -> None:
    x = torch.randn(3, 2, 5, requires_grad=True)
    given = torch.randn(3, 2, 5)
    rounded(x, form).backward(given)
    assert torch.equal(x.grad, given)


@pytest.mark.heavy
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_get_what_one_process_computes(ranks: int, tmp_path: Path) -> None:
    torch.save(sums(), tmp_path / "sums.pt")
    found: list[dict[str, Any]] = work(
        "exchanges", ranks, tmp_path, {"ranks": ranks, "sums": str(tmp_path / "sums.pt")}
    )
    here = SUBMODULES // ranks
    fp32 = IMAGES * FEATURES * 4
    expected = {"fp32": fp32, "bf16": fp32 // 2 if here == 1 else fp32, "int8": here * IMAGES * (FEATURES + 4)}
    assert Fraction(fp32, IMAGES * (FEATURES + 4)) > Fraction(15, 4)
    for rank in found:
        torch.testing.assert_close(rank["fp32"][0], rank["before"], rtol=0, atol=0, equal_nan=True)
        for form in FORMATS:
            answer, gradient, sent = rank[form]
            alone = rounded(sums(), form).sum(1)
            # What is summed before it travels is summed in another order.
            exact = 0.0 if sent < fp32 else 1e-6
            torch.testing.assert_close(answer, alone, rtol=exact, atol=0, equal_nan=True)
            at_the_sum = torch.arange(IMAGES * FEATURES).reshape(IMAGES, 1, FEATURES).float()
            finite = sums().isfinite().all((1, 2))  # a step with others is not applied
            assert torch.equal(gradient[finite], at_the_sum.expand(-1, here, -1)[finite])
            assert sent == expected[form]
