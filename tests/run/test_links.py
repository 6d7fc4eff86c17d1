"""What joins ranks: refused where it cannot be, and what a collective takes over it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hsvit_ds.errors import RefusedError
from hsvit_ds.run import links
from hsvit_ds.run.links import Between, Host, Inside, Links, Rings

from ..ranks import ROOT

INSIDE, BETWEEN = "[inside]\nbandwidth = 1e9\n", "[between]\nbandwidth = 1e8\n"
SIZE = 12_000


def refusal(text: str, tmp_path: Path) -> str:
    (tmp_path / "links.toml").write_text(text)
    with pytest.raises(RefusedError) as refused:
        links.read(tmp_path / "links.toml")
    return str(refused.value).removeprefix(f"{tmp_path}/links.toml: ")


def test_the_example_is_read() -> None:
    found = links.read(ROOT / "links.example.toml")
    assert (found.inside.bandwidth, found.between.latency, found.host.ranks) == (100e9, 20e-6, 8)
    assert found.passes is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[inside]\nbandwidth = 0\n" + BETWEEN, "[inside] bandwidth = 0: must be above 0; hsvit doctor measures"),
        (INSIDE + "[between]\nbandwidth = -5.0\n", "[between] bandwidth = -5: must be above 0; hsvit doctor measures"),
        (INSIDE + "[between]\nbandwidth = nan\n", "[between] bandwidth = nan: must be above 0"),
        (
            INSIDE + BETWEEN + "latency = -1e-6\n",
            "[between] latency = -1e-06: must not be negative; leave it out for 0",
        ),
        ("stragglers = -1\n" + INSIDE + BETWEEN, "stragglers = -1: must not be negative"),
        (INSIDE + BETWEEN + "[host]\nranks = 0\n", "[host] ranks = 0: must be above 0; a host has one at least"),
        (INSIDE + BETWEEN + "[host]\nimages = 0\n", "[host] images = 0: must be above 0; leave it out"),
        (INSIDE + "[between]\nbandwith = 1e8\n", 'unknown key "between.bandwith"; did you mean "between.bandwidth"?'),
        (INSIDE + BETWEEN + "[hosts]\n", 'unknown key "hosts"; did you mean "host"?'),
        (INSIDE + BETWEEN + "jitter = 1\n", 'unknown key "between.jitter"; known: bandwidth, latency'),
        (INSIDE, "between is missing"),
        (INSIDE + BETWEEN + "[passes]\nforward = 1\n", "passes.backward is missing"),
        (INSIDE + BETWEEN + "[passes]\nforward = 0\nbackward = 1\n", "[passes] forward = 0: must be above 0; leave"),
        (INSIDE + '[between]\nbandwidth = "fast"\n', "between.bandwidth = 'fast': input should be a valid number"),
        ("inside", "not valid TOML"),
    ],
)
def test_links_that_cannot_be_are_refused(text: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(text, tmp_path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"none\.toml: cannot be read \(No such file or directory\)"):
        links.read(tmp_path / "none.toml")


def seconds(kind: str, members: list[list[int]], joined: Links, size: int = SIZE) -> list[float]:
    return list(Rings(np.array(members), joined).seconds(kind, size))


def joined(ranks: int, at_once: int = 0) -> Links:
    return Links(
        inside=Inside(bandwidth=1e9, latency=1e-6, at_once=at_once),
        between=Between(bandwidth=1e8, latency=1e-5),
        host=Host(ranks=ranks),
    )


@pytest.mark.parametrize(("kind", "rounds"), [("all_reduce", 2), ("reduce_scatter", 1), ("all_gather", 1)])
def test_a_collective_takes_a_ring_of_messages(kind: str, rounds: int) -> None:
    assert seconds(kind, [[0, 1, 2, 3]], joined(ranks=4)) == pytest.approx([rounds * 3 * (1e-6 + SIZE / 4 / 1e9)])
    assert seconds(kind, [[0, 1, 2, 3]], joined(ranks=1)) == pytest.approx([rounds * 3 * (1e-5 + SIZE / 4 / 1e8)])


def test_the_slowest_link_of_a_ring_counts() -> None:
    inside, across = seconds("all_reduce", [[0, 1], [3, 4]], joined(ranks=4))
    assert inside == pytest.approx(2 * (1e-6 + SIZE / 2 / 1e9))
    assert across == pytest.approx(2 * (1e-5 + SIZE / 2 / 1e8))
    (mixed,) = seconds("all_reduce", [[0, 1, 2, 4]], joined(ranks=4))
    assert mixed == pytest.approx(6 * (1e-5 + SIZE / 4 / 1e8))


def test_rings_that_leave_a_host_share_its_link() -> None:
    for rings in (1, 2, 4):
        members = [[rank, rank + 4] for rank in range(rings)]
        expected = 2 * (1e-5 + rings * SIZE / 2 / 1e8)
        assert seconds("all_reduce", members, joined(ranks=4)) == pytest.approx([expected] * rings)


def test_ranks_share_what_carries_their_messages_inside_a_host() -> None:
    for at_once, slower in ((0, 1), (2, 4), (8, 1), (16, 1)):
        found = seconds("all_reduce", [list(range(8))], joined(ranks=8, at_once=at_once))
        assert found == pytest.approx([2 * 7 * slower * (1e-6 + SIZE / 8 / 1e9)])


def test_a_single_number_waits_for_no_other_message() -> None:
    """Of eight ranks one sends at a time, however few messages are carried at once."""
    for at_once in (1, 2, 8):
        found = seconds("all_reduce", [list(range(8))], joined(ranks=8, at_once=at_once), size=8)
        assert found == pytest.approx([2 * 7 * (1e-6 + 1 / 1e9)])


def test_collectives_that_are_begun_together_help_one_another() -> None:
    alone = joined(ranks=4)
    links = replace(alone, host=replace(alone.host, call=0.5, together=0.7))
    rings = Rings(np.array([[0, 1, 2, 3]]), links)
    one, of_many = rings.seconds("all_gather", SIZE), rings.seconds("all_gather", SIZE, together=True)
    assert of_many - 0.5 == pytest.approx(0.7 * (one - 0.5))


def test_every_collective_takes_a_call() -> None:
    without = joined(ranks=4)
    with_call = replace(without, host=replace(without.host, call=0.5))
    for kind in links.STEPS:
        (took,), (longer,) = (seconds(kind, [[0, 1, 2, 3]], one) for one in (without, with_call))
        assert longer == pytest.approx(took + 0.5)
