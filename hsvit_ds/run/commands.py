"""What can be done next, as commands to paste."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..grid.grid import ranks_here, world_size
from ..models.slimmable import Width


def after(folder: Path, widths: Sequence[Width], mlflow: str) -> list[str]:
    """Of a run that is finished. widths: that were trained. mlflow: its URI where `mlflow ui` reads it, or ""."""
    run = str(folder)
    lines = [["hsvit", "evaluate", run]]
    if len(widths) > 1:
        lines.append(["hsvit", "export", run, "--width", str(min(widths, key=float))])
    lines.append(["hsvit", "predict", run, "IMAGE"])
    if mlflow:
        lines.append(["mlflow", "ui", "--backend-store-uri", mlflow])
    return [_line(*words) for words in lines]


def again(recipe: Path, overrides: list[str], folder: Path) -> str:
    """Of a run that was stopped: what starts it as it was started here; "" where other hosts have a part in it."""
    ranks = world_size()
    train = ["hsvit_ds.train", str(recipe), *overrides, "--run", str(folder)]
    if ranks != ranks_here() or ("RANK" in os.environ and not _launchers()):
        return ""
    if "RANK" not in os.environ:
        return _line("python", "-m", *train)
    if "LOCAL_WORLD_SIZE" in os.environ:
        return _line("torchrun", "--standalone", f"--nproc_per_node={ranks}", "-m", *train)
    return _line("deepspeed", "--num_accelerators", str(ranks), "--module", *train)


def _launchers() -> bool:
    return "LOCAL_WORLD_SIZE" in os.environ or "LOCAL_SIZE" in os.environ


def _line(program: str, *arguments: str) -> str:
    """program: of this environment, also where it is not activated."""
    there = Path(sys.executable).with_name(program)
    found = shutil.which(program)
    same = found is not None and Path(found).resolve() == there.resolve()
    return shlex.join([program if same or not there.exists() else str(there), *arguments])
