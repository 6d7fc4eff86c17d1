"""A run that starts from weights is the same on every placement, and does not read them again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.errors import RefusedError

from ..ranks import assert_same_run, work
from ..workers.common import state, steps, trainer

pytestmark = pytest.mark.heavy

SGD = "optimizer.name=sgd"
OTHER = {  # what the run that is started from has of its own
    "hsvit": ["model.widths.smallest=0.5", "model.widths.granularity=0.5", 'task={kind="scala"}'],
    "scala": ["model.widths.smallest=0.5"],
    "hybrid": [],
}
CASES = {
    base: {f"ZeRO-{stage}": [SGD, f"engine.zero_stage={stage}", "ema.decay=0.9"] for stage in stages}
    for base, stages in (("hsvit", (0, 1, 2, 3)), ("scala", (0, 1, 2, 3)), ("hybrid", (1, 3)))
}
ALL = [(base, case) for base, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """{recipe: (folder of a run, its weights by name)}"""
    found = {}
    for base, other in OTHER.items():
        folder = tmp_path_factory.mktemp(base)
        run = trainer(folder, ["grid.submodule_ranks=1", "run.seed=7", *other], base=base)
        steps(run, 2)
        run.checkpoints.save(Position(0, 2, 2))
        assert run.checkpoints.wait() is None
        found[base] = folder, {name: tensor.clone() for name, tensor in run.engine.module.named_parameters()}
    return found


def run(folder: Path, trained: Any, world: int, submodule_ranks: int) -> list[dict[str, Any]]:
    arguments = {
        base: {
            name: [
                *case,
                f"model.weights={trained[base][0]}",
                f"grid.submodule_ranks={1 if base == 'scala' else submodule_ranks}",
            ]
            for name, case in cases.items()
        }
        for base, cases in CASES.items()
    }
    return work("bases", world, folder, arguments)


@pytest.fixture(scope="module")
def one_process(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one"), trained, 1, 1)[0]


@pytest.fixture(scope="module", params=[1, 2], ids=["two replicas", "two submodule ranks"])
def ranks(request: pytest.FixtureRequest, trained: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run(tmp_path_factory.mktemp("ranks"), trained, 2, request.param)


@pytest.mark.parametrize("base", CASES)
def test_a_run_starts_from_the_latest_checkpoint_of_another(base: str, one_process: Any, trained: Any) -> None:
    initial = one_process[base]["ZeRO-1"]["initial"]
    assert initial.keys() == trained[base][1].keys()
    for name, tensor in trained[base][1].items():
        assert torch.equal(initial[name], tensor), name


@pytest.mark.parametrize(("base", "case"), ALL)
def test_ranks_that_start_from_weights_equal_one_process(base: str, case: str, one_process: Any, ranks: Any) -> None:
    assert_same_run([rank[base][case] for rank in ranks], one_process[base][case], 1e-6)


@pytest.mark.parametrize("base", ["hsvit", "scala"])
def test_a_resumed_run_does_not_read_them_again(base: str, trained: Any, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(trained[base][0], weights)
    keys = ["grid.submodule_ranks=1", f"model.weights={weights}", "ema.decay=0.9"]
    whole = trainer(tmp_path / "whole", keys, resume=True, base=base)  # of a run that has no checkpoint yet
    assert len(whole.weights_said) == 1
    steps(whole, 4)
    first = trainer(tmp_path / "parts", keys, base=base)
    steps(first, 2)
    first.checkpoints.save(Position(0, 2, 2))
    assert first.checkpoints.wait() is None
    shutil.rmtree(weights)
    second = trainer(tmp_path / "parts", keys, resume=True, base=base)
    assert second.weights_said == []
    changed = [*keys, "model.weights=elsewhere.pth", "model.resize=true"]  # what a run starts from is past
    assert trainer(tmp_path / "parts", changed, resume=True, base=base).start.total == 2
    steps(second, 4)
    found, expected = state(second), state(whole)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    with pytest.raises(RefusedError, match=r"model.weights = .*weights: no such file"):
        trainer(tmp_path / "again", keys, base=base)
