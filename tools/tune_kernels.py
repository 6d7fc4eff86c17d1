"""Re-derives the kernels' table of launches on a GPU, for `python -m tools.gpu tuning`.

Every candidate is timed on a training step of its shape class, with dropout and fp32 parameters as under autocast; the
fastest is written under the device's compute capability, after each entry. Candidates are compiled beforehand by many
processes; one that fails is named and left out. Needs torch and triton only. After it: `python -m tools.compiled`,
`python -m tools.gpu correctness benchmarks`. What a run then launches, its first use decides (`first_use.py`).
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hsvit_kernels import configurations, dispatch
from hsvit_kernels.cases import Case
from hsvit_kernels.configurations import Options, Place
from hsvit_kernels.findings import place_name
from hsvit_kernels.first_use import Machine
from hsvit_kernels.trials import trial

Failures = dict[tuple[Place, int], str]
"""Why candidates, by place and number, are left out."""


def candidates(place: Place) -> list[Options]:
    """What stands in the table, and launches worth timing beside it."""
    found: list[Options] = []
    for options in (*configurations.TABLE[place].values(), *_grid(*place)):
        if options not in found:
            found.append(options)
    return found


def _grid(kernel: str, shape: tuple[int, ...]) -> Iterator[Options]:
    if kernel == "attention_products":
        for warps, stages, block in itertools.product((4, 8), (2, 3, 4), (32, 64, 128)):
            yield {"num_warps": warps, "num_stages": stages, "BLOCK": block}
    elif kernel.startswith("attention"):
        for warps, stages in itertools.product((1, 2, 4, 8), (1, 2, 3)):
            yield {"num_warps": warps, "num_stages": stages}
    else:
        wide = ((64, 64), (64, 128), (128, 64), (128, 128))
        sides = wide if shape[0] else ((64, 64), (32, 64), (64, 32), (64, 128))
        for (first, second), warps, stages in itertools.product(sides, (4, 8), (2, 3, 4)):
            tile = {"BM": first, "BN": second, "BK": 64}
            if kernel == "linear_weight_gradient":
                tile = {"BM": 64, "BN": first, "BK": second}
            yield {"num_warps": warps, "num_stages": stages} | tile


def case(place: Place) -> Case:
    """What is timed for a place: attention of four layers, DeiT-S's first MLP layer at full width, or its quarter."""
    kernel, shape = place
    if kernel.startswith("attention"):
        tile, padded, full = shape if len(shape) == 3 else (32, *shape, True)
        width, heads = (padded, padded // 8) if full else (padded - 8, 8)
        training = int(kernel != "attention_forward")
        return Case("grouped_attention", torch.bfloat16, torch.float32, (tile + 1, width, heads, 4, 1, training, 0))
    n, k = (1536, 384) if shape[0] else (384, 96)
    flags = {"linear_forward": (1, 1, 0, 1), "linear_input_gradient": (), "linear_weight_gradient": (1,)}[kernel]
    return Case(kernel, torch.bfloat16, torch.bfloat16, (n, k, *flags))


def extent(place: Place) -> tuple[int, ...]:
    return (512, 16) if place[0].startswith("attention") else (256 * 197,)


def fails(job: tuple[Place, Options, tuple[int, ...]], machine: Machine) -> str:
    """Why a candidate cannot be run, empty where it can. What it compiles lies in Triton's cache afterwards."""
    place, options, size = job
    model = machine.about["device"]
    dispatch.models[machine.device] = model
    configurations.chosen[model, place] = options
    try:
        with dispatch.forcing("triton"):
            trial(case(place), size, machine.device).step()()
            machine.wait()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
    return ""


def _fails_here(job: tuple[Place, Options, tuple[int, ...]]) -> str:
    return fails(job, Machine("cuda"))


def compiled(places: Sequence[Place]) -> Failures:
    """Run every candidate once, on a small problem, in as many processes as there are cores."""
    jobs = [(p, options, (2, 1) if len(extent(p)) > 1 else (64,)) for p in places for options in candidates(p)]
    names = [(place, number) for place in places for number in range(len(candidates(place)))]
    context = multiprocessing.get_context("spawn")
    # New processes now and then, as one that has lost its context fails at everything else.
    with context.Pool(os.cpu_count(), maxtasksperchild=20) as pool:
        said = pool.map(_fails_here, jobs, chunksize=1)
    return {name: why for name, why in zip(names, said, strict=True) if why}


def tuned(
    place: Place, failed: Failures, machine: Machine, say: Callable[[str], None] = print
) -> list[tuple[float, Options]]:
    """The candidates of a place that run, by their milliseconds; the first of them is put into the table."""
    model = machine.about["device"]
    dispatch.models[machine.device] = model
    times: list[tuple[float, int]] = []
    with dispatch.forcing("triton"):
        step = trial(case(place), extent(place), machine.device).step()
        for number, options in enumerate(candidates(place)):
            why = failed.get((place, number), "")
            if not why:
                configurations.chosen[model, place] = options
                try:
                    times.append((machine.milliseconds(step), number))
                except Exception as error:
                    machine.wait()
                    why = f"{type(error).__name__}: {error}"
            if why:
                say(f"{place}: {options} left out: {why}")
    if not times:
        configurations.chosen.pop((model, place), None)
        return []
    found = [(ms, candidates(place)[number]) for ms, number in sorted(times)]
    fastest, best = found[0]
    with dispatch.forcing("reference"):
        plain = machine.milliseconds(step)
    say(f"{place_name(place)}: {fastest:.3f} ms, PyTorch {plain:.3f} ms, {best}")
    configurations.chosen[model, place] = best
    entry = configurations.TABLE[place]
    if best == entry["any"]:
        entry.pop(dispatch.capability(machine.device), None)
    else:
        entry[dispatch.capability(machine.device)] = best
    return found


def write() -> None:
    rows: list[dict[str, Any]] = [
        {"kernel": kernel, "shape": shape, "options": options}
        for (kernel, shape), options in configurations.TABLE.items()
    ]
    configurations.FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
