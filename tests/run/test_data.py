"""Runs on tar shards: killed and resumed elsewhere, on damaged data, on data or decoders that have changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from hsvit_ds.data import augment, decode
from hsvit_ds.data.index import open_index
from hsvit_ds.data.sources import Shards
from hsvit_ds.data.transform import Transform
from hsvit_ds.grid.grid import Grid
from hsvit_ds.run import metrics
from hsvit_ds.train import main

from ..ranks import ROOT, environment, finish, fork, start
from ..tars import data_set, encoded, make_index, old_index, picture, sample, write_split, write_tar
from ..workers.common import SMALL

pytestmark = pytest.mark.heavy

RECIPE = "recipes/digits/hsvit.toml"
STEPS, BATCH = 30, 16
ALONE = ["data.workers=0", "grid.submodule_ranks=1"]


@pytest.fixture(autouse=True)
def _the_group_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends leaves the process group, which here is that of all tests."""
    monkeypatch.setattr(Grid, "close", lambda grid: None)


def arguments(root: Path, data: Path, *more: str) -> list[str]:
    keys = ["run.epochs=1", "data.name=tiny", "data.classes=10", "data.image_size=32", "run.log_every=5"]
    keys += [f"run.root={root}", f"data.root={data}", "data.test=val", "data.max_bad_fraction=0.2"]
    return [RECIPE, *SMALL, *keys, *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_set(tmp_path_factory.mktemp("data"), train=STEPS * BATCH, val=24, shards=5)


def latest(root: Path) -> Path | None:
    pointer = root / "digits-hsvit-001/checkpoints/latest"
    return pointer.parent / pointer.read_text().strip() if pointer.exists() else None


def recorded(file: Path, ranks: int, submodule_ranks: int) -> dict[int, list[str]]:
    """{step: images} of the first rank of each replica."""
    found: dict[int, list[str]] = {}
    for rank in range(0, ranks, submodule_ranks):
        for line in Path(f"{file}.{rank}").read_text().splitlines():
            step, *images = line.split()
            found.setdefault(int(step), []).extend(images)
    return found


def pixels(data: Path) -> set[str]:
    """The images of the training split, as recorded."""
    index = open_index(data, "train")
    images = Shards(index, Transform(augment.Config(), 32, decode.installed("auto"), 0)).held_out(
        torch.arange(len(index))
    )
    return {hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in images.pixels}


def marked(mark: str) -> list[int]:
    """Processes that were started with MARK in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={mark}\0".encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("line", ["hsvit-ds ", "epoch 1 ", "step 65/"])
def test_ctrl_c_stops_a_run_and_its_workers_without_a_trace(line: str, data: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to the rank, the server of its workers, and them."""
    keys = ["data.workers=2", "grid.submodule_ranks=1", "run.epochs=1000", "data.eval_batch=12"]
    run = subprocess.Popen(
        [sys.executable, "-m", "hsvit_ds.train", *arguments(tmp_path, data, *keys)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    output = ""
    while line not in output:  # the first is printed before PyTorch is imported
        output += run.stdout.readline()
        assert run.poll() is None, output
    os.killpg(run.pid, signal.SIGINT)
    output += run.communicate(timeout=120)[0]
    assert "Traceback" not in output
    assert "KeyboardInterrupt" not in output
    assert "a data worker died" not in output
    begun = line != "hsvit-ds "
    assert run.returncode == (75 if begun else -signal.SIGINT), output
    assert ("; --resume continues" in output) == begun


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_request_to_stop_is_heard_while_images_do_not_come(ranks: int, data: Path, tmp_path: Path) -> None:
    """One rank saves where it stands; of several each leaves."""
    keys = ["data.workers=1", f"grid.submodule_ranks={ranks}", "checkpoint.every_steps=0"]
    arguments_ = [str(tmp_path), *arguments(tmp_path, data, *keys)]
    processes = start("tests.workers.starved", arguments_, ranks)
    codes = [process.wait(timeout=200) for process in processes]
    outputs = [process.communicate()[0] for process in processes]
    assert codes == [75] * ranks, outputs
    assert ("stopped as asked after step 3;" in outputs[0]) == (ranks == 1)
    assert ("stopped as asked while waiting for images" in outputs[0]) == (ranks == 2)
    assert (latest(tmp_path) is not None) == (ranks == 1)


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_and_resumed_elsewhere_reads_every_sample_once(data: Path, tmp_path: Path) -> None:
    """Two submodule ranks that gather, with a worker each, killed with -9; then one rank with three workers."""
    keys = ["checkpoint.every_steps=5", "checkpoint.keep_last=9"]
    first = [str(tmp_path / "first"), *arguments(tmp_path, data, *keys, "data.workers=1", "data.share=gather")]
    ranks = start("tests.workers.recorded", first, 2, MARK=str(tmp_path))
    deadline = time.monotonic() + 240
    while (found := latest(tmp_path)) is None or found.name < "step-00000010":
        assert time.monotonic() < deadline, "no checkpoint"
        assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()[0]
        time.sleep(0.02)
    assert len(marked(str(tmp_path))) > len(ranks)  # their workers
    for rank in ranks:
        rank.kill()
        rank.wait()
    while marked(str(tmp_path)):
        assert time.monotonic() < deadline, "workers outlive their rank"
        time.sleep(0.1)
    killed_at = latest(tmp_path)
    assert killed_at is not None
    done = int(killed_at.name[-8:])
    assert done < STEPS, "it was killed too late"
    keys += ["data.workers=3", "grid.submodule_ranks=1", "--resume"]
    output = finish(fork("tests.workers.recorded", [str(tmp_path / "second"), *arguments(tmp_path, data, *keys)], 1))
    assert f"resumed at step {done}: epoch 0, step {done} of it" in output
    before, after = recorded(tmp_path / "first", 2, 2), recorded(tmp_path / "second", 1, 1)
    assert min(after) == done
    assert max(after) == STEPS - 1
    epoch = Counter(image for step in range(done) for image in before[step])
    epoch.update(image for images in after.values() for image in images)
    assert set(epoch.values()) == {1}
    assert set(epoch) == pixels(data)
    for step in set(before) & set(after):  # what was lost with the killed run is read again, the same
        assert Counter(before[step]) <= Counter(after[step])


def test_two_replicas_train_and_evaluate_on_a_stream(data: Path, tmp_path: Path) -> None:
    splits = {}
    for split in ("train", "val"):
        index = open_index(data, split)
        splits[split] = {"filenames": list(index.shards), "shard_lengths": index.lengths.tolist()}
    (data / "_info.json").write_text(json.dumps({"splits": splits}))
    keys = arguments(tmp_path, data, f"data.root=pipe:cat {data}", "data.workers=1", "grid.submodule_ranks=1")
    output = finish(fork("hsvit_ds.train", [*keys, "run.epochs=2"], 2))
    assert f"{STEPS} steps an epoch, {2 * STEPS} in all" in output
    assert output.count("val/top1") == 4  # a line for each epoch; the summary's result, and its best


def damaged(folder: Path) -> Path:
    """400 samples in four shards; every hundredth image is noise, and the last shard is cut off."""
    for shard in range(4):
        numbers = range(shard * 100, shard * 100 + 100)
        members = [m for i in numbers for m in sample(i, b"noise" if i % 100 == 50 else encoded(picture(i)), i % 10)]
        folder.mkdir(parents=True, exist_ok=True)
        write_tar(folder / f"tiny-train-{shard:04d}.tar", members)
    write_tar(folder / "tiny-val-0000.tar", [m for i in range(24) for m in sample(i, encoded(picture(i)), i % 10)])
    last = folder / "tiny-train-0003.tar"
    os.truncate(last, last.stat().st_size * 9 // 10)
    make_index(folder)
    return folder


def test_a_run_on_damaged_shards_completes_counts_and_names_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(tmp_path / "damaged")
    keys = ["data.workers=0", "grid.submodule_ranks=1", "data.last_batch=fill"]
    main(arguments(tmp_path, folder, *keys))
    run = tmp_path / "digits-hsvit-001"
    names = (run / "bad_samples.txt").read_text().splitlines()
    expected = [f"tiny-train-000{shard}.tar: 000{shard}50.jpg: not an image" for shard in range(4)]
    assert set(expected) <= set(names)
    assert any("tiny-train-0003.tar" in name and "cut off" in name for name in names)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("val/top1" in line for line in lines)
    assert max(line.get("data/bad_samples", 0) for line in lines) == len(names)
    told = capfd.readouterr().out
    assert "warning: not readable: tiny-train-0000.tar: 000050.jpg: not an image" in told
    assert f"not readable, as the index says: {len(names) - 4} images" in told


def test_more_bad_images_than_allowed_stop_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = damaged(tmp_path / "damaged")
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path, folder, "data.workers=0", "grid.submodule_ranks=1", "data.max_bad_fraction=0.007"))
    assert stopped.value.code == 1
    told = capfd.readouterr().err
    assert "images cannot be read, more than data.max_bad_fraction = 0.007: tiny-train" in told
    assert told.count("hsvit: error") == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.root="], "data.root is not set: the folder of tiny's shards"),
        (["data.root=/nowhere"], "data.root = /nowhere: no such folder"),
        (["data.classes=9"], "has label 9, but tiny has 9 classes"),
        (["data.root=TRAIN"], "no split val (train)"),
        (["data.root=pipe:cat /nowhere"], "pipe:cat /nowhere/_info.json: "),
    ],
)
def test_data_that_is_not_there_is_refused_before_a_folder_is_made(
    data: Path,
    tmp_path: Path,
    keys: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from hsvit_ds.data import remote

    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    write_split(tmp_path / "train", "train", 64)
    make_index(tmp_path / "train")
    keys = [key.replace("TRAIN", str(tmp_path / "train")) for key in keys]
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path / "runs", data, *ALONE, *keys))
    assert stopped.value.code == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hsvit: error")]
    assert len(told) == 1
    assert message in told[0]
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def begun(data: Path, tmp_path: Path) -> Path:
    """A run of one epoch that has ended; its data is its own copy."""
    own = data_set(tmp_path / "own", train=64, val=24)
    main(arguments(tmp_path, own, *ALONE))
    return own


def test_a_resume_on_other_data_or_with_another_decoder_is_refused(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def resume(*more: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(arguments(tmp_path, begun, *ALONE, *more, "run.epochs=2", "--resume"))
        assert stopped.value.code == 2
        return capfd.readouterr().err

    told = resume("data.decoder=pillow")
    assert "data.decoder is 'simplejpeg" in told
    assert "and 'pillow" in told
    main(arguments(tmp_path, begun, *ALONE, "data.decoder=pillow", "data.any_decoder=true", "run.epochs=2", "--resume"))
    write_tar(
        begun / "tiny-train-0000.tar", [m for i in range(22) for m in sample(i, encoded(picture(i)), (i + 1) % 10)]
    )
    assert "its members are not those of" in resume()
    make_index(begun)
    assert "data.fingerprint is '" in resume("data.any_decoder=true")


def test_the_resolved_recipe_names_decoder_and_data(begun: Path, tmp_path: Path) -> None:
    from hsvit_ds.errors import RefusedError
    from hsvit_ds.run import recipe as recipes

    path = tmp_path / "digits-hsvit-001/recipe.toml"
    kept = recipes.read(path)
    assert kept.data.decoder == decode.installed("auto")
    assert kept.data.fingerprint == open_index(begun, "train").fingerprint
    assert recipes.resolve(kept, 1)[0] == kept
    with pytest.raises(RefusedError, match="whose pixels may differ"):
        recipes.resolve(recipes.read(path, ['data.decoder="simplejpeg 0.1, pillow 1"']), 1)


def test_a_run_goes_on_exactly_when_its_old_index_is_made_anew(tmp_path: Path) -> None:
    own = data_set(tmp_path / "own", train=64, val=24)
    old_index(own, "train")
    keys = [*ALONE, "run.epochs=2", "run.log_every=1", "augment.preset=hsvit"]
    main(arguments(tmp_path, own, *keys))
    folder = tmp_path / "digits-hsvit-001"

    def found() -> list[dict[str, float]]:
        kept = ("step", "train/loss", "train/grad_norm", "val/top1", "val/loss")
        return [{name: line[name] for name in kept if name in line} for line in metrics.read(folder)]

    whole, checkpoints = found(), folder / "checkpoints"
    first, last = sorted(checkpoints.glob("step-*"))
    shutil.rmtree(last)  # as if it had been stopped after the first epoch
    for pointer in ("latest", "best"):
        (checkpoints / pointer).write_text(first.name)
    make_index(own)
    assert open_index(own, "train").path.suffix == ".safetensors"
    main(arguments(tmp_path, own, *keys, "--resume"))
    assert found() == whole
    assert len({line["train/loss"] for line in whole if "train/loss" in line}) == 2 * 64 // BATCH
