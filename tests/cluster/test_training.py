"""Two hosts of two ranks under DeepSpeed's launcher compute what one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hsvit_ds.engine.checkpoint import Position

from ..ranks import assert_same_run, work
from ..workers.common import steps, trainer
from .hosts import Cluster, deepspeed, finish

pytestmark = pytest.mark.cluster
OPTIMIZERS = {"sgd": 1e-6, "adamw": 1e-5}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run to learn from."""
    folder = tmp_path_factory.mktemp("teacher")
    run = trainer(folder, ["model.widths.smallest=1", "run.seed=7"], base="scala")
    steps(run, 2)
    run.checkpoints.save(Position(0, 2, 2))
    assert run.checkpoints.wait() is None
    return str(folder)


def test_two_hosts_equal_one_process(cluster: Cluster, teacher: str, tmp_path: Path) -> None:
    """HSViT on 2 submodule ranks x 2 replicas, a hybrid under ZeRO-2 on four replicas, Scala with a teacher."""
    bases = {
        "hsvit": ["grid.submodule_ranks=2"],
        "hybrid": ["engine.zero_stage=2", "model.backbone.trained_stages=-1", "optimizer.lr=0.001"],
        "scala": [f"task.teacher.name={teacher}", "model.distilled=true"],
    }
    cases = {base: {name: [f"optimizer.name={name}", *keys] for name in OPTIMIZERS} for base, keys in bases.items()}
    alone = {
        base: {name: [*keys, "grid.submodule_ranks=1"] for name, keys in found.items()} for base, found in cases.items()
    }
    (one,) = work("bases", 1, tmp_path / "one", alone)
    four = tmp_path / "four"
    four.mkdir()
    (four / "arguments.json").write_text(json.dumps(cases))
    options = ["--no_local_rank", "--module", "tests.workers"]
    finish(deepspeed(cluster, tmp_path, {"node-1": 2, "node-2": 2}, [*options, "bases", str(four)]))
    ranks = [torch.load(four / f"rank{rank}.pt", weights_only=False) for rank in range(4)]
    for base, found in cases.items():
        for name in found:
            assert_same_run([rank[base][name] for rank in ranks], one[base][name], OPTIMIZERS[name])
