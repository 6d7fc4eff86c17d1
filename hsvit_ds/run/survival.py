"""How a run on this rank ends before its time: asked to stop, stuck, or failed; always with a word about why."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from ..errors import Exit, RefusedError, erased, err, first_line, out, tell
from ..grid.grid import Grid
from .summary import ERRORS

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What launchers send at their end, Slurm some time before it, and a terminal at Ctrl-C."""
_HEARD = "hsvit: saves and stops after this step; Ctrl-C again kills\n"


class StoppedError(Exception):
    """All ranks have agreed to stop, since one was asked to."""


class StopRequests:
    """SIGTERM, SIGUSR1 and SIGINT to any rank, on which all agree; a second SIGINT kills.

    The question is sent at one step and answered at the next, beside whatever else travels: it costs no waiting.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid, self.asked, self.agreed = grid, False, False
        self._answer: Callable[[], bool] | None = None

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within the block the signals are requests; in the main thread only."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        # SIGINT that is ignored stays so: a script's background job does not hear the terminal.
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items():  # who has saved is not to be killed by a late request
                signal.signal(number, signal.SIG_IGN if self.agreed else handler)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            # Of SIGINT alone: DeepSpeed's launcher answers one Ctrl-C, which reaches the ranks too, with a SIGTERM.
            signal.signal(number, signal.SIG_DFL)
            if self.grid.is_main:
                with suppress(OSError):  # not by print, which may be what was interrupted
                    os.write(2, f"{erased()}{_HEARD}".encode())

    def check(self) -> None:
        """Between two steps, or two batches of an evaluation. Collective.

        Raises:
            StoppedError: on all ranks at the same call.
        """
        self.agreed = self._answer is not None and self._answer()
        if self.agreed:
            raise StoppedError
        self._answer = self.grid.any_rank(self.asked)


class Watch:
    """What this rank is doing, and a thread that ends it when that takes too long.

    Args:
        folder: of the run. limit: seconds that one thing may take; 0: for ever. step: steps that are done.
    """

    def __init__(self, folder: Path, grid: Grid, limit: float, step: int = 0) -> None:
        self.folder, self.grid, self.limit = folder, grid, limit
        self.step, self.now, self.since = step, "starting", time.monotonic()
        self._ended = threading.Event()

    def doing(self, what: str, step: int | None = None) -> None:
        """step: steps that are done."""
        self.step = self.step if step is None else step
        self.now, self.since = what, time.monotonic()

    def state(self) -> tuple[int, str]:
        """The steps that are done, and what is being done."""
        return self.step, self.now

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the block this rank is watched."""
        self._ended.clear()
        self.doing(self.now)
        if self.limit:
            threading.Thread(target=self._look, daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()

    def _look(self) -> None:
        while not self._ended.wait(min(1.0, self.limit / 4)):
            if time.monotonic() - self.since > self.limit:
                self._stuck()

    def _stuck(self) -> NoReturn:
        what = (
            f"{self.now} took more than {self.limit:g} s (run.watchdog); last collective: {self.grid.last_collective}"
        )
        stacks = self.folder / ERRORS / f"rank-{self.grid.rank:04d}.stacks.txt"
        try:
            stacks.parent.mkdir(exist_ok=True)
            with stacks.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            tell(f"hsvit: error: {stacks}: {error}")
            faulthandler.dump_traceback(err(), all_threads=True)
        self.say(Exit.STUCK, f"{what}; stacks: {stacks}")
        os._exit(Exit.STUCK)

    def say(self, code: Exit, why: str, trace: str = "") -> None:
        """Print and write down why this rank fails."""
        word = {
            "rank": self.grid.rank,
            "host": socket.gethostname(),
            "time": time.time(),
            "step": self.step,
            "doing": self.now,
            "kind": code.name.lower(),
            "error": why,
            "trace": trace,
        }
        path = self.folder / ERRORS / f"rank-{self.grid.rank:04d}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(word) + "\n", "utf-8")
        except OSError as error:
            why += f" (not written to {path}: {error})"
        tell(f"hsvit: error: rank {self.grid.rank} on {word['host']}: {why}")


@contextmanager
def last_words(watch: Watch, debug: bool) -> Iterator[None]:
    """A failure within the block is told, written down, and ends this process with its exit code.

    What is a defect shows its stack trace; refusals and lost ranks do for `debug` only.
    """
    try:
        yield
    except BaseException as error:
        code = Exit.LOST if is_lost(error) else Exit.FAILED
        trace = "".join(traceback.format_exception(error))
        if debug or not (code == Exit.LOST or isinstance(error, RefusedError)):
            tell(trace)
        what = "" if isinstance(error, RefusedError) else f"{watch.now}: "
        watch.say(code, f"{what}{'lost other ranks: ' if code == Exit.LOST else ''}{told(error)}", trace)
        if watch.grid.size == 1:
            raise SystemExit(int(code)) from None
        with suppress(OSError):
            out().flush()
        os._exit(code)  # without destructors: gloo aborts in them when other ranks are gone


def is_lost(error: BaseException) -> bool:
    """Whether it says that other ranks, or the link to them, are gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and bool(re.search(r"gloo|Connection (closed|reset)|Broken pipe", text))


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # of a CPU's allocator


def told(error: BaseException) -> str:
    """One line about an error."""
    if isinstance(error, RefusedError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}" if isinstance(error, Exception) else type(error).__name__
