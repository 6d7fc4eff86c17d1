"""Runs that end before their time: asked to stop, stuck, out of memory, non-finite; and what they leave behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from ..engine.test_checkpoint import assert_equal, latest, train_arguments
from ..ranks import finish, fork

pytestmark = pytest.mark.heavy


def interrupted(
    root: Path, rank: int | str, phase: str, action: str, *more: str, world: int = 2
) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of a run's ranks."""
    arguments = [str(rank), phase, action, *train_arguments(root, *more)]
    ranks = fork("tests.workers.interrupted", arguments, world)
    outputs = [process.communicate(timeout=240)[0] for process in ranks]
    return [process.returncode for process in ranks], outputs


def last_word(root: Path, rank: int) -> dict[str, Any]:
    path = root / f"digits-hsvit-001/errors/rank-{rank:04d}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(
    ("rank", "phase", "signal", "saved"),
    [
        (1, "step 25:", "SIGTERM", 26),  # agreed one step later
        (0, "evaluating val", "SIGUSR1", 71),
        (1, "step 30:", "SIGINT+SIGTERM", 31),  # Ctrl-C under DeepSpeed's launcher
    ],
)
def test_a_signal_to_one_rank_saves_and_stops_all_and_the_resumed_run_is_bit_equal(
    rank: int, phase: str, signal: str, saved: int, uninterrupted: Path, tmp_path: Path
) -> None:
    keys = ["data.eval_batch=32"]  # several batches, so that all ranks can agree between two
    codes, outputs = interrupted(tmp_path, rank, phase, signal, *keys)
    assert codes == [75, 75], outputs
    assert f"stopped as asked after step {saved}; --resume continues" in outputs[0]
    folder = latest(tmp_path)
    assert folder is not None
    assert int(folder.name[5:13]) == saved
    output = finish(fork("hsvit_ds.train", train_arguments(tmp_path, *keys, "--resume"), 2))
    assert f"resumed at step {saved}" in output
    assert "val/top1" in output
    whole, parts = latest(uninterrupted), latest(tmp_path)
    assert whole is not None
    assert parts is not None
    assert_equal(parts, whole)


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    keys = ["grid.submodule_ranks=1"]
    codes, outputs = interrupted(tmp_path, 0, "step 25:", "SIGINT+SIGINT", *keys, world=1)
    assert codes == [-signal.SIGINT], outputs
    assert "hsvit: saves and stops after this step; Ctrl-C again kills" in outputs[0]
    assert "Traceback" not in outputs[0]


def test_a_rank_that_hangs_ends_with_its_stacks_and_the_last_collective(tmp_path: Path) -> None:
    codes, outputs = interrupted(tmp_path, 1, "step 12: forward", "hang", "run.watchdog=8")
    # Rank 0, which waits for rank 1, finds itself stuck too, or finds it gone.
    assert codes in ([77, 77], [76, 77]), outputs
    word = last_word(tmp_path, 1)
    assert word["kind"] == "stuck"
    assert word["step"] == 11
    assert "step 12: forward and backward passes, reduction, update took more than 8 s (run.watchdog)" in word["error"]
    collective = "last collective: all_reduce of (16, 15) torch.float32 (CLS sums, 2 ranks)"
    assert collective in word["error"]
    assert (collective if codes[0] == 77 else "lost other ranks") in last_word(tmp_path, 0)["error"]
    stacks = (tmp_path / "digits-hsvit-001/errors/rank-0001.stacks.txt").read_text()
    assert "interrupted.py" in stacks
    assert "in happen" in stacks


def test_a_rank_that_dies_is_told_from_those_that_lost_it(tmp_path: Path) -> None:
    codes, outputs = interrupted(tmp_path, 1, "step 25:", "SIGKILL")
    assert codes == [76, -9], outputs
    word = last_word(tmp_path, 0)
    assert (word["kind"], word["rank"]) == ("lost", 0)
    assert "step 25: forward and backward passes, reduction, update: lost other ranks: " in word["error"]
    assert "Traceback" in word["trace"]
    assert "Traceback" not in outputs[0]
    assert not (tmp_path / "digits-hsvit-001/errors/rank-0001.json").exists()


def test_out_of_memory_names_the_phase_the_plan_and_a_smaller_micro_batch(tmp_path: Path) -> None:
    keys = ["grid.submodule_ranks=1"]
    codes, outputs = interrupted(tmp_path, 0, "step 3: forward", "full", *keys, world=1)
    assert codes == [1], outputs
    word = last_word(tmp_path, 0)
    assert word["error"].startswith("step 3: forward and backward passes, reduction, update: out of memory (")
    assert "planned for each rank, MiB: parameters 0.0, gradients 0.0, " in word["error"]
    assert word["error"].endswith("try run.micro_batch=8 (now 16)")


def test_the_last_words_of_an_attempt_are_moved_aside_when_it_is_resumed(tmp_path: Path) -> None:
    keys, folder = ["grid.submodule_ranks=1"], tmp_path / "digits-hsvit-001"
    for step in (3, 13):
        codes, outputs = interrupted(tmp_path, 0, f"step {step}: forward", "full", *keys, "--resume", world=1)
        assert codes == [1], outputs
    finish(fork("hsvit_ds.train", train_arguments(tmp_path, *keys, "--resume"), 1))
    assert not (folder / "errors").exists()
    for number, step in ((1, 3), (2, 13)):
        word = json.loads((folder / f"errors-{number:03d}/rank-0000.json").read_text())
        assert word["error"].startswith(f"step {step}: ")


@pytest.mark.parametrize("interval", [1, 10])
def test_non_finite_steps_are_named_and_the_run_goes_on_from_its_last_checkpoint_with_a_lower_rate(
    interval: int, tmp_path: Path
) -> None:
    """At once, or when the interval is over."""
    keys = ["grid.submodule_ranks=1", "engine.max_skipped_steps=2", "run.step_back=0.5", f"run.log_every={interval}"]
    codes, outputs = interrupted(tmp_path, 0, "step 15:", "nan", *keys, world=1)
    assert codes == [0], outputs
    for step in (15, 16):
        assert f"warning: step {step} was skipped: its gradient is not finite (loss nan)" in outputs[0]
    assert "warning: 3 steps in a row, up to step 16, had a non-finite gradient" in outputs[0]
    assert ("non-finite parameter" in outputs[0]) == (interval == 1)
    assert "back to step 10, the learning rate times 0.5 from there" in outputs[0]
    logged = [json.loads(line) for line in (tmp_path / "digits-hsvit-001/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in logged if "train/loss" in line]
    assert steps == [step for step in range(1, 72) if step % interval == 0 or step == 71]
    manifest = json.loads((tmp_path / "digits-hsvit-001/checkpoints/step-00000071/manifest.json").read_text())
    assert manifest["position"]["lr_factor"] == 0.5


def test_steps_back_that_do_not_help_end_the_run(tmp_path: Path) -> None:
    keys = ["grid.submodule_ranks=1", "engine.max_skipped_steps=0", "run.step_back=0.5", "optimizer.clip=0"]
    keys += ["optimizer.lr=1e30", "checkpoint.every_steps=1"]
    codes, outputs = interrupted(tmp_path, 0, "never", "SIGTERM", *keys, world=1)
    assert codes == [1], outputs
    assert "going back 3 times to step 1 did not help" in last_word(tmp_path, 0)["error"]
