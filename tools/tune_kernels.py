"""Re-derives the kernels' table of launches on a GPU and writes it: `python -m tools.tune_kernels`.

Every candidate that compiles without spilling is timed on a problem of its shape class; the fastest is written under
the device's compute capability, and `wins` says whether it beat PyTorch's implementation in the same run. Needs torch
and triton only. After it: `python -m tools.compiled`, `pytest -m gpu`, `python -m tools.benchmark kernels`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from hsvit_kernels import StepState, configurations, force, sliced_linear
from tools.attention_baselines import Attention, attention, attention_inputs
from tools.compiled import case, compiled

Options = dict[str, Any]
Step = Callable[[], Any]


def candidates(kernel: str, wide: bool) -> Iterator[Options]:
    """Launches worth timing."""
    if kernel == "attention_products":
        for warps, stages, block in itertools.product((4, 8), (2, 3, 4), (32, 64, 128)):
            yield {"num_warps": warps, "num_stages": stages, "BLOCK": block}
    elif kernel.startswith("attention"):
        blocks = (16, 32) if kernel == "attention_backward" else (0,)
        for warps, stages, hoist, block in itertools.product((1, 2, 4, 8), (1, 2), (True, False), blocks):
            yield {"num_warps": warps, "num_stages": stages, "HOIST": hoist} | ({"BLOCK": block} if block else {})
    else:
        sides = ((64, 64), (64, 128), (128, 64), (128, 128)) if wide else ((64, 64), (32, 64), (64, 32), (64, 128))
        for (first, second), warps, stages in itertools.product(sides, (4, 8), (2, 3, 4)):
            tile = {"BM": first, "BN": second, "BK": 64}
            if kernel == "linear_weight_gradient":
                tile = {"BM": 64, "BN": first, "BK": second}
            yield {"num_warps": warps, "num_stages": stages} | tile


def attention_step(shape: tuple[int, ...], kernel: str) -> Step:
    """A forward, or a forward and backward, of a problem of this class."""
    tile, padded, full = shape if len(shape) == 3 else (32, *shape, True)
    width = padded if full else padded - 8
    problem = Attention(512, 16, tile + 1, width, 4, heads=padded // 8 if full else 8)
    a = attention_inputs(problem, "cuda", torch.bfloat16)

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(a, problem)

    return forward if kernel == "attention_forward" else lambda: attention(a, problem).sum().backward()


def linear_step(wide: bool, kernel: str) -> Step:
    """DeiT-S's first MLP layer at full width, or its quarter."""
    n, k = (1536, 384) if wide else (384, 96)
    x = torch.randn(256 * 197, k, device="cuda", dtype=torch.bfloat16, requires_grad=kernel != "linear_forward")
    weight = torch.randn(1536, 384, device="cuda", requires_grad=kernel == "linear_weight_gradient")
    state = StepState()
    state.last = False

    def step() -> None:
        with torch.set_grad_enabled(kernel != "linear_forward"):
            y = sliced_linear(x, weight, out_features=n, gelu=kernel == "linear_forward", state=state)
        if kernel != "linear_forward":
            y.backward(y.detach())

    return step


def milliseconds(step: Step, choice: str) -> float:
    force(choice)
    found: float = triton.testing.do_bench(step, warmup=10, rep=50, quantiles=[0.5])
    return found


def tuned(kernel: str, shape: tuple[int, ...], capability: int) -> Options:
    """The fastest launch of a table entry, found by putting each candidate into the table."""
    entry = configurations.table()[kernel, shape]
    before = entry.get(str(capability), entry["any"])
    is_attention = kernel.startswith("attention")
    step = attention_step(shape, kernel) if is_attention else linear_step(bool(shape[0]), kernel)
    best, fastest = before, float("inf")
    for options in (before, *candidates(kernel, bool(shape[0]))):
        usage = compiled(case(kernel, shape, options), capability)
        if usage["stack"]:
            continue
        entry[str(capability)] = {"wins": True} | options
        ms = milliseconds(step, "triton")
        if ms < fastest:
            best, fastest = options, ms
    plain = milliseconds(step, "reference")
    found = best | {"wins": fastest < plain}
    entry[str(capability)] = found
    print(f"{kernel} {shape}: {fastest:.3f} ms, PyTorch {plain:.3f} ms: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser("tools.tune_kernels", description=__doc__)
    parser.add_argument("--kernels", nargs="*", help="only these, by name")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: times are what this measures")
    capability = int("".join(map(str, torch.cuda.get_device_capability())))
    for kernel, shape in configurations.table():
        if not args.kernels or kernel in args.kernels:
            tuned(kernel, shape, capability)
    rows = [{"kernel": k, "shape": s, "options": options} for (k, s), options in configurations.table().items()]
    configurations.TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
