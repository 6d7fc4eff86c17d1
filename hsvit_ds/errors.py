"""How a person is told things: what is counted in words, what is wrong in one line with an exit code, and a stack trace
only when asked for."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path


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
            print(f"hsvit: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None
