"""Steps on many ranks predicted, and compared with measured ones: `python -m tools.scaling predict`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from hsvit_ds.models.hsvit import VARIANTS
from hsvit_ds.run import links, prediction
from hsvit_ds.run.links import Links, Passes
from hsvit_ds.run.memory import needed
from tools.benchmarks.steps import show

from . import idle, pipeline, points
from .points import BATCHES, PIPELINE, STAGES, SUBMODULE, SUBMODULES, Case, Row

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STRONG = 4096
"""Images of a step on however many ranks."""
PIPELINED = 4
"""Micro batches of a pipeline."""
TARGET = 0.15
"""Largest error of images/s that is to be reached."""


class Predicted(NamedTuple):
    """Of a step. compute, waiting: seconds of a rank. given: bytes that the first rank puts into collectives."""

    images_per_second: float
    seconds: float
    compute: float
    waiting: float
    given: float
    idle_ratio: float
    """Idle to busy time without communication, the ranks' summed."""


def of_row(row: Row) -> Predicted:
    """What a measured row is predicted to be, by the passes and links in it."""
    joined, passes = points.links_of(row.links), json.loads(row.passes)
    if row.method == PIPELINE:
        stages, sizes = passes["stages"], passes["sizes"]
        step = pipeline.simulated(stages, row.micro_batches, joined, sizes)
        waits = step.seconds - step.compute
        given = float(row.micro_batches * sizes[0])
        return Predicted(row.batch / step.seconds, step.seconds, step.compute, waits, given, step.idle_ratio)
    return of_case(row.case, joined, Passes(**passes))


def of_case(case: Case, joined: Links, passes: Passes) -> Predicted:
    shape = prediction.shape(*case.resolved())
    step = prediction.simulate(shape, joined, passes)
    phases = prediction.schedule(shape, passes)
    given = sum(p.given(shape.group(p.over)) for p in phases if isinstance(p, prediction.Message))
    ratio = step.waiting / step.compute
    if case.method == SUBMODULE:
        ratio = idle.of_submodules(case.ranks, step.compute, step.head, step.waiting)
    return Predicted(case.batch / step.seconds, step.seconds, step.compute, step.waiting, given, ratio)


def check(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for every measured row."""
    found = []
    for row in rows:
        p = of_row(row)
        found.append(
            {
                "network": row.variant,
                "divided by": row.case.name,
                "ranks": row.ranks,
                "how": row.how,
                "links": row.over,
                "images/s": f"{row.images_per_second:.1f}",
                "predicted": f"{p.images_per_second:.1f}",
                "error, %": f"{100 * (p.images_per_second / row.images_per_second - 1):+.1f}",
                "bytes": f"{row.given:,.0f}",
                "bytes predicted": f"{p.given:,.0f}",
                "idle, %": f"{100 * row.idle_share:.1f}",
                "predicted idle, %": f"{100 * (1 - p.compute / p.seconds):.1f}",
                "idle to busy": f"{row.idle_ratio:.4f}",
                "predicted idle to busy": f"{p.idle_ratio:.4f}",
                "formula": f"{row.formula:.4f}",
            }
        )
    return found


def worst(rows: Sequence[Row]) -> str:
    """The largest error of images/s, how many lie within the target, and whether bytes are exact."""
    errors = {row: of_row(row).images_per_second / row.images_per_second - 1 for row in rows}
    row = max(rows, key=lambda r: abs(errors[r]))
    within = sum(abs(error) <= TARGET for error in errors.values())
    wrong = [r for r in rows if of_row(r).given != r.given]
    return (
        f"largest error of images/s: {100 * errors[row]:+.1f} % ({row.how} {row.variant} {row.case.name}, "
        f"{row.ranks} ranks, {row.over}); {within} of {len(rows)} within {100 * TARGET:.0f} %; "
        f"bytes differ at {len(wrong)}"
    )


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Prediction over numbers of ranks.

    variant: of the network. batch: images that `passes` are of. passes: of a rank with one of `SUBMODULES` submodules;
    a rank with the whole network takes as long for a part of the images, and the same part of its update more.
    """

    variant: str
    batch: int
    passes: Passes
    links: Links

    def rows(self, most: int) -> Iterator[dict[str, Any]]:
        """Weak scaling: for each rank a submodule, a stage, or a part of the images more. Strong scaling: more replicas
        of the whole network, over 4 ranks or one, for a fixed global batch."""
        for ranks in (n for n in RANKS if n <= most):
            yield self._row("weak", self._case(SUBMODULE, ranks, self.batch), 1.0)
            for method in STAGES:
                yield self._row("weak", self._case(method, ranks, self.batch // SUBMODULES * ranks), 1.0)
            yield self._pipeline(ranks)
            for method in STAGES:
                share = SUBMODULES * STRONG / ranks / self.batch
                yield self._row("strong", self._case(method, ranks, STRONG), share)
            if ranks >= SUBMODULES:
                replicas = ranks // SUBMODULES
                case = replace(self._case(SUBMODULE, ranks, STRONG), replicas=replicas)
                yield self._row("strong", case, STRONG / replicas / self.batch)

    def _case(self, method: str, ranks: int, batch: int) -> Case:
        return Case(variant=self.variant, method=method, ranks=ranks, batch=batch)

    def _row(self, scaling: str, case: Case, share: float) -> dict[str, Any]:
        """share: of `passes` that a rank's images take."""
        p, whole = self.passes, SUBMODULES if case.method in STAGES else 1
        passes = Passes(
            forward=p.forward * share, head=p.head * share, backward=p.backward * share, update=p.update * whole
        )
        found = of_case(case, self.links, passes)
        return _line(scaling, case, found) | {"memory, MiB": f"{needed(*case.resolved()).in_all / 2**20:.1f}"}

    def _pipeline(self, ranks: int) -> dict[str, Any]:
        """Stages as long as a submodule, which hand on maps of the first block."""
        case = replace(self._case(PIPELINE, ranks, self.batch), micro_batches=PIPELINED)
        recipe, _ = replace(case, method=SUBMODULE, ranks=1).resolved()
        model: Any = recipe.model
        size = 4 * self.batch * VARIANTS[self.variant].kernels[0] * model.map_sides(points.SIZE)[0] ** 2 // PIPELINED
        p = self.passes
        stages = [((p.forward + p.head / 3) / PIPELINED, (p.backward + 2 * p.head / 3) / PIPELINED, p.update)] * ranks
        step = pipeline.simulated(stages, PIPELINED, self.links, [size] * (ranks - 1))
        given = float(PIPELINED * size if ranks > 1 else 0)
        waits = step.seconds - step.compute
        found = Predicted(case.batch / step.seconds, step.seconds, step.compute, waits, given, step.idle_ratio)
        return _line("weak", case, found) | {"memory, MiB": ""}


def _line(scaling: str, case: Case, found: Predicted) -> dict[str, Any]:
    return {
        "network": case.variant,
        "scaling": scaling,
        "divided by": case.name,
        "ranks": case.ranks,
        "images of a step": case.batch,
        "images/s": f"{found.images_per_second:.1f}",
        "idle, %": f"{100 * (1 - found.compute / found.seconds):.2f}",
        "idle to busy": f"{found.idle_ratio:.5f}",
        "bytes": f"{found.given:.0f}",
    }


def run(out: Path, measured: Path | None, file: Path | None, variant: str, most: int) -> None:
    """Compare with what was measured, and predict further."""
    from .plot import draw

    out.mkdir(parents=True, exist_ok=True)
    rows = [row for row in points.read(measured) if row.variant == variant] if measured else []
    if rows:
        show(check(rows), f"predicted beside measured: {rows[0].machine}", out / "checked.csv")
        print(worst(rows))
    own = [row for row in rows if row.method == SUBMODULE and row.ranks == SUBMODULES]
    joined = links.read(file) if file else points.links_of(own[0].links) if own else None
    passes = joined.passes if joined and joined.passes else Passes(**json.loads(own[0].passes)) if own else None
    found: list[dict[str, Any]] = []
    if joined and passes:
        found = list(Curves(variant=variant, batch=BATCHES[variant], passes=passes, links=joined).rows(most))
        show(found, f"predicted: {variant}, hosts of {joined.host.ranks} ranks", out / "predicted.csv")
    elif not rows:
        raise SystemExit("nothing to predict by: name --check measured.csv, or --links with [passes] of one submodule")
    draw(rows, found, out / "scaling.svg")
