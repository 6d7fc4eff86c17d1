"""The memory that is told before a run starts is what its ranks need."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.memory import Memory, needed
from tools.benchmarks.memory import measure

from ..ranks import ROOT

RECIPE = ROOT / "recipes/digits/hybrid.toml"


def plan(*overrides: str, ranks: int = 4) -> Memory:
    return needed(*recipes.resolve(recipes.read(RECIPE, ["grid.submodule_ranks=1", *overrides]), ranks))


@pytest.mark.slow
@pytest.mark.marathon
@pytest.mark.parametrize(("stage", "base"), [(1, RECIPE), (3, RECIPE), (1, ROOT / "recipes/digits/scala.toml")])
def test_the_plan_is_what_two_replicas_need(stage: int, base: object) -> None:
    overrides = ["grid.submodule_ranks=1", f"engine.zero_stage={stage}", "run.global_batch=128"]
    found = measure(base, overrides, 2)  # type: ignore[arg-type]
    assert found["plan: in all"] == pytest.approx(found["measured peak"], rel=0.25)
    if stage == 1:
        planned = found["plan: parameters"] + found["plan: optimizer"]
        assert planned == pytest.approx(found["measured between steps"], rel=0.1)


def test_stages_share_what_they_say_among_the_replicas() -> None:
    memory = {stage: plan(f"engine.zero_stage={stage}") for stage in (0, 1, 2, 3)}
    trained = memory[0].gradients
    assert memory[0].optimizer == 2 * trained
    assert memory[1].optimizer == memory[2].optimizer == pytest.approx(3 * trained / 4, abs=4)
    assert memory[3].parameters == pytest.approx(memory[0].parameters * 1.25, rel=0.01)
    assert len({m.activations for m in memory.values()}) == 1


def test_what_is_frozen_has_no_gradient_and_no_state() -> None:
    frozen, trained = plan("model.backbone.trained_stages=0"), plan()
    backbone = trained.gradients - frozen.gradients
    assert backbone > frozen.gradients
    assert trained.optimizer - frozen.optimizer == pytest.approx(3 * backbone / 4, abs=4)
    assert frozen.parameters == trained.parameters
    assert frozen.activations < trained.activations / 2


def test_recomputing_and_dividing_need_less() -> None:
    assert plan("engine.checkpoint_activations=true").activations < 0.8 * plan().activations
    whole = needed(*recipes.resolve(recipes.read(RECIPE, ["grid.submodule_ranks=1"]), 1)).activations
    assert needed(*recipes.resolve(recipes.read(RECIPE), 2)).activations < 0.65 * whole


def test_the_command_prints_every_part() -> None:
    result = CliRunner().invoke(app, ["recipe", str(RECIPE), "--memory", "--ranks", "4"])
    assert result.exit_code == 0
    for part in ("parameters", "gradients", "optimizer", "activations", "in all", "2 replicas x 2 submodule ranks"):
        assert part in result.stdout
