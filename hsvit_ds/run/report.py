"""What a person sees of a run: a progress line, plain lines, a closing table and the curves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .. import models
from ..errors import has_screen, out
from ..models.slimmable import Mix, Width

SIDE = "side: the end of each layer's channels that a width takes; GMACs: billions of multiply-adds of an image"

SHORTEST, LONGEST = 8, 40
"""Columns of a bar."""


class Kernels(logging.Handler):
    """Says which implementation hsvit_kernels has chosen, as it logs each choice once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.say, self.logger = say, logging.getLogger("hsvit_kernels")
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())

    def close(self) -> None:
        self.logger.removeHandler(self)
        super().close()


class Voice(Console):
    """A console on which names stay as they are: no brackets or colons in them are markup."""

    def __init__(self) -> None:
        super().__init__(file=out(), highlight=False, soft_wrap=True, markup=False, emoji=False)

    def show_cursor(self, show: bool = True) -> bool:
        """It stays: a rank that is killed could not bring it back."""
        return False

    def on_broken_pipe(self) -> None:
        """Who listened is gone, as a launcher that was stopped; rich would end the rank, which still has to save."""
        self.quiet = True


class Line:
    """A terminal's last line: how far a run is, and what it is doing. Never wider than the terminal: the bar shrinks,
    then what says least is left out.

    now: gives the steps done, and what is being done.
    """

    def __init__(self, steps: int, now: Callable[[], tuple[int, str]]) -> None:
        self.steps, self.now = steps, now
        self.loss = self.top1 = self.speed = self.left = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        done, doing = self.now()
        whole = options.max_width - 2  # a terminal shows Ctrl-C as ^C, behind it
        steps = f"step {done:,}/{self.steps:,}"[: whole - 2]
        step, colon, what = doing.partition(": ")
        if colon and step.startswith("step") and self.loss:
            parts = {"loss": self.loss, "top1": self.top1, "speed": self.speed, "left": self.left}
        else:
            parts = {"doing": what or doing, "left": self.left}
        room, text = whole - len(steps) - 1, ""
        for missing in ("", "speed", "top1", "loss"):
            parts.pop(missing, "")
            text = "".join(f"  {part}" for part in parts.values() if part)
            if len(text) + SHORTEST < room:
                break
        yield Text(f"{steps} ", end="", no_wrap=True, overflow="crop")
        if (width := min(room - len(text) - 1, LONGEST)) >= SHORTEST:
            yield from console.render(ProgressBar(self.steps, done, width), options)
        yield Text(text[: max(room - 1, 0)], end="", no_wrap=True, overflow="crop")


class Reporter:
    """Rank 0's voice: one moving line on a terminal, a line an interval elsewhere; silent on other ranks.

    Args:
        steps, done: of the run. now: see `Line`.
    """

    def __init__(
        self, speaks: bool, steps: int, done: int, now: Callable[[], tuple[int, str]] = lambda: (0, "")
    ) -> None:
        self.speaks, self.steps = speaks, steps
        self._since = done, time.perf_counter()
        self.console = Voice()
        self._kernels = Kernels(self.say)
        self._line = Line(steps, now)
        self._live: Live | None = None
        if speaks and has_screen():
            self._live = Live(
                self._line, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()

    def say(self, line: str) -> None:
        if self.speaks:
            self.console.print(line)

    def evaluated(self, split: str, top1: float) -> None:
        """Show it from now on."""
        self._line.top1 = f"{split} top-1 {top1:.2f}"

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Report that `done` steps of the run are done."""
        if not self.speaks:
            return
        first, since = self._since
        left = (time.perf_counter() - since) / max(done - first, 1) * (self.steps - done)
        line = self._line
        line.loss = f"loss {metrics['train/loss']:.4f}"
        line.speed = f"{metrics['perf/images_per_sec']:,.0f} images/s"
        line.left = f"{duration(left)} left"
        if self._live is None:
            self.say(f"step {done}/{self.steps}  {line.loss}  {line.speed}  {line.left}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self.speaks:
            table = Table(*columns)
            for row in rows:
                table.add_row(*row)
            self.console.print(table)

    def close(self) -> None:
        self._kernels.close()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def summary(self, rows: Mapping[str, str]) -> None:
        """The closing table."""
        self.close()
        if self.speaks:
            table = Table(show_header=False)
            for name, value in rows.items():
                table.add_row(name, value)
            self.console.print(table)


def duration(seconds: float) -> str:
    """Seconds as 12s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


@dataclass(frozen=True)
class WidthRow:
    """One subnet. macs: multiply-adds of an image. top1: %. trained: whether the run trained this width, of a mix those
    of all layers."""

    width: Width
    parameters: int
    macs: int
    top1: float
    trained: bool

    @property
    def name(self) -> str:
        return width_name(self.width, self.trained)


def width_name(width: Width, trained: bool) -> str:
    """0.50, 0.40625 (untrained) or 0.25x3,1.00 (mix)."""
    kinds = ["untrained"] * (not trained) + ["mix"] * isinstance(width, Mix)
    return f"{width} ({' '.join(kinds)})" if kinds else str(width)


def width_rows(
    model: models.Model, widths: Sequence[Width], found: Mapping[str, float], trained: Sequence[Width]
) -> list[WidthRow]:
    """A row for each width, from an evaluation's metrics. trained: the widths that the run trained."""
    return [
        WidthRow(
            width,
            models.parameters(model, width),
            models.macs(model, width),
            found.get(f"top1_w{width}", found["top1"]),
            set(width.each) <= set(trained),
        )
        for width in widths
    ]


def print_widths(rows: Sequence[WidthRow], title: str) -> None:
    """A table of every subnet's size and accuracy; a GMAC is a billion multiply-adds, the Scala paper's GFLOP."""
    table = Table("width", "side", "parameters", "GMACs", "top-1, %", title=title, caption=SIDE)
    for row in rows:
        side = "all" if row.width.is_full else row.width.side
        table.add_row(row.name, side, f"{row.parameters:,}", f"{row.macs / 1e9:.4f}", f"{row.top1:.2f}")
    Voice().print(table)


@dataclass(frozen=True)
class PresentRow:
    """So many submodules that answered. top1: %, of each subset of this size that was scored."""

    present: int
    top1: tuple[float, ...]


def present_rows(subsets: Sequence[Sequence[int]], top1: Sequence[float]) -> list[PresentRow]:
    """A row for each size of the subsets, from the top-1 of each."""
    by_size: dict[int, list[float]] = {}
    for subset, score in zip(subsets, top1, strict=True):
        by_size.setdefault(len(subset), []).append(score)
    return [PresentRow(size, tuple(scores)) for size, scores in sorted(by_size.items())]


def print_present(rows: Sequence[PresentRow], title: str) -> None:
    """A table of the accuracy by how many submodules answered."""
    table = Table("submodules present", "subsets", "lowest", "mean", "highest top-1, %", title=title)
    for row in rows:
        scores = (min(row.top1), mean(row.top1), max(row.top1))
        table.add_row(str(row.present), str(len(row.top1)), *(f"{score:.2f}" for score in scores))
    Voice().print(table)


def print_memory(memory: Mapping[str, int], title: str) -> None:
    """A table of bytes by what they are for."""
    table = Table("of a rank", "MiB", title=title)
    for name, size in memory.items():
        table.add_row(name.replace("_", " "), f"{size / 2**20:,.1f}")
    Voice().print(table)
