"""HSViT at a width: a smaller HSViT, cut within each submodule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hsvit_ds.models.batchnorm import Statistics, move_running_statistics, recalibrate, set_statistics
from hsvit_ds.models.hsvit import Config, HSViT
from hsvit_ds.models.slimmable import Config as Widths
from hsvit_kernels.random import Draw

SLIM = Config(
    variant="C2A2", submodules=2, dropout=0.2, widths=Widths(smallest=0.25, granularity=0.125)
)  # 8 groups, 32 and 64 kernels a submodule
KINDS = pytest.mark.parametrize("config", [SLIM, replace(SLIM, depthwise=True)], ids=["dense", "depthwise"])


def slim(config: Config = SLIM) -> HSViT:
    model = config.build(image_size=32, channels=3, classes=7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def recalibrated(model: HSViT, images: Tensor) -> HSViT:
    widths = model.config.widths.all[:-1]
    with recalibrate(model, widths):
        for width in widths:
            model(images, width=width)
    return model


@KINDS
def test_widths_are_taken_within_each_submodule(config: Config) -> None:
    """So a rank's share of a width needs nothing of the others, in training with dropout too."""
    whole = slim(config).train()
    x, draw = torch.randn(6, 3, 32, 32), Draw.of(3, image=torch.arange(6))
    for width in SLIM.widths.all:
        sums = []
        for here in (range(0, 1), range(1, 2)):
            part = config.build(image_size=32, channels=3, classes=7, here=here).train()
            stacked = whole.submodules.state_dict()
            part.submodules.load_state_dict({k: v.chunk(2)[here.start] for k, v in stacked.items()})
            sums.append(part.submodules(x, draw, width).sum(1))
        expected = whole.head((sums[0] + sums[1]) / width.of(16))
        torch.testing.assert_close(whole(x, draw=draw, width=width), expected, rtol=1e-5, atol=1e-5)


@KINDS
@torch.no_grad()
def test_a_width_of_hsvit_is_a_smaller_hsvit(config: Config) -> None:
    x = torch.randn(16, 3, 32, 32)
    model = recalibrated(slim(config), x).eval()
    for width in SLIM.widths.all:
        small = model.subnet(width)
        assert small.config.groups == width.of(16)
        assert small.config.kernels == (width.of(64), width.of(128))
        torch.testing.assert_close(small(x), model(x, width=width), rtol=1e-5, atol=1e-5)
        for present in ([True, False], [False, True]):
            subset = torch.tensor(present)
            torch.testing.assert_close(small(x, present=subset), model(x, present=subset, width=width))
        assert small.config.macs(32, 3, 7) == config.macs(32, 3, 7, width)


@torch.no_grad()
def test_statistics_of_a_width_are_those_of_the_images_shown() -> None:
    """Not the full network's, nor an average over steps that trained other widths."""
    x = torch.randn(64, 3, 32, 32)
    model = slim()
    half = SLIM.widths.find(0.5)
    with pytest.raises(ValueError, match=r"BatchNorm has no statistics for width 0.50: call recalibrate"):
        model.eval()(x, width=half)
    recalibrated(model, x)
    maps = F.conv2d(x, half.take(model.submodules.trunk[0].conv1.weight, 0, 2), padding=1)
    mean, var = model.submodules.trunk[0].norm1.recalibrated[half]
    torch.testing.assert_close(mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(var, maps.var((0, 2, 3)), rtol=1e-4, atol=1e-4)
    before = model.submodules.trunk[0].norm1.running_mean.clone()
    set_statistics(model, Statistics())
    model.train()(x, draw=Draw.of(0, image=torch.arange(64)), width=half)
    move_running_statistics(model, torch.tensor(True), None)
    assert torch.equal(model.submodules.trunk[0].norm1.running_mean, before), "only full passes move them"
    assert not model.submodules.trunk[0].norm1.recalibrated, "they are of weights that have changed"


def test_a_width_that_groups_or_kernels_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width 0.30: 0.3 x 8 groups of a submodule = 2.4 .*; nearest: 0.25, 0.375"):
        replace(SLIM, widths=Widths(smallest=0.3, granularity=0.7)).resolved(32)
    with pytest.raises(ValueError, match="without convolutions"):
        Config(
            kernels=(8,), depth=1, heads=2, embedding=16, groups=2, convolution=False, widths=Widths(smallest=0.5)
        ).resolved(4)
