"""How kernels are launched: a table from shape class to tile, warps and stages, which tools/tune_kernels.py writes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("configurations.json")


@functools.cache
def table() -> dict[tuple[str, tuple[int, ...], str], dict[str, dict[str, Any]]]:
    """(kernel, shape class, dtype) to the options by compute capability, "any" for the others."""
    rows = json.loads(TABLE.read_text())
    return {(row["kernel"], tuple(row["shape"]), row["dtype"]): row["options"] for row in rows}


def configuration(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The launch options of `kernel` for a shape class on a device, a copy."""
    options = table()[kernel, shape, str(dtype).removeprefix("torch.")]
    capability = "any"
    if device.type == "cuda":
        capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    return dict(options.get(capability, options["any"]))
