"""`hsvit doctor` over real hosts: ssh, addresses and the launcher are what a cluster has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ..ranks import ROOT
from .hosts import Cluster, output

pytestmark = pytest.mark.cluster
DIGITS = str(ROOT / "recipes/digits/hsvit.toml")


def look(cluster: Cluster, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`hsvit doctor` in `folder` on the control host, ended."""
    started = cluster.start(["hsvit", "doctor", "hostfile", *arguments], folder)
    started.wait(300)
    return started


def test_hosts_that_are_right_sum_over_all_ranks(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("node-1 slots=1\nnode-2 slots=2\n")
    keys = ["grid.submodule_ranks=1", "run.global_batch=36", f"run.root={tmp_path / 'runs'}"]
    done = look(cluster, tmp_path, DIGITS, *keys)
    printed = output(done)
    assert done.returncode == 0, printed
    assert "2 hosts, 3 ranks, rank 0 at 10.77.0.1" in printed
    assert re.search(r"64 MiB at [\d,]+ MB/s, 4 KiB in [\d.]+ ms", printed)
    assert "WRONG" not in printed
    lines = (tmp_path / ".deepspeed_env").read_text().splitlines()
    assert {"NCCL_SOCKET_IFNAME=eth0", "GLOO_SOCKET_IFNAME=eth0"} < set(lines)
    assert list((tmp_path / "runs").iterdir()) == []
    assert cluster.left("hsvit_ds") == {}


def test_a_host_that_is_off_and_a_run_root_that_is_not_shared_are_told(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("node-1 slots=1\nnode-2 slots=1\nnode-3 slots=1\n")
    (tmp_path / "runs").mkdir()
    cluster.hosts["node-2"].switch_off()
    mount = cluster.hosts["node-3"].command(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "runs")])
    subprocess.run(mount, check=True)
    keys = ["grid.submodule_ranks=1", "run.global_batch=36", f"run.root={tmp_path / 'runs'}"]
    try:
        done = look(cluster, tmp_path, DIGITS, *keys)
    finally:
        subprocess.run(cluster.hosts["node-3"].command(["umount", str(tmp_path / "runs")]), check=True)
    printed = output(done)
    assert done.returncode == 1, printed
    assert re.findall(r"^(node-\d): (\S+): ", printed, re.M) == [("node-2", "ssh"), ("node-3", "run.root")]
    assert "all-reduce" not in printed
