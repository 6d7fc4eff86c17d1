"""What a worker makes of an image depends on seed, epoch, sample and copy only."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hsvit_ds.data import augment
from hsvit_ds.data.augment import PRESETS, Config
from hsvit_ds.data.decode import Box, installed
from hsvit_ds.data.sets import photographs
from hsvit_ds.data.transform import Transform, own_generators

from ..tars import encoded, picture

DECODER = installed("auto")
FACTS = photographs(24, 10)
IMAGE = picture(1, (60, 40))  # width, height
DATA = encoded(IMAGE, "PNG")
TRAINING = [
    Config(crop="random_resized", flip=0.5),
    Config(crop="resize", policy="RandAugment", colour_jitter=0.2),
    Config(crop="random_resized", flip=0.5, policy="TrivialAugmentWide"),
    Config(crop="random_resized", flip=0.5, policy="rand-m9-mstd0.5-inc1"),
    Config(crop="random_resized", flip=0.5, policy="3a", colour_jitter=0.3),
    Config(crop="random_resized", flip=0.5, colour_jitter=0.3, canvas=32),
]


def transform(config: Config, size: int = 24, seed: int = 0) -> Transform:
    return Transform(config, size, DECODER, seed)


def view(made: tuple[Tensor, list[float]]) -> Tensor:
    return torch.cat([made[0].flatten().double(), torch.tensor(made[1], dtype=torch.float64)])


@pytest.mark.parametrize("config", TRAINING, ids=lambda c: c.policy or f"canvas {c.canvas}")
def test_augmentation_is_a_function_of_its_key(config: Config) -> None:
    def made(seed: int, epoch: int, sample: int, copy: int) -> Tensor:
        return view(transform(config, seed=seed).training(DATA, epoch, sample, copy))

    with own_generators():
        first = made(1, 2, 3, 0)
        random.random(), np.random.rand(), torch.rand(3)
        assert torch.equal(made(1, 2, 3, 0), first)
        for others in (
            [made(s, 2, 3, 0) for s in (2, 3, 4)],
            [made(1, e, 3, 0) for e in (3, 4, 5)],
            [made(1, 2, n, 0) for n in (4, 5, 6)],
            [made(1, 2, 3, c) for c in (1, 2, 3)],
        ):
            assert any(not torch.equal(other, first) for other in others)


def test_generators_are_left_as_they_were() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with own_generators():
        transform(TRAINING[1]).training(DATA, 0, 0, 0)
    assert (random.random(), np.random.rand(), torch.rand(1)) == before


def boxes(config: Config, height: int = 40, width: int = 60, count: int = 2000) -> list[Box]:
    random.seed(0)
    chosen = transform(config)
    return [chosen._crop(height, width) for _ in range(count)]


def test_random_crops_cover_the_asked_areas_and_aspect_ratios() -> None:
    found = boxes(Config(crop="random_resized", crop_scale=(0.25, 0.5)))
    areas = np.array([b.height * b.width for b in found]) / 2400
    ratios = np.array([b.width / b.height for b in found])
    assert areas.min() > 0.23
    assert areas.max() < 0.53
    assert areas.std() > 0.05
    assert 0.7 < ratios.min() < 0.85
    assert 1.2 < ratios.max() < 1.4
    assert {b.top for b in found} >= set(range(10))
    assert all(b.top + b.height <= 40 and b.left + b.width <= 60 for b in found)


def test_a_crop_that_never_fits_is_the_largest_of_a_permitted_ratio() -> None:
    assert boxes(Config(crop="random_resized", crop_scale=(1.0, 1.0)), 10, 100, 1) == [Box(0, 43, 10, 13)]


def test_half_of_the_images_are_flipped() -> None:
    chosen = transform(Config(crop="resize", flip=0.5, filter="bilinear"), 40)
    with own_generators():
        made = [chosen.training(encoded(picture(1, 40), "PNG"), 0, i, 0)[0] for i in range(200)]
    plain = torch.from_numpy(np.asarray(picture(1, 40)).copy()).permute(2, 0, 1)
    flipped = sum(torch.equal(x, plain.flip(2)) for x in made)
    assert flipped + sum(torch.equal(x, plain) for x in made) == 200
    assert 70 < flipped < 130


@pytest.mark.parametrize("filter_", ["bilinear", "bicubic"])
def test_resizing_is_pillows(filter_: str) -> None:
    made, _ = transform(Config(crop="resize", filter=filter_)).training(DATA, 0, 0, 0)
    expected = IMAGE.resize((24, 24), Image.Resampling[filter_.upper()])
    assert np.abs(made.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 2


def test_evaluation_resizes_the_shorter_side_and_cuts_the_centre() -> None:
    made = transform(Config(eval_crop=0.75)).held_out(DATA)  # 24 / 0.75 = 32
    resized = IMAGE.resize((48, 32), Image.Resampling.BICUBIC).crop((12, 4, 36, 28))
    assert np.abs(made.permute(1, 2, 0).numpy().astype(int) - np.asarray(resized)).max() <= 2
    squashed = transform(Config()).held_out(DATA)
    assert np.abs(squashed.permute(1, 2, 0).numpy() - np.asarray(IMAGE.resize((24, 24))).astype(int)).max() <= 2


def test_the_device_cuts_out_what_the_workers_would() -> None:
    """The crop, flip and colours of a view, from a canvas as large as the image, against the workers' own."""
    config = Config(crop="random_resized", crop_scale=(0.4, 0.6), flip=0.5, filter="bilinear", canvas=64)
    square = encoded(picture(1, 64), "PNG")
    with own_generators():
        there = [transform(config, 24).training(square, 0, i, 0) for i in range(20)]
        here = [transform(Config(**{**vars(config), "canvas": 0}), 24).training(square, 0, i, 0)[0] for i in range(20)]
    canvas, views = torch.stack([x for x, _ in there]), torch.tensor([v for _, v in there])
    cut = augment.cut_out(canvas, views, 24, FACTS)
    expected = augment.normalise(torch.stack(here), FACTS.mean, FACTS.std)
    assert (cut - expected).abs().mean() < 0.06  # of a standard deviation: only the worker's filter is antialiased
    assert len(set(views[:, 4].tolist())) == 2


def test_the_device_changes_colours_as_torchvision_does() -> None:
    from torchvision.transforms import functional

    factors = [1.2, 0.7, 1.3]
    image = torch.from_numpy(np.asarray(picture(2, 24)).copy()).permute(2, 0, 1)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0, *factors]])
    cut = augment.cut_out(image[None], whole, 24, FACTS)
    expected = functional.adjust_brightness(image, factors[0])
    expected = functional.adjust_contrast(expected, factors[1])
    expected = functional.adjust_saturation(expected, factors[2])
    assert (cut[0] - augment.normalise(expected[None], FACTS.mean, FACTS.std)[0]).abs().max() < 0.06


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "none"])
def test_presets_are_whole_recipes_that_keys_override(preset: str) -> None:
    from hsvit_ds.run import recipe as recipes

    table = {
        "model": {"kind": "hsvit", "variant": "C2A2"},
        "augment": {"preset": preset, "mixup": 0.3},
        "data": {"name": "cifar10"},
    }
    made = recipes.from_table(table, "here").augment
    assert made == Config(**{**PRESETS[preset], "preset": preset, "mixup": 0.3})
    with own_generators():
        pixels, _ = transform(made).training(DATA, 0, 0, 0)
    assert pixels.shape == (3, 24, 24)


def test_a_policy_of_nobody_is_refused() -> None:
    with pytest.raises(
        ValueError, match='policy = "autoaugment": must be RandAugment, TrivialAugmentWide, or a string'
    ):
        Config(policy="autoaugment")
    with pytest.raises(ValueError, match='canvas = 32: policy = "3a" is computed by the workers only'):
        Config(policy="3a", canvas=32)
