"""A ViT of which only MLPs are sliced, at widths that are named one by one and at mixes of them (MatFormer)."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hsvit_ds.models import hsvit, macs, parameters, timm_models
from hsvit_ds.models.slimmable import Config as Widths
from hsvit_ds.models.slimmable import Mix, Width
from hsvit_ds.models.vit import Config, ViT

from .test_hydravit import filled, images

MATFORMER = Widths(family=("1/8", "1/4", "1/2", 1), side="leading", isolated=False)
FAMILIES = {
    "leading": MATFORMER,
    "trailing": replace(MATFORMER, side="trailing"),
    "isolated": replace(MATFORMER, isolated=True),
}
SMALL: dict[str, Any] = {
    "embedding": 32, "heads": 4, "depth": 4, "patch_size": 4, "sliced": "mlp", "widths": MATFORMER,
}  # fmt: skip
MIXES: dict[str, list[float | str]] = {
    "four widths": ["1/8", 0.25, "1/2", 1],
    "two widths": [0.25, 0.25, 0.25, 0.5],
    "the widest last": ["1/8", "1/8", "1/8", 1],
    "one width": [0.5, 0.5, 0.5, 0.5],
}
DEIT_B = Config(variant="DeiT-B", sliced="mlp", widths=MATFORMER)


def small(**options: Any) -> ViT:
    return filled(Config(**{**SMALL, **options}).build(image_size=16, channels=3, classes=7))


def matformer(w: dict[str, Tensor], x: Tensor, hidden: list[int], sides: list[str], heads: int = 4) -> Tensor:
    """Logits of a ViT in plain PyTorch whose block number i computes with so many hidden features, of that end.

    w: parameters by name, full. x: images.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    kernel = w["patch_embed.proj.weight"]
    x = F.conv2d(x, kernel, w["patch_embed.proj.bias"], kernel.shape[2]).flatten(2).mT
    x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x), 1) + w["pos_embed"]
    for number, (used, side) in enumerate(zip(hidden, sides, strict=True)):
        at = f"blocks.{number}"
        y = norm(x, f"{at}.norm1")
        q, k, v = F.linear(y, w[f"{at}.attn.qkv.weight"], w[f"{at}.attn.qkv.bias"]).chunk(3, -1)
        q, k, v = (role.unflatten(-1, (heads, -1)).transpose(1, 2) for role in (q, k, v))
        y = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, w[f"{at}.attn.proj.weight"], w[f"{at}.attn.proj.bias"])
        end = slice(0, used) if side == "leading" else slice(-used, None)
        y = F.linear(norm(x, f"{at}.norm2"), w[f"{at}.mlp.fc1.weight"][end], w[f"{at}.mlp.fc1.bias"][end])
        x = x + F.linear(F.gelu(y), w[f"{at}.mlp.fc2.weight"][:, end], w[f"{at}.mlp.fc2.bias"])
    return F.linear(norm(x, "norm")[:, 0], w["head.weight"], w["head.bias"])


def asked(model: ViT) -> list[tuple[Any, list[Width]]]:
    """Every width and some mixes, as a forward takes them, and what they are in each block."""
    found: list[tuple[Any, list[Width]]] = [(width, [width] * 4) for width in model.config.widths.all]
    return found + [(mix, [model.config.widths.find(value) for value in mix]) for mix in MIXES.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_plain_pytorch(family: str) -> None:
    ours = small(widths=FAMILIES[family]).train()
    theirs = copy.deepcopy(dict(ours.named_parameters()))
    for given, blocks in asked(ours):
        ours.zero_grad()
        found = ours(images(), width=given)
        expected = matformer(theirs, images(), [width.of(128) for width in blocks], [width.side for width in blocks])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        found.square().mean().backward()
        gradients = torch.autograd.grad(expected.square().mean(), list(theirs.values()))
        for (name, parameter), gradient in zip(ours.named_parameters(), gradients, strict=True):
            assert parameter.grad is not None
            if name.endswith("qkv.bias"):  # a key's is zero, but for rounding
                gradient = gradient.clone()
                gradient[32:64] = 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"layer_scale": 0.1}, {"softmax_scale": "full"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_standalone_subnet(family: str, options: dict[str, Any]) -> None:
    model = small(widths=FAMILIES[family], **options).train()
    for given, blocks in asked(model):
        model.zero_grad()
        alone = model.subnet(given)
        assert [block.mlp.fc1.out_features for block in alone.blocks] == [width.of(128) for width in blocks]
        logits = [net(images(), **asks) for net, asks in ((model, {"width": given}), (alone, {}))]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
        for answer in logits:
            answer.square().mean().backward()
        gradients = copy.deepcopy(model)  # cut as the weights are
        for mine, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
            mine.data = parameter.grad
        for (name, mine), theirs in zip(gradients.subnet(given).named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)
        squares = [sum(float(p.grad.square().sum()) for p in net.parameters()) for net in (model, alone)]
        assert squares[0] == pytest.approx(squares[1], rel=1e-5)  # so that nothing else has a gradient


def test_a_mix_of_one_width_computes_what_the_width_does() -> None:
    model = small().eval()
    with torch.no_grad():
        assert torch.equal(model(images(), width=[0.5] * 4), model(images(), width=0.5))
        features = [model.forward_features(images(), width=width) for width in ([0.5] * 4, 0.5)]
    assert torch.equal(*features)
    assert model.config.at(model.width([0.5] * 4)) == model.config.at(model.width(0.5))


def test_sizes_of_a_mix_are_those_of_its_standalone_network() -> None:
    model = small()
    for given, blocks in asked(model):
        alone = model.subnet(given)
        assert parameters(model, given) == sum(p.numel() for p in alone.parameters())
        assert macs(model, given) == macs(alone, 1.0)
        # What a block's MLP computes less: two products of 17 tokens by 32 channels.
        missing = sum(128 - width.of(128) for width in blocks)
        assert macs(model, 1.0) - macs(model, given) == 2 * 17 * 32 * missing
        assert parameters(model, 1.0) - parameters(model, given) == 65 * missing


def test_deit_bs_gmacs_are_the_formulas_and_the_published_ones() -> None:
    """MatFormer's curve in arXiv 2507.10800 has ten points, 9.20 to 17.56 GMACs: MLPs of 3/12 to 12/12, not of 1/8."""
    with torch.device("meta"):
        model = DEIT_B.build(image_size=224, channels=3, classes=1000)
    tokens, d = 197, 768
    rest = 196 * d * d + 12 * (4 * tokens * d * d + 2 * tokens**2 * d) + 1000 * d
    for width in model.config.widths.all:
        assert macs(model, width) == rest + 12 * 2 * tokens * d * width.of(4 * d)
    assert [round(macs(model, width) / 1e9, 2) for width in model.config.widths.all] == [7.8, 9.2, 11.99, 17.56]
    twelfths = replace(MATFORMER, family=(), smallest="3/12", granularity="1/12")
    found = [replace(DEIT_B, widths=twelfths).macs(224, 3, 1000, width) for width in twelfths.all]
    published = [9.20, 10.13, 11.06, 11.99, 12.92, 13.85, 14.78, 15.70, 16.63, 17.56]
    assert [number / 1e9 for number in found] == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize(
    ("text", "layers", "printed"),
    [
        ("1/8,1/8,1/2,1", ["1/8", "1/8", "1/2", 1], "0.125x2,0.50,1.00"),
        ("0.25x3, 1", [0.25, 0.25, 0.25, 1], "0.25x3,1.00"),
        ("0.5x4", [0.5] * 4, "0.50x4"),
        ("1/8,0.25,1/2,1.0", [0.125, 0.25, 0.5, 1.0], "0.125,0.25,0.50,1.00"),
    ],
)
def test_a_mix_is_read_as_it_is_printed(text: str, layers: list[Any], printed: str) -> None:
    mix = MATFORMER.mix(text)
    assert list(mix.layers) == [MATFORMER.find(value) for value in layers]
    assert str(mix) == printed
    assert MATFORMER.mix(printed) == MATFORMER.mix(layers) == mix
    assert float(mix) == pytest.approx(sum(map(float, mix.layers)) / 4)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (["1/8", 1, "1/2", 1], r"mix 0.125,1.00,0.50,1.00: 0.50 after 1.00; widths must not decrease"),
        ([0.25, 0.5], r"mix 0.25,0.50 has 2 widths for 4 blocks; give one a block"),
        ([0.25] * 5, r"mix 0.25x5 has 5 widths for 4 blocks; give one a block"),
        ([], r"a mix needs a width for each layer"),
        ([0.25, 0.25, 0.75, 1], r"width 0.75 is not one of the 4 of this model; nearest: 0.50, 1.00"),
    ],
)
def test_impossible_mixes_are_refused(mix: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(images(), width=mix)


@pytest.mark.parametrize("text", ["0.5x", "0.5x0", "0.5xx2", "0.5x1.5", "0.5x-1"])
def test_a_text_that_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=f'mix "{text}": .* must be a width, or one of several layers in a row, as 0.5x3'
    ):
        MATFORMER.mix(text)


def test_untrained_widths_may_be_mixed_when_asked_for() -> None:
    model = small()
    mix = MATFORMER.mix("1/16,1/8,3/4,1", untrained=True)
    torch.testing.assert_close(model(images(), width=mix), model.subnet(mix)(images()), rtol=1e-5, atol=1e-5)
    odd = MATFORMER.mix("1/3,1x3", untrained=True)
    with pytest.raises(
        ValueError, match=r"width 0.333333: 0.333333 x MLP 128 = 42.6667 is not a whole number; nearest"
    ):
        model(images(), width=odd)


def test_networks_whose_blocks_hand_on_slices_refuse_a_mix() -> None:
    every = small(sliced="all", widths=replace(MATFORMER, family=(0.5, 1)))
    with pytest.raises(ValueError, match=r'mix 0.50x2,1.00x2: sliced = "all" .*; a mix needs .* sliced = "mlp"'):
        every(images(), width=[0.5, 0.5, 1, 1])
    slim = hsvit.Config(variant="C2A2", widths=Widths(smallest=0.5)).build(image_size=32, channels=3, classes=7)
    with pytest.raises(ValueError, match=r"mix 0.50,1.00: an HSViT has one width for all layers; a mix needs a ViT"):
        slim(torch.zeros(2, 3, 32, 32), width=[0.5, 1])
    timm = timm_models.Config(name="test_resnet")
    with pytest.raises(ValueError, match=r'width 0.50,1.00: a model of kind "timm" has its full width only'):
        timm.check_width(Mix.of_layers([Width(1, 2), Width(1, 1)]))


def test_no_width_of_all_layers_is_made_of_a_mix() -> None:
    with pytest.raises(ValueError, match=r"mix 0.125x2,1.00: there is no width of all layers that 8 could be cut to"):
        MATFORMER.mix("1/8x2,1").of(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mlp_ratio": (4.0, 2.0)},
            r"mlp_ratio = \[4.0, 2.0\] has 2 numbers for depth = 4; give one a block, or one for",
        ),
        ({"mlp_ratio": (4.0, 2.0, 0.0, 4.0)}, r"mlp_ratio = .*: must be above 0"),
        ({"mlp_ratio": -1.0}, r"mlp_ratio = -1.0: must be above 0"),
        ({"mlp_ratio": (4.0, 4.0, 4.0, 0.125)}, r"width 0.125: 0.125 x MLP 4 = 0.5 is not a whole number"),
        ({"widths": replace(MATFORMER, family=("1/3", 1))}, r"width 0.333333: .* x MLP 128 = 42.6667 is not a whole"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_blocks_may_have_mlps_of_several_sizes_and_be_sliced() -> None:
    model = small(mlp_ratio=(1.0, 2.0, 2.0, 4.0))
    assert model.config.hidden == (32, 64, 64, 128)
    for mix in MIXES.values():
        alone = model.subnet(mix)
        torch.testing.assert_close(model(images(), width=mix), alone(images()), rtol=1e-5, atol=1e-5)
        assert asdict(alone.config)["mlp_ratio"] == alone.config.mlp_ratio
