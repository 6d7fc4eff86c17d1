"""Where a model is computed changes nothing: submodule ranks, replicas, ZeRO stages and accumulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .ranks import work

STAGES = (0, 1, 2, 3)
BATCHES = {
    "global statistics": ["run.bn_batch=0"],
    "accumulation": ["run.micro_batch=4", "run.bn_batch=4"],
}
OPTIMIZERS = {"sgd": ["optimizer.name=sgd"], "adamw": ["optimizer.name=adamw"]}
CASES = {
    f"ZeRO-{stage}, {optimizer}, {batch}": [f"engine.zero_stage={stage}", *a, *b]
    for stage in STAGES
    for optimizer, a in OPTIMIZERS.items()
    for batch, b in BATCHES.items()
}
TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5}


def run(folder: Any, world: int, submodule_ranks: int) -> list[dict[str, Any]]:
    place = f"grid.submodule_ranks={submodule_ranks}"
    return work("steps", world, folder, {name: [*case, place] for name, case in CASES.items()})


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one"), 1, 1)[0]


@pytest.fixture(scope="module", params=[(2, 2), (2, 1), (4, 2)], ids=["two submodule ranks", "two replicas", "2 x 2"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("ranks"), *request.param)


@pytest.mark.parametrize("case", CASES)
def test_a_grid_equals_one_process(case: str, one_process: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    expected, found = one_process[case], [rank[case] for rank in ranks]
    for rank in found:
        torch.testing.assert_close(rank["norms"], expected["norms"], rtol=1e-6, atol=0)
    written = {key: tensor for rank in found for key, tensor in rank["state"].items()}
    assert written.keys() == expected["state"].keys()
    tolerance = TOLERANCE["sgd" if "sgd" in case else "adamw"]
    for key, tensor in expected["state"].items():
        torch.testing.assert_close(
            written[key], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )
