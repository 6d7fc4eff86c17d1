"""Shards hold what their source holds, come out the same however they are made, and a check finds what is wrong."""

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
from click.testing import Result
from PIL import Image
from scipy.io import savemat
from timm.data.readers.reader_wds import _parse_split_info
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.data.index import open_index, scan

Members = list[tuple[str, bytes]]


def shards(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["shards", *map(str, words)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def make(source: Path, out: Path, *more: object, code: int = 0, split: str = "train", count: int = 4) -> Result:
    words = ["--split", split, "--name", "mini", "--shards", count, "--processes", 1, *more]
    return shards("make", source, out, *words, code=code)


def refused(result: Result, *texts: str) -> None:
    """One line that names everything in `texts`."""
    assert result.stderr.startswith("hsvit: error: ")
    assert result.stderr.count("\n") == 1
    for text in texts:
        assert text in result.stderr


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    """An image file of width x height `size` like no other number's."""
    pixels = np.random.default_rng(number).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Members) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def read_tar(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


def samples(folder: Path, split: str = "train") -> list[dict]:
    """All samples of a split, as webdataset reads them."""
    urls = [str(path) for path in sorted(folder.glob(f"*-{split}-*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".json", ".txt")}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """22 images in 3 folders, with what may lie beside them; one class is nested, one has other kinds of files."""
    root = tmp_path / "photos"
    for label, (name, count) in enumerate({"ant": 9, "bee": 8, "cat": 5}.items()):
        folder = root / name / ("more" if name == "bee" else "")
        folder.mkdir(parents=True)
        for i in range(count):
            kind, ending = ("PNG", "png") if name == "cat" else ("JPEG", "JPEG")
            (folder / f"{name}.{i}.{ending}").write_bytes(picture(100 * label + i, kind))
        (folder / "notes.txt").write_text("not an image")
        (folder / f"._{name}.jpg").write_text("what a Mac leaves behind")
    (root / ".hidden").mkdir()
    (root / "README.md").write_text("not a class")
    return root


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
    assert "22 samples in 4 shards" in make(photos, out).stdout
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
    assert open_index(out / "train.index.npz", out).labels.tolist() == labels
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
    make(photos, one, "--resize", 12, code=1)
    make(photos, two, "--resize", 12, "--processes", 2, code=1)
    assert files(one) == files(two)
    paths = sorted(two.glob("*.tar"))
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:5000])
    paths[2].with_name(paths[2].name + ".partial").write_bytes(b"half of a shard")
    kept = paths[3].stat().st_mtime_ns
    again = make(photos, two, "--resize", 12, code=1)
    assert "ant.3.JPEG" in again.stdout
    assert files(one) == files(two)
    assert not list(two.glob("*.partial"))
    assert paths[3].stat().st_mtime_ns == kept
    assert len(open_index(two / "train.index.npz", two)) == 21
    before = {path: path.stat().st_mtime_ns for path in paths}
    make(photos, two, "--resize", 12, code=1)
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
    assert shards("check", out).stdout.count("\n") == 1
    assert "agrees" in shards("info", out).stdout


def test_unreadable_images_are_left_out_and_listed(photos: Path, tmp_path: Path) -> None:
    (photos / "cat/cat.1.png").write_bytes(b"")
    result = make(photos, tmp_path / "copied", code=1)
    assert "cat/cat.1.png: 0 bytes" in result.stdout
    (photos / "ant/ant.2.JPEG").write_text("no image")
    result = make(photos, tmp_path / "resized", "--resize", 12, code=1)
    assert "ant/ant.2.JPEG: not an image" in result.stdout
    assert "left out: 2" in result.stderr
    assert len(samples(tmp_path / "resized")) == 20
    assert shards("check", tmp_path / "resized").stdout.count("\n") == 1


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
        (shutil.rmtree, [], ("photos: not a folder",)),
        (only_splits, [], ("photos: train, val are splits, not classes; give", "photos/train")),
        (None, ["--shards", 23], ("--shards 23: more than the 22 images; at most --shards 22",)),
        (None, ["--shards", 0], ("--shards 0: must be from 1",)),
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
    refused(make(photos, out, split="val", code=2), "_info.json: names other classes (3)")
    assert files(out) == before
    (out / "mini-train.make.json").unlink()
    (out / "_info.json").unlink()
    refused(make(photos, out, code=2), "mini-train-0000.tar: made otherwise")


@pytest.fixture
def clean(photos: Path, tmp_path: Path) -> Path:
    """A set with nothing wrong in it."""
    make(photos, tmp_path / "clean", count=2)
    make(photos, tmp_path / "clean", split="val", count=2)
    return tmp_path / "clean"


def test_a_check_of_a_clean_set_finds_nothing(clean: Path) -> None:
    result = shards("check", clean, "--processes", 2)
    assert result.stdout == f"{clean}: errors: 0, warnings: 0; usable samples: 22 of train, 22 of val\n"


def edit(change: Callable[[Members], Members]) -> Callable[[Path], None]:
    """Rewrite the second training shard with other members: cls, json and image of samples 11 to 21, in this order."""

    def apply(folder: Path) -> None:
        path = folder / "mini-train-0001.tar"
        members = read_tar(path)
        images = [member for member in members if member[0].endswith(("jpg", "png"))]
        kept = [m for i in images for m in members if m[0].split(".")[0] == i[0].split(".")[0] and m is not i]
        order = [m for i in images for m in (*[k for k in kept if k[0].split(".")[0] == i[0].split(".")[0]], i)]
        write_tar(path, change(order))
        shards("index", folder)

    return apply


def set_data(at: int, data: bytes) -> Callable[[Members], Members]:
    return lambda members: [(name, data if i == at else old) for i, (name, old) in enumerate(members)]


def cut_off(folder: Path) -> None:
    path = folder / "mini-train-0001.tar"
    path.write_bytes(path.read_bytes()[:-13000])


def damaged(folder: Path) -> None:
    path = folder / "mini-train-0001.tar"
    data = bytearray(path.read_bytes())
    start = data.index(b"00000015.cls")
    data[start : start + 512] = b"\xaa" * 512
    path.write_bytes(data)


def with_info(key: str, value: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        info = json.loads((folder / "_info.json").read_text())
        info["splits"]["train"][key] = value
        (folder / "_info.json").write_text(json.dumps(info))

    return apply


def without_split(folder: Path) -> None:
    for path in folder.glob("*val*"):
        path.unlink()


def again_with_label(label: bytes) -> Callable[[Members], Members]:
    """The last image once more under a key of its own."""
    return lambda m: [*m, ("00000099.cls", label), ("00000099." + m[-1][0].split(".")[1], m[-1][1])]


def last_label(members: Members) -> bytes:
    return next(data for name, data in members if name == members[-1][0].split(".")[0] + ".cls")


@pytest.mark.parametrize(
    ("plant", "kind", "text"),
    [
        (cut_off, "damaged tar", "mini-train-0001.tar: cut off"),
        (damaged, "damaged tar", "mini-train-0001.tar: "),
        (edit(set_data(2, picture(900)[:-90])), "broken image", "mini-train-0001.tar: 00000011."),
        (edit(set_data(2, b"GIF, or so")), "broken image", "not an image"),
        (edit(set_data(2, b"")), "empty image", "00000011."),
        (edit(lambda m: [(n, b"{}" if n == "00000011.json" else d) for n, d in m if n != "00000011.cls"]), "label",
         "mini-train-0001.tar: 00000011: missing"),
        (edit(set_data(0, b"cat")), "label", "mini-train-0001.tar: 00000011: not a number"),
        (edit(set_data(0, b"3")), "label", "00000011: 3 is out of range of 3 classes"),
        (edit(set_data(0, b"-1")), "label", "00000011: -1 is out of range"),
        (edit(lambda m: m[:2] + m[3:]), "no image", "mini-train-0001.tar: 00000011: only .cls, .json"),
        (edit(lambda m: [*m, ("00000000.jpg", picture(901)), ("00000000.cls", b"1")]), "duplicate key",
         "mini-train-0001.tar: 00000000: also in mini-train-0000.tar"),
        (edit(lambda m: [*m, ("00000011.jpg", picture(901)), ("00000011.cls", b"1")]), "duplicate key",
         "00000011: more than once in this shard"),
        (edit(lambda m: [m[0], *m]), "duplicate key", "00000011: more than once in this shard"),
        (edit(lambda m: [*m, ("/etc/a.jpg", picture(901)), ("/etc/a.cls", b"1")]), "unsafe name", "/etc/a.jpg"),
        (edit(lambda m: [*m, ("a/../../b.jpg", picture(901)), ("a/../../b.cls", b"1")]), "unsafe name",
         "a/../../b.jpg"),
        (edit(lambda m: again_with_label(b"%d" % (1 - min(int(last_label(m)), 1)))(m)), "one image, two labels",
         "mini-train-0001.tar: 00000099."),
        (with_info("num_samples", 23), "_info.json", "train has 23 samples, found: 22"),
        (with_info("shard_lengths", [10, 12]), "_info.json", "mini-train-0000.tar has 10 samples, found: 11"),
        (with_info("shard_lengths", [22]), "_info.json", "train has no proper filenames"),
        (lambda folder: (folder / "mini-train-0001.tar").unlink(), "_info.json", "found: no such shard"),
        (without_split, "_info.json", "val is in it, but has no shards"),
    ],
)  # fmt: skip
def test_a_check_names_what_is_wrong(plant: Callable[[Path], None], kind: str, text: str, clean: Path) -> None:
    plant(clean)
    result = shards("check", clean, "--processes", 1, code=1)
    lines = [line for line in result.stdout.splitlines() if line.startswith(f"{kind}: ")]
    assert any(text in line for line in lines), result.stdout
    assert "errors: 0" not in result.stdout


def touched(folder: Path) -> None:
    edit(lambda m: m[:-3])(folder)
    info = json.loads((folder / "_info.json").read_text())
    info["splits"] = {}
    (folder / "_info.json").write_text(json.dumps(info))
    make_stale = folder / "mini-train-0001.tar"
    write_tar(make_stale, read_tar(make_stale)[:-3])


@pytest.mark.parametrize(
    ("plant", "kind", "text"),
    [
        (lambda folder: (folder / "val.index.npz").unlink(), "index", "val.index.npz: there is no index"),
        (touched, "index", "mini-train-0001.tar: its members are not those of"),
        (edit(lambda m: [*m, ("00000099.cls", last_label(m)), ("00000099.jpg", m[-1][1])]), "duplicate image",
         "00000099.jpg: also mini-train-0001.tar: "),
    ],
)  # fmt: skip
def test_what_does_no_harm_is_a_warning(plant: Callable[[Path], None], kind: str, text: str, clean: Path) -> None:
    (clean / "_info.json").write_text("{}")
    plant(clean)
    result = shards("check", clean, "--processes", 1)
    assert any(line.startswith(f"{kind}: ") and text in line for line in result.stdout.splitlines()), result.stdout


def test_classes_can_be_told(clean: Path) -> None:
    assert "2 is out of range of 2 classes" in shards("check", clean, "--classes", 2, code=1).stdout


def test_an_index_can_lie_elsewhere_and_tells_what_it_left_out(clean: Path, tmp_path: Path) -> None:
    write_tar(clean / "mini-val-0001.tar", [("a.jpg", b""), ("a.cls", b"1")])
    result = shards("index", clean, "--out", tmp_path / "new/elsewhere")
    assert len(open_index(tmp_path / "new/elsewhere/train.index.npz", clean)) == 22
    assert "mini-val-0001.tar: a.jpg: 0 bytes" in result.stdout
    assert "problems: 1;" in result.stderr
    assert f"hsvit shards check {clean}" in result.stderr


def test_info_describes_what_is_indexed(clean: Path) -> None:
    text = shards("info", clean).stdout
    index = open_index(clean / "train.index.npz", clean)
    for fact in ("22", "5 / 7.3 / 9", f"{index.sizes.mean():,.0f}", index.fingerprint, "agrees"):
        assert fact in text
    with_info("num_samples", 23)(clean)
    assert "23 samples" in shards("info", clean).stdout


@pytest.mark.parametrize("command", ["index", "check", "info"])
def test_a_folder_without_shards_is_refused(command: str, tmp_path: Path) -> None:
    wanted = "no index there" if command == "info" else "no shards named NAME-SPLIT-0000.tar"
    refused(shards(command, tmp_path, code=2), str(tmp_path), wanted)
