"""What is in a kernel for NVIDIA GPUs, read from its machine code by the tools that come with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from triton import knobs

from hsvit_ds.errors import counted

Trips = tuple[float, tuple["Trips", ...]]
"""How often a loop goes round for each time it is entered, and the same of the loops within, in order."""
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(?P<name>[A-Z0-9_]+[A-Za-z0-9_.]*)(?P<rest>.*)")


@dataclass
class Loop:
    """Instructions from `first` to `last`, a branch back to the first one."""

    first: int
    last: int
    loops: list[Loop] = field(default_factory=list)


@dataclass
class Code:
    """A kernel. registers: of a thread. stack: bytes of one. instructions: their names, in order. ahead: branches
    ahead, from and to. loop: all of it, with its loops."""

    registers: int
    stack: int
    instructions: list[str]
    ahead: list[tuple[int, int]]
    loop: Loop

    def figures(self) -> dict[str, Any]:
        """Registers a thread, bytes of its stack, and instructions by kind."""
        kinds = Counter(name.partition(".")[0] for name in self.instructions)
        tensor = sum(count for kind, count in kinds.items() if re.fullmatch(r"HMMA|.*GMMA|UTC.*MMA", kind))
        return {
            "registers": self.registers,
            "stack": self.stack,
            "spills": kinds["LDL"] + kinds["STL"],
            "instructions": kinds.total(),
            "tensor core": tensor,
        }

    def executed(self, trips: Sequence[Trips], path: Sequence[int] = ()) -> Counter[str]:
        """Instructions of a warp by name, where the loops go round so often.

        Args:
            path: to a loop, of which one round is counted alone: its number, and so on inwards.

        Raises:
            ValueError: there are other loops than `trips` is for.
        """
        loop = self.loop
        for number in path:
            loop, (_, trips) = loop.loops[number], trips[number]
        return self._of(loop, 1.0, trips)

    def _of(self, loop: Loop, times: float, trips: Sequence[Trips]) -> Counter[str]:
        if len(trips) != len(loop.loops):
            lengths = ", ".join(str(within.last - within.first + 1) for within in loop.loops)
            raise ValueError(
                f"{counted(len(loop.loops), 'loop')} of {lengths} instructions, where {len(trips)} are known"
            )
        found: Counter[str] = Counter()
        at = loop.first
        for within, (count, inner) in zip(loop.loops, trips, strict=True):
            _add(found, self.instructions[at : within.first], times)
            found.update(self._of(within, times * count, inner))
            at = within.last + 1
        _add(found, self.instructions[at : loop.last + 1], times)
        return found

    def skipped(self, path: Sequence[int]) -> int:
        """Instructions that the furthest branch ahead within a loop leaves out."""
        loop = self.loop
        for number in path:
            loop = loop.loops[number]
        return max((to - at - 1 for at, to in self.ahead if loop.first <= at < to <= loop.last + 1), default=0)


def _add(to: Counter[str], names: Sequence[str], times: float) -> None:
    for name in names:
        to[name] += times  # type: ignore[assignment]


def read(cubin: bytes) -> Code:
    """The one kernel of a file of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        assembly = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources is not None, usage
    names: list[str] = []
    places: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(names)
        elif found := _INSTRUCTION.match(line):
            if found["name"].startswith("BRA") and (to := re.search(r"\.L_x_\d+", found["rest"])):
                branches.append((len(names), to[0]))
            names.append(found["name"])
    back = {(places[to], at) for at, to in branches if places[to] < at}
    ahead = [(at, places[to]) for at, to in branches if places[to] > at]
    return Code(int(resources[1]), int(resources[2]), names, ahead, _nested(back, len(names)))


def _nested(back: set[tuple[int, int]], count: int) -> Loop:
    """Loops within loops, from branches back."""
    whole = Loop(0, count - 1)
    for first, last in sorted(back, key=lambda branch: (branch[0], -branch[1])):
        around = whole
        while around.loops and around.loops[-1].last >= last:
            around = around.loops[-1]
        around.loops.append(Loop(first, last))
    return whole


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
