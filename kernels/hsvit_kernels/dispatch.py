"""Which implementation computes an operation: Triton's kernel or the PyTorch reference."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = knobs.runtime.interpret  # read when the kernels are defined, so it cannot change later
CHOICES = ("auto", "triton", "reference")
_log = logging.getLogger("hsvit_kernels")
_forced = "auto"
_told: set[tuple[str, str]] = set()


def force(choice: str, device: torch.device | None = None) -> None:
    """Use "triton" or "reference" for every operation that has both, or "auto": whichever was measured to be faster.

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


def _check(choice: str, device: torch.device) -> None:
    if choice == "triton" and device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"kernels = triton, but the tensors are on {device}; Triton needs CUDA or TRITON_INTERPRET=1")


def forced() -> str:
    """The choice in force."""
    choice = os.environ.get("HSVIT_KERNELS", _forced)
    if choice not in CHOICES:
        raise ValueError(f'HSVIT_KERNELS = "{choice}": must be one of {", ".join(CHOICES)}')
    return choice


def launch(kernel: Any, grid: tuple[int, ...], near: Tensor, *args: Any, **constants: Any) -> None:
    """Launch a kernel on the device of `near`: Triton takes the current one, whatever the tensors are on."""
    with torch.cuda.device_of(near):
        kernel[grid](*args, **constants)


def use_triton(operation: str, x: Tensor, why_not: str, wins: bool) -> bool:
    """Decide for one call, and log each new reason once.

    Args:
        x: an input, for its device and dtype. why_not: why the kernel cannot compute this, empty where it can.
        wins: whether the kernel was measured to be faster here than the reference.

    Raises:
        ValueError: Triton is forced where it cannot run.
    """
    choice = forced()
    _check(choice, x.device)
    if choice == "auto" and not x.is_cuda:
        why_not = f"{x.device.type}, {x.dtype}"
    if why_not:
        decision = False
    elif choice == "auto":
        decision = x.is_cuda and torch.version.cuda is not None and wins
        why_not = "" if decision else f"{x.device.type}, {x.dtype}"
    else:
        decision = choice == "triton"
        why_not = "" if decision else "forced"
    note = (operation, f"reference ({why_not})" if not decision else "triton")
    if not torch.compiler.is_compiling() and note not in _told:
        _told.add(note)
        _log.info("%s: %s", *note)
    return decision
