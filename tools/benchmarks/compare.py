"""How long a comparison of many long runs takes, beside pandas without a cache, and what tracking takes of a step:
`python -m tools.benchmark compare`."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from hsvit_ds.results import history
from hsvit_ds.run.summary import FINISHED, Cost, Data, Summary

from . import tracking
from .start import BIN, ENVIRONMENT
from .steps import machine, show

RUNS, SEEDS, STEPS, EPOCHS = 200, 5, 10_000, 100
_STILL = ("train/skipped_steps", "comm/feature_bytes", "comm/norm_bytes", "comm/data_bytes", "data/bad_samples")
_DATA = Data(
    name="digits", fingerprint="", counts={"train": 1150, "val": 288, "test": 359},
    val="val", test="test", classes=10, image_size=32,
)  # fmt: skip
PANDAS = """
import sys
from pathlib import Path
import pandas
rows = []
for path in sorted(Path(sys.argv[1]).glob("*/metrics.jsonl")):
    frame = pandas.read_json(path, lines=True)
    curves = {name: frame[name].dropna().iloc[::33] for name in ("train/loss", "train/lr", "val/top1")}
    rows.append({"run": path.parent.name, **frame.ffill().iloc[-1].to_dict(), "best": frame["val/top1"].max()})
table = pandas.DataFrame(rows)
print(table.groupby(table.index // 5)["test/top1"].agg(["mean", "std"]))
"""
"""What a notebook does: every file read, and no page made."""


def lines(seed: int) -> Iterator[str]:
    """Of one run, 19 numbers a logged step, as the trainer writes them."""
    draw = random.Random(seed)
    for step in range(1, STEPS + 1):
        logged = {"train/loss": 2.3 * math.exp(-5 * step / STEPS) + 0.1 * draw.random()}
        logged |= {"train/grad_norm": 0.5 + draw.random(), "train/lr": 0.002 * (1 - step / STEPS)}
        logged |= {"perf/images_per_sec": 1000 + 50 * draw.random(), "perf/step_ms_p50": 30 + draw.random()}
        logged |= {"perf/data_wait": 0.01 * draw.random(), "perf/mfu": 0.3 + 0.01 * draw.random()}
        logged |= {"comm/exchange_bytes": 8192.0, "comm/gradient_bytes": 4e6, "train/submodules_present": 4.0}
        logged |= dict.fromkeys(_STILL, 0.0)
        logged |= {f"train/loss_pass{place}": draw.random() for place in range(1, 5)}
        yield json.dumps({"step": 10 * step, "time": 1e9 + 2 * step, **logged})
        if step % (STEPS // EPOCHS) == 0:
            found = {"val/top1": 98 - 20 * math.exp(-5 * step / STEPS) + draw.random(), "val/loss": draw.random()}
            yield json.dumps({"step": 10 * step, "time": 1e9 + 2 * step + 1, **found})
    yield json.dumps({"step": 10 * STEPS, "time": 1e9 + 2 * STEPS + 2, "test/top1": 97 + draw.random()})


def make(root: Path, runs: int = RUNS) -> None:
    """Folders of runs, five seeds of each recipe."""
    for number in range(runs):
        folder = root / f"sweep-{number:03d}"
        folder.mkdir()
        recipe = f'[run]\nname = "sweep"\nseed = {number % SEEDS}\n[optimizer]\nlr = {1e-4 * (1 + number // SEEDS):g}\n'
        (folder / "recipe.toml").write_text(f'{recipe}[data]\nname = "digits"\nval = "val"\ntest = "test"\n')
        (folder / "metrics.jsonl").write_text("\n".join(lines(number)) + "\n")
        finished(folder.name).write(folder)


def finished(name: str) -> Summary:
    """Of a run of so many steps."""
    return Summary(
        id=name, title=name, recipe="recipes/digits/hsvit.toml", changed={}, data=_DATA,
        costs=(Cost(width="1.00", parameters=1_233_226, macs=210_000_000),), ranks=2, cores=2, gpus=0,
        hosts=("a",), device="CPU", launcher="deepspeed", commit="", dirty=False, versions={}, started=1e9,
        steps=10 * STEPS, steps_per_epoch=10 * STEPS // EPOCHS, epochs=EPOCHS, state=FINISHED,
        seconds=2.0 * STEPS, step=10 * STEPS,
    )  # fmt: skip


def took(*command: str) -> float:
    """Seconds of a process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def run(repeats: int, out: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make(root)
        size = sum(path.stat().st_size for path in root.glob("*/metrics.jsonl"))
        command = [str(BIN / "hsvit"), "compare", name, "-o", str(root / "report.html")]
        found: dict[str, list[float]] = {what: [] for what in ("first", "cached", "pandas")}
        for _ in range(repeats):
            for cache in root.glob(f"*/{history.CACHE}"):
                cache.unlink()
            found["first"].append(took(*command))
            found["cached"].append(took(*command))
            found["pandas"].append(took(sys.executable, "-c", PANDAS, name))
        report = (root / "report.html").stat().st_size
    named = {
        "first": "hsvit compare, the first time",
        "cached": "hsvit compare, again",
        "pandas": "pandas.read_json, means alone, every time",
    }
    rows = [
        {"what": named[what], "seconds": f"{median(all_of):.1f}", "slowest": f"{max(all_of):.1f}"}
        for what, all_of in found.items()
    ]
    title = f"{RUNS} runs of {STEPS:,} logged steps, {size / 1e9:.1f} GB; report {report / 1e6:.1f} MB"
    show(rows, f"{title}; median of {repeats}: {machine(torch.device('cpu'))}", out)
    show(tracking.rows(repeats), f"tracking, median of {repeats}", None)
