"""How long commands and a rank's first line and step take, beside `import torch`: `python -m tools.benchmark start`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from .steps import machine, show

BIN = Path(sys.executable).parent
DIGITS, HYBRID = "recipes/digits/hsvit.toml", "recipes/digits/hybrid.toml"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def ended(*command: str) -> float:
    """Seconds until a command has ended."""
    started = time.perf_counter()
    subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def first_line(recipe: str) -> float:
    """Seconds until a rank of its own says what it will train."""
    command = [sys.executable, "-m", "hsvit_ds.train", recipe, "run.root=/dev/null/none"]  # refused afterwards
    started = time.perf_counter()
    rank = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert rank.stdout is not None
    line, seconds = rank.stdout.readline(), time.perf_counter() - started
    rank.kill()
    rank.communicate()
    if not line.startswith("hsvit-ds "):
        raise RuntimeError(f"{' '.join(command)} said {line!r}")
    return seconds


def first_step(recipe: str, *overrides: str) -> float:
    """Seconds until a rank of its own has done a step, and says so in its run's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hsvit_ds.train", recipe, f"run.root={folder}", "run.log_every=1", *overrides]
        started = time.perf_counter()
        rank = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not any(file.stat().st_size for file in Path(folder).glob("*/metrics.jsonl")):
            if rank.poll() is not None:
                raise RuntimeError(
                    f"{' '.join(command)} ended with {rank.returncode}:\n{rank.communicate()[0][-4000:]}"
                )
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        rank.kill()
        rank.communicate()
    return seconds


WAITS: dict[str, Callable[[], float]] = {
    "import torch": lambda: ended(sys.executable, "-c", "import torch"),
    "hsvit --help": lambda: ended(str(BIN / "hsvit"), "--help"),
    f"hsvit recipe {DIGITS}": lambda: ended(str(BIN / "hsvit"), "recipe", DIGITS),
    f"a rank's first line, {DIGITS}": lambda: first_line(DIGITS),
    f"a rank's first step, {DIGITS}": lambda: first_step(DIGITS, "grid.submodule_ranks=1"),
    f"a rank's first step, {HYBRID}": lambda: first_step(HYBRID, "grid.submodule_ranks=1"),
}


def run(repeats: int, out: Path | None) -> None:
    found: dict[str, list[float]] = {what: [] for what in WAITS}
    for number in range(repeats + 1):
        for what, wait in WAITS.items():
            seconds = wait()
            if number:  # the first fills the file cache
                found[what].append(seconds)
    torch_alone = median(found["import torch"])
    rows = [
        {"what": what, "seconds": f"{median(all_of):.2f}", "import torch": f"{median(all_of) / torch_alone:.2f}x"}
        for what, all_of in found.items()
    ]
    show(rows, f"Start, median of {repeats}: {machine(torch.device('cpu'))}", out)
