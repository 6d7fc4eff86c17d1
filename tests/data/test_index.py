"""An index says where each sample lies, and is refused where it is not that of the shards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hsvit_ds.data import augment
from hsvit_ds.data.index import Index, open_index
from hsvit_ds.data.layouts import split_shards
from hsvit_ds.data.order import Order, Share
from hsvit_ds.data.reader import Reader
from hsvit_ds.data.scan import Scan, scan
from hsvit_ds.data.splits import Config, check_splits, resolved, shard_lengths
from hsvit_ds.errors import RefusedError
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid

from ..ranks import environment
from ..tars import data_set, encoded, picture, sample, write_tar
from .shards.commands import shards


def train(folder: Path) -> Index:
    return open_index(folder, "train")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return data_set(tmp_path / "set")


def test_every_sample_is_found_where_it_lies(folder: Path) -> None:
    index = train(folder)
    assert index.lengths.tolist() == [16, 16, 16]
    assert index.read("labels").tolist() == [i % 10 for i in range(48)]
    for i in (0, 17, 47):
        shard, start, size, label = index.place(i)
        data = (folder / index.shards[shard]).read_bytes()
        assert (shard, label) == (i // 16, i % 10)
        assert data[start : start + size] == encoded(picture(i))
        assert index.name(i) == f"tiny-train-{i // 16:04d}.tar: {i:06d}.jpg"


def test_a_copy_of_the_shards_keeps_its_index(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # other times of modification
    assert train(copy).fingerprint == train(folder).fingerprint


def test_shards_of_other_times_are_walked_once_in_a_process_which_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that a start asks of the data."""
    copy, walked = tmp_path / "copy", list[str]()
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)

    def noted(path: Path, image: str = "") -> Scan:
        walked.append(path.name)
        return scan(path, image)

    for place in ("index", "indexing"):
        monkeypatch.setattr(f"hsvit_ds.data.{place}.scan", noted)

    def start() -> None:
        config = Config(name="tiny", classes=10, image_size=32, root=str(copy), workers=0, test="val")
        check_splits(config)
        config = resolved(config)
        order = Order(shard_lengths(config), config.window, 12, 0)
        reader = Reader(config, augment.Config(), order, Share(12, 1, 1, 0), Grid(GridConfig(), 1))
        next(reader.train(0, 0))
        list(reader.evaluation("val"))
        reader.close()

    start()
    assert sorted(walked) == sorted(path.name for path in copy.glob("*.tar"))
    told = capsys.readouterr().err
    for split in ("train", "val"):
        assert told.count(f"{copy}: the times of 3 shards are not those in {split}.index.safetensors") == 1
    assert told.count(f"this ends it: hsvit shards index {copy}\n") == 2
    shards("index", copy, "--processes", 1)
    walked.clear()
    start()
    assert not walked
    assert capsys.readouterr().err == ""


def remove(folder: Path) -> None:
    (folder / "tiny-train-0001.tar").unlink()


def add(folder: Path) -> None:
    shutil.copy(folder / "tiny-train-0001.tar", folder / "tiny-train-0003.tar")


def lengthen(folder: Path) -> None:
    with (folder / "tiny-train-0001.tar").open("ab") as file:
        file.write(bytes(512))


def relabel(folder: Path) -> None:
    """The same size, other labels."""
    path = folder / "tiny-train-0001.tar"
    write_tar(path, [m for i in range(16, 32) for m in sample(i, encoded(picture(i)), (i + 1) % 10)])
    os.utime(path, (1, 1))


def rename(folder: Path) -> None:
    for i in range(3):
        (folder / f"tiny-train-{i:04d}.tar").rename(folder / f"other-train-{i:04d}.tar")
        shutil.copy(folder / f"other-train-{i:04d}.tar", folder / f"tiny-train-{i:04d}.tar")
    path = folder / "train.index.safetensors"
    path.write_bytes(path.read_bytes().replace(b"tiny-train", b"gone-train"))
    for other in folder.glob("other-*"):
        other.unlink()


def forget(folder: Path) -> None:
    (folder / "train.index.safetensors").unlink()


def scribble(folder: Path) -> None:
    (folder / "train.index.safetensors").write_bytes(b"not an index")


def empty(folder: Path) -> None:
    (folder / "train.index.safetensors").write_bytes(b"")


def halve(folder: Path) -> None:
    os.truncate(folder / "train.index.safetensors", 1300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            remove,
            r"tiny-train-0001.tar: No such file or directory, but .* names it; restore the shard, or make it anew",
        ),
        (
            add,
            r"tiny-train-0003.tar: not in .*train.index.safetensors \(1 such shard\); make it anew: hsvit shards index",
        ),
        (lengthen, r"tiny-train-0001.tar: \d+ bytes, .* says \d+; make it anew"),
        (relabel, r"tiny-train-0001.tar: its members are not those of .*; make it anew"),
        (rename, r"tiny-train-0000.tar: not in .*train.index.safetensors \(3 such shards\)"),
        (forget, r"train.index.safetensors: there is no index; make it: hsvit shards index"),
        *((change, r"train.index.safetensors: not an index .*; make it anew") for change in (scribble, empty, halve)),
    ],
)
def test_a_stale_or_foreign_index_is_refused(folder: Path, change: object, message: str) -> None:
    train(folder)
    change(folder)  # type: ignore[operator]
    with pytest.raises(RefusedError, match=message):
        train(folder)


def test_two_sets_in_one_folder_are_refused(folder: Path) -> None:
    shutil.copy(folder / "tiny-train-0001.tar", folder / "other-train-0000.tar")
    kinds = r"shards of two kinds for train, other-train-0000\.tar and tiny-train-0000\.tar; keep one"
    with pytest.raises(RefusedError, match=kinds):
        split_shards(folder)


JPEG = encoded(picture(0))


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("b.jpg", JPEG)], "b: no label (b.cls, or label in b.json)"),
        ([("b.cls", b"3")], "b: no image among .cls"),
        ([("b.jpg", JPEG), ("b.cls", b"three")], "b: its label is not a number"),
        ([("b.jpg", JPEG), ("b.json", b"{}")], "b: no label"),
        ([("b.jpg", JPEG), ("b.json", b'{"label": [1]}')], "b: its label is not a number"),
        ([("b.jpg", JPEG), ("b.json", b'{"label": Infinity}')], "b: its label is not a number"),
        ([("b.jpg", JPEG), ("b.cls", b"-1")], "b: label -1 is out of range"),
        ([("b.jpg", b""), ("b.cls", b"3")], "b.jpg: 0 bytes"),
        ([("b.jpg", JPEG), ("b.JPG", JPEG), ("b.cls", b"3")], "b: .jpg more than once"),
    ],
)
def test_a_sample_that_cannot_be_used_is_left_out_and_named(
    tmp_path: Path, members: list[tuple[str, bytes]], problem: str
) -> None:
    path = tmp_path / "x-train-0000.tar"
    write_tar(path, [("a.jpg", JPEG), ("a.cls", b"1"), *members, ("c.png", JPEG), ("c.json", b'{"label": 7}')])
    found = scan(path)
    assert [label for _, _, label in found.samples] == [1, 7]
    assert len(found.problems) == 1
    assert problem in found.problems[0]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.77])
def test_a_truncated_shard_keeps_its_whole_samples(folder: Path, share: float) -> None:
    path = folder / "tiny-train-0001.tar"
    whole = scan(path)
    with path.open("r+b") as file:
        file.truncate(int(share * whole.bytes))
    found = scan(path)
    assert 0 < len(found.samples) < 16
    assert found.samples == whole.samples[: len(found.samples)]
    assert any("cut off" in problem for problem in found.problems)


@pytest.mark.parametrize("length", [512, 4096])
def test_a_hole_in_a_shard_is_not_taken_for_its_end(folder: Path, length: int) -> None:
    path = folder / "tiny-train-0001.tar"
    whole = scan(path)
    with path.open("r+b") as file:
        file.seek((whole.samples[5][0] - 1) * 512)  # a header
        file.write(bytes(length))
    found = scan(path)
    assert found.samples == whole.samples[:5]
    assert found.problems == ["tiny-train-0001.tar: damaged after 000020.cls"]


LARGE = """
import os, sys
from pathlib import Path
import numpy as np
from hsvit_ds.data import index
n, shards = 1_281_167, 1024
folder = Path(sys.argv[1])
if len(sys.argv) > 2:
    from hsvit_ds.data.arrays import write
    from hsvit_ds.data.indexing import Shard, content
    lengths = np.diff(np.linspace(0, n, shards + 1).astype(int)).tolist()
    names = [f"imagenet1k-train-{i:04d}.tar" for i in range(shards)]
    for name in names:
        (folder / name).touch()
        os.utime(folder / name, ns=(1, 1))
        os.truncate(folder / name, 2**40)
        os.utime(folder / name, ns=(1, 1))
    about = [Shard(name, 2**40, 1, 0, 0, length, 999, []) for name, length in zip(names, lengths)]
    numbers = np.random.default_rng(0).integers(1, 2**31, n)
    samples = {"offsets": [numbers], "sizes": [numbers % 2**20 + 1], "labels": [numbers % 1000]}
    write(folder / "train.index.safetensors", *content(about, samples, (), ""))
    sys.exit()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
opened = index.open_index(folder, "train")
for sample in range(0, n, 1000):
    opened.place(sample)
opened.fingerprint
print(len(opened), opened.path.stat().st_size, resident() - before)
"""


def test_an_index_of_imagenet_is_small_on_disk_and_smaller_in_memory(tmp_path: Path) -> None:
    """1,281,167 samples: less than 25 MB on disk, and of them 5 MB in each worker."""
    for more in (["write"], []):
        done = subprocess.run(
            [sys.executable, "-c", LARGE, str(tmp_path), *more],
            env=environment(),
            check=True,
            capture_output=True,
            text=True,
        )
    samples, size, memory = map(int, done.stdout.split())
    assert samples == 1_281_167
    assert size < 25e6
    assert memory < 5e6
