"""The ranks of a run on the hosts that are left: as many as can go on, holding what can be held."""

from __future__ import annotations

import itertools

import pytest

from hsvit_ds.errors import RefusedError
from hsvit_ds.grid import grid
from hsvit_ds.hosts.cluster import Host
from hsvit_ds.hosts.layout import Layout, fitted, whole
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.recipe import Recipe

from ..ranks import ROOT


def _recipe(submodules: int, ranks: int, batch: int = 64, micro: int = 0) -> Recipe:
    overrides = [f"model.submodules={submodules}", f"grid.submodule_ranks={ranks}", f"run.global_batch={batch}"]
    return recipes.read(ROOT / "recipes/digits/hsvit.toml", [*overrides, f"run.micro_batch={micro}"])


def _hosts(*slots: int) -> list[Host]:
    return [Host(f"node-{number}", count) for number, count in enumerate(slots, 1)]


def _placed(layout: Layout) -> dict[str, int]:
    return {host.name: host.slots for host in layout.hosts}


def test_the_first_start_takes_every_slot_and_changes_no_key() -> None:
    recipe = _recipe(submodules=4, ranks=2)
    layout = whole(_hosts(3, 2), recipe)
    assert _placed(layout) == {"node-1": 3, "node-2": 2}
    assert layout.overrides(recipe) == []
    assert layout.places == ["node-1", "node-1", "node-1", "node-2", "node-2"]


@pytest.mark.parametrize("degraded", [False, True])
def test_a_lost_host_takes_its_replicas_with_it(degraded: bool) -> None:
    recipe, hosts = _recipe(submodules=4, ranks=2), _hosts(4, 4)
    layout = fitted(hosts[:1], recipe, whole(hosts, recipe), degraded)
    assert (_placed(layout), layout.absent, layout.idle) == ({"node-1": 4}, (), 0)
    assert layout.overrides(recipe) == []


def test_replicas_divide_the_global_batch_and_the_rest_is_idle() -> None:
    recipe, hosts = _recipe(submodules=4, ranks=2), _hosts(2, 2, 2, 2)
    layout = fitted(hosts[:3], recipe, whole(hosts, recipe), degraded=False)
    assert (_placed(layout), layout.idle) == ({"node-1": 2, "node-2": 2}, 2)  # 64 images, not over 3 replicas
    assert "2 slots idle" in str(layout)


def test_a_set_micro_batch_fits_too() -> None:
    recipe, hosts = _recipe(submodules=1, ranks=1, batch=96, micro=32), _hosts(2, 2, 2)
    layout = fitted(hosts[:2], recipe, whole(hosts, recipe), degraded=False)
    assert len(layout.places) == 3  # 4 replicas would have 24 images each


def test_a_replica_stays_on_one_host_where_it_can() -> None:
    recipe, hosts = _recipe(submodules=2, ranks=2, batch=64), _hosts(3, 3, 2)
    last = whole(hosts, recipe)
    assert _placed(fitted(hosts[:2], recipe, last, degraded=False)) == {"node-1": 2, "node-2": 2}
    recipe = _recipe(submodules=2, ranks=2, batch=48)  # three replicas: the second one has to span the hosts
    assert _placed(fitted(hosts[:2], recipe, last, degraded=False)) == {"node-1": 3, "node-2": 3}


def test_a_replica_wider_than_a_host_takes_the_first_hosts() -> None:
    recipe, hosts = _recipe(submodules=4, ranks=4), _hosts(2, 2, 2, 2)
    layout = fitted(hosts[1:], recipe, whole(hosts, recipe), degraded=True)
    assert (_placed(layout), layout.idle, layout.absent) == ({"node-2": 2, "node-3": 2}, 2, ())


def test_degraded_goes_on_without_the_submodules_of_the_lost_ranks() -> None:
    recipe, hosts = _recipe(submodules=8, ranks=4), _hosts(1, 1, 1, 1)
    first = fitted([hosts[0], *hosts[2:]], recipe, whole(hosts, recipe), degraded=True)
    assert (first.submodule_ranks, first.absent) == (3, (2, 3))
    assert first.overrides(recipe) == ["grid.submodule_ranks=3", "grid.absent=[2,3]"]
    assert first.held_on(["node-3"]) == {4, 5}
    second = fitted([hosts[0], hosts[3]], recipe, first, degraded=True)
    assert (second.submodule_ranks, second.absent) == (2, (2, 3, 4, 5))


def test_degraded_keeps_what_another_replica_still_holds() -> None:
    recipe, hosts = _recipe(submodules=4, ranks=4), _hosts(2, 2, 2, 2)
    layout = fitted(hosts[3:], recipe, whole(hosts, recipe), degraded=True)
    assert (_placed(layout), layout.absent) == ({"node-4": 2}, (0, 1))


def test_degraded_gives_up_no_more_than_it_must() -> None:
    recipe, hosts = _recipe(submodules=4, ranks=4), _hosts(2, 2)
    layout = fitted([hosts[0], Host("spare", 1)], recipe, whole(hosts, recipe), degraded=True)
    assert (_placed(layout), layout.absent) == ({"node-1": 2, "spare": 1}, (3,))


@pytest.mark.parametrize(
    ("submodules", "ranks", "left", "expected"),
    [(8, 4, 3, (2, 2)), (6, 6, 5, (3, 3)), (7, 7, 6, (1, 4)), (4, 4, 1, (1, 1))],
)
def test_shrunk_ranks_hold_all_submodules(submodules: int, ranks: int, left: int, expected: tuple[int, int]) -> None:
    recipe, hosts = _recipe(submodules, ranks), _hosts(*[1] * ranks)
    layout = fitted(hosts[:left], recipe, whole(hosts, recipe), degraded=False)
    assert (layout.submodule_ranks, len(layout.places)) == expected
    assert layout.absent == ()


def test_a_host_that_returns_makes_the_model_whole_again() -> None:
    recipe, hosts = _recipe(submodules=4, ranks=4), _hosts(2, 2)
    halved = fitted(hosts[:1], recipe, whole(hosts, recipe), degraded=True)
    assert halved.absent == (2, 3)
    again = fitted(hosts, recipe, halved, degraded=True)
    assert again.overrides(recipe) == []


def test_what_cannot_go_on_is_refused_with_the_arithmetic() -> None:
    recipe, hosts = _recipe(submodules=2, ranks=2, batch=96, micro=64), _hosts(2, 2)
    with pytest.raises(RefusedError, match=r"2 ranks on node-2 are 1 replica of 2.* 96 in micro batches of .* = 64"):
        fitted(hosts[1:], recipe, whole(hosts, recipe), degraded=False)


@pytest.mark.parametrize("degraded", [False, True])
def test_every_layout_is_one_that_the_ranks_accept(degraded: bool) -> None:
    for submodules, slots in itertools.product([4, 8], [(1, 1, 1, 1), (2, 2, 2), (3, 1, 2), (4, 4)]):
        for ranks in (n for n in range(1, submodules + 1) if submodules % n == 0 and sum(slots) % n == 0):
            recipe, hosts = _recipe(submodules, ranks), _hosts(*slots)
            for count in range(1, len(hosts)):
                for left in itertools.combinations(hosts, count):
                    layout = fitted(left, recipe, whole(hosts, recipe), degraded)
                    taken, there = _placed(layout), {host.name: host.slots for host in left}
                    assert all(slots <= there[name] for name, slots in taken.items())
                    assert len(layout.places) + layout.idle == sum(there.values())
                    found = grid.replicas(len(layout.places), layout.submodule_ranks, submodules, layout.absent)
                    assert recipe.run.global_batch % found == 0
                    assert degraded or not layout.absent
                    assert layout.held_on(taken) == set(range(submodules)) - set(layout.absent)
