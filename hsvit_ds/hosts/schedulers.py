"""The same run for those who start it without `hsvit launch`: torchrun on every host, or Slurm."""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data import splits
from ..errors import Exit, RefusedError
from ..run import folders
from ..run.recipe import Recipe
from .cluster import Host

LONGEST = "1-00:00:00"
"""Of a Slurm job, days-hours:minutes:seconds; then it saves and is queued again."""
_SAVE_SECONDS = 180  # before the end of a job's time


def torchrun(hosts: Sequence[Host], path: Path, overrides: list[str], resume: bool) -> str:
    """A command for each host; all have to be running within ten minutes."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]  # free here, and then likely there
    lines = []
    for number, host in enumerate(hosts):
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(len(hosts)), "--nproc_per_node", str(host.slots), "--node_rank", str(number)),
            *("--master_addr", hosts[0].address, "--master_port", str(port)),
            *("-m", "hsvit_ds.train", str(path), *(["--resume"] if resume else []), *overrides),
        ]
        lines += [f"# on {host.name}", shlex.join(command)]
    return "\n".join(lines)


def slurm(hosts: Sequence[Host], recipe: Recipe, path: Path, overrides: list[str], resume: bool) -> str:
    """A script for sbatch, a task for each rank. It saves before its time is over and goes on when it is queued again.

    Raises:
        RefusedError: the hosts take different numbers of ranks, which Slurm's tasks per node cannot say.
    """
    slots = hosts[0].slots
    if other := next((host for host in hosts if host.slots != slots), None):
        raise RefusedError(
            f"{hosts[0].name} has slots={slots} and {other.name} slots={other.slots}: --ntasks-per-node is one number; "
            "give all hosts the same slots"
        )
    # A job that is queued again keeps its number, so it finds its own folder; no other start counts up to such a name.
    folder = f'{shlex.quote(f"{recipe.run.root}/{recipe.run.name}-job")}"$SLURM_JOB_ID"'
    if resume and (newest := folders.newest(recipe.run)):
        folder = shlex.quote(str(newest))
    options = [
        *(f"--job-name={shlex.quote(recipe.run.name)}", f"--nodes={len(hosts)}", f"--ntasks-per-node={slots}"),
        *([] if recipe.grid.backend == "gloo" else [f"--gpus-per-node={slots}"]),
        f"--time={LONGEST}",
        f"--cpus-per-task={splits.workers(recipe.data, splits.STREAMING, 1) + 1}",
        *(f"--signal=USR1@{_SAVE_SECONDS}", "--requeue", "--open-mode=append"),
    ]
    ranks = 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"'
    train = shlex.join([sys.executable, "-m", "hsvit_ds.train", str(path)])
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # not that of another job",
            f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(ranks)} rank \\",
            f"  {train} --run {folder} {shlex.join(overrides)}".rstrip(),
            "code=$?",
            f'[ $code -eq {Exit.STOPPED} ] && scontrol requeue "$SLURM_JOB_ID"  # saved and stopped as asked',
            "exit $code",
        ]
    )
