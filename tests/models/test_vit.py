"""The slimmable ViT: published sizes, logits and gradients; every subnet is an ordinary ViT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hsvit_ds.engine.optimizer import Config as OptimizerConfig
from hsvit_ds.engine.optimizer import parameter_groups
from hsvit_ds.models.slimmable import FULL, Width
from hsvit_ds.models.slimmable import Config as Widths
from hsvit_ds.models.vit import Config, ViT
from hsvit_kernels.random import Draw
from tools.benchmarks.published_scala import Network

SEVEN = Widths(smallest=0.25, granularity=0.125)
SMALL: dict[str, Any] = {"embedding": 96, "heads": 3, "depth": 2, "patch_size": 4, "widths": SEVEN}
PUBLISHED: dict[str, Any] = {
    **SMALL,
    "distilled": True,
    "qkv": "fused",
    "softmax_scale": "full",
    "norm_eps": 1e-5,
    "widths": replace(SEVEN, side="leading"),
}
# Scala's sizes at 224 px and 1,000 classes, distilled: parameters, and 10^-4 GMACs, at the seven widths.
SIZES = {
    "DeiT-Ti": "483872 1182 973640 2265 1629296 3677 2450840 5418 3438272 7487 4591592 9884 5910800 12610",
    "DeiT-S": "1629296 3677 3438272 7487 5910800 12610 9046880 19047 12846512 26798 17309696 35863 22436432 46241",
    "DeiT-B": "5910800 12610 12846512 26798 22436432 46241 34680560 70940 49578896 100894 67131440 136103 "
    "87338192 176568",
}
UNDISTILLED = {"DeiT-Ti": (5717416, 12537), "DeiT-S": (22050664, 45989), "DeiT-B": (86567656, 175638)}


def small(seed: int = 0, image_size: int = 16, **options: Any) -> ViT:
    model = Config(**{**SMALL, **options}).build(image_size=image_size, channels=3, classes=7, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return model


def count(config: Config) -> int:
    with torch.device("meta"):
        model = config.build(image_size=224, channels=3, classes=1000)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", SIZES)
def test_sizes_at_every_width_are_the_published(variant: str) -> None:
    config = Config(variant=variant, distilled=True, widths=SEVEN).resolved(224)
    expected = [int(number) for number in SIZES[variant].split()]
    found = []
    for width in SEVEN.all:
        found += [count(config.at(width)), round(config.macs(224, 3, 1000, width) / 1e5)]
    assert found == expected
    plain = Config(variant=variant)
    assert (count(plain), round(plain.macs(224, 3, 1000) / 1e5)) == UNDISTILLED[variant]


def test_decayed_parameters_of_deit_s() -> None:
    """As DeiT means it. The published Scala code decays the two tokens and the positions too: 54 and 101 tensors."""
    with torch.device("meta"):
        model = Config(variant="DeiT-S", distilled=True).build(image_size=224, channels=3, classes=1000)
    groups = parameter_groups(model, OptimizerConfig())
    assert [(len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups] == [
        (54 - 3, 22373376 - (198 + 2) * 384),
        (101 + 3, 63056 + (198 + 2) * 384),
    ]


def published() -> tuple[Network, ViT]:
    theirs = Network(96, 3, 2, 16, 4, 7)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    ours = small(**PUBLISHED)
    ours.set_distilled_training()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("width", replace(SEVEN, side="leading").all, ids=str)
def test_logits_and_gradients_equal_the_published_code(width: Width) -> None:
    theirs, ours = published()
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    a, b = theirs(images, float(width)), ours.train()(images, width=width)
    for mine, other in zip(b, a, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for z, u in (a, b):
        (z.square().mean() + u.sin().mean()).backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            gradients[name].grad, parameter.grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m
        )
    ours.eval()
    torch.testing.assert_close(ours(images, width=width), (a[0] + a[1]) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distilled": True},
        {"layer_scale": 0.1},
        {"softmax_scale": "full"},
        {"qkv": "fused", "softmax_scale": "full", "distilled": True},
        {"sliced": "mlp"},
        {"widths": replace(SEVEN, isolated="large")},
        {"widths": replace(SEVEN, isolated="small", side="leading")},
    ],
    ids=str,
)
def test_a_subnet_is_an_ordinary_vit_with_the_slices_logits(options: dict[str, Any]) -> None:
    model = small(**options).eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        for width in model.config.widths.all:
            alone = model.subnet(width)
            assert alone.config.widths.all == (FULL,)
            torch.testing.assert_close(alone(images), model(images, width=width), rtol=1e-5, atol=1e-5)


def touched(model: ViT, name: str, width: Width) -> Tensor:
    """Which rows of a parameter get a gradient at a width."""
    model.zero_grad()
    model.train()(torch.randn(2, 3, 16, 16), width=width).square().sum().backward()
    grad = dict(model.named_parameters())[name].grad
    assert grad is not None
    return grad.flatten(1).any(1).nonzero().flatten()


@pytest.mark.parametrize("side", ["trailing", "leading"])
def test_the_smallest_width_uses_the_side_of_the_recipe(side: str) -> None:
    model = small(widths=replace(SEVEN, side=side))
    first, last = torch.arange(24), torch.arange(72, 96)
    assert torch.equal(
        touched(model, "blocks.0.attn.proj.weight", SEVEN_OF[side][0]), first if side == "leading" else last
    )
    half = torch.arange(48, 96) if side == "leading" else torch.arange(48)
    assert torch.equal(touched(model, "blocks.0.attn.proj.weight", SEVEN_OF[side][2]), half)
    hidden = torch.arange(96) if side == "leading" else torch.arange(288, 384)
    assert torch.equal(touched(model, "blocks.1.mlp.fc1.weight", SEVEN_OF[side][0]), hidden)


@pytest.mark.parametrize("isolated", ["large", "small"])
def test_each_range_trains_its_side(isolated: str) -> None:
    """Table 10, b and c: the widths up to 0.625, or those above, train the channels of the smallest's side."""
    model = small(widths=replace(SEVEN, isolated=isolated))
    for width in model.config.widths.all[:-1]:
        ratio = float(width)
        leads = ratio > 0.625 if isolated == "large" else 0.25 < ratio <= 0.625
        used = round(96 * ratio)
        expected = torch.arange(used) if leads else torch.arange(96 - used, 96)
        assert torch.equal(touched(model, "blocks.1.attn.proj.weight", width), expected), width


SEVEN_OF = {side: replace(SEVEN, side=side).all for side in ("leading", "trailing")}


def test_per_role_keeps_roles_and_heads_and_fused_trades_them() -> None:
    half = SEVEN.all[2]  # leading
    rows = touched(small(), "blocks.0.attn.qkv.weight", half)
    expected = torch.arange(3 * 96).view(3, 3, 32)[:, :, :16].flatten()  # role, head, channel
    assert torch.equal(rows, expected)
    assert torch.equal(touched(small(qkv="fused"), "blocks.0.attn.qkv.weight", half), torch.arange(144))


def test_the_softmax_scale_is_a_choice() -> None:
    images, width = torch.randn(2, 3, 16, 16), SEVEN.all[0]
    by_head, fixed = small().eval(), small(softmax_scale="full").eval()
    torch.testing.assert_close(by_head(images), fixed(images))
    assert not torch.allclose(by_head(images, width=width), fixed(images, width=width), rtol=1e-3)


def test_the_norm_eps_is_a_choice() -> None:
    images = 1e-3 * torch.randn(2, 3, 16, 16)
    a, b = small(norm_eps=1e-6).eval(), small(norm_eps=1e-1).eval()
    assert not torch.allclose(a(images), b(images), rtol=1e-3)


def test_a_key_bias_has_no_gradient() -> None:
    """It cannot change a softmax; rounding noise there would become steps under Adam."""
    model = small().train()
    model(torch.randn(4, 3, 16, 16), width=SEVEN.all[3]).square().sum().backward()
    bias = model.blocks[0].attn.qkv.bias.grad
    assert bias[:96].any()
    assert not bias[96:192].any()
    assert bias[192:].any()


def test_layer_scale_acts_and_learns() -> None:
    model, images = small(layer_scale=0.1).train(), torch.randn(2, 3, 16, 16)
    width = SEVEN.all[3]
    model(images, width=width).sum().backward()
    gamma = model.blocks[0].ls1.gamma
    assert torch.equal(gamma.grad != 0, torch.arange(96) < 60)
    before = model(images, width=width)
    with torch.no_grad():
        gamma.mul_(2)
    assert not torch.allclose(model(images, width=width), before)


def test_matformer_slices_the_mlp_only() -> None:
    model = small(sliced="mlp", widths=replace(SEVEN, isolated=False, side="leading"))
    half = model.config.widths.all[2]
    assert len(touched(model, "blocks.0.attn.qkv.weight", half)) == 288
    assert torch.equal(touched(model, "blocks.0.mlp.fc1.weight", half), torch.arange(192))
    assert model.config.at(half).embedding == 96
    assert model.config.at(half).hidden == (192, 192)


def test_drop_path_skips_branches_by_image_more_often_with_depth() -> None:
    model = small(drop_path=0.4, depth=3).train()
    draw = Draw.of(5, image=torch.arange(4000))
    kept = model._drop_path(torch.empty(4000), draw, 3, 2)[..., 0, 0]
    assert kept.shape == (6, 4000)
    for branch, rate in enumerate((0, 0, 0.2, 0.2, 0.4, 0.4)):
        assert float((kept[branch] == 0).float().mean()) == pytest.approx(rate, abs=0.03)
        values = kept[branch][kept[branch] > 0]
        torch.testing.assert_close(values, torch.full_like(values, 1 / (1 - rate)))
    images = torch.randn(6, 3, 16, 16)
    whole = model(images, draw=Draw.of(5, image=torch.arange(6)))
    parts = [model(images[i : i + 2], draw=Draw.of(5, image=torch.arange(i, i + 2))) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(images, draw=Draw.of(6, image=torch.arange(6))), whole)
    torch.testing.assert_close(model.eval()(images), model(images, draw=draw))


@pytest.mark.parametrize(("image_size", "patch"), [(16, 2), (24, 8), (28, 7)])
def test_any_image_and_patch_size(image_size: int, patch: int) -> None:
    model = small(image_size=image_size, patch_size=patch).eval()
    assert model.pos_embed.shape[1] == (image_size // patch) ** 2 + 1
    assert model(torch.randn(2, 3, image_size, image_size), width=SEVEN.all[0]).shape == (2, 7)


def test_initial_weights_are_deits_and_depend_on_the_seed() -> None:
    models = [Config(**SMALL).build(image_size=16, channels=3, classes=7, seed=seed) for seed in (0, 0, 1)]
    weights = [dict(m.named_parameters()) for m in models]
    for name, parameter in weights[0].items():
        assert torch.equal(parameter, weights[1][name])
    assert float(weights[0]["blocks.0.mlp.fc1.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(weights[0]["cls_token"].abs().max()) < 1e-5
    assert not weights[0]["blocks.0.attn.qkv.bias"].any()
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding": 0}, "name a variant, or set both embedding and heads"),
        ({"variant": "DeiT-L"}, 'variant = "DeiT-L": must be one of DeiT-Ti, DeiT-S, DeiT-B'),
        ({"heads": 5}, "heads = 5 does not divide embedding = 96"),
        ({"patch_size": 5}, "patch_size = 5 does not divide the images' side of 16 pixels"),
        ({"qkv": "both"}, 'qkv = "both": must be one of per_role, fused'),
        (
            {"widths": Widths(smallest=0.2, granularity=0.1)},
            r"width 0.20: 0.2 x embedding 96 = 19.2 is not a multiple of heads = 3; nearest: 0.1875, 0.21875",
        ),
        ({"embedding": 90, "widths": Widths(smallest=0.5)}, r"width 0.625: 0.625 x embedding 90 = 56.25 is not a mult"),
        ({"drop_path": 1.0}, r"drop_path = 1.0: must be in \[0, 1\)"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{**SMALL, **options}).build(image_size=16, channels=3, classes=7)


def test_a_forward_refuses_other_images_and_uncuttable_widths() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"images have shape \(2, 3, 8, 8\): must be \[B, 3, 16, 16\]"):
        model(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"width 0.30: .* nearest: 0.28125, 0.3125"):
        model(torch.zeros(2, 3, 16, 16), width=Width(3, 10))
