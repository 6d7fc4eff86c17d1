"""Real ranks for the tests: processes on this machine, over gloo, started without a launcher's import time."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "recipes/studies").rglob("*.toml"))
"""Every sweep of the tree."""
RECIPES = sorted({*(ROOT / "recipes").rglob("*.toml")} - {*STUDIES})
"""Every recipe of the tree."""
allowed = True
"""Whether the test that runs is marked for what it costs."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, one thread a rank."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in launcher}
    return env | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)} | extra


def places(world: int) -> list[dict[str, str]]:
    """What a launcher tells each rank."""
    assert allowed, "mark the test with pytest.mark.heavy: it starts ranks"
    port = str(free_port())
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(world)
    ]


def start(module: str, arguments: list[str], world: int, **extra: str) -> list[subprocess.Popen[str]]:
    """`python -m module arguments` on `world` ranks; stdout and stderr are piped together."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment(**place, **extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in places(world)
    ]


@cache
def server() -> str:
    """The socket of `tests.server`, started at the first use."""
    path = Path(tempfile.mkdtemp(prefix="hsvit-ranks-")) / "socket"
    command = [sys.executable, "-m", "tests.server", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE)
    while not path.exists():
        if process.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        time.sleep(0.05)

    def end() -> None:
        process.communicate()
        path.unlink()
        path.parent.rmdir()

    atexit.register(end)
    return str(path)


class Forked:
    """A rank that the server forked; what the tests use of `subprocess.Popen`."""

    def __init__(self, module: str, arguments: list[str], env: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.output: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(server())
        request = json.dumps({"environment": env, "arguments": [module, *arguments]})
        socket.send_fds(self.connection, [request.encode()], [self.output.fileno()])
        self.lines = self.connection.makefile()
        self.pid = int(self.lines.readline())
        self.ended = select.poll()  # select.select() knows 1,024 files, and a process of many tests has more
        self.ended.register(self.connection, select.POLLIN)

    def poll(self) -> int | None:
        if self.returncode is None and self.ended.poll(0):
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self.ended.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0)
            self.returncode = int(self.lines.readline())
            self.lines.close()
            self.connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        self.output.seek(0)
        return self.output.read(), None

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def fork(module: str, arguments: list[str], world: int) -> list[Forked]:
    """As `start`, but seconds earlier: the ranks have everything imported."""
    return [Forked(module, arguments, environment(**place)) for place in places(world)]


def finish(ranks: list[subprocess.Popen[str]] | list[Forked], timeout: float = 240) -> str:
    """Wait for every rank; the output of all, or an error that holds it."""
    outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    codes = [rank.returncode for rank in ranks]
    if any(codes):
        raise AssertionError(f"exit codes {codes}\n" + "\n".join(o[-4000:] for o in outputs))
    return "\n".join(outputs)


def work(worker: str, world: int, folder: Path, arguments: Any, **extra: str) -> list[Any]:
    """Run `tests.workers.<worker>` on `world` ranks; what each returned. extra: variables, for unforked processes."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments.json").write_text(json.dumps(arguments))
    command = [worker, str(folder)]
    finish(start("tests.workers", command, world, **extra) if extra else fork("tests.workers", command, world))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def assert_same_run(found: list[Any], expected: Any, tolerance: float) -> None:
    """What the ranks of `tests.workers.steps` made of a case is what one process did: gradient norms, and all state."""
    import torch

    for rank in found:
        torch.testing.assert_close(rank["norms"], expected["norms"], rtol=1e-6, atol=0)
    written = {key: tensor for rank in found for key, tensor in rank["state"].items()}
    assert written.keys() == expected["state"].keys()
    for key, tensor in expected["state"].items():
        said = partial("{}: {}".format, key)
        torch.testing.assert_close(written[key], tensor, rtol=tolerance, atol=tolerance, msg=said)
