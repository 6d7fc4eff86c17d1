"""Shards are found in three layouts or named by patterns, and are the same to read, whatever they are called."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from hsvit_ds.data import augment, layouts, remote
from hsvit_ds.data.index import open_index
from hsvit_ds.data.indexing import make
from hsvit_ds.data.order import Order, Share
from hsvit_ds.data.reader import Reader
from hsvit_ds.data.splits import Config, check_splits, class_names, open_split, resolved, shard_lengths, split_names
from hsvit_ds.errors import RefusedError
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid

from ..tars import encoded, make_index, picture, sample, write_split, write_tar
from .shards.commands import refused, shards

Name = Callable[[str, int], str]


@dataclass(frozen=True)
class Layout:
    """How shard i of a split is called, and the patterns that say so where it is not found."""

    name: Name
    patterns: dict[str, str] = field(default_factory=dict)

    def at(self, place: object) -> dict[str, str]:
        return {split: pattern.replace("PLACE", str(place)) for split, pattern in self.patterns.items()}

    def options(self, folder: Path) -> list[str]:
        return [word for split, p in self.at(folder).items() for word in ("--shards", f"{split}={p}")]


def both(pattern: str) -> dict[str, str]:
    return {split: pattern.replace("SPLIT", split) for split in ("train", "val")}


FOUND = {
    "NAME-SPLIT-0000.tar": Layout(lambda split, i: f"tiny-{split}-{i:04d}.tar"),
    "SPLIT-000000.tar": Layout(lambda split, i: f"{split}-{i:06d}.tar"),
    "SPLIT/000000.tar": Layout(lambda split, i: f"{split}/{i:06d}.tar"),
    "SPLIT/NAME-0.tar": Layout(lambda split, i: f"{split}/any-thing-{i}.tar"),
}
NAMED = {
    "braces": Layout(lambda split, i: f"{split}.{i:03d}.tar", both("SPLIT.{000..002}.tar")),
    "list": Layout(lambda split, i: f"{'ab'[i > 0]}/{i}_{split}.tar", both("a/0_SPLIT.tar::b/{1..2}_SPLIT.tar")),
    "whole": Layout(lambda split, i: f"{split}.{i}.tar", both("PLACE/SPLIT.{0,1,2}.tar")),
    "one": Layout(lambda split, i: f"part-{i + 3 * (split == 'val')}.tar",
                  {"train": "part-{0..2}.tar", "val": "part-{3..5}.tar"}),
}  # fmt: skip
GLOBS = {
    "glob": Layout(lambda split, i: f"{split}{i}.tar", both("SPLIT*.tar")),
    "deep": Layout(lambda split, i: f"x/{split}/{i}/shard.tar", both("x/SPLIT/*/*.tar")),
}
FILES = FOUND | NAMED | GLOBS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Called as ever: 50 samples for training, 21 for validation, in three shards each."""
    folder = tmp_path_factory.mktemp("source") / "set"
    write_split(folder, "train", 50)
    for shard in range(3):  # other pictures than those of training
        numbers = range(100 + 7 * shard, 107 + 7 * shard)
        members = [m for i in numbers for m in sample(i, encoded(picture(i)), i % 10)]
        write_tar(folder / f"tiny-val-{shard:04d}.tar", members)
    make_index(folder)
    return folder


def laid(source: Path, folder: Path, name: Name) -> Path:
    """The shards of `source` under other names, with an `_info.json`."""
    splits: dict[str, Any] = {}
    for split in ("train", "val"):
        index, names = open_index(source, split), []
        for i, shard in enumerate(index.shards):
            names.append(name(split, i))
            (folder / names[-1]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / shard, folder / names[-1])
        lengths = index.lengths.tolist()
        splits[split] = {"filenames": names, "shard_lengths": lengths, "num_samples": sum(lengths)}
    (folder / "_info.json").write_text(json.dumps({"splits": splits, "classes": list("0123456789")}))
    return folder


def config(root: object, patterns: dict[str, str], **keys: Any) -> Config:
    options = {"name": "tiny", "image_size": 32, "workers": 0, "test": "val", "window": 20} | keys
    return Config(root=str(root), shards=patterns, **options)


def everything(config: Config) -> list[torch.Tensor]:
    """The images and labels of two epochs of training and of an evaluation, in their order."""
    config = resolved(config)
    check_splits(config)
    order = Order(shard_lengths(config), config.window, 10, 0)
    reader = Reader(config, augment.Config(shift=0.2), order, Share(10, 1, 1, 0), Grid(GridConfig(), 1))
    read = [x for epoch in range(2) for (batch,) in reader.train(epoch, 0) for x in (batch.images, batch.labels)]
    read += [x for batch in reader.evaluation("val") for x in batch]
    reader.close()
    return read


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture(scope="module")
def indexed(source: Path) -> list[torch.Tensor]:
    return everything(config(source, {}, classes=10))


@pytest.mark.parametrize("layout", FILES.values(), ids=FILES)
def test_shards_of_any_name_are_read_the_same_by_index_and_the_tools_agree(
    layout: Layout, source: Path, indexed: list[torch.Tensor], tmp_path: Path
) -> None:
    folder = laid(source, tmp_path / "set", layout.name)
    options, patterns = layout.options(folder), layout.at(folder)
    done = shards("index", folder, *options, "--processes", 1)
    assert [line.split("│")[1:4] for line in done.stdout.splitlines() if line.startswith("│")] == [
        [" train ", " 50      ", " 3      "],
        [" val   ", " 21      ", " 3      "],
    ]
    assert same(everything(config(folder, patterns)), indexed)
    index = open_index(folder, "train", patterns=patterns)
    assert index.shards == tuple(layout.name("train", i) for i in range(3))
    told = shards("check", folder, *options, "--processes", 1).stdout
    assert told == f"{folder}: errors: 0, warnings: 0; usable samples: 50 of train, 21 of val\n"
    told = shards("info", folder, *options).stdout
    assert index.fingerprint in told
    assert told.count("agrees") == 2
    assert split_names(config(folder, patterns)) == ["train", "val"]


def test_the_fingerprints_of_old_are_what_they_were(tmp_path: Path) -> None:
    """Runs that were begun then go on."""
    names = [f"x-train-{i:04d}.tar" for i in range(2)]
    for i, name in enumerate(names):
        write_tar(tmp_path / name, [m for n in range(3) for m in sample(3 * i + n, b"x" * (100 + n), n)])
    assert make(tmp_path, "train").fingerprint == "473115aa9a915430"
    about = {"filenames": names, "shard_lengths": [3, 3]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": about}}))
    for patterns in ({}, {"train": "x-train-{0000..0001}.tar"}):
        chosen = config(f"pipe:cat {tmp_path}", patterns)
        assert open_split(chosen, "train").fingerprint == "75b4dd03a8a7fd1d"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL that it is served at."""
    (tmp_path / "set").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "set")))
    Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    yield tmp_path / "set", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    remote._info.cache_clear()


@pytest.fixture(scope="module")
def streamed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """As a stream, which has another order."""
    folder = laid(source, tmp_path_factory.mktemp("streamed"), FOUND["NAME-SPLIT-0000.tar"].name)
    return everything(config(f"pipe:cat {folder}", {}))


def brothers(folder: Path, inner: str) -> None:
    """Put an `_info.json` beside the shards of a sub-folder, which tells their plain names."""
    about = json.loads((folder / "_info.json").read_text())
    for split in about["splits"].values():
        split["filenames"] = [Path(name).name for name in split["filenames"]]
    (folder / inner / "_info.json").write_text(json.dumps(about))


BRACES, INNER = NAMED["braces"], FOUND["SPLIT/000000.tar"]
STREAMS: dict[str, tuple[Layout, str, dict[str, str]]] = {
    **{name: (layout, "URL", {}) for name, layout in FOUND.items()},
    **{f"{name} behind pipe": (layout, "pipe:cat FOLDER", {}) for name, layout in FOUND.items()},
    **{name: (layout, "URL", layout.at("URL")) for name, layout in NAMED.items()},
    "relative to a command": (BRACES, "pipe:cat FOLDER", BRACES.patterns),
    "whole, beside _info.json": (BRACES, "", both("URL/SPLIT.{000..002}.tar")),
    "an _info.json a split": (INNER, "", both("URL/SPLIT/{000000..000002}.tar")),
    "told in a folder": (BRACES, "FOLDER", both("URL/SPLIT.{000..002}.tar")),
    "told elsewhere": (INNER, "URL/train", both("pipe:cat FOLDER/SPLIT/{000000..000002}.tar")),
    "a command with an end": (BRACES, "", both("pipe:cat FOLDER/SPLIT.{000..002}.tar | cat -")),
    "a command in quotes": (BRACES, "", both('pipe:cat "FOLDER/SPLIT.{000..002}.tar"')),
    "a list": (BRACES, "", both("URL/SPLIT.000.tar::pipe:cat FOLDER/SPLIT.001.tar::URL/SPLIT.002.tar")),
}


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(("layout", "root", "patterns"), STREAMS.values(), ids=STREAMS)
def test_shards_of_any_name_are_streamed_the_same(
    layout: Layout,
    root: str,
    patterns: dict[str, str],
    cache: bool,
    source: Path,
    streamed: list[torch.Tensor],
    served: tuple[Path, str],
    tmp_path: Path,
) -> None:
    folder, url = served
    laid(source, folder, layout.name)
    if layout is INNER:
        for split in ("train", "val"):
            brothers(folder, split)
    root, *named = (text.replace("URL", url).replace("FOLDER", str(folder)) for text in (root, *patterns.values()))
    chosen = config(
        root, dict(zip(patterns, named, strict=True)), cache=str(tmp_path / "cache") if cache else "", classes=10
    )
    assert same(everything(chosen), streamed)
    assert class_names(chosen) == tuple("0123456789")
    assert set(split_names(chosen)) == {"train", "val"}


def test_a_split_can_be_streamed_and_another_read_from_files(
    source: Path, indexed: list[torch.Tensor], served: tuple[Path, str]
) -> None:
    folder, url = served
    laid(source, folder, BRACES.name)
    shards("index", folder, "--shards", f"val={BRACES.patterns['val']}", "--processes", 1)
    chosen = config(folder, {"train": f"{url}/{BRACES.patterns['train']}", "val": BRACES.patterns["val"]}, classes=10)
    assert isinstance(open_split(chosen, "train"), remote.Split)
    assert same(everything(chosen)[-3:], indexed[-3:])
    assert chosen.stream == f"data.shards.train = {url}/train.{{000..002}}.tar"


def test_two_layouts_for_one_split_are_refused_and_both_are_named(source: Path, tmp_path: Path) -> None:
    for one, first in FOUND.items():
        for other, second in FOUND.items():
            if one == other:
                continue
            folder = laid(source, tmp_path / f"{one} and {other}".replace("/", "."), first.name)
            path = folder / second.name("train", 7)
            path.parent.mkdir(exist_ok=True)
            shutil.copy(source / "tiny-train-0000.tar", path)
            with pytest.raises(RefusedError, match="shards of two kinds for train, ") as caught:
                layouts.split_shards(folder)
            assert second.name("train", 7) in str(caught.value)
            assert first.name("train", 0) in str(caught.value)
            (remedy,) = re.findall(r"data\.shards\.train='(.*?)'", str(caught.value))
            assert len(layouts.split_shards(folder, {"train": remedy})["train"]) in (1, 3)
            option = str(caught.value).partition(", or --shards ")[2]
            shards("index", folder, "--shards", *shlex.split(option), "--processes", 1)


def test_a_folder_of_another_set_is_no_split(source: Path, tmp_path: Path) -> None:
    folder = laid(source, tmp_path / "set", FOUND["SPLIT-000000.tar"].name)
    shutil.copytree(source, folder / "before")
    assert list(layouts.split_shards(folder)) == ["train", "val"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"train": "train.{000..005}.tar"},
            '"train.{000..005}.tar": train.003.tar is missing (3 of 6 are); bring',
        ),
        ({"train": "no/{0..1}.tar"}, "no/0.tar is missing (2 of 2 are)"),
        ({"train": "train-*.tar"}, 'shards of train, "train-*.tar": nothing is called "train-*.tar"'),
        ({"train": "*.tar", "val": "val.*.tar"}, "val.000.tar: is in two splits, train and val; name the shards"),
        ({"train": "train.000.tar::train.{000..002}.tar"}, "train.000.tar: is named twice for train"),
        ({"train": "train.{001..002}.tar", "val": "val.*.tar"}, "names train.000.tar, which is no shard of train"),
        ({"train": "train.{002..000}.tar", "val": "val.*.tar"}, "has the shards of train in another order"),
        ({"train": "train.*.tar"}, "no split val (train)"),
    ],
)
def test_what_a_pattern_cannot_mean_is_refused(
    patterns: dict[str, str], message: str, source: Path, tmp_path: Path
) -> None:
    folder = laid(source, tmp_path / "set", BRACES.name)
    shards("index", folder, *BRACES.options(folder), "--processes", 1)
    with pytest.raises(RefusedError, match=re.escape(message)) as caught:
        check_splits(config(folder, patterns, classes=10))
    assert "\n" not in str(caught.value)
    if "two splits" in message or "missing" in message:  # the tools say the same
        words = [word for split, pattern in patterns.items() for word in ("--shards", f"{split}={pattern}")]
        for command in ("index", "check", "info"):
            refused(shards(command, folder, *words, code=2), message)


def test_shards_of_a_named_split_are_none_of_another_that_is_found(source: Path, tmp_path: Path) -> None:
    folder = laid(source, tmp_path / "set", FOUND["SPLIT-000000.tar"].name)
    assert list(layouts.split_shards(folder, {"all": "train-*.tar"})) == ["val", "all"]
    with pytest.raises(RefusedError, match=r"train-000000.tar: is in two splits, train and few"):
        layouts.split_shards(folder, {"few": "train-000000.tar"})


def test_the_command_of_a_refusal_makes_the_index(source: Path, tmp_path: Path) -> None:
    """With braces, spaces and a folder of indexes."""
    folder = laid(source, tmp_path / "my set", lambda split, i: f"the {split} {i}.tar")
    chosen = config(folder, both("the SPLIT {0..2}.tar"), classes=10, index=str(tmp_path / "my indexes"))
    with pytest.raises(RefusedError, match="there is no index; make it: hsvit shards index") as caught:
        check_splits(chosen)
    words = shlex.split(str(caught.value).partition("make it: hsvit shards ")[2])
    shards(*words, "--processes", 1)
    check_splits(chosen)
    (folder / "the val 0.tar").write_bytes((folder / "the val 1.tar").read_bytes())
    with pytest.raises(RefusedError, match="make it anew: hsvit shards index") as caught:
        check_splits(chosen)
    shards(*shlex.split(str(caught.value).partition("make it anew: hsvit shards ")[2]), "--processes", 1)
    check_splits(chosen)


@pytest.mark.parametrize(
    ("change", "patterns", "message"),
    [
        ({"filenames": ["train.000.tar"], "shard_lengths": [17]}, {"train": "train.{000..002}.tar"},
         "/_info.json: has no length of train.001.tar (2 of 3 shards of train); write it there"),
        ({"shard_lengths": ["x", 17, 16]}, {"train": "train.{000..002}.tar"}, "has no length of train.000.tar"),
        ({}, {"val": "train.000.tar"}, "/train.000.tar: is in two splits, train and val"),
        ({}, {"train": "a.tar::a.tar"}, "/a.tar: is named twice for train"),
        ({}, {"train": "URL/train.000.tar::pipe:cat /x/train.000.tar"}, "cannot tell the lengths of"),
        ({}, {"train": "pipe:cat /x/a.tar::pipe:cat /y/a.tar"}, "cannot tell the lengths of pipe:cat /x/a.tar and"),
        (None, {"train": "train.000.tar"}, "404 File not found; is data.root right, or data.shards? It tells"),
    ],
)  # fmt: skip
def test_a_stream_without_counts_is_refused(
    change: dict[str, Any] | None, patterns: dict[str, str], message: str, source: Path, served: tuple[Path, str]
) -> None:
    folder, url = served
    info = json.loads((laid(source, folder, BRACES.name) / "_info.json").read_text())
    info["splits"]["train"] |= change or {}
    (folder / "_info.json").write_text(json.dumps(info))
    if change is None:
        (folder / "_info.json").unlink()
    patterns = {split: pattern.replace("URL", url) for split, pattern in patterns.items()}
    with pytest.raises(RefusedError, match=re.escape(message)) as caught:
        open_split(config(url, patterns), next(iter(patterns)))
    assert "\n" not in str(caught.value)


def test_counts_that_are_looked_for_in_a_folder_are_missed_at_once(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"_info.json: no such file. It tells the samples of each shard"):
        open_split(config(tmp_path, {"train": "https://host/a.tar"}), "train")


@pytest.mark.parametrize(
    ("root", "patterns", "message"),
    [
        ("/x", {"../y": "a.tar"}, r"shards.'../y': a split's name must be"),
        ("/x", {"train": "a{0..1.tar"}, r"shards.train = .*braces that do not fit"),
        ("/x", {"train": "a.tar::"}, r"shards.train = .*an empty name"),
        ("/x", {"train": ""}, r"shards.train = .*an empty name"),
        ("/x", {"train": "../a.tar"}, r"leads up"),
        ("/x", {"train": "a.tar::https://host/b.tar"}, r'both URLs and files \("a.tar"\)'),
        ("", {"train": "pipe:cat a.tar"}, r"has no FOLDER/NAME.tar in it"),
        ("", {"train": "https://host/x/a.tar.gz"}, r"has no FOLDER/NAME.tar in it"),
        ("https://host", {"train": "/a.tar"}, r"'/a.tar' is not the plain name of a tar"),
        ("https://host", {"train": "*.tar"}, r"is not the plain name of a tar"),
        ("pipe:cat /x", {"train": "a.tar; touch made"}, r"is not the plain name of a tar"),
        ("pipe:cat /x", {"train": "$(touch made).tar"}, r"is not the plain name of a tar"),
        ("pipe:cat /x", {"train": "{a,../b}.tar"}, r"is not the plain name of a tar"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused_before_anything_is_read(
    root: str, patterns: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(root, patterns)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.tar", "must be SPLIT=PATTERN"),
        ("a/b=c.tar", "must be SPLIT=PATTERN"),
        ("train=https://host/a.tar", "is a URL; give the files of a folder"),
        ("train=a{.tar", "braces that do not fit"),
    ],
)
def test_an_option_that_is_no_pattern_of_files_is_refused(option: str, message: str, source: Path) -> None:
    for command in ("index", "check", "info"):
        refused(shards(command, source, "--shards", option, code=2), "--shards", message)
    refused(shards("info", source, "--shards", "a=b", "--shards", "a=c", code=2), "a is given twice")
