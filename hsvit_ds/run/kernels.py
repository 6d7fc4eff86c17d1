"""Which kernels a run uses: its cases, tried once on each device model among the ranks, and one decision for all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hsvit_kernels import Findings, Verdict, first_use, listing
from hsvit_kernels.cases import Cases
from hsvit_kernels.dispatch import KERNELS, forced
from hsvit_kernels.findings import fastest, tried
from hsvit_kernels.first_use import Machine

from ..data import splits
from ..engine.zero import step_state
from ..errors import RefusedError
from ..grid.grid import Grid
from ..models import timm_models
from ..models.batchnorm import recalibrate
from ..models.slimmable import Width
from .recipe import Plan, Recipe
from .rehearsal import rehearsal

FILE = "kernels.json"
"""In a run's folder: the decision, and the findings that it rests on."""


def is_open(device: torch.device) -> bool:
    """Whether there is something to choose: on a GPU, where neither the recipe nor the environment has chosen."""
    return device.type == "cuda" and forced() == "auto"


def cases(recipe: Recipe, plan: Plan, widths: Sequence[Width], teacher: nn.Module | None = None) -> Cases:
    """What a rank asks of `hsvit_kernels` in training and evaluation at these widths.

    teacher: on its device, in eval mode; it sees what the model sees.
    """
    found: Cases = {}
    if not isinstance(recipe.model, timm_models.Config):
        with rehearsal(recipe, plan) as (model, images, draw), listing() as found:
            step_state(model).gathers = True
            for width in widths:
                model(images, draw=draw, width=width)
            held_out = images[:1].expand(recipe.data.eval_batch, -1, -1, -1)
            # Not in plain eval mode: BatchNorm has no statistics of a smaller width yet.
            with recalibrate(model, widths):
                for width in widths:
                    model(held_out, width=width)
    if teacher is not None:
        weight = next(teacher.parameters())
        facts = splits.facts(recipe.data)
        shape = (facts.channels, facts.image_size, facts.image_size)
        with listing() as asked, torch.no_grad():
            teacher(torch.zeros(plan.micro_batch, *shape, dtype=weight.dtype, device=weight.device))
        found |= asked
    return found


@dataclass(frozen=True)
class Decision:
    """used: by case, the kernel that computes it, or "reference". machines: the findings on each device model. notes:
    what a person should know, a line each."""

    used: dict[str, str]
    machines: list[Findings]
    notes: list[str]

    def verdict(self, case: str) -> Verdict:
        """The one that counts: on the kernel in use, or Triton's; of the device model where it does worst."""
        name = tried(case, self.used[case])
        return min((machine.verdicts[name] for machine in self.machines), key=lambda verdict: verdict.wins)


def decide(grid: Grid, wanted: Cases, file: Path, machine: Machine | None = None) -> Decision:
    """Try what is not known, on the first rank of each device model, and use a kernel where it wins on all of them.
    Collective.

    Args:
        file: of an earlier start of this run, if it is there; its findings go before those of the device's own file.
            Replaced.
        machine: stands for the grid's device.

    Raises:
        RefusedError: a kernel took the device with it.
    """
    machine = machine or Machine(grid.device)
    before, unread = grid.broadcast(_read(file) if grid.is_main else (None, []))
    abouts = grid.gather(machine.about)
    found = None
    if abouts.index(machine.about) == grid.rank:
        known = next((f for f in (before.machines if before else []) if f.about == machine.about), None)
        try:
            found = first_use.attempt(wanted, machine, known)
        except first_use.LostDeviceError as error:
            raise RefusedError(f"engine.kernels = auto: {error}") from error
    machines = [f for f in grid.gather(found) if f is not None]
    names = [str(case) for case in wanted]
    used = {name: fastest(name, machines) for name in names}
    mine = next(f for f in machines if f.about == machine.about)
    first_use.install(mine, wanted, machine, used)
    notes = [f"{f.about['device']}: {note}" for f in machines for note in f.notes]
    decision = Decision(used, machines, [*unread, *notes, *_changes(before, used, machines)])
    if grid.is_main:
        try:
            _write(file, decision)
        except OSError as error:
            decision.notes.append(f"warning: {file}: {error.strerror}: a resumed run will choose its kernels anew")
    return decision


def _changes(before: Decision | None, used: Mapping[str, str], machines: Sequence[Findings]) -> list[str]:
    """What an earlier start of the run computed otherwise."""
    if before is None:
        return []
    lines = [
        f"warning: {name}: by {WORDS[now]} now, by {WORDS[before.used[name]]} before; results differ by rounding"
        for name, now in used.items()
        if before.used.get(name, now) != now
    ]
    then = {f.about["device"]: f.launches for f in before.machines}
    if not lines and any(
        f.launches.get(place, options) != options
        for f in machines
        for place, options in then.get(f.about["device"], {}).items()
    ):
        lines.append("warning: kernels are launched otherwise than before; results differ by rounding")
    return lines


def _read(file: Path) -> tuple[Decision | None, list[str]]:
    """What an earlier start decided, if there was one and it can be read; a line if not."""
    if not file.exists():
        return None, []
    try:
        table: Any = json.loads(file.read_text("utf-8"))
        used = {str(name): str(value) for name, value in table["used"].items()}
        if unknown := {*used.values()} - {*WORDS}:
            raise ValueError(f"no such kernel: {', '.join(sorted(unknown))}")
        return Decision(used, [Findings.of(machine) for machine in table["machines"]], []), []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, [f"warning: {file} cannot be read ({error}): kernels are chosen anew"]


def _write(file: Path, decision: Decision) -> None:
    table = {"used": decision.used, "machines": [machine.to_table() for machine in decision.machines]}
    file.write_text(json.dumps(table, indent=1), "utf-8")


def rows(decision: Decision) -> list[tuple[str, ...]]:
    """For a table: what, by whom, kernel and reference milliseconds. Many cases of an operation share a row; what went
    wrong has one of its own."""
    found: list[tuple[str, ...]] = []
    operations: dict[str, list[str]] = {}
    for name in decision.used:
        operations.setdefault(name.partition(" ")[0], []).append(name)
    for operation, names in operations.items():
        verdicts = {name: decision.verdict(name) for name in names}
        sound = [name for name in names if verdicts[name].state == "right"]
        together = sound if len(names) > SHOWN else []
        for name in names:
            if name not in together:
                verdict = verdicts[name]
                kernel = decision.used[name]
                by = f"reference: {_why(verdict)}" if kernel == "reference" else WORDS[kernel]
                found.append((name, by, *_times(verdict)))
            found += _fallbacks(decision, name)
        if together:
            fused = sum(decision.used[name] != "reference" for name in together)
            by = f"kernel in {fused} of them" if fused else "reference: slower"
            sums = (sum(getattr(verdicts[name], of) for name in together) for of in ("ms", "reference_ms"))
            found.append((f"{operation}, {len(together)} cases", by, *(f"{ms:.3f}" for ms in sums)))
    return found


def _fallbacks(decision: Decision, case: str) -> list[tuple[str, ...]]:
    """A row where there is a kernel in CUDA C++ and it is not right."""
    name = tried(case, "cuda")
    verdicts = [machine.verdicts[name] for machine in decision.machines if name in machine.verdicts]
    wrong = [verdict for verdict in verdicts if verdict.state != "right"]
    return [(name, f"not used: {_why(wrong[0])}", "-", "-")] if wrong else []


WORDS = dict(zip((*KERNELS, "reference"), ("Triton", "CUDA C++", "the reference"), strict=True))
COLUMNS = ("operation", "computed by", "kernel, ms", "PyTorch, ms")
SHOWN = 4
"""Cases of an operation that have rows of their own."""


def _why(verdict: Verdict) -> str:
    return verdict.why if verdict.state == "right" else f"{verdict.state}: {verdict.why}"


def _times(verdict: Verdict) -> tuple[str, str]:
    return (f"{verdict.ms:.3f}", f"{verdict.reference_ms:.3f}") if verdict.state == "right" else ("-", "-")
