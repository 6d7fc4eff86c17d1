"""Whether a long run keeps its memory and its open files: `python -m tools.benchmark long`.

A real run of small steps, with a worker that reads shards, MLflow, evaluations and checkpoints. Its rank, which has the
threads of tracking and of checkpoints, and the processes that read for it are looked at twice a second. A slope is that
of a line through the second half of what was seen, beside the first tenth, in which caches fill.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from webdataset import TarWriter

from hsvit_ds.data.indexing import make
from hsvit_ds.run import metrics

from .start import ENVIRONMENT
from .steps import machine, show

STEPS, BATCH, IMAGES, SIDE = 20_000, 8, 1600, 8
KEYS = (
    "model.embedding=32",
    "model.depth=1",
    "model.heads=2",
    "model.patch_size=4",
    "model.widths.smallest=0.5",
    "model.widths.granularity=0.5",
    "augment.shift=0",
    "data.name=squares",
    "data.workers=1",
    f"data.image_size={SIDE}",
    f"run.global_batch={BATCH}",
    f"run.epochs={STEPS * BATCH // IMAGES}",
    "run.log_every=10",
    "run.eval_every=5",
    "checkpoint.every_steps=500",
)
LOOK = 0.5
"""Seconds between two looks."""


def squares(folder: Path) -> None:
    """Shards of small images in two classes."""
    folder.mkdir()
    (folder / "classes.txt").write_text("dark\nlight\n")
    for split, images in (("train", IMAGES), ("val", 64), ("test", 64)):
        with TarWriter(str(folder / f"squares-{split}-0000.tar"), encoder=False) as tar:
            for number in range(images):
                file = io.BytesIO()
                Image.new("RGB", (SIDE, SIDE), (200 * (number % 2) + number % 50,) * 3).save(file, "PNG")
                tar.write({"__key__": f"{number:06d}", "png": file.getvalue(), "cls": str(number % 2).encode()})
        make(folder, split, classes=("dark", "light"))


def seen(rank: psutil.Process) -> dict[str, tuple[float, int]]:
    """{what: (MB of its own, open files)} of a rank, and of the processes that read for it."""
    readers = [child for child in rank.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    found = {"rank": [rank], "its readers": readers}
    return {
        name: (sum(p.memory_full_info().uss for p in processes) / 1e6, sum(p.num_fds() for p in processes))
        for name, processes in found.items()
    }


def watched(folder: Path) -> dict[str, list[tuple[int, float, int]]]:
    """{process: (steps done, MB, open files) of each look}."""
    squares(folder / "shards")
    command = [sys.executable, "-m", "hsvit_ds.train", "recipes/digits/scala.toml", *KEYS]
    command += [f"data.root={folder / 'shards'}", f"run.root={folder / 'runs'}", "run.name=long"]
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=said, stderr=said)
    rank, run = psutil.Process(process.pid), folder / "runs/long-001"
    looks: dict[str, list[tuple[int, float, int]]] = {}
    step = 0
    while process.poll() is None and step < STEPS:
        time.sleep(LOOK)
        try:
            step = next(metrics.newest_first(run))["step"]
            for name, (megabytes, files) in seen(rank).items():
                looks.setdefault(name, []).append((step, megabytes, files))
        except (FileNotFoundError, StopIteration, psutil.NoSuchProcess):  # not yet, or a reader that has ended
            continue
    if process.wait():
        told = (folder / "said.txt").read_text()[-4000:]
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{told}")
    return looks


def rows(looks: dict[str, list[tuple[int, float, int]]]) -> list[dict[str, Any]]:
    found = []
    for name, points in looks.items():
        steps, megabytes, files = np.array(points, dtype=float).T
        late, early = steps > STEPS / 2, steps <= STEPS / 10
        more = {
            title: 1000 * np.polyfit(steps[part], of[part], 1)[0]
            for title, part, of in (
                ("MB more in 1,000 steps", late, megabytes),
                ("in the first tenth", early, megabytes),
                ("open files more", late, files),
            )
        }
        row = {"process": name, "MB at the end": f"{megabytes[-5:].mean():.1f}", "open files": f"{files[-1]:.0f}"}
        found.append(row | {title: f"{slope:+.3f}" for title, slope in more.items()})
    return found


def run(out: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        looks = watched(Path(folder))
    show(rows(looks), f"{STEPS:,} steps, one run: {machine(torch.device('cpu'))}", out)
