"""The harness itself: hosts that are apart, reachable by ssh, and that can be lost."""

from __future__ import annotations

import pytest

from .hosts import Cluster

pytestmark = pytest.mark.cluster


def test_hosts_have_their_own_names_addresses_and_processes(cluster: Cluster) -> None:
    for name, host in cluster.hosts.items():
        done = cluster.run(["ssh", name, "hostname; hostname -I; ps ax | wc -l"])
        found = done.stdout.split()
        assert found[:2] == [name, host.address], done
        assert int(found[2]) < 15
    workers = ",".join(cluster.hosts)
    everywhere = cluster.run(["env", "PDSH_RCMD_TYPE=ssh", "pdsh", "-S", "-w", workers, "exit 3"])
    assert everywhere.returncode == 3


def test_a_lost_host_does_not_answer_until_it_is_back(cluster: Cluster) -> None:
    host, ask = cluster.hosts["node-2"], ["ssh", "-o", "ConnectTimeout=1", "node-2", "true"]
    host.switch_off()
    assert cluster.run(ask).returncode == 255
    host.start()
    assert cluster.run(ask).returncode == 0
    host.unplug()
    assert cluster.run(ask).returncode == 255
    host.plug()
    assert cluster.run(ask).returncode == 0
