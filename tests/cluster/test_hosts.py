"""The harness itself: hosts that are apart, reachable by ssh, and that can be lost."""

from __future__ import annotations

import pytest

from .hosts import Cluster, until

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
    host = cluster.hosts["node-2"]
    host.switch_off()
    assert not host.answers()
    host.start()
    host.unplug()
    assert not host.answers()
    host.plug()
    until(host.answers, "node-2 is back", 20)


def test_a_long_cable_delays_and_loses(cluster: Cluster) -> None:
    ping = ["ssh", "node-1", "ping -q -c 40 -i 0.05 -W 2 node-2"]
    cluster.hosts["node-2"].lengthen(0.1, 0.2)
    told = cluster.run(ping).stdout
    lost = float(told.split("% packet loss")[0].rsplit(" ", 1)[1])
    assert 10 <= lost <= 65, told  # of 36 % in both directions
    assert float(told.rsplit("= ", 1)[1].split("/")[0]) >= 200, told
    copied = "head -c 300000 /dev/zero | ssh node-2 sha256sum; head -c 300000 /dev/zero | sha256sum"
    one, other = cluster.run(["bash", "-c", copied]).stdout.split("\n")[:2]
    assert one == other
    cluster.hosts["node-2"].shorten()
    assert " 0% packet loss" in cluster.run(ping).stdout
