"""What has been found so far, in one file that a kill or a full disk does not spoil."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

FILE = "results.json"


@dataclass
class Record:
    """Of one step."""

    state: str
    """"done", "partial" (there is more to come), "failed", "cut off", or "lacks" (what it needs is not there)."""
    seconds: float = 0.0
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def machine(toy: bool) -> dict[str, Any]:
    """What the results hold for."""
    found: dict[str, Any] = {
        "device": "interpreter, not timed",
        "driver": "none",
        "memory, GiB": 0,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if toy:
        return found
    if not torch.cuda.is_available():
        sys.exit("tools.gpu: no CUDA device here; --toy rehearses without one")
    from hsvit_kernels.first_use import Machine

    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return found | {
        "device": torch.cuda.get_device_name(0),
        "driver": Machine("cuda").about["driver"],
        "memory, GiB": round(memory),
    }


def save(path: Path, value: Any) -> None:
    """As JSON, wholly or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


class Ledger:
    """The results in a folder, of one machine.

    Raises:
        SystemExit: the folder has results of another one.
    """

    SAME = ("device", "torch", "triton")

    def __init__(self, folder: Path, here: dict[str, Any]) -> None:
        self.folder, self.machine = folder, here
        self.records: dict[str, dict[str, Record]] = {}
        path = folder / FILE
        if path.exists():
            found = json.loads(path.read_text())
            for key in self.SAME:
                if found["machine"][key] != here[key]:
                    sys.exit(
                        f"{path} has results of {found['machine'][key]}, this is {here[key]}: choose another --out"
                    )
            self.records = {
                part: {name: Record(**record) for name, record in steps.items()}
                for part, steps in found["parts"].items()
            }

    def get(self, part: str, step: str) -> Record | None:
        return self.records.get(part, {}).get(step)

    def note(self, part: str, step: str, record: Record) -> None:
        """Keep what a step has found; where the disk is full for this run only, and that is said."""
        self.records.setdefault(part, {})[step] = record
        parts = {part: {name: asdict(r) for name, r in steps.items()} for part, steps in self.records.items()}
        try:
            save(self.folder / FILE, {"machine": self.machine, "parts": parts})
        except OSError as error:
            print(f"warning: {self.folder / FILE}: {error.strerror}; {step}: {json.dumps(asdict(record))}", flush=True)
