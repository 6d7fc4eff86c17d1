"""A run uses kernels that are right and faster on all of its devices, and trains with them as with the reference."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hsvit_ds.errors import RefusedError
from hsvit_ds.run import kernels
from hsvit_ds.run.report import Reporter
from hsvit_kernels import dispatch, first_use, trials
from hsvit_kernels.cases import Cases
from hsvit_kernels.findings import Findings
from tests.kernels import test_first_use as first
from tests.kernels.test_first_use import ALL, INPUT, LAYER, ONE, StandIn
from tests.workers.common import state, steps, trainer

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("nothing_is_known")]
nothing_is_known = first.nothing_is_known


class Ranks:
    """This rank's grid among others, of which each has a device and has found something, or nothing."""

    is_main, rank = True, 0

    def __init__(self, *others: tuple[StandIn, Findings | None]) -> None:
        self.others = others

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [value, *(machine.about for machine, _ in self.others)]
        return [value, *(found for _, found in self.others)]


def decide(file: Path, machine: StandIn, *others: tuple[StandIn, Findings | None], cases: Cases = ONE) -> Any:
    return kernels.decide(Ranks(*others), cases, file, machine)  # type: ignore[arg-type]


def found(machine: StandIn) -> tuple[StandIn, Findings]:
    return machine, first_use.attempt(ONE, machine)


def test_a_kernel_is_used_where_it_wins_on_every_device_model(tmp_path: Path) -> None:
    file, name = tmp_path / "kernels.json", str(LAYER)
    fast, other, slow = StandIn(), StandIn("another"), StandIn("slow one", ms=2)
    assert decide(file, fast).used == {name: "triton"}
    assert decide(file, fast, (StandIn(), None)).used == {name: "triton"}  # a rank with the same model tries nothing
    assert decide(file, fast, found(other)).used == {name: "triton"}
    decision = decide(file, fast, found(other), found(slow))
    assert decision.used == {name: "reference"}
    assert first.layer() == "reference"
    assert [f.about["device"] for f in decision.machines] == ["stand-in", "another", "slow one"]
    assert kernels.rows(decision) == [(name, "reference: slower", "2.000", "1.000")]


def test_only_the_first_rank_of_a_model_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Second(Ranks):
        rank, is_main = 1, False

        def gather(self, value: Any) -> list[Any]:
            return super().gather(value)[::-1]

    theirs = found(StandIn())
    first.no_trials(monkeypatch)
    decision = kernels.decide(Second(theirs), ONE, tmp_path / "kernels.json", StandIn())  # type: ignore[arg-type]
    assert decision.used == {str(LAYER): "triton"}
    assert first.layer() == "kernel"
    assert not (tmp_path / "kernels.json").exists()


def test_a_resumed_run_uses_what_it_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kernels.json"
    before = decide(file, StandIn(ms=2))
    monkeypatch.setenv("HSVIT_KERNELS_CACHE", str(tmp_path / "empty"))
    with monkeypatch.context() as patched:
        first.no_trials(patched)
        again = decide(file, StandIn(ms=0.1))
    assert again.used == before.used == {str(LAYER): "reference"}
    assert again.notes == []
    more = decide(file, StandIn(ms=0.1), cases=ALL)  # a model's new cases are tried
    assert more.used[str(LAYER)] == "reference"
    assert more.used[str(INPUT)] == "triton"


def test_another_decision_after_a_resume_is_said(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    decide(file, StandIn())
    assert decide(file, StandIn("another", ms=2)).notes == [
        f"warning: {LAYER}: by the reference now, by Triton before; results differ by rounding"
    ]
    assert decide(file, StandIn()).notes == [
        f"warning: {LAYER}: by Triton now, by the reference before; results differ by rounding"
    ]


def test_other_launches_after_a_resume_are_said(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    decide(file, StandIn())
    table = json.loads(file.read_text())
    table["machines"][0]["about"]["driver"] = "0"
    table["machines"][0]["launches"]["linear_forward 0"]["num_warps"] = 2
    file.write_text(json.dumps(table))
    assert decide(file, StandIn()).notes == [
        "warning: kernels are launched otherwise than before; results differ by rounding"
    ]


@pytest.mark.parametrize("text", ["", "{}", '{"used": {}, "machines": [{}]}'])
def test_a_decision_that_cannot_be_read_is_made_anew(text: str, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(text)
    (note,) = decide(file, StandIn()).notes
    assert note.startswith(f"warning: {file} cannot be read (")
    assert json.loads(file.read_text())["used"] == {str(LAYER): "triton"}


def test_a_decision_that_cannot_be_written_is_used_all_the_same(tmp_path: Path) -> None:
    decision = decide(tmp_path / "nowhere/kernels.json", StandIn())
    assert decision.notes[0].startswith(f"warning: {tmp_path}/nowhere/kernels.json: No such file or directory")
    assert first.layer() == "kernel"


def test_a_lost_device_is_a_refusal_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(StandIn):
        def wait(self) -> None:
            raise RuntimeError("CUDA error")

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    first.spoil(monkeypatch, fail)
    with pytest.raises(RefusedError, match=r"engine.kernels = auto: linear_forward .*; start again: it is then left"):
        decide(tmp_path / "kernels.json", Lost())


def test_the_table_has_few_rows_and_one_for_everything_that_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    many: Cases = {LAYER._replace(sizes=(16, 8 * k, 1, 0, 0, 0)): (8,) for k in range(1, 8)}
    first.spoil(monkeypatch, lambda y, count: y.fill_(float("nan")) if count < 4 else None)
    decision = decide(tmp_path / "kernels.json", StandIn(), cases=many)
    wrong, others = kernels.rows(decision)
    assert wrong == (str(next(iter(many))), "reference: wrong: result: inf times the error that is allowed", "-", "-")
    assert others == ("linear_forward, 6 cases", "kernel in 6 of them", "3.000", "6.000")
    report = Reporter(True, 1, 0)
    report.table(kernels.COLUMNS, kernels.rows(decision))
    report.close()
    assert "linear_forward, 6 cases" in capsys.readouterr().out


def test_a_run_chooses_its_kernels_before_its_first_step_and_prints_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("IMAGES", "ROWS"):
        monkeypatch.setattr(trials, name, 1)
    run = trainer(tmp_path, BASES["scala"], base="scala")
    capsys.readouterr()
    run._choose_kernels()  # on a CPU there is no choice
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(kernels, "is_open", lambda device: True)
    monkeypatch.setattr(kernels, "Machine", lambda device: StandIn(ms=2))
    run._choose_kernels()
    table = json.loads((tmp_path / "kernels.json").read_text())
    assert set(table["used"].values()) == {"reference"}
    assert table["machines"][0]["about"] == {"device": "stand-in", "driver": "1"}
    shown = capsys.readouterr().out
    assert shown.count("reference: slower") == 3
    assert "linear_weight_gradient" in shown
    run.report.close()


BASES = {
    "hsvit": [
        "grid.submodule_ranks=1",
        "run.global_batch=2",
        "augment.mix_block=2",
        "model.groups=2",
        "model.depth=1",
        "optimizer.name=sgd",
    ],
    "scala": ["run.global_batch=2", "augment.mix_block=2", "model.depth=1", "optimizer.name=sgd"],
}


@pytest.mark.parametrize("base", BASES)
def test_three_steps_with_chosen_kernels_are_those_of_the_reference(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An HSViT, and a ViT of which a step trains four widths."""
    monkeypatch.setattr(trials, "IMAGES", 1)
    monkeypatch.setattr(trials, "ROWS", 16)
    norms: list[Any] = []
    states: list[Any] = []
    launched: list[Any] = []
    launch = dispatch.launch

    def counted(kernel: Any, *args: Any, **constants: Any) -> None:
        launched.append(kernel)
        launch(kernel, *args, **constants)

    for module in ("attention_triton", "sliced_linear"):
        monkeypatch.setattr(sys.modules[f"hsvit_kernels.{module}"], "launch", counted)
    for chosen in (False, True):
        here = trainer(tmp_path / str(chosen), BASES[base], base=base)
        if chosen:
            wanted = kernels.cases(here.recipe, here.plan, here.task.trained(here.plan.steps))
            decision = kernels.decide(here.grid, wanted, here.folder / kernels.FILE, StandIn())
            assert {f.state for f in decision.machines[0].verdicts.values()} == {"right"}
            assert all(decision.used.values())
            if base == "scala":
                assert {case.operation for case in wanted} == {
                    "linear_forward", "linear_input_gradient", "linear_weight_gradient"
                }  # fmt: skip
        launched.clear()
        norms.append(steps(here, 3))
        states.append(state(here))
        assert bool(launched) == chosen
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-5, atol=1e-6)
