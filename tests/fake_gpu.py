"""A GPU that computes nothing, to see what a program asks of it: PyTorch's device "meta" plays it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("meta")
STAGED = 64 * 2**10
"""Bytes from pageable memory that the driver takes at once; with more it waits for the work so far (CUDA's API
synchronization behavior)."""


class _Made(TorchFunctionMode):
    """Notes tensors that are made on the GPU of numbers on the host, which are copied there as by `.to`."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if made and torch.device(kwargs.get("device") or "cpu") == GPU:
            self.waits.append(f"{func.__name__}({args[0]}, device = {GPU})")
        return func(*args, **kwargs)


class Watched(TorchDispatchMode):
    """Within the block copies between the CPU and the GPU are looked at. What reads a number from it raises anyway.

    waits: what makes the host wait for the GPU, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._made = _Made(self.waits)

    def __enter__(self) -> Any:
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            there = torch.device(kwargs.get("device") or args[0].device)
            self._look(args[0], args[0].device, there, kwargs.get("non_blocking", False))
        elif func is torch.ops.aten.copy_.default:
            self._look(args[1], args[1].device, args[0].device, args[2] if len(args) > 2 else False)
        return func(*args, **kwargs)

    def _look(self, source: Tensor, here: torch.device, there: torch.device, non_blocking: bool) -> None:
        size = source.numel() * source.element_size()
        if here != there and (there != GPU or not non_blocking or size > STAGED):
            self.waits.append(f"{size} bytes from {here} to {there}, non_blocking = {non_blocking}")
