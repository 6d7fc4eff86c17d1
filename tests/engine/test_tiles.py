"""Submodules that see tiles train on several ranks as in one process, at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest

from ..ranks import assert_same_run, work

pytestmark = pytest.mark.heavy

TILED = ["model.tiles=2", "model.submodules=4", "model.pool_strides=[2,2]", "optimizer.name=sgd"]
CASES = {f"ZeRO-{stage}": [*TILED, f"engine.zero_stage={stage}"] for stage in range(4)}


def run(folder: Any, world: int, submodule_ranks: int) -> list[dict[str, Any]]:
    cases = {name: [*keys, f"grid.submodule_ranks={submodule_ranks}"] for name, keys in CASES.items()}
    return work("steps", world, folder, {"base": "hsvit", "cases": cases})


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one"), 1, 1)[0]


@pytest.fixture(scope="module", params=[(2, 2), (2, 1)], ids=["two submodule ranks", "two replicas"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("ranks"), *request.param)


@pytest.mark.parametrize("case", CASES)
def test_a_grid_equals_one_process(case: str, one_process: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    assert_same_run([rank[case] for rank in ranks], one_process[case], 1e-6)
