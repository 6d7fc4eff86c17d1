"""What `tracking.profile` writes: the spans of every rank, one file each in the run's folder, a line a step.

`results/profile.py` reads them.
"""

from __future__ import annotations

import json
import re
import resource
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from .. import spans
from ..errors import RefusedError
from ..grid.grid import Grid
from ..spans import Span
from .clock import Clock
from .interval import peak_flops

FOLDER = "profile"
WARM = 10
"""Steps before the first one that is traced: kernels are chosen in them, caches filled, graphs captured."""
COUNTED = 2
"""Steps behind the traced ones, whose operations rank 0 counts."""

KINDS = {
    "convolutions": r"conv",
    "matrix products": r"mm$|linear$|attention",
    "copies and casts": r"^copy_$",
    "concatenations": r"^cat$",
    "normalisation": r"norm",
    "softmax": r"softmax",
    "pooling": r"pool",
    "collectives": r"c10d|gloo|nccl",
}
"""What PyTorch's operations are by their names, a backward's with what it is the backward of."""
OTHERS = "others"


class TracedError(Exception):
    """All steps that were asked for are traced: the run ends."""


class _Step(NamedTuple):
    number: int
    start: Any
    end: Any
    macs: int
    spans: list[Span]


class Profile:
    """Traces `steps` steps of a run on this rank, after `WARM` others.

    Args:
        folder: of the run.
    """

    def __init__(self, steps: int, folder: Path, grid: Grid) -> None:
        self.steps, self.grid, self._done = steps, grid, 0
        self._pending: list[_Step] = []
        self._operations: Any = None
        if not steps:
            return
        self._file = grid.together(lambda: self._opened(folder / FOLDER / file_name(grid.rank)))

    def _opened(self, path: Path) -> TextIO:
        try:
            path.parent.mkdir(exist_ok=True)
            return path.open("w", encoding="utf-8")
        except OSError as error:
            raise RefusedError(f"tracking.profile = {self.steps}: {path}: {error.strerror}; set run.root") from error

    def ended(self, step: int, flops: Callable[[int], int]) -> None:
        """Step `step` is done, with all that lies between it and the next, on all ranks. flops: gives a step's, of all
        ranks, by its number from 0.

        Raises:
            TracedError: it was the last one.
        """
        self._done += 1
        if self._done == WARM:
            self._begin()
        elif WARM < self._done <= WARM + self.steps:
            self._note(step, flops)
            if self._done == WARM + self.steps:
                spans.record(None)
                self._count()
        elif self._done == WARM + self.steps + COUNTED:
            raise TracedError

    def _begin(self) -> None:
        if self.grid.device.type == "cuda":
            torch.cuda.synchronize(self.grid.device)
        self.clock, began = Clock(self.grid.device), time.time()
        self.grid.barrier()
        met = self.clock.mark()
        self._write(
            rank=self.grid.rank,
            ranks=self.grid.size,
            host=socket.gethostname(),
            device=str(self.grid.device),
            replica=self.grid.replica,
            submodule_rank=self.grid.submodule_rank,
            began=began,
            met=self.clock.seconds(met),
            peak=peak_flops(self.grid.device),
        )
        self._recorder = spans.Recorder(self.clock.mark)
        spans.record(self._recorder)
        self._last = self.clock.mark()

    def _note(self, step: int, flops: Callable[[int], int]) -> None:
        """Write down the steps whose times are known: on a GPU the last ones may not be."""
        taken = self._recorder.take()
        self._pending.append(_Step(step, self._last, self.clock.mark(), flops(step - 1) // 2, taken))
        while self._pending and self.clock.is_past(self._pending[0].end):
            self._write_step(self._pending.pop(0))
        self._last = self.clock.mark()  # what was done here is no step's

    def _write_step(self, step: _Step) -> None:
        seconds = self.clock.seconds
        self._write(
            step=step.number,
            start=seconds(step.start),
            end=seconds(step.end),
            macs=step.macs,
            spans=[(part, depth, seconds(start), seconds(end)) for part, depth, start, end in step.spans],
        )

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _count(self) -> None:
        """Have PyTorch's profiler note the operations from here on."""
        if not self.grid.is_main:
            return
        activities = [ProfilerActivity.CPU]
        if self.grid.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._operations = torch.profiler.profile(activities=activities)
        self._operations.start()

    def close(self) -> None:
        """Write down what is left, at the run's end, whyever it ends."""
        spans.record(None)
        if not self.steps:
            return
        for step in self._pending:
            self._write_step(step)
        if self._operations is not None:
            self._operations.stop()
            self._write(counted=self._done - WARM - self.steps, operations=_by_kind(self._operations))
        self._write(memory=_most_memory(self.grid.device))
        self._file.close()


def file_name(rank: int) -> str:
    """Of a rank's spans, in the folder of a run's profile."""
    return f"rank-{rank:04d}.jsonl"


def _most_memory(device: torch.device) -> int:
    """Bytes that the process, or what it has on a GPU, took at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _by_kind(profiled: Any) -> dict[str, tuple[float, int]]:
    """{kind: (seconds, calls)} of operations, without those that they call."""
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    on_gpu = ProfilerActivity.CUDA in profiled.activities
    for event in profiled.key_averages():
        if event.device_type != DeviceType.CPU:  # a kernel: what launched it has its time too
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds, calls = found[kind := _kind(event.key)]
        found[kind] = seconds + spent / 1e6, calls + event.count
    return dict(found)


def _kind(operation: str) -> str:
    name = operation.removeprefix("aten::")
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHERS)
