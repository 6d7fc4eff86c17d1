"""The host of a rank: its processor, and what it is busy with, measured by MLflow's monitors into a file of the run's
folder."""

from __future__ import annotations

import json
import platform
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import first_line, warn

INTERVAL = 10.0
"""Seconds between two lines."""
_NAMES = "system-{}.jsonl"


def files(folder: Path) -> list[tuple[str, Path]]:
    """(host, file) of every host that has measured itself."""
    before, after = _NAMES.split("{}")
    found = sorted(folder.glob(_NAMES.format("*")))
    return [(path.name.removeprefix(before).removesuffix(after), path) for path in found]


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Within the block a thread writes a line every `INTERVAL` seconds."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(folder, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _watch(folder: Path, ended: threading.Event) -> None:
    path = folder / _NAMES.format(socket.gethostname())
    try:
        monitors = _monitors()
        number = path.read_bytes().count(b"\n") if path.exists() else 0
        while not ended.wait(INTERVAL):
            line: dict[str, Any] = {"step": number, "time": time.time()}
            for monitor in monitors:
                monitor.collect_metrics()
                line |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            number += 1
    except Exception as error:  # whatever a driver does must not touch the run
        warn(f"{path.name}: the host is not measured any more: {first_line(error)}")


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # no GPU of NVIDIA's
        monitors.append(GPUMonitor())
    return monitors
