"""Files that people write: in which encodings they are read, and what is said of the others."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from hsvit_ds.errors import RefusedError
from hsvit_ds.hosts import schedulers
from hsvit_ds.hosts.cluster import read_hostfile
from hsvit_ds.run import recipe as recipes

from .ranks import ROOT

RECIPE = "# für Übungen\n" + (ROOT / "recipes/digits/hsvit.toml").read_text()
HOSTS = "# für Übungen\nme@node-1 slots=2\nnode-2 slots=2\n"
READ = {
    "UTF-8": lambda text: text.encode(),
    "UTF-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "lines of Windows": lambda text: text.replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("encoding", READ)
def test_recipes_and_hostfiles_are_read_in_their_encoding(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(READ[encoding](RECIPE))
    assert recipes.read(file, ["run.name=a"]) == recipes.read(ROOT / "recipes/digits/hsvit.toml", ["run.name=a"])
    file.write_bytes(READ[encoding](HOSTS))
    assert [(host.name, host.slots) for host in read_hostfile(file)] == [("me@node-1", 2), ("node-2", 2)]


@pytest.mark.parametrize("read", [recipes.read, read_hostfile])
def test_another_encoding_is_named(read: object, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("a\nb = 'ü'\n".encode("latin-1"))
    with pytest.raises(RefusedError, match=r"x, line 2: byte 0xfc is not UTF-8 \(Latin-1 .*save the file as UTF-8"):
        read(tmp_path / "x")  # type: ignore[operator]


def test_the_user_to_log_in_as_is_no_part_of_an_address(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text(HOSTS)
    script = schedulers.torchrun(read_hostfile(tmp_path / "hostfile"), Path("r.toml"), [], resume=False)
    assert script.count("--master_addr node-1 ") == 2
