"""The cells of a sweep, some at a time, until all have ended; one that fails stops no other."""

from __future__ import annotations

import fcntl
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ..errors import RefusedError
from ..run.processes import Share, Stops
from ..run.summary import FAILED
from .cells import Cell, Sweep
from .jobs import Ended, Job, Launcher
from .parents import Parents

LOCK = "sweep.lock"
STOP_SECONDS = 300
"""That cells may take to save and end."""
_LOOK = 0.2  # s


class Screen(Protocol):
    """Who is told."""

    def started(self, job: Job) -> None: ...

    def waits(self, job: Job) -> None: ...

    def ended(self, job: Job, ended: Ended) -> None: ...

    def stopping(self, jobs: Sequence[Job], kills: bool) -> None: ...

    def going_on(self, jobs: Sequence[Job]) -> None: ...


@contextmanager
def held(sweep: Sweep) -> Iterator[None]:
    """Within the block, and at most until this process's end, no other sweep starts these cells.

    Raises:
        RefusedError: another one is at it, or the folder cannot be made.
    """
    try:
        sweep.logs.mkdir(parents=True, exist_ok=True)
        lock = (sweep.folder / LOCK).open("a")
    except OSError as error:
        raise RefusedError(f"{sweep.folder}: {error.strerror}; set run.root in [keys]") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                f"{sweep.folder}: another `hsvit sweep` is at it; wait for it, or stop it first"
            ) from None
        except OSError as error:
            raise RefusedError(
                f"{sweep.folder / LOCK}: cannot be locked ({error.strerror}); set run.root in [keys]"
            ) from error
        yield


class Pool:
    """Args: shares: of this machine, each for a cell at a time. hostfile: of the hosts that take them instead."""

    def __init__(self, sweep: Sweep, shares: Sequence[Share], hostfile: Path | None, screen: Screen) -> None:
        self.sweep, self._free, self._screen = sweep, list(shares), screen
        self._hostfile = hostfile
        self._going_on: list[Job] = []
        self.ended: dict[str, Ended] = {}
        """By the cell's name, in the order of their ends."""

    def run(self, stops: Stops) -> None:
        """Until all have ended, or those that go on have stopped as asked."""
        parents, status = Parents(self.sweep), "KILLED"
        try:
            self._run(Launcher(self._hostfile, parents), stops)
            if any(ended.state == FAILED for ended in self.ended.values()):
                status = "FAILED"
            elif all(cell.is_finished for cell in self.sweep.cells):
                status = "FINISHED"
        finally:
            parents.end(status)

    def _run(self, launcher: Launcher, stops: Stops) -> None:
        waiting = deque(cell for cell in self.sweep.cells if not cell.is_finished)
        requests = 0
        while waiting or self._going_on:
            while waiting and self._free and not stops.count:
                self._start(waiting.popleft(), launcher)
            if stops.count:
                waiting.clear()
                late = time.monotonic() - stops.since > STOP_SECONDS
                if (wanted := 2 if stops.count > 1 or late else 1) > requests:
                    requests = wanted
                    self._stop(kills=requests == 2)
            for job in list(self._going_on):
                waited = job.waits
                if ended := job.advance():
                    self._end(job, ended)
                elif waited and not job.waits:
                    self._screen.started(job)
            self._screen.going_on(self._going_on)
            time.sleep(_LOOK)

    def _start(self, cell: Cell, launcher: Launcher) -> None:
        job = Job(cell, self._free.pop(0), launcher, self.sweep.logs)
        ended = job.advance()
        if ended:
            self._free.insert(0, job.share)
            self.ended[cell.name] = ended
            return
        self._going_on.append(job)
        (self._screen.waits if job.waits else self._screen.started)(job)

    def _stop(self, kills: bool) -> None:
        self._screen.stopping(self._going_on, kills)
        for job in self._going_on:
            if kills:
                job.kill()
            else:
                job.ask()

    def _end(self, job: Job, ended: Ended) -> None:
        self._going_on.remove(job)
        self._free.append(job.share)
        self.ended[job.cell.name] = ended
        self._screen.ended(job, ended)
