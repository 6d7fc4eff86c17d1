"""The benchmarks compute the same thing in every implementation, those that need a GPU too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tars import data_set
from tools.benchmarks import attention_baselines as baselines
from tools.benchmarks import data as data_benchmarks
from tools.benchmarks import data_alternatives
from tools.benchmarks import index as index_benchmarks
from tools.benchmarks import kernels as benchmarks

ROOFS = benchmarks.Roofs(1.0, 1.0)


@pytest.mark.heavy
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


def test_flex_attention_is_the_same_arithmetic() -> None:
    case = baselines.Attention(2, 2, 5, 16, 2, heads=2)
    a = baselines.attention_inputs(case, "cpu", torch.float32)
    with torch.no_grad():
        found = baselines.batched(a, case, 0.0, baselines.flexible)
        torch.testing.assert_close(found, baselines.batched(a, case, 0.0))


def test_the_four_width_step_runs_in_every_implementation() -> None:
    tiny = {"batch": 1, "tokens": 4, "width": 64, "depth": 1, "heads": 2}
    rows = list(benchmarks.four_widths("cpu", ROOFS, **tiny))
    assert [row["implementation"] for row in rows] == [
        "hsvit_kernels, Triton",
        "hsvit_kernels, cuBLAS",
        "autograd slicing",
    ]


@pytest.fixture
def data(tmp_path: Path) -> data_alternatives.Data:
    (tmp_path / "place").mkdir()
    folder = data_set(tmp_path / "set", train=26)
    return data_alternatives.prepare(folder, tmp_path / "place", images=20, shards=2, size=16, batch=8)


def test_every_way_to_read_gives_every_image_of_a_pass(data: data_alternatives.Data) -> None:
    assert len(data.index) == 26  # all three shards: two hold 18
    ways = [
        data_alternatives.ours(data, data.shards(filter="bilinear")),
        data_alternatives.first(data_alternatives.webdataset_images(data)),
        data_alternatives.first(data_alternatives.image_folder(data)),
        data_alternatives.image_folder_by_workers(data, workers=0, passes=1),
    ]
    for batches in ways:
        shapes = [tuple(batch.shape) for batch in batches]
        assert shapes == [(8, 3, 16, 16)] * 3 + [(2, 3, 16, 16)]
    assert sorted(data_alternatives.reads(data)) == sorted(data_alternatives.webdataset_reads(data))


def test_an_index_is_measured_beside_the_way_of_before() -> None:
    rows = index_benchmarks.rows(1, {"small": (2000, 30), "smaller": (100, 4)})
    costs = {row["cost"] for row in rows}
    assert {"open, ms", "epoch, ms", "step, window 65,536, ms", "before: epoch, ms"} < costs
    assert all(float(row["small"]) >= 0 and float(row["smaller"]) >= 0 for row in rows)


@pytest.mark.heavy
def test_the_data_tables_have_a_row_for_every_alternative(data: data_alternatives.Data) -> None:
    paths = {"hsvit-ds, bilinear", "hsvit-ds, bicubic"}
    paths |= {f"{name}, Pillow, torchvision" for name in ("webdataset", "ImageFolder")}

    def names(rows: data_benchmarks.Rows) -> set[object]:
        return {next(iter(row.values())) for row in rows}

    assert names(data_benchmarks.reader(data, 1)) == {"hsvit-ds", "webdataset"}
    assert names(data_benchmarks.decoders(data, 1, workers=2)) == {"simplejpeg", "torchvision", "Pillow"}
    assert names(data_benchmarks.path(data, 1)) == paths == set(data_alternatives.by_workers(data, 1, 1))
    assert names(data_benchmarks.trainer(data, 1, workers=0)) == {0, 1}
