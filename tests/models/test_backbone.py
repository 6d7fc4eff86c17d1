"""A CNN of timm in the place of HSViT's trunk: the paper's sizes, timm's own map, and what is frozen stays so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hsvit_ds.engine.interop import save_model
from hsvit_ds.engine.optimizer import Config as OptimizerConfig
from hsvit_ds.engine.optimizer import parameter_groups
from hsvit_ds.errors import RefusedError
from hsvit_ds.models import backbone as backbones
from hsvit_ds.models import mobilenet, uniformer
from hsvit_ds.models.batchnorm import BatchNorm, Statistics, move_running_statistics, set_statistics
from hsvit_ds.models.hsvit import Config, HSViT
from hsvit_kernels.random import Draw

from .test_timm_models import images, randomised, saved, timms_own

PAPER = Config(backbone=backbones.Config(name="resnet50"), groups=64, depth=2, heads=8)
TINY = Config(
    backbone=backbones.Config(name="test_resnet", trained_stages=-1),
    groups=4,
    depth=2,
    heads=2,
    embedding=8,
    dropout=0.0,
)
# Maps [B, K, H, W] with BatchNorm, with fused BatchNorm, with LayerNorm, and [B, H, W, K].
BACKBONES = ["test_resnet", "test_efficientnet", "test_convnext", "swin_tiny_patch4_window7_224"]
# Backbone, pixels: K, side of the map, D, millions of parameters (arXiv 2404.05196, table 3).
TABLE_3 = {
    ("resnet50", 224): (2048, 7, 56, 25.3),
    ("resnet101", 224): (2048, 7, 56, 44.3),
    ("efficientnet_b4", 380): (1792, 12, 144, 28.7),
    ("efficientnet_b5", 456): (2048, 15, 232, 56.9),
    ("mobilenetv2_140", 224): (1792, 7, 56, 6.1),
}
LAST_TWO_STAGES = {
    "test_resnet": ("layer3.", "layer4."),
    "test_efficientnet": ("blocks.3.", "blocks.4.", "conv_head.", "bn2."),
    "test_convnext": ("stages.2.", "stages.3.", "head.norm."),
}


def of(config: Config, **change: Any) -> Config:
    """The config with another backbone."""
    return replace(config, backbone=replace(config.backbone, **change))


def on_meta(config: Config, size: int) -> HSViT:
    with torch.device("meta"):
        return config.build(image_size=size, channels=3, classes=1000)


def tiny(config: Config = TINY, seed: int = 0, **more: Any) -> Any:
    return config.build(image_size=64, channels=3, classes=5, seed=seed, **more).double()


def draw(step: int = 0) -> Draw:
    return Draw.of(0, step, image=torch.arange(4))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", TABLE_3, ids=str)
def test_sizes_are_the_published_ones(case: tuple[str, int]) -> None:
    name, size = case
    channels, side, embedding, millions = TABLE_3[case]
    shape = backbones.shape(backbones.Config(name=name), size, 3)
    assert (shape.channels, shape.height, shape.width) == (channels, side, side)
    model = on_meta(of(PAPER, name=name), size)
    assert model.config.kernels == (channels,)
    assert model.config.embedding == embedding
    assert round(parameters(model) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "count", "gflops"), [("resnet50", 25_338_440, 8.3228), ("resnet101", 44_330_568, 15.7473)]
)
def test_parameters_and_flops_are_the_published_ones(name: str, count: int, gflops: float) -> None:
    config = of(PAPER, name=name)
    model = on_meta(config, 224)
    assert parameters(model) == count
    assert round(2 * config.macs(224, 3, 1000) / 1e9, 4) == gflops
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_830_408


@pytest.mark.parametrize(("name", "channels", "groups"), [("convnext_tiny", 768, 64), ("regnety_016", 888, 24)])
def test_other_cnns_of_timm_are_backbones_too(name: str, channels: int, groups: int) -> None:
    model = on_meta(replace(of(PAPER, name=name), groups=groups), 224)
    assert model.config.kernels == (channels,)
    assert model.config.features(224) == 7 * 7


def test_a_smaller_output_stride_keeps_a_larger_map() -> None:
    for stride, side in ((32, 7), (16, 14), (8, 28)):
        shape = backbones.shape(backbones.Config(name="resnet18", output_stride=stride), 224, 3)
        assert (shape.height, shape.width) == (side, side)


def by_hand(model: Any, maps: Tensor) -> Tensor:
    """What an HSViT (M = 1) makes of maps [B, K, H, W], one group after the other."""
    c, own = model.config, model.submodules
    tokens = F.relu(F.linear(maps.flatten(2), own.projection_weight[0], own.projection_bias[0]))
    answers = []
    for group, x in enumerate(tokens.chunk(c.groups, dim=1)):
        x = torch.cat([own.cls[group].expand(len(x), 1, -1), x], dim=1) + own.positions[group]
        for layer in range(c.depth):
            attention = nn.MultiheadAttention(c.embedding, c.heads, batch_first=True, dtype=x.dtype)
            names = {"in_proj_weight": "qkv_weight", "in_proj_bias": "qkv_bias"}
            names |= {"out_proj.weight": "out_weight", "out_proj.bias": "out_bias"}
            attention.load_state_dict({theirs: getattr(own, ours)[group, layer] for theirs, ours in names.items()})
            normed = F.layer_norm(x, x.shape[-1:], own.norm_weight[group, layer], own.norm_bias[group, layer])
            x = x + attention(normed, normed, normed)[0]
        answers.append(x[:, 0])
    mean = torch.stack(answers).mean(0)
    head = model.head
    return F.linear(F.layer_norm(mean, mean.shape[-1:], head.norm.weight, head.norm.bias), *head.linear.parameters())


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_logits_are_those_of_timms_map_through_the_groups(name: str) -> None:
    model = tiny(of(TINY, name=name)).eval()
    randomised(model.backbone)
    options = {"img_size": 64} if "224" in name else {}
    plain = timms_own(model.backbone.net, name, num_classes=0, global_pool="", **options).eval()
    x = images(64)
    maps = plain(x)
    if maps.shape[1] != model.config.kernels[-1]:
        maps = maps.movedim(-1, 1)
    assert maps.shape[2:] == (2, 2)
    torch.testing.assert_close(model.backbone(x), maps)
    torch.testing.assert_close(model(x), by_hand(model, maps))


def test_submodules_apart_equal_submodules_together() -> None:
    """What a rank computes of its submodule, summed, is the whole model, gradients included; all that is random on."""
    config = of(replace(TINY, submodules=2, dropout=0.2), name="test_convnext", drop_path=0.3)
    whole = tiny(config)
    apart = [tiny(config, here=range(i, i + 1)) for i in range(2)]
    for model in (whole, *apart):
        randomised(model.backbone)
        model.train()
    x = images(64)
    expected = whole(x, draw())
    head = apart[0].head
    for part in apart:
        part.head = nn.Identity()
    found = head(sum(part(x, draw()) for part in apart))
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for name, parameter in whole.submodules.named_parameters():
        parts = [model.submodules.get_parameter(name).grad for model in apart]
        torch.testing.assert_close(torch.cat(parts), parameter.grad, msg=lambda text, n=name: f"{n}: {text}")
    for name, parameter in whole.backbone.named_parameters():
        total = sum(model.backbone.get_parameter(name).grad for model in apart)
        torch.testing.assert_close(total, parameter.grad, msg=lambda text, n=name: f"{n}: {text}")


def test_a_frozen_backbone_is_not_touched_by_training() -> None:
    model = tiny(of(TINY, name="test_efficientnet", trained_stages=0, drop_path=0.5)).train()
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not any(module.training for module in model.backbone.net.modules())
    assert any(isinstance(module, BatchNorm) for module in model.backbone.modules())
    set_statistics(model, Statistics())
    before = {key: tensor.clone() for key, tensor in model.backbone.state_dict().items()}
    assert model.backbone(images(64), draw()).grad_fn is None
    model(images(64), draw()).square().sum().backward()
    move_running_statistics(model, applied=torch.tensor(True), channel=None)
    for key, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.submodules.parameters())


@pytest.mark.parametrize("name", LAST_TWO_STAGES)
def test_the_last_stages_are_trained_and_the_others_frozen(name: str) -> None:
    model = tiny(of(TINY, name=name, trained_stages=2))
    net = randomised(model.train().backbone).net
    set_statistics(model, Statistics())
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    model(images(64), draw()).square().sum().backward()
    move_running_statistics(model, applied=torch.tensor(True), channel=None)
    last = LAST_TWO_STAGES[name]
    for key, parameter in net.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == key.startswith(last)
        assert parameter.grad is None or parameter.grad.any()
    for path, module in net.named_modules():
        if isinstance(module, BatchNorm):
            assert module.training == f"{path}.".startswith(last)
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key]) != ("running" in key and key.startswith(last))


def test_evaluation_and_training_follow_each_other() -> None:
    model = tiny(of(TINY, trained_stages=2)).train()
    training = [module.training for module in model.modules()]
    assert not any(module.training for module in model.eval().modules())
    assert [module.training for module in model.train().modules()] == training


class Given(nn.Module):
    """Maps in the place of a backbone."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        return self.maps


def test_a_frozen_backbone_keeps_nothing_for_a_backward_pass() -> None:
    """With it a forward keeps as many bytes as with maps from elsewhere."""

    def kept(model: HSViT) -> int:
        sizes = []
        with saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor):
            model(x, draw())
        return sum(sizes)

    x = images(64)
    models = {trained: tiny(of(TINY, trained_stages=trained)).train() for trained in (0, 2, -1)}
    found = {trained: kept(model) for trained, model in models.items()}
    models[0].backbone = Given(models[0].backbone(x))
    constant = kept(models[0])
    assert found[0] == constant
    assert 2 * constant < found[2]
    assert 2 * found[2] < found[-1]


@pytest.mark.parametrize("trained", [-1, 2])
def test_layer_decay_counts_the_layers_after(trained: int) -> None:
    model = tiny(of(TINY, trained_stages=trained))
    groups = parameter_groups(model, OptimizerConfig(layer_decay=0.5))
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    layers = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    for after, layer in enumerate(reversed(layers if trained == -1 else layers[-trained:]), 1):
        assert {scale for name, scale in scales.items() if name.startswith(f"backbone.net.{layer}.")} == {0.5**after}
    assert {scale for name, scale in scales.items() if not name.startswith("backbone.")} == {1}
    assert scales.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_layer_decay_without_layers_of_timm_is_refused() -> None:
    plain = Config(variant="C2A2").build(image_size=32, channels=3, classes=5)
    with pytest.raises(
        ValueError, match=r'layer_decay needs a model of timm or a UniFormer: model.backbone.name, or model.kind = "t'
    ):
        parameter_groups(plain, OptimizerConfig(layer_decay=0.5))


def test_initial_weights_follow_from_the_seed_alone() -> None:
    def weights(seed: int) -> Tensor:
        return torch.cat([p.flatten() for p in tiny(seed=seed).parameters()])

    first = weights(3)
    torch.manual_seed(12345)
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_weights_of_timms_classifier_are_loaded_from_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    import timm

    theirs = randomised(timm.create_model(name, num_classes=7))
    path = saved(theirs, tmp_path / f"weights{suffix}")
    model = of(TINY, name=name, weights=str(path)).build(image_size=64, channels=3, classes=5)
    expected = theirs.state_dict()
    for key, tensor in model.backbone.net.state_dict().items():
        assert torch.equal(tensor, expected[key])


def test_weights_that_do_not_fit_are_refused_with_every_key(tmp_path: Path) -> None:
    import timm

    wrong = timm.create_model("test_resnet", num_classes=5)
    del wrong.layer4[0].bn1.bias
    wrong.extra = nn.Linear(1, 1, bias=False)
    wrong.bn1.weight = nn.Parameter(torch.ones(3))
    path = saved(wrong, tmp_path / "weights.pth")
    with pytest.raises(RefusedError) as caught:
        tiny(of(TINY, weights=str(path)))
    message = str(caught.value)
    assert message.startswith(f"model.backbone.weights = {path} does not fit test_resnet for ")
    assert set(message.partition(": ")[2].split("; ")) == {
        "layer4.0.bn1.bias is missing",
        "extra.weight is left over",
        "bn1.weight has shape (3,), not (32,)",
    }


def test_weights_that_cannot_be_had_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RefusedError) as caught:
        tiny(of(TINY, name="resnet50", weights="tv_in1k"))
    message = str(caught.value)
    assert message.startswith('model.backbone.name = "resnet50": timm cannot get the weights "tv_in1k" here (')
    assert "download model.safetensors from https://huggingface.co/timm/resnet50.tv_in1k and set " in message
    assert message.endswith("set model.backbone.weights to the file")
    assert "\n" not in message


def test_a_tag_needs_no_network_until_weights_are_needed() -> None:
    assert parameters(on_meta(of(PAPER, weights="tv_in1k"), 224)) == 25_338_440


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnt50"}, r'model.backbone.name = "resnt50": timm .* has no such model; near it: resnet50, '),
        ({"name": "vit_tiny_patch16_224"}, r'"vit_tiny_patch16_224" has no feature map: its answer to an image is \['),
        ({"name": "convnext_tiny"}, 'model.backbone.name = "convnext_tiny" has no answer to images of 16 px'),
        ({"weights": "tv_in1k"}, r'model.backbone.weights = "tv_in1k": neither a file .* timm has r160_in1k'),
        ({"trained_stages": 9}, r"trained_stages = 9: test_resnet has 5 stages \(conv1.*\); set at most so many"),
        ({"trained_stages": -2}, r"trained_stages = -2: must be -1 \(all\) or more"),
        ({"output_stride": 4}, "output_stride = 4: must be 8, 16 or 32"),
        ({"name": "vit_tiny_patch16_224", "output_stride": 8}, "timm does not build it with output_stride = 8"),
        ({"drop_path": -0.1}, r"drop_path = -0.1: must be in \[0, 1\)"),
    ],
)
def test_an_impossible_backbone_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        of(TINY, **change).resolved(16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "C2A2"}, "variant is of HSViT's own trunk; a backbone takes its place"),
        ({"pool_strides": (2,)}, "pool_strides is of HSViT's own trunk"),
        ({"convolution": False}, "convolution is of HSViT's own trunk"),
        ({"depth": -1}, r"a backbone gives no depth: set depth, the attention layers \(2 in the paper\)"),
        ({"kernels": (64,)}, r"kernels = \[64\]: those of test_resnet are 96"),
        ({"groups": 5}, "groups = 5 does not divide the 96 kernels"),
        ({"submodules": 3}, "submodules = 3 does not divide groups = 4"),
        ({"widths": {"smallest": 0.5, "granularity": 0.5}}, "widths.smallest = 0.5: a backbone is not sliced"),
    ],
)
def test_an_impossible_hybrid_is_refused(change: dict[str, Any], message: str) -> None:
    if "widths" in change:
        change = {"widths": replace(TINY.widths, **change["widths"])}
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change).resolved(64)


UNIFORMER = of(TINY, name="uniformer_xs", drop_path=0.3)


@pytest.mark.parametrize(("name", "stages"), [("uniformer_small", 4), ("uniformer_small_plus", 4), ("uniformer_xs", 4)])
def test_a_uniformer_is_a_backbone_by_its_published_name(name: str, stages: int) -> None:
    shape = backbones.shape(backbones.Config(name=name), 224, 3)
    assert (shape.channels, shape.height, shape.width, shape.stages) == (512, 7, 7, stages)
    model = on_meta(of(PAPER, name=name, trained_stages=1), 224)
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and "backbone" in name}
    assert trained >= {"patch_embed4", "blocks4", "norm"}
    assert not any(name.endswith(("1", "2", "3")) for name in trained)


def test_a_uniformers_map_goes_through_the_groups_with_the_passs_own_drop_path() -> None:
    model, x = tiny(UNIFORMER), images(64)
    maps = model.backbone.net.eval().forward_features(x)
    torch.testing.assert_close(model.eval()(x), by_hand(model, maps))
    set_statistics(model, Statistics())
    model.train()
    first, again, other = (model(x, draw=draw(step)) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    first.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "cls_upsample" not in name)


def test_recomputing_a_uniformers_activations_changes_nothing() -> None:
    found = []
    for recomputes in (False, True):
        model, x = tiny(UNIFORMER), images(64)
        set_statistics(model.train(), Statistics())
        model.backbone.net.set_grad_checkpointing(recomputes)
        model(x, draw=draw()).square().sum().backward()
        move_running_statistics(model, torch.tensor(True), None)
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    for kept, recomputed in zip(*found, strict=True):
        assert (kept is None and recomputed is None) or torch.equal(kept, recomputed)


def test_layers_of_a_uniformer_have_rates_of_their_own() -> None:
    groups = parameter_groups(tiny(UNIFORMER), OptimizerConfig(layer_decay=0.5))
    rates = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert rates["head.linear.weight"] == 1
    assert rates["backbone.net.blocks4.2.mlp.fc1.weight"] == 0.5
    assert rates["backbone.net.blocks4.1.mlp.fc1.weight"] == 0.25
    assert rates["backbone.net.norm.weight"] == 0.5
    assert rates["backbone.net.patch_embed1.proj.0.weight"] == min(rates.values())


def test_a_uniformers_published_weights_start_a_backbone_and_others_are_refused(tmp_path: Path) -> None:
    whole = uniformer.Config(variant="UniFormer-XS").build(image_size=64, channels=3, classes=7, seed=5)
    torch.save({"model": whole.state_dict()}, tmp_path / "xs.pth")
    model = tiny(of(UNIFORMER, weights=str(tmp_path / "xs.pth")))
    for name, tensor in model.backbone.net.state_dict().items():
        torch.testing.assert_close(tensor.float(), whole.state_dict()[name])
    with pytest.raises(RefusedError, match=r"model.backbone.weights = .* does not fit uniformer_small: .* is missing"):
        tiny(of(UNIFORMER, name="uniformer_small", weights=str(tmp_path / "xs.pth")))
    with pytest.raises(ValueError, match=r'model.backbone.weights = "in1k": those of uniformer_xs are a file \(.safe'):
        tiny(of(UNIFORMER, weights="in1k"))
    with pytest.raises(ValueError, match=r"model.backbone.output_stride = 16: uniformer_xs has 32 alone"):
        tiny(of(UNIFORMER, output_stride=16))


def test_an_exported_mobilenet_is_timms_backbone(tmp_path: Path) -> None:
    """A slimmable one at the widths that timm has a name for."""
    whole = mobilenet.Config(variant="MobileNetV2").build(image_size=64, channels=3, classes=7)
    save_model(whole, tmp_path / "model.safetensors")
    model = tiny(of(TINY, name="mobilenetv2_100", weights=str(tmp_path / "model.safetensors"), trained_stages=0)).eval()
    x = images(64)
    torch.testing.assert_close(model.backbone(x), whole.double().eval().forward_features(x))
