"""Moments by the clock of whatever computes the steps."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """The host's clock, or on a GPU the moments at which it reaches what the host has given it so far."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began = self._now()

    def mark(self) -> Any:
        """This moment; None while a CUDA graph is recorded, which has no time."""
        return None if self._on_gpu and torch.cuda.is_current_stream_capturing() else self._now()

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_past(self, mark: Any) -> bool:
        """Whether a moment has been reached, so that its time is known."""
        return bool(mark.query()) if self._on_gpu else True

    def seconds(self, mark: Any) -> float:
        """Of a moment since this clock was made; waits for a GPU that has not reached it."""
        if not self._on_gpu:
            return float(mark - self._began)
        mark.synchronize()
        return float(self._began.elapsed_time(mark)) / 1000
