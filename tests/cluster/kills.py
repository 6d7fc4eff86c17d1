"""Kills at random moments: `python -m tests.cluster.kills 50` does that many and prints their table.

A run on two hosts under `hsvit launch` loses a rank, a host, a rank while it saves, while it evaluates, in its first
step, or a data worker. It starts again by itself, and its last checkpoint has to be, bit for bit, that of a run to
which nothing happened.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hsvit_ds.engine.checkpoint_files import STEPS, read_bytes, read_manifest, read_weights
from hsvit_ds.errors import RefusedError

from ..engine.test_checkpoint import assert_equal, latest
from ..tars import data_set
from ..workers.common import SMALL
from .hosts import Cluster, Host, launch, missing, output

SLOTS = {"node-1": 1, "node-2": 1}
STEPS_PER_EPOCH, EPOCHS = 24, 2
LAST = STEPS_PER_EPOCH * EPOCHS


def keys(data: Path) -> list[str]:
    """A run of two epochs on tars, which logs every step and saves at every sixth."""
    own = [
        "data.name=tiny",
        "data.classes=10",
        "data.image_size=32",
        f"data.root={data}",
        "data.test=val",
        "data.workers=1",
    ]
    own += ["data.eval_batch=4", "run.log_every=1", "checkpoint.every_steps=6", "checkpoint.keep_last=99"]
    return [*SMALL, "ema.decay=0.9", f"run.epochs={EPOCHS}", *own]


def tars(folder: Path) -> Path:
    return data_set(folder, train=16 * STEPS_PER_EPOCH, val=80, shards=4)


class Killed(NamedTuple):
    """What happened to a run."""

    kind: str
    seed: int
    moment: str
    attempts: int
    steps_lost: int


class Run:
    """A run under `hsvit launch`, watched from outside by what it writes."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.process = launch(cluster, folder, SLOTS, keys(data))
        self.path = folder / "runs/digits-hsvit-001"

    def lines(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        found = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in found if line.endswith("\n")]

    def reached(self, step: int) -> bool:
        return any(line["step"] >= step for line in self.lines())

    def wait(self, happened: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 240
        while not happened():
            assert self.process.poll() is None, f"ended before: {what}\n{output(self.process)[-6000:]}"
            assert time.monotonic() < deadline, f"{what}: not within 240 s"
            time.sleep(0.002)

    def ranks(self, host: Host) -> list[int]:
        return host.processes("hsvit_ds.train --local_rank=")


def kill(cluster: Cluster, folder: Path, data: Path, kind: str, seed: int, whole: Path) -> Killed:
    """One run and one kill; AssertionError where the end is not that of the run in `whole`, RefusedError where a
    checkpoint is not as it was saved."""
    draw = random.Random(seed)
    host = cluster.hosts[draw.choice(list(SLOTS))]
    run = Run(cluster, folder, data)
    at = draw.randrange(2, LAST - 4)
    if kind == "first step":
        run.wait(lambda: "steps an epoch" in output(run.process), "the first step begins")
        time.sleep(draw.random() / 5)
    elif kind == "evaluation":
        at = STEPS_PER_EPOCH
        run.wait(lambda: run.reached(at), "the last step of an epoch")
        time.sleep(draw.random() / 50)
    elif kind == "save":
        run.wait(lambda: run.reached(at), f"step {at}")
        run.wait(lambda: list((run.path / "checkpoints").glob("*.partial")), "a save begins")
    else:
        run.wait(lambda: run.reached(at), f"step {at}")
        time.sleep(draw.random() / 50)
    found = run.lines()
    moment = f"{host.name}, after step {max((line['step'] for line in found), default=0)}"
    if kind == "host":
        host.switch_off()
        time.sleep(1)
        host.start()
    else:
        victims = run.ranks(host) if kind != "worker" else workers(run.ranks(host))
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        moment += "" if victims else ", nothing left to kill"
    code = run.process.wait(timeout=400)
    text = output(run.process)
    assert code == 0, text[-8000:]
    end = latest(folder / "runs")
    assert end is not None
    assert_equal(end, whole)
    assert_sound(run.path / "checkpoints")
    steps = [line["step"] for line in run.lines() if "train/loss" in line]
    assert steps == list(range(1, LAST + 1)), "a step is logged twice or not at all"
    assert not cluster.left("hsvit_ds")
    resumed = [int(part.split(":")[0]) for part in text.split("resumed at step ")[1:]]
    lost = max((line["step"] for line in found), default=0) - (resumed[0] if resumed else 0)
    attempts = text.count("hsvit: attempt ") - text.count(" failed: ")
    return Killed(kind, seed, moment, attempts, lost if attempts > 1 else 0)


def workers(ranks: list[int]) -> list[int]:
    """Data workers of ranks: children of their fork servers."""
    children: list[int] = []
    for parent in [c for rank in ranks for c in _children(rank)]:
        children += _children(parent)
    return children


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(child) for child in found.split()]


def assert_sound(checkpoints: Path) -> None:
    """Every checkpoint that is there can be loaded, and every file of it is as it was saved."""
    for folder in checkpoints.glob(STEPS):
        manifest = read_manifest(folder)
        assert read_weights(folder, manifest, ema=True)
        for file in manifest["files"]:
            read_bytes(folder, file, manifest)


KINDS = ("rank", "host", "save", "evaluation", "first step", "worker")


def undisturbed(cluster: Cluster, folder: Path, data: Path) -> Path:
    """The last checkpoint of a run to which nothing happens."""
    run = Run(cluster, folder, data)
    code = run.process.wait(timeout=400)
    assert code == 0, output(run.process)[-8000:]
    found = latest(folder / "runs")
    assert found is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the first kill; the next ones follow")
    args = parser.parse_args()
    if why := missing():
        sys.exit(f"no hosts: {why}")
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        (folder / "cluster").mkdir()
        cluster = Cluster(folder / "cluster", list(SLOTS))
        data = tars(folder / "data")
        equal = 0
        try:
            (folder / "whole").mkdir()
            whole = undisturbed(cluster, folder / "whole", data)
            print("| # | killed | where and when | attempts | steps done again | final weights |\n|" + " --- |" * 6)
            for number in range(args.count):
                kind, seed, own = KINDS[number % len(KINDS)], args.seed + number, folder / f"run-{number}"
                own.mkdir()
                try:
                    k = kill(cluster, own, data, kind, seed, whole)
                    equal += 1
                    row = f"{kind} | {k.moment} | {k.attempts} | {k.steps_lost} | bit-equal"
                except (AssertionError, RefusedError) as error:
                    told = str(error).splitlines() or [str(traceback.extract_tb(error.__traceback__)[-1].line)]
                    row = f"{kind} | seed {seed} | | | {told[-1]}"
                print(f"| {number + 1} | {row} |", flush=True)
                cluster.restore()
        finally:
            cluster.close()
    print(f"{equal} of {args.count}")
    sys.exit(equal != args.count)


if __name__ == "__main__":
    main()
