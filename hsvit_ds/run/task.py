"""The task that a recipe asks for, with what it needs of the run."""

from __future__ import annotations

from dataclasses import asdict

import torch

from ..data.sets import Facts
from ..engine.engine import Engine
from ..tasks import Task, scala
from ..tasks.features import Features
from ..tasks.supervised import Supervised
from ..tasks.teacher import Teacher
from . import recipe as recipes
from .recipe import Plan, Recipe


def build(recipe: Recipe, plan: Plan, engine: Engine, facts: Facts) -> Task:
    """What each step of the run computes."""
    grid, augmentation = engine.grid, recipe.augment
    same = ("name", "fingerprint", "window", "last_batch", "decoder")
    shown = {"augment": asdict(augmentation)} | {name: getattr(recipe.data, name) for name in same}
    if not isinstance(recipe.task, scala.Config):
        backbone, taken = getattr(engine.module, "backbone", None), None
        if backbone is not None and backbone.config.cache:
            key = {**shown, "image_size": facts.image_size}
            taken = Features(backbone.config.cache, backbone, grid, recipes.order(recipe), key, plan.bf16)
        return Supervised(augmentation, facts, taken)
    sampler = scala.Sampler(recipe.task, recipe.model.widths, recipe.run.seed, plan.steps_per_epoch)
    taught = None
    if recipe.task.teacher.name:
        key = {"seed": recipe.run.seed, "global_batch": recipe.run.global_batch, **shown}
        dtype = torch.bfloat16 if plan.bf16 else torch.float32
        taught = Teacher(recipe.task.teacher, facts, grid.device, dtype, recipe.run.global_batch, key)
    return scala.Scala(recipe.task, augmentation, facts, sampler, taught)
