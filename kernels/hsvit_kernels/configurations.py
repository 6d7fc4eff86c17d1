"""How kernels are launched: a table from shape class to tile, warps and stages, which tools/tune_kernels.py writes.

The table is a prior: on a GPU the first use times a few of its entries and keeps the fastest (`first_use.py`). It is
for 16 bits. In fp32 without tensor cores the kernels spill, with one launch each, and PyTorch is expected to be faster.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

Options = dict[str, Any]
Place = tuple[str, tuple[int, ...]]
"""A kernel and a shape class: where the table has an entry."""

FILE = Path(__file__).with_name("configurations.json")
PRECISE: dict[str, Options] = {
    "attention_forward": {"num_warps": 8, "num_stages": 1},
    "attention_backward": {"num_warps": 8, "num_stages": 1},
    "attention_products": {"num_warps": 8, "num_stages": 2, "BLOCK": 32},
    "linear_forward": {"num_warps": 4, "num_stages": 2, "BM": 32, "BN": 32, "BK": 32},
    "linear_input_gradient": {"num_warps": 4, "num_stages": 2, "BM": 32, "BN": 32, "BK": 32},
    "linear_weight_gradient": {"num_warps": 8, "num_stages": 2, "BM": 32, "BN": 32, "BK": 32},
}


def _read() -> dict[Place, dict[str, Options]]:
    return {(row["kernel"], tuple(row["shape"])): row["options"] for row in json.loads(FILE.read_text())}


TABLE = _read()  # at import: torch.compile cannot trace the reading of a file
"""The options of a place by compute capability, "any" for those that are not listed."""
chosen: dict[tuple[str, Place], Options] = {}
"""What the first use on a device model (`dispatch.models`) chose instead."""


def configuration(place: Place, dtype: torch.dtype, model: str, capability: str) -> Options:
    """The launch options of a place; a copy.

    model: of the device, as in `chosen`. capability: as `dispatch.capability` gives it.
    """
    if dtype == torch.float32:
        return dict(PRECISE[place[0]])
    if (found := chosen.get((model, place))) is not None:
        return dict(found)
    options = TABLE[place]
    return dict(options.get(capability, options["any"]))


def candidates(place: Place, capability: str) -> list[Options]:
    """What the first use times: the table's entries for a place, at most three, the device's own first."""
    options = TABLE[place]
    found: list[Options] = []
    for entry in (options.get(capability), options["any"], *options.values()):
        if entry is not None and entry not in found:
            found.append(entry)
    return [dict(entry) for entry in found[:3]]
