"""Every kernel beside everything a user could pick today, for `python -m tools.gpu benchmarks`.

On one NVIDIA GPU, with torch and triton only. One row an operation, shape and implementation, with the device's own
roofs measured in the same run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from hsvit_kernels import StepState, force, sliced_linear
from tools.benchmarks.attention_baselines import Attention, attention, attention_inputs, attention_runs

Run = Callable[[], Any]
COLUMNS = (
    "operation", "shape", "dropout", "passes", "implementation", "device", "torch", "triton",
    "ms p20", "ms p50", "ms p80", "TFLOP/s", "GB/s", "% of roof", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Roofs:
    """What the device reaches: TFLOP/s of a bf16 matrix product, GB/s of a copy."""

    tflops: float
    gigabytes: float


@dataclass(frozen=True)
class Linear:
    """A linear layer of DeiT at a width, over every token of a batch."""

    name: str
    rows: int
    full: tuple[int, int]
    width: float
    gelu: bool = False
    residual: bool = False

    @property
    def slice(self) -> tuple[int, int]:
        return int(self.full[0] * self.width), int(self.full[1] * self.width)

    @property
    def shape(self) -> str:
        n, k = self.slice
        return f"M{self.rows} {k}->{n} of {self.full[1]}->{self.full[0]}"


ROWS = 256 * 197
LINEAR = tuple(
    Linear(name, ROWS, full, width, gelu, residual)
    for name, full, gelu, residual in (
        ("qkv", (1152, 384), False, False),
        ("proj", (384, 384), False, True),
        ("fc1", (1536, 384), True, False),
        ("fc2", (384, 1536), False, True),
    )
    for width in (1.0, 0.75, 0.5, 0.25)
)


# Grouped attention


def attention_rows(case: Attention, device: str, dtype: torch.dtype, roofs: Roofs) -> Iterator[dict[str, Any]]:
    with torch.no_grad():
        force("reference")
        exact = attention_inputs(case, device, torch.float32)
        exact = {name: t.detach().to(dtype).float() for name, t in exact.items()}
        truth = attention(exact, case)
    for dropout, backward in itertools.product((0.0, 0.2), (False, True)):
        for name, run, leaves in attention_runs(case, dropout, device, dtype):
            try:
                with torch.set_grad_enabled(backward):
                    y = run()
            except RuntimeError as raised:
                if name.startswith("hsvit_kernels"):
                    raise
                # flex_attention launches B G heads blocks on an axis that has at most 65,535
                print(f"{name}: {raised}", flush=True)
                continue
            dy = torch.randn_like(y)
            step = training(run, dy) if backward else inference(run)
            error = float((y.detach() - truth).abs().max() / truth.abs().max())
            flops = case.flops() * (4 if backward else 1)
            yield {
                "operation": "grouped attention",
                "shape": case.name,
                "dropout": dropout,
                "passes": "forward + backward" if backward else "forward",
                "implementation": name,
                "error": "" if dropout or name.startswith("loop") else f"{error:.2g}",
            } | figures(measure(step, device, leaves), flops, case.bytes(backward), roofs)
            torch.cuda.empty_cache()


def training(run: Run, dy: Tensor) -> Run:
    def step() -> None:
        run().backward(dy)

    return step


def inference(run: Run) -> Run:
    def step() -> Any:
        with torch.no_grad():
            return run()

    return step


# Sliced linear


def linear_runs(case: Linear, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Run]]:
    n, k = case.slice
    torch.manual_seed(0)
    x = torch.randn(case.rows, k, device=device, dtype=dtype).requires_grad_()
    residual = torch.randn(case.rows, n, device=device, dtype=dtype) if case.residual else None
    weight = (torch.randn(case.full, device=device) * case.full[1] ** -0.5).requires_grad_()
    bias = torch.zeros(case.full[0], device=device, requires_grad=True)
    low_weight, low_bias = (t.detach().to(dtype).requires_grad_() for t in (weight, bias))
    state = StepState()
    state.last = False

    def plain() -> Tensor:
        y = F.linear(x, low_weight[:n, :k], low_bias[:n])
        y = F.gelu(y) if case.gelu else y
        return y if residual is None else y + residual

    def ours(choice: str) -> Run:
        def run() -> Tensor:
            force(choice)
            return sliced_linear(x, weight, bias, out_features=n, gelu=case.gelu, residual=residual, state=state)

        return run

    yield "hsvit_kernels, Triton", ours("triton")
    yield "hsvit_kernels, cuBLAS", ours("reference")
    yield "F.linear on a slice", plain


def linear_rows(case: Linear, device: str, dtype: torch.dtype, roofs: Roofs) -> Iterator[dict[str, Any]]:
    n, k = case.slice
    truth: Tensor | None = None
    for backward in (False, True):
        runs = dict(linear_runs(case, device, dtype))
        for name, run in runs.items():
            with torch.set_grad_enabled(backward):
                y = run()
            if truth is None:
                truth = runs["F.linear on a slice"]().detach().float()
            step = training(run, torch.randn_like(y)) if backward else inference(run)
            moved = 2 * (case.rows * (n + k) + n * k) * (3 if backward else 1)
            yield {
                "operation": f"sliced linear {case.name}",
                "shape": case.shape,
                "dropout": 0.0,
                "passes": "forward + backward" if backward else "forward",
                "implementation": name,
                "error": f"{float((y.detach() - truth).abs().max() / truth.abs().max()):.2g}",
            } | figures(measure(step, device), 2.0 * case.rows * n * k * (3 if backward else 1), moved, roofs)


class FourWidths(nn.Module):
    """The blocks of a DeiT as a step at four widths computes them; heads get narrower, not fewer."""

    def __init__(self, width: int, depth: int, heads: int, gather: bool) -> None:
        super().__init__()
        self.heads, self.state = heads, StepState() if gather else None
        shapes = {
            "qkv": (3 * width, width),
            "proj": (width, width),
            "fc1": (4 * width, width),
            "fc2": (width, 4 * width),
        }
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(i, o) for name, (o, i) in shapes.items()}) for _ in range(depth)
        )

    def linear(self, layer: nn.Linear, x: Tensor, n: int, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        weight, bias = layer.weight, layer.bias
        if self.state is not None:
            return sliced_linear(x, weight, bias, out_features=n, gelu=gelu, residual=residual, state=self.state)
        y = F.linear(x, weight[:n, : x.shape[-1]], bias[:n])
        y = F.gelu(y) if gelu else y
        return y if residual is None else y + residual

    def forward(self, x: Tensor) -> Tensor:
        d = x.shape[-1]
        block: Any  # nn.ModuleDict; torch's stubs lose it
        for block in self.blocks:
            y = F.layer_norm(x, (d,))
            q, k, v = self.linear(block["qkv"], y, 3 * d).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = self.linear(block["proj"], o, d, residual=x)
            h = self.linear(block["fc1"], F.layer_norm(x, (d,)), 4 * d, gelu=True)
            x = self.linear(block["fc2"], h, d, residual=x)
        return x


def four_widths(
    device: str, roofs: Roofs, batch: int = 256, tokens: int = 197, width: int = 384, depth: int = 12, heads: int = 6
) -> Iterator[dict[str, Any]]:
    """DeiT-S at widths 1, 0.75, 0.5 and 0.25: four forwards and backwards, under autocast."""
    widths = [int(width * w) for w in (1, 0.75, 0.5, 0.25)]
    flops = sum(3 * 2 * batch * tokens * 12 * w * w * depth for w in widths)
    for name, gather, choice in (
        ("hsvit_kernels, Triton", True, "triton"),
        ("hsvit_kernels, cuBLAS", True, "reference"),
        ("autograd slicing", False, "reference"),
    ):
        torch.manual_seed(0)
        model = FourWidths(width, depth, heads, gather).to(device)
        inputs = [torch.randn(batch, tokens, w, device=device, dtype=torch.bfloat16) for w in widths]

        def step(model: FourWidths = model, inputs: list[Tensor] = inputs, choice: str = choice) -> None:
            force(choice)
            for index, x in enumerate(inputs):
                if model.state is not None:
                    model.state.last = index == len(inputs) - 1
                with torch.autocast(device, torch.bfloat16):
                    y = model(x)
                y.float().square().mean().backward()
            if model.state is not None:
                model.state.clear()
            model.zero_grad()

        yield {
            "operation": "DeiT-S blocks, four widths",
            "shape": f"B{batch} T{tokens} D{width} L{depth}",
            "dropout": 0.0,
            "passes": "forward + backward",
            "implementation": name,
            "error": "",
        } | figures(measure(step, device), flops, 0, roofs)


# Measuring


def measure(step: Run, device: str, leaves: list[Tensor] | None = None) -> list[float]:
    """Milliseconds: 20th, 50th and 80th percentile. leaves: have their gradients taken away before each run."""
    if device != "cuda":  # the tests: that it runs
        step()
        return [0.0, 0.0, 0.0]
    found: list[float] = triton.testing.do_bench(
        step, warmup=25, rep=150, grad_to_none=leaves, quantiles=[0.2, 0.5, 0.8]
    )
    return found


def figures(ms: list[float], flops: float, moved: float, roofs: Roofs) -> dict[str, Any]:
    seconds = ms[1] / 1000 or float("inf")
    tflops, gigabytes = flops / seconds / 1e12, moved / seconds / 1e9
    share = max(tflops / roofs.tflops, gigabytes / roofs.gigabytes)
    return {
        **dict(zip(("ms p20", "ms p50", "ms p80"), (round(v, 4) for v in ms), strict=True)),
        "TFLOP/s": round(tflops, 1),
        "GB/s": round(gigabytes, 1),
        "% of roof": round(100 * share, 1),
    }


def measured_roofs() -> Roofs:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = triton.testing.do_bench(lambda: a @ b, quantiles=[0.5])
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = triton.testing.do_bench(lambda: target.copy_(source), quantiles=[0.5])
    return Roofs(2 * 8192**3 / product / 1e9, 2 * 2**30 / copy / 1e6)


def draw_roofline(rows: list[dict[str, Any]], roofs: Roofs, file: Path) -> None:
    """Every row over its arithmetic intensity, under the roofs of the same run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    intensity = [2**e for e in range(12)]
    axes.plot(
        intensity, [min(roofs.tflops, i * roofs.gigabytes / 1000) for i in intensity], "k-", label="measured roof"
    )
    shown = [row for row in rows if row["GB/s"]]
    for name in dict.fromkeys(row["implementation"] for row in shown):
        mine = [row for row in shown if row["implementation"] == name]
        axes.plot([1000 * r["TFLOP/s"] / r["GB/s"] for r in mine], [r["TFLOP/s"] for r in mine], "o", ms=5, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte of least traffic", ylabel="TFLOP/s")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
