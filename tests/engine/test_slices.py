"""Several widths in one step: gradients gathered in place go through the engine as if autograd had made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..ranks import work

pytestmark = pytest.mark.heavy

CASES = {
    f"ZeRO-{stage}, {kernels}, {accumulation} micro batches": {
        "zero_stage": stage,
        "gather": True,
        "kernels": kernels,
        "accumulation": accumulation,
    }
    for stage in (0, 1, 2, 3)
    for kernels, accumulation in [("reference", 1), ("triton", 2)]
}


def test_gathered_gradients_equal_autograds_on_two_ranks_with_one_reduction(tmp_path: Path) -> None:
    autograd = {"autograd": {"zero_stage": 0, "gather": False}}
    expected = work("slices", 1, tmp_path / "one", autograd)[0]["autograd"]
    assert min(expected["norms"]) > 0.1
    found = work("slices", 2, tmp_path / "two", CASES)
    for name in CASES:
        for rank in found:
            assert rank[name]["norms"] == pytest.approx(expected["norms"], rel=1e-6), name
            for key, weight in expected["weights"].items():
                torch.testing.assert_close(rank[name]["weights"][key], weight, rtol=1e-6, atol=1e-6)
        reductions = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
        gradients = [n for kind, n in found[0][name]["calls"] if kind in reductions and n > 100]
        assert len(gradients) == 1, (name, gradients)
        assert expected["trained"] <= gradients[0] <= expected["trained"] + 8  # padding of stage 3
