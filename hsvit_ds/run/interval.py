"""What is measured between two logged steps: speed by the clock of whatever computes the steps."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise, zip_longest
from typing import Any

import torch

from ..engine.outcomes import Settled
from .clock import Clock

# Dense bf16 TFLOP/s of one GPU, by a part of its name (vendors' data sheets), for perf/mfu.
_PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362}


class Interval:
    """The steps since the last logged one.

    settled: what became of them. steps: how many there were, also before they are settled.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.settled, self.steps = device, list[Settled](), 0
        self._clock = Clock(device)
        self._seconds = self._waited = 0.0
        self._began = time.perf_counter()
        self._marks: list[Any] = [self._clock.mark()]

    def waits(self) -> None:
        """A step's images are being waited for."""
        self._began = time.perf_counter()

    def works(self) -> None:
        """They are there."""
        self._waited += time.perf_counter() - self._began

    def ended(self) -> None:
        """The step has been given to the device."""
        self._marks.append(self._clock.mark())
        self.steps += 1

    def rests(self) -> None:
        """Something else begins: saving, logging, evaluating."""
        self._seconds += time.perf_counter() - self._began

    def losses(self) -> list[float]:
        """Of each pass of a step, the largest width first, the mean over the steps that have it."""
        places = zip_longest(*(settled.losses for settled in self.settled))
        return [statistics.fmean(loss for loss in place if loss is not None) for place in places]

    def speed(self, images: int) -> dict[str, float]:
        """Of settled steps, with `images` in each."""
        ms = [1000 * (end - start) for start, end in pairwise(map(self._clock.seconds, self._marks))]
        return {
            "perf/images_per_sec": images * self.steps / self._seconds,
            "perf/step_ms_p50": statistics.median(ms),
            "perf/data_wait": self._waited / self._seconds,
        }

    def mfu(self, flops: int) -> dict[str, float]:
        """Share of this GPU's peak that `flops` of all steps are, where the peak is known."""
        peak = peak_flops(self.device)
        return {} if peak is None else {"perf/mfu": flops / self._seconds / peak}


def peak_flops(device: torch.device) -> float | None:
    """Of dense bf16 products, 1/s."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)
