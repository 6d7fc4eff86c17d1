"""Which implementation computes an operation: a kernel in Triton or CUDA C++, or the PyTorch reference."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from . import configurations
from .cases import Case
from .configurations import Options, Place

INTERPRETED = knobs.runtime.interpret  # read when the kernels are defined, so it cannot change later
CHOICES = ("auto", "triton", "reference")
KERNELS = ("triton", "cuda")
"""What the first use tries; the second one for the few cases that have a kernel in CUDA C++."""
_log = logging.getLogger("hsvit_kernels")
_forced = "auto"
_within: str | None = None
_told: set[tuple[str, str]] = set()

models: dict[torch.device, str] = {}
"""The model of each device on which kernels have been tried (`first_use.prepare`)."""
verdicts: dict[tuple[str, Case], str] = {}
"""By device model: what `auto` computes a case with, "cuda", "triton" or "reference"."""


def force(choice: str, device: torch.device | None = None) -> None:
    """Use "triton" or "reference" for every operation that has both, or "auto": Triton where the first use on this
    device model found it right and faster.

    The environment variable HSVIT_KERNELS goes before.

    Raises:
        ValueError: no such choice, or one that `device` cannot run.
    """
    global _forced
    if choice not in CHOICES:
        raise ValueError(f'kernels = "{choice}": must be one of {", ".join(CHOICES)}')
    _forced = choice
    if device is not None:
        _check(forced(), device)


@contextmanager
def forcing(choice: str) -> Iterator[None]:
    """`force`, of what the first use tries too, and before the environment."""
    global _within
    before, _within = _within, choice
    try:
        yield
    finally:
        _within = before


def _check(choice: str, device: torch.device) -> None:
    if choice in KERNELS and device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"kernels = {choice}, but the tensors are on {device}; Triton needs CUDA or TRITON_INTERPRET=1"
        )


def forced() -> str:
    """The choice in force."""
    if _within is not None:
        return _within
    choice = os.environ.get("HSVIT_KERNELS", _forced)
    if choice not in CHOICES:
        raise ValueError(f'HSVIT_KERNELS = "{choice}": must be one of {", ".join(CHOICES)}')
    return choice


def choose(case: Case, device: torch.device, why_not: str) -> str:
    """Decide for one call, for "cuda", "triton" or "reference", and log each new reason once.

    Args:
        why_not: why no kernel can compute this, empty where one can.

    Raises:
        ValueError: a kernel is forced where it cannot run.
    """
    choice = "reference" if exporting() else forced()
    _check(choice, device)
    if why_not:
        decision = "reference"
    elif choice == "auto":
        verdict = verdicts.get((models.get(device, ""), case))
        decision = verdict or "reference"
        if verdict is None:
            why_not = "not tried here: hsvit_kernels.prepare" if device.type == "cuda" else f"cpu, {case.dtype}"
        elif verdict == "reference":
            why_not = "as the first use decided"
    else:
        decision, why_not = choice, "forced"
    if not torch.compiler.is_compiling() and _within is None:
        _tell(case.operation, f"reference ({why_not})" if decision == "reference" else decision)
    return decision


def exporting() -> bool:
    """Whether torch.export looks on: an exported graph has PyTorch's own operations, to run where this package is not
    installed. torch.compile takes `is_exporting` for true as well."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def _tell(operation: str, decision: str) -> None:
    if (operation, decision) not in _told:
        _told.add((operation, decision))
        _log.info("%s: %s", operation, decision)


def low_dtype(x: Tensor) -> torch.dtype:
    """What products with `x` are computed in: autocast's dtype where that is on, its own otherwise."""
    if x.is_meta or x.dtype == torch.float64:  # meta tensors, which a counter of FLOPs gives, know no autocast
        return x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def options(place: Place, x: Tensor) -> Options:
    """How to launch a kernel near `x`."""
    return configurations.configuration(place, x.dtype, models.get(x.device, ""), capability(x.device))


@functools.cache
def capability(device: torch.device) -> str:
    """Of a GPU, such as "90", or "gfx942" for AMD's; "any" elsewhere."""
    if device.type != "cuda":
        return "any"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "".join(map(str, torch.cuda.get_device_capability(device)))


compiling = False
"""Whether `launch` only has kernels compiled."""


def launch(kernel: Any, grid: tuple[int, ...], near: Tensor, *args: Any, **constants: Any) -> None:
    """Launch a kernel on the device of `near`: Triton takes the current one, whatever the tensors are on."""
    with torch.cuda.device_of(near):
        kernel.run(*args, grid=grid, warmup=compiling, **constants)
