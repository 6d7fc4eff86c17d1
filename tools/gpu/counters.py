"""What Nsight Compute counts in the kernels of a training step of grouped attention, and what their warps wait for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hsvit_kernels import Case, attention_cuda, dispatch
from hsvit_kernels.random import Draw
from tools.benchmarks.attention_baselines import ATTENTION, attention, attention_inputs

from .here import Here

ROOT = Path(__file__).parents[2]
KERNELS = "grouped_attention_(forward|backward)|^(fold|forward(_in_rows)?|backward|weight_(products|gradients))$"
KEPT = (
    "Duration", "Executed Ipc Active", "Issue Slots Busy", "Registers Per Thread", "Achieved Occupancy",
    "DRAM Throughput", "L2 Hit Rate", "Local Memory Spilling Requests", "Executed Instructions",
)  # fmt: skip
WAITS = "smsp__pcsamp_warps_issue_stalled_"
"""Samples of warps by what they waited for, without the suffix that is for cycles in which no warp issued."""
_KERNEL = re.compile(r"^  (\w+) \(\d+, \d+, \d+\)x\(\d+, \d+, \d+\), ")
_METRIC = re.compile(r"^    (\S(?:.*?\S)?)  +(?:(\S+) +)?([\d.,]+) *$")


def counters(here: Here) -> dict[str, Any]:
    """Of each kernel: KEPT, and "waits", what its warps' samples say, in % of all."""
    if here.toy:
        return {"kernels": [{"kernel": "none", "waits": {}}]}
    if (ncu := shutil.which("ncu")) is None:
        return {"state": "lacks", "why": "ncu, of Nsight Compute"}
    command = [ncu, "--clock-control", "none", "--set", "full", "--metrics", "group:smsp__pcsamp_warp_stall_reasons"]
    program = [sys.executable, "-c", "from tools.gpu import counters; counters.step()"]
    command += ["--kernel-name", f"regex:{KERNELS}", *program]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=here.left, check=False)
    print(found.stdout, found.stderr)
    kernels = parsed(found.stdout)
    if not kernels:
        raise RuntimeError(f"ncu counted nothing: {(found.stdout + found.stderr).strip().splitlines()[-1:]}")
    return {"kernels": kernels}


def step() -> None:
    """Forward and backward of the largest published problem, in CUDA C++ where this GPU has it."""
    case, device = ATTENTION[0], torch.device("cuda", 0)
    sizes = (case.tokens, case.width, case.heads, case.depth, 1, 1, 0)
    cuda = attention_cuda.fits(Case("grouped_attention", torch.bfloat16, torch.bfloat16, sizes), device)
    inputs = attention_inputs(case, "cuda", torch.bfloat16)
    draw = Draw.of(0, image=torch.arange(case.batch), device=device)
    with dispatch.forcing("cuda" if cuda else "triton"):
        attention(inputs, case, 0.2, draw).float().square().sum().backward()
    torch.cuda.synchronize()


def parsed(text: str) -> list[dict[str, Any]]:
    """What Nsight Compute has printed of each kernel, in order."""
    kernels: list[dict[str, Any]] = []
    for line in text.splitlines():
        if found := _KERNEL.match(line):
            kernels.append({"kernel": found[1], "waits": {}})
        elif kernels and (found := _METRIC.match(line)):
            name, unit, value = found.groups("")
            if name in KEPT:
                kernels[-1][name] = f"{value} {unit}".rstrip()
            elif name.startswith(WAITS) and not name.endswith("_not_issued"):
                kernels[-1]["waits"][name.removeprefix(WAITS)] = float(value.replace(",", ""))
    for kernel in kernels:
        whole = sum(kernel["waits"].values())
        shares = sorted(kernel["waits"].items(), key=lambda item: -item[1])
        kernel["waits"] = {name: round(100 * value / whole, 1) for name, value in shares if value}
    return kernels
