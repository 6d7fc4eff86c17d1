"""From a folder of photographs to an answer: five commands, as a new user types them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .. import photographs
from ..ranks import ROOT
from .test_new import NAMES, content

pytestmark = [pytest.mark.heavy, pytest.mark.slow]


def run(*command: object) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_folder_of_photographs_becomes_a_network_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = photographs.folder(tmp_path / "Meine Blümchen", 40)
    before = content(source)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    said = run("hsvit_ds.cli", "new", source, "--goal", "elastic")
    assert "160 images of 4 classes" in said
    assert re.search(r"HSViT C2A2 at four widths at 64 px, \d+ epochs in batches of 8: about \d+ minutes?", said)
    (start,) = re.findall(r"^  python -m (hsvit_ds\.train \S+)$", said, re.M)
    run(*start.split(), "run.epochs=8")  # few epochs are enough for such pictures
    folder = Path("runs/meine-blumchen-001")
    said = run("hsvit_ds.cli", "evaluate", folder)
    scores = [float(score) for score in re.findall(r"│ *([\d.]+) *│$", said, re.M)]
    assert len(scores) == 4
    assert max(scores) > 60, "four classes: 25 % is chance"
    said = run("hsvit_ds.cli", "export", folder, "--budget", "100M")
    (width,) = re.findall(r"^width ([\d.]+): .+ on val, the best within 100M$", said, re.M)
    export = folder / f"export-{width}"
    assert (export / "classes.txt").read_text().splitlines() == NAMES
    card = (export / "README.md").read_text()
    assert "Not measured" not in card
    assert re.search(rf"^\| \*\*{width}\*\* \| \*\*[\d,]+\*\* \| \*\*0\.\d+\*\* \| .+ \| .+ \|$", card, re.M)
    assert re.search(r"^\| rote Rose \| 6 \| [\d.]+ \|$", card, re.M), "accuracy by class"
    for asked in (folder, export):
        photos = [str(path) for path in sorted(source.rglob("*.jpg"))]
        rows = json.loads(run("hsvit_ds.cli", "predict", asked, *photos, "--width", width, "--format", "json"))
        right = [row["predictions"][0]["class"] == Path(row["image"]).parent.name for row in rows]
        assert sum(right) / len(right) > 0.6
    assert content(source) == before
