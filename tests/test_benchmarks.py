"""The benchmarks that need a GPU at least compute the same thing in every implementation."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tools import attention_baselines as baselines
from tools import kernel_benchmarks as benchmarks

ROOFS = benchmarks.Roofs(1.0, 1.0)


def test_attention_implementations_agree() -> None:
    case = baselines.Attention(2, 2, 5, 16, 2, heads=2)
    rows = list(benchmarks.attention_rows(case, "cpu", torch.float32, ROOFS))
    assert {row["implementation"] for row in rows} >= {"hsvit_kernels", "batched, SDPA", "loop over groups"}
    assert len(rows) == 4 * 4
    assert max(float(row["error"]) for row in rows if row["error"]) < 1e-5


def test_the_loop_over_groups_is_the_published_arithmetic() -> None:
    case = baselines.Attention(2, 2, 5, 16, 2, heads=2)
    a = baselines.attention_inputs(case, "cpu", torch.float32)
    torch.manual_seed(0)
    run, modules = baselines.loop(a, case, 0.0)
    layers = modules[len(modules) // 2 :]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            at = divmod(index, case.depth)
            layer.in_proj_weight.copy_(a["qkv_weight"][at])
            layer.in_proj_bias.copy_(a["qkv_bias"][at])
            layer.out_proj.weight.copy_(a["out_weight"][at])
            layer.out_proj.bias.copy_(a["out_bias"][at])
        torch.testing.assert_close(run(), baselines.batched(a, case, 0.0))


@pytest.mark.parametrize(("gelu", "residual"), [(True, False), (False, True)])
def test_linear_implementations_agree(gelu: bool, residual: bool) -> None:
    case = benchmarks.Linear("layer", 40, (96, 64), 0.5, gelu, residual)
    rows = list(benchmarks.linear_rows(case, "cpu", torch.float32, ROOFS))
    assert len(rows) == 2 * 3
    assert max(float(row["error"]) for row in rows) < 1e-5


def test_without_a_gpu_every_row_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    benchmarks.run(tmp_path)
    assert "no CUDA device" in capsys.readouterr().out
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["ms p50"] for row in rows} == {"not run"}
    assert {row["operation"] for row in rows} >= {"grouped attention", "DeiT-S blocks, four widths"}


def test_the_four_width_step_runs_in_every_implementation() -> None:
    tiny = {"batch": 1, "tokens": 4, "width": 64, "depth": 1, "heads": 2}
    rows = list(benchmarks.four_widths("cpu", ROOFS, **tiny))
    assert [row["implementation"] for row in rows] == [
        "hsvit_kernels, Triton",
        "hsvit_kernels, cuBLAS",
        "autograd slicing",
    ]
