"""What a person starts: the launchers, the default recipe, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..ranks import ROOT, environment, fork, free_port, start
from ..workers.common import SMALL

pytestmark = pytest.mark.heavy

RECIPE = "recipes/digits/hsvit.toml"
SHORT = [*SMALL, "run.epochs=1", "run.global_batch=128"]


def run(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=280, check=False
    )


def executable(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def weights(root: Path) -> dict[str, torch.Tensor]:
    (folder,) = (root / "digits-hsvit-001/checkpoints").glob("step-*")
    return {
        f"{part}/{name}": tensor
        for part in ("submodule-000", "submodule-001", "head")
        for name, tensor in load_file(folder / f"{part}.safetensors").items()
    }


@pytest.mark.parametrize(("overrides", "code"), [(SHORT, 0), (["model.groups=3"], 2)], ids=["finished", "refused"])
def test_nothing_that_aborts_while_python_ends_changes_how_a_rank_ended(
    overrides: list[str], code: int, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "class Thread:\n    def __del__(self, abort=os.abort): abort()\n"
        "sys.thread = Thread()\n"
        "atexit.register(lambda: print('what was asked for at the end is done'))\n"
    )
    path = f"{tmp_path}:{ROOT}"
    ranks = start("hsvit_ds.train", [RECIPE, *overrides, f"run.root={tmp_path}"], 2, PYTHONPATH=path)
    outputs = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code, code], outputs
    assert all("what was asked for at the end is done" in output for output in outputs)


@pytest.mark.slow
def test_deepspeed_torchrun_and_python_give_the_same_weights(tmp_path: Path) -> None:
    # SGD, as AdamW turns rounding where a gradient is nearly zero into steps; tests/grid/test_grid.py has both.
    module, overrides = "hsvit_ds.train", [RECIPE, *SHORT, "optimizer.name=sgd"]
    torchrun = [executable("torchrun"), "--standalone", "--nproc_per_node=2", "-m", module]
    deepspeed = [executable("deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    commands = {
        "deepspeed": [*deepspeed, "--module", module, *overrides],
        "torchrun": [*torchrun, *overrides],
        "python": [sys.executable, "-m", module, *overrides, "grid.submodule_ranks=1"],
    }
    for name, command in commands.items():
        done = run([*command, f"run.root={tmp_path / name}"])
        assert done.returncode == 0, done.stdout + done.stderr
    found = {name: weights(tmp_path / name) for name in commands}
    for key, tensor in found["deepspeed"].items():
        assert torch.equal(found["torchrun"][key], tensor), key
        torch.testing.assert_close(found["python"][key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_of_the_default_recipe_is_seen_in_mlflow_and_resumed_there(tmp_path: Path) -> None:
    """`make train`'s command, for one epoch of ten: README shows what it reaches, which tests/test_docs.py runs."""
    command = [executable("deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    command += ["--module", "hsvit_ds.train", RECIPE, "run.epochs=1", f"run.root={tmp_path}"]
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("hsvit-ds")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["model.variant"] == "C2A2"
    expected = {"train/loss", "train/grad_norm", "train/lr", "val/top1", "comm/exchange_bytes"}
    expected |= {"perf/images_per_sec", "perf/step_ms_p50", "perf/data_wait"}
    assert expected <= tracked.data.metrics.keys()
    assert tracked.data.metrics["comm/exchange_bytes"] == 32 * 64 * 4
    folder = tmp_path / "digits-hsvit-001"
    assert {"recipe.toml", "curves.png", "classes.txt"} <= {a.path for a in client.list_artifacts(tracked.info.run_id)}
    assert (folder / "curves.png").stat().st_size > 10_000
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    history = client.get_metric_history(tracked.info.run_id, "val/top1")
    assert [m.value for m in history] == [line["val/top1"] for line in logged if "val/top1" in line]
    assert "step 35/35" in done.stdout
    assert f"│ {tracked.data.metrics['test/top1']:.2f}" in done.stdout

    resume = [sys.executable, "-m", "hsvit_ds.train", RECIPE, "run.epochs=1", f"run.root={tmp_path}", "--resume"]
    again = run([*resume, "grid.submodule_ranks=1"])
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed at step 35" in again.stdout
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_an_mlflow_server_that_is_down_is_said_at_first_and_at_last_and_costs_nothing_else(
    tmp_path: Path,
) -> None:
    overrides = [*SHORT, "tracking.mlflow=true", f"tracking.uri=http://127.0.0.1:{free_port()}"]
    arguments = [RECIPE, *overrides, "grid.submodule_ranks=1", f"run.root={tmp_path}", "run.log_every=1"]
    done = run([sys.executable, "-m", "hsvit_ds.train", *arguments], MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert done.returncode == 0, done.stdout + done.stderr
    at_first, at_last = (line for line in done.stderr.splitlines() if "hsvit: warning:" in line)
    assert " is away; what it misses is sent when it is back: " in at_first
    assert f"`hsvit runs digits-hsvit-001 --runs {tmp_path} --to http://127.0.0.1:" in at_last
    lines = (tmp_path / "digits-hsvit-001/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, 9))


def refused(arguments: list[str], message: str, code: int = 2, **extra: str) -> None:
    done = run([sys.executable, "-m", "hsvit_ds.train", *arguments], **extra)
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == code, done.stdout + done.stderr
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([RECIPE, "model.dorpout=0.1"], 'unknown key "model.dorpout"; did you mean "model.dropout"?'),
        (["nowhere.toml"], "nowhere.toml: cannot be read (No such file or directory)"),
        ([RECIPE], "grid.submodule_ranks = 2 does not divide the 1 rank started: start a multiple of 2"),
        ([RECIPE, "grid.submodule_ranks=1", "run.root=/proc/runs"], "run folder /proc/runs/digits-hsvit-001: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    refused(arguments, message)


def test_a_stack_trace_is_shown_for_debug_only() -> None:
    done = run([sys.executable, "-m", "hsvit_ds.train", "nowhere.toml", "--debug"])
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        refused([RECIPE, "grid.submodule_ranks=1"], f"the ranks cannot meet at 127.0.0.1:{port}", **launcher)


def test_a_refusal_on_every_rank_is_printed_once(tmp_path: Path) -> None:
    ranks = fork("hsvit_ds.train", [RECIPE, "--resume", "run.root=/proc/runs"], 2)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "".join(outputs).count("hsvit: error:") == 1


def test_a_foreign_package_of_our_name_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "hsvit_kernels"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("__version__ = '9'\n")
    refused([RECIPE], f"hsvit_kernels at {foreign}", PYTHONPATH=str(tmp_path))


def test_the_run_ends_with_1_when_it_cannot_go_on(tmp_path: Path) -> None:
    arguments = [RECIPE, *SHORT, "grid.submodule_ranks=1", f"run.root={tmp_path}"]
    refused([*arguments, "optimizer.lr=1e30", "optimizer.clip=0", "engine.max_skipped_steps=2"], "steps in a row", 1)
