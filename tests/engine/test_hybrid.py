"""A CNN backbone under ZeRO, and divided over the ranks of a replica, is the model of one process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from ..ranks import assert_same_run, work
from ..workers.common import steps, trainer

pytestmark = pytest.mark.heavy

TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5}
SGD, ADAMW = ["optimizer.name=sgd"], ["optimizer.name=adamw", "optimizer.lr=0.0012"]
ALL, LAST, FROZEN = (f"model.backbone.trained_stages={n}" for n in (-1, 2, 0))
# Four micro batches on each of two replicas.
ACCUMULATED = ["run.global_batch=32", "run.micro_batch=4", "run.bn_batch=2"]
CASES = {
    f"ZeRO-{stage}, {name}": [f"engine.zero_stage={stage}", *case]
    for stage in (1, 2, 3)
    for name, case in {
        "sgd, all": [*SGD, ALL],
        "sgd, all, accumulated": [*SGD, ALL, *ACCUMULATED],
        "adamw, all": [*ADAMW, ALL],
        "adamw, all, accumulated": ["optimizer.name=adamw", "optimizer.lr=0.0009", ALL, *ACCUMULATED],
        "sgd, last stages": [*SGD, LAST],
        "adamw, frozen, accumulated": [*ADAMW, FROZEN, *ACCUMULATED],
    }.items()
}
CASES["ZeRO-0, sgd, all"] = ["engine.zero_stage=0", *SGD, ALL]
CASES["ZeRO-0, sgd, frozen"] = ["engine.zero_stage=0", *SGD, FROZEN]
for stage in (1, 3):
    CASES[f"ZeRO-{stage}, sgd, recomputed"] = [
        f"engine.zero_stage={stage}",
        *SGD,
        ALL,
        "engine.checkpoint_activations=true",
    ]
GATHERED = "images gathered"
CASES[GATHERED] = [*SGD, ALL, "data.share=gather"]
# What accumulation does to a backbone that is trained in full is a matter of replicas.
ACCUMULATION = [case for case in CASES if "all, accumulated" in case]
# World size, submodule ranks.
PLACES = [
    pytest.param((2, 1), id="two replicas"),
    pytest.param((2, 2), id="two submodule ranks"),
    pytest.param((4, 2), id="2 x 2", marks=[pytest.mark.slow, pytest.mark.marathon]),
]


def run(folder: Any, names: Iterable[str], world: int, submodule_ranks: int) -> list[dict[str, Any]]:
    place = f"grid.submodule_ranks={submodule_ranks}"
    cases = {name: [*CASES[name], place] for name in names}
    return work("steps", world, folder, {"base": "hybrid", "cases": cases})


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one"), CASES, 1, 1)[0]


@pytest.fixture(scope="module", params=PLACES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("ranks"), [case for case in CASES if case not in ACCUMULATION], *request.param)


@pytest.fixture(scope="module")
def accumulating(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("accumulating"), ACCUMULATION, 2, 1)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ACCUMULATION])
def test_a_grid_equals_one_process(case: str, one_process: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    tolerance = TOLERANCE["adamw" if "adamw" in case else "sgd"]
    assert_same_run([rank[case] for rank in ranks], one_process[case], tolerance)


@pytest.mark.parametrize("case", ACCUMULATION)
def test_replicas_that_accumulate_equal_one_process(
    case: str, one_process: dict[str, Any], accumulating: list[dict[str, Any]]
) -> None:
    tolerance = TOLERANCE["adamw" if "adamw" in case else "sgd"]
    assert_same_run([rank[case] for rank in accumulating], one_process[case], tolerance)


@pytest.mark.parametrize("case", [case for case in CASES if "frozen" in case or "last" in case])
def test_what_is_frozen_stays_bit_equal(case: str, ranks: list[dict[str, Any]]) -> None:
    (writer,) = [rank[case] for rank in ranks if rank[case]["frozen"]]  # the rank that writes what all hold alike
    assert any("running_mean" in key for key in writer["frozen"])
    for key, tensor in writer["frozen"].items():
        assert torch.equal(writer["state"][key], tensor)
        assert f"backbone.optimizer.safetensors/exp_avg/{key.rpartition('/')[2]}" not in writer["state"]


def test_recomputing_activations_changes_nothing(one_process: dict[str, Any]) -> None:
    for stage in (1, 3):
        kept, recomputed = one_process[f"ZeRO-{stage}, sgd, all"], one_process[f"ZeRO-{stage}, sgd, recomputed"]
        torch.testing.assert_close(recomputed["norms"], kept["norms"], rtol=1e-6, atol=0)
        for key, tensor in kept["state"].items():
            torch.testing.assert_close(recomputed["state"][key], tensor, rtol=1e-6, atol=1e-6)


def test_two_submodule_ranks_send_maps_and_gradients_once(ranks: list[dict[str, Any]]) -> None:
    """Each gives the half of its images' maps that the other needs, 96 channels of 16 pixels, forward and backward."""
    for case, ways in (("ZeRO-1, sgd, all", 2), ("ZeRO-0, sgd, frozen", 1)):
        sent, images = ranks[0][case]["feature_bytes"], 16 // (len(ranks) // ranks[0][case]["submodule_ranks"])
        expected = ways * 4 * images // 2 * 96 * 16 // 2
        assert sent == (expected if ranks[0][case]["submodule_ranks"] == 2 else 0)


def test_layers_step_with_rates_of_their_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, ["grid.submodule_ranks=1", "optimizer.layer_decay=0.5"], base="hybrid")
    steps(run, 1)
    rates = sorted({group["lr"] / run._lr(0) for group in run.engine.optimizer.param_groups})
    assert rates == pytest.approx(
        [0.5**n for n in reversed(range(6))]
    )  # five layers of test_resnet, then groups and head


def test_a_frozen_backbone_is_stored_in_the_runs_precision(tmp_path: Path) -> None:
    place = ["grid.submodule_ranks=1", FROZEN, "engine.precision=bf16"]
    run = trainer(tmp_path, place, base="hybrid")
    stored = {name: p.dtype for name, p in run.engine.module.named_parameters() if p.dim() > 1}
    assert {dtype for name, dtype in stored.items() if name.startswith("backbone.")} == {torch.bfloat16}
    assert {dtype for name, dtype in stored.items() if not name.startswith("backbone.")} == {torch.float32}
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    run.engine.module.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = run.engine.module(images)
        for parameter in run.engine.module.backbone.parameters():
            parameter.data = parameter.data.float()
        assert torch.equal(run.engine.module(images), found)  # autocast rounds to the same numbers
