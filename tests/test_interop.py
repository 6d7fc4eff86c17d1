"""Weights of the published code come in, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.errors import RefusedError
from hsvit_ds.interop import import_hsvit, load_model
from tools.published import published

from .models.test_hsvit import randomised


def weights(lightning: bool = False) -> tuple[Any, dict[str, Any]]:
    model = randomised(published("C2A2", 32, classes=7)).eval()
    state = model.state_dict()
    if lightning:
        return model, {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3}
    return model, state


@pytest.mark.parametrize("lightning", [False, True])
def test_the_command_imports_published_weights(lightning: bool, tmp_path: Path) -> None:
    model, state = weights(lightning)
    torch.save(state, tmp_path / "published.ckpt")
    arguments = ["import", str(tmp_path / "published.ckpt"), "-o", str(tmp_path / "ours.safetensors")]
    result = CliRunner().invoke(app, [*arguments, "--image-size", "32", "--pool-strides", "2,2"])
    assert result.exit_code == 0, result.output
    x = torch.randn(4, 3, 32, 32)
    ours = load_model(tmp_path / "ours.safetensors")
    torch.testing.assert_close(ours(x), model(x), rtol=1e-5, atol=1e-5)


def damaged(key: str) -> dict[str, Any]:
    return {k: v for k, v in weights()[1].items() if k != key}


@pytest.mark.parametrize(
    ("state", "size", "message"),
    [
        (damaged("model.embed_projection.0.bias"), 32, "lack model.embed_projection.0.bias"),
        (weights()[1] | {"surplus": torch.zeros(1)}, 32, "unknown keys in the published weights: surplus"),
        (weights()[1], 64, r"embed_projection\.0\.weight has shape \(64, 64\), which does not fit \(1, 64, 256\)"),
        ({"fc.weight": torch.zeros(2, 2)}, 32, "these are not weights of the published HSViT code"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(state: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        import_hsvit(state, image_size=size, pool_strides=(2, 2))


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_a_file_that_would_run_code_is_not_unpickled(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    arguments = ["import", str(tmp_path / "evil.ckpt"), "-o", str(tmp_path / "o.safetensors")]
    result = CliRunner().invoke(app, [*arguments, "--image-size", "32", "--pool-strides", "2,2"])
    assert result.exit_code == 2
    assert "executed" not in capfd.readouterr().out + result.output
    assert "is not unpickled" in result.output
