"""Randomness is a function of what it is for, and nothing else."""

from __future__ import annotations

import pytest
import torch

from hsvit_kernels import random
from hsvit_kernels.random import Draw, Site


def draw(images: int = 64, *words: int) -> Draw:
    return Draw.of(*(words or (3, 1, 4)), image=torch.arange(images))


def test_bits_are_fixed_for_good() -> None:
    """Other devices and versions must give these numbers: masks, orders and resumed runs depend on them."""
    assert random.key(0, 1, 2) == (2957180829, 3047449739)
    assert random.sequence(7, count=4).tolist() == [3953852786, 341159785, 86005028, 950705798]


@pytest.mark.parametrize("first", [0, 3, 2**32 - 2, 5 * 2**32])
def test_a_part_of_a_sequence_is_what_the_whole_has_there(first: int) -> None:
    high, low = random.key(7)
    whole = [random._hash((high, low, n >> 32, n & 0xFFFFFFFF))[0] for n in range(first, first + 4)]
    assert random.sequence(7, first=first, count=4).tolist() == whole


def test_tensors_and_integers_give_the_same_bits() -> None:
    words = (1, 2**31 + 5, 77, 2**32 - 1)
    tensors = [torch.tensor(random._signed(word), dtype=torch.int32) for word in words]
    assert [int(x) & 0xFFFFFFFF for x in random.pcg4d(*tensors)] == list(random._hash(words))


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    element = torch.arange(100, dtype=torch.int32)
    whole = draw().words(Site.EMBEDDING, element)
    part = draw().slice(16, 32).words(Site.EMBEDDING, element[10:20])
    assert torch.equal(part, whole[:, 16:32, 10:20])


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits() -> None:
    element = torch.arange(4096, dtype=torch.int32)
    there = Draw.of(3, 1, 4, image=torch.arange(64), device="cuda")
    assert torch.equal(there.words(Site.EMBEDDING, element.cuda()).cpu(), draw().words(Site.EMBEDDING, element))


@pytest.mark.parametrize("other", [(4, 1, 4), (3, 2, 4), (3, 1, 5)], ids=["seed", "step", "pass"])
def test_seed_step_pass_and_site_are_independent(other: tuple[int, ...]) -> None:
    element = torch.arange(4096, dtype=torch.int32)
    first = draw().uniform(Site.EMBEDDING, element)
    for second in (draw(64, *other).uniform(Site.EMBEDDING, element), draw().uniform(Site.ATTENTION, element)):
        correlation = torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1]
        assert abs(correlation) < 3 / first.numel() ** 0.5


def test_bytes_are_uniform_and_neighbours_are_uncorrelated() -> None:
    bytes_ = draw().bytes(Site.ATTENTION, torch.arange(4096, dtype=torch.int32))
    counts = torch.bincount(bytes_.flatten().long(), minlength=256).double()
    expected = bytes_.numel() / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 4 * (2 * 255) ** 0.5
    centred = bytes_.double() - 127.5
    for a, b in [
        (centred[:-1], centred[1:]),  # images
        (centred[:, :-1], centred[:, 1:]),  # elements
        (centred[..., :-1], centred[..., 1:]),  # bytes of a call
    ]:
        assert abs((a * b).mean() / centred.square().mean()) < 4 / a.numel() ** 0.5


def test_uniform_is_open_and_even() -> None:
    u = draw().uniform(Site.MIXING, torch.arange(4096, dtype=torch.int32))
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 3 * (1 / 12 / u.numel()) ** 0.5


@pytest.mark.parametrize("probability", [-0.1, 1.0])
def test_an_impossible_dropout_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        random.threshold(probability)


def test_a_uniform_number_never_reaches_one_nor_a_product_with_it_its_factor() -> None:
    # The image whose shift was rounded to one that there is not: seed 0, step 1801, image 502 of fast.toml.
    words = torch.tensor([-1, -2, -512, -513, 0, 511], dtype=torch.int32)
    found = random.uniform(words)
    assert (found > 0).all()
    assert (found < 1).all()
    factors = torch.arange(1, 2**16)
    assert (found[0] * factors < factors).all()
    assert ((found[0] * factors).long() == factors - 1).all()
    luck = random.Draw.of(0, 1801, 0, image=torch.tensor([502])).uniform(random.Site.AUGMENT, torch.arange(2))
    assert (luck * 9).long().tolist()[0][1] == 8
