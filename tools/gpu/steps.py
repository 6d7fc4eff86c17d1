"""The parts and their steps, each a process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import counters, kernels, training
from .here import Here
from .ledger import Ledger, Record, save

ROOT = Path(__file__).parents[2]
BARE = ("torch", "triton", "numpy", "timm", "pytest")
"""What every step may count on."""
LAST = 20.0
"""Seconds that a step has to end by itself when its time is over."""


Run = Callable[[Here], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    run: Run
    """Gives figures; with them, where it is not "done", its "state", and "why"; see `Record`."""
    needs: tuple[str, ...] = ()
    """Modules beyond `BARE`."""
    data: bool = False
    """Whether it needs CIFAR-10."""


def _four_widths(name: str, here: Here) -> dict[str, Any]:
    from . import scala  # which needs more than this process has where much is missing

    return scala.four_widths(name, here)


ENGINE = ("deepspeed", "pydantic", "webdataset", "simplejpeg", "tomli_w", "hjson", "safetensors", "rich")
DISTRIBUTIONS = {"tomli_w": "tomli-w"}
NEEDED = {"pydantic": ("pydantic-core", "annotated-types", "typing-inspection"), "webdataset": ("braceexpand",)}
"""What a wheel needs besides itself, of what machines with torch do not have anyway."""
PARTS: dict[str, dict[str, Step]] = {
    "correctness": {
        "kernels": Step(kernels.tests),
        "first use": Step(kernels.first_use),
        "memory checker": Step(kernels.memory_checker),
        "engine": Step(kernels.engine_tests, needs=ENGINE),
    },
    "tuning": {"every place": Step(kernels.tuning)},
    "end to end": {name: Step(run, needs=ENGINE, data=True) for name, run in training.SPEEDS.items()},
    "benchmarks": {
        "counters": Step(counters.counters),
        **{name: Step(run) for name, run in kernels.BENCHMARKS.items()},
    },
    "scala": {name: Step(partial(_four_widths, name)) for name in ("DeiT-S", "DeiT-B")},
    "training": {name: Step(run, needs=ENGINE, data=True) for name, run in training.RECIPES.items()},
}


def lacking(step: Step, data: Path | None, toy: bool) -> list[str]:
    """What is not here that a step needs."""
    names = [name for name in (*BARE, *step.needs) if not _is_here(name)]
    return names + (["CIFAR-10: --data FOLDER"] if step.data and data is None and not toy else [])


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def run_part(part: str, args: argparse.Namespace, ledger: Ledger) -> int:
    """Every step of a part that is not done; 1 where one failed."""
    end = time.monotonic() + args.limit
    failed = 0
    for name, step in PARTS[part].items():
        before = ledger.get(part, name)
        if args.only not in (None, name) or (before is not None and before.state == "done"):
            continue
        left = end - time.monotonic()
        if missing := lacking(step, args.data, args.toy):
            record = Record("lacks", why=f"{', '.join(missing)}; python -m tools.gpu wheels")
        elif left < LAST:
            print(f"{part}, {name}: no time left, the next call goes on", flush=True)
            continue
        else:
            record = _run(part, name, args, left)
        ledger.note(part, name, record)
        failed |= record.state == "failed"
        print(f"{part}, {name}: {record.state}, {record.seconds:.0f} s {record.why}".rstrip(), flush=True)
    return failed


def _answer(out: Path, part: str, name: str) -> Path:
    return out / "steps" / f"{part}, {name}.json".replace(" ", "_")


def _run(part: str, name: str, args: argparse.Namespace, seconds: float) -> Record:
    answer = _answer(args.out, part, name)
    log = args.out / "logs" / answer.with_suffix(".txt").name
    began = time.monotonic()
    command = [sys.executable, "-m", "tools.gpu", "step", "--only", f"{part}: {name}", "--out", str(args.out)]
    command += ["--limit", str(seconds - LAST), *(["--data", str(args.data)] if args.data else [])]
    try:
        answer.unlink(missing_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            command += ["--toy"] if args.toy else []
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            cut = not _ended(process, seconds)
        found = json.loads(answer.read_text()) if answer.exists() else None
    except OSError as error:
        return Record("failed", why=f"{error.filename}: {error.strerror}")
    spent = round(time.monotonic() - began, 1)
    if found is not None:
        return Record(found.pop("state", "done"), spent, found.pop("why", ""), found)
    if cut:
        return Record("cut off", spent, f"more than {seconds:.0f} s; see {log}")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Record(
        "failed", spent, f"{lines[-1][:200] if lines else 'no output'} (exit code {process.returncode}); {log}"
    )


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ends within its time; otherwise it is asked to, and then made to."""
    for wait, number in ((seconds, signal.SIGTERM), (LAST, signal.SIGKILL)):
        try:
            process.wait(wait)
            return number == signal.SIGTERM
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    process.wait()
    return False


def run_here(args: argparse.Namespace, about: dict[str, Any]) -> None:
    """In the process of a step."""
    part, _, name = args.only.partition(": ")
    end = time.monotonic() + args.limit
    here = Here(args.out.resolve(), args.data.resolve() if args.data else None, args.toy, end, about)
    save(_answer(args.out, part, name), PARTS[part][name].run(here))


def wheels() -> str:
    """The command that fetches what training needs and machines with torch lack, at the locked versions."""
    lock = (ROOT / "requirements.lock").read_text()
    names = [DISTRIBUTIONS.get(name, name) for name in ENGINE] + [n for needed in NEEDED.values() for n in needed]
    pins = [found[0] for name in names if (found := re.search(rf"^{re.escape(name)}==[^ ;\\]+", lock, re.M))]
    return (
        "python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\\n"
        "    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\\n"
        f"    -d wheels {' '.join(p for p in pins if not p.startswith('deepspeed'))}\n"
        f"python3 -m pip wheel --no-deps -w wheels {next(p for p in pins if p.startswith('deepspeed'))}\n"
        "# there: python3 -m pip install --no-index --no-deps wheels/*.whl"
    )
