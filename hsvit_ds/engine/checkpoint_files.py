"""The files of a checkpoint: found, read only if they are those that its manifest names, and written to stay."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..errors import RefusedError

FORMAT = 2
MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
REMEDY = "restore the file, or delete this checkpoint and name an older one in the file `latest`"
STEPS = "step-*[0-9]"
"""Complete checkpoints: step-00000070, and step-00000070-2 where it was saved again."""


def pointed(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that the file `pointer` ("latest" or "best") names, None where there is no such file."""
    try:
        target = folder / (folder / pointer).read_text("utf-8").strip()
    except FileNotFoundError:
        return None
    if not target.is_dir():
        others = ", ".join(p.name for p in sorted(folder.glob(STEPS))) or "none"
        raise RefusedError(f"{folder / pointer} names {target.name}, which is missing; checkpoints there: {others}")
    return target


def chosen(run: Path, which: str) -> Path:
    """The checkpoint of a run that is its "latest" or "best", or of a step.

    Raises:
        RefusedError: there is none.
    """
    folder = run / "checkpoints"
    there = [path for path in sorted(folder.glob(STEPS)) if path.is_dir()]
    if which in ("latest", "best"):
        if found := pointed(folder, which):
            return found
        why = f"{folder / which} is missing"
    else:
        if found := next((path for path in reversed(there) if which.isdecimal() and _step(path) == int(which)), None):
            return found
        steps = ", ".join(sorted({str(_step(path)) for path in there}, key=int)) or "none"
        why = f"there are latest, best, and those of steps: {steps}"
    raise RefusedError(f"{run}: no checkpoint {which} of a run there; {why}")


def best_step(folder: Path) -> int | None:
    """The step of the best checkpoint, None where there is none."""
    best = pointed(folder, "best")
    return None if best is None else _step(best)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the checkpoint in a folder is, with the sizes and hashes of its files."""
    try:
        data, hashed = (folder / MANIFEST).read_bytes(), (folder / MANIFEST_HASH).read_bytes()
        if hashed != digest(data).encode():
            raise RefusedError(f"{folder / MANIFEST}: changed since it was saved (sha256 differs); {REMEDY}")
        manifest: dict[str, Any] = json.loads(data)
    except (OSError, ValueError) as error:
        raise RefusedError(f"{folder / MANIFEST}: not readable ({error}); {REMEDY}") from error
    if manifest.get("format") != FORMAT:
        raise RefusedError(f"{folder / MANIFEST}: format {manifest.get('format')!r}, this version reads {FORMAT}")
    return manifest


def read_weights(folder: Path, manifest: Mapping[str, Any], ema: bool) -> dict[str, Tensor]:
    """The whole model's tensors by name, buffers included; ema: the averaged ones."""
    submodules = sorted(f.removesuffix(".safetensors") for f in manifest["files"] if f.startswith("submodule-"))
    parts = ["model"]
    if submodules:
        parts = [*shared_parts(manifest), *(part for part in submodules if "." not in part)]
    weights = read_parts(folder, manifest, parts, "")
    if ema:
        averages = read_parts(folder, manifest, parts, ".ema", "the run keeps no average (ema.decay = 0)")
        weights |= averages
    return weights


def shared_parts(manifest: Mapping[str, Any]) -> list[str]:
    """What all ranks of a replica hold alike: the head, and a backbone where there is one."""
    return [part for part in ("head", "backbone") if f"{part}.safetensors" in manifest["files"]]


def read_parts(
    folder: Path,
    manifest: Mapping[str, Any],
    parts: list[str],
    kind: str,
    missing: str = "of another architecture",
) -> dict[str, Tensor]:
    """Whole tensors by name: submodules stacked in their order, everything else as it is."""
    stacks: dict[str, list[Tensor]] = {}
    for part in parts:
        file = f"{part}{kind}.safetensors"
        if file in manifest["files"]:
            for name, tensor in read_file(folder, file, manifest).items():
                stacks.setdefault(name, []).append(tensor)
        elif kind == "" or (kind == ".ema" and part != "backbone"):
            raise RefusedError(f"{folder / MANIFEST} names no {file}: {missing}")
    return {name: torch.cat(pieces) if pieces[0].dim() else pieces[0] for name, pieces in stacks.items()}


def files_of(submodules: Iterable[int], manifest: Mapping[str, Any]) -> list[str]:
    """The files of some submodules: weights, moments, averages."""
    parts = {f"submodule-{submodule:03d}" for submodule in submodules}
    return [file for file in manifest["files"] if file.partition(".")[0] in parts]


def read_file(folder: Path, file: str, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file whose size and hash are those of the manifest."""
    try:
        return load(read_bytes(folder, file, manifest))
    except SafetensorError as error:
        raise RefusedError(f"{folder / file}: not readable ({error}); {REMEDY}") from error


def read_bytes(folder: Path, file: str, manifest: Mapping[str, Any]) -> bytes:
    """The content of a checkpoint file whose size and hash are those of the manifest."""
    path, entry = folder / file, manifest["files"][file]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{path}: not readable ({error}); {REMEDY}") from error
    if len(data) != entry["bytes"]:
        raise RefusedError(f"{path}: {len(data)} bytes, not {entry['bytes']}; {REMEDY}")
    if digest(data) != entry["sha256"]:
        raise RefusedError(f"{path}: changed since it was saved (sha256 differs); {REMEDY}")
    return data


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that is on the disk afterwards, whatever happens to the machine."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def completed(saved: dict[str, Any], config: Any) -> dict[str, Any]:
    """A table of a saved recipe, with the defaults of those keys of a component that it does not know."""
    defaults = {entry.name: entry.default for entry in fields(config) if entry.default is not MISSING}
    inner = {
        entry.name: completed(saved.get(entry.name, {}), value)
        for entry in fields(config)
        if is_dataclass(value := getattr(config, entry.name))
    }
    return dict(json.loads(json.dumps(defaults))) | saved | inner
