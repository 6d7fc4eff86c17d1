"""A grey image has one channel from its file to the model; sets of other channels are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hsvit_ds.data import augment, remote, splits
from hsvit_ds.data.augment import Config
from hsvit_ds.data.batch import Batch
from hsvit_ds.data.index import open_index
from hsvit_ds.data.order import Order, Share
from hsvit_ds.data.preprocessing import Preprocessing
from hsvit_ds.data.reader import Reader
from hsvit_ds.data.sets import SETS
from hsvit_ds.data.transform import Transform, own_generators
from hsvit_ds.errors import RefusedError
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid

from ..tars import data_set, encoded, make_index, picture, sample, write_tar
from .test_decode import DECODERS

MIXED: dict[str, Any] = {"shift": 2, "mixup": 0.8, "cutmix": 1.0, "mix_block": 4, "erase": 0.5, "label_smoothing": 0.1}
AUGMENTED = {
    "as in evaluation": Config(),
    "HSViT's": Config(crop="resize", policy="RandAugment", filter="bilinear", mixup=1.0, cutmix=1.0, mix_block=4),
    "trivial": Config(crop="random_resized", flip=0.5, policy="TrivialAugmentWide", colour_jitter=0.3),
    "timm's": Config(crop="random_resized", policy="rand-m9-mstd0.5-inc1"),
    "three": Config(policy="3a"),
    "augmix": Config(policy="augmix-m5-w4-d2"),
    "original": Config(policy="original"),
    "on the device": Config(flip=0.5, **MIXED),
    "canvas": Config(canvas=32, crop="random_resized", flip=0.5, colour_jitter=0.3, **MIXED),
}
RESIDENT = {name: config for name, config in AUGMENTED.items() if not config.needs_workers}
GREY = picture(3, (30, 40), channels=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = data_set(tmp_path_factory.mktemp("grey"), train=24, val=10, side=28, channels=1)
    lengths = {s: open_index(made, s) for s in ("train", "val")}
    info = {s: {"filenames": list(x.shards), "shard_lengths": x.lengths.tolist()} for s, x in lengths.items()}
    (made / "_info.json").write_text(json.dumps({"splits": info}))
    return made


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    remote._info.cache_clear()


def reader(root: Path | str, augmentation: Config = AUGMENTED["as in evaluation"], **keys: Any) -> Reader:
    known = {"name": "fashion_mnist", "root": str(root), "workers": 0, "eval_batch": 4, "val": "val", "test": "val"}
    config = splits.Config(**known | keys)
    order = Order(splits.shard_lengths(config), config.window, 8, 0)
    return Reader(config, augmentation, order, Share(8, 1, 1, 0), Grid(GridConfig(), 1))


def batches(reader: Reader) -> Iterator[Batch]:
    yield from (step[0] for step in reader.train(0, 0))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("kind", "mode"), [("PNG", "L"), ("JPEG", "L"), ("PNG", "LA"), ("PNG", "1"), ("PNG", "I;16")])
def test_one_channel_is_any_of_the_three_that_were_read_before(decoder: str, kind: str, mode: str) -> None:
    data = encoded(GREY.convert("I;16" if mode == "I;16" else mode), kind)
    one = Transform(Config(), 24, decoder, 0, channels=1).held_out(data)
    three = Transform(Config(), 24, decoder, 0).held_out(data)
    assert one.shape == (1, 24, 24)
    torch.testing.assert_close(one.expand(3, -1, -1).int(), three.int(), atol=1, rtol=0)


@pytest.mark.parametrize("name", AUGMENTED)
def test_every_augmentation_gives_one_channel_and_never_another(name: str) -> None:
    config = AUGMENTED[name]
    transform = Transform(config, 28, DECODERS[0], 0, channels=1)
    facts = SETS["fashion_mnist"]
    with own_generators():
        made = [transform.training(encoded(GREY, "PNG"), 0, i, 0) for i in range(40)]
    side = config.canvas or 28
    assert {x.shape for x, _ in made} == {(1, side, side)}
    index = torch.arange(40)
    views = torch.tensor([view for _, view in made])
    batch = Batch(torch.stack([x for x, _ in made]), index % 10, views, index, 0, 0)
    images, targets = augment.prepare(batch, config, facts)
    assert images.shape == (40, 1, 28, 28)
    assert images.isfinite().all()
    assert targets.shape == (40, 10)


@pytest.mark.parametrize("name", [n for n in AUGMENTED if n not in ("timm's", "three", "augmix", "original")])
def test_a_grey_image_is_augmented_as_its_rgb_copy(name: str) -> None:
    """But for timm's policies, whose colour of what is uncovered is not grey."""
    config = AUGMENTED[name]
    with own_generators():
        for i in range(30):
            one, view = Transform(config, 28, DECODERS[0], 0, channels=1).training(encoded(GREY, "PNG"), 0, i, 0)
            three, other = Transform(config, 28, DECODERS[0], 0).training(encoded(GREY.convert("RGB"), "PNG"), 0, i, 0)
            assert view == other
            torch.testing.assert_close(one.expand(3, -1, -1).int(), three.int(), atol=2, rtol=0)


def pixels(found: Iterator[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[bytes, int]]:
    return sorted(
        (image.numpy().tobytes(), int(label))
        for images, labels, valid in found
        for image, label in zip(images[valid], labels[valid], strict=True)
    )


def test_an_evaluation_by_index_of_a_stream_and_on_the_device_is_of_the_stored_pixels(folder: Path) -> None:
    expected = pixels(reader(folder).evaluation("val"))
    written = [encoded(picture(i, 28, 1)) for i in range(10)]
    whole = Preprocessing(28, 1, (0.0,), (1 / 255,))
    assert expected == sorted((whole(x).to(torch.uint8).numpy().tobytes(), i) for i, x in enumerate(written))
    assert pixels(reader(f"pipe:cat {folder}").evaluation("val")) == expected
    assert pixels(reader(folder, on_device="always").evaluation("val")) == expected


@pytest.mark.parametrize("name", RESIDENT)
def test_batches_on_the_device_are_those_of_workers(name: str, folder: Path) -> None:
    here, there = reader(folder, RESIDENT[name], on_device="always"), reader(folder, RESIDENT[name])
    for a, b in zip(batches(here), batches(there), strict=True):
        assert a.images.shape[1] == 1
        assert torch.equal(a.images, b.images)
        for x, y in zip(*(augment.prepare(batch, RESIDENT[name], here.facts) for batch in (a, b)), strict=True):
            torch.testing.assert_close(x, y)


def test_a_stream_trains_on_the_images_of_the_set(folder: Path, tmp_path: Path) -> None:
    streamed = [b for b in batches(reader(f"pipe:cat {folder}", cache=str(tmp_path)))]
    whole = {image.numpy().tobytes() for b in batches(reader(folder)) for image in b.images}
    assert len(whole) == 24
    assert {image.numpy().tobytes() for b in streamed for image in b.images} <= whole


def test_an_image_is_predicted_as_it_is_evaluated_and_colours_by_their_luminance() -> None:
    preprocessing = Preprocessing(28, 1, (0.1307,), (0.3081,))
    data = encoded(GREY, "PNG")
    expected = Transform(Config(), 28, DECODERS[0], 0, channels=1).held_out(data)
    assert torch.equal(preprocessing(data), augment.normalise(expected[None], (0.1307,), (0.3081,))[0])
    photo = picture(5, 28)
    assert torch.equal(preprocessing(encoded(photo, "PNG")), preprocessing(encoded(photo.convert("L"), "PNG")))


def mixed(folder: Path, coloured: list[int]) -> Path:
    """A grey set with some images in colours."""
    folder.mkdir()
    for split in ("train", "val"):
        members = [m for i in range(24) for m in sample(i, encoded(picture(i, 28, 3 if i in coloured else 1)), i % 10)]
        write_tar(folder / f"tiny-{split}-0000.tar", members)
    make_index(folder)
    info = {split: {"filenames": [f"tiny-{split}-0000.tar"], "shard_lengths": [24]} for split in ("train", "val")}
    (folder / "_info.json").write_text(json.dumps({"splits": info}))
    return folder


REFUSED = [
    ("fashion_mnist", range(24), {}, "has three channels, but the data set one"),
    ("own", range(24), {"classes": 10, "channels": 1}, "has three channels, but the data set one"),
    ("cifar10", (), {}, "has one channel, as all 16 images looked at, but the data set three"),
    ("own", (), {"classes": 10}, "has one channel, as all 16 images looked at, but the data set three"),
]


@pytest.mark.parametrize(("name", "coloured", "keys", "message"), REFUSED)
def test_a_set_of_other_channels_than_the_model_is_refused(
    name: str, coloured: list[int], keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    root = mixed(tmp_path / "set", list(coloured))
    config = splits.Config(name=name, root=str(root), test="val", **keys)
    with pytest.raises(RefusedError, match=message):
        splits.check_splits(config)
    with pytest.raises(RefusedError, match=message):
        next(batches(reader(f"pipe:cat {root}", name=name, **keys)))
    splits.check_splits(splits.Config(name="fashion_mnist", root=str(root), test="val", channels=3))  # grey as RGB


def test_a_grey_image_among_others_is_read_as_rgb(tmp_path: Path) -> None:
    root = mixed(tmp_path / "set", list(range(1, 24)))
    config = splits.Config(name="cifar10", root=str(root), test="val")
    splits.check_splits(config)
    assert {b.images.shape[1] for b in batches(reader(root, name="cifar10"))} == {3}


def test_an_image_in_colours_among_grey_ones_is_named_and_replaced(tmp_path: Path) -> None:
    root = mixed(tmp_path / "set", [3])
    one = reader(root)
    assert {b.images.shape for b in batches(one)} == {(8, 1, 28, 28)}
    assert one.new_bad() == ["tiny-train-0000.tar: 000003.jpg: three channels, in a set of one"]


@pytest.mark.parametrize(
    "keys", [{"name": "cifar10", "channels": 1}, {"channels": 3}, {"name": "mnist", "channels": 2}]
)
def test_impossible_channels_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="channels"):
        splits.Config(**keys)


def test_statistics_have_a_number_for_every_channel() -> None:
    found = [splits.facts(splits.Config(name=name)) for name in SETS]
    found += [splits.facts(splits.Config(name=name, channels=3)) for name in ("mnist", "fashion_mnist")]
    found += [splits.facts(splits.Config(name="own", classes=2, channels=c)) for c in (0, 1, 3)]
    for facts in found:
        assert len(facts.mean) == len(facts.std) == facts.channels
    assert [facts.channels for facts in found[-5:]] == [3, 3, 3, 1, 3]
