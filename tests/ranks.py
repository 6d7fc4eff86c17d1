"""Real ranks for the tests: processes on this machine, over gloo, started without a launcher's import time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, one thread a rank."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in launcher}
    return env | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)} | extra


def start(module: str, arguments: list[str], world: int, **extra: str) -> list[subprocess.Popen[str]]:
    """`python -m module arguments` on `world` ranks; stdout and stderr are piped together."""
    port = str(free_port())
    ranks = []
    for rank in range(world):
        env = environment(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            **extra,
        )
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return ranks


def finish(ranks: list[subprocess.Popen[str]], timeout: float = 240) -> str:
    """Wait for every rank; the output of all, or an error that holds it."""
    outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    codes = [rank.returncode for rank in ranks]
    if any(codes):
        raise AssertionError(f"exit codes {codes}\n" + "\n".join(o[-4000:] for o in outputs))
    return "\n".join(outputs)


def work(worker: str, world: int, folder: Path, arguments: Any, **extra: str) -> list[Any]:
    """Run `tests.workers.<worker>` on `world` ranks; what each rank returned."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments.json").write_text(json.dumps(arguments))
    finish(start("tests.workers", [worker, str(folder)], world, **extra))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def assert_same_run(found: list[Any], expected: Any, tolerance: float) -> None:
    """What the ranks of `tests.workers.steps` made of a case is what one process did: gradient norms, and all state."""
    import torch

    for rank in found:
        torch.testing.assert_close(rank["norms"], expected["norms"], rtol=1e-6, atol=0)
    written = {key: tensor for rank in found for key, tensor in rank["state"].items()}
    assert written.keys() == expected["state"].keys()
    for key, tensor in expected["state"].items():
        torch.testing.assert_close(
            written[key], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )
