"""A run stopped anywhere and resumed equals the uninterrupted one; nothing broken is ever loaded."""

from __future__ import annotations

import json
import random
import shutil
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hsvit_ds.engine.checkpoint
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.engine.checkpoint_files import pointed, read_file, read_manifest
from hsvit_ds.errors import RefusedError
from hsvit_ds.run import opening
from hsvit_ds.run.trainer import Trainer
from hsvit_ds.train import main
from hsvit_kernels.mask import MASK

from ..ranks import finish, fork, start, work
from ..workers.common import SMALL, state, steps, trainer

pytestmark = pytest.mark.heavy

RECIPE = "recipes/digits/hsvit.toml"
EMA = ["ema.decay=0.9", "optimizer.name=adamw"]
HYBRID = "a hybrid: ZeRO-1, then ZeRO-3 on submodule ranks, then ZeRO-0"


def segment(folder: Path, start: int, stop: int, ranks: int, stage: int = 1, base: str = "hsvit") -> dict[str, Any]:
    overrides = [*EMA, f"grid.submodule_ranks={ranks}", f"engine.zero_stage={stage}"]
    if base == "hybrid":
        overrides += ["model.backbone.trained_stages=2", "optimizer.lr=0.001"]
    return {"folder": str(folder), "start": start, "stop": stop, "overrides": overrides, "base": base}


def merged(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: tensor for rank in states for key, tensor in rank.items()}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Final states of runs that changed their placement twice, and of the uninterrupted ones."""
    base = tmp_path_factory.mktemp("resumed")
    ranks, grid, stages = base / "ranks", base / "grid", base / "stages"
    work("segments", 4, base / "a", [segment(grid, 0, 3, 2)])
    two = work(
        "segments",
        2,
        base / "b",
        [
            segment(base / "whole", 0, 9, 2),
            segment(grid, 3, 9, 2),
            segment(base / "whole stages", 0, 9, 1, 1, "hybrid"),
            segment(stages, 0, 3, 1, 1, "hybrid"),
            segment(stages, 3, 6, 2, 3, "hybrid"),
            segment(stages, 6, 9, 1, 0, "hybrid"),
            segment(ranks, 0, 3, 2),
        ],
    )
    work("segments", 1, base / "c", [segment(ranks, 3, 6, 1)])
    back = work("segments", 2, base / "d", [segment(ranks, 6, 9, 2)])
    names = ("whole", "2 x 2 to 2 x 1", "whole stages", "", "", HYBRID, "")
    states = {name: merged([rank[i] for rank in two]) for i, name in enumerate(names)}
    return states | {"2 ranks to 1 and back": merged([rank[0] for rank in back])}


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("2 ranks to 1 and back", "whole"),
        ("2 x 2 to 2 x 1", "whole"),
        (HYBRID, "whole stages"),
    ],
)
def test_a_resume_on_another_placement_equals_the_uninterrupted_run(
    name: str, whole: str, resumed: dict[str, dict[str, Tensor]]
) -> None:
    found, expected = resumed[name], resumed[whole]
    assert found.keys() == expected.keys()
    assert any(".ema." in key for key in expected)
    assert any("exp_avg_sq/" in key for key in expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_a_frozen_part_stays_bit_equal(resumed: dict[str, dict[str, Tensor]]) -> None:
    state = resumed[HYBRID]
    frozen = [key for key in state if "backbone.net.conv1" in key and key.endswith("weight")]
    assert len(frozen) == 5  # of the stem; no moments, and the EMA averages trained parameters only
    for key in frozen:
        assert torch.equal(state[key], resumed["whole stages"][key])


def train_arguments(root: Path, *more: str) -> list[str]:
    overrides = [*SMALL, "ema.decay=0.9", "run.epochs=1", "checkpoint.every_steps=10", f"run.root={root}"]
    return [RECIPE, *overrides, *more]


def files(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.name}/{key}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def assert_equal(found: Path, expected: Path) -> None:
    """Two checkpoints hold the same tensors, bit for bit."""
    here, there = files(found), files(expected)
    assert here.keys() == there.keys()
    for key, tensor in there.items():
        assert torch.equal(here[key], tensor), key


def latest(root: Path) -> Path | None:
    return pointed(root / "digits-hsvit-001" / "checkpoints", "latest")


def test_a_run_killed_in_mid_epoch_and_resumed_is_bit_equal(uninterrupted: Path, tmp_path: Path) -> None:
    ranks = start("hsvit_ds.train", train_arguments(tmp_path), 2)
    deadline = time.monotonic() + 120
    while (found := latest(tmp_path)) is None or found.name < "step-00000020":
        assert time.monotonic() < deadline, "no checkpoint after 120 s"
        assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()[0]
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
        rank.wait()
    killed_at = latest(tmp_path)
    assert killed_at is not None
    assert "step-00000020" <= killed_at.name < "step-00000071"
    output = finish(fork("hsvit_ds.train", train_arguments(tmp_path, "--resume"), 2))
    assert f"resumed at step {int(killed_at.name[-8:])}" in output
    whole, parts = latest(uninterrupted), latest(tmp_path)
    assert whole is not None
    assert parts is not None
    assert_equal(parts, whole)
    lines = [
        [json.loads(line) for line in (root / "digits-hsvit-001/metrics.jsonl").read_text().splitlines()]
        for root in (uninterrupted, tmp_path)
    ]
    losses = [{line["step"]: line["train/loss"] for line in run if "train/loss" in line} for run in lines]
    assert losses[0].keys() == losses[1].keys()
    assert len(lines[0]) == len(lines[1]), "a step is logged twice or not at all"


def small(folder: Path) -> Trainer:
    return trainer(folder, ["grid.submodule_ranks=1", "checkpoint.keep_last=2"])


def test_the_last_and_the_best_checkpoints_stay(tmp_path: Path) -> None:
    checkpoints = small(tmp_path).checkpoints
    for step, top1 in enumerate([50.0, 90.0, None, 80.0, 85.0], 1):
        assert checkpoints.save(Position(0, step, step), top1) is None
    assert checkpoints.wait() is None
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "best", "step-00000002", "step-00000004", "step-00000005"}
    assert pointed(tmp_path / "checkpoints", "best") == tmp_path / "checkpoints/step-00000002"


def test_a_save_that_fails_leaves_the_one_before_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = small(tmp_path).checkpoints
    checkpoints.save(Position(0, 1, 1))
    checkpoints.wait()
    written = hsvit_ds.engine.checkpoint.write_synced

    def full_disk(path: Path, data: bytes) -> None:
        if path.name.startswith("submodule-001"):
            raise OSError(28, "No space left on device", str(path))
        written(path, data)

    monkeypatch.setattr(hsvit_ds.engine.checkpoint, "write_synced", full_disk)
    checkpoints.save(Position(0, 2, 2))
    failure = checkpoints.wait()
    assert failure is not None
    assert "No space left on device" in failure
    assert pointed(tmp_path / "checkpoints", "latest") == tmp_path / "checkpoints/step-00000001"
    monkeypatch.undo()
    assert not list((tmp_path / "checkpoints").glob("*.partial"))  # the room it took is given back
    (tmp_path / "checkpoints/step-00000003.partial").mkdir()  # of a process that was killed
    again = small(tmp_path).checkpoints
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert again.load() == Position(0, 1, 1)


def test_a_manifest_tells_where_a_checkpoint_comes_from(tmp_path: Path) -> None:
    run = small(tmp_path)
    run.checkpoints.save(Position(0, 1, 1, logged=77), 12.5)
    run.checkpoints.wait()
    manifest = json.loads((tmp_path / "checkpoints/step-00000001/manifest.json").read_text())
    assert manifest["position"] == {"epoch": 0, "step": 1, "total": 1, "lr_factor": 1.0, "logged": 77}
    assert manifest["top1"] == 12.5
    assert manifest["dropout_mask"] == MASK
    assert manifest["recipe"]["model"]["groups"] == 4
    assert {"python", "hsvit-ds", "torch", "deepspeed"} == manifest["versions"].keys()
    assert {"head.safetensors", "submodule-000.safetensors", "submodule-001.safetensors"} == manifest["files"].keys()


BROKEN = {
    "truncated": ("bytes, not", lambda file: file.write_bytes(file.read_bytes()[:-100])),
    "flipped byte": (
        "sha256 differs",
        lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    ),
    "missing file": ("No such file", lambda file: file.unlink()),
    "missing manifest": ("manifest.json: not readable", lambda file: (file.parent / "manifest.json").unlink()),
    "missing folder": ("which is missing", lambda file: shutil.rmtree(file.parent)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(
    kind: str, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message, damage = BROKEN[kind]
    root = tmp_path / "runs"
    shutil.copytree(uninterrupted, root)
    folder = latest(root)
    assert folder is not None
    damage(folder / "submodule-001.safetensors")
    refused(train_arguments(root, "--resume", "grid.submodule_ranks=1"), message, capsys)


def test_a_flipped_byte_anywhere_in_a_checkpoint_is_detected(uninterrupted: Path, tmp_path: Path) -> None:
    folder = latest(uninterrupted)
    assert folder is not None
    draw = random.Random(0)

    def read_everything(copy: Path) -> None:
        manifest = read_manifest(copy)
        for file in manifest["files"]:
            read_file(copy, file, manifest)

    read_everything(folder)
    for path in sorted(folder.iterdir()):
        for offset in (0, draw.randrange(path.stat().st_size), path.stat().st_size - 1):
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            data = bytearray(path.read_bytes())
            data[offset] ^= 1 << draw.randrange(8)
            (copy / path.name).write_bytes(data)
            with pytest.raises(RefusedError, match=r"sha256 differs"):
                read_everything(copy)


def test_a_checkpoint_of_another_architecture_is_refused(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(uninterrupted, root)
    arguments = train_arguments(root, "--resume", "grid.submodule_ranks=1", "model.depth=1")
    refused(arguments, "model.depth is 2 there and 1 here", capsys)


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which saves ten seconds of imports a case."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hsvit: error:")]
    assert message in error


def test_a_checkout_without_installed_metadata_saves_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = hsvit_ds.engine.checkpoint.version

    def version(name: str) -> str:
        if name.startswith("hsvit"):
            raise PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(hsvit_ds.engine.checkpoint, "version", version)
    run = trainer(tmp_path, ["grid.submodule_ranks=1"])
    assert run.checkpoints.save(Position(0, 0, 0)) is None
    assert run.checkpoints.wait() is None
    folder = pointed(tmp_path / "checkpoints", "latest")
    assert folder is not None
    assert read_manifest(folder)["versions"]["hsvit-ds"] == hsvit_ds.__version__


EARLIER = Path(__file__).with_name("format_2")  # of 27 November 2026, three steps, before the packages were moved
TINY = ["model.kernels=[2,4]", "model.pool_strides=[4,4]", "model.groups=2", "model.heads=2", "model.embedding=4"]


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    run = trainer(tmp_path, [*EMA, *TINY, "model.depth=1", "grid.submodule_ranks=1"], resume=True)
    assert run.start == Position(0, 3, 3)
    found, saved = state(run), files(EARLIER / "checkpoints/step-00000003")
    assert found.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(found[key], tensor), key
    # What the version that wrote it computed from there on.
    assert steps(run, 6) == pytest.approx([0.7898379564, 0.7205404639, 0.6038817763], rel=1e-4)
    assert run.checkpoints.dropout_mask == 1


@pytest.mark.parametrize(("tokens", "told"), [(17, False), (18, True), (33, True), (34, False)])
def test_a_run_whose_dropout_has_been_drawn_otherwise_says_so(tokens: int, told: bool, tmp_path: Path) -> None:
    kernels = f"model.kernels=[2,{2 * (tokens - 1)}]"
    run = trainer(tmp_path, [*TINY, kernels, "model.depth=1", "model.dropout=0.1", "grid.submodule_ranks=1"])
    for dropout_mask in (1, MASK):
        where = tmp_path, run.start, (), dropout_mask
        said = "\n".join(opening.lines(run.recipe, run.plan, run.grid, run.engine, run.reader, *where))
        found = "warning: so far attention's dropout was drawn by definition 1, from here on by 2" in said
        assert found == (told and dropout_mask == 1)
