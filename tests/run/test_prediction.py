"""What a step on many ranks will take: bytes as a real run counts them, times as they follow from passes and links."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.errors import RefusedError
from hsvit_ds.run import prediction, timing
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.links import FREE, Between, Host, Inside, Links, Passes
from hsvit_ds.run.prediction import Shape, Step, simulate
from hsvit_ds.run.timing import Timed

from ..ranks import ROOT, finish, fork
from ..workers.common import SMALL, SMALL_SCALA

DIGITS = "recipes/digits/hsvit.toml"
PASSES = Passes(forward=0.010, head=0.002, backward=0.020, update=0.003)
SHAPE = Shape(
    replicas=1, submodule_ranks=1, zero_stage=0, images=8, accumulation=1, passes=1, exchange=("all_reduce", 2048),
    gathered=0, norms=(8, 16), synced=False, trained=((500_000, 1000), (10,)),
)  # fmt: skip


def predicted(path: str, overrides: list[str], ranks: int) -> tuple[recipes.Recipe, recipes.Plan, Shape]:
    recipe, plan = recipes.resolve(recipes.read(ROOT / path, overrides), ranks)
    return recipe, plan, prediction.shape(recipe, plan)


# Bytes

ALIKE = ["grid.submodule_ranks=1"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "submodules": ("hsvit", []),
    "submodules in bf16": ("hsvit", ["engine.precision=bf16"]),
    "submodules, four of them": ("hsvit", ["model.submodules=4"]),
    "bf16 travels": ("hsvit", ["grid.exchange=bf16"]),
    "int8 travels": ("hsvit", ["grid.exchange=int8", "run.micro_batch=32", "run.bn_batch=32"]),
    "int8 of two submodules": ("hsvit", ["model.submodules=4", "grid.exchange=int8"]),
    "images gathered": ("hsvit", ["data.share=gather", "run.micro_batch=32", "run.bn_batch=32", "engine.zero_stage=0"]),
    "replicas, ZeRO-0": ("hsvit", [*ALIKE, "engine.zero_stage=0"]),
    "replicas, ZeRO-1": ("hsvit", [*ALIKE, "engine.zero_stage=1", "run.micro_batch=16", "run.bn_batch=32"]),
    "replicas, ZeRO-3, own statistics": ("hsvit", [*ALIKE, "engine.zero_stage=3", "run.bn_batch=32"]),
    "replicas of a ViT": ("scala", []),
}
OFTEN = ("int8 of two submodules", "images gathered", "replicas, ZeRO-1", "replicas, ZeRO-3, own statistics")
"""Those that `make test` runs; `make test-slow` the others."""


@pytest.mark.heavy
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in OFTEN else [pytest.mark.slow, pytest.mark.marathon]) for c in RUNS]
)
def test_the_bytes_of_a_step_are_those_that_two_ranks_count(case: str, tmp_path: Path) -> None:
    base, overrides = RUNS[case]
    path, small = f"recipes/digits/{base}.toml", {"hsvit": SMALL, "scala": SMALL_SCALA}[base]
    overrides = [*small, "run.global_batch=128", *overrides]
    stops = ["run.epochs=1", "run.log_every=1", "run.eval_every=1", f"run.root={tmp_path}"]
    finish(fork("hsvit_ds.train", [path, *overrides, *stops], 2))
    (log,) = tmp_path.glob("*/metrics.jsonl")
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if "comm/gradient_bytes" in line]
    found = {name: value for name, value in lines[1].items() if name.startswith("comm/")}
    assert found == prediction.traffic(predicted(path, overrides, 2)[2])
    assert sum(found.values()) > 0


def test_what_stays_on_a_rank_is_no_message() -> None:
    assert {type(phase) for phase in prediction.schedule(SHAPE, PASSES)} == {prediction.Compute}
    assert set(prediction.traffic(SHAPE).values()) == {0.0}


# Times


def over(replicas: int, submodule_ranks: int, links: Links = FREE, passes: Passes = PASSES, **changed: Any) -> Step:
    return simulate(replace(SHAPE, replicas=replicas, submodule_ranks=submodule_ranks, **changed), links, passes)


@pytest.mark.parametrize(("replicas", "submodule_ranks"), [(1, 1), (1, 16), (16, 1), (4, 4), (2, 2048)])
def test_ranks_that_are_alike_over_free_links_wait_for_nothing(replicas: int, submodule_ranks: int) -> None:
    step = over(replicas, submodule_ranks, accumulation=3)
    whole = 3 * (0.010 + 0.002 + 0.020) + 0.003
    assert (step.seconds, step.compute, step.head) == pytest.approx((whole, whole, 3 * 0.002))
    assert (step.waiting, step.exchange, step.reduction, step.images, step.idle) == pytest.approx((0,) * 5, abs=1e-9)


def test_the_parts_of_a_step_are_all_of_it() -> None:
    links = Links(inside=Inside(bandwidth=1e9), between=Between(bandwidth=1e8), host=Host(ranks=2, images=400))
    links, shape = replace(links, stragglers=0.2), replace(SHAPE, replicas=4, submodule_ranks=2)
    step = simulate(shape, links, PASSES, steps=1)
    assert all(getattr(step, part) > 0 for part in prediction.PARTS)
    assert sum(getattr(step, part) for part in prediction.PARTS) == pytest.approx(step.seconds)
    assert step.idle == pytest.approx(1 - step.compute / step.seconds)


def test_messages_take_what_their_rings_do() -> None:
    links = Links(inside=Inside(bandwidth=1e9, latency=1e-6), between=Between(bandwidth=1e8), host=Host(ranks=4))
    step = over(1, 4, links)
    assert step.exchange == pytest.approx(6 * (1e-6 + 2048 / 4 / 1e9) + 6 * (1e-6 + 8 / 4 / 1e9))
    assert (step.reduction, step.waiting) == (0, pytest.approx(0, abs=1e-12))
    step = over(4, 1, links)
    trained, statistics = 4 * 501_010, 8 * 24
    assert step.reduction == pytest.approx(12 * 1e-6 + 6 * (trained + statistics) / 4 / 1e9)
    assert step.exchange == 0


def test_gloo_scatters_a_sum_by_reducing_all_of_it() -> None:
    links = replace(FREE, inside=Inside(bandwidth=1e9), host=Host(ranks=4))
    ring, gloo = (over(4, 1, links, zero_stage=3, backend=backend).reduction for backend in ("auto", "gloo"))
    assert gloo - ring == pytest.approx(3 * 4 * (500_000 + 1000 + 12) / 4 / 1e9)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_gathers_the_parameters_that_its_ranks_do_not_keep(stage: int) -> None:
    phases = prediction.schedule(replace(SHAPE, replicas=4, zero_stage=stage), PASSES)
    gathered = [p.size for p in phases if isinstance(p, prediction.Message) and p.what == "parameter"]
    assert gathered == ([4 * 500_000, 4 * (1000 + 12)] if stage == 3 else [4 * 501_000, 4 * 16])  # in equal parts


def test_two_stragglers_wait_as_their_spread_says() -> None:
    spread, links = 0.05, replace(FREE, stragglers=0.05)
    step = simulate(replace(SHAPE, submodule_ranks=2), links, Passes(forward=1, backward=1), steps=5000)
    half_of_the_difference = 2 * 0.6745 / math.sqrt(2) * spread  # its median, of two nearly normal numbers
    assert step.waiting == pytest.approx(half_of_the_difference, rel=0.05)
    assert step.compute == pytest.approx(2, rel=0.01)
    assert over(1, 1, links).waiting == 0


def test_the_same_seed_gives_the_same_prediction() -> None:
    links = replace(FREE, stragglers=0.1)
    shape = replace(SHAPE, submodule_ranks=4)
    assert simulate(shape, links, PASSES, 20, seed=1) == simulate(shape, links, PASSES, 20, seed=1)
    assert simulate(shape, links, PASSES, 20, seed=1) != simulate(shape, links, PASSES, 20, seed=2)


def test_hosts_that_read_slowly_set_the_pace() -> None:
    links = replace(FREE, host=Host(ranks=4, images=100))
    step = over(8, 1, links)  # two hosts
    assert 64 / step.seconds == pytest.approx(200)
    assert step.images == pytest.approx(step.seconds - step.compute)
    assert 8 / over(1, 8, links).seconds == pytest.approx(200 / 8), "each rank of a replica reads all of its images"
    gathers = over(1, 8, links, gathered=8 * 3080)
    assert 8 / gathers.seconds == pytest.approx(200)


def test_4096_ranks_are_simulated() -> None:
    links = Links(inside=Inside(bandwidth=1e11), between=Between(bandwidth=1e10), host=Host(ranks=8), stragglers=0.05)
    for replicas, submodule_ranks in ((4096, 1), (1, 4096), (64, 64)):
        step = over(replicas, submodule_ranks, links)
        assert step.seconds > step.compute > 0
        assert step.waiting > 0


# The share of a rank, and the command


def test_a_ranks_share_alone_is_what_it_has_in_the_grid() -> None:
    changed = ["model.submodules=8", "model.groups=16", "run.global_batch=64", "grid.exchange=int8"]
    recipe, plan, shape = predicted(DIGITS, [*changed, "grid.submodule_ranks=4"], 8)
    share, alone = recipes.resolve(prediction.alone(recipe, plan), 1)
    assert prediction.shape(share, alone).trained == shape.trained
    assert (alone.replicas, alone.micro_batch, alone.accumulation) == (1, plan.micro_batch, plan.accumulation)
    facts = (32, 1, 10)
    head = 64 * 10
    assert 4 * (share.model.macs(*facts) - head) == recipe.model.macs(*facts) - head


LINKS = "stragglers = 0.01\n[inside]\nbandwidth = 1e9\nlatency = 1e-5\n[between]\nbandwidth = 1e8\n[host]\nranks = 2\n"


def shown(arguments: list[str], tmp_path: Path, links: str = LINKS) -> Any:
    (tmp_path / "links.toml").write_text(links)
    return CliRunner().invoke(
        app, ["recipe", str(ROOT / DIGITS), "--links", str(tmp_path / "links.toml"), *arguments], env={"COLUMNS": "200"}
    )


def test_the_command_shows_what_a_run_will_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def first_steps(text: str, *_: Any) -> Timed:
        asked.append(text)
        return Timed(16 / 0.030, 1.0)

    monkeypatch.setattr(timing, "first_steps", first_steps)
    result = shown(["--ranks", "4"], tmp_path)
    assert result.exit_code == 0, result.output
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in result.stdout.splitlines()]
    rows = {line[0]: line[1] for line in lines if len(line) == 2}
    assert len(asked) == 1
    assert 25 < float(rows["compute, ms"]) < 35
    assert 32 / float(rows["a step, ms"]) * 1000 == pytest.approx(float(rows["images/s"].replace(",", "")), rel=1e-3)
    assert rows["exchange bytes of a rank and step"] == f"{16 * 64 * 4:,}"
    assert rows["gradient bytes of a rank and step"] == "1,374,120"
    assert float(rows["in all"]) > 1
    assert "4 ranks on hosts of 2, passes timed here" in result.stdout


def test_passes_that_the_links_have_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "first_steps", None)
    result = shown(["--ranks", "2"], tmp_path, f"{LINKS}[passes]\nforward = 1\nbackward = 2\nupdate = 0.5\n")
    assert result.exit_code == 0, result.output
    assert "│ compute, ms" in result.stdout
    assert "passes as " in result.stdout


@pytest.mark.heavy
@pytest.mark.slow
def test_a_ranks_share_is_timed_by_a_real_training() -> None:
    recipe, plan, _ = predicted(DIGITS, [], 2)
    passes = prediction.timed(recipe, plan, FREE)
    assert passes.backward == 2 * passes.forward > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "3"], "grid.submodule_ranks = 2 does not divide the 3 ranks started"),
        (["--ranks", "4", "--hours"], "--links and --hours: each takes the recipe's place; ask for one"),
        (["--ranks", "4", "--memory"], "--memory and --links: each takes the recipe's place; ask for one"),
    ],
)
def test_what_cannot_be_predicted_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = shown(arguments, tmp_path)
    assert result.exit_code == 2
    assert message in result.output


def test_a_hybrid_whose_maps_travel_is_refused() -> None:
    with pytest.raises(RefusedError, match="a backbone's images and exchanges its maps, which is not predicted"):
        predicted("recipes/digits/hybrid.toml", [], 2)


def test_tiles_are_not_timed_on_one_rank() -> None:
    recipe, plan, _ = predicted(DIGITS, ["model.submodules=4", "model.tiles=2", "model.pool_strides=[2,2]"], 2)
    with pytest.raises(RefusedError, match=r"model\.tiles = 2 gives each rank other parts of an image"):
        prediction.alone(recipe, plan)
