"""What a step on many ranks will take, before it is started: its messages, whose bytes are exact, and a simulation of
when each rank computes, waits and sends."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..data import splits
from ..data.augment import VIEW
from ..engine import optimizer
from ..errors import RefusedError
from ..grid import rounding
from ..models import hsvit
from ..models.batchnorm import BatchNorm
from ..tasks import scala
from . import recipe as recipes
from . import timing
from .links import Floats, Links, Passes, Rings
from .processes import Share
from .recipe import Plan, Recipe
from .rehearsal import first_share

SIMULATED = 300
"""Steps, of which medians are taken."""
PERSISTENT = 100_000
"""Numbers of a parameter from which on stage 3 keeps only a part of it between steps
(stage3_param_persistence_threshold)."""
PARTS = ("compute", "exchange", "reduction", "waiting", "images")
"""Of a `Step`; together all of it."""
ALIGNED = 2
"""Numbers of whose multiple a rank's part of a group is at stages 1 and 2 (DeepSpeed's nccl_start_alignment_factor)."""
_FP32, _FP64 = 4, 8
_INSTEAD = {("gloo", "reduce_scatter"): "all_reduce"}
"""Of a backend, what it does for a collective: PyTorch's gloo reduces all of it and keeps a part."""


@dataclass(frozen=True)
class Compute:
    """Every rank computes for as long. what: "forward", "head", "backward" or "update"."""

    what: str
    seconds: float


@dataclass(frozen=True)
class Message:
    """A collective of all groups of a kind.

    what: "exchange" of CLS sums, "data" (images), "norm" (batch statistics), "gradient", "scalar", "parameter"; as
        `Engine.traffic` calls them, which counts the first four. kind: "all_reduce", "reduce_scatter", "all_gather".
    over: "replica", the ranks that hold one model, or "replicas", those that hold the same share of it.
    size: bytes of what is summed, scattered or, in all, gathered. count: of equal messages of so many bytes in all.
    together: whether all of them are begun before the first is waited for.
    """

    what: str
    kind: str
    over: str
    size: int
    count: int = 1
    together: bool = False

    def given(self, ranks: int) -> float:
        """Bytes that one of so many ranks puts in."""
        return self.size / ranks if self.kind == "all_gather" else float(self.size)


Phase = Compute | Message


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of a run that its messages follow from, of one rank."""

    replicas: int
    submodule_ranks: int
    zero_stage: int
    images: int
    """Of a micro batch."""
    accumulation: int
    """Micro batches of a step."""
    passes: int
    """Forwards of a micro batch."""
    exchange: tuple[str, int]
    """The collective of CLS sums, and its bytes in all."""
    gathered: int
    """Bytes of a micro batch that the ranks of a replica read parts of; 0 where each reads all."""
    norms: tuple[int, ...]
    """Channels of each BatchNorm."""
    synced: bool
    """Whether their statistics span the replicas."""
    trained: tuple[tuple[int, ...], ...]
    """Numbers of each trained parameter, by the optimizer's groups."""
    backend: str = "auto"
    """As `grid.backend`; not gloo unless it says so."""

    @property
    def ranks(self) -> int:
        return self.replicas * self.submodule_ranks

    @property
    def global_batch(self) -> int:
        """Images of a step."""
        return self.replicas * self.accumulation * self.images

    def group(self, over: str) -> int:
        """Ranks of a group."""
        return self.submodule_ranks if over == "replica" else self.replicas


def shape(recipe: Recipe, plan: Plan) -> Shape:
    """Of a resolved recipe. Of several widths the batch statistics are counted at the full one, and images that a GPU
    would keep as being read.

    Raises:
        RefusedError: a backbone's maps would travel inside a replica.
    """
    s, facts = recipe.grid.submodule_ranks, splits.facts(recipe.data)
    if s > 1 and recipe.model.splits_images:
        raise RefusedError(
            f"--links: grid.submodule_ranks = {s} divides a backbone's images and exchanges its maps, which is not "
            "predicted; set grid.submodule_ranks=1"
        )
    here = first_share(recipe)
    with torch.device("meta"):
        model = recipe.model.build(
            image_size=facts.image_size, channels=facts.channels, classes=facts.classes, here=here
        )
    side = recipe.augment.canvas or facts.image_size
    image = facts.channels * side**2 + 8 + (_FP32 * VIEW if recipe.augment.canvas else 0)
    gathers = splits.shares_images(recipe.data, s, facts.image_size) and recipe.data.on_device != "always"
    return Shape(
        replicas=plan.replicas,
        submodule_ranks=s,
        zero_stage=recipe.engine.zero_stage,
        images=plan.micro_batch,
        accumulation=plan.accumulation,
        passes=_passes(recipe, plan),
        exchange=_exchange(recipe, plan, len(here)),
        gathered=plan.micro_batch * image if gathers else 0,
        norms=tuple(len(m.running_mean) for m in model.modules() if isinstance(m, BatchNorm)),
        synced=plan.bn_synced,
        trained=tuple(
            tuple(p.numel() for p in group["params"]) for group in optimizer.parameter_groups(model, recipe.optimizer)
        ),
        backend=recipe.grid.backend,
    )


def _passes(recipe: Recipe, plan: Plan) -> int:
    """Of a micro batch, in the last step."""
    if not isinstance(recipe.task, scala.Config):
        return 1
    sampler = scala.Sampler(recipe.task, recipe.model.widths, recipe.run.seed, plan.steps_per_epoch)
    return sampler.passes(plan.steps - 1)


def _exchange(recipe: Recipe, plan: Plan, here: int) -> tuple[str, int]:
    """As `Grid.exchange` chooses. here: submodules of a rank."""
    features, form = getattr(recipe.model, "embedding", 0), recipe.grid.exchange
    whole = rounding.size(features, "fp32")
    if here * rounding.size(features, form) < whole:
        return "all_gather", recipe.grid.submodule_ranks * plan.micro_batch * here * rounding.size(features, form)
    return "all_reduce", plan.micro_batch * whole


def schedule(shape: Shape, passes: Passes) -> list[Phase]:
    """What every rank does in a step, one after another, without messages to itself."""
    phases: list[Phase] = []
    each = [_FP32 * 2 * channels for channels in shape.norms]  # a mean and a variance, a sum and one of products
    for number in range(shape.accumulation * shape.passes):
        if number % shape.passes == 0:
            phases.append(Message("data", "all_gather", "replica", shape.gathered))
        if shape.zero_stage == 3:
            parted = [numbers for numbers in chain(*shape.trained) if numbers > PERSISTENT]
            phases.append(Message("parameter", "all_gather", "replicas", _FP32 * _padded(parted, shape.replicas)))
        phases.append(Compute("forward", passes.forward))
        if shape.synced:
            phases.append(Message("norm", "all_gather", "replicas", shape.replicas * sum(each), len(each)))
        phases.append(Message("exchange", shape.exchange[0], "replica", shape.exchange[1]))
        phases += [Compute("head", passes.head), Compute("backward", passes.backward)]
        if shape.synced:
            phases.append(Message("norm", "all_reduce", "replicas", sum(each), len(each)))
    phases += _reduction(shape, passes)
    if not shape.synced:
        phases.append(Message("norm", "all_reduce", "replicas", sum(each)))
    return [p for p in phases if (p.seconds if isinstance(p, Compute) else p.size and shape.group(p.over) > 1)]


def _reduction(shape: Shape, passes: Passes) -> list[Phase]:
    """From the gradients to the next step's parameters, as DeepSpeed 0.19 does it at each stage."""
    stage, trained = shape.zero_stage, list(chain(*shape.trained))
    if stage == 3:
        size = _FP32 * _padded(trained, shape.replicas)
        phases: list[Phase] = [Message("gradient", "reduce_scatter", "replicas", size)]
    else:
        phases = [Message("gradient", "all_reduce", "replicas", _FP32 * sum(trained))]
    if stage == 0:
        return [*phases, Message("scalar", "all_reduce", "replica", _FP64), Compute("update", passes.update)]
    # Whether a gradient is not finite, and the norm's square.
    scalar = _FP64 if stage == 3 else _FP32
    phases += [Message("scalar", "all_reduce", over, scalar) for over in ("replicas", "replica") for _ in range(2)]
    phases.append(Compute("update", passes.update))
    if stage == 3:
        whole = [numbers for numbers in trained if numbers <= PERSISTENT]
        size = _FP32 * _padded(whole, shape.replicas)
        return [*phases, Message("parameter", "all_gather", "replicas", size, max(len(whole), 1), together=True)]
    flat = [_FP32 * _padded([sum(group)], ALIGNED * shape.replicas) for group in shape.trained]
    return [*phases, *(Message("parameter", "all_gather", "replicas", size) for size in flat)]


def _padded(numbers: Iterable[int], parts: int) -> int:
    """The sum of numbers that are each filled up to a multiple of `parts`."""
    return sum(-(-number // parts) * parts for number in numbers)


def traffic(shape: Shape) -> dict[str, float]:
    """Bytes that a rank puts into collectives in a step: to the byte what `Engine.traffic` counts."""
    found = {f"comm/{what}_bytes": 0.0 for what in ("exchange", "feature", "norm", "data", "gradient")}
    for phase in schedule(shape, Passes(forward=1, backward=1, update=1)):
        key = f"comm/{phase.what}_bytes"
        if isinstance(phase, Message) and key in found:
            found[key] += phase.given(shape.group(phase.over))
    if shape.replicas > 1:  # counted there without what stage 3 fills parts up with
        found["comm/gradient_bytes"] = float(_FP32 * sum(chain(*shape.trained)))
    return found


@dataclass(frozen=True, kw_only=True)
class Step:
    """Of a step: seconds, each a mean over the ranks, and of the steps the median."""

    seconds: float
    compute: float
    """Of which a part is `head`."""
    head: float
    """Of what every rank of a replica computes alike."""
    exchange: float
    """Of what travels inside a replica, once its last rank is there."""
    reduction: float
    """Of what travels between replicas, once the last of them is there: gradients, parameters, statistics."""
    waiting: float
    """For slower ranks."""
    images: float
    """For images to be read."""

    @property
    def idle(self) -> float:
        """Share of the ranks' time in which they do not compute."""
        return 1 - self.compute / self.seconds


def simulate(shape: Shape, links: Links, passes: Passes, steps: int = SIMULATED, seed: int = 0) -> Step:
    """A run's steps one after another, every rank's by its own clock.

    A rank's computing times of a step are `passes` times one factor, of mean 1 and `links.stragglers` as coefficient of
    variation (log-normal). Ranks of a group leave a collective together, `Rings.seconds` after the last has come.
    """
    phases, order = schedule(shape, passes), np.arange(shape.ranks).reshape(shape.replicas, shape.submodule_ranks)
    rings = {"replica": Rings(order, links), "replicas": Rings(order.T, links)}
    draw, width = np.random.default_rng(seed), np.sqrt(np.log1p(links.stragglers**2))
    hosts = -(-shape.ranks // links.host.ranks)
    reads = shape.global_batch * (1 if shape.gathered else shape.submodule_ranks) / hosts
    now: Floats = np.zeros(shape.ranks)
    found: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        parts = dict.fromkeys((*PARTS, "head"), 0.0)
        began, factor = now, np.exp(width * draw.standard_normal(shape.ranks) - width**2 / 2)
        now = np.maximum(now, step * reads / links.host.images)
        parts["images"] = float((now - began).mean())
        for phase in phases:
            before = now
            if isinstance(phase, Compute):
                now = before + phase.seconds * factor
                for name in ("compute", "head") if phase.what == "head" else ("compute",):
                    parts[name] += float((now - before).mean())
            else:
                kind = _INSTEAD.get((shape.backend, phase.kind), phase.kind)
                there, now = _meet(before, rings[phase.over], replace(phase, kind=kind))
                parts["waiting"] += float((there - before).mean())
                parts["exchange" if phase.over == "replica" else "reduction"] += float((now - there).mean())
        found.append(parts | {"seconds": float((now - began).mean())})
    return Step(**{name: float(np.median([parts[name] for parts in found])) for name in found[0]})


def _meet(before: Floats, rings: Rings, message: Message) -> tuple[Floats, Floats]:
    """When the last of each rank's group has come, and when it has the result."""
    last = before[rings.members].max(axis=1)
    seconds = message.count * rings.seconds(message.kind, message.size // message.count, message.together)
    there, done = np.empty_like(before), np.empty_like(before)
    there[rings.members], done[rings.members] = last[:, None], (last + seconds)[:, None]
    return there, done


# A rank's share, alone


def alone(recipe: Recipe, plan: Plan) -> Recipe:
    """A recipe of exactly one rank's share, on one rank: of a resolved one.

    Raises:
        RefusedError: there is none.
    """
    model: Any = recipe.model
    s, batch = recipe.grid.submodule_ranks, plan.micro_batch * plan.accumulation
    grid, run = replace(recipe.grid, submodule_ranks=1, absent=()), replace(recipe.run, global_batch=batch)
    run = replace(run, bn_batch=min(recipe.run.bn_batch, plan.micro_batch), survive="restart")
    if s > 1:
        assert isinstance(model, hsvit.Config)
        if model.tiles > 1:
            raise RefusedError(
                f"--links: model.tiles = {model.tiles} gives each rank other parts of an image, whose time cannot be "
                "measured on one; add [passes] to the links"
            )
        here = len(first_share(recipe))
        kernels = tuple(kernels // model.submodules * here for kernels in model.kernels)
        model = replace(
            model, weights="", kernels=kernels, groups=model.groups // model.submodules * here, submodules=here
        )
        grid = replace(grid, exchange=grid.exchange if here > 1 else "fp32")
    return replace(recipe, model=model, grid=grid, run=run)


def timed(recipe: Recipe, plan: Plan, links: Links) -> Passes:
    """By first steps of a rank's share alone, on its part of this machine's cores. Of each pass the forward is taken
    for a third, and the update for a part of the backward passes.

    Raises:
        RefusedError: its steps cannot be timed.
    """
    share, cores = alone(recipe, plan), sorted(os.sched_getaffinity(0))
    own = Share(tuple(cores[: max(len(cores) // links.host.ranks, 1)]))
    step = share.run.global_batch / timing.first_steps(recipes.dumps(share), 1, own).images_per_second
    each = step / (plan.accumulation * _passes(recipe, plan))
    return Passes(forward=each / 3, backward=2 * each / 3)
