"""The whole path once: tars over http, an MLflow server, a host that dies, a restart, and one run at the end of it."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from hsvit_ds.data.index import open_index

from ..tars import data_set
from ..workers.common import SMALL
from .hosts import Cluster, finish, launch, output, until

pytestmark = pytest.mark.cluster
TRAIN, VAL, EPOCHS = 16 * 24, 70, 3


def serve(cluster: Cluster, data: Path, folder: Path) -> tuple[str, str]:
    """URLs of the tars on the third host and of an MLflow server on the fourth."""
    splits = {}
    for split in ("train", "val"):
        index = open_index(data, split)
        splits[split] = {"filenames": list(index.shards), "shard_lengths": index.lengths.tolist()}
    (data / "_info.json").write_text(json.dumps({"splits": splits}))
    web, tracking = cluster.hosts["node-3"], cluster.hosts["node-4"]
    cluster.start([sys.executable, "-m", "http.server", "8000", "--bind", web.address], data, web)
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
    server = ["mlflow", "server", "--host", tracking.address, "--port", "5000", "--workers", "1", *store]
    cluster.start([*server, "--allowed-hosts", "*"], folder, tracking, MLFLOW_DISABLE_TELEMETRY="true")
    for url in (f"http://{web.address}:8000/_info.json", f"http://{tracking.address}:5000/health"):
        ask = [sys.executable, "-c", f"import urllib.request; urllib.request.urlopen('{url}')"]
        until(lambda ask=ask: cluster.run(ask).returncode == 0, url, 120)
    return f"http://{web.address}:8000", f"http://{tracking.address}:5000"


def test_a_host_that_dies_in_mid_epoch_costs_a_restart_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    data = data_set(tmp_path / "data", train=TRAIN, val=VAL, shards=6)
    (tmp_path / "mlflow").mkdir()
    shards, server = serve(cluster, data, tmp_path / "mlflow")
    keys = [*SMALL, "data.name=tiny", "data.classes=10", "data.image_size=32", f"data.root={shards}", "data.workers=1"]
    keys += [
        "data.test=val",
        "tracking.mlflow=true",
        f"tracking.uri={server}",
        f"run.epochs={EPOCHS}",
        "run.log_every=1",
    ]
    keys += ["checkpoint.every_steps=5", "grid.timeout=20", "data.eval_batch=8"]
    process = launch(cluster, tmp_path, {"node-1": 2, "node-2": 2}, keys)
    until(lambda: "step 30/" in output(process), "the middle of the second epoch", 300)
    cluster.hosts["node-2"].switch_off()
    time.sleep(1)
    cluster.hosts["node-2"].start()
    text = finish(process)
    assert "attempt 1 failed" in text
    assert re.search(r"ranks 2, 3 on node-2 left no word|rank \d on node-", text)
    assert "resumed at step" in text
    folder = tmp_path / "runs/digits-hsvit-001"
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "train/loss" in line] == list(range(1, 24 * EPOCHS + 1))
    # Evaluation asserts its count itself; each accuracy is a whole number of the images.
    scores = [line["val/top1"] for line in logged if "val/top1" in line]
    assert len(scores) == EPOCHS
    assert all(abs(score * VAL / 100 - round(score * VAL / 100)) < 1e-4 for score in scores)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("hsvit-ds")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/top1"] == pytest.approx(scores[-1])
    steps = {m.step for m in client.get_metric_history(run.info.run_id, "train/loss")}
    assert steps == set(range(1, 24 * EPOCHS + 1))
