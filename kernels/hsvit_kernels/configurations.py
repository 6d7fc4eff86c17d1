"""How kernels are launched: a table from shape class to tile, warps and stages, which tools/tune_kernels.py writes.

The table is for 16 bits. In fp32 without tensor cores the kernels spill and PyTorch is expected to be faster: they run
there only when forced, to be checked, with one launch each.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("configurations.json")
PRECISE: dict[str, dict[str, Any]] = {
    "attention_forward": {"num_warps": 8, "num_stages": 1, "HOIST": False},
    "attention_backward": {"num_warps": 8, "num_stages": 1, "HOIST": False, "BLOCK": 16},
    "attention_products": {"num_warps": 8, "num_stages": 2, "BLOCK": 32},
    "linear_forward": {"num_warps": 4, "num_stages": 2, "BM": 32, "BN": 32, "BK": 32},
    "linear_input_gradient": {"num_warps": 4, "num_stages": 2, "BM": 32, "BN": 32, "BK": 32},
    "linear_weight_gradient": {"num_warps": 8, "num_stages": 2, "BM": 32, "BN": 32, "BK": 32},
}


@functools.cache
def table() -> dict[tuple[str, tuple[int, ...]], dict[str, dict[str, Any]]]:
    """(kernel, shape class) to the options by compute capability, "any" for those that are not listed.

    wins: whether the kernel was measured to be faster than PyTorch there; `auto` goes by it.
    """
    rows = json.loads(TABLE.read_text())
    return {(row["kernel"], tuple(row["shape"])): row["options"] for row in rows}


def configuration(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The launch options of `kernel` for a shape class on a device, and `wins`; a copy."""
    if dtype == torch.float32:
        return {"wins": False} | PRECISE[kernel]
    options = table()[kernel, shape]
    capability = "any"
    if device.type == "cuda":
        capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    return dict(options.get(capability, options["any"]))
