"""Where a model is computed changes nothing: submodule ranks, replicas, ZeRO stages and accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ..ranks import assert_same_run, work

pytestmark = pytest.mark.heavy

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


DEPTHWISE = ["model.depthwise=true"]
CASES |= {f"ZeRO-{n}, sgd, depthwise": [f"engine.zero_stage={n}", *OPTIMIZERS["sgd"], *DEPTHWISE] for n in STAGES}
# At a higher rate AdamW makes steps of rounding that the gradient norm shows in its sixth digit.
CASES |= {
    f"ZeRO-{n}, adamw, depthwise": [f"engine.zero_stage={n}", *OPTIMIZERS["adamw"], "optimizer.lr=0.0012", *DEPTHWISE]
    for n in STAGES
}
CASES |= {
    f"ZeRO-{stage}, sgd, {form}": [f"engine.zero_stage={stage}", *OPTIMIZERS["sgd"], f'grid.exchange="{form}"']
    for stage, form in enumerate(("bf16", "int8", "bf16", "int8"))
}
GATHERED = "images gathered"
CASES[GATHERED] = ["data.share=gather", "optimizer.name=sgd"]


def run(folder: Any, world: int, submodule_ranks: int) -> list[dict[str, Any]]:
    place = f"grid.submodule_ranks={submodule_ranks}"
    cases = {name: [*case, place] for name, case in CASES.items()}
    return work("steps", world, folder, {"base": "hsvit", "cases": cases})


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one"), 1, 1)[0]


@pytest.fixture(scope="module", params=[(2, 2), (4, 2)], ids=["two submodule ranks", "2 x 2"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("ranks"), *request.param)


@pytest.mark.parametrize("case", CASES)
def test_a_grid_equals_one_process(case: str, one_process: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    tolerance = TOLERANCE["adamw" if "adamw" in case else "sgd"]
    assert_same_run([rank[case] for rank in ranks], one_process[case], tolerance)


def test_ranks_own_their_submodules(one_process: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """DeepSpeed's initialize would broadcast rank 0's weights over all ranks."""
    case = "ZeRO-1, sgd, global statistics"
    first, second = (rank[case]["initial"] for rank in ranks[:2])
    for name, whole in one_process[case]["initial"].items():
        if name.startswith("submodules."):
            assert torch.equal(torch.cat((first[name], second[name])), whole)
        else:
            assert torch.equal(first[name], whole)
            assert torch.equal(second[name], whole)
    assert not torch.equal(first["submodules.qkv_weight"], second["submodules.qkv_weight"])


@pytest.mark.parametrize("case", [case for case in CASES if "sgd, " in case])
def test_a_step_has_one_exchange_a_forward_and_one_gradient_reduction(case: str, ranks: list[dict[str, Any]]) -> None:
    step = ranks[0][case]
    replicas = len(ranks) // 2
    micro_batches = 4 // replicas if "accumulation" in case else 1
    exchanges = [n for name, group, n in step["calls"] if group == "replica" and n > 1]
    assert exchanges == [step["exchanged"]] * micro_batches
    reductions = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
    gradients = [n for name, group, n in step["calls"] if group == "data" and name in reductions and n > 100]
    padding = 3  # stage 3 cuts every parameter into equal parts
    assert len(gradients) == 1
    assert step["trained"] <= gradients[0] <= step["trained"] + padding


@pytest.mark.slow
@pytest.mark.marathon
@pytest.mark.parametrize(
    ("submodule_ranks", "exchange"),
    [(2, "fp32"), (1, "fp32"), (2, "int8")],
    ids=["two submodule ranks", "two replicas", "two submodule ranks that round"],
)
def test_compiled_ranks_equal_eager_ones(submodule_ranks: int, exchange: str, tmp_path: Path) -> None:
    place = [f"grid.submodule_ranks={submodule_ranks}", "optimizer.name=sgd", f'grid.exchange="{exchange}"']
    cases = {"eager": place, "compiled": [*place, "engine.compile=true"]}
    found = work("steps", 2, tmp_path, {"base": "hsvit", "cases": cases})
    for rank in found:
        assert rank["compiled"]["norms"] == pytest.approx(rank["eager"]["norms"], rel=1e-4)
