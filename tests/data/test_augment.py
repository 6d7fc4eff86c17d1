"""Augmentation depends on a sample's place in the global batch, never on the micro batch it is computed in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hsvit_ds.data.augment import Config, erase, mix, normalise, shift, targets
from hsvit_kernels.random import Draw

DRAW = Draw.of(1, 2, 0, image=torch.arange(512))
BOTH = Config(mixup=0.8, cutmix=1.0, mix_block=4)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (512,), generator=generator)
    return torch.rand(512, 3, 8, 8, generator=generator), targets(labels, 10, 0.1)


def test_mixing_and_shifting_do_not_depend_on_the_micro_batch() -> None:
    images, soft = batch()
    whole = mix(images, soft, DRAW, BOTH)
    part = mix(images[128:256], soft[128:256], DRAW.slice(128, 256), BOTH)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[128:256], b)
    assert torch.equal(shift(images, DRAW, 2)[128:256], shift(images[128:256], DRAW.slice(128, 256), 2))


@pytest.mark.parametrize("config", [BOTH, Config(mixup=1.0), Config(cutmix=1.0)], ids=["both", "mixup", "cutmix"])
def test_targets_follow_the_pixels(config: Config) -> None:
    """Images whose pixels are their target's first entry stay so on average: the box's area is the label's share."""
    soft = targets(torch.arange(512) % 2, 10, 0.0)
    images = soft[:, :1, None, None].expand(-1, 3, 8, 8)
    mixed, y = mix(images, soft, DRAW, config)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), y[:, 0])
    torch.testing.assert_close(y.sum(1), torch.ones(512))
    assert (mixed != images).any(3).any(2).any(1).double().mean() > 0.5


def test_half_of_the_blocks_are_cut_where_both_are_on() -> None:
    images = targets(torch.arange(512) % 2, 10, 0.0)[:, :1, None, None].expand(-1, 1, 8, 8)
    mixed, _ = mix(images, torch.ones(512, 10), DRAW, BOTH)
    is_binary = ((mixed == 0) | (mixed == 1)).flatten(1).all(1)
    assert 0.3 < is_binary.double().mean() < 0.75


def test_mix_probability_leaves_the_rest_alone() -> None:
    images, soft = batch()
    mixed, _ = mix(images, soft, DRAW, Config(mixup=1.0, mix_probability=0.25, mix_block=4))
    kept = (mixed == images).flatten(1).all(1)
    assert 0.6 < kept.double().mean() < 0.9


def test_shifts_reach_every_offset_and_move_whole_images() -> None:
    images = torch.zeros(512, 1, 9, 9)
    images[:, :, 4, 4] = 1
    moved = shift(images, DRAW, 2)
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(512))
    assert torch.equal((moved.sum((0, 1)) > 0).nonzero().unique(), torch.arange(2, 7))


def test_normalise_is_by_channel() -> None:
    images = torch.full((1, 2, 1, 1), 255, dtype=torch.uint8)
    torch.testing.assert_close(normalise(images, (0.5, 0.0), (0.5, 2.0)).flatten(), torch.tensor([1.0, 0.5]))


def test_smoothing_spreads_over_all_classes() -> None:
    torch.testing.assert_close(targets(torch.tensor([1]), 4, 0.2), torch.tensor([[0.05, 0.85, 0.05, 0.05]]))


def test_erased_boxes_are_of_the_asked_number_and_size() -> None:
    config = Config(erase=0.25, erase_with="zeros")
    erased = erase(torch.ones(512, 3, 32, 32), DRAW, config) == 0
    assert torch.equal(erased.all(1), erased.any(1))  # all channels alike
    share = erased[:, 0].float().mean((1, 2))
    assert 0.18 < (share > 0).double().mean() < 0.32
    assert share[share > 0].min() > 0.01
    assert 0.25 < share.max() < 0.36
    rows, columns = erased[:, 0].any(2).sum(1), erased[:, 0].any(1).sum(1)
    assert torch.equal((rows * columns).float(), share * 1024)  # one box an image


def test_erased_noise_is_normal_and_does_not_depend_on_the_micro_batch() -> None:
    config = Config(erase=1.0)
    images = torch.full((512, 3, 16, 16), 100.0)
    whole = erase(images.clone(), DRAW, config)
    noise = whole[whole != 100]
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02
    assert torch.equal(erase(images[128:256].clone(), DRAW.slice(128, 256), config), whole[128:256])
