"""A ViT sliced by heads: k of its heads are the published HydraViT's, and an ordinary ViT of k heads."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hsvit_ds.models import hsvit, macs
from hsvit_ds.models.slimmable import FULL, Width
from hsvit_ds.models.slimmable import Config as Widths
from hsvit_ds.models.vit import Config, ViT

HEADS, OWN = 4, 8
"""Heads of the small network, and the width of each."""
LEADING = Widths(smallest=0.25, granularity=0.25, slice="heads", side="leading", isolated=False)
SMALL: dict[str, Any] = {"embedding": HEADS * OWN, "heads": HEADS, "depth": 2, "patch_size": 4, "widths": LEADING}
DEIT_B = Config(variant="DeiT-B", widths=replace(LEADING, granularity="1/12"))
FAMILIES = {
    "leading": LEADING,
    "trailing": replace(LEADING, side="trailing"),
    "isolated": replace(LEADING, side="trailing", isolated=True),
    "isolated, large": replace(LEADING, isolated="large"),
}


def filled(model: ViT, seed: int = 0, std: float = 0.2) -> ViT:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=std, generator=generator)
    return model


def small(**options: Any) -> ViT:
    return filled(Config(**{**SMALL, **options}).build(image_size=16, channels=3, classes=7))


def images() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def hydravit(w: dict[str, Tensor], x: Tensor, heads: int, side: str = "leading", own: int = OWN) -> Tensor:
    """Logits of the published HydraViT (github ds-kiel/HydraViT) in plain PyTorch: so many heads of so many channels.

    w: parameters by name, full. x: images. side: the published code's is leading.
    """
    p = heads * own

    def cut(tensor: Tensor, *axes: int, used: int = p) -> Tensor:
        for axis in axes:
            tensor = tensor.narrow(axis, 0 if side == "leading" else tensor.shape[axis] - used, used)
        return tensor

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (p,), cut(w[f"{name}.weight"], 0), cut(w[f"{name}.bias"], 0), 1e-6)

    kernel = w["patch_embed.proj.weight"]
    x = F.conv2d(x, cut(kernel, 0), cut(w["patch_embed.proj.bias"], 0), kernel.shape[2]).flatten(2).mT
    x = torch.cat((cut(w["cls_token"], 2).expand(len(x), -1, -1), x), 1) + cut(w["pos_embed"], 2)
    for block in (f"blocks.{number}" for number in range(sum("norm1.weight" in name for name in w))):
        roles = zip(w[f"{block}.attn.qkv.weight"].chunk(3), w[f"{block}.attn.qkv.bias"].chunk(3), strict=True)
        y = norm(x, f"{block}.norm1")
        q, k, v = (
            F.linear(y, cut(weight, 0, 1), cut(bias, 0)).unflatten(-1, (heads, own)).transpose(1, 2)
            for weight, bias in roles
        )
        y = ((q @ k.mT / own**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, cut(w[f"{block}.attn.proj.weight"], 0, 1), cut(w[f"{block}.attn.proj.bias"], 0))
        fc1, fc2 = w[f"{block}.mlp.fc1.weight"], w[f"{block}.mlp.fc2.weight"]
        y = F.linear(
            norm(x, f"{block}.norm2"), cut(cut(fc1, 0, used=4 * p), 1), cut(w[f"{block}.mlp.fc1.bias"], 0, used=4 * p)
        )
        x = x + F.linear(F.gelu(y), cut(cut(fc2, 1, used=4 * p), 0), cut(w[f"{block}.mlp.fc2.bias"], 0))
    return F.linear(norm(x, "norm")[:, 0], cut(w["head.weight"], 1), w["head.bias"])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_the_published_code(family: str) -> None:
    ours = small(widths=FAMILIES[family]).train()
    theirs = copy.deepcopy(dict(ours.named_parameters()))
    widths = ours.config.widths.all
    assert [width.of(HEADS) for width in widths] == [1, 2, 3, 4]
    for width in widths:
        ours.zero_grad()
        found, expected = ours(images(), width=width), hydravit(theirs, images(), width.of(HEADS), width.side)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        found.square().mean().backward()
        gradients = torch.autograd.grad(expected.square().mean(), list(theirs.values()))
        for (name, parameter), gradient in zip(ours.named_parameters(), gradients, strict=True):
            assert parameter.grad is not None
            if name.endswith("qkv.bias"):  # a key's is zero, but for rounding
                gradient = gradient.clone()
                gradient[HEADS * OWN : 2 * HEADS * OWN] = 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"layer_scale": 0.1}, {"softmax_scale": "full"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_standalone_subnet(family: str, options: dict[str, Any]) -> None:
    model = small(widths=FAMILIES[family], **options).train()
    for width in model.config.widths.all:
        model.zero_grad()
        alone = model.subnet(width)
        assert (alone.config.heads, alone.config.embedding) == (width.of(HEADS), width.of(HEADS) * OWN)
        assert alone.config.widths.all == (FULL,)
        logits = [net(images(), **given) for net, given in ((model, {"width": width}), (alone, {}))]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
        for answer in logits:
            answer.square().mean().backward()
        gradients = copy.deepcopy(model)  # cut as the weights are
        for mine, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
            mine.data = parameter.grad
        for (name, mine), theirs in zip(gradients.subnet(width).named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)
        squares = [sum(float(p.grad.square().sum()) for p in net.parameters()) for net in (model, alone)]
        assert squares[0] == pytest.approx(squares[1], rel=1e-5)  # so that nothing else has a gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_a_width_trains_its_own_heads_whole_from_its_side(family: str) -> None:
    model = small(widths=FAMILIES[family]).train()
    d = HEADS * OWN
    for width in model.config.widths.all:
        model.zero_grad()
        model(images(), width=width).square().mean().backward()
        used = width.of(d)
        heads = torch.arange(used) + (0 if width.side == "leading" else d - used)
        rows = model.blocks[0].attn.qkv.weight.grad.any(1).nonzero().flatten()
        assert torch.equal(rows, torch.cat((heads, heads + d, heads + 2 * d)))
        columns = model.blocks[0].attn.proj.weight.grad.any(0).nonzero().flatten()
        assert torch.equal(columns, heads)


def test_deit_bs_subnets_are_the_published_networks() -> None:
    """GMACs of HydraViT's figures at 3 to 12 heads; 3, 6 and 12 heads are DeiT-Ti, -S and -B."""
    with torch.device("meta"):
        model = DEIT_B.build(image_size=224, channels=3, classes=1000)
    found = [round(macs(model, width) / 1e9, 2) for width in model.config.widths.all]
    assert found == [1.25, 2.14, 3.25, 4.60, 6.18, 7.99, 10.04, 12.31, 14.82, 17.56]
    for heads, variant in ((3, "DeiT-Ti"), (6, "DeiT-S"), (12, "DeiT-B")):
        width = model.config.widths.find(f"{heads}/12")
        alone = replace(Config(variant=variant).resolved(224), variant="")
        assert replace(model.config.at(width), variant="") == alone


@torch.no_grad()
def test_subnets_of_deit_b_are_timms_deits() -> None:
    import timm

    model = filled(DEIT_B.build(image_size=224, channels=3, classes=1000), std=0.05).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    for heads, name in ((3, "deit_tiny_patch16_224"), (6, "deit_small_patch16_224")):
        width = model.config.widths.find(f"{heads}/12")
        theirs = timm.create_model(name).eval()
        theirs.load_state_dict(model.subnet(width).state_dict())
        torch.testing.assert_close(theirs(x), model(x, width=width), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qkv": "fused"}, 'qkv = "fused" slices q, k and v as one block, .*; set qkv = "per_role"'),
        ({"sliced": "mlp"}, 'sliced = "mlp" slices MLPs alone, which have no heads .*; set sliced = "all"'),
        (
            {"widths": replace(LEADING, smallest=0.5, granularity=0.125)},
            r"width 0.625: 0.625 x heads 4 = 2.5 is not a whole number; nearest: 0.50, 0.75",
        ),
    ],
)
def test_what_has_no_heads_to_slice_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_forward_refuses_a_part_of_a_head() -> None:
    with pytest.raises(ValueError, match=r"width 0.375: 0.375 x heads 4 = 1.5 is .*; nearest: 0.25, 0.50"):
        small()(images(), width=Width(3, 8))


def test_an_hsvit_is_not_sliced_by_heads() -> None:
    with pytest.raises(ValueError, match=r'widths.slice = "heads" is for a ViT; .* attention groups.*; leave it "cha'):
        hsvit.Config(variant="C2A2", widths=LEADING).resolved(32)


def test_nothing_else_is_sliced() -> None:
    with pytest.raises(ValueError, match='slice = "layers": must be "channels" or "heads"'):
        Widths(slice="layers")
