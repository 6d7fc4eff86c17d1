"""Weights as other programs save them, and files that are none."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.engine.foreign import import_deit, import_scala, import_weights
from hsvit_ds.engine.interop import load_model
from hsvit_ds.errors import RefusedError
from hsvit_ds.models.weights import read_foreign


@pytest.fixture(scope="module")
def deit() -> torch.nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 1, "num_classes": 10}
    return timm.create_model("deit_tiny_patch16_224", **small)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


WAYS: dict[str, Any] = {
    "plain": lambda s: s,
    "DDP, DeiT's": lambda s: {"model": prefixed("module.", s), "args": argparse.Namespace(lr=1.0), "epoch": 3},
    "compiled": lambda s: {"state_dict": prefixed("_orig_mod.", s), "epoch": 3},
    "DDP of compiled": lambda s: {"state_dict": prefixed("module._orig_mod.", s)},
    "compiled DDP": lambda s: {"state_dict": prefixed("_orig_mod.module.", s)},
    "compiled blocks": lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()},
    "a NumPy metric": lambda s: {"state_dict": s, "metric": np.float64(71.2), "epoch": np.int64(3)},
    "timm's train.py": lambda s: {
        "state_dict": s,
        "state_dict_ema": {k: v + 1 for k, v in s.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "amp_scaler": {"scale": 1.0},
    },
    "model_state": lambda s: {"model_state": s},
    "nested twice": lambda s: {"checkpoint": {"model": s, "epoch": 1}},
    "an unknown name": lambda s: {"student": s, "epoch": 1},
    "half precision": lambda s: {k: v.half() for k, v in s.items()},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_deit_is_read_however_it_was_saved(way: str, deit: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(WAYS[way](deit.state_dict()), tmp_path / "weights.pth")
    model = import_weights(
        read_foreign(tmp_path / "weights.pth"),
        image_size=0,
        pool_strides=(),
        heads=0,
        smallest=1,
        granularity=0.25,
        side="leading",
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = deit.eval()(images), model.eval()(images)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-2 if way == "half precision" else 1e-5)


def test_heads_that_the_shapes_do_not_tell_have_to_be_given(tmp_path: Path) -> None:
    small = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 96, "num_heads": 3, "num_classes": 10}
    state = timm.create_model("deit_tiny_patch16_224", **small).state_dict()
    for read in (import_deit, lambda s, **k: import_scala(s, smallest=0.5, granularity=0.5, **k)):
        with pytest.raises(RefusedError, match=r"96 channels are no multiple of 64.*--heads"):
            read(state)  # type: ignore[operator]
        assert read(state, heads=3).config.heads == 3  # type: ignore[operator]
    torch.save(state, tmp_path / "w.pth")
    command = ["import", str(tmp_path / "w.pth"), "-o", str(tmp_path / "w.safetensors")]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, "--heads" in result.stderr) == (2, True)
    assert CliRunner().invoke(app, [*command, "--heads", "3"]).exit_code == 0
    assert load_model(tmp_path / "w.safetensors").config.heads == 3  # type: ignore[union-attr]


NONE_OF_OURS: dict[str, Any] = {
    "a ResNet": lambda: timm.create_model("resnet18", num_classes=2).state_dict(),
    "a Swin Transformer": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=2).state_dict(),
    "a ConvNeXt": lambda: timm.create_model("convnext_atto", num_classes=2).state_dict(),
    "of no network that is known here": lambda: {"a.weight": torch.ones(2), "b.weight": torch.ones(2)},
}


@pytest.mark.parametrize("kind", NONE_OF_OURS)
def test_what_is_none_of_ours_is_told_what_it_seems_to_be(kind: str, tmp_path: Path) -> None:
    torch.save(NONE_OF_OURS[kind](), tmp_path / "w.pth")
    result = CliRunner().invoke(app, ["import", str(tmp_path / "w.pth"), "-o", str(tmp_path / "w.safetensors")])
    assert result.exit_code == 2
    assert f"seem to be {kind}" in result.stderr
    assert "pool-strides" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "metric": 1.0}, tmp_path / "empty.pth")
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 22\n")
    for name, said in (("empty", "it has: epoch, metric"), ("lfs", "a pointer of Git LFS, not the weights")):
        result = CliRunner().invoke(
            app, ["import", str(tmp_path / f"{name}.pth"), "-o", str(tmp_path / "w.safetensors")]
        )
        assert (result.exit_code, said in result.stderr) == (2, True), result.output
