"""A run goes on without submodules that were lost, and with them again, as one process would; theirs do not change."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.engine.checkpoint_files import pointed
from hsvit_ds.errors import RefusedError
from hsvit_ds.results.saved import SUBSETS, SavedRun, open_run
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.evaluation import evaluate
from hsvit_ds.run.memory import needed
from hsvit_ds.train import main

from ..ranks import ROOT, work
from ..workers.common import SMALL, state, steps, trainer
from ..workers.degraded import segment

pytestmark = pytest.mark.heavy

ADAMW = ["model.submodules=4", "optimizer.name=adamw", "ema.decay=0.9", "checkpoint.keep_last=1"]
SGD = ["model.submodules=4", "optimizer.name=sgd", "run.global_batch=24"]
# What is trained whole for two steps, and then goes on without some submodules.
RUNS = {"hsvit, adamw": ("hsvit", ADAMW), "hsvit, sgd": ("hsvit", SGD), "hybrid, sgd": ("hybrid", SGD)}
ABSENT_LAST, ABSENT_FIRST = "grid.absent=[3]", "grid.absent=[0]"
ACCUMULATED = ["run.micro_batch=8", "run.bn_batch=8"]
THREE_RANKS = {
    "the last is absent": ("hsvit, adamw", [ABSENT_LAST]),
    "the first is absent, ZeRO-3": ("hsvit, adamw", [ABSENT_FIRST, "engine.zero_stage=3"]),
    "accumulated, ZeRO-0": ("hsvit, sgd", [ABSENT_LAST, "engine.zero_stage=0", *ACCUMULATED]),
    "hybrid": ("hybrid, sgd", [ABSENT_FIRST]),
}
REPLICAS = "two replicas, the last is absent"
GAP = "two of the middle are absent"
LOST = "the first is absent, ZeRO-3"
BACK = {  # after that
    "back on two ranks": [],
    "back on two ranks, ZeRO-0": ["engine.zero_stage=0"],
}


def of(run: str, folder: Path, stops: list[int], overrides: list[str], ranks: int = 1) -> dict[str, Any]:
    """The arguments of a segment."""
    base, common = RUNS[run]
    place = f"grid.submodule_ranks={ranks}"
    return {"folder": str(folder), "base": base, "overrides": [*common, place, *overrides], "stops": stops}


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source / "checkpoints", folder / "checkpoints")
    return folder


def files(folder: Path, submodule: int) -> dict[str, bytes]:
    """{name: content} of a submodule's files in the latest checkpoint of a run."""
    latest = pointed(folder / "checkpoints", "latest")
    assert latest is not None
    return {path.name: path.read_bytes() for path in latest.glob(f"submodule-{submodule:03d}.*")}


def moments(folder: Path, submodule: int) -> dict[str, Tensor]:
    latest = pointed(folder / "checkpoints", "latest")
    assert latest is not None
    return load_file(latest / f"submodule-{submodule:03d}.optimizer.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run, trained whole for two steps."""
    folder = tmp_path_factory.mktemp("degraded")
    for run in RUNS:
        segment(**of(run, folder / run, [2], []))
    return folder


@pytest.fixture(scope="module")
def one_process(base: Path) -> dict[str, Any]:
    """What one process computes with the same submodules absent, and with all of them back."""
    found = {
        name: segment(**of(run, copied(base / run, base / f"one {name}"), [3, 5], overrides))
        for name, (run, overrides) in THREE_RANKS.items()
    }
    found[REPLICAS] = found["the last is absent"]
    back = segment(**of("hsvit, adamw", copied(base / f"one {LOST}", base / "one back"), [7], []))
    return found | dict.fromkeys(BACK, back)


@pytest.fixture(scope="module")
def ranks(base: Path, one_process: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The same on several ranks: for each case what every rank found."""
    three = [
        of(run, copied(base / run, base / name), [3, 5], overrides, ranks=3)
        for name, (run, overrides) in THREE_RANKS.items()
    ]
    answers = work("degraded", 3, base / "three", three)
    start = base / "hsvit, adamw"
    two = [
        of("hsvit, adamw", copied(base / LOST, base / name), [7], overrides, ranks=2)
        for name, overrides in BACK.items()
    ]
    two += [
        of("hsvit, adamw", copied(start, base / REPLICAS), [3, 5], [ABSENT_LAST, "engine.zero_stage=2"]),
        of("hsvit, adamw", copied(start, base / GAP), [5], ["grid.absent=[1,2]"], ranks=2),
    ]
    more = work("degraded", 2, base / "two", two)
    by_case = {name: [rank[i] for rank in answers] for i, name in enumerate(THREE_RANKS)}
    return by_case | {name: [rank[i] for rank in more] for i, name in enumerate([*BACK, REPLICAS, GAP])}


def written(ranks: list[dict[str, Any]], which: str = "state") -> dict[str, Tensor]:
    return {key: tensor for rank in ranks for key, tensor in rank[which].items()}


def assert_equal(found: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> None:
    for rank in found:
        torch.testing.assert_close(rank["norms"], expected["norms"], rtol=1e-6, atol=0)
    left = written(found)
    assert left.keys() == expected["state"].keys()
    for key, tensor in expected["state"].items():
        torch.testing.assert_close(left[key], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("case", [*THREE_RANKS, REPLICAS, *BACK])
def test_ranks_with_absent_submodules_equal_one_process(
    case: str, ranks: dict[str, list[dict[str, Any]]], one_process: dict[str, Any]
) -> None:
    run, _ = THREE_RANKS.get(case, ("hsvit, adamw", []))
    assert all(math.isfinite(norm) for norm in one_process[case]["norms"])
    assert_equal(ranks[case], one_process[case], 1e-5 if "adamw" in run else 1e-6)


def test_a_gap_in_the_middle_equals_submodules_that_never_answer(
    base: Path, ranks: dict[str, list[dict[str, Any]]]
) -> None:
    """One process with all of them, in which two do not answer, since it cannot hold two that are apart."""
    whole = trainer(copied(base / "hsvit, adamw", base / "whole"), [*ADAMW, "grid.submodule_ranks=1"], resume=True)
    whole.engine.module.absent = (1, 2)
    norms, found = steps(whole, 5), written(ranks[GAP])
    assert not any(key.startswith(("submodule-001", "submodule-002")) for key in found)
    expected = {"norms": norms, "state": {key: tensor for key, tensor in state(whole).items() if key in found}}
    assert_equal(ranks[GAP], expected, 1e-5)


def test_absent_submodules_stay_bit_equal_through_every_save(base: Path, ranks: dict[str, Any]) -> None:
    for name, (run, overrides) in THREE_RANKS.items():
        absent = 3 if ABSENT_LAST in overrides else 0
        expected = files(base / run, absent)
        assert len(expected) == (3 if "adamw" in run else 2)
        assert files(base / name, absent) == expected
        assert files(base / name, 1) != files(base / run, 1)
    kept = [path.name for path in (base / "the last is absent/checkpoints").glob("step-*")]
    assert kept == ["step-00000005"]
    assert {**files(base / GAP, 1), **files(base / GAP, 2)} == {
        **files(base / "hsvit, adamw", 1),
        **files(base / "hsvit, adamw", 2),
    }


def test_submodules_that_come_back_are_loaded_bit_equal(base: Path, ranks: dict[str, Any]) -> None:
    latest = pointed(base / "hsvit, adamw/checkpoints", "latest")
    assert latest is not None
    for case in BACK:
        found = written(ranks[case], "loaded")
        kinds = ("", ".optimizer", ".ema")
        saved = {
            f"submodule-000{kind}.safetensors/{name}": tensor
            for kind in kinds
            for name, tensor in load_file(latest / f"submodule-000{kind}.safetensors").items()
        }
        for key, tensor in saved.items():
            if "/step/" not in key:
                assert torch.equal(found[key], tensor), key
        assert {float(tensor) for key, tensor in found.items() if "/step/" in key} == {5.0}


def run_arguments(root: Path, *more: str) -> list[str]:
    small = [*SMALL, "model.submodules=4", "grid.submodule_ranks=1", "run.global_batch=228", "run.log_every=2"]
    return ["recipes/digits/hsvit.toml", *small, "run.epochs=1", f"run.root={root}", *more]


@pytest.fixture(scope="module")
def lost_at_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that loses submodule 3 before its first step, trained to its end without it."""
    root = tmp_path_factory.mktemp("lost")
    main(run_arguments(root, "run.survive=degraded"))
    folder = root / "digits-hsvit-001"
    (folder / "checkpoints/latest").write_text("step-00000000")
    (folder / "metrics.jsonl").write_text("")
    main(run_arguments(root, "run.survive=degraded", "--resume", ABSENT_LAST))
    return folder


def test_a_run_that_may_lose_submodules_can_lose_them_before_its_first_step(lost_at_once: Path) -> None:
    first = lost_at_once / "checkpoints/step-00000000"
    weights = load_file(first / "submodule-003.safetensors")
    assert not list(first.glob("*.optimizer.*"))
    last = pointed(lost_at_once / "checkpoints", "latest")
    assert last is not None
    assert last.name.startswith("step-00000005")
    for name, tensor in load_file(last / "submodule-003.safetensors").items():
        assert torch.equal(tensor, weights[name])
    assert moments(lost_at_once, 3).keys() == moments(lost_at_once, 2).keys()
    assert not any(tensor.any() for tensor in moments(lost_at_once, 3).values())
    whole = trainer(lost_at_once, ["model.submodules=4", "grid.submodule_ranks=1", "run.global_batch=228"], True)
    whole.start = Position(0, 0, 0)
    assert all(math.isfinite(norm) for norm in steps(whole, 2))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_from_before_the_first_step_begins_anew(stage: int, tmp_path: Path) -> None:
    run = trainer(tmp_path, [*ADAMW, "grid.submodule_ranks=1", f"engine.zero_stage={stage}"])
    run.checkpoints.save(run.start)
    assert run.checkpoints.wait() is None
    norms, first = steps(run, 3), state(run)
    assert run.checkpoints.load() == run.start
    assert steps(run, 3) == norms
    for key, tensor in state(run).items():
        assert torch.equal(tensor, first[key]), key


def test_every_interval_says_how_many_submodules_are_present(lost_at_once: Path) -> None:
    lines = [json.loads(line) for line in (lost_at_once / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    assert len(logged) == 3
    assert {line["train/submodules_present"] for line in logged} == {3.0}
    assert all(math.isfinite(line["train/loss"]) for line in logged)


def test_a_degraded_run_is_scored_as_it_was_trained(lost_at_once: Path) -> None:
    lines = [json.loads(line) for line in (lost_at_once / "metrics.jsonl").read_text().splitlines()]
    (scored,) = [line["test/loss"] for line in lines if "test/loss" in line]
    run = open_run(lost_at_once)
    assert run.evaluate("test", run.trained)[0]["loss"] == pytest.approx(scored, rel=1e-6)
    ((score,),) = run.evaluate_subsets("test", run.subsets("0,1,2"), run.trained)
    assert score.loss == pytest.approx(scored, rel=1e-6)
    assert max(len(subset) for subset in run.subsets("sweep")) == 3
    assert {number for subset in run.subsets("sweep") for number in subset} == {0, 1, 2}
    with pytest.raises(RefusedError, match=r"its last steps were without submodules \[3\]"):
        run.at(*run.trained)


def test_a_run_without_a_checkpoint_cannot_begin_degraded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(run_arguments(tmp_path, "--resume", ABSENT_LAST))
    assert caught.value.code == 2
    assert "has no checkpoint with these submodules; start the run whole first" in capsys.readouterr().err


def test_damaged_files_of_absent_submodules_are_refused_and_never_carried_over(base: Path, tmp_path: Path) -> None:
    start = copied(base / "hsvit, adamw", tmp_path)
    latest = pointed(start / "checkpoints", "latest")
    assert latest is not None
    overrides = [*ADAMW, "grid.submodule_ranks=1", ABSENT_LAST]
    run = trainer(start, overrides, resume=True)
    file = latest / "submodule-003.optimizer.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    run.checkpoints.save(Position(0, 3, 3))
    failure = run.checkpoints.wait()
    assert failure is not None
    assert "submodule-003.optimizer.safetensors: changed since it was saved" in failure
    assert pointed(start / "checkpoints", "latest") == latest
    with pytest.raises(RefusedError, match=r"submodule-003.optimizer.safetensors: changed since it was saved"):
        trainer(start, overrides, resume=True)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("hsvit", "grid.absent=[1,0]", "[grid] absent = [1, 0]: must be different numbers from 0 on"),
        ("hsvit", "grid.absent=[1,1]", "[grid] absent = [1, 1]: must be different numbers from 0 on"),
        ("hsvit", "grid.absent=[-1]", "[grid] absent = [-1]: must be different numbers from 0 on"),
        ("hsvit", "grid.absent=[8]", "grid.absent = [8]: the submodules have numbers from 0 to 7"),
        ("hsvit", "grid.absent=[0,1,2,3,4,5,6,7]", "all 8 submodules; at least one must be present"),
        (
            "hsvit",
            "grid.absent=[2,3] grid.submodule_ranks=4",
            "grid.submodule_ranks = 4 does not divide model.submodules = 8 without grid.absent = [2, 3]; use one of "
            "[3, 6]",
        ),
        (
            "hsvit",
            "grid.absent=[2,3] grid.submodule_ranks=2",
            "grid.submodule_ranks = 2 would give a rank submodules whose numbers do not follow each other, of "
            "[0, 1, 4, 5, 6, 7]; use one of [3, 6]",
        ),
        ("scala", "grid.absent=[0]", "grid.absent = [0]: this model has one submodule, or none; leave it empty"),
        ("scala", "run.survive=degraded", 'run.survive = "degraded": there are no submodules to go on without'),
        ("scala", "run.survive=maybe", '[run] survive = "maybe": must be "restart" or "degraded"'),
    ],
)
def test_what_cannot_be_absent_is_refused_in_one_line(recipe: str, overrides: str, message: str) -> None:
    eight = ["model.submodules=8", "grid.submodule_ranks=1"] if recipe == "hsvit" else []
    with pytest.raises(RefusedError) as caught:
        recipes.resolve(recipes.read(ROOT / f"recipes/digits/{recipe}.toml", [*eight, *overrides.split()]), 12)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hsvit", "hybrid"])
def test_a_degraded_rank_needs_as_much_memory_as_before(name: str) -> None:
    read = [ROOT / f"recipes/digits/{name}.toml", ["model.submodules=4", "run.global_batch=48"]]
    whole = needed(*recipes.resolve(recipes.read(read[0], [*read[1], "grid.submodule_ranks=4"]), 4))
    lost = needed(*recipes.resolve(recipes.read(read[0], [*read[1], "grid.submodule_ranks=3", ABSENT_FIRST]), 3))
    assert (lost.gradients, lost.optimizer) == (whole.gradients, whole.optimizer)


@pytest.fixture
def run(base: Path) -> SavedRun:
    return open_run(base / "hsvit, adamw")


def test_a_sweep_scores_every_subset_in_one_pass_over_the_data(run: SavedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    subsets = run.subsets("sweep")
    assert [len(subset) for subset in subsets] == [1] * 4 + [2] * 6 + [3] * 4 + [4]
    assert len(set(subsets)) == 15
    read, splits = run.reader.evaluation, []
    monkeypatch.setattr(run.reader, "evaluation", lambda split: splits.append(split) or read(split))
    (scores,) = run.evaluate_subsets("val", subsets, run.trained)
    assert splits == ["val"]
    for subset, score in zip(subsets, scores, strict=True):
        present = torch.tensor([number in subset for number in range(4)])

        def forward(*args: Any, present: Tensor = present, **kwargs: Any) -> Tensor:
            return run.model(*args, present=present, **kwargs)

        alone = evaluate(forward, run.model, run.reader, "val")
        assert (score.top1, score.top5) == (alone["top1"], alone["top5"])
        assert score.loss == pytest.approx(alone["loss"], rel=1e-6)
    assert len({score.loss for score in scores}) == 15


def test_of_many_submodules_a_sweep_draws_the_same_subsets_every_time() -> None:
    eight = recipes.read(ROOT / "recipes/digits/hsvit.toml", ["model.submodules=8"])
    run = SavedRun(Path("run"), None, eight, (), 0)  # type: ignore[arg-type]
    subsets = run.subsets("sweep")
    assert [sum(len(s) == size for s in subsets) for size in range(1, 9)] == [8, 20, 20, 20, 20, 20, 8, 1]
    assert len(set(subsets)) == len(subsets)
    assert subsets == run.subsets("sweep")
    assert all(set(subset) <= set(range(8)) for subset in subsets)
    assert {number for subset in subsets if len(subset) == 2 for number in subset} == set(range(8))
    assert SUBSETS == 20


def test_the_command_prints_and_draws_how_many_submodules_are_needed(run: SavedRun) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(run.folder), "--present", "sweep", "--split", "val"])
    assert result.exit_code == 0, result.output
    for line in (
        "│ 1                  │ 4       │",
        "│ 2                  │ 6       │",
        "│ 4                  │ 1       │",
    ):
        assert line in result.output
    assert (run.folder / f"evaluate-present-val-step-{run.steps}.png").stat().st_size > 10_000
    result = CliRunner().invoke(app, ["evaluate", str(run.folder), "--present", "2,0", "--split", "val"])
    assert result.exit_code == 0, result.output
    ((score,),) = run.evaluate_subsets("val", [(0, 2)], run.trained)
    assert f"val, step {run.steps}, submodules 0, 2 of 4: top-1 {score.top1:.2f} %" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--present 0,4", "--present 0,4: must be sweep, or numbers from 0 to 3, as in 0,3"),
        ("--present 0,x", "--present 0,x: must be sweep, or numbers from 0 to 3"),
        ("--present 0 --widths 0.5", "width 0.5: must be 1, this model's only one"),
        ("--present 0 --split dev", "--split dev: must be one of train, val, test"),
    ],
)
def test_what_cannot_be_scored_is_refused(run: SavedRun, arguments: str, message: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(run.folder), *arguments.split()])
    assert result.exit_code == 2
    assert message in result.output


def test_a_model_without_submodules_has_no_subsets() -> None:
    whole = recipes.read(ROOT / "recipes/digits/scala.toml")
    with pytest.raises(RefusedError, match=r"--present 0: the model of run has no submodules; leave it out"):
        SavedRun(Path("run"), None, whole, (), 0).subsets("0")  # type: ignore[arg-type]
