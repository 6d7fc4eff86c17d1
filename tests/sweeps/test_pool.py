"""What becomes of cells that finish, fail, stop or go on by themselves; with a program of ours in a run's place."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hsvit_ds.commands import sweep as command
from hsvit_ds.errors import Exit, RefusedError
from hsvit_ds.run import processes
from hsvit_ds.run.processes import Share, Stops
from hsvit_ds.sweeps import cells, jobs, pool
from hsvit_ds.sweeps.cells import Sweep
from hsvit_ds.sweeps.pool import Pool

from ..cluster.hosts import until
from ..ranks import ROOT
from .test_cells import HSVIT, written

pytestmark = pytest.mark.heavy

RUN = """
import json, os, signal, sys, time
from pathlib import Path
from hsvit_ds.run.summary import Data, Summary

given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
seed = given["run.seed"]
plan = json.loads(Path("plan.json").read_text()).get(seed, {})
folder = Path(given["run.root"]) / (given["run.name"] + "-001")
folder.mkdir(parents=True, exist_ok=True)
with Path("started").open("a") as file:
    threads = os.environ["OMP_NUM_THREADS"]
    file.write(f"{seed} {','.join(map(str, sorted(os.sched_getaffinity(0))))} {threads} {os.getpid()}\\n")

if plan.get("silent"):
    time.sleep(30)
if plan.get("refused"):
    sys.exit(2)

def write(state, why=""):
    data = Data(name="digits", fingerprint="", counts={}, val="val", test="test", classes=10, image_size=32)
    place = dict(ranks=1, cores=1, gpus=0, hosts=(), device="", launcher="", commit="", dirty=False, versions={})
    how_far = dict(started=0.0, steps=78, steps_per_epoch=39, epochs=2, seconds=3.0)
    found = dict(state=state, why=why, metrics={"test/top1": 90.0 + int(seed)})
    Summary(id=seed, title="", recipe="", changed={}, data=data, costs=(), **place, **how_far, **found).write(folder)

def stop(*_):
    write("stopped")
    sys.exit(75)

if not plan.get("deaf"):
    signal.signal(signal.SIGTERM, stop)
write("running")
until = time.monotonic() + 30
while time.monotonic() < until and Path("wait").exists() and seed in Path("wait").read_text().split():
    time.sleep(0.05)
if plan.get("kill"):
    os.kill(os.getpid(), signal.SIGKILL)
if plan.get("says"):
    print(plan["says"], file=sys.stderr, flush=True)
if code := plan.get("code", 0):
    write(*plan.get("state", ["failed", "why"]))
    sys.exit(code)
write("finished")
"""


class Sweeps:
    """Sweeps over seeds, whose cells are programs that do as planned."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.stops = folder, Stops()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        (folder / "started").touch()
        self.plan()

        def program(recipe: Path, arguments: list[str], ranks: int, gpus: tuple[str, ...]) -> list[str]:
            assert "--resume" in arguments
            return [sys.executable, "-c", RUN, *arguments]

        monkeypatch.setattr(jobs, "command", program)

    def plan(self, **seeds: dict[str, Any]) -> None:
        (self.folder / "plan.json").write_text(json.dumps({name.removeprefix("s"): do for name, do in seeds.items()}))

    def wait(self, *seeds: int) -> None:
        """Let these cells go on until they are let go."""
        (self.folder / "wait").write_text(" ".join(map(str, seeds)))

    def sweep(self, seeds: int) -> Sweep:
        keys = {"grid.submodule_ranks": 1, "tracking.mlflow": False}
        return cells.read(written(self.folder, recipes=[HSVIT], seeds=[*range(seeds)], keys=keys))

    def run(self, sweep: Sweep, shares: Sequence[Share] = (Share(),)) -> Exit:
        with pool.held(sweep), command._Screen(sweep) as screen:
            made = Pool(sweep, shares, None, screen)
            made.run(self.stops)
        return command._print_result(sweep, made.ended)

    def started(self) -> list[list[str]]:
        """(seed, its cores, its threads, process) of every start."""
        return [line.split() for line in (self.folder / "started").read_text().splitlines()]

    def seeds(self) -> list[int]:
        return [int(seed) for seed, *_ in self.started()]

    def when(self, happened: Callable[[], Any], action: Callable[[], Any]) -> None:
        def look() -> None:
            until(happened, "it happens", 30)
            action()

        threading.Thread(target=look, daemon=True).start()

    def ask(self) -> None:
        self.stops._hear(0, None)


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    return Sweeps(tmp_path, monkeypatch)


def test_a_failed_cell_stops_no_other_and_is_tried_again(sweeps: Sweeps, capfd: pytest.CaptureFixture[str]) -> None:
    lost = "hsvit: error: rank 1 on a: lost other ranks: gone"
    sweeps.plan(
        s0={"code": 1, "says": f"hsvit: error: rank 0 on a: 9 skipped steps\n{lost}\n[launch.py] exits with 1"},
        s1={"kill": True},
        s2={"code": 2, "says": "Traceback\nValueError: odd"},
    )
    made = sweeps.sweep(5)
    assert sweeps.run(made) == Exit.FAILED
    assert sweeps.seeds() == [0, 1, 2, 3, 4]
    said = capfd.readouterr().out
    log = made.folder / "logs/digits-hsvit,seed=0.log"
    assert f"digits-hsvit,seed=0: failed: rank 0 on a: 9 skipped steps; its output: {log}" in said
    assert "seed=1: failed: killed by SIGKILL" in said
    assert "seed=2: failed: ValueError: odd" in said
    assert "seed=3: finished, test top-1 93.00" in said
    assert "3 cells failed; to try again:" in said
    assert f"hsvit compare {made.folder}" in said
    sweeps.plan()
    assert sweeps.run(made) == Exit.FINISHED
    assert sweeps.seeds() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert "5 cells, 2 of them finished" in capfd.readouterr().out
    assert sweeps.run(made) == Exit.FINISHED
    assert len(sweeps.seeds()) == 8


def test_a_cell_is_not_judged_by_what_an_earlier_attempt_left(
    sweeps: Sweeps, capfd: pytest.CaptureFixture[str]
) -> None:
    sweeps.plan(s0={"code": 75, "says": "hsvit: error: of then", "state": ["stopped", ""]})
    made = sweeps.sweep(1)
    assert sweeps.run(made) == Exit.STOPPED
    sweeps.plan(s0={"refused": True})
    capfd.readouterr()
    assert sweeps.run(made) == Exit.FAILED
    assert "failed: exit code 2;" in capfd.readouterr().out
    assert made.cells[0].state == "stopped"
    sweeps.plan(s0={"code": 1})
    assert sweeps.run(made) == Exit.FAILED
    sweeps.plan(s0={"silent": True})
    sweeps.when(lambda: len(sweeps.seeds()) == 4, sweeps.ask)
    assert sweeps.run(made) == Exit.STOPPED


def test_cells_at_the_same_time_share_no_core(sweeps: Sweeps) -> None:
    here = sorted(os.sched_getaffinity(0))
    if len(here) < 2:
        pytest.skip("one core")
    sweeps.wait(0, 1)
    sweeps.when(lambda: len(sweeps.started()) == 2, lambda: sweeps.wait())
    shares = processes.shares(2, 1)
    assert sweeps.run(sweeps.sweep(4), shares) == Exit.FINISHED
    cores = [set(map(int, text.split(","))) for _, text, *_ in sweeps.started()]
    assert not cores[0] & cores[1]
    assert all(len(some) == len(here) // 2 and some <= {*here} for some in cores)
    assert {threads for *_, threads, _ in sweeps.started()} == {str(len(here) // 2)}
    assert sorted(os.sched_getaffinity(0)) == here


def test_a_sweep_that_is_asked_to_stop_lets_its_cells_save(sweeps: Sweeps, capfd: pytest.CaptureFixture[str]) -> None:
    sweeps.wait(0)
    made = sweeps.sweep(3)
    sweeps.when(lambda: made.cells[0].state == "gone", sweeps.ask)  # it has said that it runs, and holds no run's lock
    assert sweeps.run(made) == Exit.STOPPED
    assert sweeps.seeds() == [0]
    assert made.cells[0].state == "stopped"
    said = capfd.readouterr().out
    assert "saves and stops; Ctrl-C again kills: digits-hsvit,seed=0" in said
    assert "stopped; to go on:" in said
    sweeps.wait()
    sweeps.stops = Stops()
    assert sweeps.run(made) == Exit.FINISHED
    assert sweeps.seeds() == [0, 0, 1, 2]


def test_a_second_request_kills(sweeps: Sweeps, capfd: pytest.CaptureFixture[str]) -> None:
    sweeps.plan(s0={"deaf": True})
    (sweeps.folder / "wait").write_text("0")
    made = sweeps.sweep(2)
    sweeps.when(lambda: made.cells[0].state == "gone", lambda: (sweeps.ask(), time.sleep(0.5), sweeps.ask()))
    assert sweeps.run(made) == Exit.STOPPED
    assert sweeps.seeds() == [0]
    assert "kills: digits-hsvit,seed=0" in capfd.readouterr().out


def test_a_cell_that_outlived_its_sweep_is_waited_for(sweeps: Sweeps, capfd: pytest.CaptureFixture[str]) -> None:
    sweeps.wait(0)
    made = sweeps.sweep(2)
    log = made.folder / "logs" / f"{made.cells[0].name}.log"
    log.parent.mkdir(parents=True)
    with log.open("ab") as file:  # as a sweep that is killed now
        fcntl.flock(file, fcntl.LOCK_EX)
        program = [sys.executable, "-c", RUN, "run.seed=0", f"run.root={made.folder}", f"run.name={made.cells[0].name}"]
        left = subprocess.Popen(program, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
    said: list[str] = []
    sweeps.when(lambda: said.append(capfd.readouterr().out) or "waits for them" in "".join(said), sweeps.wait)
    assert sweeps.run(made) == Exit.FINISHED
    assert left.wait() == 0
    assert sweeps.seeds() == [0, 1]
    said.append(capfd.readouterr().out)
    assert "digits-hsvit,seed=0: processes that were started before go on with it" in "".join(said)
    assert "digits-hsvit,seed=0: finished, test top-1 90.00" in "".join(said)


def test_of_two_sweeps_of_one_file_the_second_is_refused(sweeps: Sweeps) -> None:
    made = sweeps.sweep(1)
    with pool.held(made), pytest.raises(RefusedError, match="another `hsvit sweep` is at it"), pool.held(made):
        pass
    with pool.held(made):
        pass
