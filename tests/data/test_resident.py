"""Images that live on the device are those that workers give, bit for bit; on a CPU the device is its memory."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from hsvit_ds.data import augment
from hsvit_ds.data.batch import Batch
from hsvit_ds.data.index import open_index
from hsvit_ds.data.order import Order, Share
from hsvit_ds.data.reader import Reader
from hsvit_ds.data.splits import Config
from hsvit_ds.errors import RefusedError
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid
from hsvit_ds.run import recipe as recipes

from ..tars import data_set
from .test_reader import spoil

MIXED = {"shift": 2, "mixup": 0.8, "cutmix": 1.0, "mix_block": 4, "erase": 0.3, "label_smoothing": 0.1}
AUGMENTED = {
    "nothing": augment.Config(),
    "on the device": augment.Config(**MIXED),
    "flipped": augment.Config(flip=0.5, **MIXED),
    "resized and flipped": augment.Config(crop="resize", flip=0.5, filter="bilinear"),
    "evaluated at the centre": augment.Config(flip=0.5, eval_crop=0.8),
    "canvas": augment.Config(canvas=32, flip=0.5, **MIXED),
    "crops of a canvas": augment.Config(canvas=40, crop="random_resized", flip=0.5, colour_jitter=0.3, repeats=3),
}


def reader(folder: Path, augmentation: augment.Config, share: Share, **keys: Any) -> Reader:
    config = Config(name="tiny", classes=10, image_size=32, root=str(folder), last_batch="fill", eval_batch=8, **keys)
    index = open_index(folder, "train")
    lengths = tuple(index.lengths.tolist())
    order = Order(lengths, 16, share.global_batch, 5, repeats=augmentation.repeats, fill=True)
    return Reader(config, augmentation, order, share, Grid(GridConfig(), 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = data_set(tmp_path / "set", train=50, val=21, side=36)
    spoil(made, [7, 8, 30, 49])  # the last one is replaced by the first
    return made


def assert_same(found: Batch, expected: Batch, augmentation: augment.Config, here: Reader) -> None:
    for name in ("images", "labels", "views", "index"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    assert (found.seed, found.step) == (expected.seed, expected.step)
    prepared = (augment.prepare(batch, augmentation, here.facts) for batch in (found, expected))
    for a, b in zip(*prepared, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("augmentation", AUGMENTED.values(), ids=AUGMENTED)
def test_images_on_the_device_are_the_workers(folder: Path, augmentation: augment.Config) -> None:
    """Two epochs in order, one begun in its middle, micro batches of the second replica, bad images, evaluation."""
    share = Share(24, 3, 2, 1)
    fed = reader(folder, augmentation, share, workers=0, on_device="never")
    resident = reader(folder, augmentation, share, workers=0, on_device="always")
    for epoch, first in ((0, 0), (1, 0), (3, 2)):
        for a, b in zip(resident.train(epoch, first), fed.train(epoch, first), strict=True):
            assert len(a) == 3
            for found, expected in zip(a, b, strict=True):
                assert_same(found, expected, augmentation, fed)
    for split in ("val", "train"):
        for a, b in zip(resident.evaluation(split), fed.evaluation(split), strict=True):
            valid = a[2]
            assert torch.equal(valid, b[2])
            assert torch.equal(a[1], b[1])
            assert torch.equal(a[0][valid], b[0][valid])
    for a, b in zip(resident.calibration(2), fed.calibration(2), strict=True):
        assert_same(a[0], b[0], augmentation, fed)
    assert set(fed.new_bad()) <= set(resident.new_bad())
    assert fed.placement == ""
    side = augmentation.canvas or 32
    assert resident.placement == f"train: 50 images on the device, {50 * 3 * side**2 / 2**20:,.1f} MiB"


@pytest.mark.heavy
def test_workers_decode_them_and_draw_their_views(folder: Path) -> None:
    augmentation = AUGMENTED["crops of a canvas"]
    share = Share(12, 1, 1, 0)
    fed = reader(folder, augmentation, share, workers=0, on_device="never")
    resident = reader(folder, augmentation, share, workers=2, on_device="always")
    try:
        for (a,), (b,) in zip(resident.train(0, 0), fed.train(0, 0), strict=True):
            assert_same(a, b, augmentation, fed)
    finally:
        resident.close()


def test_a_split_is_read_when_it_is_first_asked_for_and_once(folder: Path) -> None:
    """An evaluation needs nothing of the training split; training images on the device need no files."""
    share = Share(10, 1, 1, 0)
    one = reader(folder, AUGMENTED["flipped"], share, workers=0, on_device="always")
    shards = {shard: shard.read_bytes() for shard in folder.glob("*train*.tar")}
    assert shards
    for shard in shards:
        shard.write_bytes(b"")
    assert len(list(one.evaluation("val"))) > 0
    for shard, content in shards.items():
        shard.write_bytes(content)
    next(one.train(0, 0))
    for shard in folder.glob("*.tar"):
        shard.write_bytes(b"")
    assert len(list(islice(one.train(0, 0), 3))) == 3


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["augment.policy=RandAugment"], "augment.policy = 'RandAugment' is computed by them, from the files"),
        (["augment.colour_jitter=0.3"], "augment.colour_jitter = 0.3 is computed by them, from the files"),
        (["augment.crop=random_resized"], "augment.crop = 'random_resized' is computed by them, from the files"),
    ],
)
def test_what_workers_have_to_compute_cannot_live_there(keys: list[str], why: str, folder: Path) -> None:
    fixed = ["data.name=tiny", "data.classes=10", "data.image_size=32", f"data.root={folder}", "data.on_device=always"]
    fixed += ["data.val=val", "data.test=val"]
    recipe = recipes.read(Path("recipes/cifar10/c2a2.toml"), [*fixed, "augment.preset=none", *keys])
    with pytest.raises(RefusedError) as refusal:
        recipes.resolve(recipe, 1)
    assert str(refusal.value) == f'data.on_device = "always": images have to come from workers, as {why}; set "auto"'
