"""In a script or notebook a model of this project is an ordinary PyTorch module with timm's names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hsvit_kernels
from hsvit_ds.engine import engine
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid
from hsvit_ds.models import Model, backbone, hsvit, mobilenet, slimmable, timm_models, uniformer, vit
from hsvit_ds.models.batchnorm import BatchNorm, recalibrate

SLIM = slimmable.Config(smallest=0.5, granularity=0.25)
HSVIT = hsvit.Config(
    kernels=(8, 16), pool_strides=(2, 2), depth=2, groups=4, heads=2, embedding=16, dropout=0.2, widths=SLIM
)
VIT = vit.Config(embedding=32, heads=2, depth=2, patch_size=8, drop_path=0.3, widths=SLIM)
CNN = backbone.Config(name="test_resnet", trained_stages=-1, drop_path=0.3)
HYBRID = replace(HSVIT, kernels=(), pool_strides=(), widths=slimmable.Config(), backbone=CNN)
MOBILENET = mobilenet.Config(
    channels=(24, 16, 24, 32),
    depths=(1, 2, 2),
    strides=(2, 1, 2, 2),
    expansion=4,
    features=64,
    drop_path=0.3,
    widths=SLIM,
)
UNIFORMER = uniformer.Config(
    channels=(16, 24, 32, 48), depths=(1, 1, 2, 1), heads=(2, 3), strides=(2, 2, 2, 1), drop_path=0.3, widths=SLIM
)
KINDS: dict[str, Any] = {
    "hsvit": HSVIT,
    "depthwise": replace(HSVIT, depthwise=True, submodules=2, groups=8),
    "submodules that drop": replace(HSVIT, submodules=2, submodule_drop=0.3, dropout=0.0, widths=slimmable.Config()),
    "without attention": replace(HSVIT, depth=0),
    "hybrid": HYBRID,
    "vit": VIT,
    "distilled vit": replace(VIT, distilled=True),
    "mobilenet": MOBILENET,
    "uniformer": UNIFORMER,
    "uniformer of patches": replace(UNIFORMER, stem="patches", downsampling="patches"),
    "light uniformer": replace(UNIFORMER, pruned=True),
    "timm": timm_models.Config(name="test_vit", drop_path=0.3),
}
SLICED = [name for name, config in KINDS.items() if len(config.widths.all) > 1]


def built(name: str, seed: int = 0) -> Model:
    model: Model = KINDS[name].build(image_size=32, channels=3, classes=5, seed=seed)
    return model


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(name: str, seed: int, call: Callable[..., Any] = lambda model, x: model(x)) -> tuple[Model, list[float]]:
    """After 20 steps of an ordinary loop, with every loss."""
    model, x, losses = built(name).train(), images(), list[float]()
    y = torch.arange(len(x)) % 5
    # Adam would make steps of the rounding noise that convolutions have by where their memory lies.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(seed)
    for _ in range(20):
        loss = F.cross_entropy(call(model, x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def checkpointed(model: nn.Module, x: Tensor) -> Any:
    return checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize("name", KINDS)
def test_twenty_steps_repeat_from_their_seed_also_with_checkpointed_activations(name: str) -> None:
    model, losses = trained(name, 1)
    assert sum(losses[-3:]) < sum(losses[:3])
    for call in (lambda model, x: model(x), checkpointed):
        again, same = trained(name, 1, call)
        assert same == pytest.approx(losses, rel=1e-4)
        for key, tensor in again.state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[key], rtol=1e-3, atol=1e-4, msg=key)
    other = trained(name, 2)[1]
    assert other != pytest.approx(losses, rel=1e-2), "nothing random was drawn"


def test_running_statistics_move_as_pytorchs_do_and_nothing_is_left_pending() -> None:
    layer, theirs, half = BatchNorm(6), nn.BatchNorm2d(6), SLIM.all[0]
    for step in range(3):
        x = torch.randn(4, 6, 3, 3)
        torch.testing.assert_close(layer(x), theirs(x))
        layer(x[:, half.take(torch.arange(6))], half)  # moves nothing of full width
        assert not layer.noted, step
    torch.testing.assert_close(layer.running_mean, theirs.running_mean)
    torch.testing.assert_close(layer.running_var, theirs.running_var)
    for name in ("hsvit", "hybrid"):
        for module in trained(name, 0)[0].modules():
            if isinstance(module, BatchNorm):
                assert not module.noted
                assert module.running_mean.any()


def test_statistics_of_a_width_are_taken_anew_after_training_went_on() -> None:
    model, x = built("hsvit").train(), images()
    with recalibrate(model, [0.5]):
        model(x, width=0.5)
    model(x, width=0.5)
    model.train()(x, width=0.5)
    with pytest.raises(ValueError, match=r"no statistics for width 0\.50"):
        model.eval()(x, width=0.5)


@pytest.mark.parametrize("name", ["hsvit", "hybrid", "vit", "timm"])
def test_under_an_engine_a_missing_draw_is_refused_with_advice_that_works(name: str) -> None:
    model, x = built(name), images()
    engine.prepare(model, False, False)
    seed = step = 0
    with pytest.raises(ValueError, match="needs its randomness") as refusal:
        model.train()(x)
    advice = re.search(r"draw=(hsvit_kernels\.Draw\.of\(.+device=images\.device\))", str(refusal.value))
    assert advice
    names = {"hsvit_kernels": hsvit_kernels, "torch": torch, "images": x, "seed": seed, "step": step}
    draw = eval(advice[1], names)
    assert torch.equal(model(x, draw=draw), model(x, draw=draw))
    model.eval()(x)


def test_on_a_grid_a_missing_draw_is_refused() -> None:
    model = HSVIT.build(image_size=32, channels=3, classes=5, grid=Grid(GridConfig(), submodules=1))
    with pytest.raises(ValueError, match="on a grid and under an engine a training forward needs its randomness"):
        model.train()(images())


@pytest.mark.parametrize("name", SLICED)
def test_a_number_is_a_width(name: str) -> None:
    model, x = built(name).eval(), images()
    half = model.config.widths.find(0.5)
    with recalibrate(model, [0.5]):
        model(x, width=0.5)
    model.eval()
    torch.testing.assert_close(model(x, width=0.5), model(x, width=half))
    torch.testing.assert_close(model.subnet(0.5)(x), model(x, width=half))
    assert model.forward_features(x, width=0.5).shape[0] == len(x)
    with pytest.raises(ValueError, match=r"width 0\.6 is not one of the 3 of this model; nearest: 0\.50, 0\.75"):
        model(x, width=0.6)


@pytest.mark.parametrize("name", sorted(KINDS.keys() - set(SLICED)))
def test_a_model_of_one_width_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=r"width 0\.5: must be 1, this model's only one"):
        built(name)(images(), width=0.5)


WRONG = {
    r"shape \(2, 3, 16, 32\): must be \[B, 3, 32, 32\]": torch.zeros(2, 3, 16, 32),
    r"shape \(2, 1, 32, 32\): must be": torch.zeros(2, 1, 32, 32),
    r"shape \(3, 32, 32\): must be": torch.zeros(3, 32, 32),
    r"images are torch.uint8: must be floating point and normalised": torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    r"images are torch.float64, the weights torch.float32: give images.to\(torch.float32\)": torch.zeros(
        2, 3, 32, 32, dtype=torch.float64
    ),
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("name", KINDS)
def test_other_images_are_named(name: str, message: str) -> None:
    model = built(name).eval()
    for method in (model, model.forward_features):
        with pytest.raises(ValueError, match=message):
            method(WRONG[message])


@pytest.mark.parametrize("name", KINDS)
def test_a_model_may_be_in_bf16(name: str) -> None:
    model, x = built(name).bfloat16(), images().bfloat16()
    loss = model.train()(x).float().square().sum()
    loss.backward()
    learning = {n: p for n, p in model.named_parameters() if not n.startswith(("norm_cls", "head_cls"))}  # see below
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in learning.values())
    exact = built(name).eval()(images())
    assert (
        float((built(name).bfloat16().eval()(x).float() - exact).abs().max()) < 0.05 * float(exact.abs().max()) + 0.05
    )


@pytest.mark.parametrize("name", KINDS)
def test_timms_names(name: str) -> None:
    model, x = built(name).eval(), images(2)
    assert model.num_classes == 5
    features = model.forward_features(x)
    assert features.shape[0] == 2
    assert features.dim() in (3, 4)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    model.reset_classifier(9)
    assert model.num_classes == model.classes == 9
    assert model(x).shape == (2, 9)
    torch.testing.assert_close(model.forward_features(x), features)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed
    assert all(any(layer in key for layer in ("head", "fc", "classifier")) for key in changed)
    model.train()(x).square().sum().backward()


def test_features_are_those_that_the_head_takes() -> None:
    x = images(2)
    model = built("vit").eval()
    torch.testing.assert_close(model.head(model.forward_features(x)[:, 0]), model(x))
    assert model.forward_features(x).shape == (2, 1 + 16, 32)
    hs = built("hsvit").eval()
    assert hs.forward_features(x).shape == (2, 4, 16)
    mobile = built("mobilenet").eval()
    assert mobile.forward_features(x).shape == (2, 64, 4, 4)
    torch.testing.assert_close(mobile.classifier(mobile.forward_features(x).mean((2, 3))), mobile(x))
    uni = built("light uniformer").eval()
    assert uni.forward_features(x).shape == (2, 48, 4, 4)
    torch.testing.assert_close(uni.head(uni.forward_features(x).mean((2, 3))), uni(x))
    torch.testing.assert_close(hs.head(hs.forward_features(x).mean(1)), hs(x))


def test_a_distilled_model_answers_with_both_only_when_asked() -> None:
    model, x = built("distilled vit").train(), images(2)
    assert isinstance(model(x), Tensor)
    model.set_distilled_training()
    z, u = model(x)
    assert z.shape == u.shape == (2, 5)
    assert isinstance(model.eval()(x), Tensor)
    model.train().set_distilled_training(False)
    assert isinstance(model(x), Tensor)


def test_a_light_uniformer_answers_with_both_heads_only_when_asked() -> None:
    model, x = built("light uniformer").train(), images(2)
    assert isinstance(model(x), Tensor)
    model.all_heads = True
    z, u = model(x)
    assert z.shape == u.shape == (2, 5)
    assert isinstance(model.eval()(x), Tensor)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_can_be_exported_as_it_is(name: str, tmp_path: Path) -> None:
    from onnxruntime import InferenceSession

    model, x = built(name).eval(), images(2)
    program = torch.export.export(model, (x,))
    assert "hsvit" not in str(program.graph)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_an_exported_training_graph_draws_the_same_masks() -> None:
    model, x = built("hsvit").train(), images(4)
    program = torch.export.export(model, (x,)).module()
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(program(x), expected, rtol=1e-2)
