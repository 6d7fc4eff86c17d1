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
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import JITFunction

import hsvit_kernels
from hsvit_kernels import attention_cuda, dispatch
from tools.calls import Call, all_attention_shapes, attention_shapes, calls, is_training_in_bf16, run
from tools.machine_code import read

RESULTS = Path(__file__).parents[1] / "kernels/results/compiled.csv"
NVIDIA = (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32))
AMD = GPUTarget("hip", "gfx942", 64)


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

    @property
    def identity(self) -> tuple[Any, ...]:
        return *self.meaning, self.aligned, self.options


@dataclass(frozen=True)
class CudaLaunch:
    """A kernel in CUDA C++ with its template arguments."""

    call: Call
    entry: attention_cuda.Entry
    options = (("num_warps", attention_cuda.WARPS), ("num_stages", 1))

    @property
    def kernel(self) -> str:
        return f"attention_cuda.{self.entry.namespace}"

    @property
    def meaning(self) -> tuple[Any, ...]:
        return (self.entry,)

    identity = meaning


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


Asked = dict[str, Any] | attention_cuda.Entry


@contextmanager
def _recording(target: GPUTarget) -> Iterator[list[tuple[str, Asked]]]:
    """Collect what Triton and NVRTC are asked to compile, and compile nothing; the process has no use for a GPU
    afterwards."""
    found: list[tuple[str, Asked]] = []

    def collect(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append((f"{fn.module.rpartition('.')[2]}.{fn.name.rpartition('.')[2]}", compile))
        return True

    for kernel in kernels().values():
        kernel.device_caches.clear()  # they know the driver of before
    triton.runtime.driver.set_active(_NoDriver(target))
    before = dispatch.INTERPRETED, dispatch.capability, attention_cuda.launch
    attention_cuda.launch = lambda entry, *_: found.append(("", entry))
    dispatch.INTERPRETED = True  # tensors on the CPU will do
    dispatch.capability = functools.cache(lambda device: str(target.arch))
    knobs.runtime.jit_cache_hook = collect
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = None
        dispatch.INTERPRETED, dispatch.capability, attention_cuda.launch = before


def launches(target: GPUTarget, of: Iterable[Call]) -> list[Launch | CudaLaunch]:
    """`launched`.

    Raises:
        RuntimeError: there is a kernel that none of the calls launches.
    """
    found = launched(target, of)
    unknown = entries(target) - {launch.kernel for launch in found}
    if unknown:
        raise RuntimeError(f"kernels that no call of tools/calls.py launches: {', '.join(sorted(unknown))}")
    return found


def launched(target: GPUTarget, of: Iterable[Call]) -> list[Launch | CudaLaunch]:
    """What calls launch on a target, each launch once, by the first call that leads to it."""
    found: dict[tuple[Any, ...], Launch | CudaLaunch] = {}
    with _recording(target) as asked:
        for call in of:
            for kernel in dispatch.KERNELS if call.operation == "grouped_attention" else ("triton",):
                with dispatch.forcing(kernel):
                    run(call)
            for launch in (_launch(call, *request) for request in asked):
                found.setdefault(launch.identity, launch)
            asked.clear()
    return list(found.values())


def _launch(call: Call, kernel: str, asked: Asked) -> Launch | CudaLaunch:
    if isinstance(asked, attention_cuda.Entry):
        return CudaLaunch(call, asked)
    return Launch(
        call,
        kernel,
        tuple(asked["signature"].items()),
        tuple(asked["constants"].items()),
        tuple(asked["configs"][0]),
        (("num_warps", asked["num_warps"]), ("num_stages", asked["num_stages"])),
    )


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


def entries(target: GPUTarget) -> set[str]:
    """The kernels that are launched: those that no other one calls, and where they fit those in CUDA C++."""
    called = {
        id(function.fn.__globals__.get(node.id))
        for function in kernels().values()
        for node in ast.walk(function.parse())
        if isinstance(node, ast.Name)
    }
    cuda = attention_cuda.ENTRIES if target.backend == "cuda" and target.arch >= 90 else ()
    found = {name for name, function in kernels().items() if id(function) not in called}
    return found | {f"attention_cuda.{namespace}" for namespace in cuda}


# What the compiler makes of it


def source(launch: Launch) -> ASTSource:
    aligned = {path: [["tt.divisibility", 16]] for path in launch.aligned}
    return ASTSource(kernels()[launch.kernel], dict(launch.signature), dict(launch.constants), aligned)


def intermediate(launch: Launch | CudaLaunch, target: GPUTarget) -> str:
    """Triton's own language (TTIR): where types and shapes are checked. CUDA C++ has none that is worth it."""
    if isinstance(launch, CudaLaunch):
        return str(attention_cuda.machine_code(launch.entry, str(target.arch)))
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


def machine_code(launch: Launch | CudaLaunch, target: GPUTarget) -> dict[str, Any]:
    """Registers a thread, stack and shared memory in bytes, and instructions by kind; nothing of an AMD GPU."""
    if isinstance(launch, CudaLaunch):
        code = attention_cuda.machine_code(launch.entry, str(target.arch))
        return {"shared": attention_cuda.ENTRIES[launch.entry.namespace][1]} | read(code).figures()
    kernel = triton.compile(source(launch), target=target, options=dict(launch.options))
    if target.backend != "cuda":
        return {}
    return {"shared": kernel.metadata.shared} | read(kernel.asm["cubin"]).figures()


Job = tuple[Launch | CudaLaunch, GPUTarget, bool]


def attempt(job: Job) -> dict[str, Any] | str:
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


def attempts(jobs: Sequence[Job]) -> Iterator[dict[str, Any] | str]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(attempt, jobs, chunksize=4)


def checked(of: Iterable[Call]) -> list[Job]:
    """Every launch, to be taken down to the intermediate language once: it is the same for all GPUs of a backend."""
    found = {launch.meaning: launch for launch in launches(NVIDIA[1], of)}
    return [(launch, NVIDIA[1], False) for launch in found.values()]


def training(targets: Sequence[GPUTarget]) -> list[Job]:
    """What training in bf16 launches, to be taken down to machine code."""
    wanted = [call for call in calls(attention_shapes()) if is_training_in_bf16(call)]
    return [(launch, target, True) for target in targets for launch in launches(target, wanted)]


def whole() -> list[Job]:
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
