"""What a rank reads: the same samples for any number of ranks and workers, the bad ones named, nothing twice."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from hsvit_ds.data import augment, splits
from hsvit_ds.data.index import open_index
from hsvit_ds.data.order import Order, Share
from hsvit_ds.data.reader import Reader
from hsvit_ds.data.splits import Config
from hsvit_ds.errors import RefusedError
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid

from ..ranks import work
from ..tars import data_set, encoded, make_index, picture, sample, write_split, write_tar

AUGMENT = augment.Config(crop="random_resized", flip=0.5, policy="RandAugment")
BATCH = 12


def reader(folder: Path, batch: int = BATCH, augmentation: augment.Config = AUGMENT, **keys: Any) -> Reader:
    config = Config(**{"name": "tiny", "classes": 10, "image_size": 32, "root": str(folder), "workers": 0} | keys)
    index = open_index(folder, "train")
    order = Order(tuple(index.lengths.tolist()), config.window, batch, 0, fill=config.last_batch == "fill")
    return Reader(config, augmentation, order, Share(batch, 1, 1, 0), Grid(GridConfig(), 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return data_set(tmp_path / "set", train=50, val=21)


@pytest.fixture
def readers() -> Iterator[list[Reader]]:
    """Closed at the end: their workers are processes."""
    opened: list[Reader] = []
    yield opened
    for one in opened:
        one.close()


def test_an_epoch_goes_on_into_the_next_with_the_same_workers(folder: Path, readers: list[Reader]) -> None:
    one, two = reader(folder), reader(folder, workers=2)
    readers.append(two)
    streams = set()
    for epoch in (0, 1):
        for here, there in zip(one.train(epoch, 0), two.train(epoch, 0), strict=True):
            assert torch.equal(here[0].images, there[0].images)
            assert torch.equal(here[0].labels, there[0].labels)
        streams.add(id(two._stream))
    assert len(streams) == 1


def test_skipped_steps_read_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = reader(folder)
    whole = [step[0] for step in one.train(3, 0)]
    read: list[int] = []
    source: Any = one._training
    monkeypatch.setattr(source, "read", lambda s, read_=source.read: read.append(s) or read_(s))
    later = [step[0] for step in one.train(3, 3)]
    assert len(read) == BATCH
    assert len(later) == 1
    assert torch.equal(later[0].images, whole[3].images)


def test_resuming_at_step_a_million_reads_no_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = reader(folder)
    source: Any = one._training
    monkeypatch.setattr(source, "read", lambda s: pytest.fail(f"read sample {s}"))
    steps = one.order.steps_per_epoch
    job = next(one._jobs(*divmod(10**6, steps), 0))
    assert job.epoch == 10**6 // steps
    assert len(job.samples) == BATCH


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_sample_once(folder: Path, workers: int) -> None:
    one = reader(folder, workers=workers, eval_batch=8)
    found = torch.cat([labels[valid] for _, labels, valid in one.evaluation("val")])
    assert found.tolist() == [i % 10 for i in range(21)]
    assert one.count("val") == 21


def spoil(folder: Path, numbers: list[int], shards: int = 3) -> None:
    """Damage the images of some training samples, in a set of its own index."""
    for shard in range(shards):
        path = folder / f"tiny-train-{shard:04d}.tar"
        data = bytearray(path.read_bytes())
        for number in numbers:
            at = data.find(f"{number:06d}.jpg".encode())
            if at >= 0:
                data[at + 512 : at + 560] = bytes(48)
        path.write_bytes(data)
    make_index(folder)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_bad_image_is_named_and_replaced_by_the_next_good_one(
    folder: Path, workers: int, readers: list[Reader]
) -> None:
    spoil(folder, [7, 8, 30])
    one = reader(folder, last_batch="fill", workers=workers)
    readers.append(one)
    batches = [step[0] for step in one.train(0, 0)]
    labels = torch.cat([batch.labels for batch in batches])
    order = one.order.epoch(0)
    for number, instead in ((7, 9), (8, 9), (30, 31)):
        place = int((order == number).nonzero())
        assert labels[place] == instead % 10
    named = sorted(set(one.new_bad()))
    assert [name.rsplit(":", 1)[0] for name in named] == [
        "tiny-train-0000.tar: 000007.jpg",
        "tiny-train-0000.tar: 000008.jpg",
        "tiny-train-0001.tar: 000030.jpg",
    ]
    assert one.new_bad() == []


def test_a_bad_image_in_evaluation_is_counted_and_not_scored(folder: Path) -> None:
    path = folder / "tiny-val-0000.tar"
    write_tar(path, [m for i in range(7) for m in sample(i, b"nothing" if i == 3 else encoded(picture(i)), i)])
    make_index(folder)
    one = reader(folder, eval_batch=8)
    labels = torch.cat([y[valid] for _, y, valid in one.evaluation("val")])
    assert labels.tolist() == [0, 1, 2, -1, 4, 5, 6, *[i % 10 for i in range(7, 21)]]
    assert one.new_bad() == ["tiny-val-0000.tar: 000003.jpg: not an image"]


def rewrite(path: Path) -> None:
    """The same bytes, written again in place: what was read and what will be read may differ."""
    path.write_bytes(path.read_bytes())


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [rewrite, cut])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_under_a_run_is_refused(
    folder: Path, change: Any, workers: int, readers: list[Reader]
) -> None:
    one = reader(folder, workers=workers, window=1)
    readers.append(one)
    steps = one.train(0, 0)
    next(steps)
    time.sleep(0.02)  # the clock of the file system
    for shard in range(3):
        change(folder / f"tiny-train-{shard:04d}.tar")
    with pytest.raises(RefusedError, match=r"tiny-train-000\d.tar: changed while the run was reading it; restore it"):
        list(chain(steps, *(one.train(epoch, 0) for epoch in range(1, 10))))


@pytest.mark.heavy
def test_dead_workers_are_replaced_and_nothing_is_lost(
    folder: Path, readers: list[Reader], capfd: pytest.CaptureFixture[str]
) -> None:
    calm, shaken = reader(folder), reader(folder, workers=2)
    readers.append(shaken)
    expected = [step[0].images for epoch in range(4) for step in calm.train(epoch, 0)]
    found = []
    for epoch in range(4):
        for step in shaken.train(epoch, 0):
            found.append(step[0].images)
            if len(found) == 3:
                for process in fork_server_children():
                    os.kill(process, signal.SIGKILL)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert "hsvit: warning: a data worker died (" in capfd.readouterr().err


@pytest.mark.heavy
def test_evaluations_and_calibrations_start_no_worker_anew(folder: Path, readers: list[Reader]) -> None:
    alone, one = reader(folder), reader(folder, workers=1)
    readers.append(one)
    training = one.train(0, 0)
    next(training)
    seen = []
    for _ in range(3):
        labels = torch.cat([labels[valid] for _, labels, valid in one.evaluation("val")])
        assert labels.tolist() == [i % 10 for i in range(21)]
        found = [step[0].images for step in one.calibration(2)]
        assert all(torch.equal(a, step[0].images) for a, step in zip(found, alone.train(0, 0), strict=False))
        assert len(found) == 2
        seen.append(set(fork_server_children()))
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) >= 3  # of training, evaluation and calibration
    rest = [step[0].images for step in training]
    assert all(torch.equal(a, step[0].images) for a, step in zip(rest, alone.train(0, 1), strict=True))


@pytest.mark.heavy
def test_an_evaluation_whose_workers_died_in_between_is_whole(folder: Path, readers: list[Reader]) -> None:
    one = reader(folder, workers=2, eval_batch=4)
    readers.append(one)
    for _ in range(2):
        labels = torch.cat([labels[valid] for _, labels, valid in one.evaluation("val")])
        assert labels.tolist() == [i % 10 for i in range(21)]
        for process in fork_server_children():
            os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def fork_server_children() -> list[int]:
    """This process's data workers."""
    from multiprocessing.forkserver import _forkserver

    server = _forkserver._forkserver_pid  # type: ignore[attr-defined]
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == server:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    assert found
    return found


def test_too_many_bad_images_stop_the_run_with_their_list(folder: Path, tmp_path: Path) -> None:
    from hsvit_ds.data.bad import BadSamples

    spoil(folder, [7, 8, 30])
    one = reader(folder, last_batch="fill")
    list(one.train(0, 0))
    bad = BadSamples(tmp_path, one, most=0.05)
    with pytest.raises(
        RefusedError, match=r"3 of 50 images cannot be read, more than data.max_bad_fraction = 0.05: tiny"
    ):
        bad.update()
    assert len(bad.path.read_text().splitlines()) == 3
    again = BadSamples(tmp_path, reader(folder, last_batch="fill"), most=0.1)
    assert len(again.names) == 3  # a resumed run goes on counting


def test_samples_that_the_index_left_out_count_as_bad(folder: Path, tmp_path: Path) -> None:
    from hsvit_ds.data.bad import BadSamples

    os.truncate(folder / "tiny-train-0001.tar", 20_000)
    make_index(folder)
    one = reader(folder)
    assert one.order.samples < 50
    bad = BadSamples(tmp_path, one, most=0.5)
    assert any("tiny-train-0001.tar: cut off" in name for name in bad.names)
    with pytest.raises(RefusedError, match="images cannot be read"):
        BadSamples(tmp_path, one, most=0.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"root": "/nowhere"}, "data.root = /nowhere: no such folder"),
        ({"root": ""}, "data.root is not set: the folder of tiny's shards"),
        ({"classes": 7}, r"tiny-train-0000.tar: 0000\d\d.jpg has label 9, but tiny has 7 classes, 0 to 6"),
    ],
)
def test_what_cannot_be_read_is_refused_before_a_run(folder: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        reader(folder, **keys)


def test_a_rank_with_another_decoder_or_other_data_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Grid.gather

    def with_another(own: str) -> None:
        """A second rank that answers as this one, but for what begins with `own`."""
        monkeypatch.setattr(
            Grid, "gather", lambda grid, x: [*together(grid, x), "x 1" if str(x).startswith(own) else x]
        )

    with_another("simplejpeg")
    with pytest.raises(RefusedError, match=r"rank 1 has the decoder x 1, rank 0 simplejpeg .*; they must be the same"):
        reader(folder)
    reader(folder, any_decoder=True)
    with_another(open_index(folder, "train").fingerprint)
    with pytest.raises(RefusedError, match="rank 1 has data of fingerprint x 1, rank 0"):
        reader(folder, any_decoder=True)


def test_a_split_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    write_split(tmp_path / "half", "train", 12)
    make_index(tmp_path / "half")
    with pytest.raises(RefusedError, match=r"no split val \(train\)$"):
        reader(tmp_path / "half").count("val")
    (tmp_path / "empty").mkdir()
    from hsvit_ds.data.splits import open_split

    with pytest.raises(RefusedError, match=r"no split train \(no NAME-SPLIT-0000.tar, "):
        open_split(Config(name="tiny", classes=10, root=str(tmp_path / "empty")), "train")


@pytest.mark.heavy
@pytest.mark.parametrize(("world", "canvas"), [(1, 0), (4, 0), (4, 40)])
def test_a_global_batch_is_the_same_for_any_ranks_and_workers(
    folder: Path, tmp_path: Path, world: int, whole: list[dict[str, Any]], canvas: int
) -> None:
    """For S = 1 and 2, 0, 1 and 3 workers, every rank of a replica reading all images or its part, or having all of
    them on its device: ids, labels, pixels and views are those of one process without workers."""
    cases = [
        {
            "submodule_ranks": s,
            "workers": workers,
            "share": "gather" if workers != 1 else "none",
            "on_device": on_device,
            "canvas": canvas,
        }
        for s in (1, 2)
        for on_device in (("never", "always") if canvas else ("never",))
        for workers in ((0, 1) if canvas else (0, 1, 3))
        if world % s == 0
    ]
    answers = work("data", world, tmp_path / "ranks", {"root": str(folder), "cases": cases})
    for number, case in enumerate(cases):
        parts = [rank[number] for rank in answers][:: case["submodule_ranks"]]
        for rank in answers:  # the ranks of a replica have the same
            assert rank[number] in parts
        for step, expected in enumerate(whole):
            for key, values in expected.items():
                got = [value for part in parts for value in part["steps"][step][key]]
                assert got == values, (case, step, key)
        evaluated = Counter(label for part in parts for label in part["evaluated"])
        assert evaluated == Counter(i % 10 for i in range(21))


@pytest.fixture
def whole(folder: Path, canvas: int) -> list[dict[str, Any]]:
    from ..workers.data import AUGMENT, EPOCHS, described

    one = reader(folder, augmentation=augment.Config(**{**vars(AUGMENT), "canvas": canvas}))
    found = [described(one, step[0]) for epoch in range(EPOCHS) for step in one.train(epoch, 0)]
    seen = [Counter(i for step in found[e * 4 : (e + 1) * 4] for i in step["samples"]) for e in range(EPOCHS)]
    assert all(set(epoch.values()) == {1} and len(epoch) == 48 for epoch in seen)  # each once, without the rest
    assert found[0]["samples"] != found[4]["samples"]
    return found


def test_two_seeds_and_two_epochs_differ(folder: Path) -> None:
    first = reader(folder)
    second = reader(folder)
    second.order = Order(first.order.shards, first.order.window, BATCH, seed=1)
    jobs = [next(r._jobs(epoch, 0, 0)).samples.tolist() for r, epoch in ((first, 0), (first, 1), (second, 0))]
    assert len({tuple(job) for job in jobs}) == 3


@pytest.mark.parametrize(
    ("keys", "cores", "ranks", "processes"),
    [
        ({}, 12, 1, 8),
        ({}, 12, 4, 3),
        ({}, 2, 8, 1),
        ({"workers": 11}, 2, 2, 11),
        ({"workers": 0}, 12, 1, 0),
        ({"root": "https://example.org/set"}, 2, 2, 4),
        ({"root": "https://example.org/set"}, 96, 1, 4),  # its order depends on them: the same on every host
    ],
)
def test_workers_follow_the_cores_but_for_a_stream(
    keys: dict[str, Any], cores: int, ranks: int, processes: int
) -> None:
    config = splits.Config(name="tiny", classes=10, image_size=32, **keys)
    assert splits.workers(config, cores, ranks) == processes


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])  # of torchrun, of DeepSpeed's launcher
def test_the_ranks_of_a_host_share_its_cores(variable: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setenv(variable, "2")
    assert reader(folder, workers="auto").working == "3 data workers a rank; 6 cores, 2 ranks on this host"
    assert reader(folder, workers=1).working == "1 data worker a rank"
    assert reader(folder, workers=0).working == ""
    device = augment.Config(flip=0.5)
    on_device = reader(folder, augmentation=device, workers="auto", on_device="always")
    assert on_device.working == "1 data worker a rank; 6 cores, 2 ranks on this host"


def test_the_number_of_workers_is_not_kept_with_a_run(folder: Path) -> None:
    """It may be resumed where there are other cores."""
    config = splits.Config(name="tiny", classes=10, image_size=32, root=str(folder), val="val", test="val")
    assert splits.resolved(config).workers == "auto"
