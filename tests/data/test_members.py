"""Which members of a tar are a sample and which of them is its image: the same in index, stream and check."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.tariterators import base_plus_ext

from hsvit_ds.data import augment, remote
from hsvit_ds.data.decode import installed
from hsvit_ds.data.members import Member, grouped
from hsvit_ds.data.sources import Shards
from hsvit_ds.data.splits import Config, open_split
from hsvit_ds.data.stream import Streamed
from hsvit_ds.data.transform import Transform
from hsvit_ds.errors import RefusedError

from ..tars import encoded, old_index, picture, write_tar
from .shards.commands import make, shards

TRANSFORM = Transform(augment.Config(), 32, installed("auto"), seed=0)
PHOTO, MAP = encoded(picture(1), "PNG"), encoded(Image.new("L", (32, 32), 7), "PNG")
APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "

Named = list[tuple[str, bytes]]


def shard(folder: Path, members: Named, count: int = 1) -> Path:
    """A folder with a training split of one shard, of `count` samples as a stream is told."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tar(folder / "x-train-0000.tar", members)
    split = {"filenames": ["x-train-0000.tar"], "shard_lengths": [count], "num_samples": count}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    remote._info.cache_clear()
    return folder


def indexed(folder: Path, image: str = "") -> tuple[list[int], bytes]:
    """(labels, pixels) of the samples by their index."""
    shards("index", folder, *(["--image", image] if image else []))
    index = open_split(Config(name="x", classes=10, root=str(folder), image=image), "train")
    found = Shards(index, TRANSFORM).held_out(torch.arange(len(index)))  # type: ignore[arg-type]
    assert not found.bad
    return found.labels.tolist(), found.pixels.numpy().tobytes()


def streamed(folder: Path, image: str = "", count: int = 1) -> tuple[list[int], bytes, list[str]]:
    """The same of the samples as a stream, and which were bad."""
    split = remote.open_split(f"pipe:cat {folder}", "train", 1.0)
    (found,) = Streamed(split, TRANSFORM, 10, 0, 1, count, 1, "", 1.0, once=True, image=image)
    return found.labels.tolist(), found.pixels.numpy().tobytes(), found.bad


def pixels(data: bytes) -> bytes:
    return TRANSFORM.held_out(data).numpy().tobytes()


@pytest.mark.parametrize(
    ("members", "image"),
    [
        ([("7.cls", b"3"), ("7.depth.png", MAP), ("7.png", PHOTO)], ""),
        ([("7.alpha.png", MAP), ("7.cls", b"3"), ("7.jpg.mask.png", MAP), ("7.png", PHOTO)], ""),
        ([("7.CLS", b"3"), ("7.PNG", PHOTO)], ""),
        ([("7.JSON", b'{"label": 3}'), ("7.Png", PHOTO)], ""),
        ([("7.cls", b"3"), ("7.jpg", MAP), ("7.png", PHOTO)], "png"),
        ([("7.cls", b"3"), ("7.jpg", MAP), ("7.png", PHOTO)], "webp;PNG;jpg"),
        ([("7.cls", b"3"), ("7.depth.png", MAP), ("7.rgb.png", PHOTO)], "rgb.png"),
        ([("./._7.cls", APPLE), ("./7.cls", b"3"), ("./._7.png", APPLE), ("./7.png", PHOTO)], ""),
        ([("a/._7.cls", APPLE), ("a/7.cls", b"3"), ("a/._7.png", APPLE), ("a/7.png", PHOTO)], ""),
        ([("README", b"x"), ("__info__/a.png", MAP), ("7.cls", b"3"), ("LICENSE", b"x"), ("7.png", PHOTO)], ""),
    ],
)
def test_the_image_is_the_same_by_index_as_a_stream_and_in_a_check(members: Named, image: str, tmp_path: Path) -> None:
    folder = shard(tmp_path / "set", members)
    assert streamed(folder, image) == ([3], pixels(PHOTO), [])
    assert indexed(folder, image) == ([3], pixels(PHOTO))
    assert "errors: 0, warnings: 0" in shards("check", folder).stdout


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("7.cls", b"3"), ("7.jpg", MAP), ("7.png", PHOTO)], "2 images (.jpg, .png); hsvit shards index --image says"),
        ([("7.cls", b"3"), ("7.depth.png", MAP)], "no image among .cls, .depth.png; hsvit shards index --image says"),
        ([("7.cls", b"3"), ("7.png", MAP), ("7.PNG", PHOTO)], ".png more than once"),
        ([("7.cls", b"3"), ("7.CLS", b"4"), ("7.png", PHOTO)], ".cls more than once"),
    ],
)
def test_a_sample_whose_image_is_not_evident_is_named_everywhere(members: Named, problem: str, tmp_path: Path) -> None:
    folder = shard(tmp_path / "set", [*members, ("8.cls", b"1"), ("8.png", PHOTO)], count=2)
    labels, _, (bad,) = streamed(folder, count=2)
    assert labels == [-1, 1]
    assert f"x-train-0000.tar: 7: {problem}" in bad
    assert f"x-train-0000.tar: 7: {problem}" in shards("index", folder).stdout
    found = shards("check", folder, code=1).stdout
    assert f"x-train-0000.tar: 7: {problem}" in found or "x-train-0000.tar: 7: more than once" in found


def test_an_index_of_another_image_than_the_recipes_is_refused(tmp_path: Path) -> None:
    folder = shard(tmp_path / "set", [("7.cls", b"3"), ("7.jpg", MAP), ("7.png", PHOTO)])
    shards("index", folder, "--image", "jpg")
    with pytest.raises(RefusedError, match=r'its images are "jpg", but data.image = "png"; .* --image "png"'):
        open_split(Config(name="x", classes=10, root=str(folder), image="png"), "train")
    assert open_split(Config(name="x", classes=10, root=str(folder)), "train") is not None


def test_an_index_without_a_sample_is_a_failure(tmp_path: Path) -> None:
    folder = shard(tmp_path / "set", [("7.cls", b"3"), ("7.depth.png", MAP)])
    result = shards("index", folder, code=2)
    assert "no sample of train can be used" in result.stderr
    assert not (folder / "train.index.safetensors").exists()


def test_an_index_from_before_images_were_asked_for_is_made_anew(tmp_path: Path) -> None:
    folder = shard(tmp_path / "set", [("7.cls", b"3"), ("7.png", PHOTO)])
    shards("index", folder)
    np.savez(old_index(folder, "train"), format=np.array(1), labels=np.zeros(1, dtype=np.int32))
    with pytest.raises(RefusedError, match=r"format 1, .* reads 3, .*\); make it anew: hsvit shards index"):
        open_split(Config(name="x", classes=10, root=str(folder)), "train")


@pytest.mark.parametrize("name", ["7.jpg", "a/7.jpg", "./7.JPG", "a.b/7.seg.png", "a/b.c/7.tar.gz", "a b/ü.x", "7."])
def test_keys_are_those_of_webdataset(name: str) -> None:
    (sample,) = grouped([Member(name, 0, 0, b"", "")])
    key, extension = base_plus_ext(name)
    assert (sample.key, sample.members[0][0]) == (key, f".{extension}".lower())


def test_what_lies_around_classes_is_no_class(photos: Path, tmp_path: Path) -> None:
    """What macOS's archives hold, an empty folder, copies of notebooks, a link back."""
    make(photos, tmp_path / "clean")
    for path in ("__MACOSX/ant/._1.jpg", "ant/__MACOSX/1.jpg", "ant/.ipynb_checkpoints/ant.0-checkpoint.jpg"):
        (photos / path).parent.mkdir(parents=True)
        (photos / path).write_bytes(PHOTO)
    (photos / "bird").mkdir()
    (photos / "ant/self").symlink_to(".")
    result = make(photos, tmp_path / "out")
    assert "22 samples" in result.stdout
    assert f"{photos / 'bird'}: no image in it; it is no class" in result.stderr
    assert (tmp_path / "out/classes.txt").read_text() == "ant\nbee\ncat\n"
    for path in (tmp_path / "clean").glob("*.tar"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_split_without_one_of_the_classes_keeps_their_numbers(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "out")
    for path in (photos / "ant").iterdir():
        path.unlink()
    make(photos, tmp_path / "out", split="val", count=2)
    assert set(open_split(Config(name="x", classes=3, root=str(tmp_path / "out")), "val").label_counts()) == {1, 2}  # type: ignore[union-attr]
    (photos / "dog").mkdir()
    (photos / "dog/1.jpg").write_bytes(PHOTO)
    result = make(photos, tmp_path / "out", split="test", count=2, code=2)
    assert "names other classes (3)" in result.stderr
