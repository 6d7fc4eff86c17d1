"""A profile of ranks on several hosts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hsvit_ds.results import profile, trace

from ..ranks import ROOT
from ..workers.common import SMALL
from .hosts import DIGITS, Cluster, finish, settle

pytestmark = pytest.mark.cluster


def test_the_ranks_of_two_hosts_are_traced_together(cluster: Cluster, tmp_path: Path) -> None:
    hostfile = settle(tmp_path, {"node-1": 1, "node-2": 1})
    command = [
        "hsvit",
        "profile",
        str(ROOT / DIGITS),
        *SMALL,
        f"run.root={tmp_path}/runs",
        "--hostfile",
        hostfile,
        "--steps",
        "5",
    ]
    text = finish(cluster.start(command, tmp_path))
    folder = tmp_path / "runs/digits-hsvit-profile-001"
    assert "5 steps, 2 ranks on 2 hosts, fp32" in text
    assert str(folder / trace.FILE) in text
    ranks = profile.read(folder)
    assert [rank.host for rank in ranks] == ["node-1", "node-2"]
    assert [len(rank.steps) for rank in ranks] == [5, 5]
    events = json.loads((folder / trace.FILE).read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert [name.rpartition(" on ")[2] for name in names] == ["node-1, cpu", "node-2, cpu"]
