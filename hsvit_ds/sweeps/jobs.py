"""One cell of a sweep that goes on, by the launcher that a person would start it with."""

from __future__ import annotations

import fcntl
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from ..errors import Exit, RefusedError
from ..run import metrics, summary
from ..run.processes import Processes, Share, command, complaint
from ..run.summary import FAILED, FINISHED, RUNNING, STOPPED
from .cells import Cell
from .parents import Parents

_TAIL = 1 << 14
"""Bytes at the end of a run's metrics that hold its last line."""


class Ended(NamedTuple):
    """How a cell ended. why: of one that did not finish."""

    state: str
    why: str = ""


class Progress(NamedTuple):
    """step: that is done; None where another process has it. top1: of the last validation."""

    step: int | None
    steps: int
    top1: float | None


@dataclass(frozen=True)
class Launcher:
    """What starts cells. hostfile: of other hosts, None for this one."""

    hostfile: Path | None
    parents: Parents

    def start(self, cell: Cell, share: Share, output: IO[bytes]) -> Processes:
        arguments = [*cell.overrides, *self.parents.overrides(cell), "--resume"]
        if self.hostfile is None:
            ranks = cell.plan.ranks
            return Processes(command(cell.path, arguments, ranks, share.gpus), output, ranks, share)
        program = [sys.executable, "-m", "hsvit_ds.cli", "launch", str(cell.path), "--hostfile", str(self.hostfile)]
        return Processes([*program, *arguments], output, 0)


class Job:
    """A cell from its start to its end.

    Its log is its lock: every process of it has the log as standard output, so the lock is held until the last one is
    gone, also when the sweep that started them was killed.

    Args:
        share: of this machine, that it takes.
    """

    def __init__(self, cell: Cell, share: Share, launcher: Launcher, logs: Path) -> None:
        self.cell, self.share, self._launcher = cell, share, launcher
        self.log = logs / f"{cell.name}.log"
        self.began = time.time()
        self._log_began = 0
        self._processes: Processes | None = None
        self._asked = False

    @property
    def waits(self) -> bool:
        """For processes that an earlier sweep, or a person, started."""
        return self._processes is None

    def advance(self) -> Ended | None:
        """Start it where nobody else has it; how it ended, None while it goes on."""
        if self._processes is None:
            return self._start()
        code = self._processes.poll()
        return None if code is None else self._ended(code)

    def _start(self) -> Ended | None:
        if self._asked:
            return Ended(RUNNING, "another process goes on with it")
        if summary.is_held(self.cell.folder):
            return None
        with self.log.open("ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            except OSError as error:
                raise RefusedError(
                    f"{self.log}: cannot be locked ({error.strerror}); set run.root elsewhere"
                ) from error
            if self.cell.is_finished:  # by those that were waited for
                return Ended(FINISHED)
            self._log_began, self.began = log.tell(), time.time()
            self._processes = self._launcher.start(self.cell, self.share, log)
        return None

    def ask(self) -> None:
        """To save and stop."""
        self._asked = True
        if self._processes is not None:
            self._processes.ask()

    def kill(self) -> None:
        if self._processes is not None:
            self._processes.kill()

    def progress(self) -> Progress:
        found = self.cell.summary
        top1 = found.metrics.get(f"{self.cell.recipe.data.val}/top1") if found else None
        return Progress(None if self.waits else _last_step(self.cell.folder), self.cell.plan.steps, top1)

    def _ended(self, code: int) -> Ended:
        found = self.cell.summary
        # An earlier attempt's, where this one was refused before it wrote its own.
        state = found.state if found is not None and found.updated >= self.began else ""
        if state == FINISHED:
            return Ended(FINISHED)
        if state != FAILED and (self._asked or code == Exit.STOPPED):
            return Ended(STOPPED, "asked to")
        with self.log.open("rb") as log:
            log.seek(self._log_began)
            said = complaint(log.read().decode("utf-8", "replace"))
        if code < 0:
            return Ended(FAILED, f"killed by {signal.Signals(-code).name}")
        return Ended(FAILED, said or f"exit code {code}")


def _last_step(folder: Path) -> int:
    """Of a run that goes on."""
    try:
        with (folder / metrics.FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().splitlines()
    except OSError:  # it has not come so far
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # half written
            continue
    return 0
