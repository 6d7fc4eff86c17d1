"""A run starts from what a file, an export or another run holds; what does not fit is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.engine.initial import Found, read, start
from hsvit_ds.engine.interop import MODEL, save_model
from hsvit_ds.errors import RefusedError
from hsvit_ds.models import hsvit, mobilenet, slimmable, timm_models, uniformer, vit
from hsvit_ds.registry import create_model
from hsvit_ds.run import recipe as recipes

from ..ranks import ROOT

RECIPE = ROOT / "recipes/digits/scala.toml"
SIZES = {"image_size": 32, "channels": 3, "classes": 10}
SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 1, "num_classes": 10}
PLAIN, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
VIT = vit.Config(embedding=64, heads=1, depth=2, patch_size=8)
HSVIT = hsvit.Config(kernels=(8, 16), pool_strides=(2, 2), depth=1, groups=4, heads=2, embedding=16, submodules=2)
MOBILENET = mobilenet.Config(channels=(8, 16, 24), depths=(1, 2), strides=(2, 2, 2), features=32)
UNIFORMER = uniformer.Config(
    channels=(16, 16, 32, 32), depths=(1, 1, 1, 1), heads=(2, 4), strides=(4, 2, 1, 2), pruned=True
)
KINDS: dict[str, Any] = {"vit": VIT, "hsvit": HSVIT, "mobilenet": MOBILENET, "uniformer": UNIFORMER}


def deit(name: str = PLAIN, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options}).eval()


def saved(folder: Path, state: dict[str, Tensor]) -> str:
    torch.save({"model": state}, folder / "deit.pth")
    return str(folder / "deit.pth")


def started(config: Any, weights: str, **sizes: int) -> tuple[Any, list[str]]:
    model = config.build(**{**SIZES, **sizes}, seed=3)
    return model.eval(), start(model, read(weights))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
def test_a_slimmable_vit_starts_as_the_deit_in_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    theirs, file = deit(name), tmp_path / f"deit.{suffix}"
    (torch.save if suffix == "pth" else save_file)(theirs.state_dict(), file)
    config = replace(VIT, distilled=name == DISTILLED, widths=slimmable.Config(smallest=0.25, granularity=0.25))
    model, (said,) = started(config, str(file))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)
    count = len(model.state_dict())
    assert said == f"weights: {count} of {count} tensors from {file}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["folder", "file"])
def test_an_export_starts_a_run_of_another_family_of_widths(kind: str, place: str, tmp_path: Path) -> None:
    config = KINDS[kind]
    theirs = config.build(**SIZES, seed=1)
    save_model(theirs, tmp_path / MODEL)
    config = replace(config, widths=slimmable.Config(smallest=0.5, granularity=0.5))
    model, (said,) = started(config, str(tmp_path if place == "folder" else tmp_path / MODEL))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert "new" not in said
    assert "left out" not in said


def test_what_is_missing_starts_anew_what_is_surplus_is_left_out_and_both_are_said(tmp_path: Path) -> None:
    state = deit().state_dict()
    weights = saved(tmp_path, {**state, **{f"extra.{i}": torch.zeros(1) for i in range(5)}})
    model, (said,) = started(replace(VIT, distilled=True), weights)
    anew = replace(VIT, distilled=True).build(**SIZES, seed=3)
    assert said == (
        f"weights: 32 of 35 tensors from {weights}; "
        "new: 3 tensors (dist_token, head_dist.weight, head_dist.bias) and the position of dist_token; "
        "left out: 5 tensors (extra.0, extra.1, extra.2, …)"
    )
    assert torch.equal(model.dist_token, anew.dist_token)
    assert torch.equal(model.pos_embed[:, 1], anew.pos_embed[:, 1])
    assert torch.equal(model.pos_embed[:, [0, *range(2, 18)]], state["pos_embed"])


def test_a_distilled_deit_starts_a_plain_one(tmp_path: Path) -> None:
    theirs = deit(DISTILLED)
    model, (said,) = started(VIT, saved(tmp_path, theirs.state_dict()))
    assert said.endswith("; left out: 3 tensors (dist_token, head_dist.weight, head_dist.bias)")
    assert torch.equal(model.pos_embed, theirs.pos_embed[:, [0, *range(2, 18)]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_of_another_number_of_classes_starts_anew(kind: str, tmp_path: Path) -> None:
    config = KINDS[kind]
    save_model(config.build(**{**SIZES, "classes": 1000}, seed=1), tmp_path / MODEL)
    model, (said,) = started(config, str(tmp_path))
    own = config.build(**SIZES, seed=3).state_dict()
    layer = {"hsvit": "head.linear", "mobilenet": "classifier"}.get(kind, "head")
    said_of = f"2 tensors ({layer}.weight, {layer}.bias)" if kind != "uniformer" else "4 tensors (head.weight, "
    assert f"; new for 10 classes, there 1,000: {said_of}" in said
    assert torch.equal(model.state_dict()[f"{layer}.weight"], own[f"{layer}.weight"])
    first = next(name for name, parameter in config.build(**SIZES).named_parameters() if float(parameter.std()) > 0)
    assert not torch.equal(model.state_dict()[first], own[first])


def test_position_embeddings_of_another_size_are_resized_as_timm_does(tmp_path: Path) -> None:
    theirs = deit()
    config, weights = replace(VIT, resize=True), saved(tmp_path, theirs.state_dict())
    model, (said,) = started(config, weights, image_size=48)
    assert said.endswith("; resized: pos_embed, 4 x 4 to 6 x 6")
    theirs.set_input_size(img_size=48)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)
    taught, _ = started(replace(config, distilled=True), weights, image_size=48)
    assert torch.equal(taught.pos_embed[:, 2:], model.pos_embed[:, 1:])


def test_a_resized_hsvit_answers_to_a_resized_map_as_before(tmp_path: Path) -> None:
    theirs = HSVIT.build(**SIZES, seed=1).eval()
    save_model(theirs, tmp_path / MODEL)
    model, (said,) = started(replace(HSVIT, resize=True), str(tmp_path), image_size=64)
    assert said.endswith("; resized: submodules.projection_weight, 8 x 8 to 16 x 16")
    maps = torch.randn(5, 1, 8, 8)
    larger = F.interpolate(maps, (16, 16), mode="bicubic", antialias=True)
    for ours, before in zip(model.submodules.projection_weight, theirs.submodules.projection_weight, strict=True):
        torch.testing.assert_close(larger.flatten(1) @ ours.T, maps.flatten(1) @ before.T, rtol=1e-4, atol=1e-4)


def test_a_rank_takes_its_own_submodules(tmp_path: Path) -> None:
    save_model(HSVIT.build(**SIZES, seed=1), tmp_path / MODEL)
    found = read(str(tmp_path))
    whole = HSVIT.build(**SIZES, seed=1, here=range(1, 2)).state_dict()
    model = HSVIT.build(**SIZES, seed=3, here=range(1, 2))
    start(model, found)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


BY = {
    how: replace(VIT, heads=4, widths=slimmable.Config(smallest=0.25, granularity=0.25, slice=how))
    for how in ("channels", "heads")
}


@pytest.mark.parametrize(("there", "here"), [("channels", "heads"), ("heads", "channels")])
def test_networks_sliced_by_channels_and_by_heads_start_from_each_other(there: str, here: str, tmp_path: Path) -> None:
    theirs = BY[there].build(**SIZES, seed=1)
    save_model(theirs, tmp_path / MODEL)
    model, said = started(BY[here], str(tmp_path))
    assert len(said) == 1
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_subnet_of_fewer_heads_is_refused_by_its_shapes(tmp_path: Path) -> None:
    save_model(BY["heads"].build(**SIZES, seed=1).subnet(0.5), tmp_path / MODEL)
    with pytest.raises(RefusedError, match=r"their model has embedding = 32 \(here 64\), heads = 2 \(here 4\)"):
        started(BY["heads"], str(tmp_path))


def test_what_no_shape_tells_is_said_or_refused(tmp_path: Path) -> None:
    save_model(replace(VIT, qkv="fused", norm_eps=1e-5).build(**SIZES), tmp_path / MODEL)
    _, said = started(VIT, str(tmp_path))
    assert said[1] == 'weights: their model has qkv = "fused" (here "per_role"), norm_eps = 1e-05 (here 1e-06)'
    message = r"of a model with heads = 1, .* set model.heads = 1 \(here 2\)"
    with pytest.raises(RefusedError, match=message):
        started(replace(VIT, heads=2), str(tmp_path))


def test_a_timm_network_that_was_trained_here_starts_a_vit(tmp_path: Path) -> None:
    theirs = timm_models.Config(name=PLAIN).build(**{**SIZES, "image_size": 32}).eval()
    save_model(theirs, tmp_path / MODEL)
    model, _ = started(vit.Config(variant="DeiT-Ti"), str(tmp_path))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)


DEIT = deit().state_dict()


@pytest.mark.parametrize(
    ("config", "state", "sizes", "message"),
    [
        (
            VIT,
            DEIT,
            {"image_size": 48},
            r"does not fit: pos_embed has shape \(1, 17, 64\), not \(1, 37, 64\) \(4 x 4 to 6 x 6\); "
            "set data.image_size and the model's keys as they were there, or model.resize = true to resize it",
        ),
        (
            replace(VIT, embedding=128, resize=True),
            DEIT,
            {},
            r"cls_token has shape \(1, 1, 64\), not \(1, 1, 128\); .*; and 28 others; "
            r"their model has embedding = 64 \(here 128\)",
        ),
        (VIT, DEIT, {"channels": 1}, r"patch_embed.proj.weight has shape \(64, 3, 8, 8\), not \(64, 1, 8, 8\)"),
        (
            VIT,
            timm.create_model("resnet18", num_classes=10).state_dict(),
            {},
            r'0 of 32 tensors of this model \(kind = "vit", depth = 2\) are there; they seem to be a ResNet',
        ),
        (HSVIT, DEIT, {}, r"0 of \d+ tensors of this model .* they seem to be a DeiT or ViT"),
        (replace(VIT, depth=12), DEIT, {}, r"32 of 152 tensors of this model \(kind = \"vit\", depth = 12\)"),
    ],
    ids=["image size", "embedding", "channels", "ResNet", "another kind", "depth"],
)
def test_weights_that_do_not_fit_are_refused_with_shapes_and_remedy(
    config: Any, state: dict[str, Tensor], sizes: dict[str, int], message: str, tmp_path: Path
) -> None:
    model = config.build(**{**SIZES, **sizes}, seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = saved(tmp_path, state)
    with pytest.raises(RefusedError, match=message) as refused:
        start(model, read(weights))
    assert str(refused.value).startswith(f"model.weights = {weights}")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_known_model_is_named_where_its_weights_do_not_fit(tmp_path: Path) -> None:
    save_model(replace(HSVIT, submodules=1).build(**SIZES), tmp_path / MODEL)
    with pytest.raises(RefusedError, match=r"; their model has submodules = 1 \(here 2\)$"):
        started(HSVIT, str(tmp_path))
    with pytest.raises(RefusedError, match=r'they seem to be of kind "hsvit"'):
        started(VIT, str(tmp_path))


def test_what_is_no_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, tmp_path / "damaged.safetensors", metadata={"hsvit": "{}"})
    torch.save({"model.conv2d_layers.0.layer.0.convolution.weight": torch.zeros(1)}, tmp_path / "published.pth")
    for weights, message in {
        "https://example.org/deit.pth": "no weights are downloaded for a run; download the file and name it",
        f"{tmp_path}/none.pth": "none.pth: no such file",
        f"{tmp_path}/text.pth": "not a readable weights file",
        f"{tmp_path}/text.safetensors": "not a readable weights file",
        f"{tmp_path}/empty": r"neither a run \(checkpoints is missing\) nor an export \(model.safetensors is missing\)",
        f"{tmp_path}/run": "no checkpoint latest of a run there",
        f"{tmp_path}/damaged.safetensors": "damaged .* does not tell the model",
        f"{tmp_path}/published.pth": "first `hsvit import .*published.pth -o model.safetensors --image-size",
    }.items():
        with pytest.raises(RefusedError, match=message) as refused:
            read(weights)
        assert str(refused.value).startswith(f"model.weights = {weights.partition('/none')[0]}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.resize=true"], "model.resize = true: there are no weights to resize; set model.weights too"),
        (
            ['model={kind="hsvit", weights="a.pth", depth=1, backbone={name="test_resnet", weights="b.pth"}}'],
            'weights = "a.pth" has those of the backbone too; leave backbone.weights empty, here "b.pth"',
        ),
    ],
)
def test_keys_without_a_meaning_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        recipes.resolve(recipes.read(RECIPE, overrides), 1)


@pytest.mark.parametrize("memory", [[], ["--memory"]])
def test_a_recipe_is_looked_at_without_its_weights(memory: list[str]) -> None:
    result = CliRunner().invoke(app, ["recipe", str(RECIPE), "model.weights=nowhere.pth", *memory])
    assert result.exit_code == 0, result.output


def test_a_model_that_is_made_by_name_has_pretrained_for_it() -> None:
    with pytest.raises(RefusedError, match="scala_deit_ti: takes no weights; known: "):
        create_model("scala_deit_ti", weights="deit.pth")


def test_keys_that_make_no_tensor_another_one_are_not_said() -> None:
    """A key that only the other model has says nothing of this one."""
    model = VIT.build(**SIZES)
    assert start(model, Found("there", model.state_dict(), {"kind": "vit", "gone": 3, "drop_path": 0.5})) == [
        "weights: 32 of 32 tensors from there"
    ]


def test_a_uniformer_of_other_heads_starts_no_other_and_other_shapes_are_listed(tmp_path: Path) -> None:
    save_model(UNIFORMER.build(**SIZES), tmp_path / MODEL)
    message = r"of a model with heads = \[2, 4\], .* set model.heads = \[2, 4\] \(here \[4, 4\]\)"
    with pytest.raises(RefusedError, match=message):
        started(replace(UNIFORMER, heads=(4, 4)), str(tmp_path))
    with pytest.raises(
        RefusedError, match=r"their model has channels = \[16, 16, 32, 32\] \(here \[16, 16, 64, 32\]\)"
    ):
        started(replace(UNIFORMER, channels=(16, 16, 64, 32)), str(tmp_path))
    with pytest.raises(RefusedError, match=r'kind = "mobilenet", depths = \[1, 2\]\) are there; .* kind "uniformer"'):
        started(MOBILENET, str(tmp_path))


def test_timms_mobilenetv2_starts_a_slimmable_one(tmp_path: Path) -> None:
    theirs = timm.create_model("mobilenetv2_100", num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    config = mobilenet.Config(variant="MobileNetV2", widths=slimmable.Config(smallest=0.25, granularity=0.25))
    model, (said,) = started(config, str(tmp_path / "timm.pth"), image_size=64)
    count = len(model.state_dict())
    assert said == f"weights: {count} of {count} tensors from {tmp_path / 'timm.pth'}"
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-5)
