"""Milliseconds of one image by width on this machine, measured when asked for and kept beside the run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import counted, warn
from ..run import system

FILE = "latency.json"


@dataclass(frozen=True)
class Latency:
    """Of batches of one image, medians. device: its name. threads: PyTorch's; 0 on a GPU. ms: by width, "0.50"."""

    device: str
    threads: int
    ms: dict[str, float]

    @property
    def where(self) -> str:
        """What it was measured on, in words."""
        return self.device + (f", {counted(self.threads, 'thread')}" if self.threads else "")


def cached(folder: Path) -> Latency | None:
    """What was measured on a device of this machine, its GPU first; None where nothing was."""
    try:
        found = _read(folder)
        return next((Latency(device, **found[device]) for device in devices() if device in found), None)
    except (ValueError, TypeError) as error:
        warn(f"{folder / FILE}: cannot be read ({error}); --latency measures anew")
        return None


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads((folder / FILE).read_text("utf-8"))
    except OSError:
        return {}
    if not isinstance(found, dict):
        raise ValueError("no table of devices")
    return found


def devices() -> list[str]:
    """The names of this machine's, those of GPUs first; without PyTorch, which takes seconds to import."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    texts = [path.read_text("utf-8") for path in gpus] if os.environ.get("CUDA_VISIBLE_DEVICES") != "" else []
    lines = [line for text in texts for line in text.splitlines() if line.startswith("Model:")]
    return [*dict.fromkeys(line.partition(":")[2].strip() for line in lines), system.cpu()]


def measure(folder: Path) -> Latency:
    """Of every width that the run in a folder has trained, by its last checkpoint; kept beside it.

    Raises:
        RefusedError: no checkpoint there.
    """
    import torch

    from . import budget, saved

    run = saved.open_run(folder)
    device = run.grid.device
    try:
        model = run.model.to(device)
        ms = {str(width): budget.latency_ms(model.subnet(width)) for width in run.trained}
    finally:
        run.grid.close()
    on_gpu = device.type == "cuda"
    found = Latency(
        torch.cuda.get_device_name(device) if on_gpu else system.cpu(), 0 if on_gpu else torch.get_num_threads(), ms
    )
    _keep(folder, found)
    return found


def _keep(folder: Path, found: Latency) -> None:
    try:
        others = _read(folder)
    except ValueError:
        others = {}
    values = asdict(found)
    text = json.dumps(others | {values.pop("device"): values}, indent=1) + "\n"
    try:
        partial = folder / f"{FILE}.partial"
        partial.write_text(text, "utf-8")
        partial.rename(folder / FILE)
    except OSError as error:
        warn(f"{folder / FILE}: {error.strerror}; it is measured again the next time")
