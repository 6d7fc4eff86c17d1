"""What `hsvit launch --print` gives to torchrun and to Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.errors import Exit

from .launcher import RECIPE


def _printed(kind: str, hostfile: Path, *options: str) -> str:
    arguments = ["launch", str(RECIPE), "run.name=a b", "--hostfile", str(hostfile), "--print", kind, *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_torchrun_commands_are_one_for_each_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no ssh: no host is asked
    (tmp_path / "hostfile").write_text("node-1 slots=4\nnode-2 slots=4\nnode-3 slots=1\n")
    lines = _printed("torchrun", tmp_path / "hostfile", "--hosts", "2").splitlines()
    assert lines[::2] == ["# on node-1", "# on node-2"]
    assert lines[3].startswith(
        f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc_per_node 4 --node_rank 1 "
    )
    (port,) = {line.split("--master_port ")[1].split()[0] for line in lines[1::2]}
    assert int(port) > 1024
    assert lines[3].endswith("'run.name=a b'")


def test_the_slurm_script_runs_a_task_for_each_rank_and_queues_itself_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostfile").write_text("node-1 slots=2\nnode-2 slots=2\n")
    script = _printed("slurm", tmp_path / "hostfile", "grid.backend=gloo")
    assert "--gpus-per-node" not in script
    for option in (
        "--nodes=2",
        "--ntasks-per-node=2",
        "--signal=USR1@180",
        "--requeue",
        "--cpus-per-task=5",
        "--time=1-00:00:00",
    ):
        assert f"#SBATCH {option}\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_ins = {
        "srun": 'shift; SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 "$@"',
        "scontrol": '[ "$1" = show ] && printf "node-1\\nnode-2\\n" || echo "$*" >> requeued',
        "rank": 'printf "%s\\n" "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" "$@" > rank.txt; exit 75',
    }
    for name, text in stand_ins.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node-[1-2]"}
    script = script.replace(f"{sys.executable} -m", "rank -m")
    done = subprocess.run(["bash"], input=script, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == Exit.STOPPED
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    expected = ["3 1 4 node-1 20077", "-m", "hsvit_ds.train", str(RECIPE), "--run", "runs/a b-job77", "run.name=a b"]
    assert (tmp_path / "rank.txt").read_text().splitlines() == [*expected, "grid.backend=gloo"]


def test_hosts_with_different_slots_have_no_slurm_script(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("node-1 slots=2\nnode-2 slots=3\n")
    result = CliRunner().invoke(app, ["launch", str(RECIPE), "--hostfile", f"{tmp_path}/hostfile", "--print", "slurm"])
    assert result.exit_code == Exit.REFUSED


@pytest.mark.parametrize("kind", ["torchrun", "slurm"])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--hosts", "3"], "--hosts 3: the hostfile names 2"),
        (["grid.submodule_ranks=8", "model.submodules=8"], "grid.submodule_ranks = 8 does not divide the 4 ranks"),
        (["run.global_batch=63"], "run.global_batch = 63 is not divisible by 2 replicas"),
    ],
)
def test_what_training_would_refuse_is_not_printed(kind: str, more: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("node-1 slots=2\nnode-2 slots=2\n")
    arguments = ["launch", str(RECIPE), "--hostfile", f"{tmp_path}/hostfile", "--print", kind, *more]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, said in result.stderr) == (Exit.REFUSED, True), result.output
    assert result.stdout == ""
