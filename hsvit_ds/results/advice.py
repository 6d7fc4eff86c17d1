"""What of a profiled run's time a key of its recipe could change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..run.recipe import Plan, Recipe
from ..spans import Part

COMPUTED = frozenset(
    {Part.FORWARD, Part.BACKBONE, Part.TRUNK, Part.EMBEDDING, Part.ATTENTION, Part.MLP, Part.HEAD, Part.LOSS}
    | {Part.BACKWARD}
)
"""What a model computes."""


class Rule(NamedTuple):
    """parts: whose time it is about. what: they are, in words. key: the override that changes it, or "" where none does
    in this run."""

    parts: frozenset[Part]
    what: str
    key: Callable[[Recipe, Plan], str]


class Change(NamedTuple):
    """share: of a step's time, which is what it could save at most."""

    share: float
    what: str
    key: str


def _backbone(recipe: Recipe, plan: Plan) -> str:
    backbone = getattr(recipe.model, "backbone", None)
    if backbone is None or not backbone.name or backbone.trained_stages or backbone.cache:
        return ""
    return "model.backbone.cache=FOLDER"


def _teacher(recipe: Recipe, plan: Plan) -> str:
    teacher = getattr(recipe.task, "teacher", None)
    return "task.teacher.cache=FOLDER" if teacher is not None and teacher.name and not teacher.cache else ""


def _statistics(recipe: Recipe, plan: Plan) -> str:
    return f"run.bn_batch={plan.micro_batch}" if plan.bn_synced else ""


def _optimizer(recipe: Recipe, plan: Plan) -> str:
    is_whole = plan.replicas > 1 and recipe.engine.zero_stage == 0
    return "engine.zero_stage=1" if is_whole else f"run.global_batch={2 * recipe.run.global_batch}"


def _exchange(recipe: Recipe, plan: Plan) -> str:
    return "grid.exchange=bf16" if recipe.grid.exchange == "fp32" else ""


def _trunk(recipe: Recipe, plan: Plan) -> str:
    model = recipe.model
    divides = model.kind == "hsvit" and model.convolution and not model.backbone.name
    return f"model.submodules={2 * model.submodules}" if divides else ""


RULES = (
    Rule(COMPUTED, "what the model computes, in fp32", lambda r, p: "" if p.bf16 else "engine.precision=bf16"),
    Rule(
        COMPUTED,
        "what the model computes, not compiled",
        lambda r, p: "" if r.engine.compile else "engine.compile=true",
    ),
    Rule(
        COMPUTED - {Part.BACKBONE, Part.HEAD, Part.LOSS, Part.EMBEDDING},
        "activations that are computed twice",
        lambda r, p: "engine.checkpoint_activations=false" if r.engine.checkpoint_activations else "",
    ),
    Rule(frozenset({Part.TRUNK}), "convolutions that see all channels", _trunk),
    Rule(frozenset({Part.BACKBONE}), "a frozen backbone that answers the same in every epoch", _backbone),
    Rule(frozenset({Part.TEACHER}), "a teacher that answers anew in every run", _teacher),
    Rule(frozenset({Part.IMAGES}), "waiting for images", lambda r, p: f"data.workers (now {r.data.workers})"),
    Rule(
        frozenset({Part.COPY}),
        "images on their way to the device",
        lambda r, p: "" if r.data.on_device == "always" else "data.on_device=always",
    ),
    Rule(
        frozenset({Part.AUGMENTATION}),
        "augmentation on the device",
        lambda r, p: "" if r.augment.preset == "none" else "augment.preset=none",
    ),
    Rule(frozenset({Part.EXCHANGE}), "what the ranks of a replica send each other", _exchange),
    Rule(frozenset({Part.STATISTICS}), "BatchNorm's statistics over all replicas", _statistics),
    Rule(
        frozenset({Part.REDUCTION}),
        "one reduction of gradients a step",
        lambda r, p: f"run.global_batch={2 * r.run.global_batch}",
    ),
    Rule(frozenset({Part.OPTIMIZER}), "the optimizer's step", _optimizer),
    Rule(
        frozenset({Part.AVERAGE}),
        "the average of weights",
        lambda r, p: "ema.decay=0" if r.ema.decay else "",
    ),
    Rule(frozenset({Part.LOG}), "metrics", lambda r, p: f"run.log_every={10 * r.run.log_every}"),
    Rule(
        frozenset({Part.CHECKPOINT}),
        "saving",
        lambda r, p: f"checkpoint.every_steps={2 * r.checkpoint.every_steps}" if r.checkpoint.every_steps else "",
    ),
    Rule(frozenset({Part.EVALUATION}), "evaluating", lambda r, p: f"run.eval_every={2 * r.run.eval_every}"),
)


def changes(recipe: Recipe, plan: Plan, shares: Mapping[tuple[Part, ...], float]) -> list[Change]:
    """All that applies to a run, the largest first.

    Args:
        shares: of a step's time by part, as `profile.seconds` has them.
    """
    found = []
    for rule in RULES:
        share = sum(share for path, share in shares.items() if path[-1] in rule.parts)
        if share > 0 and (key := rule.key(recipe, plan)):
            found.append(Change(share, rule.what, key))
    return sorted(found, key=lambda change: -change.share)
