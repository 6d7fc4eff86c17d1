"""Shards of sets as they are published hold their pixels, labels and names; what contradicts itself is refused."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .commands import make, picture, refused
from .test_make import samples

LUCK = np.random.default_rng(0)


def pixels(count: int, *shape: int) -> np.ndarray:
    return LUCK.integers(0, 256, (count, *shape), dtype=np.uint8)


Known = dict[str, list[tuple[np.ndarray, str]]]
"""{split: (pixels [H, W] or [H, W, 3], class) of each image}."""


def cifar10(folder: Path) -> Known:
    found: Known = {"train": [], "test": []}
    names = ("plane", "car", "bird")
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images, content = pixels(3, 3, 32, 32), b""
        for label, image in enumerate(images):
            content += bytes([label]) + image.tobytes()
            found["test" if file == "test_batch" else "train"].append((image.transpose(1, 2, 0), names[label]))
        (folder / f"{file}.bin").write_bytes(content)
    return found


def cifar100(folder: Path) -> Known:
    found: Known = {}
    names = ("apple", "aquarium_fish", "baby", "bear")
    (folder / "fine_label_names.txt").write_text("\n".join(names))
    for split in ("train", "test"):
        images = pixels(4, 3, 32, 32)
        content = b"".join(bytes([19 - label, label]) + image.tobytes() for label, image in enumerate(images))
        (folder / f"{split}.bin").write_bytes(content)
        found[split] = [(image.transpose(1, 2, 0), names[label]) for label, image in enumerate(images)]
    return found


def idx(folder: Path, pack: Callable[[bytes], bytes] = bytes, end: str = "") -> Known:
    found: Known = {}
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        images = pixels(5, 28, 28)
        labels = [3, 0, 2, 1, 3]
        (folder / f"{prefix}-images-idx3-ubyte{end}").write_bytes(
            pack(struct.pack(">4I", 0x803, 5, 28, 28) + images.tobytes())
        )
        (folder / f"{prefix}-labels-idx1-ubyte{end}").write_bytes(pack(struct.pack(">2I", 0x801, 5) + bytes(labels)))
        found[split] = [(image, str(label)) for image, label in zip(images, labels, strict=True)]
    return found


def idx_gz(folder: Path) -> Known:
    return idx(folder, gzip.compress, ".gz")


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def tiny_imagenet(folder: Path) -> Known:
    found: Known = {"train": [], "val": []}
    wnids = ("n02", "n01")  # the file is not sorted, the classes are
    (folder / "wnids.txt").write_text("\n".join(wnids))
    (folder / "words.txt").write_text("n01\tfish, trout\nn02\tfrog\nn09\tother\n")
    (folder / "val/images").mkdir(parents=True)
    (folder / "test/images").mkdir(parents=True)
    lines = []
    for k, wnid in enumerate(wnids):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(3):
            data = picture(10 * k + i)
            (folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").write_bytes(data)
            found["train"].append((decoded(data), wnid))
        data = picture(100 + k)
        (folder / "val/images" / f"val_{k}.JPEG").write_bytes(data)
        lines.append(f"val_{k}.JPEG\t{wnid}\t0\t32\t44\t62\n")
        found["val"].append((decoded(data), wnid))
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    return found


def food101(folder: Path) -> Known:
    found: Known = {"train": [], "test": []}
    (folder / "meta").mkdir()
    (folder / "meta/classes.txt").write_text("apple_pie\nsushi\n")
    (folder / "meta/labels.txt").write_text("Apple pie\nSushi\n")
    for k, split in enumerate(found):
        lines = []
        for name in ("apple_pie", "sushi"):
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            data = picture(1000 * k + len(name))
            (folder / "images" / name / f"{k}.jpg").write_bytes(data)
            lines.append(f"{name}/{k}\n")
            found[split].append((decoded(data), name))
        (folder / f"meta/{split}.txt").write_text("".join(lines))
    return found


SETS = (cifar10, cifar100, idx, idx_gz, tiny_imagenet, food101)


@pytest.mark.parametrize("kind", SETS, ids=lambda kind: kind.__name__)
def test_a_published_set_keeps_its_pixels_labels_and_names(kind: Callable[[Path], Known], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for split, expected in kind(source).items():
        make(source, out, split=split, count=1)
        titles = [
            title.split()[0].replace("Apple", "apple_pie").lower() for title in out.joinpath("classes.txt").open()
        ]
        found = samples(out, split)
        assert len(found) == len(expected)
        for sample in found:
            shown = decoded(sample.get("png", sample.get("jpg")))
            (name,) = {name.lower() for image, name in expected if np.array_equal(image, shown)}
            assert titles[int(sample["cls"])] == name


def test_fashion_mnist_has_its_names_by_its_own(tmp_path: Path) -> None:
    idx(tmp_path)
    make(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", "--name", "fashion_mnist", count=1)
    names = (tmp_path.parent / f"{tmp_path.name}-out" / "classes.txt").read_text().splitlines()
    assert names[0] == "T-shirt/top"
    assert names[9] == "Ankle boot"
    assert len(names) == 10


class Trap:
    """What a pickle runs when it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return pytest.fail, ("unpickled",)


def pickled_10(folder: Path) -> None:
    for name in ("data_batch_1", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Trap()))


def pickled_100(folder: Path) -> None:
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(Trap()))


def missing_image(folder: Path) -> None:
    tiny_imagenet(folder)
    (folder / "val/images/val_1.JPEG").unlink()


def outside(folder: Path) -> None:
    tiny_imagenet(folder)
    (folder / "val/val_annotations.txt").write_text("../../secret.JPEG\tn01\n")


def missing_food(folder: Path) -> None:
    food101(folder)
    (folder / "images/sushi/0.jpg").unlink()


def other_shape(folder: Path) -> None:
    idx(folder)
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 5, 28, 27) + bytes(5 * 28 * 28))


def colours(folder: Path) -> None:
    idx(folder)
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">5I", 0x804, 5, 3, 28, 28) + bytes(5 * 3 * 28 * 28))


def fewer_labels(folder: Path) -> None:
    idx(folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 4) + bytes(4))


def cut_off(folder: Path) -> None:
    cifar100(folder)
    with (folder / "train.bin").open("r+b") as file:
        file.truncate(5000)


def label_too_large(folder: Path) -> None:
    cifar100(folder)
    (folder / "train.bin").write_bytes(bytes([0, 99]) + bytes(3072))


def damaged_gzip(folder: Path) -> None:
    idx_gz(folder)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("kind", "split", "texts"),
    [
        (pickled_10, "train", ("pickled", "binary version: https://www.cs.toronto.edu/~kriz/cifar.html")),
        (pickled_100, "train", ("pickled", "binary version: https://www.cs.toronto.edu/~kriz/cifar.html")),
        (missing_image, "val", ("val_annotations.txt: names val_1.JPEG", "1 image missing")),
        (outside, "val", ("../../secret.JPEG leads out of its folder",)),
        (missing_food, "train", ("train.txt: names sushi/0.jpg", "1 image missing")),
        (other_shape, "train", ("train-images-idx3-ubyte: 3936 bytes", "says 5 x 28 x 27, 3796 bytes")),
        (colours, "train", ("begins with 00 00 08 04", "00 00 08 03")),
        (fewer_labels, "train", ("train-images-idx3-ubyte: 5 images", "has 4 labels")),
        (cut_off, "train", ("train.bin: 5000 bytes are no whole records of 3074",)),
        (label_too_large, "train", ("train.bin: image 0 has label 99 of 4 classes",)),
        (damaged_gzip, "train", ("train-images-idx3-ubyte.gz: damaged",)),
        (cifar10, "val", ("--split val: it has train and test",)),
        (tiny_imagenet, "test", ("--split test: it has train and val",)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_contradicts_itself_is_refused(
    kind: Callable[[Path], object], split: str, texts: tuple[str, ...], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    kind(source)
    refused(make(source, tmp_path / "out", split=split, count=1, code=2), *texts)
