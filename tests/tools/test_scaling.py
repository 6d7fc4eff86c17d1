"""Idle time: by formulas, simulated, and measured, which agree where nothing else takes time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F

from hsvit_ds.run.links import FREE, Passes
from hsvit_ds.run.prediction import Shape, simulate
from tests.ranks import ROOT, environment, work
from tests.workers.stages import IMAGES, SUBMODULES, VARIANT
from tools.ranks import idle, pipeline, points, predict
from tools.ranks.methods import batch
from tools.ranks.points import Case, Row
from tools.ranks.start import awake
from tools.ranks.watch import Call, Step, parts

PASSES = Passes(forward=0.010, head=0.002, backward=0.020, update=0.003)
RANKS = (2, 4, 64, 4096)


# Formulas


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_a_simulated_pipeline_idles_as_its_formula_says(ranks: int, micro_batches: int) -> None:
    step = pipeline.simulated([(0.010, 0.020, 0.0)] * ranks, micro_batches, FREE, [1000] * (ranks - 1))
    assert step.idle_ratio == pytest.approx(idle.pipeline(ranks, micro_batches), rel=1e-6)
    if micro_batches == 1:
        assert step.idle_ratio == pytest.approx(idle.model_parallel(ranks), rel=1e-6)


@pytest.mark.parametrize("ranks", RANKS)
def test_simulated_submodules_idle_as_both_readings_say(ranks: int) -> None:
    shape = Shape(
        replicas=1, submodule_ranks=ranks, zero_stage=0, images=8, accumulation=1, passes=1,
        exchange=("all_reduce", 2048), gathered=0, norms=(), synced=False, trained=((100,),),
    )  # fmt: skip
    step = simulate(shape, FREE, PASSES, steps=3)
    submodule, aggregation = 0.033, 0.002
    summed = idle.of_submodules(ranks, step.compute, step.head, step.waiting)
    assert summed == pytest.approx(idle.summed(ranks, submodule, aggregation), rel=1e-6)
    own = ranks * (step.compute - step.head)
    assert step.head / (own + step.head) == pytest.approx(idle.elapsed(ranks, submodule, aggregation), rel=1e-6)


def test_one_reading_rises_with_the_ranks_and_the_other_one_falls() -> None:
    summed = [idle.summed(ranks, 0.033, 0.002) for ranks in RANKS]
    elapsed = [idle.elapsed(ranks, 0.033, 0.002) for ranks in RANKS]
    assert sorted(summed) == summed
    assert summed[-1] < 0.002 / 0.033
    assert sorted(elapsed, reverse=True) == elapsed


def test_a_pipeline_waits_for_what_it_is_sent() -> None:
    links = replace(FREE, between=replace(FREE.between, bandwidth=1e6, latency=0.001))
    step = pipeline.simulated([(0.010, 0.020, 0.0)] * 3, 1, links, [1000, 3000])
    assert step.seconds == pytest.approx(3 * 0.030 + 2 * (0.002 + 0.004))
    # The other stage asks for the second forward at 25 ms, this one for the second gradient at 85 ms.
    asked = pipeline.simulated([(0.010, 0.020, 0.0)] * 2, 2, links, [4000])
    assert asked.seconds == pytest.approx(0.085 + 0.005 + 0.020)
    uneven = pipeline.simulated([(0.010, 0.020, 0.001), (0.001, 0.002, 0.1)], 2, FREE, [0])
    # The second stage has both forwards at 21 ms and is done at 125 ms, long after the first one.
    assert uneven.seconds == pytest.approx(0.021 + 2 * 0.002 + 0.1)


# The clock


def test_what_waits_for_the_last_rank_is_not_transfer() -> None:
    """Two ranks; the first one enters a collective at 1 s, the other at 3 s, and both leave at 3.5 s."""
    early = Step(0.0, 4.0, [Call((0, 1), 100, entered=1.0, blocked=1.0, left=3.5)])
    late = Step(0.0, 4.0, [Call((0, 1), 100, entered=3.0, blocked=3.0, left=3.5)])
    found = parts([[early], [late]], warm=0)
    assert found == pytest.approx((4.0, 4.0 - 0.5 - 1.0, 0.5, 1.0, 100))


def test_what_goes_on_while_a_rank_computes_blocks_nobody() -> None:
    """Asked for at 0 s, waited for from 2 to 2.5 s."""
    steps = [[Step(0.0, 3.0, [Call((0, 1), 8, entered=0.0, blocked=2.0, left=2.5)])] for _ in range(2)]
    assert parts(steps, warm=0) == pytest.approx((3.0, 2.5, 0.5, 0.0, 8))


def test_collectives_of_different_groups_are_not_mixed_up() -> None:
    first, second = (0, 1), (0, 2)
    ranks = [
        [Step(0.0, 2.0, [Call(first, 1, 0.0, 0.0, 1.0), Call(second, 1, 1.0, 1.0, 2.0)])],
        [Step(0.0, 2.0, [Call(first, 1, 0.5, 0.5, 1.0)])],
        [Step(0.0, 2.0, [Call(second, 1, 0.0, 0.0, 2.0)])],
    ]
    assert parts(ranks, warm=0).waiting == pytest.approx((0.5 + 0.0 + 1.0) / 3)


# The pipeline


def test_layers_one_after_another_are_the_network() -> None:
    network, (images, _) = pipeline.network(VARIANT, SUBMODULES).eval(), batch(3)
    with torch.no_grad():
        x = images
        for layer in pipeline.layers(network):
            x = layer(x)
        torch.testing.assert_close(x, network(images), rtol=1e-5, atol=1e-6)


def test_the_network_has_the_work_of_its_submodules() -> None:
    recipe, plan = Case(variant=VARIANT, method="submodules", ranks=1, batch=4).resolved()
    projections = (SUBMODULES - 1) * (64 + 1) * 64  # the published one is shared
    ours = plan.parameters - projections
    assert sum(p.numel() for p in pipeline.network(VARIANT, SUBMODULES).parameters()) == ours
    assert recipe.model.submodules == SUBMODULES


def test_stages_are_as_even_as_layers_allow() -> None:
    assert pipeline.balanced([1, 1, 1, 1, 4, 2, 2], 3) == [range(4), range(4, 5), range(5, 7)]
    assert pipeline.balanced([5.0], 1) == [range(1)]


@pytest.mark.heavy
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_stages_on_ranks_equal_the_network_in_one_process(micro_batches: int, tmp_path: Path) -> None:
    network, (images, labels) = pipeline.network(VARIANT, SUBMODULES).eval(), batch(IMAGES)
    layers = pipeline.layers(network)
    with torch.no_grad():
        half = layers[1](layers[0](images))
    arguments = {
        "micro_batches": micro_batches,
        "stages": [[0, 2], [2, len(layers)]],
        "shapes": [list(images.shape[1:]), list(half.shape[1:])],
    }
    first, second = work("stages", 2, tmp_path, arguments)
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    assert second["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    found, expected = [*first["gradients"], *second["gradients"]], [p.grad for x in layers for p in x.parameters()]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# The commands


def row(case: Case, **changed: object) -> Row:
    """As emulated over free links, with nothing that waits."""
    links, base = FREE, {"seconds": 0.035, "compute": 0.035, "transfer": 0.0, "waiting": 0.0, "given": 8200.0}
    table = asdict(case) | base | {"how": "emulated", "over": "loopback", "formula": 0.0, "elapsed": 0.0}
    table |= {"images_per_second": case.batch / 0.035, "passes": points.text_of(PASSES), "links": points.text_of(links)}
    return Row(**table | {"machine": "one"} | changed)  # type: ignore[arg-type]


SUBMODULE_ROW = row(Case(variant="C2A2", method="submodules", ranks=4, batch=32))


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [SUBMODULE_ROW, row(Case(variant="C2A2", method="pipeline", ranks=2, batch=32, micro_batches=4))]
    points.write(rows, tmp_path / "rows.csv")
    assert points.read(tmp_path / "rows.csv") == rows


def test_every_measured_row_is_compared_and_the_largest_error_told() -> None:
    slower = replace(SUBMODULE_ROW, images_per_second=32 / 0.070, over="cable")
    wrong = replace(SUBMODULE_ROW, given=8192.0)
    (line, other, third) = predict.check([SUBMODULE_ROW, slower, wrong])
    assert (line["error, %"], other["error, %"], line["bytes predicted"]) == ("+0.0", "+100.0", "8,200")
    assert third["bytes"] == "8,192"
    said = predict.worst([SUBMODULE_ROW, slower, wrong])
    assert "largest error of images/s: +100.0 % (emulated C2A2 submodules, 4 ranks, cable)" in said
    assert said.endswith("2 of 3 within 15 %; bytes differ at 1")


def test_predictions_go_to_4096_ranks() -> None:
    for ranks in predict.RANKS:
        case = Case(variant="C2A2", method="submodules", ranks=ranks, batch=32)
        found = predict.of_case(case, FREE, PASSES)
        assert found.idle_ratio == pytest.approx(idle.summed(ranks, 0.033, 0.002), rel=1e-6)
    assert ranks == 4096


@pytest.mark.slow
def test_curves_have_every_way_to_divide_the_network_in_weak_and_strong_scaling() -> None:
    lines = list(predict.Curves(variant="C2A2", batch=32, passes=PASSES, links=FREE).rows(4))
    ways = {(line["scaling"], line["divided by"]) for line in lines if line["ranks"] == 4}
    ours = {"submodules", "data parallel", "ZeRO-1", "ZeRO-3"}
    assert ways == {*(("weak", way) for way in {*ours, "pipeline, m = 4"}), *(("strong", way) for way in ours)}
    rates = {line["ranks"]: float(line["images/s"]) for line in lines if line["divided by"] == "data parallel"}
    assert rates[4] == pytest.approx(4 * rates[1], rel=0.02)


def test_cores_are_kept_awake_by_what_gives_way_and_is_gone_afterwards() -> None:
    me = psutil.Process()
    before = {*me.children()}
    with awake():
        loops = {*me.children()} - before
        assert len(loops) == len(os.sched_getaffinity(0))
        while not all(os.sched_getscheduler(loop.pid) == os.SCHED_IDLE for loop in loops):
            time.sleep(0.01)
    assert {*me.children()} == before


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tools.scaling", *arguments],
        cwd=ROOT,
        env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.heavy
@pytest.mark.slow
def test_measured_ranks_send_the_bytes_that_are_predicted(tmp_path: Path) -> None:
    run("measure", "--out", str(tmp_path), "--steps", "2", "--rounds", "1", "--ranks", "2")
    rows = points.read(tmp_path / "measured.csv")
    assert {r.case.name for r in rows} > {"submodules", "data parallel", "ZeRO-1", "ZeRO-3", "model parallel"}
    assert all(r.given == predict.of_row(r).given for r in rows)
    assert all(r.compute > 0 and r.seconds == pytest.approx(r.compute + r.transfer + r.waiting, rel=0.2) for r in rows)
    assert (tmp_path / "measured.svg").stat().st_size > 10_000


@pytest.mark.heavy
def test_a_prediction_without_anything_measured_takes_its_passes_from_the_links(tmp_path: Path) -> None:
    text = "[inside]\nbandwidth = 1e9\n[between]\nbandwidth = 1e8\n[passes]\nforward = 0.01\nbackward = 0.02\n"
    (tmp_path / "links.toml").write_text(text)
    run("predict", "--out", str(tmp_path), "--links", str(tmp_path / "links.toml"), "--ranks", "2")
    lines = (tmp_path / "predicted.csv").read_text().splitlines()
    assert "memory, MiB" in lines[0]
    assert len(lines) > 10
    assert (tmp_path / "scaling.svg").stat().st_size > 10_000
