"""What travels from the order of samples to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hsvit_kernels.random import Draw

PADDING, UNREADABLE = -2, -1
"""Labels in evaluation: of what only fills up a batch, and of an image that could not be read."""


class Job(NamedTuple):
    """The images of one forward, as a worker is asked for them.

    samples: int64 [n], their numbers in the index. copies: int64 [n], which repetition of the sample it is.
    """

    epoch: int
    samples: Tensor
    copies: Tensor


class Images(NamedTuple):
    """What a worker answers.

    pixels: uint8 [n, C, H, W]. labels: int64 [n]. views: fp32 [n, 8], what the device still has to cut out of
    `pixels` (see `augment.VIEW`), or [n, 0]. bad: file, member and reason of
    each that could not be read. refused: why the worker stopped, empty if it did not.
    """

    pixels: Tensor
    labels: Tensor
    views: Tensor
    bad: list[str]
    refused: str = ""


@dataclass(frozen=True)
class Batch:
    """One micro batch of a replica: the same on all its ranks.

    images: uint8 [b, C, H, W] on the device. labels: int64 [b] on the device. views: as in `Images`, on the device.
    index: int64 [b], where each sample stands in the global batch. seed, step: of the run, for the randomness.
    """

    images: Tensor
    labels: Tensor
    views: Tensor
    index: Tensor
    seed: int
    step: int

    def draw(self, pass_: int, device: torch.device | str = "cpu") -> Draw:
        """The randomness of pass `pass_` over this batch."""
        return Draw.of(self.seed, self.step, pass_, image=self.index, device=device)
