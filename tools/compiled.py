"""What the compiler makes of every kernel that can be launched, without a GPU: `python -m tools.compiled`.

The launches are those of the operations themselves: they are called with small tensors, for every shape class, dtype
and flag, while Triton asks for a kernel and gets none. So a kernel, a flag or a table's entry that is new is compiled
too, and a kernel that nothing here launches is an error.

Down to Triton's own intermediate language each takes a fraction of a second (`--check`). Machine code for sm_80, sm_90
and sm_100 is made of what training in bf16 launches, and its registers, stack, shared memory and instructions go to
kernels/results/compiled.csv, which a change is compared with; `--whole` makes it of everything, for gfx942 too.
"""

from __future__ import annotations

import argparse
import ast
import csv
import functools
import importlib
import io
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import JITFunction

import hsvit_kernels
from hsvit_kernels import StepState, configurations, dispatch, grouped_attention, sliced_linear
from hsvit_kernels.grouped_attention import _place, _shape, dropout_mask
from hsvit_kernels.random import Draw
from tools.benchmarks.attention_baselines import ATTENTION

RESULTS = Path(__file__).parents[1] / "kernels/results/compiled.csv"
NVIDIA = (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32))
AMD = GPUTarget("hip", "gfx942", 64)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Call:
    """Of an operation, to see what it launches. shape: of the class, as in the table, or a problem's."""

    operation: str
    shape: str
    sizes: tuple[int, ...]
    dtype: str
    weights: str
    flags: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        return " ".join([self.dtype, *([] if self.weights == self.dtype else [f"weights-{self.weights}"]), *self.flags])


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it is specialised on."""

    call: Call
    kernel: str
    """Module and name."""
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    aligned: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def meaning(self) -> tuple[Any, ...]:
        """What the intermediate language is made of: alignment, warps and stages come later."""
        return self.kernel, self.signature, self.constants


# What can be asked for


def attention_shapes() -> Iterator[tuple[str, tuple[int, int, int]]]:
    """A name, and features of a group, width and heads, for each class of the table and what the recipes train."""
    for kernel, shape in configurations.TABLE:
        if kernel == "attention_forward":
            tile, padded, full = shape
            width, heads = (padded, padded // 8) if full else (padded - 8, 8)
            yield "x".join(map(str, shape)), (tile, width, heads)
    for problem in ATTENTION:
        yield f"T{problem.tokens} D{problem.width}", (problem.tokens - 1, problem.width, problem.heads)
    yield from (("T33 D16", (32, 16, 4)), ("T25 D16", (24, 16, 4)))  # imagenette/hybrid_resnet18, digits/hybrid


def all_attention_shapes() -> Iterator[tuple[str, tuple[int, int, int]]]:
    """One of every group of shapes whose kernels differ in more than their numbers."""
    met = set()
    for width in range(1, 129):
        for heads in (h for h in range(1, width + 1) if width % h == 0):
            for features in range(1, 65 if width <= 64 else 33):
                s = _shape(features, width, heads)
                full = s["HPS"] * width // heads == s["SW"] and heads % s["HPS"] == 0
                kind = (s["NP"], features == s["NP"], s["DP"], width == s["DP"], s["HPS"], s["SW"], full)
                if kind not in met:
                    met.add(kind)
                    yield "x".join(map(str, _place("attention_forward", s)[1])), (features, width, heads)


def calls(shapes: Iterable[tuple[str, tuple[int, int, int]]]) -> Iterator[Call]:
    """Of every operation, for all dtypes and flags."""
    precisions = [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")]
    for shape, sizes in dict.fromkeys(shapes):
        for dtype, weights in precisions:
            for dropout in ((), ("dropout",)):
                for mode in ((), ("training",), ("all_tokens",)):
                    yield Call("grouped_attention", shape, sizes, dtype, weights, (*mode, *dropout))
    yield Call("dropout_mask", "any", (), "int8", "int8")
    for shape, n, k in (("0", 96, 64), ("1", 512, 256)):
        for dtype in DTYPES:
            for rows in (64, 4096):  # the weight's gradient in one piece, or in several
                for bias in ((), ("bias",)):
                    for epilogue in ((), ("gelu",), ("residual",), ("gelu", "residual")):
                        for training in ((), ("training",)):
                            flags = (*bias, *epilogue, *training)
                            yield Call("sliced_linear", shape, (rows, n, k), dtype, "fp32", flags)


def is_training_in_bf16(call: Call) -> bool:
    """As the recipes train: autocast, dropout in attention, layers with a bias."""
    if call.operation == "grouped_attention":
        return call.about == "bf16 weights-fp32 training dropout"
    return call.operation == "dropout_mask" or (call.dtype == "bf16" and {"bias", "training"} <= set(call.flags))


# What is launched


class _NoDriver:
    """Stands for a GPU that compiles for `target` and runs nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _recording(target: GPUTarget) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Collect what Triton is asked to compile, and compile nothing; the process has no use for a GPU afterwards."""
    found: list[tuple[str, dict[str, Any]]] = []

    def collect(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append((f"{fn.module.rpartition('.')[2]}.{fn.name.rpartition('.')[2]}", compile))
        return True

    for kernel in kernels().values():
        kernel.device_caches.clear()  # they know the driver of before
    triton.runtime.driver.set_active(_NoDriver(target))
    before = dispatch.INTERPRETED, dispatch.capability
    dispatch.INTERPRETED = True  # tensors on the CPU will do
    dispatch.capability = functools.cache(lambda device: str(target.arch))
    knobs.runtime.jit_cache_hook = collect
    try:
        with dispatch.forcing("triton"):
            yield found
    finally:
        knobs.runtime.jit_cache_hook = None
        dispatch.INTERPRETED, dispatch.capability = before


def run(call: Call) -> None:
    """Let an operation launch what it launches; nothing is computed."""
    flags = dict.fromkeys(call.flags, True)
    dtype, weights = (DTYPES.get(name, torch.int8) for name in (call.dtype, call.weights))
    training = "training" in flags
    if call.operation == "dropout_mask":
        dropout_mask(Draw.of(0, image=torch.arange(1)), 0.2, layer=0, heads=2, group=0, tokens=9)
    elif call.operation == "grouped_attention":
        features, width, heads = call.sizes
        shapes = {
            "tokens": (1, features, width), "cls": (1, width), "positions": (1, features + 1, width),
            "norm_weight": (1, 2, width), "norm_bias": (1, 2, width), "qkv_weight": (1, 2, 3 * width, width),
            "qkv_bias": (1, 2, 3 * width), "out_weight": (1, 2, width, width), "out_bias": (1, 2, width),
        }  # fmt: skip
        tensors: dict[str, Any] = {name: torch.zeros(shape, dtype=weights) for name, shape in shapes.items()}
        tensors["tokens"] = tensors["tokens"].to(dtype)
        for tensor in tensors.values():
            tensor.requires_grad_(training)
        draw = Draw.of(0, image=torch.arange(1)) if "dropout" in flags else None
        y = grouped_attention(
            **tensors,
            heads=heads,
            dropout=0.2,
            draw=draw,
            all_tokens="all_tokens" in flags,
        )
        if training:
            y.sum().backward()
    else:
        rows, n, k = call.sizes
        x = torch.zeros(rows, k, dtype=dtype, requires_grad=training)
        weight = torch.zeros(2 * n, 2 * k, requires_grad=training)
        bias = torch.zeros(2 * n, requires_grad=training) if "bias" in flags else None
        residual = torch.zeros(rows, n, dtype=dtype) if "residual" in flags else None
        y = sliced_linear(
            x, weight, bias, out_features=n, side="trailing", gelu="gelu" in flags, residual=residual, state=StepState()
        )
        if training:
            y.sum().backward()


def launches(target: GPUTarget, of: Iterable[Call]) -> list[Launch]:
    """What calls launch on a target, each launch once, by the first call that leads to it.

    Raises:
        RuntimeError: there is a kernel that none of the calls launches.
    """
    found: dict[tuple[Any, ...], Launch] = {}
    with _recording(target) as asked:
        for call in of:
            run(call)
            for kernel, request in asked:
                launch = Launch(
                    call,
                    kernel,
                    tuple(request["signature"].items()),
                    tuple(request["constants"].items()),
                    tuple(request["configs"][0]),
                    (("num_warps", request["num_warps"]), ("num_stages", request["num_stages"])),
                )
                found.setdefault((*launch.meaning, launch.aligned, launch.options), launch)
            asked.clear()
    unknown = entries() - {launch.kernel for launch in found.values()}
    if unknown:
        raise RuntimeError(f"kernels that no call of tools/compiled.py launches: {', '.join(sorted(unknown))}")
    return list(found.values())


@functools.cache
def kernels() -> dict[str, JITFunction]:
    """Every function for GPUs in the package, by module and name."""
    found = {}
    for about in pkgutil.iter_modules(hsvit_kernels.__path__):
        module = importlib.import_module(f"hsvit_kernels.{about.name}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.module == module.__name__:
                found[f"{about.name}.{name}"] = value
    return found


def entries() -> set[str]:
    """The kernels that are launched: those that no other one calls."""
    called = {
        id(function.fn.__globals__.get(node.id))
        for function in kernels().values()
        for node in ast.walk(function.parse())
        if isinstance(node, ast.Name)
    }
    return {name for name, function in kernels().items() if id(function) not in called}


# What the compiler makes of it


def source(launch: Launch) -> ASTSource:
    aligned = {path: [["tt.divisibility", 16]] for path in launch.aligned}
    return ASTSource(kernels()[launch.kernel], dict(launch.signature), dict(launch.constants), aligned)


def intermediate(launch: Launch, target: GPUTarget) -> str:
    """Triton's own language (TTIR): where types and shapes are checked."""
    backend = make_backend(target)
    options = backend.parse_options(dict(launch.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    of = source(launch)
    module = of.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, of.language)
    return str(stages["ttir"](module, dict(vars(options))))


def machine_code(launch: Launch, target: GPUTarget) -> dict[str, Any]:
    """Registers a thread, stack and shared memory in bytes, and instructions by kind; nothing of an AMD GPU."""
    kernel = triton.compile(source(launch), target=target, options=dict(launch.options))
    if target.backend != "cuda":
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        assembly = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    kinds = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", assembly, re.M))
    tensor = sum(count for kind, count in kinds.items() if re.fullmatch(r"HMMA|.*GMMA|UTC.*MMA", kind))
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": kinds["LDL"] + kinds["STL"],
        "shared": kernel.metadata.shared,
        "instructions": kinds.total(),
        "tensor core": tensor,
    }


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def attempt(job: tuple[Launch, GPUTarget, bool]) -> dict[str, Any] | str:
    """The row of a launch, or why there is none. Machine code, or the intermediate language alone."""
    launch, target, whole = job
    row = {
        "kernel": launch.kernel,
        "shape": launch.call.shape,
        "of": launch.call.about,
        "for": target.arch if target.backend == "hip" else f"sm_{target.arch}",
    }
    try:
        if not whole:
            intermediate(launch, target)
            return row
        warps, stages = (dict(launch.options)[name] for name in ("num_warps", "num_stages"))
        return row | {"warps": warps, "stages": stages} | machine_code(launch, target)
    except Exception as error:  # whatever the compiler says is what this is for
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{', '.join(map(str, row.values()))}: {type(error).__name__}: {said[-1] if said else ''}"


def attempts(jobs: Sequence[tuple[Launch, GPUTarget, bool]]) -> Iterator[dict[str, Any] | str]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(attempt, jobs, chunksize=4)


def checked(of: Iterable[Call]) -> list[tuple[Launch, GPUTarget, bool]]:
    """Every launch, to be taken down to the intermediate language once: it is the same for all GPUs of a backend."""
    found = {launch.meaning: launch for launch in launches(NVIDIA[1], of)}
    return [(launch, NVIDIA[1], False) for launch in found.values()]


def training(targets: Sequence[GPUTarget]) -> list[tuple[Launch, GPUTarget, bool]]:
    """What training in bf16 launches, to be taken down to machine code."""
    wanted = [call for call in calls(attention_shapes()) if is_training_in_bf16(call)]
    return [(launch, target, True) for target in targets for launch in launches(target, wanted)]


def whole() -> list[tuple[Launch, GPUTarget, bool]]:
    """Everything to machine code, for AMD what trains; what trains all other shapes to the intermediate language."""
    wanted = list(calls(attention_shapes()))
    found = [(launch, target, True) for target in NVIDIA for launch in launches(target, wanted)]
    others = [call for call in calls(all_attention_shapes()) if is_training_in_bf16(call)]
    return [*found, *training([AMD]), *checked(others)]


def main() -> None:
    parser = argparse.ArgumentParser("tools.compiled", description=__doc__)
    parser.add_argument("--print", action="store_true", help="do not write the file")
    parser.add_argument("--check", action="store_true", help="every launch, down to the intermediate language")
    parser.add_argument(
        "--whole", action="store_true", help="every launch to machine code, every shape to the language"
    )
    args = parser.parse_args()
    if args.check or args.whole:
        jobs = checked(calls(attention_shapes())) if args.check else whole()
        failed = [found for found in attempts(jobs) if isinstance(found, str)]
        print(*failed, f"{len(jobs)} compiled, {len(failed)} failed", sep="\n")
        sys.exit(bool(failed))
    found = list(attempts(training(NVIDIA)))
    rows = [row for row in found if isinstance(row, dict)]
    if len(rows) < len(found):
        sys.exit("\n".join(row for row in found if isinstance(row, str)))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if not args.print:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text.getvalue())
    print(text.getvalue(), end="")


if __name__ == "__main__":
    main()
