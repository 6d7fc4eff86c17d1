"""Profiles of real runs: they change nothing, miss nothing, and keep what was traced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.results import profile, trace
from hsvit_ds.run import profiling
from hsvit_ds.run.clock import Clock
from hsvit_ds.run.profiling import FOLDER, WARM, TracedError
from hsvit_ds.spans import Part

from ..engine.test_checkpoint import assert_equal, latest, train_arguments
from ..ranks import ROOT, finish, fork
from ..workers.common import BASES, SMALL, trainer

pytestmark = pytest.mark.heavy


class Counted(TorchDispatchMode):
    """Counts the operations of PyTorch: a clock on which every machine is as fast."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Counted.operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("base", "stage"),
    [
        *[pytest.param(base, 0, marks=() if base in ("hsvit", "scala") else pytest.mark.slow) for base in BASES],
        pytest.param("hybrid", 1, marks=pytest.mark.slow),
        ("hybrid", 3),
    ],
)
def test_whatever_a_step_computes_lies_in_a_span(
    base: str, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "_now", lambda self: Counted.operations)
    monkeypatch.setattr(profiling, "COUNTED", 1)
    keys = ["tracking.profile=2", "grid.submodule_ranks=1", f"engine.zero_stage={stage}", "ema.decay=0.9"]
    run = trainer(tmp_path, keys, base=base)
    with Counted(), pytest.raises(TracedError):
        run._train_epoch(0, 0)
    run.profile.close()
    (rank,) = profile.read(tmp_path)
    assert [step.number for step in rank.steps] == [WARM + 1, WARM + 2]
    whole = rank.seconds / len(rank.steps)
    assert whole > 100
    parts = profile.by_part(rank)
    assert sum(parts.values()) >= 0.98 * whole, parts
    for part in (Part.AUGMENTATION, Part.FORWARD, Part.LOSS, Part.BACKWARD, Part.OPTIMIZER, Part.AVERAGE):
        assert sum(seconds for path, seconds in parts.items() if path[0] == part), part


def test_a_profiled_run_computes_what_it_would_have(uninterrupted: Path, tmp_path: Path) -> None:
    # It ends behind its fiftieth step; the rest from its checkpoint there without a profile.
    output = finish(fork("hsvit_ds.train", train_arguments(tmp_path, "tracking.profile=42"), 2))
    assert "traced 42 steps, by step 54" in output
    output = finish(fork("hsvit_ds.train", train_arguments(tmp_path, "--resume"), 2))
    assert "resumed at step 50" in output
    whole, parts = latest(uninterrupted), latest(tmp_path)
    assert whole is not None
    assert parts is not None
    assert_equal(parts, whole)
    ranks = profile.read(tmp_path / "digits-hsvit-001")
    assert [len(rank.steps) for rank in ranks] == [42, 42]
    assert {span.part for rank in ranks for step in rank.steps for span in step.spans} >= {
        *(Part.IMAGES, Part.COPY, Part.FORWARD, Part.TRUNK, Part.EMBEDDING, Part.ATTENTION, Part.HEAD, Part.EXCHANGE),
        *(Part.BACKWARD, Part.REDUCTION, Part.OPTIMIZER, Part.CHECKPOINT, Part.LOG, Part.AVERAGE),
    }


def test_a_run_that_ends_while_it_is_traced_keeps_what_was(tmp_path: Path) -> None:
    arguments = ["1", "step 25:", "SIGKILL", *train_arguments(tmp_path, "tracking.profile=42")]
    for process in fork("tests.workers.interrupted", arguments, 2):
        process.communicate(timeout=240)
    ranks = profile.read(tmp_path / "digits-hsvit-001")
    assert [[step.number for step in rank.steps] for rank in ranks] == [list(range(WARM + 1, 25))] * 2
    assert ranks[1].memory == 0 < ranks[0].memory


@pytest.mark.slow
def test_the_command_starts_the_ranks_and_shows_where_their_time_goes(tmp_path: Path) -> None:
    keys = [*SMALL, f"run.root={tmp_path}", "run.epochs=1", "checkpoint.every_steps=5"]
    command = ["profile", str(ROOT / "recipes/digits/hsvit.toml"), *keys, "--ranks", "2", "--steps", "7"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200", "OMP_NUM_THREADS": "1"})
    assert result.exit_code == 0, result.output
    folder = tmp_path / "digits-hsvit-profile-001"
    title = "digits-hsvit-profile: 7 steps, 2 ranks on 1 host, fp32"
    said = ("│   exchange", "rank 1, ms", "convolutions", "GMACs a step", "memory at most:", "engine.precision=bf16")
    for words in (title, *said):
        assert words in result.output, result.output
    assert f"trace, for ui.perfetto.dev: {folder / trace.FILE}" in result.output
    events = json.loads((folder / trace.FILE).read_text())["traceEvents"]
    steps = {(event["pid"], event["name"]) for event in events if event["name"].startswith("step ")}
    assert steps == {(rank, f"step {step}") for rank in range(2) for step in range(WARM + 1, WARM + 8)}


@pytest.mark.slow
def test_a_run_that_is_over_too_soon_is_told(tmp_path: Path) -> None:
    keys = [*SMALL, f"run.root={tmp_path}", "run.epochs=1", "run.global_batch=64"]
    command = ["profile", str(ROOT / "recipes/digits/hsvit.toml"), *keys, "--ranks", "1", "--steps", "20"]
    keys = ["grid.submodule_ranks=1", "run.global_batch=80", "augment.mix_block=1"]  # 14 steps
    result = CliRunner().invoke(app, [*command, *keys], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "hsvit: warning: 4 of 20 steps traced" in result.output


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.groups=3"], "model"),
        (["--ranks", "3"], "3"),
        (["--ranks", "2", "--hostfile", "hosts"], "--ranks and --hostfile"),
        (["run.root=/dev/null/runs"], "set run.root"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_a_rank_starts(keys: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["profile", str(ROOT / "recipes/digits/hsvit.toml"), *keys])
    assert result.exit_code == 2
    assert said in result.output


def test_where_the_folder_cannot_take_a_rank_s_spans_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("")
    with pytest.raises(Exception, match=r"tracking.profile = 3: .*; set run.root"):
        trainer(tmp_path, ["tracking.profile=3", "grid.submodule_ranks=1"])
