"""A check finds what is wrong with shards, and what is said of them is so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hsvit_ds.data.index import open_index

from ...tars import write_tar
from .commands import Members, picture, read_tar, refused, shards


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


@pytest.mark.heavy
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
        (edit(lambda m: m[:2] + m[3:]), "which image",
         "mini-train-0001.tar: 00000011: no image among .cls, .json"),
        (edit(lambda m: [*m, ("00000000.jpg", picture(901)), ("00000000.cls", b"1")]), "duplicate key",
         "mini-train-0001.tar: 00000000: also in mini-train-0000.tar"),
        (edit(lambda m: [*m, ("00000011.jpg", picture(901)), ("00000011.cls", b"1")]), "duplicate key",
         "00000011: more than once in this shard"),
        (edit(lambda m: [m[0], *m]), "duplicate key", "00000011: more than once in this shard"),
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
        (lambda at: (at / "val.index.safetensors").unlink(), "index", "val.index.safetensors: there is no index"),
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
    assert len(open_index(clean, "train", where=tmp_path / "new/elsewhere")) == 22
    assert "mini-val-0001.tar: a.jpg: 0 bytes" in result.stdout
    assert "problems: 1;" in result.stderr
    assert f"hsvit shards check {clean}" in result.stderr


def test_info_describes_what_is_indexed(clean: Path) -> None:
    text = shards("info", clean).stdout
    index = open_index(clean, "train")
    for fact in ("22", "5 / 7.3 / 9", f"{index.read('sizes').mean():,.0f}", index.fingerprint, "agrees"):
        assert fact in text
    with_info("num_samples", 23)(clean)
    assert "23 samples" in shards("info", clean).stdout


@pytest.mark.parametrize("command", ["index", "check", "info"])
def test_a_folder_without_shards_is_refused(command: str, tmp_path: Path) -> None:
    wanted = "no index there" if command == "info" else "no shards named NAME-SPLIT-0000.tar"
    refused(shards(command, tmp_path, code=2), str(tmp_path), wanted)
