"""A classifier of timm computes what timm's does, with this project's randomness, statistics and care about weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hsvit_ds.engine.optimizer import Config as OptimizerConfig
from hsvit_ds.engine.optimizer import parameter_groups
from hsvit_ds.errors import RefusedError
from hsvit_ds.models.batchnorm import BatchNorm, Statistics, move_running_statistics, set_statistics
from hsvit_ds.models.timm_models import Classifier, Config, DropPath, Randomness
from hsvit_kernels.random import Draw

# The papers' baselines at 224 px: millions of parameters, and thousand millions of multiply-adds where they are known.
BASELINES = {
    "resnet18": (11.7, 1.82),
    "resnet50": (25.6, 4.1),
    "efficientnet_b0": (5.3, 0.39),
    "efficientnet_b3": (12.2, None),
    "mobilenetv2_100": (3.5, 0.3),
    "mobilenetv2_140": (6.1, 0.6),
    "vit_base_patch16_224": (86.6, 17.6),
    "mobilevit_xs": (2.3, None),
    "mobilevit_s": (5.6, None),
    "efficientformer_l1": (12.3, 1.3),
    "efficientformer_l3": (31.4, 3.9),
    "swiftformer_xs": (3.5, 0.6),
    "swiftformer_s": (6.1, 1.0),
    "cvt_13": (20.0, 4.5),
    "cvt_21": (31.6, 7.1),
}
# BatchNorm plain, fused with an activation, with another eps, absent, and of vectors.
SIZES = {"test_resnet": 32, "test_efficientnet": 64, "tf_efficientnet_b0": 64, "test_convnext": 64, "levit_128s": 224}


@torch.no_grad()
def randomised(model: Any, seed: int = 1) -> Any:
    """Vectors and running statistics that hide nothing: biases away from 0, scales away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            low = -0.5 if name.endswith(("bias", "running_mean")) else 0.5
            tensor.uniform_(low, low + 1, generator=generator)
    return model


def timms_own(net: Any, name: str, **options: Any) -> nn.Module:
    """timm's model with the weights of a converted one."""
    import timm

    model = timm.create_model(name, **options).to(next(net.parameters()).dtype)
    missing, left_over = model.load_state_dict(net.state_dict(), strict=False)
    assert not left_over
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return model


def classifier(name: str, classes: int = 5, size: int = 0, **options: Any) -> Classifier:
    return Config(name=name, **options).build(image_size=size or SIZES[name], channels=3, classes=classes)


def images(size: int, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def saved(model: nn.Module, path: Path) -> Path:
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


@pytest.mark.heavy
@pytest.mark.parametrize("name", BASELINES)
def test_the_papers_baselines_are_there_by_name(name: str) -> None:
    millions, giga_macs = BASELINES[name]
    config = Config(name=name).resolved(224)
    with torch.device("meta"):
        model = config.build(image_size=224, channels=3, classes=1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    if giga_macs:
        assert config.macs(224, 3, 1000) / 1e9 == pytest.approx(giga_macs, rel=0.1)


@pytest.mark.parametrize("name", SIZES)
def test_equals_timms_model_in_evaluation(name: str) -> None:
    ours = randomised(classifier(name)).double().eval()
    theirs = timms_own(ours.net, name, num_classes=5).eval()
    x = images(SIZES[name])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", [name for name in SIZES if name != "test_convnext"])
def test_equals_timms_model_in_training_and_moves_the_same_statistics(name: str) -> None:
    ours = randomised(classifier(name)).double().train()
    theirs = timms_own(ours.net, name, num_classes=5).train()
    set_statistics(ours, Statistics())
    x = images(SIZES[name])
    logits = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*logits)
    for y in logits:
        y.square().sum().backward()
    found = dict(ours.net.named_parameters())
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[key].grad, parameter.grad, msg=lambda text, k=key: f"{k}: {text}")
    before = {key: tensor.clone() for key, tensor in ours.net.state_dict().items() if "running" in key}
    move_running_statistics(ours, applied=torch.tensor(True), channel=None)
    moved, expected = ours.net.state_dict(), theirs.state_dict()
    assert before
    for key, tensor in before.items():
        assert not torch.equal(moved[key], tensor)
        torch.testing.assert_close(moved[key], expected[key], msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.parametrize("name", ["test_efficientnet", "levit_128s"])
def test_statistics_over_fixed_runs_do_not_depend_on_accumulation(name: str) -> None:
    model = randomised(classifier(name)).double().train()
    x = images(SIZES[name])
    with torch.no_grad():
        parts = torch.cat([model(run) for run in x.chunk(2)])
        set_statistics(model, Statistics(runs=2))
        torch.testing.assert_close(model(x), parts)


def without_batch_statistics(model: nn.Module) -> nn.Module:
    """In training, but with BatchNorm's running statistics, so that images do not depend on each other."""
    model.train()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    return model


@pytest.mark.parametrize("name", ["test_convnext", "mobilevit_xs"])  # the second skips for a quarter of an image
def test_drop_path_follows_from_what_it_is_for(name: str) -> None:
    """From seed, step and image; not from the batch that the image stands in."""
    model = without_batch_statistics(randomised(classifier(name, size=64, drop_path=0.5))).double()
    x, draw = images(64, batch=8), Draw.of(0, 1, image=torch.arange(8))
    with torch.no_grad():
        whole = model(x, draw)
        assert torch.equal(model(x, draw), whole)
        halves = [model(x[part], draw.slice(part.start, part.stop)) for part in (slice(0, 4), slice(4, 8))]
        torch.testing.assert_close(torch.cat(halves), whole)
        assert not torch.allclose(model(x, Draw.of(0, 2, image=torch.arange(8))), whole)
        assert not torch.allclose(model.eval()(x), whole)


def test_every_block_skips_images_by_itself() -> None:
    """One picture in every place: nine blocks that went by the same luck would give nine answers at most."""
    model = randomised(classifier("test_convnext", drop_path=0.5)).double().train()
    with torch.no_grad():
        logits = model(images(64, batch=1).expand(64, -1, -1, -1), Draw.of(0, image=torch.arange(64)))
    assert len(logits.round(decimals=6).unique(dim=0)) > 9


@pytest.mark.parametrize(("scales", "kept"), [(True, 2.0), (False, 1.0)])
def test_drop_path_keeps_or_drops_every_piece_of_an_image(scales: bool, kept: float) -> None:
    randomness = Randomness(draw=Draw.of(0, image=torch.arange(64)))
    found = DropPath(0.5, scales, randomness)(torch.ones(64 * 4, 3, 2)).view(64, 4, 6)
    assert set(found.unique().tolist()) == {0.0, kept}
    assert torch.equal(found.amin(2), found.amax(2))
    assert (found[:, :1] != found).any()
    assert torch.equal(DropPath(0.5, scales, randomness).eval()(found), found)


def test_layer_decay_counts_the_layers_after() -> None:
    groups = parameter_groups(classifier("test_resnet"), OptimizerConfig(layer_decay=0.5))
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    layers = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    for after, layer in enumerate(reversed(layers)):
        assert {scale for name, scale in scales.items() if name.startswith(f"net.{layer}.")} == {0.5**after}
    assert scales["net.bn1.weight"] == scales["net.conv1.0.weight"]
    assert len(scales) == len(list(classifier("test_resnet").parameters()))


def test_initial_weights_follow_from_the_seed_alone() -> None:
    def weights(seed: int) -> Tensor:
        model = Config(name="test_resnet").build(image_size=32, channels=3, classes=5, seed=seed)
        return torch.cat([p.flatten() for p in model.parameters()])

    first = weights(3)
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    assert torch.equal(weights(3), first)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's randomness moves
    assert not torch.equal(weights(4), first)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_timm_are_loaded_from_a_file(suffix: str, tmp_path: Path) -> None:
    import timm

    theirs = randomised(timm.create_model("test_resnet", num_classes=7))
    path = saved(theirs, tmp_path / f"weights{suffix}")
    same = classifier("test_resnet", classes=7, weights=str(path)).net.state_dict()
    for key, tensor in same.items():
        assert torch.equal(tensor, theirs.state_dict()[key])
    other, anew = (classifier("test_resnet", weights=w).net.state_dict() for w in (str(path), ""))
    for key, tensor in other.items():
        assert torch.equal(tensor, anew[key] if key.startswith("fc.") else theirs.state_dict()[key])


def test_weights_that_do_not_fit_are_refused_with_every_key(tmp_path: Path) -> None:
    import timm

    wrong = timm.create_model("test_resnet", num_classes=5)
    del wrong.fc, wrong.layer4[0].bn1.bias
    wrong.extra = nn.Linear(1, 1, bias=False)
    wrong.bn1.weight = nn.Parameter(torch.ones(3))
    path = saved(wrong, tmp_path / "weights.pth")
    with pytest.raises(RefusedError) as caught:
        classifier("test_resnet", weights=str(path))
    message = str(caught.value)
    assert message.startswith(f"model.weights = {path} does not fit test_resnet for 5 classes and 3 channels: ")
    assert set(message.partition(": ")[2].split("; ")) == {
        "fc.weight is missing",
        "fc.bias is missing",
        "layer4.0.bn1.bias is missing",
        "extra.weight is left over",
        "bn1.weight has shape (3,), not (32,)",
    }


def test_weights_that_cannot_be_had_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RefusedError) as caught:
        classifier("resnet18", size=64, weights="tv_in1k")
    message = str(caught.value)
    assert message.startswith('model.name = "resnet18": timm cannot get the weights "tv_in1k" here (')
    assert message.endswith(
        "download model.safetensors from https://huggingface.co/timm/resnet18.tv_in1k and set model.weights to the file"
    )
    assert "\n" not in message
    with pytest.raises(RefusedError, match=r"none\.pth: no such file"):
        classifier("test_resnet", weights=str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnt50"}, 'model.name = "resnt50": timm .* has no such model; near it: resnet50, '),
        ({"weights": "a9_in1k"}, r'model.weights = "a9_in1k": neither a file \(.safetensors, .* timm has r160_in1k'),
        ({"drop_path": 1.0}, r"drop_path = 1.0: must be in \[0, 1\)"),
        ({"name": "vgg11", "drop_path": 0.1}, r'model.name = "vgg11": timm does not build it with .*drop_path_rate'),
        ({"name": "convnext_tiny"}, r'model.name = "convnext_tiny" has no answer to images of 16 px \('),
    ],
)
def test_what_timm_does_not_have_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Config(**{"name": "test_resnet"} | change).resolved(16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50.tv_in1k", 'model.name = "resnet50.tv_in1k": name the weights apart .*: model.weights = "tv_in1k"'),
        ("", "timm .* has no such model; near it: timm.list_models()"),
    ],
)
def test_a_name_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(name=name).resolved(224)


def test_cvt_drops_by_counted_randomness() -> None:
    model = Config(name="cvt_13", drop_path=0.5).build(image_size=32, channels=3, classes=10).train()
    images, draws = torch.randn(4, 3, 32, 32), [Draw.of(0, step, image=torch.arange(4)) for step in (0, 0, 1)]
    first, again, other = (model(images, draw) for draw in draws)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_timm_drops_by_default_is_off() -> None:
    """Its modules would draw from PyTorch's generator; two forwards in training are equal."""
    model = Config(name="vit_relpos_small_patch16_224").build(image_size=224, channels=3, classes=10).train()
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(images), model(images))
