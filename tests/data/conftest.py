"""Images in folders, and the shards made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from .shards.commands import make, picture


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return photographs(tmp_path / "photos", 0)


def photographs(root: Path, first: int) -> Path:
    """22 images in 3 folders, with what may lie beside them; one class is nested, one has other kinds of files. first:
    number of the first picture."""
    for label, (name, count) in enumerate({"ant": 9, "bee": 8, "cat": 5}.items()):
        folder = root / name / ("more" if name == "bee" else "")
        folder.mkdir(parents=True)
        for i in range(count):
            kind, ending = ("PNG", "png") if name == "cat" else ("JPEG", "JPEG")
            (folder / f"{name}.{i}.{ending}").write_bytes(picture(first + 100 * label + i, kind))
        (folder / "notes.txt").write_text("not an image")
        (folder / f"._{name}.jpg").write_text("what a Mac leaves behind")
    (root / ".hidden").mkdir()
    (root / "README.md").write_text("not a class")
    return root


@pytest.fixture
def clean(photos: Path, tmp_path: Path) -> Path:
    """A set with nothing wrong in it."""
    make(photos, tmp_path / "clean", count=2)
    make(photographs(tmp_path / "others", 1000), tmp_path / "clean", split="val", count=2)
    return tmp_path / "clean"
