"""One channel on several ranks: gathered images, and maps of a backbone that are kept, equal one process without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..ranks import assert_same_run, work
from ..tars import data_set
from ..workers.common import steps, trainer

pytestmark = pytest.mark.heavy


def grey(folder: Path, *keys: str, **more: str) -> list[str]:
    """A recipe's keys for grey shards."""
    table = {"name": '"fashion_mnist"', "root": f'"{folder}"', "test": '"val"', "workers": "0"} | more
    return [f"data={{{', '.join(f'{key} = {value}' for key, value in table.items())}}}", *keys]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_set(tmp_path_factory.mktemp("grey"), train=64, val=8, side=28, channels=1)


def test_gathering_ranks_equal_one_process(folder: Path, tmp_path: Path) -> None:
    augmented = ["augment.erase=0.5", "engine.precision=fp32"]
    alone = {"case": grey(folder, "grid.submodule_ranks=1", *augmented)}
    apart = {"case": grey(folder, "grid.submodule_ranks=2", *augmented, share='"gather"')}
    (expected,) = work("steps", 1, tmp_path / "one", {"base": "hsvit", "cases": alone})
    found = work("steps", 2, tmp_path / "two", {"base": "hsvit", "cases": apart})
    kernels = [w for key, w in expected["case"]["initial"].items() if w.ndim == 4 and key.endswith("weight")]
    assert 1 in {kernel.shape[1] for kernel in kernels}
    assert_same_run([rank["case"] for rank in found], expected["case"], 1e-5)


def test_kept_maps_are_those_of_the_grey_images(folder: Path, tmp_path: Path) -> None:
    off = ["augment.mixup=0", "augment.cutmix=0", "augment.shift=0", "optimizer.layer_decay=1"]
    frozen = ["model.backbone.trained_stages=0", "model.backbone.drop_path=0", "grid.submodule_ranks=1", *off]
    same = grey(folder, *frozen, image_size="32")
    norms = []
    for name in ("without", "filled", "read"):
        cache = [] if name == "without" else [f"model.backbone.cache={tmp_path / 'maps'}"]
        run = trainer(tmp_path / name, [*same, *cache], base="hybrid")
        assert next(run.engine.module.backbone.parameters()).shape[1] == 1
        norms.append(steps(run, 3))
        run.reader.close()
    assert norms[0] == norms[1] == norms[2]
    assert torch.tensor(norms).isfinite().all()
