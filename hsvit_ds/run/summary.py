"""What a run is and how far it is, in a file of its folder that any program reads; and a lock, held while it goes on.

`summary.json` is written before the first step, after every evaluation and at the end, always whole.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import warn
from .metrics import current

FILE = "summary.json"
LOCK = "lock"
ERRORS = "errors"
"""Folder of a run with the last word of every rank that failed."""
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one network: of a width, or the only one.

    width: as it is printed, "0.50". macs: multiply-adds of an image. epochs: that it is trained for, on average over
    seeds; None in a summary of before they were counted.
    """

    width: str
    parameters: int
    macs: int
    epochs: float | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """What was trained on and scored. counts: images of each split. val, test: names of those that choose the best
    checkpoint and give the result. fingerprint: of the training split's index; "" where there is none."""

    name: str
    fingerprint: str
    counts: dict[str, int]
    val: str
    test: str
    classes: int
    image_size: int


@dataclass(frozen=True, kw_only=True)
class Best:
    """The highest value of a metric, and the step that it was measured after."""

    value: float
    step: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Times are Unix times in s."""

    id: str
    """Of the run wherever it is known: MLflow has it as tag `hsvit.run`."""
    title: str
    recipe: str
    """The recipe's file as it was given, "recipes/digits/hsvit.toml"."""
    changed: dict[str, Any]
    """Keys of the resolved recipe whose value is not the default, flat."""
    data: Data
    costs: tuple[Cost, ...]
    """The smallest width first."""
    ranks: int
    cores: int
    """CPU cores that compute, over all ranks; 0 where GPUs do."""
    gpus: int
    hosts: tuple[str, ...]
    device: str
    """"NVIDIA H100 80GB HBM3", or the CPU's name."""
    launcher: str
    """"deepspeed", "torchrun", "python"."""
    commit: str
    """Of the program's checkout; "" where it is installed without one."""
    dirty: bool
    """Whether files of the checkout were changed since."""
    versions: dict[str, str]
    started: float
    steps: int
    """Of the whole run."""
    steps_per_epoch: int
    epochs: int
    state: str = RUNNING
    why: str = ""
    """Of a run that stopped or failed."""
    updated: float = 0.0
    seconds: float = 0.0
    """Of work, over all attempts."""
    step: int = 0
    """Steps that are done."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of each; of accuracies at widths, those of the last evaluation."""
    best: dict[str, Best] = field(default_factory=dict)
    """Of the accuracies, by metric."""

    def after(self, step: int, found: Mapping[str, float]) -> Summary:
        """With the metrics that were found after a step; JSON has no number for one that is not finite."""
        finite = {name: value for name, value in found.items() if math.isfinite(value)}
        higher = {
            name: Best(value=value, step=step)
            for name, value in finite.items()
            if "top1" in name and (name not in self.best or value > self.best[name].value)
        }
        kept = current(dict.fromkeys(self.metrics, -1) | dict.fromkeys(found, step))
        values, best = self.metrics | finite, self.best | higher
        return replace(
            self,
            step=step,
            metrics={name: values[name] for name in kept if name in values},
            best={name: best[name] for name in kept if name in best},
        )

    def write(self, folder: Path) -> None:
        """Whole or not at all; a full disk ends no run."""
        text = json.dumps(asdict(replace(self, updated=time.time())), indent=1, allow_nan=False) + "\n"
        partial = folder / f"{FILE}.partial"
        try:
            partial.write_text(text, "utf-8")
            partial.rename(folder / FILE)
        except OSError as error:
            warn(f"{folder / FILE}: {error.strerror}; it is written again later")


def read(folder: Path) -> Summary | None:
    """None where there is none, or one of another version of the program.

    Raises:
        ValueError: no summary of a run.
    """
    try:
        return of(json.loads((folder / FILE).read_text("utf-8")))
    except FileNotFoundError:
        return None


def of(table: Mapping[str, Any]) -> Summary:
    """The summary in a table, as JSON has it; what it does not know is left out.

    Raises:
        ValueError: something is missing.
    """
    known = {entry.name for entry in fields(Summary)}
    try:
        values = {name: value for name, value in table.items() if name in known}
        values |= {name: tuple(values[name]) for name in ("hosts",)}
        values["data"] = Data(**table["data"])
        values["costs"] = tuple(Cost(**cost) for cost in table["costs"])
        values["best"] = {name: Best(**best) for name, best in table["best"].items()}
        return Summary(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no summary of a run: {error}") from error


def rank_words(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of a run left about their failures."""
    words = []
    for path in (folder / ERRORS).glob("rank-*.json"):
        try:
            words.append(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError):  # its host was lost while it wrote
            continue
    return words


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within the block, and at most until this process's end, the run is going on for all who look."""
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Not refused: where a host was lost a network's file system lets go of its locks minutes later.
            warn(f"{folder}: another process holds its lock; where that trains it too, stop one of them")
        except OSError as error:  # a file system without locks
            warn(f"{folder / LOCK}: {error.strerror}; others cannot see that the run is going on")
        yield


def is_held(folder: Path) -> bool:
    """Whether some process runs the run in a folder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
