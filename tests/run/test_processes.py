"""A run's processes get their share of this machine, and what starts them takes no other's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hsvit_ds.errors import RefusedError
from hsvit_ds.run.processes import Share, command, complaint, shares


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Eight cores, of which 0 and 4 are threads of one; no GPU."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    read = Path.read_text

    def read_text(path: Path, *given: str) -> str:
        if path.name == "core_id":
            return str(int(path.parts[-3].removeprefix("cpu")) % 4)
        return "0" if path.name == "physical_package_id" else read(path, *given)

    monkeypatch.setattr(Path, "read_text", read_text)
    return monkeypatch


def test_cores_are_shared_out_with_both_threads_of_each(machine: pytest.MonkeyPatch) -> None:
    assert shares(2, 2) == [Share((0, 1, 4, 5)), Share((2, 3, 6, 7))]
    assert shares(3, 2) == [Share((0, 4)), Share((1, 5)), Share((2, 6))]
    assert shares(1, 16) == [Share()]  # as a person would start it


def test_gpus_are_shared_out_as_they_are_visible(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "device_count", lambda: 4)
    assert [share.gpus for share in shares(2, 2)] == [("0", "1"), ("2", "3")]
    machine.setenv("CUDA_VISIBLE_DEVICES", "7,3,5,1")
    assert [share.gpus for share in shares(2, 2)] == [("7", "3"), ("5", "1")]
    assert [share.gpus for share in shares(1, 2)] == [("7", "3")]


@pytest.mark.parametrize(
    ("jobs", "ranks", "gpus", "said"),
    [
        (5, 2, 0, "--jobs 5 with runs of 2 ranks takes 10 cores, here are 8; --jobs 4 is the most"),
        (2, 16, 0, "takes 32 cores, here are 8; give the cells fewer ranks, or a --hostfile"),
        (2, 1, 1, "--jobs 2 with runs of 1 rank takes 2 GPUs, here is 1; --jobs 1 is the most"),
        (1, 2, 1, "--jobs 1 with runs of 2 ranks takes 2 GPUs, here is 1; give the cells fewer ranks, or a --hostfile"),
    ],
)
def test_what_does_not_go_round_is_refused(
    jobs: int, ranks: int, gpus: int, said: str, machine: pytest.MonkeyPatch
) -> None:
    machine.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(RefusedError) as refused:
        shares(jobs, ranks)
    assert said in str(refused.value)


def test_runs_that_start_at_the_same_moment_meet_at_ports_of_their_own() -> None:
    """And on GPUs of their own, whatever CUDA_VISIBLE_DEVICES says: with a number DeepSpeed takes the first ones."""
    # So many that the system names some of its 28,000 ports twice.
    made = [command(Path("a.toml"), ["--resume"], 2, ("5", "7", "9")) for _ in range(1000)]
    assert len({line[line.index("--master_port") + 1] for line in made}) == len(made)
    assert made[0][made[0].index("--include") + 1] == "localhost:5,7"
    assert made[0][-4:] == ["--module", "hsvit_ds.train", "a.toml", "--resume"]
    assert "--num_accelerators" in command(Path("a.toml"), [], 2)
    assert command(Path("a.toml"), ["b=1"], 1)[1:] == ["-m", "hsvit_ds.train", "a.toml", "b=1"]


def test_the_cause_of_a_failure_is_told_from_its_consequences() -> None:
    assert complaint("") == ""
    assert complaint("a\n  b \n\n") == "b"
    lost = "hsvit: error: rank 0 on a: step 3: lost other ranks: RuntimeError"
    assert complaint(f"x\nhsvit: error: rank 1 on a: why\n{lost}\n[launch.py:1] exits") == "rank 1 on a: why"
    assert complaint(f"{lost}\n[launch.py:1] exits").startswith("rank 0 on a: step 3: lost")
