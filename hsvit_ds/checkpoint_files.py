"""The files of a checkpoint: found, and read only if they are those that its manifest names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import RefusedError

FORMAT = 1
MANIFEST = "manifest.json"


def pointed(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that the file `pointer` ("latest" or "best") names, None where there is no such file."""
    try:
        target = folder / (folder / pointer).read_text().strip()
    except FileNotFoundError:
        return None
    if not target.is_dir():
        others = ", ".join(p.name for p in sorted(folder.glob("step-????????"))) or "none"
        raise RefusedError(f"{folder / pointer} names {target.name}, which is missing; checkpoints there: {others}")
    return target


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise RefusedError(f"{folder / MANIFEST}: not readable ({error})") from error
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


def read_file(folder: Path, file: str, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file whose size and hash are those of the manifest."""
    path, entry = folder / file, manifest["files"][file]
    remedy = "restore the file, or delete this checkpoint and name an older one in the file `latest`"
    try:
        data = path.read_bytes()
        if len(data) != entry["bytes"]:
            raise RefusedError(f"{path}: {len(data)} bytes, not {entry['bytes']}; {remedy}")
        if digest(data) != entry["sha256"]:
            raise RefusedError(f"{path}: changed since it was saved (sha256 differs); {remedy}")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RefusedError(f"{path}: not readable ({error}); {remedy}") from error


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
