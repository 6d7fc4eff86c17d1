"""The built-in data set is split once and for all."""

from __future__ import annotations

import hashlib

import torch

from hsvit_ds.data.digits import MEAN, STD, split


def test_the_splits_are_disjoint_and_complete() -> None:
    sizes = {name: len(split(name)[1]) for name in ("train", "val", "test")}
    assert sizes == {"train": 1150, "val": 288, "test": 359}
    images = torch.cat([split(name)[0] for name in sizes]).flatten(1)
    assert len(images.unique(dim=0)) == 1797


def test_the_splits_are_fixed_for_good() -> None:
    digest = hashlib.sha256(b"".join(split(name)[1].numpy().tobytes() for name in ("train", "val", "test")))
    assert digest.hexdigest()[:16] == "79161d2aefe8ddb8"


def test_the_normalisation_is_the_training_splits() -> None:
    images = split("train")[0].double() / 255
    torch.testing.assert_close(images.mean().item(), MEAN[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(images.std().item(), STD[0], rtol=1e-3, atol=0)
