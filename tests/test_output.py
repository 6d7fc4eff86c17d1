"""Names that a terminal's encoding lacks are shown as escapes, and end nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .ranks import ROOT, environment
from .tars import encoded, make_index, picture, sample, write_tar
from .workers.common import SMALL

FOREIGN = "画像-é"


def run(encoding: str, *command: str) -> subprocess.CompletedProcess[bytes]:
    variables = environment(PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=variables, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_refusal_of_a_foreign_name_is_one_line(encoding: str, tmp_path: Path) -> None:
    done = run(encoding, "hsvit_ds.cli", "recipe", str(tmp_path / f"{FOREIGN}.toml"))
    assert done.returncode == 2, done.stderr
    assert b"cannot be read" in done.stderr
    assert b"\\u753b\\u50cf" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.heavy
def test_a_run_names_an_unreadable_image_of_a_foreign_name_and_goes_on(tmp_path: Path) -> None:
    data = tmp_path / "set"
    data.mkdir()
    for split, count in (("train", 48), ("val", 8)):
        images = [b"noise" if split == "train" and i == 5 else encoded(picture(i)) for i in range(count)]
        members = [(f"{FOREIGN}-{n}", d) for i, data_ in enumerate(images) for n, d in sample(i, data_, i % 10)]
        write_tar(data / f"tiny-{split}-0000.tar", members)
    make_index(data)
    keys = ["data.name=tiny", "data.classes=10", "data.image_size=32", f"data.root={data}", "data.test=val"]
    keys += ["data.workers=0", "run.epochs=1", "grid.submodule_ranks=1", f"run.root={tmp_path}", "run.name=a"]
    keys += ["data.max_bad_fraction=0.2"]
    done = run("ascii", "hsvit_ds.train", "recipes/digits/hsvit.toml", *SMALL, *keys)
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"warning: not readable: " in done.stdout
    assert b"\\u753b\\u50cf-\\xe9-" in done.stdout
    assert FOREIGN in (tmp_path / "a-001/bad_samples.txt").read_text("utf-8")
