"""What the hosts of a run said of themselves (`probe.py`), judged: a cell for every host and check."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..data import splits
from ..data.index import file_of
from ..data.layouts import folders, is_url
from ..data.loader import MORE
from ..data.reader import ready_bytes
from ..data.remote import INFO
from ..engine.interop import MODEL
from ..errors import RefusedError, counted
from ..models import hsvit, timm_models
from ..run import recipe as recipes
from ..run.recipe import Recipe
from ..tasks import scala
from . import probe
from .cluster import NO_FOLDER, NO_PYTHON, Answer, Host

CLOCKS = 60
"""Seconds that clocks may be apart."""
HERE = "this machine"
"""The host of a cell that is about where the command runs."""
SPARE = 2**30
"""Bytes of disk for a run of which nothing is known."""
Found = Mapping[str, dict[str, Any]]
"""What the hosts said that could be asked, by name."""


@dataclass(frozen=True)
class Cell:
    """What one check found on one host. remedy: of what is wrong, "" where nothing is."""

    host: str
    check: str
    value: str
    remedy: str = ""


def unheard(host: str, answer: Answer) -> Cell | None:
    """Why a host could not be asked; None where it was."""
    if answer.code == 0:
        return None
    last = (answer.error.strip().splitlines() or [f"exit code {answer.code}"])[-1][:200]
    if answer.code == NO_FOLDER:
        return Cell(host, "python", f"no folder {os.getcwd()}", "share the working folder, or have it on that path too")
    if answer.code == NO_PYTHON:
        return Cell(host, "python", f"no {sys.executable}", "have the same environment on that path")
    if "No module named" in last:
        return Cell(host, "python", last, "install hsvit-ds into the environment there, as here")
    if answer.code != 255:
        return Cell(host, "python", last, f"run there: cd {os.getcwd()}; {sys.executable} -m hsvit_ds.hosts.probe")
    if "Permission denied" in last:
        return Cell(host, "ssh", "asks for a password", f"let this user in by key: ssh-copy-id {host}")
    if "Host key verification failed" in last:
        return Cell(host, "ssh", "has another or an unknown host key", f"look into it, and accept it once: ssh {host}")
    if "Could not resolve" in last:
        return Cell(host, "ssh", "no such name", "correct the hostfile, or give it an address in ~/.ssh/config")
    return Cell(host, "ssh", last, f"is it on, and does a firewall let ssh in? `ssh {host} true` must work")


def same_software(found: Found) -> list[Cell]:
    """The same python, packages and code on all hosts."""
    cells = _same("python", {host: says["python"] for host, says in found.items()}, "make the environment anew there")
    usual = {p: _usual(says["packages"][p] for says in found.values()) for p in probe.PACKAGES}
    for host, says in found.items():
        words = [f"{p} {v}, not {usual[p]}" for p, v in says["packages"].items() if v != usual[p]]
        remedy = "install the versions of requirements.lock there" if words else ""
        cells.append(Cell(host, "packages", ", ".join(words or [f"{p} {v}" for p, v in usual.items()]), remedy))
    codes = {host: says["code"][:12] for host, says in found.items()}
    return cells + _same("code", codes, "have the same hsvit_ds and hsvit_kernels there")


def gpus(hosts: list[Host], found: Found) -> list[Cell]:
    """One model and driver on all hosts, one GPU for each slot; where there are none the ranks compute on CPUs."""
    cells, kinds = [], {host: " and ".join(sorted(set(says["gpus"]))) or "none" for host, says in found.items()}
    for host in (host for host in hosts if host.name in found):
        says, kind, usual = found[host.name], kinds[host.name], _usual(kinds.values())
        count, remedy = len(says["gpus"]), ""
        value = f"{count} x {kind}" if count else kind
        if says["gpu_error"]:
            value, remedy = says["gpu_error"], "nvidia-smi must work there: repair the driver, or restart the host"
        elif kind != usual:
            value, remedy = f"{value}, not {usual}", "hosts of a run have one model and driver; leave this one out"
        elif count and host.slots > count:
            value, remedy = f"{value}, but slots={host.slots}", f"write slots={count} in the hostfile"
        cells.append(Cell(host.name, "GPUs", value, remedy))
    return cells


def clocks(offsets: Mapping[str, float]) -> list[Cell]:
    """Seconds by which each host is ahead of this machine."""
    return [
        Cell(host, "clock", f"{offset:+.0f} s", "set its clock and keep it right, with chronyd or systemd-timesyncd")
        if abs(offset) > CLOCKS
        else Cell(host, "clock", f"within {CLOCKS} s")
        for host, offset in offsets.items()
    ]


def disk(recipe: Recipe | None, found: Found) -> list[Cell]:
    """Room for the checkpoints of a recipe; without one, for a little."""
    needed, root = (checkpoint_bytes(recipe), recipe.run.root) if recipe else (SPARE, ".")
    cells = []
    for host, says in found.items():
        value, remedy = f"{_gib(says['free'])} free", ""
        if says["free"] < needed:
            value += f", {_gib(needed)} needed"
            remedy = f"make room on the file system of {Path(root).absolute()}"
            remedy += ", or set run.root or checkpoint.keep_last" if recipe else ""
        cells.append(Cell(host, "disk", value, remedy))
    return cells


def _gib(size: int) -> str:
    """To two figures, so that hosts that share a disk say the same."""
    return f"{float(f'{size / 2**30:.2g}'):,.10g} GiB"


def checkpoint_bytes(recipe: Recipe) -> int:
    """Of the checkpoints that stay, the best one and one that is being written: weights and two moments in fp32."""
    facts = splits.facts(recipe.data)
    try:
        model = models.without_weights(recipe.model).resolved(facts.image_size)
    except ValueError as error:
        raise RefusedError(f"[model] {error}") from error
    with torch.device("meta"):
        shape = model.build(image_size=facts.image_size, channels=facts.channels, classes=facts.classes)
    return (recipe.checkpoint.keep_last + 2) * 12 * sum(p.numel() for p in shape.parameters())


def training(recipe: Recipe, ranks: int) -> Cell:
    """Whether training would take the recipe, by its own check, as far as its data can be seen from here."""
    root = recipe.data.root
    if recipe.data.name != "digits" and not is_url(root) and not Path(root).is_dir():
        return Cell(HERE, "training", f"not checked: data.root = {root} is not on this machine")
    try:
        _, plan = recipes.resolve(recipe, ranks)
    except RefusedError as error:
        return Cell(HERE, "training", str(error), "it would be refused so")
    return Cell(HERE, "training", f"{counted(plan.replicas, 'replica')}, {counted(plan.steps, 'step')}")


def shared_memory(recipe: Recipe, hosts: list[Host], ranks: int, found: Found) -> list[Cell]:
    """Room in each host's /dev/shm for the batches that the data workers of its ranks hold ready."""
    data, run = recipe.data, recipe.run
    if data.name == "digits" or not data.workers:
        return []
    micro = run.micro_batch or run.global_batch * recipe.grid.submodule_ranks // ranks
    cells = []
    for host in (host for host in hosts if host.name in found):
        workers = splits.workers(data, found[host.name]["cores"], host.slots)
        each = ready_bytes(splits.facts(data), recipe.augment, workers, data.eval_batch + micro)
        free, needed = found[host.name]["shared_memory"], host.slots * each
        short = free < needed
        value = f"{_gib(free)} free" + (f", {_gib(needed)} needed" if short else "")
        cells.append(Cell(host.name, "shared memory", value, MORE if short else ""))
    return cells


def launcher() -> Cell:
    if shutil.which("pdsh") is None:
        return Cell(HERE, "pdsh", "not installed", "install it: DeepSpeed's launcher starts the ranks with it")
    return Cell(HERE, "pdsh", "installed")


def data_files(recipe: Recipe) -> list[str]:
    """Patterns of what every host reads of the data: its folders and the indexes."""
    data = recipe.data
    if data.name == "digits" or is_url(data.root):
        return []
    files = {"train", data.val, data.test} - data.urls.keys()
    if not files:
        return [f"{escape(data.root)}/{INFO}"] if data.root else []
    if not data.root:
        splits.open_split(data, min(files))  # refuses it
    places = dict.fromkeys([data.root, *folders(data.root, data.patterns)])
    where = data.index or data.root
    kinds = sorted({file_of(Path(where), split).suffix for split in files})
    return [*map(escape, places), *(f"{escape(where)}/*.index{kind}" for kind in kinds)]


def weight_files(recipe: Recipe) -> list[str]:
    """Patterns of the weights that every host reads: of the model, its backbone and the teacher."""
    model, task, named, runs = recipe.model, recipe.task, [], []
    if isinstance(model, timm_models.Config):
        named.append(model.weights)
    elif model.weights:
        inside = ("checkpoints/latest", MODEL)  # of a run, of an export
        runs.append(escape(str(next((f for i in inside if (f := Path(model.weights, i)).exists()), model.weights))))
    if isinstance(model, hsvit.Config):
        named.append(model.backbone.weights)
    if isinstance(task, scala.Config):
        named.append(task.teacher.weights)
        if task.teacher.name and not task.teacher.name.startswith("timm/"):
            runs.append(f"{escape(task.teacher.name)}/checkpoints/latest")
    return [escape(name) for name in named if Path(name).suffix in timm_models.FILES] + runs


def files(path: Path, recipe: Recipe, found: Found) -> list[Cell]:
    """The recipe in `path` as it is here; data and weights alike on all hosts."""
    own, root = escape(str(path)), recipe.data.root
    cells = _alike("recipe", {own: probe.identities(own)}, found, f"have {path} there as it is here")
    for check, patterns, remedy in (
        ("data", data_files(recipe), f"have the shards and indexes of {root} on every host, or set data.root"),
        ("weights", weight_files(recipe), "have the same file on that path of every host"),
    ):
        if patterns:
            usual = {p: json.loads(_usual(json.dumps(says["files"][p]) for says in found.values())) for p in patterns}
            cells += _alike(check, usual, found, remedy)
    return cells


def _alike(check: str, usual: Mapping[str, dict[str, str]], found: Found, remedy: str) -> list[Cell]:
    """Wrong where a file is missing, cannot be read or is not the `usual` one: {pattern: {path: identity}}."""
    cells = []
    for host, says in found.items():
        wrong = []
        for pattern, others in usual.items():
            there = says["files"][pattern]
            for path in sorted({*there, *others}) or [pattern]:
                identity = there.get(path, "missing")
                if identity == "missing" or identity.startswith(probe.UNREADABLE):
                    wrong.append(f"{path} is {identity}")
                elif identity != others.get(path):
                    wrong.append(f"{path} is not the same")
        cells.append(Cell(host, check, ", ".join(wrong) or "the same", remedy if wrong else ""))
    return cells


def meetings(root: str, folder: Path, found: Found) -> list[Cell]:
    """Whether every host has left a file in `folder`, which was made here in run.root."""
    cells = []
    for host, says in found.items():
        met, why = says["met"], ""
        if "error" in met:
            why = f"what is made here in {root} cannot be written there ({met['error']})"
        elif not (folder / met["wrote"]).exists():
            why = f"what is written there in {root} does not come here"
        remedy = "set run.root to a folder that all hosts share, as on NFS, and may write" if why else ""
        cells.append(Cell(host, "run.root", why or f"{root} is shared", remedy))
    return cells


def server(recipe: Recipe) -> str:
    """The URI of an MLflow server; "" where metrics go elsewhere."""
    tracking = recipe.tracking
    return tracking.uri if tracking.mlflow and tracking.uri.startswith("http") else ""


def mlflow(uri: str, found: Found) -> list[Cell]:
    """Whether the server answers every host, as any may get rank 0."""
    remedy = "start the server (mlflow server --host 0.0.0.0), open its port, or set tracking.mlflow=false"
    return [
        Cell(host, "MLflow", f"{uri}: {error}", remedy) if error else Cell(host, "MLflow", f"{uri} answers")
        for host, says in found.items()
        for error in [says["mlflow_error"]]
    ]


def ways(routes: Found) -> list[Cell]:
    """The interface of each host towards the others.

    gloo and NCCL are told one name. Where names differ they are told none, and gloo announces the address that the
    host's own name leads to, which on many systems is 127.0.1.1.
    """
    names = [way["interface"] for way in routes.values() if "interface" in way]
    cells = []
    for host, way in routes.items():
        if "error" in way:
            cells.append(Cell(host, "network", way["error"], "connect it to the network of the other hosts"))
            continue
        value, remedy = way["interface"], ""
        if len(set(names)) > 1 and way["named"] != way["address"]:
            value += f", elsewhere {_usual(names)}, and its own name leads to {way['named'] or 'no address'}"
            remedy = f"give its name the address {way['address']} in its /etc/hosts, or all interfaces one name"
        cells.append(Cell(host, "network", value, remedy))
    return cells


def _same(check: str, values: Mapping[str, str], remedy: str) -> list[Cell]:
    """Wrong where a host has not what most have."""
    usual = _usual(values.values())
    return [
        Cell(host, check, value) if value == usual else Cell(host, check, f"{value}, not {usual}", remedy)
        for host, value in values.items()
    ]


def _usual(values: Iterable[str]) -> str:
    """What most have; of equally many the first one's."""
    return Counter(values).most_common(1)[0][0]
