"""Hosts for the tests in this folder, made once; every test finds them all on, plugged in and idle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .hosts import Cluster, missing

NAMES = ["node-1", "node-2", "node-3", "node-4"]


@pytest.fixture(scope="session")
def _hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(f"no hosts: {why}")
    made = Cluster(tmp_path_factory.mktemp("cluster"), NAMES)
    yield made
    made.close()


@pytest.fixture
def cluster(_hosts: Cluster) -> Iterator[Cluster]:
    yield _hosts
    _hosts.restore()
