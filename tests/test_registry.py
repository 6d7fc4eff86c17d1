"""Models by name, by a run's or an export's folder, and in timm; with few packages installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import hsvit_ds
from hsvit_ds.engine.interop import save_model
from hsvit_ds.errors import RefusedError
from hsvit_ds.models import slimmable, vit
from hsvit_ds.registry import create_model, list_models

from .ranks import ROOT

TINY: dict[str, dict[str, Any]] = {
    "hsvit": {"kernels": (8, 16), "pool_strides": (2, 2), "depth": 1, "groups": 4, "heads": 2, "embedding": 16},
    "scala_deit": {"embedding": 64, "heads": 4, "depth": 1, "patch_size": 8},
    "scala_mobilenetv2": {"depths": (1, 1, 1, 1, 1, 1, 1)},
    "scala_uniformer": {"depths": (1, 1, 1, 1), "strides": (2, 2, 2, 2)},
}
PUBLISHED = {  # parameters at the published number of classes
    "hsvit_c2a2": ({"num_classes": 10}, 812_298),
    "scala_deit_s": ({}, 22_436_432),
    "scala_mobilenetv2": ({}, 3_504_872),
    "scala_uniformer_s_plus": ({}, 24_032_552),
    "scala_uniformer_xs": ({}, 16_509_264),
}


def tiny(name: str, **options: Any) -> Any:
    (small,) = [options for prefix, options in TINY.items() if name.startswith(prefix)]
    return create_model(name, img_size=32, **{**small, **options})


def test_every_name_builds_here_and_in_timm_and_trains() -> None:
    assert list_models() == hsvit_ds.list_models() == sorted(list_models())
    assert list_models("scala_*") == [name for name in list_models() if name.startswith("scala_")]
    assert set(list_models()) <= set(timm.list_models())
    for name in list_models():
        with torch.device("meta"):
            whole = create_model(name)
            theirs = timm.create_model(name, num_classes=7)
        assert whole.num_classes == 1000
        assert theirs.num_classes == 7
        about = timm.data.resolve_model_data_config(theirs)
        assert about["input_size"] == (3, whole.image_size, whole.image_size)
        model = tiny(name, num_classes=3)
        model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_sizes_are_the_published() -> None:
    for name, (options, parameters) in PUBLISHED.items():
        with torch.device("meta"):
            model = hsvit_ds.create_model(name, **options)
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_initial_weights_follow_pytorchs_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(tiny("hsvit_c2a2").parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_timms_rates_are_ours() -> None:
    assert timm.create_model("hsvit_c2a2", drop_rate=0.3, img_size=32).config.dropout == 0.3
    with torch.device("meta"):
        assert timm.create_model("scala_deit_ti", drop_path_rate=0.1).config.drop_path == 0.1


def test_weights_of_a_file_are_taken_and_a_classifier_of_other_classes_starts_anew(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    for name in ("hsvit_c2a2", "scala_deit_ti"):
        model = tiny(name, num_classes=3).eval()
        torch.save({"model": model.state_dict()}, tmp_path / "other.pth")
        save_model(model, tmp_path / "model.safetensors")
        for path in (tmp_path / "other.pth", tmp_path / "model.safetensors", tmp_path):
            again = tiny(name, pretrained=path, num_classes=3).eval()
            torch.testing.assert_close(again(x), model(x))
            more = tiny(name, pretrained=str(path), num_classes=5).eval()
            torch.testing.assert_close(more.forward_features(x), model.forward_features(x))
            assert more(x).shape == (2, 5)
        file = create_model(tmp_path / "model.safetensors")
        torch.testing.assert_close(file(x), model(x))
        assert create_model(str(tmp_path), num_classes=4)(x).shape == (2, 4)
        torch.testing.assert_close(hsvit_ds.load_model(str(tmp_path))(x), model(x))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    refused = [
        ("pretrained=True: there are no published weights of these models; give a file", "hsvit_c2a2", True, {}),
        (r"hsvit_c9: neither a model \(hsvit_c2a2, .+\) nor a run, an export or a model file", "hsvit_c9", False, {}),
        (
            "hsvit_c2a2: takes no drop_path; known: backbone, conv",
            "hsvit_c2a2",
            False,
            {"drop_path": 0.1},
        ),
        ("hsvit_c2a2: pool_strides is not set and not known for 48 px", "hsvit_c2a2", False, {"img_size": 48}),
        (f"{tmp_path}: no folder of an export", str(tmp_path), False, {}),
    ]
    for message, name, pretrained, options in refused:
        with pytest.raises(RefusedError, match=message):
            create_model(name, pretrained, **options)
    save_model(tiny("scala_deit_ti", num_classes=3), tmp_path / "vit.safetensors")
    with pytest.raises(RefusedError, match=r"pretrained=.+vit\.safetensors does not fit: .+ is missing"):
        tiny("hsvit_c2a2", pretrained=tmp_path / "vit.safetensors")
    (tmp_path / "odd.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (tmp_path / "text.safetensors").write_text("weights")
    with pytest.raises(RefusedError, match=r"odd\.safetensors: not a model file of hsvit-ds"):
        hsvit_ds.load_model(tmp_path / "odd.safetensors")
    with pytest.raises(RefusedError, match=r"text\.safetensors: not a model file of hsvit-ds"):
        hsvit_ds.load_model(tmp_path / "text.safetensors")
    with pytest.raises(RefusedError, match=r"none\.safetensors: no such file"):
        hsvit_ds.load_model(tmp_path / "none.safetensors")


BARE = """
import sys
sys.modules.update(dict.fromkeys({hidden}))
import torch, hsvit_ds
options = dict(img_size=32, kernels=(8, 16), pool_strides=(2, 2), depth=1, groups=4, heads=2, embedding=16)
model = hsvit_ds.create_model("hsvit_c2a2", num_classes=3, **options)
model(torch.zeros(2, 3, 32, 32)).sum().backward()
print(hsvit_ds.create_model({path!r})(torch.zeros(1, 3, 32, 32)).shape)
"""


def test_models_need_few_packages(tmp_path: Path) -> None:
    """Of the distribution's own requirements torch, timm, safetensors and pydantic, and what these bring."""
    kept = {"torch", "triton", "timm", "safetensors", "pydantic", "numpy", "pillow", "torchvision"}
    hidden = {{"scikit-learn": "sklearn", "tomli-w": "tomli_w"}.get(name, name) for name in requirements() - kept}
    assert {"deepspeed", "mlflow", "webdataset"} <= hidden
    save_model(
        vit.Config(embedding=64, heads=4, depth=1, patch_size=8, widths=slimmable.Config()).build(
            image_size=32, channels=3, classes=3
        ),
        tmp_path / "model.safetensors",
    )
    script = BARE.replace("{hidden}", repr(hidden)).replace("{path!r}", repr(str(tmp_path)))
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stderr
    assert "torch.Size([1, 3])" in found.stdout


def requirements() -> set[str]:
    """The distributions that pyproject.toml requires."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {re.split(r"[<>=!~\[ ]", line)[0] for line in table["project"]["dependencies"]}
