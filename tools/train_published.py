"""A recipe trained as the published code would: `python -m tools.train_published RECIPE [key=value ...]`.

The published network (`tools/benchmarks/published.py`) with its own initialisation in a plain PyTorch loop, on the
images, in the order and with the settings that `hsvit_ds.train` has for the same recipe: a yardstick.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_ds.data import augment, splits
from hsvit_ds.data.reader import Reader
from hsvit_ds.engine.optimizer import Schedule
from hsvit_ds.errors import RefusedError
from hsvit_ds.grid.grid import Grid
from hsvit_ds.models import hsvit
from hsvit_ds.models.slimmable import FULL, Width
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.evaluation import evaluate
from hsvit_ds.run.recipe import Recipe
from tools.benchmarks.published import published
from tools.benchmarks.steps import machine


def train(path: Path, overrides: list[str]) -> list[dict[str, float]]:
    """Train on this process alone.

    Returns:
        Of each epoch: epoch (from 1), loss (mean of its steps, nats), top1 (% of the test split), images/s (evaluation
        left out).

    Raises:
        RefusedError: the recipe asks for what the published code does not have.
    """
    recipe, plan = recipes.resolve(recipes.read(path, overrides), 1)
    model = _model(recipe)
    facts, optimizer = splits.facts(recipe.data), _optimizer(recipe, model)
    schedule = Schedule(recipe.optimizer, recipe.run.epochs, plan.steps_per_epoch)
    grid = Grid(recipe.grid, submodules=1)
    reader = Reader(recipe.data, recipe.augment, recipes.order(recipe), plan.share(recipe, 0), grid)

    def forward(images: Tensor, width: Width = FULL) -> Tensor:
        assert width.is_full
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16):
            logits: Tensor = model(images)
        return logits.float()

    rows: list[dict[str, float]] = []
    for epoch in range(recipe.run.epochs):
        model.train()
        began, losses = time.perf_counter(), []
        for step, batches in enumerate(reader.train(epoch, 0), epoch * plan.steps_per_epoch):
            for batch in batches:
                images, soft = augment.prepare(batch, recipe.augment, facts)
                loss = F.cross_entropy(forward(images), soft) / len(batches)
                loss.backward()
                losses.append(loss.item() * len(batches))
            nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip or float("inf"))
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(step)
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - began
        rows.append(
            {
                "epoch": epoch + 1,
                "loss": sum(losses) / len(losses),
                "top1": evaluate(forward, model, reader, recipe.data.test)["top1"],
                "images/s": plan.steps_per_epoch * recipe.run.global_batch / seconds,
            }
        )
        print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    reader.close()
    return rows


def _model(recipe: Recipe) -> nn.Module:
    """With PyTorch's own randomness."""
    config, facts = recipe.model, splits.facts(recipe.data)
    plain = isinstance(config, hsvit.Config) and hsvit.Config(variant=config.variant, dropout=config.dropout)
    if not plain or not plain.variant or plain.resolved(facts.image_size) != config:
        raise RefusedError(
            f"{recipe.run.name}: the published code trains its variants as they are; leave out of [model] all but "
            "kind, variant and dropout"
        )
    torch.manual_seed(recipe.run.seed)
    shape = {"image_size": facts.image_size, "channels": facts.channels, "classes": facts.classes}
    return published(plain.variant, **shape, dropout=plain.dropout)


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    config = recipe.optimizer
    if config.name != "adamw" or config.decay != "all":
        raise RefusedError(f'{recipe.run.name}: the published code has optimizer.name = "adamw" and decay = "all"')
    return torch.optim.AdamW(
        model.parameters(), config.lr, config.betas, config.eps, weight_decay=config.weight_decay, fused=True
    )


def main() -> None:
    parser = argparse.ArgumentParser("tools.train_published", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    print(machine(torch.device("cpu")))
    train(given.recipe, given.overrides)


if __name__ == "__main__":
    main()
