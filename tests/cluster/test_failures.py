"""Links and hosts that are lost, disks that are full, and launchers that are stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hsvit_ds.engine.checkpoint_files import read_manifest, read_weights

from ..engine.test_checkpoint import assert_equal, latest
from ..ranks import finish as finish_ranks
from ..ranks import start
from ..tars import data_set
from ..workers.common import SMALL
from .hosts import DIGITS, Cluster, deepspeed, finish, launch, output, until

pytestmark = pytest.mark.cluster
RUN = [*SMALL, "ema.decay=0.9", "run.epochs=1", "checkpoint.every_steps=10"]
LONG = [*RUN, "run.epochs=40", "run.eval_every=10", "checkpoint.every_steps=0"]
TIMEOUT = 10


def step(process: subprocess.Popen[str], number: int) -> None:
    """Wait until a run has logged that so many steps, a multiple of ten, are done."""

    def reached() -> bool:
        assert process.poll() is None, output(process)[-8000:]
        return f"step {number}/" in output(process)

    until(reached, f"step {number}", 240)


def test_a_link_that_is_lost_ends_all_processes_and_the_run_goes_on_when_it_is_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    slots = {"node-1": 1, "node-2": 1}
    keys = [*RUN, "run.epochs=3", f"grid.timeout={TIMEOUT}"]
    process = launch(cluster, tmp_path, slots, keys)
    step(process, 20)
    cluster.hosts["node-2"].unplug()
    until(lambda: not cluster.left("hsvit_ds.train"), "all ranks end", TIMEOUT + 20)
    assert process.poll() is None
    cluster.hosts["node-2"].plug()
    text = finish(process)
    assert "attempt 2" in text
    assert "resumed at step" in text
    assert not cluster.left("hsvit_ds")


@pytest.mark.parametrize("launcher", ["hsvit launch", "deepspeed"])
def test_a_stopped_launcher_saves_and_leaves_no_process(launcher: str, cluster: Cluster, tmp_path: Path) -> None:
    slots = {"node-1": 1, "node-2": 1}
    if launcher == "hsvit launch":
        process = launch(cluster, tmp_path, slots, LONG)
    else:
        command = ["--module", "hsvit_ds.train", str(Path(__file__).parents[2] / "recipes/digits/hsvit.toml"), *LONG]
        process = deepspeed(cluster, tmp_path, slots, [*command, f"run.root={tmp_path}/runs"])
    step(process, 20)
    os.kill(process.pid, signal.SIGTERM)
    until(lambda: process.poll() is not None, "the launcher ends", 30)
    until(lambda: not cluster.left("hsvit_ds"), "all processes end", 30)
    assert process.returncode == (75 if launcher == "hsvit launch" else 1)  # deepspeed's own code
    saved = latest(tmp_path / "runs")
    assert saved is not None
    assert read_manifest(saved)["position"]["step"] > 0  # in mid-epoch: no other saves are made there
    if launcher == "hsvit launch":
        assert "stopped as asked after step" in output(process)


@pytest.mark.marathon
def test_a_long_lossy_and_slow_link_changes_nothing_but_time(cluster: Cluster, tmp_path: Path) -> None:
    slots = {"node-1": 1, "node-2": 1}
    data = data_set(tmp_path / "data", train=16 * 12, val=16)
    keys = [
        *RUN,
        "data.name=tiny",
        "data.classes=10",
        "data.image_size=32",
        f"data.root={data}",
        "data.test=val",
        "data.workers=0",
    ]
    ends = []
    for name in ("short", "long"):
        folder = tmp_path / name
        folder.mkdir()
        process = launch(cluster, folder, slots, [*keys, "run.log_every=1"])
        if name == "long":
            until(lambda process=process: "step 1/" in output(process), "the first step", 240)
            cluster.hosts["node-2"].lengthen(0.2, 0.01, rate=1e6)
        finish(process)
        ends.append(latest(folder / "runs"))
    short, long = ends
    assert short is not None
    assert long is not None
    assert_equal(long, short)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file: Path, seconds: float) -> None:
    """Keep the disk of a file full for so long, whatever is deleted there."""
    until = time.monotonic() + seconds
    with file.open("ab", buffering=0) as filler:
        while time.monotonic() < until:
            with suppress(OSError):
                while True:
                    filler.write(bytes(1024))
            time.sleep(0.001)


def test_a_full_disk_costs_checkpoints_but_neither_the_run_nor_the_one_before(
    cluster: Cluster, small_disk: Path
) -> None:
    """On this machine: a disk that hosts share is the same to each of them."""
    keys = [*RUN, "run.epochs=8", f"run.root={small_disk}/runs", "checkpoint.keep_last=1", "run.eval_every=8"]
    ranks = start("hsvit_ds.train", [DIGITS, *keys], 2)
    until(lambda: latest(small_disk / "runs"), "a checkpoint", 120)
    filler = small_disk / "filler"
    fill(filler, 1)
    before = latest(small_disk / "runs")
    logged = small_disk / "runs/digits-hsvit-001/metrics.jsonl"
    fill(filler, 3)  # many steps and saves
    assert all(rank.poll() is None for rank in ranks)
    kept = latest(small_disk / "runs")
    assert kept is not None
    assert before == kept
    read_weights(kept, read_manifest(kept), ema=True)
    filler.unlink()
    text = finish_ranks(ranks)
    assert "warning: a checkpoint could not be saved, the run goes on: " in text
    assert "No space left on device" in text
    end = latest(small_disk / "runs")
    assert end is not None
    assert end.name == f"step-{8 * 71:08d}"
    steps = [json.loads(line)["step"] for line in logged.read_text().splitlines() if "train/loss" in line]
    assert steps == [*range(10, 8 * 71, 10), 8 * 71]
