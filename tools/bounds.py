"""What bounds the time of grouped attention, from machine code alone: `python -m tools.bounds`.

For every published shape and each kernel there is for it: what its warps issue, from the loops of its machine code and
how often they go round, and what it moves, by formula. A bound is the time that an H200 takes for one thing if it waits
for no other: instructions, one a cycle and scheduler, tensor cores, exponential functions, memory.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from rich.console import Console
from rich.table import Table

from hsvit_kernels import attention_cuda
from hsvit_kernels.attention_triton import weight_splits
from tools import compiled
from tools.benchmarks.attention_baselines import ATTENTION, Attention
from tools.calls import Call
from tools.compiled import CudaLaunch, Launch
from tools.machine_code import Trips, read

FLAGS = ("training", "dropout")
OF_WEIGHTS = ".fold", ".weight_gradients", ".weights"
"""Kernels that only touch weights, of which there are few."""
RESULTS = Path(__file__).parents[1] / "kernels/results/bounds.csv"
TARGET = compiled.NVIDIA[1]
SCHEDULERS, CLOCK, TENSOR, EXPONENTIALS, MEMORY = 528, 1.755e9, 788e12, 3.7e12, 4.3e12
"""Of an H200: warps that issue at a time, cycles, FLOPs, exponential functions and bytes a second."""
KINDS = {
    "tensor": r"HMMA|.*GMMA",
    "exp": r"MUFU\.EX2",
    "shared memory": r"LDS|STS|LDSM|LDGSTS|ATOMS",
    "lanes": r"SHFL|MOVM",
    "global memory": r"LDG|STG|LDL|STL",
    "fp32": r"F(ADD|MUL|FMA|MNMX|SETP|SEL)|F2F",
    "integer": r"I(MAD|ADD|SETP|MNMX)|LOP|SHF|LEA|PRMT|SEL|U[A-Z]",
}
"""Instructions, by what their names begin with; the rest is "other"."""


class Shape(NamedTuple):
    """How a kernel goes through a problem.

    programs: thread blocks. trips: of its loops. slab: which of them goes over slabs of heads, from the outermost in,
    and how many there are; the last layer leaves out part of each. units: moved, in B G T D A numbers of 16 bits. sums:
    bytes of the weights' sums.
    """

    programs: float
    trips: tuple[Trips, ...]
    slab: tuple[int, ...] = ()
    slabs: int = 0
    units: float = 0
    sums: float = 0


def shape(p: Attention, launch: Launch | CudaLaunch, constants: dict[str, Any]) -> Shape:
    """Of a kernel that `launch` is of. constants: its compile-time ones, if it is Triton's."""
    kernel = launch.kernel.partition(".")[2]
    sums = 4.0 * p.groups * p.depth * 4 * p.width**2
    if isinstance(launch, CudaLaunch):
        slabs, warps = p.heads // 2, attention_cuda.WARPS
        if kernel == "forward":  # 12 tiles of CLS's queries, keys and values for 8 warps
            blocks = -(-p.batch // warps) * p.groups
            return Shape(blocks, (_times(p.depth, _times(1.5), _times(slabs)),), (0, 1), slabs, 1)
        splits, share = attention_cuda.splits(p.batch, p.groups)
        layer = _times(p.depth, _times(share / warps, _times(2), _times(slabs, _times(warps))), _times(slabs))
        return Shape(splits * p.groups, (_times(slabs), layer), (1, 0, 1), slabs, 3, splits * sums)
    heads_a_slab = constants.get("HPS", 1)
    slabs = -(-p.heads // heads_a_slab)
    if kernel == "forward":
        return Shape(p.batch * p.groups, (_times(p.depth, _times(slabs)),), (0, 0), slabs, 1)
    if kernel == "backward":
        rows = -(-p.tokens // 16)  # rounds in which a layer's rows are gone through; a single one is no loop
        through = [_times(rows)] if rows > 1 else []
        layer = _times(p.depth, *through, _times(slabs), *through)
        return Shape(p.batch * p.groups, (layer,), (0, len(through)), slabs, 7)
    splits, share = weight_splits(p.groups * p.depth, p.batch * p.tokens, constants["BLOCK"])
    programs = 4 * splits * p.groups * p.depth
    return Shape(programs, (_times(-(-share // constants["BLOCK"])),), units=6, sums=splits * sums)


def _times(count: float, *within: Trips) -> Trips:
    return count, within


def row(job: tuple[Attention, Launch | CudaLaunch]) -> dict[str, Any]:
    """Figures of a kernel for a problem."""
    p, launch = job
    if isinstance(launch, CudaLaunch):
        by, shared, warps = "CUDA C++", attention_cuda.ENTRIES[launch.entry.namespace][1], attention_cuda.WARPS
        code, constants = read(attention_cuda.machine_code(launch.entry, str(TARGET.arch))), {}
    else:
        kernel = triton.compile(compiled.source(launch), target=TARGET, options=dict(launch.options))
        by, shared, warps = "Triton", kernel.metadata.shared, dict(launch.options)["num_warps"]
        names = compiled.kernels()[launch.kernel].arg_names
        code, constants = read(kernel.asm["cubin"]), {names[path[0]]: value for path, value in launch.constants}
    of, pairs = shape(p, launch, constants), p.batch * p.groups
    executed = Counter({name: count * of.programs * warps for name, count in code.executed(of.trips).items()})
    issued, slab = executed.total(), code.executed(of.trips, of.slab)
    if of.slab:
        issued -= of.slabs * code.skipped(of.slab) * (1 if by == "CUDA C++" else warps) * pairs
    moved = of.units * 2 * pairs * p.tokens * p.width * p.depth + of.sums
    bounds = {
        "issue": issued / SCHEDULERS / CLOCK,
        "tensor": sum(_flops(name) * count for name, count in executed.items()) / TENSOR,
        "exp": sum(count for name, count in executed.items() if name == "MUFU.EX2") * 32 / EXPONENTIALS,
        "HBM": moved / MEMORY,
    }
    return {
        "problem": p.name,
        "kernel": launch.kernel.partition(".")[2],
        "by": by,
        "registers": code.registers,
        "stack, bytes": code.stack,
        "shared, bytes": shared,
        "warps on a multiprocessor": _occupancy(code.registers, shared, warps),
        "a slab": round(slab.total()) if of.slab else "",
        "an image and group": round(issued / pairs),
        **{kind: round(count / pairs) for kind, count in _by_kind(executed).items()},
        "MB": round(moved / 1e6),
        **{f"{name}, ms": f"{1e3 * seconds:.3f}" for name, seconds in bounds.items()},
    }


def _by_kind(executed: Counter[str]) -> dict[str, float]:
    found = dict.fromkeys((*KINDS, "other"), 0.0)
    for name, count in executed.items():
        found[next((kind for kind, start in KINDS.items() if re.match(start, name)), "other")] += count
    return found


def _flops(name: str) -> float:
    """Of a tensor core's instruction, for each warp that issues it; four share one of a warp group."""
    if found := re.match(r"HMMA\.168(8|16)", name):
        return 2.0 * 16 * 8 * int(found[1])
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        return 2.0 * int(found[1]) * int(found[2]) * int(found[3]) / 4
    return 0.0


def _occupancy(registers: int, shared: int, warps: int) -> int:
    """Warps of a multiprocessor: 64 Ki registers, in eights a thread, 228 KiB of shared memory, 1 KiB more a block."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return warps * min(by_registers, 233472 // (shared + 1024), 64 // warps)


def rows(problems: Iterable[Attention]) -> list[dict[str, Any]]:
    """Of every kernel of a training step but `OF_WEIGHTS`."""
    jobs = []
    for p in problems:
        call = Call("grouped_attention", p.name, (p.tokens - 1, p.width, p.heads), "bf16", "fp32", FLAGS)
        launched = compiled.launched(TARGET, [call])
        jobs += [(p, launch) for launch in launched if not launch.kernel.endswith(OF_WEIGHTS)]
    with ProcessPoolExecutor() as pool:
        return list(pool.map(row, jobs))


def main() -> None:
    parser = argparse.ArgumentParser("tools.bounds", description=__doc__)
    parser.add_argument("--print", action="store_true", help="as a file, which is not written")
    args = parser.parse_args()
    found = rows(ATTENTION)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    if args.print:
        print(text.getvalue(), end="")
        return
    RESULTS.write_text(text.getvalue())
    for problem in dict.fromkeys(line["problem"] for line in found):
        table = Table(title=f"{problem}, dropout 0.2, sm_{TARGET.arch}")
        lines = [line for line in found if line["problem"] == problem]
        table.add_column("", no_wrap=True)
        for line in lines:
            table.add_column(f"{line['kernel']}\n{line['by']}", justify="right", no_wrap=True)
        for name in list(found[0])[3:]:
            table.add_row(name, *(str(line[name]) for line in lines))
        Console().print(table)


if __name__ == "__main__":
    main()
