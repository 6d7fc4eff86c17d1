"""Slimmable MobileNet and UniFormer under the engine: ranks, ZeRO stages, accumulation and a resume change nothing."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hsvit_ds.data import augment
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.models.layers import Linear
from hsvit_ds.run.trainer import Trainer

from ..ranks import assert_same_run, work
from ..workers.common import state, steps, trainer

pytestmark = pytest.mark.heavy

US_NET = ["task.sampling=sandwich", "task.transfer=full", "task.label_weight=0", "model.widths.isolated=false"]
LIGHT = ["model.pruned=true", "model.downsampling=patches"]
MODELS: dict[str, tuple[str, list[str]]] = {
    "mobilenet": ("mobilenet", []),
    "mobilenet, US-Net": ("mobilenet", US_NET),
    "uniformer": ("uniformer", []),
    "light uniformer": ("uniformer", LIGHT),
    "light uniformer, one width": ("uniformer", [*LIGHT, "model.widths.smallest=1", "task={kind='supervised'}"]),
}
OPTIMIZERS = {"sgd": 1e-6, "adamw": 1e-5}
CASES = {
    f"ZeRO-{stage}, {optimizer}, {accumulation} micro batches": [
        f"engine.zero_stage={stage}",
        f"optimizer.name={optimizer}",
        f"run.micro_batch={8 // accumulation}",
        f"run.bn_batch={16 if accumulation == 1 else 4}",
    ]
    for stage in (0, 1, 2, 3)
    for optimizer, accumulation in (("sgd", 1), ("adamw", 2))
}
"""BatchNorm over the global batch, and over a fixed part of it."""


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_equal_one_process(name: str, tmp_path: Path) -> None:
    base, keys = MODELS[name]
    cases = {case: [*keys, *more] for case, more in CASES.items()}
    is_light = "light" in name
    # The ranking of tokens is not continuous: in float64 the order of sums does not decide which of two is kept, and
    # where DeepSpeed has fp32 masters of these weights, one process has them too.
    alone = {
        f"{optimizer}, {stage}": [
            *keys,
            f"engine.zero_stage={stage}",
            f"optimizer.name={optimizer}",
            f"run.bn_batch={n}",
        ]
        for optimizer, n in (("sgd", 16), ("adamw", 4))
        for stage in (range(4) if is_light else (0,))
    }
    how = {"float64": is_light, "base": base}
    (one,) = work("steps", 1, tmp_path / "one", {"cases": alone, **how})
    two = work("steps", 2, tmp_path / "two", {"cases": cases, **how})
    for case in cases:
        optimizer, stage = "adamw" if "adamw" in case else "sgd", int(case[5]) if is_light else 0
        expected = one[f"{optimizer}, {stage}"]
        assert max(expected["norms"]) > 0.5  # so that clipping is on
        assert_same_run([rank[case] for rank in two], expected, OPTIMIZERS[optimizer])
        large = [n for kind, group, n in two[0][case]["calls"] if "reduce" in kind and group == "data" and n > 2000]
        assert len(large) == 1, (case, large)  # the gradients'; BatchNorm's are smaller
        assert two[0][case]["trained"] <= large[0] <= two[0][case]["trained"] + 64


def plain(run: Trainer, stop: int) -> list[float]:
    """Gradient norms of the same steps in plain PyTorch."""
    model, task = run.engine.module, run.task
    for module in model.modules():
        if isinstance(module, Linear):
            module.state = None
    optimizer = torch.optim.SGD(
        [{k: v for k, v in group.items() if k != "names"} for group in run.engine.parameter_groups], momentum=0.9
    )
    norms = []
    for step, batches in enumerate(islice(run.reader.train(0, 0), stop)):
        model.train()
        optimizer.zero_grad()
        (batch,) = batches
        images, soft = augment.prepare(batch, run.recipe.augment, run.reader.facts)
        loss, larger = torch.zeros(()), None
        for index, width in enumerate(task.widths(step)):
            answers = model(images, draw=batch.draw(index), width=width)
            heads = list(answers) if isinstance(answers, tuple) else [answers]
            for head, logits in enumerate(heads):
                parts = F.cross_entropy(logits, soft)
                if larger is not None:
                    p, q = larger[head].softmax(-1), logits.softmax(-1)
                    parts = parts + (p * (p / q).log()).sum(-1).mean()
                loss = loss + parts / len(heads)
            larger = [logits.detach() for logits in heads]
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = run.schedule.lr(step)
        optimizer.step()
    return norms


@pytest.mark.parametrize("name", ["mobilenet", "uniformer", "light uniformer", "light uniformer, one width"])
def test_one_process_equals_plain_pytorch(name: str, tmp_path: Path) -> None:
    """Of two heads that learn the same, each has half of the loss, of labels and of what a larger width passes on."""
    base, keys = MODELS[name]
    keys = [*keys, "engine.zero_stage=0", "optimizer.name=sgd"]
    expected = plain(trainer(tmp_path / "plain", keys, base=base), 3)
    torch.testing.assert_close(steps(trainer(tmp_path / "ours", keys, base=base), 3), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["mobilenet", "light uniformer"])
def test_a_run_is_a_teacher(name: str, tmp_path: Path) -> None:
    """Its first head answers, in evaluation, for every width of a student of another kind."""
    base, keys = MODELS[name]
    taught = trainer(tmp_path / "teacher", [*keys, "run.seed=7"], base=base)
    steps(taught, 2)
    taught.checkpoints.save(Position(0, 2, 2))
    assert taught.checkpoints.wait() is None
    student = trainer(tmp_path / "student", [f"task.teacher.name={tmp_path / 'teacher'}"], base="uniformer")
    assert steps(student, 1)[0] > 0
    module = student.task.teach.module  # type: ignore[attr-defined]
    images = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(module(images), taught.engine.module.eval()(images))


@pytest.mark.parametrize("name", ["mobilenet", "light uniformer"])
def test_resume_equals_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    base, keys = MODELS[name]
    keys = [*keys, "ema.decay=0.9"]
    whole = trainer(tmp_path / "whole", keys, base=base)
    norms = steps(whole, 4)
    parts = trainer(tmp_path / "parts", keys, base=base)
    first = steps(parts, 2)
    parts.checkpoints.save(Position(0, 2, 2))
    assert parts.checkpoints.wait() is None
    parts = trainer(tmp_path / "parts", keys, resume=True, base=base)
    assert first + steps(parts, 4) == norms
    expected = state(whole)
    for key, tensor in state(parts).items():
        assert torch.equal(tensor, expected[key]), key
