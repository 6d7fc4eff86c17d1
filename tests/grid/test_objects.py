"""What grows with the number of ranks: groups, and what ranks tell each other as objects."""

from __future__ import annotations

from typing import Any

import pytest

from ..ranks import work

pytestmark = pytest.mark.heavy
KEYS = ["grid.submodule_ranks=2", "run.global_batch=256", "run.log_every=1", "checkpoint.every_steps=3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """An epoch on two ranks, and on four."""
    folder = tmp_path_factory.mktemp("runs")
    two, four = (work("objects", world, folder / str(world), {"keys": KEYS}) for world in (2, 4))
    return two, four


def test_more_ranks_send_none_but_rank_0_more_objects_in_steps_log_lines_and_checkpoints(runs: Any) -> None:
    two, four = runs
    assert two[0]["received"]["of writers"] > 100, "nothing was saved"
    few, *others = (sum(rank["received"].values()) for rank in [*two[1:], *four[1:]])
    assert max(others) <= few


def test_a_gather_brings_every_ranks_value_whether_they_are_the_same_or_not(runs: Any) -> None:
    for ranks in runs:
        expected = ["the same"] * len(ranks), ["x" * rank for rank in range(len(ranks))]
        assert all(rank["gathered"] == expected for rank in ranks)


def test_a_rank_connects_with_all_others_once(runs: Any) -> None:
    for rank in runs[1]:
        assert rank["groups"].count([0, 1, 2, 3]) == 1


def test_every_rank_is_told_why_a_save_failed_on_one(runs: Any) -> None:
    for ranks in runs:
        assert {rank["failure"] for rank in ranks} == {"rank 1: [Errno 28] No space left on device"}
