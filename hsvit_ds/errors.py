"""How a person is told things: what is counted in words, what is wrong in one line with an exit code, a stack trace
only when asked for, and what libraries print in a file."""

from __future__ import annotations

import codecs
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from enum import IntEnum
from pathlib import Path
from typing import TextIO


class Exit(IntEnum):
    """How a training process, and `hsvit launch`, ends."""

    FINISHED = 0
    FAILED = 1
    """The run cannot go on, or a defect, which shows its stack trace."""
    REFUSED = 2
    """Bad input, before the first step."""
    STOPPED = 75
    """SIGTERM, SIGUSR1 or Ctrl-C: saved; `--resume` continues."""
    LOST = 76
    """Another rank, or the link to it, is gone."""
    STUCK = 77
    """No step within run.watchdog seconds; all stacks are in the run's errors/."""


class RefusedError(Exception):
    """Bad input, or a run that cannot go on: the thing, its value, and what would be right."""


LOGIN = re.compile(r"://[^/\s:@]+:[^/\s]*@")
_ASSIGNED = re.compile(r"(\S*(?:password|token|secret|credential|key)[^\s=]*=)\S+", re.IGNORECASE)


def masked(text: str) -> str:
    """Without the logins in URLs and the values of what is called a password, token, secret, credential or key."""
    return _ASSIGNED.sub(r"\1***", LOGIN.sub("://***@", text))


def counted(number: int, noun: str, plural: str = "") -> str:
    """1 replica, 2 replicas."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def first_line(error: Exception) -> str:
    """What a foreign error says, short enough for a line of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def read_text(path: Path) -> str:
    """A file that a person wrote, in UTF-8, or in UTF-16 as its byte-order mark says.

    Raises:
        RefusedError: in another encoding.
        OSError: not readable.
    """
    data = path.read_bytes()
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RefusedError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not {'UTF-16' if is_wide else 'UTF-8'} "
            "(Latin-1 or another encoding?); save the file as UTF-8"
        ) from None


def show_everything() -> None:
    """Print what the terminal's encoding lacks as escapes; Python would end the program at a foreign name."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Others(io.TextIOBase):
    """What libraries print: on the terminal until a file is opened for it, then there."""

    encoding = "utf-8"

    def __init__(self, real: TextIO) -> None:
        self.real, self.log = real, -1

    def write(self, text: str) -> int:
        if self.log < 0:
            return self.real.write(text)
        with suppress(OSError):  # a full disk ends no run
            os.write(self.log, text.encode("utf-8", "backslashreplace"))
        return len(text)

    def flush(self) -> None:
        if self.log < 0:
            self.real.flush()

    def fileno(self) -> int:
        return self.real.fileno() if self.log < 0 else self.log

    def writable(self) -> bool:
        return True


class Log:
    """A rank's file of what libraries print, so that its terminal has what is said to a person.

    What they print by Python, and on file descriptor 1; on number 2 while a run is set up, when they start compilers.
    Later that stays the terminal's: what a process says that crashes has no other way to be seen.

    Args:
        debug: on the terminal too.
    """

    def __init__(self, debug: bool) -> None:
        self.debug, self._descriptors = debug, (os.dup(1), os.dup(2))
        self.out, self.err = _other_descriptor(sys.stdout), _other_descriptor(sys.stderr)
        self._others = Others(self.out), Others(self.err)

    def open(self, path: Path) -> None:
        """Append to it from now on."""
        try:
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            warn(f"{path}: {error.strerror}; what libraries print stays on the terminal")
            return
        if self.debug:
            # A process of its own, so that nothing is lost when this one crashes.
            copies = subprocess.Popen(["tee", "-i", "-a", str(path)], stdin=subprocess.PIPE, stdout=self.err)
            assert copies.stdin is not None
            os.dup2(copies.stdin.fileno(), file)
        for stream in self._others:
            stream.log = file
        os.dup2(file, 1)
        os.dup2(file, 2)

    def is_set_up(self) -> None:
        """File descriptor 2 is the terminal's again."""
        os.dup2(self._descriptors[1], 2)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the block it takes what libraries print."""
        global _log
        before = sys.stdout, sys.stderr, threading.excepthook
        _log, threading.excepthook = self, _thread_failed
        sys.stdout, sys.stderr = self._others
        try:
            yield
        finally:
            _log = None
            sys.stdout, sys.stderr, threading.excepthook = before
            for number, descriptor in enumerate(self._descriptors, 1):
                os.dup2(descriptor, number)


_log: Log | None = None


def _other_descriptor(stream: TextIO) -> TextIO:
    """The same place by a file descriptor of its own, where the stream is a file."""
    try:
        return open(os.dup(stream.fileno()), "w", 1, stream.encoding, "backslashreplace")
    except (OSError, ValueError):
        return stream


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    with redirect_stderr(err()):
        threading.__excepthook__(failure)


def out() -> TextIO:
    """Standard output for a person."""
    return _log.out if _log is not None else sys.stdout


def err() -> TextIO:
    """Standard error for a person."""
    return _log.err if _log is not None else sys.stderr


def has_screen() -> bool:
    """Whether standard output is a terminal that only what is said to a person appears on, so that a bar can move."""
    return (
        out().isatty() and not (_log is not None and _log.debug) and os.environ.get("TERM") not in ("dumb", "unknown")
    )


def tell(text: str) -> None:
    """Print on standard error, over the bar of any rank, which is drawn again below."""
    with suppress(OSError):  # who listened may be gone
        print(f"{erased()}{text}", file=err(), flush=True)


def erased() -> str:
    """What removes a line that a terminal shows at the end."""
    return "\r\x1b[2K" if err().isatty() and has_screen() else ""


def warn(message: str) -> None:
    tell(f"hsvit: warning: {message}")


@contextmanager
def shown(code: int, debug: bool) -> Iterator[None]:
    """Turn a refusal into one line and exit code `code` (2 before training, 1 during it).

    Ranks of one host are refused for the same reasons, so the first of them speaks. Anything that is not a refusal
    keeps its stack trace: it is a defect, and the trace is what has to be reported.
    """
    show_everything()
    try:
        yield
    except RefusedError as error:
        if debug:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            tell(f"hsvit: error: {error}")
        raise SystemExit(code) from None
