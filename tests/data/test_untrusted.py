"""Tars, images, indexes and descriptions that were made to do harm are refused, or a bad sample. See SECURITY.md."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin

from hsvit_ds.data import augment, index, loader, remote
from hsvit_ds.data.decode import BadImageError, installed, open_upright
from hsvit_ds.data.scan import scan
from hsvit_ds.data.sources import Shards
from hsvit_ds.data.stream import Streamed
from hsvit_ds.data.transform import Transform
from hsvit_ds.errors import RefusedError

from ..tars import data_set, encoded, old_index, picture, sample, write_tar
from .shards.commands import make, refused, shards
from .shards.test_make import imagenet

JPEG = encoded(picture(0))


def kind(tar_type: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("000003.jpg")
    info.type, info.linkname = tar_type, "/etc/passwd"
    return info


UNSAFE = [
    *(kind(t) for t in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)),
    kind(tarfile.GNUTYPE_SPARSE),
    *(tarfile.TarInfo(name) for name in ("/etc/000003.jpg", "../000003.jpg", "a/../../000003.jpg")),
]


def with_member(path: Path, info: tarfile.TarInfo, data: bytes = JPEG) -> None:
    """Put a member behind those of a tar, and its label."""
    with tarfile.open(path, "a") as tar:
        info.size = len(data) if info.isreg() else 0
        if info.type == tarfile.GNUTYPE_SPARSE:  # which Python does not write
            header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
            header[386 : 386 + 97] = bytes(96) + b"\0"
            header[483:495] = b"77777777777\0"
            header[148:156] = b"        "
            header[148:156] = b"%06o\0 " % sum(header)
            tar.fileobj.write(header)  # type: ignore[union-attr]
            tar.fileobj.write(data.ljust(-(-len(data) // 512) * 512, b"\0"))  # type: ignore[union-attr]
            tar.offset = tar.fileobj.tell()  # type: ignore[union-attr,attr-defined]
        else:
            tar.addfile(info, io.BytesIO(data))
        label = tarfile.TarInfo(info.name.replace(".jpg", ".cls"))
        label.size = 1
        tar.addfile(label, io.BytesIO(b"1"))


@pytest.mark.parametrize("info", UNSAFE, ids=lambda info: f"{info.type!r} {info.name}")
def test_an_unsafe_member_is_refused_by_index_and_make_and_found_by_check(
    info: tarfile.TarInfo, tmp_path: Path
) -> None:
    folder = data_set(tmp_path / "set", train=9, val=3)
    with_member(folder / "tiny-train-0001.tar", info)
    reason = "a link, a device or a sparse file" if info.name == "000003.jpg" else "leads out of the folder"
    refused(shards("index", folder, code=2), "tiny-train-0001.tar", info.name, reason)
    assert f"unsafe member: tiny-train-0001.tar: {info.name}: " in shards("check", folder, code=1).stdout
    source = imagenet(tmp_path / "imagenet")
    for split, archive in (("train", "ILSVRC2012_img_train.tar"), ("val", "ILSVRC2012_img_val.tar")):
        with_member(source / archive, info)
        refused(make(source, tmp_path / split, split=split, count=1, code=2), archive, info.name, reason)
    inner = source / "inner.tar"
    write_tar(inner, [("n01_0.JPEG", JPEG)])
    with_member(inner, info)
    write_tar(source / "ILSVRC2012_img_train.tar", [("n01.tar", inner.read_bytes())])
    refused(make(source, tmp_path / "nested", count=1, code=2), "ILSVRC2012_img_train.tar", info.name, reason)


def described(folder: Path, names: list[str], lengths: list[int]) -> Path:
    split = {"filenames": names, "shard_lengths": lengths}
    (folder / "_info.json").write_text(json.dumps({"splits": dict.fromkeys(("train", "val", "test"), split)}))
    remote._info.cache_clear()
    return folder


def streamed(root: str, count: int = 4, cache: str = "") -> Streamed:
    transform = Transform(augment.Config(), 32, installed("auto"), seed=0)
    return Streamed(remote.open_split(root, "val", 1.0), transform, 10, 0, 1, count, 1, cache, 1.0, once=True)


@pytest.mark.parametrize("info", UNSAFE, ids=lambda info: f"{info.type!r} {info.name}")
def test_an_unsafe_member_is_a_bad_sample_of_a_stream(info: tarfile.TarInfo, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample(0, JPEG, 1))
    with_member(tmp_path / "a.tar", info)
    described(tmp_path, ["a.tar"], [2])
    (found,) = streamed(f"pipe:cat {tmp_path}", count=2)
    assert found.labels.tolist() == [1, -1]
    (bad,) = found.bad
    assert f"a.tar: {info.name.removesuffix('.jpg')}: " in bad


@pytest.mark.parametrize(
    "data",
    [
        b'{"label": ' + b"[" * 100_000,
        b'{"label": "\x1b[2J"}',
    ],
    ids=["nested", "a terminal's command"],
)
def test_odd_labels_and_names_are_one_printable_line(data: bytes, tmp_path: Path) -> None:
    write_tar(tmp_path / "x-train-0000.tar", [("a\x1b[2J\n.jpg", JPEG), ("a\x1b[2J\n.json", data)])
    (problem,) = scan(tmp_path / "x-train-0000.tar").problems
    assert problem.isprintable()
    assert "its label is not a number" in problem


def negative() -> bytes:
    """A header of -1024 bytes, behind which is what is before it."""
    header = bytearray(tarfile.TarInfo("b.jpg").tobuf())
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def long_name() -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("more", [negative(), long_name() * 3000], ids=["back over itself", "names of names of names"])
def test_a_tar_without_end_is_damaged(more: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x-train-0000.tar"
    whole = write_tar(path, sample(0, JPEG, 1)).rstrip(b"\0")
    path.write_bytes(whole.ljust(-(-len(whole) // 512) * 512, b"\0") + more + bytes(1024))
    found = scan(path)
    assert len(found.samples) == 1
    assert any("damaged after 000000.cls" in problem for problem in found.problems)


def jpeg_of(width: int, height: int) -> bytes:
    """A few bytes whose header claims a size."""
    data = bytearray(JPEG)
    start = data.find(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def png_of(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    facts, rows = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), zlib.compress(bytes((width // 8 + 1) * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", facts) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("decoder", [installed("simplejpeg"), installed("pillow")])
@pytest.mark.parametrize(
    "data", [jpeg_of(60000, 60000), jpeg_of(10000, 10000), png_of(10000, 10000)], ids=["60000", "10000", "png"]
)
def test_an_image_that_claims_too_many_pixels_is_bad(
    data: bytes, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: pytest.fail("it was given the memory"))
    transform = Transform(augment.Config(), 224, decoder, seed=0)
    for read in (transform.held_out, lambda d: transform.training(d, 0, 0, 0), open_upright):
        with pytest.raises(BadImageError, match="pixels"):
            read(data)


@pytest.mark.parametrize("decoder", [installed("simplejpeg"), installed("pillow")])
def test_an_image_that_would_be_resized_to_too_many_pixels_is_bad(decoder: str) -> None:
    transform = Transform(augment.Config(eval_crop=0.875), 224, decoder, seed=0)
    with pytest.raises(BadImageError, match="15360000 x 256 pixels are more than"):
        transform.held_out(jpeg_of(60000, 1))


def test_postscript_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *words: run.append(words))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(BadImageError, match="not an image"):
        open_upright(data)
    assert not run


def test_a_compressed_tar_is_not_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth of the memory that it would take is enough to send."""
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        for name, data in sample(0, JPEG, 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    described(tmp_path, ["a.tar"], [1])
    (answer,) = streamed(f"pipe:cat {tmp_path}", count=1)
    assert "a.tar: " in answer.refused


@pytest.mark.parametrize(
    "name", ["a.tar; touch made", "$(touch made).tar", "../a.tar", "/a.tar", "..", "-x.tar", "a.tar?b"]
)
def test_names_in_info_are_no_paths_and_no_commands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    described(tmp_path, ["b.tar", name], [1, 1])
    with pytest.raises(RefusedError, match=r"_info.json: .* is not the plain name of a tar"):
        streamed(f"pipe:cat {tmp_path}")
    assert not (tmp_path / "made").exists()


def test_the_cache_of_shards_keeps_to_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    write_tar(folder / "a.tar", sample(0, JPEG, 1))
    described(folder, ["a.tar"], [1])
    before = set(tmp_path.rglob("*"))
    list(streamed(f"pipe:cat {folder}", count=1, cache=str(tmp_path / "cache")))
    (shard,) = [path for path in set(tmp_path.rglob("*")) - before if path.is_file()]
    assert shard.parent.parent == tmp_path / "cache"


def changed(**arrays: Any) -> Callable[[dict[str, np.ndarray]], dict[str, Any]]:
    return lambda there: there | arrays


@pytest.mark.parametrize(
    ("change", "save"),
    [
        (changed(problems=np.array([{}], dtype=object)), np.savez),
        (changed(), np.savez_compressed),
        (changed(shards=np.array(["a-train-0.tar", "b-train-1.tar", "../../c-train-2.tar"])), np.savez),
        (changed(lengths=np.array([3, 9, -3])), np.savez),
        (changed(lengths=np.array([2**63, 2**63, 9], dtype=np.uint64)), np.savez),
        (changed(lengths=np.array([3.0, 3.0, 3.0])), np.savez),
        (changed(labels=np.zeros(8, dtype=np.int32)), np.savez),
        (lambda there: np.zeros(3), lambda file, **_: np.save(file, np.zeros(3))),
    ],
    ids=["pickled", "compressed", "paths", "negative", "beyond 64 bits", "fractions", "labels", "one array"],
)
def test_an_old_index_of_somebody_else_is_refused(change: Any, save: Any, tmp_path: Path) -> None:
    folder = data_set(tmp_path / "set", train=9, val=3)
    path = old_index(folder, "train")
    with np.load(path) as file:
        arrays = change({name: file[name] for name in file.files})
    with path.open("wb") as out:
        save(out, **(arrays if isinstance(arrays, dict) else {}))
    with pytest.raises(RefusedError, match=r"train.index.npz: not an index .*; make it anew") as caught:
        index.open_index(folder, "train")
    assert "\n" not in str(caught.value)


Header = dict[str, dict[str, Any]]


def rewritten(path: Path, change: Callable[[Header, bytearray], object]) -> None:
    """An index with another header, or other numbers."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    text = change(header, body) or json.dumps(header).encode()
    assert isinstance(text, bytes)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def numbers(name: str, dtype: str, *values: int) -> Callable[[Header, bytearray], None]:
    """Other numbers at the start of an array."""

    def change(header: Header, body: bytearray) -> None:
        start, data = header[name]["data_offsets"][0], np.array(values, dtype).tobytes()
        body[start : start + len(data)] = data

    return change


def facts(name: str, **about: Any) -> Callable[[Header, bytearray], None]:
    return lambda header, _: header[name].update(about)


def of_another(text: bytes) -> Callable[[Header, bytearray], bytes]:
    return lambda *_: text


HUGE = 2**62


@pytest.mark.parametrize(
    "change",
    [
        of_another(b"[" * 100_000),
        of_another(b"[]"),
        of_another(b"{}"),
        of_another(b" " * 2**25),
        facts("__metadata__", format="2.5"),
        facts("__metadata__", largest_label="all"),
        facts("labels", dtype="F32"),
        facts("labels", dtype="O"),
        facts("labels", shape=[3, 3]),
        facts("labels", shape=[8]),
        facts("labels", shape=[9.0]),
        facts("__metadata__", image=["jpg"], largest_label=[8]),
        facts("labels", shape=[HUGE], data_offsets=[0, 4 * HUGE]),
        facts("labels", data_offsets=[-100, -64]),
        facts("labels", data_offsets=["a", "b"]),
        facts("shards", data_offsets=[0, 10**9], shape=[10**9]),
        numbers("lengths", "<i8", 3, 9, -3),
        numbers("lengths", "<i8", HUGE, HUGE, HUGE),
        numbers("shards", "|u1", *b"../"),
    ],
)
def test_an_index_of_somebody_else_is_refused(change: Any, tmp_path: Path) -> None:
    folder = data_set(tmp_path / "set", train=9, val=3)
    rewritten(folder / "train.index.safetensors", change)
    with pytest.raises(RefusedError, match=r"train.index.safetensors: (not an index .*|names .*); ") as caught:
        index.open_index(folder, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (numbers("sizes", "<u4", 2**32 - 1), "sample 0 has 4294967295 bytes"),
        (numbers("sizes", "<u4", 0), "sample 0 has 0 bytes"),
        (numbers("offsets", "<u4", 2**32 - 1), "bytes from 2199023255040 on, in a shard of"),
        (numbers("labels", "<i4", -1), "sample 0 has label -1, and 8 is the largest"),
        (numbers("labels", "<i4", 2**31 - 1), "sample 0 has label 2147483647, and 8 is the largest"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_an_index_of_somebody_else_invents_is_refused(
    change: Any, message: str, workers: int, tmp_path: Path
) -> None:
    """By whoever reads it, the rank or a worker."""
    folder = data_set(tmp_path / "set", train=9, val=3)
    rewritten(folder / "train.index.safetensors", change)
    opened = index.open_index(folder, "train")
    source = Shards(opened, Transform(augment.Config(), 32, installed("auto"), seed=0))
    (rest,) = loader.answers(source.held_out, lambda n: iter([torch.arange(1, 9)][n:]), workers, pin=False)
    assert rest.labels.tolist() == list(range(1, 9))
    with pytest.raises(RefusedError, match=message) as caught:
        list(loader.answers(source.held_out, lambda n: iter([torch.arange(9)][n:]), workers, pin=False))
    assert str(caught.value).endswith(f"; delete it, and make it anew: hsvit shards index {folder}")
    assert opened.name(0).startswith("tiny-train-0000.tar: ")
