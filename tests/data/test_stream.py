"""Shards behind a URL: every sample of an evaluation once, endless training, and servers that fail."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, zip_longest
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hsvit_ds.data import augment, remote, stream
from hsvit_ds.data.decode import installed
from hsvit_ds.data.index import open_index
from hsvit_ds.data.layouts import split_shards
from hsvit_ds.data.order import Order, Share
from hsvit_ds.data.reader import Reader
from hsvit_ds.data.remote import Split
from hsvit_ds.data.splits import Config, resolved, shard_lengths
from hsvit_ds.data.stream import Streamed
from hsvit_ds.data.transform import Transform
from hsvit_ds.errors import RefusedError
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid

from ..tars import data_set

FAST = augment.Config()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """50 training samples in three shards of 17, 17, 16 and 21 for validation."""
    folder = data_set(tmp_path / "set", train=50, val=21)
    splits = {}
    for split, names in split_shards(folder).items():
        lengths = open_index(folder, split).lengths.tolist()
        splits[split] = {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": sum(lengths)}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


@dataclass
class Faults:
    """What the server does wrong, each as often as it says, and what it was asked for."""

    fail: int = 0
    truncate: int = 0
    stall: int = 0
    after: int = 0
    """Bytes that it sends before it stalls or breaks off; 0: half of them."""
    asked: list[str] = field(default_factory=list)


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, faults: Faults, *args: Any, **kwargs: Any) -> None:
        self.faults = faults
        super().__init__(*args, **kwargs)

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.faults.asked.append(self.path)
        if not self.path.endswith("train-0001.tar"):
            return super().do_GET()
        if self.faults.fail:
            self.faults.fail -= 1
            return self.send_error(503)
        if self.faults.truncate or self.faults.stall:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: self.faults.after or len(data) // 2])
            self.wfile.flush()
            if self.faults.truncate:
                self.faults.truncate -= 1
            else:
                self.faults.stall -= 1
                Event().wait(3)
            self.close_connection = True
            return None
        return super().do_GET()


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def url(folder: Path, faults: Faults) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, faults, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without the waiting, and nothing remembered of another server."""
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    remote._info.cache_clear()


def streamed(root: str, split: str = "train", reader: int = 0, readers: int = 1, **keys: Any) -> Streamed:
    options: dict[str, Any] = {"count": 5, "window": 20, "cache": "", "timeout": 1.0} | keys
    transform = Transform(FAST, 32, installed("auto"), seed=0)
    return Streamed(remote.open_split(root, split, 1.0), transform, 10, reader, readers, **options)


def reader(root: str, batch: int = 10, **keys: Any) -> Reader:
    config = Config(**{"name": "tiny", "classes": 10, "image_size": 32, "root": root, "workers": 0} | keys)
    order = Order(shard_lengths(config), config.window, batch, 0)
    return Reader(config, FAST, order, Share(batch, 1, 1, 0), Grid(GridConfig(), 1))


def prints(folder: Path, split: str) -> dict[bytes, int]:
    """{pixels: number of the sample}."""
    from hsvit_ds.data.sources import Shards

    index = open_index(folder, split)
    images = Shards(index, Transform(FAST, 32, installed("auto"), 0)).held_out(torch.arange(len(index)))
    return {image.numpy().tobytes(): i for i, image in enumerate(images.pixels)}


def numbers(folder: Path, found: list[Any], split: str = "train") -> list[int]:
    known = prints(folder, split)
    return [known[image.numpy().tobytes()] for images in found for image in images]


def test_every_shard_is_read_once_before_any_is_read_again(folder: Path, url: str) -> None:
    """Two readers, of which neither could hold the three shards alone."""
    both = [streamed(url, reader=r, readers=2, window=2) for r in range(2)]
    read = [number for s in both for number in numbers(folder, [x.pixels for x in islice(iter(s), 10)])]
    assert len(read) == 100
    seen = Counter(read)
    assert set(seen) == set(range(50))
    assert max(seen.values()) <= 4  # the next epochs have begun
    a, b = (numbers(folder, [x.pixels for x in islice(iter(s), 10)]) for s in (both[0], streamed(url, window=2)))
    assert a != b


def test_training_is_the_same_twice_and_differs_by_epoch(folder: Path, url: str) -> None:
    first, again = (numbers(folder, [x.pixels for x in islice(iter(streamed(url)), 20)]) for _ in range(2))
    assert first == again
    assert first[:50] != first[50:]


def test_resuming_starts_at_the_beginning_of_a_shard(folder: Path, url: str, faults: Faults) -> None:
    whole = [shard for _, shard in islice(streamed(url)._shards(0, 1, 0), 6)]
    lengths = (17, 17, 16)
    skipped = lengths[whole[0]] + lengths[whole[1]] + 3
    assert [s for _, s in islice(streamed(url)._shards(0, 1, skipped), 4)] == whole[2:]
    faults.asked.clear()
    next(iter(streamed(url, done=skipped // 5, window=1)))
    assert faults.asked == [f"/tiny-train-{whole[2]:04d}.tar"]


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_evaluation_reads_every_sample_once_and_in_as_many_forwards_everywhere(
    folder: Path, url: str, readers: int
) -> None:
    passes = [list(streamed(url, "val", r, readers, once=True, count=4)) for r in range(readers)]
    assert len({len(one) for one in passes}) == 1
    kept = [x.pixels[x.labels >= 0] for one in passes for x in one]
    assert sorted(numbers(folder, kept, "val")) == list(range(21))


@pytest.mark.heavy
@pytest.mark.parametrize("done", range(1, 8))
def test_an_evaluation_that_starts_anew_goes_on_where_it_was(
    url: str, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that died after `done` forwards: three of them, asked in turn."""

    def passes(done: int) -> list[Counter[bytes]]:
        found = []
        for worker in range(3):
            info = SimpleNamespace(id=worker, num_workers=3)
            monkeypatch.setattr(stream, "get_worker_info", lambda info=info: info)
            forwards = streamed(url, "val", once=True, count=4, done=done)
            found.append([Counter(x.numpy().tobytes() for x in f.pixels[f.labels >= 0]) for f in forwards])
        return [forward for turn in zip_longest(*found) for forward in turn if forward is not None]

    whole = passes(0)
    assert sum(sum(whole, Counter()).values()) == 21
    assert sum(whole[:done], Counter()) + sum(passes(done), Counter()) == sum(whole, Counter())


@pytest.mark.heavy
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("fault", ["fail", "truncate", "stall"])
def test_a_server_that_fails_for_a_while_loses_nothing(
    folder: Path, url: str, faults: Faults, fault: str, cache: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    setattr(faults, fault, 2)
    one = streamed(url, window=1, cache=str(tmp_path / "cache") if cache else "")
    read = numbers(folder, [x.pixels for x in islice(iter(one), 10)])
    assert Counter(read) == Counter(range(50))
    told = capfd.readouterr().err
    assert told.count("tiny-train-0001.tar") == 2
    assert "; again in 0.25 s" in told


@pytest.mark.parametrize("cache", [False, True])
def test_a_shard_that_breaks_off_between_an_image_and_its_label_is_read_again(
    folder: Path, url: str, faults: Faults, cache: bool, tmp_path: Path
) -> None:
    """To tarfile and webdataset it looks whole."""
    faults.after = (folder / "tiny-train-0001.tar").read_bytes().rfind(b"000033.cls")
    assert faults.after % 512 == 0
    faults.truncate = 1
    one = streamed(url, window=1, cache=str(tmp_path / "cache") if cache else "")
    found = list(islice(iter(one), 10))
    assert Counter(numbers(folder, [x.pixels for x in found])) == Counter(range(50))
    assert not any(x.bad for x in found)


@pytest.mark.parametrize("cache", [False, True])
def test_a_pipe_that_gives_too_little_is_read_again(
    folder: Path, cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "tiny-train-0001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rfind(b"000030.jpg")])  # between two samples
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: path.write_bytes(whole))
    one = streamed(f"pipe:cat {folder}", window=1, cache=str(tmp_path / "cache") if cache else "")
    read = numbers(folder, [x.pixels for x in islice(iter(one), 10)])
    assert Counter(read) == Counter(range(50))


def test_a_shard_that_stays_too_short_is_refused(folder: Path) -> None:
    path = folder / "tiny-train-0001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rfind(b"000030.jpg")])
    answers = list(islice(iter(streamed(f"pipe:cat {folder}")), 11))
    assert "tiny-train-0001.tar: 13 samples, _info.json says 17; tried 8 times" in answers[-1].refused


def test_the_cache_is_asked_instead_of_the_server(folder: Path, url: str, faults: Faults, tmp_path: Path) -> None:
    one = streamed(url, window=1, cache=str(tmp_path))
    for _ in range(2):
        list(islice(iter(one), 20))
    assert Counter(faults.asked)["/tiny-train-0000.tar"] == 1


def test_a_server_that_stays_down_is_named(url: str, faults: Faults) -> None:
    one = streamed(url)
    faults.fail = 100
    answers = list(islice(iter(one), 11))
    assert answers[-1].refused.startswith(f"{url}/tiny-train-0001.tar: HTTP Error 503")
    assert answers[-1].refused.endswith(f"tried {remote.TRIES} times. Is the server there, and the file whole?")


def test_a_url_that_is_not_there_is_refused_at_once(folder: Path, url: str, faults: Faults) -> None:
    with pytest.raises(RefusedError, match=r"/elsewhere/_info.json: 404 .*; is data.root right"):
        remote.open_split(f"{url}/elsewhere", "train", 1.0)
    one = streamed(url)
    (folder / "tiny-train-0001.tar").unlink()
    faults.asked.clear()
    answers = list(islice(iter(one), 11))
    assert "tiny-train-0001.tar: 404" in answers[-1].refused
    assert Counter(faults.asked)["/tiny-train-0001.tar"] == 1


def test_pipes_are_read_too(folder: Path) -> None:
    one = streamed(f"pipe:cat {folder}", window=1)
    assert Counter(numbers(folder, [x.pixels for x in islice(iter(one), 10)])) == Counter(range(50))


def test_a_bad_image_is_named_and_left_out(folder: Path, url: str) -> None:
    path = folder / "tiny-val-0000.tar"
    data = bytearray(path.read_bytes())
    data[512:1024] = bytes(512)
    path.write_bytes(data)
    found = list(streamed(url, "val", once=True, count=8))
    assert [why for x in found for why in x.bad] == [f"{url}/tiny-val-0000.tar: 000000: not an image"]
    assert sum(int((x.labels == -1).sum()) for x in found) == 1
    assert sum(int((x.labels >= 0).sum()) for x in found) == 20


def test_a_label_out_of_range_is_refused_by_name(url: str) -> None:
    answers = list(islice(iter(replace(streamed(url), classes=9)), 10))
    assert "tiny-train-000" in answers[-1].refused
    assert "has label 9, but the data set has 9 classes, 0 to 8" in answers[-1].refused


@pytest.mark.heavy
@pytest.mark.parametrize("workers", [0, 2])
def test_the_reader_is_the_same_for_urls(folder: Path, url: str, workers: int) -> None:
    one = reader(url, workers=workers)
    for epoch in range(2):
        steps = list(one.train(epoch, 0))
        assert len(steps) == 5
        assert all(step[0].images.shape == (10, 3, 32, 32) for step in steps)
    labels = torch.cat([labels[valid] for _, labels, valid in one.evaluation("val")])
    assert Counter(labels.tolist()) == Counter(i % 10 for i in range(21))
    assert one.count("val") == 21
    one.close()


def test_what_a_stream_cannot_promise_is_refused(url: str) -> None:
    from hsvit_ds.run import recipe as recipes

    base = {
        "model": {"kind": "hsvit", "variant": "C2A2", "submodules": 2},
        "data": {"name": "tiny", "classes": 10, "image_size": 32, "root": url, "test": "val"},
        "run": {"global_batch": 10},
    }
    vit = {"kind": "vit", "variant": "DeiT-Ti", "widths": {"smallest": 0.5, "granularity": 0.5}}
    scala = {"kind": "scala", "teacher": {"name": "timm/resnet18", "cache": "/tmp/answers"}}
    for change, message in (
        ({"augment": {"repeats": 2}}, "augment.repeats = 2: not for a stream"),
        ({"model": vit, "task": scala}, "task.teacher.cache: a stream's images depend on"),
        ({"grid": {"submodule_ranks": 2}, "data": base["data"] | {"share": "none"}}, "the ranks of a replica share"),
    ):
        with pytest.raises(RefusedError, match=message):
            recipes.resolve(recipes.from_table(base | change, "here"), 2)


def test_other_data_behind_the_url_is_refused(folder: Path, url: str) -> None:
    config = Config(name="tiny", classes=10, root=url)
    assert resolved(resolved(config)) == resolved(config)
    with pytest.raises(RefusedError, match=r'data.fingerprint = "0123", but the training split in http'):
        resolved(Config(name="tiny", classes=10, root=url, fingerprint="0123"))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"splits": {"train": {"filenames": ["a.tar"]}}}, "split train has no 'shard_lengths'"),
        ({"splits": {"train": {"filenames": [], "shard_lengths": []}}}, "train has 0 files and 0 lengths"),
        ({"splits": {"all": {}}}, r"no split train \(all\)"),
        ({"splits": {"train": {"filenames": 3}}}, "names no splits with filenames and shard_lengths"),
        ({"splits": {"train": ["a.tar"]}}, "names no splits with filenames and shard_lengths"),
        ({}, "names no splits with filenames and shard_lengths"),
        ([], "names no splits with filenames and shard_lengths"),
    ],
)
def test_an_info_that_says_too_little_is_refused(folder: Path, url: str, info: Any, message: str) -> None:
    (folder / "_info.json").write_text(json.dumps(info))
    with pytest.raises(RefusedError, match=message):
        remote.open_split(url, "train", 1.0)


def test_a_split_has_a_fingerprint() -> None:
    assert Split("a", ("x",), (1,)).fingerprint == Split("b", ("x",), (1,)).fingerprint
    assert Split("a", ("x",), (2,)).fingerprint != Split("a", ("x",), (1,)).fingerprint
