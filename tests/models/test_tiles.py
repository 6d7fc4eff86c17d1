"""Submodules that see a tile of the image each are those of the plain model, on that tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hsvit_ds import models
from hsvit_ds.models import slimmable
from hsvit_ds.models.batchnorm import recalibrate
from hsvit_ds.models.hsvit import VARIANTS, Config, HSViT

PLAIN = Config(
    kernels=(16, 32), pool_strides=(2, 2), groups=8, depth=2, heads=2, embedding=16, dropout=0.0, submodules=8
)
TILED = replace(PLAIN, tiles=2)
SIZE, TILE = 32, 16
CORNERS = [(row, column) for row in (0, TILE) for column in (0, TILE)]


def built(config: Config, size: int, **more: object) -> HSViT:
    return HSViT(config, image_size=size, channels=3, classes=5, **more).double().eval()  # type: ignore[arg-type]


def images(size: int = SIZE) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_submodule_sees_its_tile_as_the_plain_one_sees_an_image() -> None:
    tiled, plain, x = built(TILED, SIZE), built(PLAIN, TILE), images()
    plain.load_state_dict(tiled.state_dict())
    sums = tiled.sums(x)
    for submodule in range(8):
        row, column = CORNERS[submodule % 4]
        alone = plain.sums(x[:, :, row : row + TILE, column : column + TILE])[:, submodule]
        torch.testing.assert_close(sums[:, submodule], alone)


def test_every_pixel_is_seen_by_the_submodules_of_its_tile_and_no_others() -> None:
    tiled, x = built(TILED, SIZE), images().requires_grad_()
    seen = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    for submodule in range(8):
        (gradient,) = torch.autograd.grad(tiled.submodules._seen(x)[:, 3 * submodule : 3 * submodule + 3].sum(), x)
        seen += (gradient[0, 0] != 0).long()
    assert bool((seen == 2).all())  # 8 submodules, 4 tiles


def test_the_submodules_of_some_ranks_are_those_of_one() -> None:
    whole, x = built(TILED, SIZE), images()
    parts = [built(TILED, SIZE, here=range(start, stop)) for start, stop in ((0, 3), (3, 4), (4, 8))]
    torch.testing.assert_close(torch.cat([part.sums(x) for part in parts], 1), whole.sums(x))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("C")])
def test_as_many_parameters_for_a_part_of_the_multiply_adds(variant: str) -> None:
    plain, tiled = (
        HSViT(Config(variant=variant, submodules=4, tiles=tiles), image_size=size, channels=3, classes=10).eval()
        for tiles, size in ((1, 64), (2, 128))
    )
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        tiled(torch.zeros(1, 3, 128, 128))
    assert models.parameters(tiled, 1.0) == models.parameters(plain, 1.0)
    assert models.macs(tiled, 1.0) == models.macs(plain, 1.0)  # each submodule computes one tile of 64 px
    attention = tiled.config.macs(128, 3, 10) - replace(tiled.config, depth=0).macs(128, 3, 10)
    counted = counter.get_total_flops() // 2
    assert abs(counted - models.macs(tiled, 1.0)) <= attention  # of the last layer CLS alone is computed


def test_widths_are_cut_from_each_tile() -> None:
    config = replace(TILED, kernels=(32, 64), groups=16, widths=slimmable.Config(smallest=0.5, granularity=0.5))
    tiled, x = built(config, SIZE), images()
    with recalibrate(tiled, [tiled.width(0.5)]):
        tiled(x, width=0.5)
    torch.testing.assert_close(tiled.eval()(x, width=0.5), tiled.subnet(0.5).double()(x))


@pytest.mark.parametrize(
    ("changes", "size", "why"),
    [
        ({"submodules": 2}, SIZE, r"tiles = 2 makes 4 parts, which 2 submodules cannot share equally"),
        ({}, 33, r"tiles = 2 does not divide images of 33 px: the last 1 row and 1 column would belong to no tile"),
        ({"tiles": 0}, SIZE, "tiles = 0: must be at least 1"),
        ({"convolution": False, "embedding": 1024}, SIZE, "there are no convolutions"),
    ],
)
def test_tiles_that_do_not_divide_are_refused(changes: dict[str, object], size: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(TILED, **changes).resolved(size)  # type: ignore[arg-type]
