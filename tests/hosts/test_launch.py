"""`hsvit launch`: what it starts, what it does when that ends, and what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hsvit_ds.errors import Exit
from hsvit_ds.hosts import attempt
from hsvit_ds.hosts.doctor import Cell, Examination

from .launcher import FAILS, RECIPE, SLEEPS, Runs

STOPS = "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); " + SLEEPS
DEAF = "import signal; signal.signal(signal.SIGUSR1, signal.SIG_IGN); " + SLEEPS


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


# What is started


def test_deepspeed_gets_the_run_its_hosts_and_where_to_meet(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    runs.monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222")
    assert runs.launch([{"code": 0, "says": ["a rank's word"]}], "optimizer.lr=1e-3") == Exit.FINISHED
    started, folder = runs.started(0), runs.folder / "runs/digits-hsvit-001"
    text = " ".join(started["arguments"])
    assert "--force_multi --launcher pdsh" in text
    assert "--master_addr 10.0.0.1 --master_port 29600 --module hsvit_ds.train" in text
    assert f"{RECIPE} --run {folder} run.root=" in text
    assert started["hostfile"] == "node-1 slots=2\nnode-2 slots=2\n"
    assert started["environment"]["PDSH_SSH_ARGS_APPEND"].startswith("-p 2222 -o BatchMode=yes")
    assert runs.asked == [(["node-1", "node-2"], RECIPE)]
    out = capfd.readouterr()
    assert text in out.out
    assert "a rank's word" in out.err


def test_arguments_arrive_at_a_rank_as_they_were_given() -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner

    given = [
        "a=b",
        'model={kind="timm",name="x"}',
        'a b="$HOME"\\',
        "100%h %n",
        "it's",
        "`id` $(id) *",
        "a%20b;c&d",
        "[1,2]",
    ]
    runner = SimpleNamespace(args=SimpleNamespace(user_args=[attempt.quoted(argument) for argument in given]))
    replaced = {"%%": "%", "%h": "node-1", "%n": "0", "%u": "root"}  # by pdsh, which joins the arguments
    command = re.sub("%[%hnu]", lambda found: replaced[found[0]], " ".join(PDSHRunner.parse_user_args(runner)))
    script = f'for a in {command}; do printf "%s\\0" "$a"; done'
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.split("\0")[:-1] == given


def test_without_a_hostfile_or_with_unfit_hosts_nothing_is_started(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    assert runs.call() == Exit.REFUSED
    runs.found.cells.append(Cell("node-2", "python", "3.9", "install 3.11"))
    assert runs.launch([]) == Exit.REFUSED
    assert "hsvit: error: node-2: python: 3.9; install 3.11" in capfd.readouterr().err
    assert runs.call("--hosts", "3") == Exit.REFUSED
    assert runs.hosts == []
    assert not (runs.folder / "runs").exists()


# What follows a failure


def test_a_failed_run_is_started_again_in_its_own_folder_until_it_is_finished(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = [FAILS, {"code": 76}, {"code": 247, "saved": 30}, {"code": 77}, {"code": 0}]
    assert runs.launch(plan) == Exit.FINISHED
    assert runs.hosts == [["node-1", "node-2"]] * 5
    folders = {runs.started(number)["arguments"][14] for number in range(5)}
    assert folders == {f"{runs.folder}/runs/digits-hsvit-001"}
    out = capfd.readouterr().out
    assert "attempt 1 failed: rank 2 on node-2 failed after step 7: why-4.0" in out
    assert "restart 3 of at most 10: starts again, in 1 s" in out  # as there was progress
    assert runs.clock.now == pytest.approx(1 + 2 + 1 + 2, abs=1)


def test_three_failures_without_a_newer_checkpoint_end_the_run(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    assert runs.launch([FAILS, {**FAILS, "saved": 20}, FAILS, FAILS, FAILS, {"code": 0}]) == Exit.FAILED
    assert len(runs.hosts) == 5
    assert "3 failures in a row without a newer checkpoint; the last one: rank 2 on node-2" in capfd.readouterr().err


def test_restarts_are_limited(runs: Runs) -> None:
    assert runs.launch([{"code": 1, "saved": n} for n in range(4)], "--max-restarts", "2") == Exit.FAILED
    assert len(runs.hosts) == 3


@pytest.mark.parametrize("code", [Exit.REFUSED, Exit.STOPPED])
def test_a_refused_or_stopped_run_is_not_started_again(runs: Runs, code: Exit) -> None:
    assert runs.launch([{"code": int(code)}, {"code": 0}]) == code
    assert len(runs.hosts) == 1


def test_resume_goes_on_with_the_newest_run(runs: Runs) -> None:
    for number in (1, 2):
        (runs.folder / f"runs/digits-hsvit-00{number}").mkdir(parents=True)
    assert runs.launch([{"code": 0}, {"code": 0}], "--resume") == Exit.FINISHED
    assert runs.started(0)["arguments"][14].endswith("digits-hsvit-002")
    assert runs.call(f"run.root={runs.folder}/runs") == Exit.FINISHED
    assert runs.started(1)["arguments"][14].endswith("digits-hsvit-003")


def test_a_run_that_still_goes_on_is_not_resumed(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    folder = runs.folder / "runs/digits-hsvit-001"
    folder.mkdir(parents=True)
    other = subprocess.Popen(["sh", "-c", "read x", "hsvit_ds.train", "--run", str(folder)], stdin=subprocess.PIPE)
    assert runs.launch([{"code": 0}], "--resume") == Exit.REFUSED
    assert f"{folder} is still going on node-1, node-2" in capfd.readouterr().err
    other.communicate(b"\n")


def test_success_that_leaves_ranks_behind_is_none(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    assert runs.launch([{"code": 0, "rank": SLEEPS}, {"code": 0}]) == Exit.FINISHED
    assert len(runs.hosts) == 2
    assert runs.rank_is_gone()
    assert "attempt 1 failed: no rank failed by itself" in capfd.readouterr().out


def test_ranks_that_wait_for_a_lost_host_are_ended(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    runs.monkeypatch.setattr(attempt, "_GRACE", {255: 0.5})
    says = ["pdsh@here: node-2: ssh exited with exit code 255"]
    plan = [{"rank": SLEEPS, "says": says, "dead": ["node-2"], "saved": 5}, {"code": 0}]
    assert runs.launch(plan, "--shrink") == Exit.FINISHED
    assert runs.rank_is_gone()
    assert "ranks 2, 3 on node-2 left no word: killed, or their host is gone" in capfd.readouterr().out


# Which hosts


def test_a_lost_host_is_replaced_by_a_spare_without_a_pause(runs: Runs) -> None:
    runs.launch([{"code": 255, "dead": ["node-1"]}, {"code": 0}], "--hosts", "2", hosts=3)
    assert runs.hosts == [["node-1", "node-2"], ["node-2", "node-3"]]
    assert runs.clock.now == 0
    assert runs.asked[1] == (["node-2", "node-3"], None)  # rank 0 has another host


def test_a_host_that_failed_twice_in_a_row_is_replaced(runs: Runs) -> None:
    plan = [FAILS, FAILS, {"code": 1, "saved": 5, "words": {"1": ("stuck", 1.0)}}, {"code": 0}]
    assert runs.launch(plan, "--hosts", "2", hosts=3) == Exit.FINISHED
    assert runs.hosts == [["node-1", "node-2"]] * 2 + [["node-1", "node-3"]] * 2  # and does not return for another's


def test_a_shrunk_run_is_whole_again_when_the_host_answers(runs: Runs) -> None:
    plan = [{"code": 255, "dead": ["node-2"]}, {"code": 1, "dead": [], "saved": 9}, {"code": 0}]
    assert runs.launch(plan, "--shrink", ranks=4) == Exit.FINISHED
    assert runs.hosts == [["node-1", "node-2"], ["node-1"], ["node-1", "node-2"]]
    assert runs.started(1)["arguments"][-1] == "grid.submodule_ranks=2"
    assert runs.started(2)["arguments"][-1] == "grid.submodule_ranks=4"  # as given: nothing is added


def test_a_degraded_run_goes_on_without_the_lost_submodules(runs: Runs) -> None:
    plan = [{"code": 255, "dead": ["node-1"], "saved": 3}, {"code": 1, "dead": [], "saved": 9}, {"code": 0}]
    assert runs.launch(plan, "run.survive=degraded", ranks=4) == Exit.FINISHED
    assert runs.hosts == [["node-1", "node-2"], ["node-2"], ["node-1", "node-2"]]
    assert runs.started(1)["arguments"][-2:] == ["grid.submodule_ranks=2", "'grid.absent=[0,1]'"]
    assert runs.started(2)["arguments"][-1] == "run.survive=degraded"


def test_before_the_first_checkpoint_a_degraded_run_gives_nothing_up(runs: Runs) -> None:
    assert runs.launch([{"code": 255, "dead": ["node-1"]}, {"code": 0}], "run.survive=degraded", ranks=4) == 0
    assert runs.started(1)["arguments"][-1] == "grid.submodule_ranks=2"


def test_without_spares_a_run_waits_for_its_host(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    sleep = runs.clock.sleep

    def sleep_until_it_is_back(seconds: float) -> None:
        sleep(seconds)
        if runs.clock.now > 6:
            (runs.folder / "dead").write_text("")

    runs.monkeypatch.setattr(runs.clock, "sleep", sleep_until_it_is_back)
    assert runs.launch([{"code": 255, "dead": ["node-2"]}, {"code": 0}]) == Exit.FINISHED
    assert runs.hosts == [["node-1", "node-2"]] * 2
    out = capfd.readouterr().out
    assert "attempt 1 failed: ranks 2, 3 on node-2 left no word" in out
    assert [f"restart {n} of at most 10: waits for node-2, in {s} s" in out for n, s in ((1, 1), (2, 2), (3, 4))]


def test_a_first_host_that_is_lost_before_the_start_counts_as_a_failure(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.found_later = [Examination(), runs.found]
    assert runs.launch([FAILS, {"code": 0}]) == Exit.FINISHED
    assert "attempt 2 failed: node-1 does not answer, or has no way to the others" in capfd.readouterr().out
    assert len(runs.asked) == 3


def test_words_of_an_earlier_attempt_are_not_taken_for_this_one(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    runs.launch(
        [FAILS, {"code": 76, "words": {"0": ("lost", 9.0), "1": ("lost", 8.0), "2": ("lost", 7.0)}}, {"code": 0}]
    )
    assert "attempt 2 failed: rank 3 on node-2 left no word: killed, or its host is gone" in capfd.readouterr().out


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_the_ranks_to_save_and_stop(
    runs: Runs, number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    runs.during_attempt(lambda: os.kill(os.getpid(), number))
    assert runs.launch([{"rank": STOPS}, {"code": 0}]) == Exit.STOPPED
    assert len(runs.hosts) == 1
    asked = [line for line in (runs.folder / "ssh.log").read_text().splitlines() if "pkill -USR1" in line]
    assert {line.split()[0] for line in asked} == {"node-1", "node-2"}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_signal_kills_the_ranks(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        while "pkill -USR1" not in (runs.folder / "ssh.log").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    runs.during_attempt(twice)
    assert runs.launch([{"rank": DEAF}, {"code": 0}]) == Exit.FAILED
    assert len(runs.hosts) == 1
    assert runs.rank_is_gone()
    assert "asked to stop, but" in capfd.readouterr().err


def test_ranks_that_do_not_stop_in_time_are_killed(runs: Runs) -> None:
    runs.monkeypatch.setattr(attempt, "STOP_SECONDS", 1)
    runs.during_attempt(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert runs.launch([{"rank": DEAF}]) == Exit.FAILED
    assert runs.rank_is_gone()


def test_a_signal_between_two_attempts_stops_the_run(runs: Runs) -> None:
    sleep = runs.clock.sleep

    def ask(seconds: float) -> None:
        sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    runs.monkeypatch.setattr(runs.clock, "sleep", ask)
    assert runs.launch([FAILS, {"code": 0}]) == Exit.STOPPED
    assert len(runs.hosts) == 1


def test_a_stop_reaches_ranks_and_no_launcher(tmp_path: Path) -> None:
    folder = tmp_path / "runs/a+b-001"
    rank = f"python -u -m hsvit_ds.train --local_rank=3 x.toml --run {folder} a=b"
    deepspeed = f"python -u -m deepspeed.launcher.launch --module hsvit_ds.train x.toml --run {folder} a=b"
    other = rank.replace("b-001", "b-0011")
    ranks, processes = attempt._ranks(folder), attempt._processes(folder)
    assert [bool(re.search(ranks, line)) for line in (rank, deepspeed, other, f"pkill -f {ranks}")] == [
        True,
        *[False] * 3,
    ]
    assert [bool(re.search(processes, line)) for line in (rank, deepspeed, other, f"pkill -f {processes}")] == [
        True,
        True,
        False,
        False,
    ]
