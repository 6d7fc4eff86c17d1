"""Between two settlements the host never waits for the GPU: shown on one that computes nothing, for every recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hsvit_ds import models
from hsvit_ds.data import augment, splits
from hsvit_ds.data.batch import Batch
from hsvit_ds.engine import optimizer as optimizers
from hsvit_ds.engine.ema import EMA
from hsvit_ds.engine.engine import Config, Engine
from hsvit_ds.engine.outcomes import Outcomes
from hsvit_ds.engine.update import Update
from hsvit_ds.engine.zero import Shards, step_state
from hsvit_ds.models.batchnorm import Statistics, set_statistics
from hsvit_ds.run import recipe as recipes
from hsvit_ds.tasks import scala
from hsvit_ds.tasks.supervised import Supervised

from ..fake_gpu import GPU, Watched
from ..ranks import RECIPES


class OneGPU:
    """Stands for a grid of one rank."""

    device, submodule_ranks, replicas, absent = GPU, 1, 1, ()


def engine_of(model: torch.nn.Module, recipe: recipes.Recipe) -> Engine:
    """The engine at stage 0, without DeepSpeed and without the optimizer's own step, whose fused kernels are PyTorch's
    for CUDA alone."""
    engine: Any = Engine.__new__(Engine)
    groups = optimizers.parameter_groups(model, recipe.optimizer)
    optimizer = optimizers.build(groups, recipe.optimizer)
    engine.config, engine.grid, engine.accumulation = Config(zero_stage=0), OneGPU(), 1
    engine.not_captured = "no graphs here"
    engine.module, engine.optimizer = model, optimizer
    optimizer.step = lambda: None
    engine.update = Update(model, optimizer, engine.grid, recipe.optimizer.clip)
    engine.shards = Shards(model, optimizer, engine.grid)
    engine.step_state, engine.runs_differ, engine._partial = step_state(model), None, []
    engine.outcomes = Outcomes(model, engine.shards, engine.grid, limit=0)

    class DeepSpeed:
        set_gradient_accumulation_boundary = staticmethod(lambda last: None)
        backward = staticmethod(lambda loss: loss.backward())
        step = staticmethod(optimizer.zero_grad)
        __call__ = staticmethod(model.__call__)

    engine.deepspeed = DeepSpeed()
    return engine


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_step_never_waits_for_the_gpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)  # which "meta" does not know
    recipe = recipes.read(path)
    facts = splits.facts(recipe.data)
    config: Any = models.without_weights(recipe.model).resolved(facts.image_size)
    if hasattr(config, "depth"):  # the other layers ask for the same
        config = dataclasses.replace(config, depth=1)
    augmentation, count = recipe.augment, 128
    with torch.device(GPU):
        model: Any = config.build(image_size=facts.image_size, channels=facts.channels, classes=facts.classes)
        side = augmentation.canvas or facts.image_size
        pixels = torch.empty(count, facts.channels, side, side, dtype=torch.uint8)
        labels = torch.empty(count, dtype=torch.int64)
        views = torch.empty(count, augment.VIEW if augmentation.canvas else 0)
    set_statistics(model, Statistics(runs=1))
    engine = engine_of(model, recipe)
    ema = EMA(0.5, engine.shards, model)
    task: Any = Supervised(augmentation, facts)
    if isinstance(recipe.task, scala.Config):
        sampler = scala.Sampler(recipe.task, config.widths, 0, 10)
        task = scala.Scala(recipe.task, augmentation, facts, sampler, teach=None)
    with Watched() as gpu:
        batch = Batch(pixels, labels, views, torch.arange(count), 0, 10**6)
        result = engine.step(lambda: iter([task.losses(engine, batch)]), task.passes(batch.step), 0.1, batch.step)
        ema.update(result.applied)
    assert gpu.waits == []
    assert result.losses.device == result.applied.device == GPU
    with pytest.raises((NotImplementedError, RuntimeError)):
        next(engine.outcomes.settle())  # where the host may wait


@pytest.mark.parametrize(
    "slip",
    [
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.ones(20_000).to(x.device, non_blocking=True),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.cpu(),
        lambda x: float(x[0]),
        lambda x: x if x[0] > 0 else -x,
    ],
)
def test_what_waits_is_seen(slip: Any) -> None:
    with Watched() as gpu:
        try:
            slip(torch.empty(3, device=GPU))
        except (NotImplementedError, RuntimeError):
            return
    assert len(gpu.waits) == 1
