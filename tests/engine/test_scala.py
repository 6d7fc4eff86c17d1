"""Four widths in one step: ranks, ZeRO stages, accumulation and in-place gradients change nothing."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hsvit_ds.data import augment
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.engine.outcomes import Settled
from hsvit_ds.models.layers import Linear
from hsvit_ds.run.interval import Interval
from hsvit_ds.run.trainer import Trainer

from ..ranks import assert_same_run, work
from ..workers.common import state, steps, trainer

pytestmark = pytest.mark.heavy

OPTIMIZERS = {"sgd": 1e-6, "adamw": 1e-5}
CASES = {
    f"ZeRO-{stage}, {optimizer}, {accumulation} micro batches": [
        f"engine.zero_stage={stage}",
        f"optimizer.name={optimizer}",
        f"run.micro_batch={8 // accumulation}",
    ]
    for stage in (0, 1, 2, 3)
    for optimizer, accumulation in (("sgd", 1), ("sgd", 2), ("adamw", 2))
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a run to learn from, by its own token."""
    folder = tmp_path_factory.mktemp("teacher")
    run = trainer(folder, ["model.widths.smallest=1", "run.seed=7"], base="scala")
    steps(run, 2)
    run.checkpoints.save(Position(0, 2, 2))
    assert run.checkpoints.wait() is None
    return [f"task.teacher.name={folder}", "model.distilled=true"]


NEW = {
    "interior": ["task.sampling=interior"],
    "pinned": ["task.pinned=[0.75]"],
    "the small widths on the smallest's side": ["model.widths.isolated=large"],
    "the large widths on the smallest's side": ["model.widths.isolated=small"],
    "through the class token": ["task.transfer_token=class"],
    "whole heads": ["model.widths.slice=heads", "model.heads=8"],
    "MLPs of named widths": ["model.sliced=mlp", "model.widths={family=['1/8', '1/4', 1]}", "task.sampling=all"],
    # Two steps an epoch: the third one is of the other family.
    "another family": ["model.widths.then=[{epoch=1, granularity=0.375}]", "run.global_batch=400"],
}
"""What a step trains otherwise; by SGD, as AdamW turns rounding where a gradient is nearly zero into steps."""
STAGES = {
    name: (0, 1, 2, 3) for name in ("interior", "pinned", "whole heads", "MLPs of named widths", "another family")
} | {
    "the small widths on the smallest's side": (1,),
    "the large widths on the smallest's side": (2,),
    "through the class token": (3,),
}
"""Of ZeRO: all where other widths are drawn."""


def plain(run: Trainer, stop: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Gradient norms and weights of the same steps in plain PyTorch: autograd slices, and the losses as published."""
    model, task = run.engine.module, run.task
    for module in model.modules():
        if isinstance(module, Linear):
            module.state = None
    optimizer = torch.optim.SGD(
        [{k: v for k, v in group.items() if k != "names"} for group in run.engine.parameter_groups], momentum=0.9
    )
    norms, size, of_class = [], run.plan.steps_per_epoch, run.recipe.task.transfer_token == "class"  # type: ignore[union-attr]
    epochs = chain.from_iterable(run.reader.train(epoch, 0) for epoch in range(-(-stop // size)))
    for step, batches in enumerate(islice(epochs, stop)):
        model.train()
        optimizer.zero_grad()
        for batch in batches:
            images, soft = augment.prepare(batch, run.recipe.augment, run.reader.facts)
            with torch.no_grad():
                taught = task.teach.module(images).argmax(-1)  # type: ignore[attr-defined]
            logits = [
                model(images, draw=batch.draw(index), width=width) for index, width in enumerate(task.widths(step))
            ]
            assert len(logits) == run.task.passes(step)
            (z, u), *smaller = logits
            loss = 0.5 * F.cross_entropy(z, soft) + 0.5 * F.cross_entropy(u, taught)
            larger = z if of_class else u
            for w, v in smaller:
                mine = w if of_class else v
                p, q = larger.detach().softmax(-1), mine.softmax(-1)
                loss = loss + F.cross_entropy(w, soft) + (p * (p / q).log()).sum(-1).mean()
                larger = mine
            (loss / len(batches)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = run.schedule.lr(step)
        optimizer.step()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


FUSED = ["model.qkv=fused", "model.softmax_scale=full", "optimizer.lr=1e-4"]


@pytest.fixture(scope="module")
def ranks(teacher: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process found, and what each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = {name: ["engine.zero_stage=0", *teacher, f"optimizer.name={name}"] for name in OPTIMIZERS}
    new = {name: ["engine.zero_stage=0", *teacher, "optimizer.name=sgd", *case] for name, case in NEW.items()}
    (one,) = work("steps", 1, folder / "one", {"base": "scala", "cases": {**alone, **new, "fused": FUSED}})
    cases = {name: [*case, *teacher] for name, case in CASES.items()}
    for name, case in new.items():
        cases |= {f"{name}, ZeRO-{stage}": [*case, f"engine.zero_stage={stage}"] for stage in STAGES[name]}
    return one, work("steps", 2, folder / "two", {"base": "scala", "cases": {**cases, "fused": FUSED}})


@pytest.mark.parametrize("case", ["sgd", *NEW])
def test_one_process_equals_plain_pytorch(case: str, ranks: Any, teacher: list[str], tmp_path: Path) -> None:
    keys = ["engine.zero_stage=0", "optimizer.name=sgd", *teacher, *NEW.get(case, [])]
    norms, weights = plain(run := trainer(tmp_path, keys, base="scala"), 3)
    if case == "another family":
        assert [run.task.passes(step) for step in range(3)] == [4, 4, 3]
    one = ranks[0][case]
    assert min(norms) > 0.5  # so that clipping is on
    torch.testing.assert_close(one["norms"], norms, rtol=1e-6, atol=0)
    for name, weight in weights.items():
        torch.testing.assert_close(one["state"][f"model.safetensors/{name}"], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_two_ranks_equals_one_process(case: str, ranks: Any) -> None:
    optimizer = "adamw" if "adamw" in case else "sgd"
    one, two = ranks
    allowed = OPTIMIZERS[optimizer]
    for rank in two:
        found, whole = rank[case], one[optimizer]
        torch.testing.assert_close(found["norms"], whole["norms"], rtol=1e-6, atol=0)
        for key, tensor in found["state"].items():  # the first rank writes it
            torch.testing.assert_close(
                tensor, whole["state"][key], rtol=allowed, atol=allowed, msg=lambda m, k=key: k + m
            )
        assert gradient_reductions(found) == 1


@pytest.mark.parametrize(("case", "stage"), [(case, stage) for case in NEW for stage in STAGES[case]])
def test_new_widths_of_a_step_on_two_ranks_equal_one_process(case: str, stage: int, ranks: Any) -> None:
    one, two = ranks
    found = [rank[f"{case}, ZeRO-{stage}"] for rank in two]
    assert_same_run(found, one[case], 1e-6)
    assert gradient_reductions(found[0]) == 1


def test_fused_gradients_under_adamw_equal_one_process(ranks: Any) -> None:
    """There key rows serve as queries and values at other widths, so AdamW may amplify rounding in the weights."""
    one, two = ranks
    for rank in two:
        torch.testing.assert_close(rank["fused"]["norms"], one["fused"]["norms"], rtol=1e-6, atol=0)


SLIM_HSVIT = [
    "model.widths.smallest=0.5",
    "model.widths.granularity=0.25",
    "model.groups=8",
    "model.kernels=[8,32]",
    "task.kind=scala",
    "optimizer.name=sgd",
]


def test_a_slimmable_hsvit_on_a_grid_equals_one_process(tmp_path: Path) -> None:
    """Widths inside each submodule, submodules on ranks, replicas of both; with dropped submodules and BatchNorm."""
    cases = {
        f"ZeRO-{stage}, {batch}": [
            *SLIM_HSVIT,
            f"engine.zero_stage={stage}",
            f"run.micro_batch={batch}",
            "run.bn_batch=4",
        ]
        for stage, batch in ((0, 8), (1, 4), (2, 8), (3, 4))
    }

    def on(world: int, submodule_ranks: int) -> list[dict[str, Any]]:
        place = f"grid.submodule_ranks={submodule_ranks}"
        arguments = {name: [*case, place] for name, case in cases.items()}
        return work("steps", world, tmp_path / str(world), {"base": "hsvit", "cases": arguments})

    (expected,), found = on(1, 1), on(4, 2)
    for name in cases:
        assert_same_run([rank[name] for rank in found], expected[name], 1e-6)
        assert gradient_reductions(found[0][name]) == 1, name


RESUMED = {
    "in the full-only phase": (2, "task.full_epochs=1", [1, 1, 1, 4, 4, 4, 4, 4]),
    "after it": (5, "task.full_epochs=1", [1, 1, 1, 4, 4, 4, 4, 4]),
    "before another family": (2, "model.widths.then=[{epoch=1, granularity=0.375}]", [4, 4, 4, 3, 3, 3, 3, 3]),
    "at its first step": (3, "model.widths.then=[{epoch=1, granularity=0.375}]", [4, 4, 4, 3, 3, 3, 3, 3]),
    "after its first steps": (5, "model.widths.then=[{epoch=1, granularity=0.375}]", [4, 4, 4, 3, 3, 3, 3, 3]),
}


@pytest.mark.parametrize(("stop", "key", "passes"), RESUMED.values(), ids=RESUMED)
def test_resume_equals_the_uninterrupted_run(stop: int, key: str, passes: list[int], tmp_path: Path) -> None:
    """An epoch of the small run has 3 steps here."""
    overrides = [key, "run.global_batch=380", "augment.mix_block=4", "ema.decay=0.9", "model.depth=1"]
    whole = trainer(tmp_path / "whole", overrides, base="scala")
    assert whole.plan.steps_per_epoch == 3
    widths = epochs(whole, 0, 8)
    assert [len(w) for w in widths] == passes
    parts = trainer(tmp_path / "parts", overrides, base="scala")
    first = epochs(parts, 0, stop)
    parts.checkpoints.save(Position(stop // 3, stop % 3, stop))
    assert parts.checkpoints.wait() is None
    parts = trainer(tmp_path / "parts", overrides, resume=True, base="scala")
    assert parts.start.total == stop
    assert first + epochs(parts, stop, 8) == widths
    expected = state(whole)
    for name, tensor in state(parts).items():
        assert torch.equal(tensor, expected[name]), name


def epochs(run: Trainer, start: int, stop: int) -> list[list[str]]:
    """Train steps `start` to `stop` of the run; the widths of each."""
    widths, size = [], run.plan.steps_per_epoch
    for epoch in range(start // size, -(-stop // size)):
        first = start - epoch * size if epoch == start // size else 0
        for batches in islice(run.reader.train(epoch, first), min(size, stop - epoch * size) - first):
            step = batches[0].step
            result = run._step(batches, step)
            assert result.applied
            assert run.ema is not None
            run.ema.update(result.applied)
            widths.append([str(width) for width in run.task.widths(step)])
    return widths


def gradient_reductions(found: dict[str, Any]) -> int:
    """Collectives of a step that carry all trained numbers; fails where others carry more than a hundred."""
    kinds = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
    numbers = [n for kind, group, n in found["calls"] if kind in kinds and group == "data" and n > 100]
    assert all(found["trained"] <= n <= found["trained"] + 64 for n in numbers), numbers  # stage 3 pads
    return len(numbers)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_pass_has_a_loss_of_its_own_and_the_first_is_that_of_the_run(accumulation: int, tmp_path: Path) -> None:
    """Averaged over micro batches and the steps of an interval; a step of the full width alone has no others."""
    keys = [f"run.micro_batch={16 // accumulation}", "task.full_epochs=0", "grid.submodule_ranks=1"]
    run = trainer(tmp_path, [*keys, "run.log_every=3"], base="scala")
    expected: list[list[torch.Tensor]] = []
    read: Any = run.task.losses

    def noted(engine: Any, batch: Any) -> Any:
        found = []
        for loss in read(engine, batch):
            found.append(loss.detach())
            yield loss
        expected.append(found)

    run.task.losses = noted  # type: ignore[method-assign]
    logged: dict[str, float] = {}
    run.tracker.log = lambda metrics, step: logged.update(metrics)  # type: ignore[method-assign]
    run.interval.waits()
    for step, batches in enumerate(islice(run.reader.train(0, 0), 3)):
        run.interval.works()
        run._step(batches, step)
        run.interval.ended()
    run._settle()
    run.interval.rests()
    run._log(3)
    means = torch.tensor(expected).mean(0).tolist()
    assert len(expected) == 3 * accumulation
    assert len(means) == 4
    assert [logged[f"train/loss_pass{place}"] for place in (1, 2, 3, 4)] == pytest.approx(means)
    assert logged["train/loss"] == logged["train/loss_pass1"]
    assert logged["train/loss_sum"] == pytest.approx(sum(means))


def test_an_interval_averages_the_passes_that_its_steps_have() -> None:
    interval = Interval(torch.device("cpu"))
    interval.settled = [Settled(0, [1.0], 0.0, True), Settled(1, [2.0, 5.0], 0.0, True)]
    assert interval.losses() == [1.5, 5.0]
