"""What only a GPU can show of the engine; `pytest -m gpu` runs it where deepspeed is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .ranks import work

pytestmark = pytest.mark.gpu


# PyTorch's convolutions take TF32 for fp32, and other algorithms for other shapes.
EXACT = {"DS_ACCELERATOR": "cuda", "NVIDIA_TF32_OVERRIDE": "0"}


def case(*overrides: str) -> dict[str, Any]:
    fixed = ["optimizer.name=sgd", "engine.precision=fp32", "engine.kernels=triton"]
    return {"base": "hsvit", "cases": {"case": [*fixed, *overrides]}}


def test_two_ranks_on_one_gpu_over_gloo_equal_one_process(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    alone = case("grid.submodule_ranks=1", "grid.backend=gloo")
    apart = case("grid.submodule_ranks=2", "grid.backend=gloo")
    expected = work("steps", 1, tmp_path / "one", alone, **EXACT)[0]["case"]
    found = [rank["case"] for rank in work("steps", 2, tmp_path / "two", apart, **EXACT)]
    written = {key: tensor for rank in found for key, tensor in rank["state"].items()}
    assert found[0]["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    for key, tensor in expected["state"].items():
        torch.testing.assert_close(written[key].cpu(), tensor.cpu(), rtol=1e-5, atol=1e-5)


def test_nccl_with_one_rank_equals_gloo(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    norms = {}
    for backend in ("gloo", "nccl"):
        one = case("grid.submodule_ranks=1", f"grid.backend={backend}")
        norms[backend] = work("steps", 1, tmp_path / backend, one, **EXACT)[0]["case"]["norms"]
    assert norms["nccl"] == pytest.approx(norms["gloo"], rel=1e-5)  # cuDNN adds in any order


def test_a_run_tries_its_kernels_and_trains_with_those_that_win(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    one = {"base": "hsvit", "cases": {"case": ["grid.submodule_ranks=1"]}}
    cache = {"HSVIT_KERNELS_CACHE": str(tmp_path / "cache"), "DS_ACCELERATOR": "cuda"}
    plain = work("steps", 1, tmp_path / "plain", one, **cache, HSVIT_KERNELS="reference")[0]["case"]
    chosen = work("steps", 1, tmp_path / "chosen", one | {"choose": True}, **cache)[0]["case"]
    assert chosen["norms"] == pytest.approx(plain["norms"], rel=0.05)  # bf16
    (file,) = (tmp_path / "chosen").rglob("kernels.json")
    assert set(json.loads(file.read_text())["used"].values()) <= {True, False}
    assert {v["state"] for v in json.loads(file.read_text())["machines"][0]["verdicts"].values()} == {"right"}


@pytest.mark.parametrize("base", ["hsvit", "scala"])
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_captured_steps_equal_eager_ones_and_wait_for_nothing(base: str, kernels: str, tmp_path: Path) -> None:
    """Nor do eager ones. Images on the device, dropout, drop path, mixing, clipping, an average."""
    pytest.importorskip("deepspeed")
    found = {}
    for capture in ("true", "false"):
        keys = ["grid.submodule_ranks=1", "engine.zero_stage=0", "ema.decay=0.9", f"engine.capture={capture}"]
        one = case(*keys, f"engine.kernels={kernels}") | {"base": base, "waiting": "error"}
        found[capture] = work("steps", 1, tmp_path / capture, one, **EXACT)[0]["case"]
    assert found["true"]["not_captured"] == ""
    assert found["true"]["norms"] == pytest.approx(found["false"]["norms"], rel=1e-5)
    for key, tensor in found["true"]["state"].items():
        torch.testing.assert_close(tensor.cpu(), found["false"]["state"][key].cpu(), rtol=1e-5, atol=1e-5)


def test_the_compiled_crop_equals_the_eager_one() -> None:
    from hsvit_ds.data import augment
    from hsvit_ds.data.sets import photographs

    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(256, (8, 3, 64, 64), generator=generator).to(torch.uint8)
    views = torch.rand(8, augment.VIEW, generator=generator) * 0.5 + torch.tensor([0, 0, 0.5, 0.5, 0, 0.7, 0.7, 0.7])
    views[:, 4] = views[:, 4].round()
    facts = photographs(48, 10)
    expected = augment.cut_out(canvas, views, 48, facts)
    found = augment.cut_out(canvas.cuda(), views.cuda(), 48, facts)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
