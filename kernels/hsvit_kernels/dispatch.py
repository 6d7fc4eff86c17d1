"""Which implementation computes an operation: Triton's kernel or the PyTorch reference."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor
from triton import knobs

CHOICES = ("auto", "triton", "reference")
_log = logging.getLogger("hsvit_kernels")
_forced = "auto"
_told: set[tuple[str, str]] = set()


def force(choice: str) -> None:
    """Use "triton" or "reference" for every operation that has both, or "auto": whichever is expected to be faster.

    The environment variable HSVIT_KERNELS goes before.
    """
    global _forced
    if choice not in CHOICES:
        raise ValueError(f'kernels = "{choice}": must be one of {", ".join(CHOICES)}')
    _forced = choice


def forced() -> str:
    """The choice in force."""
    choice = os.environ.get("HSVIT_KERNELS", _forced)
    if choice not in CHOICES:
        raise ValueError(f'HSVIT_KERNELS = "{choice}": must be one of {", ".join(CHOICES)}')
    return choice


def use_triton(operation: str, x: Tensor, why_not: str, wins: bool = True) -> bool:
    """Decide for one call, and log each new reason once.

    Args:
        x: an input, for its device and dtype. why_not: why the kernel cannot compute this, empty where it can.
        wins: whether the kernel is expected to be faster here than the reference.

    Raises:
        ValueError: Triton is forced where it cannot run.
    """
    choice = forced()
    if choice == "triton" and not x.is_cuda and not knobs.runtime.interpret:
        raise ValueError(
            f"{operation}: kernels = triton, but the tensors are on {x.device}; Triton needs CUDA or TRITON_INTERPRET=1"
        )
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
