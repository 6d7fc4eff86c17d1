"""What is measured: a network, divided in a way among ranks; and the table's row of each."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hsvit_ds.models.hsvit import VARIANTS
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.links import Between, Host, Inside, Links, Passes

from . import idle

SUBMODULES = 4
"""Of the whole network, whatever divides it; more where there are more ranks of them, each of the same size."""
SUBMODULE, PIPELINE = "submodules", "pipeline"
STAGES = {"data parallel": 0, "ZeRO-1": 1, "ZeRO-3": 3}
"""Ways to divide images, and their ZeRO stages."""
BATCHES = {"C2A2": 32, "C4A8": 8}
"""Images of a step, over all ranks."""
SIZE, CLASSES = 32, 10


@dataclass(frozen=True, kw_only=True)
class Case:
    """method: "submodules", "pipeline" or one of `STAGES`. batch: images of a step, over all ranks. micro_batches: of a
    pipeline; 1 is plain model parallelism. replicas: whole models of submodules; where images are divided each rank has
    one anyway."""

    variant: str
    method: str
    ranks: int
    batch: int
    micro_batches: int = 1
    replicas: int = 1

    @property
    def name(self) -> str:
        if self.method != PIPELINE:
            return self.method
        return "model parallel" if self.micro_batches == 1 else f"pipeline, m = {self.micro_batches}"

    def resolved(self) -> tuple[recipes.Recipe, recipes.Plan]:
        """The recipe of all but pipelines."""
        is_divided = self.method == SUBMODULE
        parts = self.ranks // self.replicas if is_divided else 1
        submodules = max(SUBMODULES, parts)
        kernels = [k // SUBMODULES * submodules for k in VARIANTS[self.variant].kernels]
        groups = 16 // SUBMODULES * submodules
        model = {"kind": "hsvit", "variant": self.variant, "submodules": submodules}
        table = {
            "model": model | {"kernels": kernels, "groups": groups},
            "grid": {"submodule_ranks": parts, "backend": "gloo"},
            "engine": {"zero_stage": STAGES.get(self.method, 0), "precision": "fp32"},
            "run": {"global_batch": self.batch, "bn_batch": self.batch * parts // self.ranks},
            "optimizer": {"clip": 1.0},
            "data": {"name": "cifar10"},
        }
        return recipes.resolve(recipes.from_table(table, self.name), self.ranks)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table. Seconds of a step, of a rank. given: bytes that the first rank puts into collectives."""

    variant: str
    method: str
    ranks: int
    batch: int
    micro_batches: int
    replicas: int
    how: str
    """"measured", or "emulated": a rank sleeps for what its passes take and really communicates."""
    over: str
    """Which links."""
    images_per_second: float
    seconds: float
    compute: float
    transfer: float
    waiting: float
    given: float
    formula: float
    """Idle to busy time without communication, by a formula; of submodules the summed reading."""
    elapsed: float
    """Of submodules the other reading; 0 for others."""
    passes: str
    """What it is predicted by, as JSON: `Passes`, or of a pipeline its stages and the bytes between them."""
    links: str
    """`Links` as JSON."""
    machine: str

    @property
    def case(self) -> Case:
        return Case(**{entry.name: getattr(self, entry.name) for entry in fields(Case)})

    @property
    def idle_ratio(self) -> float:
        """Idle to busy time without communication, the ranks' summed."""
        if self.method != SUBMODULE:
            return self.waiting / self.compute
        return idle.of_submodules(self.ranks, self.compute, json.loads(self.passes)["head"], self.waiting)

    @property
    def idle_share(self) -> float:
        """Of a step in which a rank does not compute, whatever for."""
        return 1 - self.compute / self.seconds


def write(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [entry.name for entry in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def read(path: Path) -> list[Row]:
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        return [
            Row(**{entry.name: kinds[str(entry.type)](line[entry.name]) for entry in fields(Row)})
            for line in csv.DictReader(file)
        ]


def links_of(text: str) -> Links:
    table: dict[str, Any] = json.loads(text)
    inside, between, host = Inside(**table["inside"]), Between(**table["between"]), Host(**table["host"])
    return Links(inside=inside, between=between, host=host, stragglers=table["stragglers"])


def text_of(what: Links | Passes) -> str:
    return json.dumps(asdict(what))
