"""Checkpoints in one canonical form, whatever the grid, the ZeRO stage or the number of ranks.

A folder `step-00000123` holds for every submodule, the head and the backbone (or for the whole model) fp32 weights with
BatchNorm's buffers, optimizer moments by parameter name, and the EMA, as safetensors, and `manifest.json` with the
position, the recipe, versions and a hash of every file. A snapshot is taken in host memory; a thread writes it to a
folder of another name, which becomes visible by one rename after everything is on disk.
"""

from __future__ import annotations

import json
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hsvit_kernels.mask import MASK

from .. import __version__
from ..errors import RefusedError
from .checkpoint_files import (
    FORMAT,
    MANIFEST,
    MANIFEST_HASH,
    STEPS,
    completed,
    digest,
    files_of,
    pointed,
    read_bytes,
    read_manifest,
    read_parts,
    shared_parts,
    sync_folder,
    write_synced,
)
from .ema import EMA
from .engine import Engine

Named = dict[str, Tensor]
Files = dict[str, Named]
KINDS = ("", ".optimizer", ".ema")
"""Of files for each part of a model."""


@dataclass(frozen=True, kw_only=True)
class Config:
    every_steps: int = 0
    """Steps between checkpoints; 0: at the end of every epoch only."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_best: bool = True
    """Keep the one with the best top-1 accuracy of the split `data.val` too."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"every_steps = {self.every_steps}: must not be negative")
        if self.keep_last < 1:
            raise ValueError(f"keep_last = {self.keep_last}: must be at least 1")


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` steps of epoch `epoch` are done, `total` in all."""

    epoch: int
    step: int
    total: int
    lr_factor: float = 1.0
    """Of the schedule's learning rate, below 1 after steps back (`run.step_back`)."""
    logged: int | None = None
    """Bytes of the run's metrics that were logged before it."""


class Checkpoints:
    """Saves and loads the state of one run.

    Args:
        folder: of the run's checkpoints, on a file system that all ranks share.
        recipe: nested table of the resolved recipe, kept in the manifest.
        mlflow_run: gives the id of the MLflow run, once it is known. classes: what the labels mean, or none.
        published: told on rank 0, in a thread, of every position whose checkpoint is complete.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        engine: Engine,
        ema: EMA | None,
        recipe: Mapping[str, Any],
        mlflow_run: Callable[[], str | None] = lambda: None,
        classes: Sequence[str] = (),
        published: Callable[[Position], None] = lambda position: None,
    ) -> None:
        self.config, self.folder, self.engine, self.ema = config, folder, engine, ema
        self.recipe, self.mlflow_run, self.grid = recipe, mlflow_run, engine.grid
        self.classes, self.published = tuple(classes), published
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self.dropout_mask = MASK
        """Number of the newest definition of masks that the version knew which saved what was loaded."""
        self.grid.agree(self._clean)

    def _clean(self) -> None:
        """Remove what an interrupted save left behind; refuse to begin a run without all of its submodules."""
        if self.grid.absent and pointed(self.folder, "latest") is None:
            raise RefusedError(
                f"grid.absent = {list(self.grid.absent)}: {self.folder} has no checkpoint with these submodules; start "
                "the run whole first"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob("*.partial"):
            shutil.rmtree(partial)

    # Saving

    def save(self, position: Position, top1: float | None = None) -> str | None:
        """Snapshot the state to host memory and write it in the background. Collective.

        top1: accuracy of this state, where it was evaluated. Returns why the save before this one failed, if it did.
        """
        failure = self.wait()
        files = self._snapshot()
        about = {
            "format": FORMAT,
            "position": vars(position),
            "top1": top1,
            "recipe": self.recipe,
            "classes": self.classes,
            "dropout_mask": MASK,
            "mlflow_run": self.mlflow_run(),
            "versions": {
                "python": platform.python_version(),
                "hsvit-ds": __version__,  # a checkout on PYTHONPATH has no metadata
                **{name: version(name) for name in ("torch", "deepspeed")},
            },
        }
        name = f"step-{position.total:08d}"
        # A daemon: a run that fails must not wait for ranks that are gone.
        self._thread = threading.Thread(target=self._write, args=(name, files, about), daemon=True)
        self._thread.start()
        return failure

    def wait(self) -> str | None:
        """End the save in flight; the reason if it failed (on every rank), None otherwise. Collective."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        failed = self.grid.any_rank(failure is not None)()
        return self.grid.broadcast(failure) if failed else None

    def _snapshot(self) -> Files:
        """{file name: tensors in host memory} of what this rank writes. Collective."""
        shards, files = self.engine.shards, Files()
        weights = [*shards.gather(shards.masters), *shards.gather_frozen()]
        for name, tensor in [*weights, *self.engine.module.named_buffers()]:
            self._put(files, "", name, name, tensor)
        for key, flats in shards.moments().items():
            # The step is one number for a whole flat tensor, a moment has an element for each of its own.
            numbers = ((f.name, flat) for flat, fs in zip(flats, shards.layout, strict=True) for f in fs)
            for name, tensor in shards.gather(flats) if flats[0].dim() else numbers:
                self._put(files, ".optimizer", name, f"{key}/{name}", tensor)
        if self.ema is not None:
            for name, tensor in [*shards.gather(self.ema.flats), *self.ema.buffers.items()]:
                self._put(files, ".ema", name, name, tensor)
        return files

    def _put(self, files: Files, kind: str, name: str, key: str, tensor: Tensor) -> None:
        if not self.grid.writes(KINDS.index(kind), shared=not name.startswith("submodules.")):
            return
        for part, piece in self._split(name, tensor):
            tensors = files.setdefault(f"{part}{kind}.safetensors", {})
            tensors[key] = piece.to("cpu", copy=True).contiguous()

    def _split(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(part, its share of the tensor): a submodule's parameters stack the rank's submodules on the first axis."""
        here = self._here
        if not name.startswith("submodules."):
            yield ("model" if here is None else name.partition(".")[0]), tensor  # head or backbone
            return
        assert here is not None
        pieces = tensor.chunk(len(here)) if tensor.dim() else [tensor] * len(here)
        for submodule, piece in zip(here, pieces, strict=True):
            yield f"submodule-{submodule:03d}", piece

    @property
    def _here(self) -> range | None:
        submodules = getattr(self.engine.module, "submodules", None)
        return submodules.here if submodules is not None else None

    def _write(self, name: str, files: Files, about: dict[str, Any]) -> None:
        """In the thread: write, and publish once every rank that writes has."""
        if not self.grid.is_writer:
            return
        partial = self.folder / f"{name}.partial"
        outcome: dict[str, Any] = {"files": {}, "error": None}
        try:
            partial.mkdir(parents=True, exist_ok=True)
            own = ((file, save(tensors)) for file, tensors in files.items())
            for file, data in chain(own, self._carried_over(files)):
                write_synced(partial / file, data)
                outcome["files"][file] = {"sha256": digest(data), "bytes": len(data)}
        except (OSError, RefusedError) as error:
            outcome["error"] = f"rank {self.grid.rank}: {error}"
        try:
            outcomes = self.grid.gather_of_writers(outcome)
        except RuntimeError as error:
            self._failure = f"rank {self.grid.rank} lost the others while saving: {error}"
            return
        if not self.grid.is_main:
            return
        failure = next((o["error"] for o in outcomes if o["error"]), None)
        if failure is None:
            about["files"] = {file: entry for o in outcomes for file, entry in o["files"].items()}
            failure = self._publish(name, partial, about)
        if failure is None:
            self.published(Position(**about["position"]))
        else:
            shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        self._failure = failure

    def _carried_over(self, own: Files) -> Iterator[tuple[str, bytes]]:
        """(file, content) of the absent submodules: those of the latest checkpoint as they are, from rank 0."""
        if not self.grid.absent or self.grid.submodule_rank:
            return
        latest, here = pointed(self.folder, "latest"), self._here
        assert latest is not None, "a folder without one is refused at the start"
        assert here is not None
        manifest = read_manifest(latest)
        for file in files_of(self.grid.absent, manifest) if self.grid.is_main else ():
            yield file, read_bytes(latest, file, manifest)
        # Before the first step there are no moments, and what was absent ever since has none: they begin as zeros.
        moments = own.get(f"submodule-{here.start:03d}.optimizer.safetensors", {})
        for submodule in self.grid.absent:
            file = f"submodule-{submodule:03d}.optimizer.safetensors"
            if moments and file not in manifest["files"]:
                yield file, save({key: torch.zeros_like(tensor) for key, tensor in moments.items()})

    def _publish(self, name: str, partial: Path, about: dict[str, Any]) -> str | None:
        """Make a complete folder visible, then forget old ones; why it failed, if it did."""
        try:
            data = json.dumps(about, indent=1).encode()
            write_synced(partial / MANIFEST, data)
            write_synced(partial / MANIFEST_HASH, digest(data).encode())
            sync_folder(partial)
            final = self.folder / name
            if final == pointed(self.folder, "latest"):  # which must be there at every moment
                final = self.folder / f"{name}-2"
            if final.exists():  # of an interrupted run that had not yet made it its latest
                shutil.rmtree(final)
            partial.rename(final)
            self._point("latest", final.name)
            self._keep(final, about["top1"])
        except OSError as error:
            return str(error)
        return None

    def _keep(self, newest: Path, top1: float | None) -> None:
        """Point to the best, and delete all but it and the last few."""
        best = pointed(self.folder, "best")
        if top1 is not None and self.config.keep_best and (best is None or top1 > read_manifest(best)["top1"]):
            self._point("best", newest.name)
            best = newest
        for old in sorted(self.folder.glob(STEPS))[: -self.config.keep_last]:
            if old != best:
                shutil.rmtree(old)

    def _point(self, pointer: str, name: str) -> None:
        temporary = self.folder / f"{pointer}.partial-file"
        write_synced(temporary, name.encode())
        temporary.rename(self.folder / pointer)
        sync_folder(self.folder)

    # Loading

    @torch.no_grad()
    def load(self) -> Position | None:
        """Restore the latest checkpoint on this grid and stage; None where the run has none. Collective."""
        latest = self.grid.agree(lambda: pointed(self.folder, "latest"))
        if latest is None:
            return None
        manifest, weights, moments, averages = self.grid.together(lambda: self._read_all(latest))
        shards = self.engine.shards
        shards.scatter(shards.masters, weights)
        shards.scatter_frozen(weights)
        for name, buffer in self.engine.module.named_buffers():
            buffer.copy_(weights[name])
        shards.publish()
        self._set_moments(moments)
        if self.ema is not None:
            shards.scatter(self.ema.flats, averages)
            for name, buffer in self.ema.buffers.items():
                buffer.copy_(averages[name])
        self.dropout_mask = manifest.get("dropout_mask", 1)
        return Position(**manifest["position"])

    def _read_all(self, folder: Path) -> tuple[dict[str, Any], Named, Named, Named]:
        """(manifest, weights, moments, EMA), checked against this run before anything is changed."""
        manifest = read_manifest(folder)
        self._check_recipe(folder, manifest)
        weights = self._read(folder, manifest, "")
        self._check_shapes(folder, weights)
        averages = self._read(folder, manifest, ".ema") if self.ema is not None else {}
        if self.grid.is_main:  # who will carry them over
            for file in files_of(self.grid.absent, manifest):
                read_bytes(folder, file, manifest)
        return manifest, weights, self._read(folder, manifest, ".optimizer"), averages

    def _set_moments(self, saved: Named) -> None:
        shards = self.engine.shards
        shards.optimizer.state.clear()  # which a checkpoint of before the first step would leave
        for key in sorted({name.split("/", 1)[0] for name in saved}):
            named = {n.split("/", 1)[1]: t for n, t in saved.items() if n.startswith(f"{key}/")}
            if all(tensor.dim() == 0 for tensor in named.values()):
                # One flat tensor has one step number, and that of submodules that were absent lags behind. The largest
                # is right for all others, whose moments Adam's bias correction would inflate by a smaller one; what was
                # lost in its first steps takes larger ones for a while after it is back.
                largest = torch.stack(list(named.values())).amax().to(self.grid.device)
                flats = [largest.clone() for _ in shards.layout]
            else:
                flats = [torch.zeros_like(master) for master in shards.masters]
                shards.scatter(flats, named)
            shards.set_moment(key, flats)

    def _read(self, folder: Path, manifest: Mapping[str, Any], kind: str) -> Named:
        """Whole tensors by name for this rank: its submodules stacked, the head as it is."""
        here = self._here
        parts = ["model"]
        if here is not None:
            parts = [*shared_parts(manifest), *(f"submodule-{m:03d}" for m in here)]
        return read_parts(folder, manifest, parts, kind)

    def _check_recipe(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another architecture, optimizer or order, key by key."""
        saved, mine = manifest["recipe"], json.loads(json.dumps(self.recipe))
        # What an earlier version did not have it did as the default does.
        saved["model"] = completed(saved["model"], self.engine.module.config)
        for recipe in (saved, mine):
            recipe["task"] = {"pinned": []} | recipe["task"]
            # What a run starts from is past.
            recipe["model"] = {k: v for k, v in recipe["model"].items() if k not in ("weights", "resize")}
            recipe["model"]["backbone"] = recipe["model"].get("backbone", {}) | {"weights": "", "cache": ""}
        fixed: dict[str, Any] = {
            "model": None,
            "task": {"kind", "sampling", "width", "pinned", "same_widths", "full_epochs"},
            "optimizer": {"name"},
            "run": {"global_batch", "seed"},
            "ema": {"decay"},
            "augment": {"repeats"},
            "data": {"name", "window", "fingerprint", "last_batch", "decoder"},
        }
        if mine["data"]["any_decoder"]:
            fixed["data"].discard("decoder")
        different = [
            f"{table}.{key} is {saved[table].get(key)!r} there and {mine[table].get(key)!r} here"
            for table, keys in fixed.items()
            for key in sorted(set(saved[table]) | set(mine[table]))
            if (keys is None or key in keys) and saved[table].get(key) != mine[table].get(key)
        ]
        if different:
            raise RefusedError(
                f"{folder} does not fit this recipe: {'; '.join(different)}. Resume with the run's own "
                "recipe.toml, or start a new run without --resume"
            )

    def _check_shapes(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        shards = self.engine.shards
        shapes = {f.name: f.shape for fragments in shards.layout for f in fragments}
        shapes |= {f.name: f.shape for _, f in shards.frozen}
        shapes |= {name: buffer.shape for name, buffer in self.engine.module.named_buffers()}
        wrong = [
            f"{name}: {tuple(weights[name].shape) if name in weights else 'missing'}, not {tuple(shape)}"
            for name, shape in shapes.items()
            if name not in weights or weights[name].shape != shape
        ]
        wrong += [f"{name}: not in this model" for name in sorted(set(weights) - set(shapes))]
        if wrong:
            raise RefusedError(f"{folder} is of another architecture: {'; '.join(wrong[:4])}")
