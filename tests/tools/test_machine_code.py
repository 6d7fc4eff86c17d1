"""Instructions of a kernel are counted as often as its loops go round."""

from __future__ import annotations

import pytest

from tools.machine_code import Code, Loop

# A; twice (B; three times (C C); D); E, where a branch from B ahead leaves out both C and D.
CODE = Code(8, 0, ["A", "B", "C", "C", "D", "E"], [(1, 5)], Loop(0, 5, [Loop(1, 4, [Loop(2, 3)])]))
TRIPS = ((2.0, ((3.0, ()),)),)


def test_a_loop_counts_as_often_as_it_goes_round() -> None:
    assert CODE.executed(TRIPS) == {"A": 1, "B": 2, "C": 12, "D": 2, "E": 1}
    assert CODE.executed(TRIPS, (0,)) == {"B": 1, "C": 6, "D": 1}
    assert CODE.skipped((0,)) == 3


def test_loops_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match="1 loop of 4 instructions, where 2 are known"):
        CODE.executed((*TRIPS, (1.0, ())))
