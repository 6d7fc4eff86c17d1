"""Weights of the published code come in, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.engine.foreign import import_deit, import_hsvit, import_mobilenet, import_scala, import_uniformer
from hsvit_ds.engine.interop import load_model
from hsvit_ds.errors import RefusedError
from hsvit_ds.models import mobilenet, uniformer, uniformer_config
from hsvit_ds.models.slimmable import Config as Widths
from tools.benchmarks.published import published
from tools.benchmarks.published_scala import Network
from tools.benchmarks.published_uniformer import UniFormer as PlainUniFormer

from ..models import test_families as families
from ..models.test_hsvit import randomised
from ..models.test_hydravit import hydravit, small


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


def scala_weights() -> tuple[Network, dict[str, Any]]:
    torch.manual_seed(0)
    model = Network(128, 2, 2, image_size=32, patch=8, classes=7)
    return model, {"model": {f"module.{k}": v for k, v in model.state_dict().items()}}


def test_the_command_imports_weights_of_the_published_scala(tmp_path: Path) -> None:
    theirs, state = scala_weights()
    torch.save(state, tmp_path / "scala.pth")
    arguments = ["import", str(tmp_path / "scala.pth"), "-o", str(tmp_path / "ours.safetensors")]
    result = CliRunner().invoke(app, [*arguments, "--smallest", "0.25", "--granularity", "0.125"])
    assert result.exit_code == 0, result.output
    ours = load_model(tmp_path / "ours.safetensors")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        for width in ours.config.widths.all:
            z, u = theirs(images, float(width))
            torch.testing.assert_close(ours(images, width=width), (z + u) / 2, rtol=1e-5, atol=1e-5)
    assert import_scala(state, smallest=0.5, granularity=0.5, side="trailing").config.widths == Widths(
        smallest=0.5, granularity=0.5
    )


def test_the_command_imports_weights_of_the_published_hydravit(tmp_path: Path) -> None:
    theirs = small(embedding=192, heads=3, widths=Widths()).state_dict()
    torch.save({"state_dict": theirs}, tmp_path / "hydravit.pth")
    arguments = ["import", str(tmp_path / "hydravit.pth"), "-o", str(tmp_path / "ours.safetensors"), "--hydravit"]
    result = CliRunner().invoke(app, [*arguments, "--smallest", "0.333333", "--granularity", "0.333333"])
    assert result.exit_code == 0, result.output
    ours, images = load_model(tmp_path / "ours.safetensors"), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        for heads, width in enumerate(ours.config.widths.all, 1):
            expected = hydravit(theirs, images, heads, own=64)
            torch.testing.assert_close(ours(images, width=width), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_weights_of_timms_deit_come_in(name: str, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(name, img_size=32, patch_size=8, depth=2, num_classes=7, init_values=0.5).eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit.pth")
    arguments = ["import", str(tmp_path / "deit.pth"), "-o", str(tmp_path / "ours.safetensors")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = load_model(tmp_path / "ours.safetensors")(images)
        torch.testing.assert_close(found, theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dist.bias": None}, r"do not fit .*: head_dist.bias is missing"),
        ({"head_dist.bias": None, "norm.bias": None}, r"norm.bias is missing; head_dist.bias is missing"),
        ({"surplus": torch.zeros(1)}, r"surplus is left over"),
        ({"norm.weight": torch.zeros(3)}, r"norm.weight has shape \(3,\), not \(128,\)"),
        ({"head.weight": None}, "these are not weights of a DeiT: .* head.weight"),
        (
            {"pos_embed": torch.zeros(1, 20, 128)},
            r"pos_embed has shape \(1, 20, 128\): not the patches of a square image",
        ),
    ],
)
def test_weights_of_a_deit_that_do_not_fit_are_refused_by_key(change: dict[str, Any], message: str) -> None:
    state = {**scala_weights()[0].state_dict(), **change}
    with pytest.raises(RefusedError, match=message):
        import_deit({"model": {k: v for k, v in state.items() if v is not None}})


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


@pytest.mark.parametrize("share", ["050", "100", "140"])
def test_the_command_imports_timms_mobilenetv2(share: str, tmp_path: Path) -> None:
    import timm

    theirs = families.randomised(timm.create_model(f"mobilenetv2_{share}", num_classes=7)).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    arguments = ["import", str(tmp_path / "timm.pth"), "-o", str(tmp_path / "ours.safetensors")]
    result = CliRunner().invoke(app, [*arguments, "--image-size", "64"])
    assert result.exit_code == 0, result.output
    ours, x = load_model(tmp_path / "ours.safetensors").double(), torch.randn(4, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs.double()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", uniformer_config.VARIANTS)
def test_the_command_imports_a_published_uniformer(variant: str, tmp_path: Path) -> None:
    """With the names of its code, by which the variant is told."""
    config = uniformer.Config(variant=variant).resolved(64 if "XS" not in variant else 128)
    theirs = families.randomised(PlainUniFormer(config, 3, classes=7)).eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "published.pth")
    side = 128 if "XS" in variant else 64
    arguments = ["import", str(tmp_path / "published.pth"), "-o", str(tmp_path / "ours.safetensors")]
    result = CliRunner().invoke(app, [*arguments, "--image-size", str(side)])
    assert result.exit_code == 0, result.output
    ours, x = load_model(tmp_path / "ours.safetensors").double(), torch.randn(2, 3, side, side, dtype=torch.float64)
    assert ours.config.heads == config.heads  # type: ignore[union-attr]
    torch.testing.assert_close(ours(x), theirs.double()(x), rtol=1e-9, atol=1e-9)


def light() -> dict[str, Any]:
    config = families.KINDS["light"].resolved(32)
    return dict(PlainUniFormer(config, 3, classes=7).state_dict())


def test_a_uniformer_whose_heads_no_shape_tells_needs_them() -> None:
    with pytest.raises(RefusedError, match=r"of channels \[16, 24, 32, 48\] .* is no published variant.*--heads"):
        import_uniformer(light(), image_size=64)
    config = import_uniformer(light(), image_size=64, heads=2).config
    assert (config.heads, config.strides) == ((2, 3), (4, 2, 2, 1))


@pytest.mark.parametrize(
    ("read", "state", "message"),
    [
        (import_uniformer, lambda: {k: v for k, v in light().items() if k != "head.weight"}, "lack head.weight"),
        (import_uniformer, lambda: light() | {"surplus": torch.ones(1)}, "surplus is left over"),
        (
            import_uniformer,
            lambda: light() | {"blocks4.0.conv9.weight": torch.ones(1)},
            "blocks4.0.conv9.weight is left",
        ),
        (import_uniformer, lambda: light() | {"norm.bias": torch.ones(3)}, r"norm.bias has shape \(3,\), not \(48,\)"),
        (import_mobilenet, lambda: mobile("blocks.2.1.bn1.bias"), "blocks.2.1.bn1.bias is missing"),
        (import_mobilenet, lambda: mobile("conv_head.weight"), "the weights lack conv_head.weight"),
        (import_mobilenet, lambda: mobile() | {"bn2.bias": torch.ones(2)}, r"bn2.bias has shape \(2,\), not \(1280,\)"),
    ],
)
def test_weights_of_a_family_that_do_not_fit_are_listed(read: Any, state: Any, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        read(state(), image_size=64, **({"heads": 2} if read is import_uniformer else {}))


def mobile(without: str = "") -> dict[str, Any]:
    state = mobilenet.Config(variant="MobileNetV2").build(image_size=64, channels=3, classes=7).state_dict()
    return {key: tensor for key, tensor in state.items() if key != without}
