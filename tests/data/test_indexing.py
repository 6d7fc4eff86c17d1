"""An index is made shard by shard: in parallel, from where it was stopped, and of what is new alone."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hsvit_ds.data import augment, indexing, scan
from hsvit_ds.data.index import COLUMNS, Index, open_index
from hsvit_ds.data.indexing import make
from hsvit_ds.data.order import Order, Share
from hsvit_ds.data.reader import Reader
from hsvit_ds.data.splits import Config, resolved, shard_lengths
from hsvit_ds.errors import RefusedError
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid

from ..tars import data_set, encoded, old_index, picture, sample, write_split, write_tar
from .shards.commands import refused, shards

INDEX = "train.index.safetensors"
JPEG = encoded(picture(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards of 48 samples, one of which has a sample without a label, and no index."""
    write_split(tmp_path / "set", "train", 48, shards=6)
    broken = tmp_path / "set/tiny-train-0001.tar"
    write_tar(broken, [*sample(8, JPEG, 8), ("b.jpg", JPEG), *sample(9, JPEG, 9)])
    return tmp_path / "set"


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards whose headers were read."""
    found = list[str]()

    def noted(path: Path, image: str = "") -> scan.Scan:
        found.append(path.name)
        return scan.scan(path, image)

    monkeypatch.setattr(indexing, "scan", noted)
    return found


def whole(folder: Path, where: Path) -> bytes:
    """The index of the shards as one call makes it, elsewhere."""
    where.mkdir()
    return made(folder, where=where).path.read_bytes()


def made(folder: Path, **options: object) -> Index:
    return make(folder, "train", classes=map(str, range(10)), **options)  # type: ignore[arg-type]


def names(*numbers: int) -> list[str]:
    return [f"tiny-train-{number:04d}.tar" for number in numbers]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.partial"))


def test_any_number_of_processes_makes_the_same_file(folder: Path, tmp_path: Path) -> None:
    one = whole(folder, tmp_path / "one")
    assert made(folder, processes=2).path.read_bytes() == one
    assert not left(folder)


def test_safetensors_reads_it(folder: Path) -> None:
    index, arrays = made(folder), load_file(folder / INDEX)
    for name in COLUMNS:
        assert arrays[name].tolist() == index.read(name).tolist()
    assert arrays["labels"].tolist() == [i % 10 for i in range(8)] + [8, 9] + [i % 10 for i in range(16, 48)]
    assert arrays["lengths"].tolist() == [8, 2, 8, 8, 8, 8]
    assert arrays["shards"].tobytes().decode().split("\0") == [*names(*range(6)), ""]


class Stopped(BaseException):
    pass


def stops_after(shards: int) -> Callable[[], None]:
    left = iter(range(shards - 1))

    def done() -> None:
        if next(left, None) is None:
            raise Stopped

    return done


@pytest.mark.parametrize("torn", ["", "line", "samples", "zeros", "all"])
def test_what_was_stopped_goes_on(folder: Path, tmp_path: Path, walked: list[str], torn: str) -> None:
    expected = whole(folder, tmp_path / "whole")
    with pytest.raises(Stopped):
        made(folder, done=stops_after(4))
    walked.clear()
    rows, lines = (folder / name for name in left(folder))
    if torn == "line":
        lines.write_bytes(lines.read_bytes()[:-10])
    elif torn == "samples":
        os.truncate(rows, rows.stat().st_size - 1)
    elif torn == "zeros":  # as after a power failure
        rows.write_bytes(rows.read_bytes()[:120] + bytes(100))
    elif torn == "all":
        lines.write_bytes(lines.read_bytes()[10:])
    counted = list[None]()
    assert made(folder, done=lambda: counted.append(None)).path.read_bytes() == expected
    kept = {"": 4, "line": 3, "samples": 3, "zeros": 2, "all": 0}[torn]
    assert walked == names(*range(kept, 6))
    assert len(counted) == 6
    assert not left(folder)


def test_other_images_do_not_go_on(folder: Path, walked: list[str]) -> None:
    with pytest.raises(Stopped):
        made(folder, done=stops_after(1))
    walked.clear()
    assert made(folder, image="jpg").image == "jpg"
    assert walked == names(*range(6))


def test_of_a_set_that_has_grown_what_is_new_is_read(folder: Path, tmp_path: Path, walked: list[str]) -> None:
    made(folder)
    write_tar(folder / names(6)[0], sample(60, JPEG, 3))
    shutil.move(folder / names(3)[0], tmp_path)
    write_tar(folder / names(4)[0], sample(61, JPEG, 4))
    walked.clear()
    grown = made(folder)
    assert walked == names(4, 6)
    assert grown.lengths.tolist() == [8, 2, 8, 1, 8, 1]
    assert grown.problems == made(folder, where=None).problems
    assert len(grown.problems) == 1
    assert grown.path.read_bytes() == whole(folder, tmp_path / "anew")


def test_a_damaged_part_of_an_index_is_read_again(folder: Path, walked: list[str]) -> None:
    index = made(folder)
    expected = index.path.read_bytes()
    damaged = bytearray(expected)
    damaged[index.arrays.places["labels"].start + 4 * 20] ^= 1  # of the fourth shard
    index.path.write_bytes(damaged)
    walked.clear()
    assert made(folder).path.read_bytes() == expected
    assert walked == names(3)


def test_an_index_that_is_right_stays_as_it_is(folder: Path, walked: list[str]) -> None:
    before = made(folder).path.stat()
    walked.clear()
    after = made(folder).path.stat()
    assert not walked
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert make(folder, "train", classes=("a", "b")).classes == ("a", "b")
    assert not walked


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: write_tar(folder / names(6)[0], sample(60, JPEG, 3)), "tiny-train-0006.tar: came"),
        (lambda folder: (folder / names(5)[0]).unlink(), "tiny-train-0005.tar: is gone"),
        (lambda folder: write_tar(folder / names(0)[0], sample(60, JPEG, 3)), "tiny-train-0000.tar: was changed"),
    ],
)
def test_shards_that_change_meanwhile_are_refused(
    change: object, what: str, folder: Path, tmp_path: Path, walked: list[str]
) -> None:
    expected = rf"{what} while the shards of train were read; once they stay as they are, the same command goes on"
    (changes,) = [iter([change])]

    def last() -> None:
        if len(walked) == 6:
            next(changes)(folder)  # type: ignore[operator]

    with pytest.raises(RefusedError, match=expected):
        made(folder, done=last)
    assert not (folder / INDEX).exists()
    read = len(walked)
    again = made(folder)
    assert len(walked[read:]) == {"came": 1, "gone": 0, "changed": 6}[what.split()[-1]]
    assert again.path.read_bytes() == whole(folder, tmp_path / "anew")


def test_two_at_once_are_refused(folder: Path) -> None:
    with (folder / "train.index.shards.partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(shards("index", folder, code=2), "train.index.safetensors: another process is making it; wait")


def test_a_place_that_an_index_cannot_say_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MOST_BLOCKS", 4)
    found = scan.scan(folder / names(0)[0])
    assert len(found.samples) == 1
    assert len(found.problems) == 7
    assert "000001.jpg: lies 3072 bytes behind the start of its shard, more than an index can say" in found.problems[0]


# Format 2


def reader(folder: Path, batch: int = 12) -> Reader:
    config = resolved(Config(name="tiny", classes=10, image_size=32, root=str(folder), workers=0, test="val"))
    order = Order(shard_lengths(config), config.window, batch, 0)
    return Reader(config, augment.Config(), order, Share(batch, 1, 1, 0), Grid(GridConfig(), 1))


def test_an_index_of_the_old_format_gives_the_same_samples_in_the_same_order(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "set")
    new, batches = open_index(folder, "train"), list(reader(folder).train(1, 0))

    def said(index: Index) -> list[object]:
        places = [index.place(i) for i in range(48)]
        return [places, index.fingerprint, index.name(17), index.classes, index.largest_label]

    expected = said(new)
    old_index(folder, "train")
    old = open_index(folder, "train")
    assert old.path.suffix == ".npz"
    assert said(old) == expected
    begun = list(reader(folder).train(1, 0))
    shards("index", folder, "--processes", 1)
    assert open_index(folder, "train").path.suffix == ".safetensors"
    gone_on = list(reader(folder).train(1, 2))
    for found, wanted in ((begun, batches), (gone_on, batches[2:])):
        assert len(found) == len(wanted)
        for (one,), (other,) in zip(found, wanted, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)


# While it is read


def test_an_index_that_is_cut_or_changed_meanwhile_is_a_refusal(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "set")
    path, kept = folder / INDEX, (folder / INDEX).read_bytes()
    for change, why in (
        (lambda: os.truncate(path, len(kept) // 2), "was changed"),
        (lambda: path.write_bytes(kept[:-1] + b"!"), "was changed"),
    ):
        opened = open_index(folder, "train")
        opened.place(3)
        change()
        os.utime(path, (1, 1))
        with pytest.raises(RefusedError) as caught:
            opened.place(3)
        assert str(caught.value) == (
            f"{path}: {why}, after it was opened; restore it, or make it anew (hsvit shards index {folder}) and start "
            "again"
        )
        path.write_bytes(kept)


def test_an_index_that_is_replaced_is_read_on_but_not_by_new_workers(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "set")
    opened = open_index(folder, "train")
    expected, worker = opened.place(3), pickle.dumps(opened)
    assert pickle.loads(worker).place(3) == expected
    other = tmp_path / "other"
    shutil.copy(folder / INDEX, other)
    other.replace(folder / INDEX)
    assert opened.place(3) == expected
    with pytest.raises(RefusedError, match="was changed, after it was opened"):
        pickle.loads(worker).place(3)


def test_a_file_that_is_cut_between_two_looks_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data_set(tmp_path / "set")
    opened = open_index(folder, "train")
    state = opened.arrays._state
    monkeypatch.setattr("hsvit_ds.data.arrays._state", lambda _: state)
    os.truncate(folder / INDEX, 900)
    with pytest.raises(RefusedError, match=r"was cut off, after it was opened; restore it, or make it anew"):
        opened.read("labels")
    assert np.array_equal(opened.lengths, [16, 16, 16])


def test_more_samples_than_32_bits_count_are_told_apart(tmp_path: Path) -> None:
    index = replace(open_index(data_set(tmp_path / "set"), "train"), lengths=np.array([2**31, 0, 2**33]))
    assert [index.shard_of(sample) for sample in (2**31 - 1, 2**31, 2**32, 2**33)] == [0, 2, 2, 2]
