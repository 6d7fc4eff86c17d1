"""A run's processes on this machine: started with a share of it, asked to save and stop, killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import psutil
import torch

from ..errors import RefusedError, counted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_ERROR = "hsvit: error: "
_PORTS: set[int] = set()  # given to runs of this process, whose ranks may not listen yet


class Stops:
    """Signals that ask for an end of what was started, counted."""

    def __init__(self) -> None:
        self.count, self.since = 0, 0.0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within the block the signals are requests."""
        # A hangup that is ignored (nohup) stays so.
        before = {number: signal.getsignal(number) for number in SIGNALS}
        asked = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        for number in asked:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number in asked:
                signal.signal(number, before[number])

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            self.since = time.monotonic()


@dataclass(frozen=True)
class Share:
    """What a run gets of this machine. cores, gpus: their numbers; none: all of them, as without a share."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()


def shares(jobs: int, ranks: int) -> list[Share]:
    """This machine divided among runs that go on at the same time. ranks: of the largest.

    Raises:
        RefusedError: there is too little of it.
    """
    cores, gpus = _cores(), _gpus()
    for kind, there in (("GPU", len(gpus)), ("core", len(cores) if jobs > 1 else 0)):
        if there and jobs * ranks > there:
            most, needed = there // ranks, counted(jobs * ranks, kind)
            remedy = f"--jobs {most} is the most" if most else "give the cells fewer ranks, or a --hostfile"
            raise RefusedError(
                f"--jobs {jobs} with runs of {counted(ranks, 'rank')} takes {needed}, "
                f"here {'is' if there == 1 else 'are'} {there}; {remedy}"
            )
    each = len(cores) // jobs
    return [
        Share(
            tuple(sorted(cores[job * each : (job + 1) * each])) if jobs > 1 else (),
            tuple(gpus[job * ranks : (job + 1) * ranks]),
        )
        for job in range(jobs)
    ]


def _cores() -> list[int]:
    """Those that this process may use, threads of one core side by side."""

    def place(cpu: int) -> tuple[int, int, int]:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package, core = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
        except (OSError, ValueError):  # a container that hides them
            return 0, cpu, cpu
        return package, core, cpu

    return sorted(os.sched_getaffinity(0), key=place)


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or list(map(str, range(count))))[:count]


def command(recipe: Path, arguments: list[str], ranks: int, gpus: tuple[str, ...] = ()) -> list[str]:
    """What starts the ranks of a run here. arguments: of every rank, beside its recipe."""
    train = ["hsvit_ds.train", str(recipe), *arguments]
    if ranks == 1:
        return [sys.executable, "-m", *train]
    port = find_port()  # of its own: other runs may start at the same moment
    # With a number of accelerators DeepSpeed takes the first ones, whatever CUDA_VISIBLE_DEVICES says.
    which = ["--include", f"localhost:{','.join(gpus[:ranks])}"] if gpus else ["--num_accelerators", str(ranks)]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    # No hostfile: where there is none of the name DeepSpeed looks at /job/hostfile.
    return [deepspeed, "--hostfile", os.devnull, *which, "--master_port", str(port), "--module", *train]


def find_port() -> int:
    """A free one that no run of this process was given: the system names one again once it is closed."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port: int = server.getsockname()[1]
        if port not in _PORTS:
            _PORTS.add(port)
            return port


def complaint(output: str) -> str:
    """What a run said of its failure, of a rank that is not merely lost to the others where there is such; "" for
    nothing. Behind it DeepSpeed's launcher has something to say."""
    lines = [line for line in map(str.strip, output.splitlines()) if line]
    errors = [line.partition(_ERROR)[2] for line in lines if _ERROR in line]
    causes = [error for error in errors if "lost other ranks: " not in error]
    return (causes or errors or lines or [""])[-1]


class Processes:
    """A run that goes on here, in a session of its own: the terminal's Ctrl-C does not reach it.

    Args:
        ranks: that it has here; 0 for `hsvit launch`, which has them on other hosts. output: takes what it says.
    """

    def __init__(self, command: list[str], output: IO[bytes], ranks: int, share: Share | None = None) -> None:
        self._ranks, share = ranks, share or Share()
        environment = dict(os.environ)
        if share.cores:
            environment["OMP_NUM_THREADS"] = str(max(1, len(share.cores) // max(ranks, 1)))
        if share.gpus and ranks == 1:
            environment["CUDA_VISIBLE_DEVICES"] = share.gpus[0]
        with _on(share.cores):
            self._started = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The exit code; None while it goes on."""
        return self._started.poll()

    def ask(self) -> None:
        """To save and stop; what has nothing to save yet ends at once.

        The ranks are asked, not DeepSpeed's launcher, which would kill them half a minute later.
        """
        if self._ranks < 2:
            self._started.terminate()
        elif ranks := self._find_ranks():
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.terminate()
        else:
            self.kill()

    def kill(self) -> None:
        """At once. `hsvit launch` is asked a second time instead: it alone can end ranks on other hosts."""
        if self._started.poll() is not None:
            return
        if self._ranks:
            os.killpg(self._started.pid, signal.SIGKILL)
        else:
            self._started.terminate()

    def wait(self) -> int:
        return self._started.wait()

    def _find_ranks(self) -> list[psutil.Process]:
        found = []
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._started.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if any(word.startswith("--local_rank=") for word in process.cmdline()):
                        found.append(process)
        return found


@contextmanager
def _on(cores: tuple[int, ...]) -> Iterator[None]:
    """What is started within the block has these cores alone, from its first thread on."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
