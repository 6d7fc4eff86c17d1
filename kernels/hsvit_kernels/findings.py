"""What the first use of kernels found on a device model, and the file that remembers it.

One file for each device model, driver and version of torch, triton and this package, which processes share: a lock is
held while kernels are tried. Before a case is tried it is noted as "trying". Whoever finds that note with the lock free
knows that a process died over the case, as what kills the CUDA context cannot be caught.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from .cases import Case
from .configurations import Options, Place
from .dispatch import KERNELS

STATES = ("right", "wrong", "raised", "died")
_TRYING = "trying"
_REMEMBERED = ("right", "wrong", "died")  # what raised, as for want of memory, is tried again at the next start


@dataclass(frozen=True)
class Verdict:
    """On one case."""

    state: str
    """"right" or "wrong" (against the reference), "raised" an error, or "died": took the process with it."""
    why: str = ""
    """Of what is not right."""
    excess: float = 0.0
    """The largest error over the one that is allowed."""
    ms: float = 0.0
    """Of the kernel: a forward and backward in training, otherwise one call."""
    reference_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state = {self.state!r}: must be one of {', '.join(STATES)}")

    @property
    def wins(self) -> bool:
        """Whether the kernel is right and was faster."""
        return self.state == "right" and self.ms < self.reference_ms


@dataclass
class Findings:
    """On one device model.

    about: the device, its driver and the versions. launches: the options chosen, by place. verdicts: by what was tried
    (`tried`). notes: what a person should know, a line each; not remembered.
    """

    about: dict[str, str]
    launches: dict[str, Options] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def on(self, cases: Iterable[Case]) -> Findings:
        """A copy with the verdicts on some cases."""
        tries = (tried(str(case), kernel) for case in cases for kernel in KERNELS)
        names = [name for name in tries if name in self.verdicts]
        return Findings(
            self.about, dict(self.launches), {name: self.verdicts[name] for name in names}, list(self.notes)
        )

    def to_table(self) -> dict[str, Any]:
        """As JSON holds it."""
        table = asdict(self)
        del table["notes"]
        return table

    @classmethod
    def of(cls, table: Any) -> Findings:
        """From `to_table`'s.

        Raises:
            ValueError: anything else.
        """
        try:
            launches = {str(name): dict(options) for name, options in table["launches"].items()}
            verdicts = {str(name): Verdict(**verdict) for name, verdict in table["verdicts"].items()}
            return cls({str(k): str(v) for k, v in table["about"].items()}, launches, verdicts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not findings of kernels: {error!r}") from error


def tried(case: str, kernel: str) -> str:
    """A case by one of `dispatch.KERNELS`, as `Findings.verdicts` has it."""
    return f"{case} in CUDA C++" if kernel == "cuda" else case


def fastest(case: str, on: Sequence[Findings]) -> str:
    """The kernel that wins on every device model, the faster one if there are two; "reference" if there is none."""
    slowest = {}
    for kernel in KERNELS:
        verdicts = [found.verdicts.get(tried(case, kernel)) for found in on]
        if all(verdict is not None and verdict.wins for verdict in verdicts):
            slowest[kernel] = max(verdict.ms for verdict in verdicts if verdict is not None)
    return min(slowest, key=slowest.__getitem__, default="reference")


def place_name(place: Place) -> str:
    """A place as `Findings.launches` has it: "attention_forward 32x64x1"."""
    return f"{place[0]} {'x'.join(map(str, place[1]))}"


def folder() -> Path | None:
    """HSVIT_KERNELS_CACHE, or ~/.cache/hsvit_kernels; None where there is no home."""
    if named := os.environ.get("HSVIT_KERNELS_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "hsvit_kernels"
    except RuntimeError:
        return None


class Memory:
    """The file of one identity (`Findings.about`), locked within the block.

    Args:
        patience: seconds to wait for another process that is trying kernels.

    What stands against reading or writing becomes one line in `notes`; findings are then not remembered.

    Raises:
        TimeoutError: the other process takes longer.
    """

    def __init__(self, about: dict[str, str], patience: float = 300.0) -> None:
        self.about, self.patience = about, patience
        self.notes: list[str] = []
        where = folder()
        name = re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(about.values()))
        self.path = None if where is None else where / f"{name}.json"
        self._lock: TextIO | None = None
        self._trying: str | None = None
        self._found = Findings(about)

    def __enter__(self) -> Memory:
        if self.path is None:
            self.notes.append("there is no home for what kernels are found to be: set HSVIT_KERNELS_CACHE to a folder")
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self.path.with_suffix(".lock").open("w")
        except OSError as error:
            self._forget(error)
            return self
        self._wait(self._lock)
        return self

    def _wait(self, lock: TextIO) -> None:
        end = time.monotonic() + self.patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    lock.close()
                    raise TimeoutError(
                        f"another process has held {lock.name} for {self.patience:g} s: end it, or set "
                        "HSVIT_KERNELS_CACHE to another folder"
                    ) from None
                time.sleep(0.05)
            except OSError as error:  # a file system without locks
                self._forget(error)
                return

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def read(self) -> Findings:
        """What is remembered; a case over which a process died is a verdict of its own."""
        if self.path is None or not self.path.exists():
            return self._found
        try:
            table = json.loads(self.path.read_text())
            lost = [name for name, verdict in table["verdicts"].items() if verdict == _TRYING]
            for name in lost:
                table["verdicts"][name] = asdict(Verdict("died", "a process died while it tried this"))
            found = Findings.of(table)
            if found.about != self.about:
                raise ValueError(f"it is of {found.about}")
        except OSError as error:
            self._forget(error)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = str(error).partition("\n")[0]
            self.notes.append(f"{self.path} cannot be read ({why}): kernels are tried anew, and it is replaced")
        else:
            self.notes += [f"{name}: a process died while it tried this; it is left out" for name in lost]
            self._found = found
        return self._found

    def trying(self, name: str | None) -> None:
        """Note what is tried next; None: nothing, after all."""
        self._trying = name
        self._write()

    def add(self, name: str, verdict: Verdict, launches: dict[str, Options]) -> None:
        """Remember a verdict, if it is one to remember, and the launches that it was found with."""
        self._trying = None
        if verdict.state in _REMEMBERED:
            self._found.verdicts[name] = verdict
            self._found.launches |= launches
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        table = self._found.to_table()
        if self._trying is not None:
            table["verdicts"][self._trying] = _TRYING
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(table, indent=1))
            partial.replace(self.path)
        except OSError as error:
            self._forget(error)

    def _forget(self, error: OSError) -> None:
        self.notes.append(
            f"{self.path}: {error.strerror}: what kernels are found to be is not remembered; HSVIT_KERNELS_CACHE names "
            "another folder"
        )
        self.path = None
