"""Correctness, tuning and benchmarks of the kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import hsvit_kernels
from hsvit_kernels import configurations
from hsvit_kernels.cases import Case, Cases
from hsvit_kernels.configurations import Place
from hsvit_kernels.findings import Verdict, place_name, tried
from hsvit_kernels.first_use import Machine
from tools import tune_kernels
from tools.benchmarks import kernels as benchmarks
from tools.benchmarks.attention_baselines import ATTENTION, Attention

from .here import Here, fitting, smaller
from .ledger import save

ROOT = Path(__file__).parents[2]
# Without what it compiles for other devices, for which it needs the recipes.
TESTS = ("-m", "gpu", "tests/kernels", "--ignore", "tests/kernels/test_compiled.py")
CHECKER = "test_the_memory_checker_finds_nothing"
TOY_PLACE: Place = ("linear_forward", (0,))


class Interpreter(Machine):
    """Stands for a GPU: computes once, and does not time."""

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__("cpu")
        self._about = {name: str(value) for name, value in about.items()}

    @property
    def about(self) -> dict[str, str]:
        return self._about

    def milliseconds(self, step: Callable[[], Any]) -> float:
        step()
        return 0.0

    def wait(self) -> None:
        pass

    def release(self) -> None:
        pass


def _machine(here: Here) -> Machine:
    os.environ["HSVIT_KERNELS_CACHE"] = str(here.out / "cache")  # what is known elsewhere is not to be believed
    return Interpreter(here.about) if here.toy else Machine("cuda")


# Correctness


def _pytest(here: Here, name: str, *arguments: str) -> dict[str, Any]:
    """Counts, and the names of what failed."""
    file = here.out / "logs" / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={file}", *arguments]
    file.unlink(missing_ok=True)
    try:
        subprocess.run(command, cwd=ROOT, timeout=here.left, check=False)
    except subprocess.TimeoutExpired:
        return {"state": "cut off", "why": "its tests take longer than the time that was left"}
    if not file.exists():
        raise RuntimeError("pytest did not begin; its own words stand above")
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ElementTree.parse(file).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            failures.append(f"{case.get('classname')}::{case.get('name')}")
    why = f"{len(failures)} of {sum(counts.values())} tests failed: {', '.join(failures)[:500]}" if failures else ""
    return counts | {"failures": failures, "why": why, "state": "failed" if failures else "done"}


def tests(here: Here) -> dict[str, Any]:
    """Rounding, repeatability, masks and gradients of every launch."""
    if here.toy:
        return _pytest(here, "kernels", "tests/kernels/test_random.py")
    several = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return _pytest(here, "kernels", *TESTS, *several, "-k", f"not {CHECKER}")


def memory_checker(here: Here) -> dict[str, Any]:
    marks = ["--collect-only"] if here.toy else []
    return _pytest(here, "memory_checker", *TESTS, "-k", CHECKER, *marks)


def engine_tests(here: Here) -> dict[str, Any]:
    """NCCL, captured steps, the host that waits for nothing."""
    marks = ["--collect-only"] if here.toy else []
    return _pytest(here, "engine", "-m", "gpu", "tests/test_gpu.py", *marks)


def first_use(here: Here) -> dict[str, Any]:
    """The verdict on every place of the table."""
    machine = _machine(here)
    found: dict[str, Any] = {}
    for place in [TOY_PLACE] if here.toy else configurations.TABLE:
        case = tune_kernels.case(place)
        if here.toy:  # the interpreter's bf16 is garbage
            case = case._replace(dtype=torch.float16, weights=torch.float16)

        def verdicts(batch: int, case: Case = case, place: Place = place) -> dict[str, Verdict]:
            extent = (batch, *tune_kernels.extent(place)[1:])
            cases: Cases = {case: extent}
            given = hsvit_kernels.prepare(cases, machine.device, machine=machine).verdicts
            names = {"": str(case), ", CUDA C++": tried(str(case), "cuda")}
            return {place_name(place) + by: given[name] for by, name in names.items() if name in given}

        asked = 16 if here.toy else tune_kernels.extent(place)[0]
        batch, answers = fitting(asked, verdicts)
        found |= {name: vars(answer) | {"size": smaller(asked, batch)} for name, answer in answers.items()}
    wrong = [place for place, answer in found.items() if answer["state"] != "right"]
    why = f"not right: {', '.join(wrong)}" if wrong else ""
    return {"verdicts": found, "why": why, "state": "failed" if wrong else "done"}


# Tuning


def tuning(here: Here) -> dict[str, Any]:
    """Every launch of the table timed; the table in the results, and in the checkout, after each entry."""
    kept, table = here.out / "tuned.json", here.out / "configurations.json"
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    if here.toy:
        configurations.FILE = table
        tune_kernels.extent = lambda place: (16,)
    machine = _machine(here)
    places = [place for place in ([TOY_PLACE] if here.toy else configurations.TABLE) if place_name(place) not in done]
    failed = {} if here.toy else tune_kernels.compiled(places)
    for place in places:
        if here.left < 15:
            why = f"{len(done)} of {len(configurations.TABLE)} places so far"
            return {"tuned": done, "state": "partial", "why": why}
        said: list[str] = []
        times = tune_kernels.tuned(place, failed, machine, said.append)
        print("\n".join(said), flush=True)
        done[place_name(place)] = {"said": said[-1] if said else "nothing runs", "times": times}
        tune_kernels.write()
        if table != configurations.FILE:
            shutil.copy(configurations.FILE, table)
        save(kept, done)
    return {"tuned": done}


def use_tuned(here: Here) -> None:
    """Let the checkout have the table of these results, as after a change of machines."""
    table = here.out / "configurations.json"
    if table.exists() and not here.toy:
        shutil.copy(table, configurations.FILE)


# Benchmarks


def _rows(rows: Iterator[dict[str, Any]], here: Here) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        found.append(row)
        print("  ".join(f"{value}" for value in row.values()), flush=True)
    return found


def _measured(here: Here, batch: int, rows: Callable[[benchmarks.Roofs, int], Iterator[dict[str, Any]]]) -> Any:
    roofs = benchmarks.Roofs(1, 1) if here.toy else benchmarks.measured_roofs()
    fits, found = fitting(batch, lambda batch: _rows(rows(roofs, batch), here))
    return {"rows": found, "roofs": vars(roofs), "why": smaller(batch, fits)}


def attention(case: Attention, here: Here) -> dict[str, Any]:
    case = Attention(1, 1, 3, 16, 1, heads=2) if here.toy else case
    dtype = torch.float32 if here.toy else torch.bfloat16
    return _measured(
        here,
        case.batch,
        lambda roofs, batch: benchmarks.attention_rows(replace(case, batch=batch), here.device, dtype, roofs),
    )


def linear(name: str, here: Here) -> dict[str, Any]:
    cases = [case for case in benchmarks.LINEAR if case.name == name]
    if here.toy:
        cases = [replace(cases[0], rows=40, full=(96, 64))]
    dtype = torch.float32 if here.toy else torch.bfloat16

    def rows(roofs: benchmarks.Roofs, count: int) -> Iterator[dict[str, Any]]:
        for case in cases:
            yield from benchmarks.linear_rows(replace(case, rows=count), here.device, dtype, roofs)

    return _measured(here, cases[0].rows, rows)


def four_widths(here: Here) -> dict[str, Any]:
    tiny = {"tokens": 4, "width": 64, "depth": 1, "heads": 2} if here.toy else {}
    return _measured(
        here,
        1 if here.toy else 256,
        lambda roofs, batch: benchmarks.four_widths(here.device, roofs, batch=batch, **tiny),
    )


BENCHMARKS: dict[str, Callable[[Here], dict[str, Any]]] = {
    **{f"attention {case.name}": partial(attention, case) for case in ATTENTION},
    "four widths": four_widths,
    **{f"linear {name}": partial(linear, name) for name in dict.fromkeys(case.name for case in benchmarks.LINEAR)},
}
