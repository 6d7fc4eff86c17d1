"""A sweep's cells on other hosts, one after the other."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import tomli_w

from ..ranks import ROOT
from .hosts import DIGITS, Cluster, finish, settle, until

pytestmark = pytest.mark.cluster


@pytest.mark.marathon
def test_cells_take_the_hosts_in_turn_and_a_stopped_one_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    keys = {"run.epochs": 2, "run.global_batch": 128, "run.log_every": 1, "tracking.mlflow": False}
    values = {"recipes": [str(ROOT / DIGITS)], "seeds": [0, 1], "keys": keys}
    (tmp_path / "study.toml").write_text(tomli_w.dumps(values))
    command = ["hsvit", "sweep", "study.toml", "--hostfile", settle(tmp_path, {"node-1": 1, "node-2": 1})]
    runs = tmp_path / f"runs/{tmp_path.name}-study"
    first, second = (runs / f"digits-hsvit,seed={seed}-001" for seed in (0, 1))
    process = cluster.start(command, tmp_path)
    until(lambda: (first / "metrics.jsonl").exists() and (first / "metrics.jsonl").read_text(), "a step", 300)
    assert {*cluster.left("hsvit_ds.train")} == {"node-1", "node-2"}
    assert not second.exists()
    process.send_signal(signal.SIGTERM)
    assert "stopped; to go on:" in finish(process, 75)
    assert not cluster.left("hsvit_ds.train")
    assert json.loads((first / "summary.json").read_text())["state"] == "stopped"
    text = finish(cluster.start(command, tmp_path))
    assert text.count(": finished, test top-1 ") == 2
    for run in (first, second):
        found = json.loads((run / "summary.json").read_text())
        assert (found["state"], found["ranks"], found["hosts"]) == ("finished", 2, ["node-1", "node-2"])
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "train/loss" in line] == list(range(1, found["steps"] + 1))
