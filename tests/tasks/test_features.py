"""A frozen backbone's maps are computed once for each image, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hsvit_ds.errors import RefusedError
from hsvit_ds.run import recipe as recipes
from tests.ranks import ROOT, work
from tests.workers.common import trainer

pytestmark = pytest.mark.heavy

RECIPE = ROOT / "recipes/digits/hybrid.toml"
# Dropout in the groups stays on.
SAME = [
    "model.backbone.trained_stages=0",
    "model.backbone.drop_path=0.0",
    "augment.mixup=0.0",
    "augment.cutmix=0.0",
    "augment.shift=0",
    "optimizer.layer_decay=1.0",
]


@pytest.mark.parametrize(("world", "submodule_ranks"), [(1, 1), (2, 2)], ids=["one process", "two submodule ranks"])
def test_a_cached_run_equals_another(world: int, submodule_ranks: int, tmp_path: Path) -> None:
    same = [*SAME, f"grid.submodule_ranks={submodule_ranks}"]
    cached = [*same, f"model.backbone.cache={tmp_path / 'maps'}"]
    cases = {"without": same, "filled": cached, "read": cached}
    (rank, *_) = work("steps", world, tmp_path, {"base": "hybrid", "cases": cases})
    for case in ("filled", "read"):
        assert rank[case]["norms"] == rank["without"]["norms"]
        for key, tensor in rank["without"]["state"].items():
            assert torch.equal(rank[case]["state"][key], tensor), key


def test_an_image_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*SAME, "grid.submodule_ranks=1", f"model.backbone.cache={tmp_path / 'maps'}", "run.global_batch=50"]
    run = trainer(tmp_path / "run", overrides, base="hybrid")
    backbone, computed = run.engine.module.backbone, []
    forward = backbone.forward
    monkeypatch.setattr(backbone, "forward", lambda x, *rest: computed.append(len(x)) or forward(x, *rest))
    for epoch in range(2):
        for step, batches in enumerate(run.reader.train(epoch, 0), epoch * run.plan.steps_per_epoch):
            run._step(batches, step)
    assert sum(computed) == 1150


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone.trained_stages=1", "the maps of a backbone that is trained change; set trained_stages to 0"),
        ("engine.zero_stage=3", "at ZeRO-3 all ranks compute the backbone together; set engine.zero_stage below 3"),
        ("augment.shift=1", "augment.shift shows an image in a new way every time; switch it off"),
        ("augment.mixup=0.2", "augment.mixup shows an image in a new way every time; switch it off"),
    ],
)
def test_maps_that_change_are_not_kept(override: str, message: str) -> None:
    frozen = ["model.backbone.trained_stages=0", "model.backbone.cache=maps"]
    with pytest.raises(RefusedError, match=rf"^model.backbone.cache = maps: {message}$"):
        recipes.resolve(recipes.read(RECIPE, [*frozen, *override.split()]), 2)
