"""The line that moves on a terminal: as wide as there is room, gone or whole when something is printed above it."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from itertools import product

import pytest
from rich.console import Console

from hsvit_ds.run.report import Line

from ..ranks import ROOT, environment

WIDTHS = (20, 40, 80, 160)
SCRIPT = """
import os, sys, time
from hsvit_ds.errors import Log, tell, warn
from hsvit_ds.run.report import Reporter
state = [0, "starting the data workers"]
log = Log(False)
with log.kept():
    report = Reporter(True, 350, 0, lambda: tuple(state))
    def look(): report._live.refresh(); os.write(report.console.file.fileno(), b"\\x07")
    look()
    report.say("a line that is longer than eighty columns, " * 3)
    look()
    for step in (10, 20):
        state[:] = step, f"step {step + 1}: waiting for images"
        report.step(step, {"train/loss": 0.123456, "perf/images_per_sec": 271.3})
        look()
        warn(f"something at {step}")
    report.evaluated("val", 97.918)
    look()
    state[1] = "evaluating val after step 20"
    report.say("epoch 1")
    look()
    report.close()
    report.say("the end")
"""


class Screen:
    """What a terminal of a width shows, as far as it gets the codes that rich sends for one line."""

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.row, self.column = width, [""], 0, 0

    def feed(self, text: str) -> None:
        for code, letter in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|(.)", text, re.DOTALL):
            if code == "\x1b[2K":
                self.lines[self.row] = ""
            elif code == "\x1b[1A":
                self.row -= 1
            elif code and code[-1] not in "mhl":
                raise AssertionError(f"not known here: {code!r}")
            elif letter == "\r":
                self.column = 0
            elif letter == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row == len(self.lines))
            elif letter:
                if self.column == self.width:
                    self.feed("\n")
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
                self.column += 1


def run(width: int) -> list[list[str]]:
    """The lines on a terminal at every look, and at the end."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    variables = environment(TERM="xterm")
    variables.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=variables, stdin=its, stdout=its, stderr=its
    )
    os.close(its)
    text = b""
    while True:
        try:
            text += os.read(ours, 1 << 16)
        except OSError:  # its end
            break
    os.close(ours)
    assert process.wait() == 0, text.decode()
    screen, looks = Screen(width), []
    for part in text.decode().split("\x07"):
        screen.feed(part)
        looks.append([line.rstrip() for line in screen.lines[: screen.row + 1]])
    return looks


@pytest.mark.heavy
@pytest.mark.parametrize("width", [80, 160])
def test_the_line_is_whole_below_what_is_printed_and_gone_at_the_end(width: int) -> None:
    looks = run(width)
    last = [look[-1] for look in looks]
    assert re.fullmatch(r"step 0/350 [━╸╺]+  starting the data workers", last[0])
    assert re.fullmatch(r"step 10/350 [━╸╺]+  loss 0.1235  271 images/s  \w+ left", last[2])
    assert re.fullmatch(r"step 20/350 [━╸╺]+  loss 0.1235  val top-1 97.92  271 images/s  \w+ left", last[4])
    assert re.fullmatch(r"step 20/350 [━╸╺]+  evaluating val after step 20  \w+ left", last[5])
    for line in last[:-1]:
        assert len(line) <= width - 3  # and ^C
        assert len(re.findall("[━╸╺]", line)) >= 8
    said = "a line that is longer than eighty columns, " * 3
    assert "".join(looks[-1]).replace(" ", "") == (
        f"{said}hsvit: warning: something at 10hsvit: warning: something at 20epoch 1the end".replace(" ", "")
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_the_line_never_wraps(width: int) -> None:
    for steps, loss, speed, doing in product(
        (9, 1_234_567), ("", "loss 123456.7890"), ("", "1,234,567 images/s"), ("step 1: waiting", "evaluating " * 20)
    ):
        line = Line(steps, lambda done=steps, doing=doing: (done, doing))  # type: ignore[misc]
        line.loss, line.speed, line.top1, line.left = loss, speed, "validation top-1 100.00", "123h59m left"
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        console.print(line, end="")
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "\n" not in shown.rstrip("\n")
        assert len(shown.rstrip("\n")) <= width - 3  # and ^C
        assert shown.startswith(f"step {steps:,}/"[: width - 4])
