"""Functions that torch.compile leaves as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """`torch.compiler.disable`, but PyTorch's compiler, which takes seconds, is loaded only where one compiles."""
    disabled: Any = None

    @wraps(function)
    def call(*args: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args)

    return call  # type: ignore[return-value]
