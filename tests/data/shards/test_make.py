"""Shards hold what their source holds, and come out the same however they are made."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from scipy.io import savemat
from timm.data.readers.reader_wds import _parse_split_info

from hsvit_ds.data.index import open_index, scan
from hsvit_ds.data.shards import make as made

from ...tars import write_tar
from .commands import Members, make, picture, refused, shards


def samples(folder: Path, split: str = "train") -> list[dict]:
    """All samples of a split, as webdataset reads them."""
    urls = [str(path) for path in sorted(folder.glob(f"*-{split}-*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".json", ".txt")}


WNIDS = ("n03", "n01", "n02")  # of ids 1, 2, 3: an id is not a class index
TRUTH = (3, 1, 2, 2, 1)


def imagenet(folder: Path, truth: tuple[int, ...] = TRUTH) -> Path:
    """ImageNet's own archives with 3 classes of 4 training images each, and 5 validation images."""
    folder.mkdir()
    tars: Members = []
    for k, wnid in enumerate(WNIDS):
        members = [(f"{wnid}_{i}.JPEG", picture(10 * k + i)) for i in range(4)]
        tars.append((f"{wnid}.tar", write_tar(folder / "class.tar", members)))
    write_tar(folder / "ILSVRC2012_img_train.tar", tars)
    images = [(f"ILSVRC2012_val_{i + 1:08d}.JPEG", picture(1000 + i)) for i in range(5)]
    write_tar(folder / "ILSVRC2012_img_val.tar", images[::-1])  # the order of names counts, not that of members
    (folder / "class.tar").unlink()
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(k + 1, wnid, f"word {wnid}, other", 0) for k, wnid in enumerate(WNIDS)]
    synsets = np.array([*rows, (4, "n00", "all of them", 3)], dtype=fields)
    savemat(folder / "meta.mat", {"synsets": synsets[:, None]})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.add(folder / "meta.mat", "ILSVRC2012_devkit_t12/data/meta.mat")
        text = "".join(f"{line}\n" for line in truth).encode()
        info = tarfile.TarInfo("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    (folder / "meta.mat").unlink()
    return folder


def test_a_folder_of_classes_becomes_shards_of_the_same_images(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "22 samples of mini-train in 4 shards" in make(photos, out).stdout
    assert [len(scan(path).samples) for path in sorted(out.glob("*.tar"))] == [5, 6, 5, 6]
    found = samples(out)
    assert [sample["__key__"] for sample in found] == [f"{i:08d}" for i in range(22)]
    for sample in found:
        about = json.loads(sample["json"])
        assert sample["png" if about["class"] == "cat" else "jpg"] == (photos / about["filename"]).read_bytes()
        assert about["class"] == ("ant", "bee", "cat")[int(sample["cls"])]
        assert about["label"] == int(sample["cls"])
    assert len({json.loads(sample["json"])["filename"] for sample in found}) == 22
    labels = [int(sample["cls"]) for sample in found]
    assert labels != sorted(labels)
    assert open_index(out, "train").read("labels").tolist() == labels
    assert (out / "classes.txt").read_text() == "ant\nbee\ncat\n"


def test_another_seed_is_another_order(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "a", "--seed", 1)
    make(photos, tmp_path / "b", "--seed", 2)
    a, b = ([sample["json"] for sample in samples(tmp_path / name)] for name in "ab")
    assert a != b
    assert sorted(a) == sorted(b)


def test_imagenets_own_archives_get_the_classes_of_sorted_wnids(tmp_path: Path) -> None:
    source, out = imagenet(tmp_path / "imagenet"), tmp_path / "out"
    make(source, out)
    make(source, out, split="val", count=2)
    train = samples(out)
    for sample in train:
        about = json.loads(sample["json"])
        assert about["class"] == about["filename"][:3] == ("n01", "n02", "n03")[int(sample["cls"])]
        number = 10 * WNIDS.index(about["class"]) + int(about["filename"][4])
        assert sample["jpg"] == picture(number)
    assert len(train) == 12
    val = {json.loads(sample["json"])["filename"]: sample for sample in samples(out, "val")}
    for i, identity in enumerate(TRUTH):
        sample = val[f"ILSVRC2012_val_{i + 1:08d}.JPEG"]
        assert sample["jpg"] == picture(1000 + i)
        assert int(sample["cls"]) == {"n01": 0, "n02": 1, "n03": 2}[WNIDS[identity - 1]]
    assert (out / "classes.txt").read_text().splitlines()[2] == "n03 word n03, other"
    assert shards("check", out).stdout.count("\n") == 1


def test_training_images_need_no_devkit(tmp_path: Path) -> None:
    source = imagenet(tmp_path / "imagenet")
    make(source, tmp_path / "with")
    (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    make(source, tmp_path / "without")
    a, b = ([sample["cls"] for sample in samples(tmp_path / name)] for name in ("with", "without"))
    assert a == b
    assert (tmp_path / "without/classes.txt").read_text() == "n01\nn02\nn03\n"


def test_shards_do_not_depend_on_processes_or_interruptions(photos: Path, tmp_path: Path) -> None:
    (photos / "ant/ant.3.JPEG").write_bytes(picture(3)[:200])  # one that is left out
    one, two = tmp_path / "one", tmp_path / "two"
    make(photos, one, "--resize", 12)
    make(photos, two, "--resize", 12, "--processes", 2)
    assert files(one) == files(two)
    paths = sorted(two.glob("*.tar"))
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:5000])
    paths[2].with_name(paths[2].name + ".partial").write_bytes(b"half of a shard")
    kept = paths[3].stat().st_mtime_ns
    again = make(photos, two, "--resize", 12)
    assert "ant.3.JPEG" in again.stdout
    assert files(one) == files(two)
    assert not list(two.glob("*.partial"))
    assert paths[3].stat().st_mtime_ns == kept
    assert len(open_index(two, "train")) == 21
    before = {path: path.stat().st_mtime_ns for path in paths}
    make(photos, two, "--resize", 12)
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    with tarfile.open(paths[0]) as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "hsvit")}


def test_resizing_gives_the_shorter_side_and_never_enlarges(photos: Path, tmp_path: Path) -> None:
    wide, small = picture(500, "PNG", (90, 40)), picture(501, "PNG", (9, 7))
    (photos / "cat/wide.PNG").write_bytes(wide)
    (photos / "cat/small.png").write_bytes(small)
    turned = Image.open(io.BytesIO(picture(502, "PNG", (60, 30))))
    turned.getexif()[0x0112] = 6  # lies on its side
    turned.save(photos / "cat/turned.jpg", exif=turned.getexif())
    make(photos, tmp_path / "out", "--resize", 12)
    found = {Path(json.loads(sample["json"])["filename"]).name: sample for sample in samples(tmp_path / "out")}
    assert found["small.png"]["png"] == small
    for name, size in (("wide.PNG", (27, 12)), ("ant.0.JPEG", (18, 12)), ("turned.jpg", (12, 24))):
        image = Image.open(io.BytesIO(found[name]["jpg"]))
        about = json.loads(found[name]["json"])
        assert (image.size, image.format) == (size, "JPEG")
        assert (about["width"], about["height"]) == size
        assert image.getexif().get(0x0112, 1) == 1


def test_resized_images_are_antialiased(tmp_path: Path) -> None:
    slope = np.linspace(0, 200, 120)[None, :, None] * np.ones((90, 1, 3))
    stripes = np.where(np.arange(120) % 3 == 1, 48, 0)[None, :, None]
    (tmp_path / "in/a").mkdir(parents=True)
    Image.fromarray((slope + stripes).astype(np.uint8)).save(tmp_path / "in/a/slope.png")
    make(tmp_path / "in", tmp_path / "out", "--resize", 30, "--quality", 95, count=1)
    image = np.asarray(Image.open(io.BytesIO(samples(tmp_path / "out")[0]["jpg"])))
    assert image.shape == (30, 40, 3)
    assert np.abs(image - slope.reshape(30, 3, 40, 3, 3).mean((1, 3)) - 16).max() < 8


def test_timm_finds_the_shards_and_splits_do_not_disturb_each_other(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(photos, out)
    make(photos, out, split="val", count=3)
    info = json.loads((out / "_info.json").read_text())
    for split, lengths in (("train", (5, 6, 5, 6)), ("val", (7, 7, 8))):
        found = _parse_split_info(split, info)
        assert found.filenames == tuple(f"mini-{split}-{i:04d}.tar" for i in range(len(lengths)))
        assert (found.shard_lengths, found.num_samples) == (lengths, 22)
    assert info["classes"] == ["ant", "bee", "cat"]
    assert "errors: 0, warnings: 22" in shards("check", out).stdout  # each image is in both splits
    assert "agrees" in shards("info", out).stdout


@pytest.mark.parametrize("more", [[], ["--resize", 12]], ids=["copied", "resized"])
def test_unreadable_images_are_left_out_and_listed_by_their_file_or_refused(
    more: list[object], photos: Path, tmp_path: Path
) -> None:
    (photos / "cat/cat.1.png").write_bytes(b"")
    (photos / "ant/ant.2.JPEG").write_text("no image")
    whole = (photos / "bee/more/bee.3.JPEG").read_bytes()
    (photos / "bee/more/bee.3.JPEG").write_bytes(whole[: len(whole) * 2 // 3])
    result = make(photos, tmp_path / "out", *more)
    lines = result.stdout.splitlines()
    assert "cat/cat.1.png: 0 bytes" in lines
    assert "ant/ant.2.JPEG: not an image" in lines
    assert any(line.startswith("bee/more/bee.3.JPEG: ") for line in lines)  # cut off
    assert f"images of {photos} that could not be read and are left out: 3" in result.stderr
    assert len(samples(tmp_path / "out")) == 19
    assert shards("check", tmp_path / "out").stdout.count("\n") == 1
    result = make(photos, tmp_path / "strict", *more, "--strict", code=2)
    assert "(--strict)" in result.stderr
    assert not list((tmp_path / "strict").glob("*.index.safetensors"))


def test_a_part_of_each_class_can_be_held_out(tmp_path: Path) -> None:
    for label, (name, count) in enumerate({"ant": 40, "bee": 20, "cat": 2}.items()):
        (tmp_path / "source" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "source" / name / f"{i}.png").write_bytes(picture(100 * label + i))
    found = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"out-{len(found)}-{seed}"
        result = shards(
            "make", tmp_path / "source", out, "--split=train", "--name=mini", "--holdout=0.15", f"--seed={seed}"
        )
        assert "52 samples of mini-train in 1 shard" in result.stdout
        assert "10 samples of mini-val in 1 shard" in result.stdout
        kept, held = ({json.loads(s["json"])["filename"] for s in samples(out, name)} for name in ("train", "val"))
        assert len(kept) + len(held) == 62
        assert not kept & held
        assert [sum(file.startswith(name) for file in held) for name in ("ant", "bee", "cat")] == [6, 3, 1]
        found.setdefault(seed, files(out))
        assert found[seed] == files(out)
        assert shards("check", out).stdout.count("\n") == 1
    assert found[0] != found[1]


def test_the_shards_are_as_many_as_the_images_need(
    monkeypatch: pytest.MonkeyPatch, photos: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("hsvit_ds.data.shards.make.EACH", 8)
    list(made.make(photos, tmp_path / "out", made.Options("mini", "train"), 1, lambda done, total: None))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        f"mini-train-{i:04d}.tar" for i in range(3)
    ]
    info = json.loads((tmp_path / "out/_info.json").read_text())
    assert info["splits"]["train"]["shard_lengths"] == [7, 7, 8]


def test_the_names_of_the_classes_travel_with_the_shards(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "out")
    assert open_index(tmp_path / "out", "train").classes == ("ant", "bee", "cat")
    for lacking in ("classes.txt", "_info.json"):
        (tmp_path / "out" / lacking).unlink()
        shards("index", tmp_path / "out")
        found = open_index(tmp_path / "out", "train").classes
        assert found == (("ant", "bee", "cat") if lacking == "classes.txt" else ())


def one_image(source: Path) -> None:
    (source / "dog").mkdir()
    (source / "dog/only.png").write_bytes(picture(0))


def no_images(source: Path) -> None:
    for path in source.rglob("*.*"):
        if path.is_file():
            path.unlink()


def no_folders(source: Path) -> None:
    shutil.rmtree(source)
    source.mkdir()
    (source / "picture.jpg").write_bytes(picture(0))


def only_splits(source: Path) -> None:
    shutil.rmtree(source)
    (source / "train/ant").mkdir(parents=True)
    (source / "val/ant").mkdir(parents=True)


@pytest.mark.parametrize(
    ("spoil", "more", "texts"),
    [
        (no_images, [], ("photos: no images (.jpg, ", "in 3 classes")),
        (no_folders, [], ("photos: unknown layout", "one sub-folder a class", "ILSVRC2012_img_train.tar")),
        (shutil.rmtree, [], ("photos: neither a folder nor a CSV of file and label",)),
        (only_splits, [], ("photos: train, val are splits, not classes; give", "photos/train")),
        (None, ["--shards", 23], ("--shards 23: more than the 22 images; at most --shards 22",)),
        (None, ["--shards", -1], ("--shards -1: must be from 0",)),
        (None, ["--holdout", 1], ("--holdout 1.0: must be at least 0 and below 1",)),
        (None, ["--holdout", 0.1, "--split", "val"], ("--holdout 0.1: makes the split val too",)),
        (one_image, ["--holdout", 0.1], ("--holdout 0.1: class dog has one image",)),
        (None, ["--resize", 0], ("--resize 0: must be from 1",)),
        (None, ["--quality", 101], ("--quality 101: must be from 1 to 100",)),
        (None, ["--split", "train-1"], ('--split "train-1": must be letters',)),
        (None, ["--name", "a/b"], ('--name "a/b": must be',)),
        (None, ["--processes", -1], ("--processes -1: must be",)),
    ],
)
def test_what_cannot_be_made_is_refused(
    spoil: Callable[[Path], None] | None, more: list[object], texts: tuple[str, ...], photos: Path, tmp_path: Path
) -> None:
    if spoil:
        spoil(photos)
    refused(make(photos, tmp_path / "out", *more, code=2), *texts)
    assert not list(tmp_path.glob("out/*"))


def test_shards_inside_the_source_are_refused(photos: Path) -> None:
    refused(make(photos, photos / "out", code=2), "is inside SOURCE")


def test_archives_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source, out = imagenet(tmp_path / "imagenet", truth=(1, 2, 3, 3)), tmp_path / "out"
    refused(make(source, out, split="val", code=2), "ground_truth.txt has 4 lines", "has 5 images")
    refused(make(source, out, split="test", code=2), "--split test: ", "train and val")
    train, devkit = source / "ILSVRC2012_img_train.tar", source / "ILSVRC2012_devkit_t12.tar.gz"
    train.write_bytes(train.read_bytes()[:9000])
    refused(make(source, out, code=2), "img_train.tar: cut off", "fetch it again")
    images = [(f"n01_{i}.JPEG", picture(i)) for i in range(2)]
    endless = write_tar(tmp_path / "n01.tar", images).rstrip(b"\0")
    endless += bytes(-len(endless) % 512)
    write_tar(train, [("n01.tar", endless), ("n02.tar", endless)])
    refused(make(source, out, code=2), "img_train.tar: cut off after", "fetch it again")
    write_tar(train, [("n77.tar", write_tar(tmp_path / "n77.tar", images))])
    refused(make(source, out, code=2), "n77.tar is none of the 3 classes of")
    devkit.write_bytes(devkit.read_bytes()[:300])
    refused(make(source, out, split="val", code=2), "not the devkit of ILSVRC2012")
    devkit.unlink()
    refused(make(source, out, split="val", code=2), "devkit_t12.tar.gz: not there; the labels of")
    wrong = imagenet(tmp_path / "wrong", truth=(1, 2, 3, 4, 1))
    refused(make(wrong, out, split="val", code=2), 'says "4" of ILSVRC2012_val_00000004.JPEG')


def test_shards_of_other_options_or_images_are_never_mixed(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(photos, out)
    before = files(out)
    refused(make(photos, out, "--resize", 8, code=2), "mini-train.make.json", "--resize None, now 8", "another OUT")
    (photos / "ant/new.jpg").write_bytes(picture(7))
    refused(make(photos, out, code=2), "22 images", "now 23")
    (photos / "dog").mkdir()
    (photos / "dog/new.jpg").write_bytes(picture(8))
    refused(make(photos, out, split="val", code=2), "_info.json: names other classes (3)")
    assert files(out) == before
    (out / "mini-train.make.json").unlink()
    (out / "_info.json").unlink()
    refused(make(photos, out, code=2), "mini-train-0000.tar: made otherwise")
