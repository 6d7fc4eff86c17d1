"""`hsvit shards` as a person calls it, and the images that its tests make shards of."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from hsvit_ds.cli import app

Members = list[tuple[str, bytes]]


def shards(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["shards", *map(str, words)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def make(source: Path, out: Path, *more: object, code: int = 0, split: str = "train", count: int = 4) -> Result:
    words = ["--split", split, "--name", "mini", "--shards", count, "--processes", 1, *more]
    return shards("make", source, out, *words, code=code)


def refused(result: Result, *texts: str) -> None:
    """One line that names everything in `texts`."""
    assert result.stderr.startswith("hsvit: error: ")
    assert result.stderr.count("\n") == 1
    for text in texts:
        assert text in result.stderr


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    """An image file of width x height `size` like no other number's."""
    pixels = np.random.default_rng(number).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def read_tar(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
