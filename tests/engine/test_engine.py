"""The engine's promises that one process can show: precision, non-finite steps, compile, EMA, exact evaluation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hsvit_ds.engine.optimizer import Config, Schedule, decays, describe, parameter_groups
from hsvit_ds.errors import RefusedError
from hsvit_ds.grid.rounding import FORMATS
from hsvit_ds.run import opening
from hsvit_ds.run.evaluation import evaluate
from hsvit_ds.run.trainer import Trainer
from hsvit_kernels import dispatch

from ..workers.common import state, steps, trainer

ALONE = ["grid.submodule_ranks=1"]
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


def run(folder: Path, *overrides: str) -> Trainer:
    return trainer(folder, [*ALONE, *overrides])


@STAGES
def test_bf16_keeps_fp32_parameters_and_trains_alike(stage: int, tmp_path: Path) -> None:
    """BatchNorm included, on which DeepSpeed's own bf16 mode fails."""
    norms = {}
    for precision in ("fp32", "bf16"):
        here = run(tmp_path, f"engine.precision={precision}", f"engine.zero_stage={stage}")
        norms[precision] = steps(here, 3)
        assert {master.dtype for master in here.engine.shards.masters} == {torch.float32}
    assert norms["bf16"] != norms["fp32"]
    assert norms["bf16"] == pytest.approx(norms["fp32"], rel=0.1)


def poisoned(here: Trainer, bad_steps: set[int]) -> None:
    """Make the loss of some steps NaN, as an overflow would."""
    losses = here.task.losses

    def poison(engine: Any, batch: Any) -> Iterator[torch.Tensor]:
        for loss in losses(engine, batch):
            yield loss * (float("nan") if batch.step in bad_steps else 1.0)

    here.task.losses = poison  # type: ignore[method-assign]


@STAGES
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_non_finite_step_is_not_applied(stage: int, optimizer: str, tmp_path: Path) -> None:
    """Neither in the middle nor as the first one, at which optimizers make their state."""
    for bad in (0, 1):
        keys = [f"engine.zero_stage={stage}", "optimizer.clip=0.5", f"optimizer.name={optimizer}", "ema.decay=0.5"]
        here = run(tmp_path, *keys)
        assert here.ema is not None
        poisoned(here, {bad})
        for step, batches in zip(range(3), here.reader.train(0, 0), strict=False):
            before = state(here)
            result = here._step(batches, step)
            here.ema.update(result.applied)
            after = state(here)
            (settled,) = here.engine.outcomes.settle()
            assert settled.applied == bool(result.applied) == (step != bad)
            assert all(math.isfinite(loss) for loss in settled.losses) == (step != bad)
            moved = [name for name, tensor in after.items() if name in before and not torch.equal(tensor, before[name])]
            assert bool(moved) == (step != bad), moved
            assert all(bool(tensor.isfinite().all()) for tensor in after.values())
        assert here.engine.outcomes.skipped == 1


def ended(here: Trainer, steps: int) -> None:
    """Do steps as the loop would with run.log_every = `steps`."""
    for step, batches in zip(range(steps), here.reader.train(0, 0), strict=False):
        here._step(batches, step)
    list(here.engine.outcomes.settle())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_left_out_leaves_no_trace_in_the_ones_after_it(optimizer: str, tmp_path: Path) -> None:
    keys = ["engine.zero_stage=0", f"optimizer.name={optimizer}", "optimizer.weight_decay=0.1"]
    found = []
    for bad in ({0, 2}, set()):
        here = run(tmp_path, *keys)
        poisoned(here, bad)
        for step, batches in zip(range(4), here.reader.train(0, 0), strict=False):
            if bad or step in (1, 3):
                here._step(batches, step)
        found.append(state(here))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@pytest.mark.parametrize("exchange", FORMATS)
def test_non_finite_steps_in_a_row_end_the_run_with_the_place(exchange: str, tmp_path: Path) -> None:
    here = run(tmp_path, "engine.zero_stage=0", "engine.max_skipped_steps=2", f'grid.exchange="{exchange}"')
    with torch.no_grad():
        here.engine.module.submodules.qkv_weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(
        RefusedError,
        match=r"3 steps in a row, up to step 2, .* rank 0: loss nan, non-finite parameter submodules\.qkv_weight",
    ):
        ended(here, 3)


def test_a_non_finite_loss_of_finite_weights_is_named(tmp_path: Path) -> None:
    here = run(tmp_path, "engine.max_skipped_steps=0")
    poisoned(here, {0})
    with pytest.raises(RefusedError, match=r"1 step in a row, up to step 0, .* rank 0: loss nan, non-finite loss"):
        ended(here, 1)


def test_too_many_skipped_steps_end_the_run_although_others_followed(tmp_path: Path) -> None:
    here = run(tmp_path, "engine.max_skipped_steps=1")
    poisoned(here, {1, 2})
    with pytest.raises(RefusedError, match=r"2 steps in a row, up to step 2, .*; its images are gone; run.log_every"):
        ended(here, 5)
    here = run(tmp_path, "engine.max_skipped_steps=1")
    poisoned(here, {1, 3})  # never two in a row
    ended(here, 5)
    assert here.engine.outcomes.skipped == 2


def test_clipping_bounds_the_update_and_reports_the_norm_before_it(tmp_path: Path) -> None:
    moved = {}
    for clip in (0.0, 1e-3):
        here = run(
            tmp_path, "optimizer.name=sgd", "optimizer.lr=1.0", "optimizer.weight_decay=0", f"optimizer.clip={clip}"
        )
        before = torch.cat([m.detach().clone().flatten() for m in here.engine.shards.masters])
        (norm,) = steps(here, 1)
        after = torch.cat([m.detach().flatten() for m in here.engine.shards.masters])
        moved[clip] = (norm, float((after - before).norm()))
    assert moved[0.0][0] == pytest.approx(moved[1e-3][0])
    warmup = 1 / 71  # the first of the warm-up's steps
    assert moved[0.0][1] == pytest.approx(moved[0.0][0] * warmup, rel=1e-4)
    assert moved[1e-3][1] == pytest.approx(1e-3 * warmup, rel=1e-2)


@STAGES
def test_the_ema_averages_masters_and_buffers(stage: int, tmp_path: Path) -> None:
    here = run(tmp_path, "ema.decay=0.75", f"engine.zero_stage={stage}")
    assert here.ema is not None
    expected = {name: tensor for name, tensor in state(here).items() if ".ema." not in name}
    for stop in (1, 2):
        here.start = type(here.start)(0, stop - 1, stop - 1)
        steps(here, stop)
        for name, tensor in state(here).items():
            if name in expected:
                expected[name] = expected[name] * 0.75 + tensor * 0.25
    live, found = state(here), state(here)
    for name, tensor in expected.items():
        if "running" in name or "weight" in name:
            torch.testing.assert_close(found[name.replace(".safetensors", ".ema.safetensors")], tensor)
    with here.ema.in_place():
        inside = state(here)
        logits = [evaluate(here.engine, here.engine.module, here.reader, "val")["loss"]]
    for name in expected:
        torch.testing.assert_close(inside[name], found[name.replace(".safetensors", ".ema.safetensors")])
        assert torch.equal(state(here)[name], live[name])
    assert evaluate(here.engine, here.engine.module, here.reader, "val")["loss"] != logits[0]


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_does_not_wait_for_the_device(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    here, waits = run(tmp_path, f"engine.zero_stage={stage}"), list[int]()
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(1))
    steps(here, 5)
    assert waits == []


@pytest.mark.parametrize("size", [288, 100, 7])
def test_evaluation_counts_every_sample_once(size: int, tmp_path: Path) -> None:
    here = run(tmp_path)
    expected = evaluate(here.engine, here.engine.module, here.reader, "val")
    object.__setattr__(here.reader.config, "eval_batch", size)
    assert evaluate(here.engine, here.engine.module, here.reader, "val") == pytest.approx(expected)
    labels = torch.cat([y[valid] for _, y, valid in here.reader.evaluation("val")])
    assert len(labels) == 288


def test_evaluation_that_misses_a_sample_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = run(tmp_path)
    whole = here.reader.evaluation
    monkeypatch.setattr(here.reader, "evaluation", lambda split: ((x, y, v & (y != 3)) for x, y, v in whole(split)))
    with pytest.raises(AssertionError, match=r"evaluated 2\d\d of the 288 samples of val"):
        evaluate(here.engine, here.engine.module, here.reader, "val")


@pytest.mark.slow
def test_a_compiled_step_equals_the_eager_one(tmp_path: Path) -> None:
    eager = steps(run(tmp_path), 3)
    assert steps(run(tmp_path, "engine.compile=true"), 3) == pytest.approx(eager, rel=1e-4)


def test_what_decays() -> None:
    named = {
        "submodules.trunk.0.conv1.weight": True,
        "submodules.trunk.0.norm1.weight": False,
        "submodules.projection_weight": True,
        "submodules.projection_bias": False,
        "submodules.cls": False,
        "submodules.positions": False,
        "submodules.norm_weight": False,
        "submodules.qkv_weight": True,
        "submodules.qkv_bias": False,
        "head.linear.weight": True,
    }
    assert {name: decays(name, torch.zeros(2, 2)) for name in named} == named
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    both = parameter_groups(model, Config(weight_decay=0.1))
    assert [(g["weight_decay"], g["names"]) for g in both] == [
        (0.1, ["0.weight", "1.weight"]),
        (0.0, ["0.bias", "1.bias"]),
    ]
    assert len(parameter_groups(model, Config(decay="all"))) == 1


def test_what_decays_is_counted_over_all_submodules(tmp_path: Path) -> None:
    here = run(tmp_path)
    lines = list(opening.lines(here.recipe, here.plan, here.grid, here.engine, here.reader, tmp_path, here.start))
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\(([\d,]+) numbers\)", lines[1])]
    assert sum(numbers) == here.plan.parameters
    assert "1 replica x 1 submodule rank on cpu" in lines[0]
    assert not re.search(r"\b1 \w+s\b", "\n".join(lines)), lines

    class Half:
        """A grid whose other rank has as many submodules."""

        submodule_ranks, device = 2, torch.device("cpu")
        sum_over_submodule_ranks = staticmethod(lambda x: 2 * x)

    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1000))
    for parameter in model[1].parameters():
        parameter.model_parallel = True
    half: Any = Half()
    told = describe(parameter_groups(model, Config(weight_decay=0.1)), half)
    assert told == "weight decay 0.1 on 2 tensors (6,006 numbers), weight decay 0 on 2 tensors (2,003 numbers)"


def test_the_schedule_warms_up_and_follows_a_cosine() -> None:
    by_step = Schedule(Config(lr=1.0, min_lr=0.1, warmup_epochs=1.0), epochs=3, steps_per_epoch=4)
    assert [by_step.lr(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert by_step.lr(8) == pytest.approx(0.55)
    assert by_step.lr(12) == pytest.approx(0.1)
    by_epoch = Schedule(Config(lr=1.0, schedule="epoch"), epochs=4, steps_per_epoch=5)
    assert by_epoch.lr(10) == by_epoch.lr(14) == pytest.approx(0.5)


def test_kernels_that_cannot_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(RefusedError, match="engine: kernels = triton, but the tensors are on cpu; Triton needs CUDA"):
        run(tmp_path, "engine.kernels=triton")
