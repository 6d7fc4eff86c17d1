"""`hsvit predict`, every export and evaluation give one answer for one file, whatever it is."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.data.preprocessing import Preprocessing
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.engine.interop import read_model
from hsvit_ds.results.predict import Predictor, open_predictor
from hsvit_ds.results.saved import SavedRun, open_run
from hsvit_ds.run import metrics

from .. import photographs
from ..new.test_new import NAMES
from ..ranks import ROOT
from ..workers.common import steps, trainer

pytestmark = pytest.mark.heavy
SLIM = ["model.widths.smallest=0.5", "model.widths.granularity=0.25"]
ALONE = "grid.submodule_ranks=1"
KINDS = {
    "ViT": ("scala", SLIM),
    "HSViT": ("hsvit", [*SLIM, 'task={kind="scala"}', ALONE, "model.kernels=[8,16]", "model.submodules=1"]),
    "grey": ("hsvit", [ALONE, "model.kernels=[8,16]", "model.submodules=1"]),
    "timm": ("hybrid", [ALONE, 'model={kind="timm", name="test_resnet"}', "optimizer.layer_decay=1"]),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind that a camera or a person makes."""
    folder = tmp_path_factory.mktemp("images")
    kind, colour = photographs.CLASSES["rote Rose"]
    photographs.draw(folder / "plain.jpg", kind, colour, 1)
    turned = Image.Exif()
    turned[0x0112] = 6
    photographs.draw(folder / "turned ö.jpg", kind, colour, 2, exif=turned)
    picture = Image.open(folder / "plain.jpg")
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    clear.save(folder / "alpha.png")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    """A few steps of photographs, with a shorter side cut or the whole image squashed."""
    base, overrides = KINDS[request.param]
    folder = tmp_path_factory.mktemp("run")
    source = photographs.folder(folder / "photos", 20)
    channels = 1 if request.param == "grey" else 3
    for photo in source.rglob("*.jpg") if channels == 1 else ():
        Image.open(photo).convert("L").save(photo)
    shards = folder / "shards"
    options = ["--split", "train", "--name", "photos", "--holdout", "0.2"]
    # In a process of its own: this one may have threads, beside which it must not fork.
    command = [sys.executable, "-m", "hsvit_ds.cli", "shards", "make", str(source), str(shards), *options]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    crop = "0.875" if request.param == "ViT" else "0.0"
    data = f'data={{name="photos", root="{shards}", image_size=32, channels={channels}, test="val"}}'
    made = trainer(folder / "run", [*overrides, data, f"augment.eval_crop={crop}", "ema.decay=0.9"], base=base)
    steps(made, 3)
    made.checkpoints.save(Position(0, 3, 3))
    assert made.checkpoints.wait() is None
    made.reader.close()
    (folder / "run" / metrics.FILE).write_text("")
    return open_run(folder / "run")


def predict(*arguments: Any, stdin: bytes = b"") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin, env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def answers(*arguments: Any, stdin: bytes = b"") -> dict[str, dict[str, float]]:
    code, output, error = predict(*arguments, "--format", "json", "--top", 9, stdin=stdin)
    assert code == 0, error
    rows = json.loads(output)
    return {row["image"]: {one["class"]: one["probability"] for one in row["predictions"]} for row in rows}


def test_the_run_every_export_and_evaluation_give_the_same_probabilities(
    run: SavedRun, images: Path, tmp_path: Path
) -> None:
    from onnxruntime import InferenceSession

    files = sorted(images.iterdir())
    for width in run.trained:
        out = tmp_path / str(width)
        result = CliRunner().invoke(app, ["export", str(run.folder), "--width", str(width), "-o", str(out)])
        assert result.exit_code == 0, result.output
        mine = answers(run.folder, images, "--width", width)
        assert list(mine) == [str(file) for file in files]
        theirs = answers(out, images, "--width", width)
        exported = read_model(out)
        assert exported.preprocessing is not None
        x = torch.stack([exported.preprocessing(file.read_bytes()) for file in files])
        session = InferenceSession(out / "model.onnx")
        logits = {
            "torch.export": torch.export.load(out / "model.pt2").module()(x),
            "ONNX": torch.from_numpy(session.run(None, {"images": x.numpy()})[0]),
            "evaluation": run.at(width)(x, width=width),
        }
        if (out / "config.json").exists():
            import timm

            logits["timm"] = timm.create_model(f"local-dir:{out}", pretrained=True).eval()(x)
        found = {name: dict(zip(map(str, files), z.softmax(-1).tolist(), strict=True)) for name, z in logits.items()}
        for file in map(str, files):
            expected = [mine[file][name] for name in NAMES]
            assert [theirs[file][name] for name in NAMES] == pytest.approx(expected, abs=1e-4)
            for name, rows in found.items():
                assert rows[file] == pytest.approx(expected, abs=1e-4), f"{name} of {file} at {width}"


def test_an_evaluated_image_is_preprocessed_by_the_same_code(run: SavedRun) -> None:
    reader = run.reader
    from hsvit_ds.data import augment, splits

    there: Any = splits.open_split(run.recipe.data, "val")
    batch, labels, valid = next(iter(reader.evaluation("val")))
    seen = augment.normalise(batch, run.facts.mean, run.facts.std)
    for number in range(int(valid.sum())):
        place = there.place(number)
        with (there.folder / there.shards[place.shard]).open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.size)
        assert int(labels[number]) == place.label
        torch.testing.assert_close(run.preprocessing(data, run.recipe.data.decoder), seen[number])
    reader.close()


def test_formats_sources_and_what_cannot_be_read(run: SavedRun, images: Path, tmp_path: Path) -> None:
    plain = images / "plain.jpg"
    code, output, _ = predict(run.folder, plain, "--top", 2)
    assert code == 0
    assert f"step 3, width {run.trained[-1]}: " in output
    assert "1 image in" in output
    assert sum(name in output for name in NAMES) == 2
    code, output, error = predict(run.folder, plain, images / "turned ö.jpg", "--format", "csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(output)))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"] * 2
    assert {row["class"] for row in rows} == set(NAMES)
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(2, abs=1e-4)
    assert "parameters" in error, "what was chosen is not among the rows"
    expected = answers(run.folder, plain)[str(plain)]
    assert answers(run.folder, "-", stdin=plain.read_bytes())["-"] == pytest.approx(expected)
    assert answers(run.folder, images / "*.jpg").keys() == {str(path) for path in sorted(images.glob("*.jpg"))}
    (tmp_path / "odd.jpg").write_text("no image")
    code, output, error = predict(run.folder, tmp_path / "odd.jpg", plain, "--format", "json")
    assert code == 1
    assert "odd.jpg: not read: not an image" in error
    assert [("error" in row, bool(row["predictions"])) for row in json.loads(output)] == [(True, False), (False, True)]


REFUSED = [
    (["{export}", "x.jpg"], "x.jpg: no such file, folder or pattern of files"),
    (["{export}", "{empty}"], "no images (.jpg, .jpeg"),
    (["{empty}", "{image}"], "neither a run (no checkpoints/ in it) nor an export (no model.safetensors)"),
    (["gone", "{image}"], "gone: no such run or export"),
    (["{export}", "{image}", "--width", "0.3"], "has width 0.50 alone, not 0.3; export that one from its run"),
    (["{export}", "{image}", "--width", "half"], "--width half: must be a number such as 0.5"),
    (["{export}", "{image}", "--width", "0.5", "--budget", "1G"], "give one of --width and --budget"),
    (["{export}", "{image}", "--budget", "1k"], "no trained width costs at most 1000 macs; the least costs"),
    (["{export}", "{image}", "--ema"], "--checkpoint and --ema are a run's"),
    (["{run}", "{image}", "--width", "0.6"], "nearest: 0.50, 0.75"),
    (["{run}", "{image}", "--width", "0.5", "--budget", "1G"], "give one of --width and --budget"),
    (["{other}", "{image}"], "does not fit the model in its metadata: "),
    (["{weights}", "{image}"], 'not a model file of hsvit-ds (no "hsvit" in its metadata)'),
]


def test_bad_input_is_refused(run: SavedRun, images: Path, tmp_path: Path) -> None:
    if len(run.trained) == 1:
        pytest.skip("of one width")
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    names = {name: tmp_path / name for name in ("export", "empty", "other", "weights")}
    names |= {"image": images / "plain.jpg", "run": run.folder}
    CliRunner().invoke(app, ["export", str(run.folder), "--width", "0.5", "-o", str(names["export"])])
    for name in ("empty", "other", "weights"):
        names[name].mkdir()
    file = names["export"] / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), names["other"] / "model.safetensors", metadata=about)
    save_file(tensors, names["weights"] / "model.safetensors")
    for arguments, message in REFUSED:
        code, _, error = predict(*(argument.format(**names) for argument in arguments))
        assert (code, message in error.replace("\n", " ")) == (2, True), (arguments, error)


def test_a_budget_takes_the_best_measured_width_and_says_so(run: SavedRun, images: Path, tmp_path: Path) -> None:
    if len(run.trained) == 1:
        pytest.skip("of one width")
    scores = {f"val/top1_w{width}": 60.0 - place for place, width in enumerate(run.trained)}
    file = run.folder / metrics.FILE
    file.write_text(json.dumps({"step": 3, "time": 0.0, **scores}) + "\n")
    try:
        for command in (
            ["predict", run.folder, images / "plain.jpg"],
            ["export", run.folder, "-o", tmp_path / "out"],
        ):
            result = CliRunner().invoke(app, [str(part) for part in (*command, "--budget", "1G")])
            assert result.exit_code == 0, result.output
            assert f"width {run.trained[0]}: " in result.output
            assert "top-1 60.00 % on val, the best within 1G" in result.output
    finally:
        file.write_text("")
    code, output, _ = predict(run.folder, images / "plain.jpg", "--budget", "1000ms")
    assert (code, f"width {run.trained[-1]}: " in output) == (0, True)
    assert " ms here; the widest within 1000ms, as none was measured at this checkpoint" in output


SCRIPT = """
import sys, json
from hsvit_ds.cli import app
app(["predict", sys.argv[1], sys.argv[2], "--format", "json"], standalone_mode=False)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"deepspeed", "mlflow", "webdataset", "matplotlib", "scipy"}, loaded
assert "hsvit_ds.run.recipe" not in sys.modules
"""


def test_an_export_is_asked_without_a_recipe_deepspeed_or_mlflow(run: SavedRun, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    arguments = ["export", run.folder, "--width", run.trained[0], "-o", out]
    assert CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code == 0
    moved = out.rename(tmp_path / "elsewhere")
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(moved), str(images / "plain.jpg")],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    (row,) = json.loads(found.stdout)
    assert {answer["class"] for answer in row["predictions"]} == set(NAMES)


def test_the_cards_code_loads_and_answers(
    run: SavedRun, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, width = tmp_path / "export", run.trained[0]
    arguments = ["export", run.folder, "--width", width, "-o", out]
    assert CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code == 0
    card = (out / "README.md").read_text()
    blocks = [block.split("```")[0].replace("FOLDER", str(out)) for block in card.split("```python\n")[1:]]
    assert len(blocks) == 4, "an image, and three ways to load"
    assert len(blocks[0].strip().splitlines()) <= 5
    (tmp_path / "photo.jpg").write_bytes((images / "turned ö.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    expected = answers(out, "photo.jpg")["photo.jpg"]
    for block in blocks[1:]:
        names: dict[str, Any] = {}
        exec(blocks[0] + block, names)
        found = names.get("probabilities")
        found = torch.from_numpy(names["logits"]).softmax(-1) if found is None else found
        for name, probability in zip(NAMES, found[0].tolist(), strict=True):
            assert probability == pytest.approx(expected[name], abs=0.02), block
    assert all(name.replace("[", "\\[").replace("]", "\\]") in card for name in NAMES)


def test_grey_networks_see_grey(tmp_path: Path) -> None:
    seen = Preprocessing(16, 1, (0.5,), (0.25,))
    photographs.draw(tmp_path / "a.png", *photographs.CLASSES["rote Rose"], 1)
    x = seen((tmp_path / "a.png").read_bytes())
    assert x.shape == (1, 16, 16)
    three = Preprocessing(16, 3, (0.5,) * 3, (0.25,) * 3)((tmp_path / "a.png").read_bytes())
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close(x, (three * weights).sum(0, keepdim=True), atol=0.02, rtol=0)


def test_many_images_are_asked_in_batches(run: SavedRun, images: Path) -> None:
    opened: Predictor = open_predictor(run.folder)
    data = (images / "plain.jpg").read_bytes()
    found = list(opened.predict([(str(n), data) for n in range(70)], top=1))
    assert [one.image for one in found] == [str(n) for n in range(70)]
    assert len({one.answers[0][0] for one in found}) == 1
