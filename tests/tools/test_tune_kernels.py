"""Tuning keeps what it has found when a candidate fails, and writes after each entry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hsvit_kernels import configurations, dispatch, trials
from tests.kernels import test_first_use as first
from tests.kernels.test_first_use import StandIn
from tools import tune_kernels

nothing_is_known = first.nothing_is_known
PLACE = ("linear_forward", (0,))


class Timed(StandIn):
    """The fewer rows in a tile, the faster; a tile of 128 columns cannot be run."""

    def milliseconds(self, step: Callable[[], Any]) -> float:
        if dispatch.forced() == "reference":
            return 99.0
        options = configurations.chosen[self.name, PLACE]
        if options["BN"] == 128:
            raise RuntimeError("out of resources: shared memory")
        return ms(options)


def ms(options: configurations.Options) -> float:
    return float(options["BM"]) + options["num_stages"]


def test_the_fastest_that_runs_is_kept_and_the_others_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configurations, "TABLE", {place: dict(o) for place, o in configurations.TABLE.items()})
    monkeypatch.setattr(configurations, "FILE", tmp_path / "configurations.json")
    monkeypatch.setattr(tune_kernels, "extent", lambda place: (16,))
    monkeypatch.setattr(dispatch, "capability", lambda device: "90")
    said: list[str] = []
    first_of_all = tune_kernels.candidates(PLACE)[0]
    times = tune_kernels.tuned(PLACE, {(PLACE, 0): "ValueError: no"}, Timed(), said.append)
    tune_kernels.write()
    (fastest, best), *_ = times
    assert (best["BM"], best["num_stages"]) == (32, 2)
    assert [time for time, _ in times] == sorted(ms(options) for _, options in times)
    assert len(times) == len(tune_kernels.candidates(PLACE)) - 7
    assert said[0] == f"{PLACE}: {first_of_all} left out: ValueError: no"
    assert sum("left out: RuntimeError: out of resources" in line for line in said) == 6
    assert said[-1].startswith(f"linear_forward 0: {fastest:.3f} ms, PyTorch 99.000 ms, {{")
    rows = {
        (row["kernel"], tuple(row["shape"])): row["options"]
        for row in json.loads((tmp_path / "configurations.json").read_text())
    }
    assert rows[PLACE]["90"] == best
    assert rows.keys() == configurations.TABLE.keys()


def test_a_place_of_which_nothing_runs_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_kernels, "extent", lambda place: (16,))
    before = json.dumps(configurations.TABLE[PLACE])
    failed = {(PLACE, number): "no" for number in range(len(tune_kernels.candidates(PLACE)))}
    assert tune_kernels.tuned(PLACE, failed, Timed(), lambda line: None) == []
    assert json.dumps(configurations.TABLE[PLACE]) == before


@pytest.mark.parametrize("place", configurations.TABLE, ids=str)
def test_every_place_has_a_problem_that_is_launched_there(place: configurations.Place) -> None:
    assert place in trials.trial(tune_kernels.case(place), (2, 1), first.StandIn().device).places
    options = tune_kernels.candidates(place)
    assert all(known in options for known in configurations.TABLE[place].values())
    assert len({json.dumps(o, sort_keys=True) for o in options}) == len(options) > 10


def test_a_candidate_is_run_once_and_says_why_it_cannot() -> None:
    good = {"BM": 16, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 1}
    assert tune_kernels.fails((PLACE, good, (16,)), StandIn()) == ""
    assert "BN" in tune_kernels.fails((PLACE, {"BM": 16, "num_warps": 4}, (16,)), StandIn())
