"""Whatever is killed, and whenever: the run that starts again by itself ends as the one to which nothing happened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from . import kills
from .hosts import Cluster

pytestmark = pytest.mark.cluster
SEED = int(os.environ.get("KILLS_SEED", "0"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kills.tars(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(_hosts: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kills.undisturbed(_hosts, tmp_path_factory.mktemp("whole"), data)


@pytest.mark.parametrize("kind", kills.KINDS)
def test_a_killed_run_ends_bit_equal_to_an_undisturbed_one(
    kind: str, cluster: Cluster, data: Path, whole: Path, tmp_path: Path
) -> None:
    found = kills.kill(cluster, tmp_path, data, kind, SEED + kills.KINDS.index(kind), whole)
    assert "nothing" not in found.moment, found
    assert found.attempts == (1 if kind == "worker" else 2), found
