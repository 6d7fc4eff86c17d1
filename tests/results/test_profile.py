"""What is made of the spans of a run's ranks: a table, a trace, and what could change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, TypeAdapter

from hsvit_ds.errors import RefusedError
from hsvit_ds.results import advice, profile, trace
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.profiling import FOLDER, file_name
from hsvit_ds.spans import Part

from ..ranks import RECIPES, ROOT

HSVIT = ROOT / "recipes/digits/hsvit.toml"


def write(folder: Path, rank: int, spans: list[tuple[str, int, float, float]], **head: Any) -> None:
    """A rank's file, of one step that takes 10 s."""
    told = {"rank": rank, "ranks": 2, "host": "a", "device": "cpu", "replica": 0, "submodule_rank": rank}
    told |= {"began": 100.0, "met": 0.0, "peak": None} | head
    step = {"step": 11, "start": 0.0, "end": 10.0, "macs": 5, "spans": spans}
    path = folder / FOLDER / file_name(rank)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in (told, step, {"memory": 7})))


FORWARD = [("trunk", 1, 1.0, 3.0), ("exchange", 1, 3.0, 6.0), ("forward", 0, 1.0, 7.0)]
LATER = [("trunk", 1, 1.0, 5.0), ("exchange", 1, 5.0, 6.0), ("forward", 0, 1.0, 7.0)]


def test_a_rank_that_comes_first_to_an_exchange_waits_in_it_for_the_last(tmp_path: Path) -> None:
    write(tmp_path, 0, FORWARD)
    write(tmp_path, 1, LATER)
    first, last = profile.read(tmp_path)
    exchange = (Part.FORWARD, Part.EXCHANGE)
    assert profile.by_part(first) == {
        (Part.FORWARD,): 1.0, (Part.FORWARD, Part.TRUNK): 2.0, exchange: 1.0, (Part.WAITING,): 2.0
    }  # fmt: skip
    assert profile.by_part(last) == {(Part.FORWARD,): 1.0, (Part.FORWARD, Part.TRUNK): 4.0, exchange: 1.0}


def test_ranks_of_other_replicas_are_not_waited_for_in_an_exchange(tmp_path: Path) -> None:
    write(tmp_path, 0, FORWARD)
    write(tmp_path, 1, LATER, replica=1, submodule_rank=0)
    assert (Part.WAITING,) not in profile.by_part(profile.read(tmp_path)[0])


@pytest.mark.parametrize(
    ("head", "offset"),
    [({"began": 103.0}, 3.0), ({"began": 9999.0, "host": "b", "met": 1.5}, -1.5)],
    ids=["one host has one clock", "hosts met at one moment"],
)
def test_ranks_that_began_at_other_times_stand_at_the_same_moments(
    head: dict[str, Any], offset: float, tmp_path: Path
) -> None:
    write(tmp_path, 0, FORWARD)
    write(tmp_path, 1, FORWARD, **head)
    ranks = profile.read(tmp_path)
    starts = [rank.steps[0].start for rank in ranks]
    assert starts == [0.0, offset]
    assert ranks[1].steps[0].spans[0].start == 1.0 + offset


def test_rows_and_what_lies_between_spans_add_up_to_the_step(tmp_path: Path) -> None:
    evaluation = [("forward", 1, 7.5, 8.0), ("evaluation", 0, 7.0, 9.0)]
    loss = [("augmentation", 1, 0.0, 0.5), ("loss", 0, 0.0, 1.0)]
    write(tmp_path, 0, loss + FORWARD + evaluation)
    write(tmp_path, 1, LATER)
    rows = profile.rows(profile.read(tmp_path))
    named = {row.name: row.seconds for row in rows}
    assert named["augmentation"] == named["loss"] == [0.5, 0.0]
    assert named["evaluation"] == [2.0, 0.0]
    assert named["forward"] == [4.0, 6.0]
    assert named["between spans"] == [1.0, 4.0]
    assert named["step"] == [10.0, 10.0]
    for rank in range(2):
        assert sum(row.seconds[rank] for row in rows[:-1] if row.depth == 0) == pytest.approx(10)
        inner = sum(row.seconds[rank] for row in rows if row.depth)
        assert inner == pytest.approx(named["forward"][rank])


def test_the_last_line_of_a_killed_rank_may_be_a_half(tmp_path: Path) -> None:
    write(tmp_path, 0, FORWARD)
    path = tmp_path / FOLDER / file_name(0)
    path.write_text(path.read_text()[:-5])
    (rank,) = profile.read(tmp_path)
    assert len(rank.steps) == 1
    assert rank.memory == 0


def test_a_run_that_traced_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"profile: no step was traced; the run ended before"):
        profile.read(tmp_path)


class Complete(BaseModel):
    """A complete event ("X") of the trace event format, in microseconds."""

    model_config = ConfigDict(extra="forbid", strict=True)
    ph: str
    pid: int
    tid: int
    name: str
    ts: float
    dur: NonNegativeFloat


def test_a_trace_has_the_ranks_one_below_the_other_and_their_spans_nested(tmp_path: Path) -> None:
    write(tmp_path, 0, FORWARD)
    write(tmp_path, 1, LATER)
    trace.write(profile.read(tmp_path), tmp_path / trace.FILE)
    events = json.loads((tmp_path / trace.FILE).read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == [f"rank {rank} (replica 0, submodule rank {rank}) on a, cpu" for rank in range(2)]
    drawn = TypeAdapter(list[Complete]).validate_python([event for event in events if event["ph"] == "X"])
    for rank in range(2):
        open_: list[Complete] = []
        for event in (event for event in drawn if event.pid == rank):  # as a viewer reads them: each inside the last
            while open_ and event.ts >= open_[-1].ts + open_[-1].dur:
                open_.pop()
            assert not open_ or event.ts + event.dur <= open_[-1].ts + open_[-1].dur
            open_.append(event)
    found = [(event.name, event.ts, event.dur) for event in drawn if event.pid == 0]
    assert found == [
        ("step 11", 0.0, 1e7), ("forward", 1e6, 6e6), ("trunk", 1e6, 2e6), ("exchange", 3e6, 3e6),
        ("waiting for other ranks", 3e6, 2e6),
    ]  # fmt: skip


def test_a_folder_that_cannot_take_the_trace_is_told(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"trace.json: cannot be written \(No such .*\); set run.root"):
        trace.write([], tmp_path / "missing" / trace.FILE)


def test_there_is_something_to_say_of_every_part() -> None:
    assert set().union(*(rule.parts for rule in advice.RULES)) == set(Part) - {Part.WAITING}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_what_could_change_are_overrides_that_the_recipe_takes(path: Path) -> None:
    recipe = recipes.read(path)
    shares = {(part,): 0.01 * (place + 1) for place, part in enumerate(Part)}
    _, plan = recipes.resolve(recipes.read(HSVIT), 2)  # of any run in the same precision
    plan = replace(plan, bf16=recipe.engine.precision == "bf16")
    found = advice.changes(recipe, plan, shares)
    assert [change.share for change in found] == sorted((change.share for change in found), reverse=True)
    assert found
    for change in found:
        key = change.key.replace("FOLDER", "x")
        if " (now " not in key:
            changed = recipes.read(path, [key])
            assert changed != recipe, key


def test_what_is_switched_on_already_is_not_recommended() -> None:
    shares = {(part,): 0.1 for part in Part}
    keys = ["engine.precision=bf16", "engine.compile=true", "grid.exchange=bf16"]
    recipe, plan = recipes.resolve(recipes.read(HSVIT, keys), 2)
    said = {change.key for change in advice.changes(recipe, plan, shares)}
    assert not said & set(keys)
    before = {change.key for change in advice.changes(*recipes.resolve(recipes.read(HSVIT), 2), shares)}
    assert before >= set(keys)
