"""What the compiler makes of every entry of the kernels' table, without a GPU: `python -m tools.compiled`.

Compiles for sm_80, sm_90 and sm_100 and writes registers, stack, shared memory and instruction counts to
kernels/results/compiled.csv, which a change is compared with.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from hsvit_kernels import (
    attention_gradient_kernels,
    attention_kernels,
    attention_weight_kernels,
    configurations,
    linear_kernels,
)

RESULTS = Path(__file__).parents[1] / "kernels/results/compiled.csv"
CAPABILITIES = (80, 90, 100)
LAUNCH = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Case:
    """A kernel with everything that it is specialised on; types of run-time parameters, values of the others."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


def compiled(case: Case, capability: int) -> dict[str, Any]:
    """Registers a thread, stack and shared memory in bytes, and instructions by kind."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(case.kernel, signature, constants, aligned)
    kernel = compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)
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


def attention_case(kernel: str, shape: tuple[int, ...], options: dict[str, Any]) -> Case:
    """A kernel of grouped attention for the shape class (NP, DP, whether slabs and columns are full), or (DP,)."""
    tile, padded, full = shape if len(shape) == 3 else (0, *shape, True)
    width, heads = (padded, padded // 8) if full else (padded - 8, 8)
    head = width // heads
    constants: dict[str, Any] = {"N": tile, "NP": tile, "D": width, "DP": padded}
    precision = {"PRECISION": "tf32"}
    slab = {"HEADS": heads, "HPS": 2 if head <= 8 else 1, "SW": 16}
    types = dict.fromkeys(attention_kernels.forward.arg_names, "*fp32")
    types |= dict.fromkeys(("first_group", "threshold", "batch", "depth"), "i32")
    types |= dict.fromkeys(("stride_image", "stride_token"), "i64")
    types |= dict.fromkeys(("eps", "keep_scale"), "fp32") | dict.fromkeys(("key", "images"), "*i32")
    types |= dict.fromkeys(("rows", "share"), "i32")
    low_ones = ("tokens", "qkv_weight", "out_weight", "out", "saved", "dqkv", "o_rows", "dx_rows", "dtokens")
    types |= dict.fromkeys(low_ones, "*bf16") | dict.fromkeys(("dout", "dcls", "products", "sums"), "*fp32")
    launch = {key: value for key, value in options.items() if key in LAUNCH}
    function = {
        "attention_forward": attention_kernels.forward,
        "attention_backward": attention_gradient_kernels.backward,
        "attention_products": attention_weight_kernels.weight_products,
    }[kernel]
    if kernel == "attention_products":
        constants = {"D": width, "DP": padded, "BLOCK": options["BLOCK"]} | precision
    else:
        constants |= slab | {"DROPOUT": True, "HOIST": bool(options["HOIST"])} | precision
        if kernel == "attention_forward":
            constants |= {"SAVE": True, "ALL": False, "stride_column": 1}
        else:
            constants |= {"BLOCK": options["BLOCK"]}
    types = {name: kind for name, kind in types.items() if name in function.arg_names and name not in constants}
    return Case(function, types, constants, launch)


def linear_case(kernel: str, shape: tuple[int, ...], options: dict[str, Any]) -> Case:
    """A kernel of the sliced linear layer with everything switched on."""
    tile = {name: options[name] for name in ("BM", "BN", "BK")}
    bm, bn, bk = tile.values()
    constants: dict[str, Any] = tile | {"PRECISION": "tf32"}
    types = dict.fromkeys(("M", "n", "k", "share"), "i32") | {"bias": "*bf16", "bias_out": "*fp32"}
    flags: tuple[str, ...] = ()
    if kernel == "linear_forward":
        function, flags = linear_kernels.forward, ("BIAS", "GELU", "RESIDUAL", "SAVE")
        blocks = {"x": (bm, bk), "weight": (bn, bk), "residual": (bm, bn), "y": (bm, bn), "z": (bm, bn)}
    elif kernel == "linear_input_gradient":
        function = linear_kernels.input_gradient
        blocks = {"dz": (bm, bk), "weight": (bk, bn), "dx": (bm, bn)}
    else:
        function, flags = linear_kernels.weight_gradient, ("BIAS", "ADD")
        blocks = {"dz": (bm, bn), "x": (bm, bk), "out": (bn, bk)}
    for name, (height, width) in blocks.items():
        types[name] = f"tensordesc<{'fp32' if name == 'out' else 'bf16'}[{height}, {width}]>"
    constants |= dict.fromkeys(flags, True)
    types = {name: kind for name, kind in types.items() if name in function.arg_names and name not in constants}
    launch = {key: value for key, value in options.items() if key in LAUNCH}
    return Case(function, types, constants, launch)


def case(kernel: str, shape: tuple[int, ...], options: dict[str, Any]) -> Case:
    """The compilation of a table entry."""
    build = attention_case if kernel.startswith("attention") else linear_case
    return build(kernel, shape, options)


Entry = tuple[str, tuple[int, ...], dict[str, Any], int]


def entries() -> Iterator[Entry]:
    """Every entry of the table on every capability, in bf16."""
    for (kernel, shape), options in configurations.table().items():
        for capability in CAPABILITIES:
            yield kernel, shape, options.get(str(capability), options["any"]), capability


def row(entry: Entry) -> dict[str, Any]:
    kernel, shape, options, capability = entry
    about = {"kernel": kernel, "shape": "x".join(map(str, shape)), "sm": capability}
    launch = {"warps": options["num_warps"], "stages": options["num_stages"]}
    return about | launch | compiled(case(kernel, shape, options), capability)


def rows(processes: int = 2) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(row, entries()))


def main() -> None:
    parser = argparse.ArgumentParser("tools.compiled", description=__doc__)
    parser.add_argument("--print", action="store_true", help="do not write the file")
    args = parser.parse_args()
    found, text = rows(), io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    if not args.print:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text.getvalue())
    print(text.getvalue(), end="")


if __name__ == "__main__":
    main()
