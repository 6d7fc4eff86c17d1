"""Idle time measured: `python -m tools.scaling measure`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from hsvit_ds.engine.engine import import_muon
from hsvit_ds.errors import counted
from hsvit_ds.run import prediction
from hsvit_ds.run.links import Between, Host, Inside, Links, Passes
from tools.benchmarks.steps import machine

from . import cables, emulated, idle, methods, pipeline, points
from .loopback import Seconds, link_seconds, one_by_one, ring
from .points import BATCHES, PIPELINE, STAGES, SUBMODULE, Case, Row
from .start import awake, forked
from .watch import Parts, Watch, parts

MICRO_BATCHES = (1, 2, 4, 8)
LOOPBACK = "loopback"


def measured_cases(variant: str, cores: int) -> list[Case]:
    """On as many ranks as there are cores, 2 and 4 at most."""
    batch, found = BATCHES[variant], [Case(variant=variant, method=SUBMODULE, ranks=1, batch=BATCHES[variant])]
    for ranks in (2, 4):
        if ranks <= cores:
            found += _cases(variant, ranks, batch)
    return found


def emulated_cases(variant: str, cores: int) -> list[Case]:
    """On more ranks than cores: whole at 4; at 8 and 16 a submodule more, or as many images more, for each rank."""
    found = _cases(variant, 4, BATCHES[variant]) if cores < 4 else []
    for ranks in (8, 16):
        found.append(Case(variant=variant, method=SUBMODULE, ranks=ranks, batch=BATCHES[variant]))
        found += [Case(variant=variant, method=m, ranks=ranks, batch=BATCHES[variant] // 4 * ranks) for m in STAGES]
    return found


def _cases(variant: str, ranks: int, batch: int) -> list[Case]:
    whole = [Case(variant=variant, method=method, ranks=ranks, batch=batch) for method in (SUBMODULE, *STAGES)]
    return whole + [
        Case(variant=variant, method=PIPELINE, ranks=ranks, batch=batch, micro_batches=m)
        for m in MICRO_BATCHES
        if m <= batch
    ]


class Asked(NamedTuple):
    """A case that is to be measured. make: gives a rank's step. The others are those of a `Row`."""

    case: Case
    how: str
    links: Links
    make: Callable[[], Callable[[], Any]]
    passes: str
    formula: float
    elapsed: float

    def row(self, over: str, found: Parts) -> Row:
        row = Row(
            **asdict(self.case),
            **found._asdict(),
            how=self.how,
            over=over,
            images_per_second=self.case.batch / found.seconds,
            formula=self.formula,
            elapsed=self.elapsed,
            passes=self.passes,
            links=points.text_of(self.links),
            machine=f"{machine(torch.device('cpu'))}, one thread a rank",
        )
        print(
            f"{row.how} {row.variant} {self.case.name}, {counted(row.ranks, 'rank')}, {over}: "
            f"{row.images_per_second:.1f} images/s, idle {100 * row.idle_share:.1f} %",
            flush=True,
        )
        return row


class Bench:
    """Measures cases, and what they are predicted by, in forked ranks.

    Args:
        steps: that are counted.
        rounds: times that what really computes is timed and then measured; the middle one counts. A machine's speed
            changes, so what is compared lies close together.
    """

    def __init__(self, steps: int, rounds: int) -> None:
        self.steps, self.rounds, self.watch, self.cores = steps, rounds, Watch(), len(os.sched_getaffinity(0))
        self._links: dict[int, Seconds] = {}
        self._timed: dict[Case, methods.Timed] = {}
        self._layers: dict[tuple[str, int], methods.Layers] = {}
        self._stages: dict[Case, dict[str, Any]] = {}

    def loopback(self, case: Case) -> Links:
        """As a case's ranks have it: all send at the same time and wait for cores, or, in a pipeline, one by one. One
        rank has none."""
        ranks = max(case.ranks, 2)
        if ranks not in self._links:
            self._links[ranks] = forked([ranks], partial(link_seconds, self.watch))[0]
        found, turns = self._links[ranks], max(ranks / self.cores, 1.0)
        if case.method == PIPELINE:
            bandwidth, latency = one_by_one(found)
            inside, host = Inside(bandwidth=bandwidth, latency=latency), Host(ranks=ranks)
        else:
            of = ring(found, ranks)
            inside = Inside(bandwidth=of.bandwidth * turns, latency=of.latency / turns, at_once=self.cores)
            host = Host(ranks=ranks, call=of.call, together=of.together)
        return Links(inside=inside, between=Between(bandwidth=1e9), host=host)

    def timed(self, case: Case) -> methods.Timed:
        """The passes of a rank that nobody answers, each core at such work."""
        if case not in self._timed:
            found = forked([1] * self.cores, partial(methods.timed, *case.resolved(), self.steps))
            passes = {k: fmean(asdict(one.passes)[k] for one in found) for k in asdict(found[0].passes)}
            self._timed[case] = methods.Timed(Passes(**passes), fmean(one.spread for one in found))
        return self._timed[case]

    def stages(self, case: Case) -> dict[str, Any]:
        """Of a pipeline: its layers by stage, the seconds of each, and the shapes between them."""
        if case in self._stages:
            return self._stages[case]
        key = case.variant, case.batch // case.micro_batches
        if key not in self._layers:
            found = forked([1] * self.cores, partial(methods.timed_layers, case, self.steps))
            pairs = zip(*(one.seconds for one in found), strict=True)
            mean = [(fmean(f for f, _ in layer), fmean(b for _, b in layer)) for layer in pairs]
            self._layers[key] = found[0]._replace(seconds=mean)
        layers = self._layers[key]
        divided = pipeline.balanced([sum(pair) for pair in layers.seconds], case.ranks)
        images = case.batch // case.micro_batches
        shapes = [(images, 3, points.SIZE, points.SIZE), *(layers.outputs[stage[-1]] for stage in divided)]
        seconds = []
        at_once = self.cores if case.micro_batches > 1 else 1  # of one micro batch no stage computes beside another
        for rank in range(case.ranks):
            one = partial(methods.timed_stage, case, divided, shapes, rank, self.steps)
            seconds.append([fmean(column) for column in zip(*forked([1] * at_once, one), strict=True)])
        sizes = [4 * torch.Size(shape).numel() for shape in shapes[1:-1]]
        self._stages[case] = {"stages": seconds, "shapes": shapes, "sizes": sizes, "layers": divided}
        return self._stages[case]

    def asked(self, case: Case, how: str, links: Links) -> Asked:
        """What a rank of a case does, and what it is predicted by."""
        if case.method == PIPELINE:
            divided = self.stages(case)
            if how == "measured":
                make: Any = partial(methods.stage_step, case, divided["layers"], divided["shapes"])
            else:
                make = partial(emulated.piped, divided["stages"], divided["shapes"], case.batch, case.micro_batches)
            passes = json.dumps({name: divided[name] for name in ("stages", "sizes")})
            return Asked(case, how, links, make, passes, idle.pipeline(case.ranks, case.micro_batches), 0.0)
        timed, (recipe, plan) = self.timed(case), case.resolved()
        if how == "measured":
            make, links = partial(engine_step, recipe, plan), replace(links, stragglers=timed.spread)
        else:
            make = partial(emulated.scheduled, prediction.shape(recipe, plan), timed.passes)
        p, formulas = timed.passes, (0.0, 0.0)
        if case.method == SUBMODULE:
            each = case.ranks, p.forward + p.backward + p.update, p.head
            formulas = idle.summed(*each), idle.elapsed(*each)
        return Asked(case, how, links, make, points.text_of(p), *formulas)

    def measured(self, case: Case) -> Row:
        """The middle one of some rounds, by its images a second."""
        found = []
        for _ in range(self.rounds):
            self._timed.pop(case, None)
            self._stages.pop(case, None)
            found.append(self.here(self.asked(case, "measured", self.loopback(case))))
        return sorted(found, key=lambda row: row.images_per_second)[self.rounds // 2]

    def here(self, asked: Asked) -> Row:
        """On forked ranks of this machine."""
        found = forked([asked.case.ranks], partial(methods.watched, asked.make, self.watch, self.steps))
        return asked.row(LOOPBACK, parts(found, methods.WARM))


def engine_step(*args: Any) -> Callable[[], Any]:
    return methods.engine_step(*args)[1]


def rows(variants: Sequence[str], steps: int, rounds: int, most: int) -> Iterator[Row]:
    """Of every case on at most so many ranks."""
    bench = Bench(steps, rounds)
    import_engine()
    for variant in variants:
        yield from (bench.measured(case) for case in measured_cases(variant, bench.cores) if case.ranks <= most)
        for case in (case for case in emulated_cases(variant, bench.cores) if case.ranks <= most):
            yield bench.here(bench.asked(case, "emulated", bench.loopback(case)))
    if why := cables.missing():
        print(f"no hosts with limited links: {why}", flush=True)
    elif most >= max(cables.HOSTS):
        yield from cables.rows(bench, variants[0], BATCHES[variants[0]])


def import_engine() -> None:
    """In this process, so that its forks have it."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_muon()


def run(out: Path, variants: Sequence[str], steps: int, rounds: int, most: int) -> None:
    """The table, written after every row, and the plot."""
    from .plot import draw

    out.mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    with awake():
        for row in rows(variants, steps, rounds, most):
            found.append(row)
            points.write(found, out / "measured.csv")
    draw(found, [], out / "measured.svg")
