"""`make gpu` at toy size, to its end: without a GPU, and with and without the libraries that training needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.gpu import counters, here, ledger, report, steps

ROOT = Path(__file__).parents[2]
HIDDEN = (*(name for name in steps.ENGINE if name != "safetensors"), "einops", "mlflow", "scipy", "typer")
"""What a machine with torch, triton, numpy, timm and pytest need not have; nor is the checkout installed there."""
HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path[:] = [Hidden(), *(finder for finder in sys.meta_path if "editable" not in repr(finder))]
"""
STARTED = subprocess.Popen
TOY = {"device": "interpreter, not timed", "torch": "2", "triton": "3"}


def gpu(out: Path, *arguments: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", "tools.gpu", *arguments, "--toy", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return found.stdout + found.stderr


def states(out: Path) -> dict[str, dict[str, str]]:
    parts = json.loads((out / ledger.FILE).read_text())["parts"]
    return {part: {name: record["state"] for name, record in found.items()} for part, found in parts.items()}


def bare_machine(tmp_path: Path) -> str:
    """What `PYTHONPATH` is there."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/sitecustomize.py").write_text(HIDE)
    return str(tmp_path / "bare")


def test_it_starts_on_a_bare_machine(tmp_path: Path) -> None:
    said = gpu(tmp_path / "out", "report", PYTHONPATH=bare_machine(tmp_path))
    assert said == f"{tmp_path}/out/{ledger.FILE}: no such file; python -m tools.gpu all --out {tmp_path}/out\n"


@pytest.mark.slow
@pytest.mark.marathon
def test_every_part_comes_to_its_end_from_a_bare_machine_and_then_with_what_was_brought(tmp_path: Path) -> None:
    """Steps that lack nothing are done without the project's libraries; the others name what is missing, and are done
    once it is there; nothing is done twice; the report says what it is."""
    out = tmp_path / "out"
    said = gpu(out, "all", PYTHONPATH=bare_machine(tmp_path))
    bare = states(out)
    for part, found in steps.PARTS.items():
        for name, step in found.items():
            assert bare[part][name] == ("lacks" if step.needs == steps.ENGINE else "done"), (part, name, said)
    assert "training, fast: lacks, 0 s deepspeed, pydantic, webdataset, simplejpeg, tomli_w, hjson" in said
    again = gpu(out, "all")
    done = states(out)
    assert {state for found in done.values() for state in found.values()} == {"done"}, again
    assert "correctness" in again  # its engine tests were missing
    assert "tuning" not in again
    assert "benchmarks" not in again
    assert "scala" not in again
    gpu(out, "report")
    page = (out / "report/docs/performance.md").read_text()
    assert "| device | interpreter, not timed |" in page
    assert "| not timed |" in page
    assert page.startswith("# Performance\n")
    assert "Not run on a GPU yet" not in page
    for part, found in done.items():
        assert f"### {part.capitalize()}" in page
        assert all(f"| {name} | done |" in page for name in found)
    written = {str(file.relative_to(out / "report")) for file in (out / "report").rglob("*") if file.is_file()}
    results = "kernels/results"
    assert written == {
        f"{results}/interpreter-not-timed/results.json", f"{results}/kernels.csv", f"{results}/roofline.png",
        "docs/performance.md", "docs/training.png", "recipes/cifar10/README.md",
    }  # fmt: skip
    table = (out / "report/recipes/cifar10/README.md").read_text()
    assert table.count("s, interpreter, not timed |") == 4


def arguments(out: Path, *more: str) -> Any:
    from tools.gpu.__main__ import parse

    return parse(["tuning", "--out", str(out), *more])


def planned(monkeypatch: pytest.MonkeyPatch, **code: str) -> None:
    """A part "tuning" of steps that are these programs, given where their answer goes."""
    monkeypatch.setitem(steps.PARTS, "tuning", {name: steps.Step(lambda _here: {}) for name in code})

    def start(command: list[str], **options: Any) -> Any:
        part, _, name = command[command.index("--only") + 1].partition(": ")
        answer = steps._answer(Path(command[command.index("--out") + 1]), part, name)
        return STARTED(
            [sys.executable, "-c", f"import pathlib, sys, time\nanswer = {str(answer)!r}\n{code[name]}"], **options
        )

    monkeypatch.setattr(steps.subprocess, "Popen", start)


DONE = "pathlib.Path(answer).parent.mkdir(exist_ok=True); pathlib.Path(answer).write_text('{\"ms\": 1}')"


def test_a_step_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(monkeypatch, good=DONE, bad="raise ValueError('no such launch')", worse="import os; os.abort()", last=DONE)
    found = ledger.Ledger(tmp_path, TOY)
    assert steps.run_part("tuning", arguments(tmp_path), found) == 1
    assert states(tmp_path) == {"tuning": {"good": "done", "bad": "failed", "worse": "failed", "last": "done"}}
    said = capsys.readouterr().out
    assert "tuning, bad: failed, 0 s ValueError: no such launch (exit code 1)" in said
    assert "tuning, worse: failed, 0 s no output (exit code -6)" in said
    planned(monkeypatch, good="raise ValueError", bad=DONE, worse=DONE, last="raise ValueError")
    assert steps.run_part("tuning", arguments(tmp_path), ledger.Ledger(tmp_path, TOY)) == 0
    assert set(states(tmp_path)["tuning"].values()) == {"done"}  # those that were done were left alone


def test_a_part_ends_in_its_time_and_goes_on_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "LAST", 0.5)
    planned(monkeypatch, good=DONE, slow="time.sleep(600)", last=DONE)
    steps.run_part("tuning", arguments(tmp_path, "--limit", "3"), ledger.Ledger(tmp_path, TOY))
    assert states(tmp_path)["tuning"] == {"good": "done", "slow": "cut off"}
    assert "tuning, last: no time left, the next call goes on" in capsys.readouterr().out
    planned(monkeypatch, good="raise ValueError", slow=DONE, last=DONE)
    steps.run_part("tuning", arguments(tmp_path), ledger.Ledger(tmp_path, TOY))
    assert set(states(tmp_path)["tuning"].values()) == {"done"}


def test_results_of_another_device_are_refused(tmp_path: Path) -> None:
    ledger.Ledger(tmp_path, TOY).note("tuning", "good", ledger.Record("done"))
    with pytest.raises(SystemExit, match=r"has results of interpreter, not timed, this is NVIDIA H200: choose another"):
        ledger.Ledger(tmp_path, TOY | {"device": "NVIDIA H200"})
    with pytest.raises(SystemExit, match=r"no such file; python -m tools\.gpu all"):
        report.write(tmp_path / "nowhere")


def test_the_report_is_the_last_part_of_its_page(tmp_path: Path) -> None:
    machine = dict.fromkeys(("torch", "triton"), "1") | {"device": "interpreter, not timed"}
    record = {"state": "done", "seconds": 1, "why": "", "figures": {"passed": 3, "failed": 0, "skipped": 1}}
    (tmp_path / ledger.FILE).write_text(json.dumps({"machine": machine, "parts": {"correctness": {"kernels": record}}}))
    report.write(tmp_path)
    committed = (ROOT / "docs/performance.md").read_text()
    written = (tmp_path / "report/docs/performance.md").read_text()
    by_hand = committed[: committed.index("<!-- written by python -m tools.gpu report, from here on -->")]
    assert written.startswith(by_hand)
    assert "kernels: 3 passed, 0 failed, 1 skipped." in written[len(by_hand) :]
    assert "Not run" not in written[len(by_hand) :]


def test_a_full_disk_loses_no_figure_and_spoils_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ledger.Ledger(tmp_path, TOY)
    found.note("tuning", "first", ledger.Record("done", 1.0))

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger.os, "fsync", full)
    found.note("tuning", "second", ledger.Record("done", 2.0, figures={"ms": 0.4}))
    assert 'No space left on device; second: {"state": "done", "seconds": 2.0' in capsys.readouterr().out
    assert states(tmp_path) == {"tuning": {"first": "done"}}
    assert [file.name for file in tmp_path.iterdir()] == [ledger.FILE]
    monkeypatch.undo()
    found.note("tuning", "third", ledger.Record("done"))
    assert states(tmp_path) == {"tuning": {"first": "done", "second": "done", "third": "done"}}


def test_what_does_not_fit_into_the_memory_is_made_smaller_and_that_is_said() -> None:
    tried = []

    def run(batch: int) -> int:
        tried.append(batch)
        if batch > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch * 2

    assert here.fitting(512, run) == (64, 128)
    assert tried == [512, 256, 128, 64]
    assert here.smaller(512, 64) == "batch 64 instead of 512: the GPU has too little memory"
    assert here.smaller(64, 64) == ""
    with pytest.raises(torch.OutOfMemoryError):
        here.fitting(4, lambda batch: run(batch + 200))


def test_the_wheels_to_bring_are_the_locked_ones() -> None:
    said = steps.wheels()
    assert "deepspeed==0.19.8" in said
    for name in ("pydantic", "pydantic-core", "webdataset", "braceexpand", "simplejpeg", "tomli-w", "hjson"):
        assert f" {name}==" in said


NCU = """
  grouped_attention_forward (64, 16, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    Duration                         us       694.08
    SM Active Cycles              cycle 1,199,022.92
    ----------------------- ----------- ------------
    INF   ALU is the highest-utilized pipeline (31.6%) based on elapsed cycles
    Local Memory Spilling Requests                                0
    Executed Instructions                           inst  246,038,528
    smsp__pcsamp_warps_issue_stalled_wait                                 1,500
    smsp__pcsamp_warps_issue_stalled_wait_not_issued                      1,400
    smsp__pcsamp_warps_issue_stalled_barrier                                500
  weight_gradients (784, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us        81.10
"""


def test_what_nsight_compute_prints_is_read() -> None:
    forward, other = counters.parsed(NCU)
    waits = {"wait": 75.0, "barrier": 25.0}
    assert forward == {
        "kernel": "grouped_attention_forward", "waits": waits, "Duration": "694.08 us",
        "Local Memory Spilling Requests": "0", "Executed Instructions": "246,038,528 inst",
    }  # fmt: skip
    assert other == {"kernel": "weight_gradients", "waits": {}, "Duration": "81.10 us"}


def test_every_recipe_of_cifar10_that_is_measured_has_its_row() -> None:
    curves = [(name, {"last": 90.0, "steps": 1, "seconds": 2.0}) for name in steps.PARTS["training"]]
    text = report.with_results((ROOT / "recipes/cifar10/README.md").read_text(), curves, "NVIDIA H100")
    assert text.count("| 90.00 after 1 step | 2.0 s, NVIDIA H100 |") == len(curves) == 4
