"""A subnet becomes a network of its own, with the slice's logits, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.data import augment, digits
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.engine.interop import save_model
from hsvit_ds.errors import RefusedError
from hsvit_ds.models.hsvit import HSViT
from hsvit_ds.models.slimmable import Width
from hsvit_ds.results.budget import Budget
from hsvit_ds.results.saved import SavedRun, open_run

from ..workers.common import steps, trainer

pytestmark = pytest.mark.heavy

SLIM_HSVIT = [
    "model.widths.smallest=0.5",
    "model.widths.granularity=0.5",
    "model.submodules=2",
    "grid.submodule_ranks=1",
    "task.kind=scala",
]
# Networks of one width.
WHOLE = {
    "timm": ["grid.submodule_ranks=1", 'model={kind="timm", name="test_resnet", drop_path=0.1}'],
    "hybrid": ["grid.submodule_ranks=1"],
    "HSViT that rounds": ["grid.submodule_ranks=1", 'grid.exchange="int8"', "model.depthwise=true"],
    "HSViT in bf16": ["grid.submodule_ranks=1", 'grid.exchange="bf16"'],
}
BASES = {"HSViT that rounds": "hsvit", "HSViT in bf16": "hsvit"}
KINDS: dict[str, tuple[str, list[str]]] = {
    "ViT": ("scala", []),
    "fused ViT": ("scala", ["model.qkv=fused", "model.softmax_scale=full", "model.norm_eps=1e-5"]),
    "ViT by heads": ("scala", ["model.widths={slice='heads', smallest=0.5, granularity=0.5}"]),
    "HSViT": ("hsvit", SLIM_HSVIT),
    "MobileNet": ("mobilenet", []),
    "MobileNetV2": ("mobilenet", ["model={kind='mobilenet', variant='MobileNetV2', widths={smallest=0.5}}"]),
    "light UniFormer": ("uniformer", ["model.pruned=true"]),
}
IN_TIMM = {"ViT", "fused ViT", "ViT by heads", "MobileNetV2"}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    base, overrides = KINDS[request.param]
    return saved(tmp_path_factory.mktemp("run"), base, overrides, 3)


def saved(folder: Path, base: str, overrides: list[str], count: int) -> SavedRun:
    made = trainer(folder, [*overrides, "ema.decay=0.9"], base=base)
    steps(made, count)
    made.checkpoints.save(Position(0, count, count))
    assert made.checkpoints.wait() is None
    (folder / "metrics.jsonl").write_text(json.dumps({"step": count, "time": 0.0, "test/top1_w0.50": 43.21}) + "\n")
    return open_run(folder)


def command(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@torch.no_grad()
def test_every_format_has_the_slices_logits(run: SavedRun, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    code, output = command("export", run.folder, "--width", "0.5", "-o", tmp_path)
    assert code == 0, output
    (width,) = run.widths("0.5")
    images = torch.randn(5, 1, 32, 32)
    expected = run.at(width)(images, width=width)
    check_programs(tmp_path, images, expected)
    card = (tmp_path / "README.md").read_text()
    method = "by heads as HydraViT" if run.recipe.model.widths.slice == "heads" else "Scala"
    assert "A subnet of a slimmable network" in card
    assert [name for name in ("by heads as HydraViT", "Scala") if name in card] == [method]
    assert "at width 0.50" in card
    assert "| **0.50** |" in card
    assert "| **43.21** |" in card
    in_timm = request.node.callspec.params["run"] in IN_TIMM
    assert (tmp_path / "config.json").exists() == ("timm.create_model" in card) == in_timm
    if not in_timm:
        from hsvit_ds.engine.interop import load_model

        alone = load_model(tmp_path / "model.safetensors")
    else:
        import timm
        from safetensors.torch import load_file

        alone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        config = json.loads((tmp_path / "config.json").read_text())
        assert timm.data.resolve_model_data_config(alone)["crop_mode"] == "squash"
        other = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        if (eps := getattr(run.recipe.model, "norm_eps", 1e-6)) != 1e-6:
            assert f"m.eps = {eps:g}" in card
            for module in alone.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    module.eps = eps
    torch.testing.assert_close(alone(images), expected, rtol=1e-5, atol=1e-5)


def test_a_card_names_the_weights_that_a_run_started_from_and_no_file_says_where_they_lay(
    run: SavedRun, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base, overrides = KINDS[request.node.callspec.params["run"]]
    started = saved(tmp_path / "second", base, [*overrides, f"model.weights={run.folder}"], 1)
    assert started.recipe.model.weights == str(run.folder)
    (width,) = started.widths("1.0")
    small = started.model.subnet(width)
    card = started.card(width).text(small, width, in_timm=False)
    assert f", started from the weights {run.folder.name}." in card.replace("\\", "")
    save_model(small, tmp_path / "model.safetensors")
    assert str(run.folder).encode() not in (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", WHOLE)
def test_every_format_of_a_network_of_one_width_has_its_logits(kind: str, tmp_path: Path) -> None:
    run = saved(tmp_path, BASES.get(kind, "hybrid"), WHOLE[kind], 3)
    out = tmp_path / "export"
    code, output = command("export", tmp_path, "--width", "1.0", "-o", out)
    assert code == 0, output
    images = torch.randn(5, 1, 32, 32)
    with torch.no_grad():
        expected = run.model(images)
    check_programs(out, images, expected)
    card = (out / "README.md").read_text()
    assert "slimmable" not in card
    assert "at width" not in card
    if kind == "timm":
        import timm

        alone = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert type(alone) is type(timm.create_model("test_resnet"))
        assert "timm.create_model" in card
        about = timm.data.resolve_model_data_config(alone)
        assert (about["input_size"], about["crop_mode"]) == ((1, 32, 32), "squash")
        assert tuple(about["mean"]) == run.facts.mean
    else:
        from hsvit_ds.engine.interop import load_model

        alone = load_model(out / "model.safetensors")
        assert "HSViT on test_resnet" in card or kind in BASES
        if kind in BASES:
            assert isinstance(alone, HSViT)
            assert alone.exchange == run.recipe.grid.exchange
            alone.exchange = "fp32"
            assert not torch.equal(alone(images), expected)
            alone.exchange = run.recipe.grid.exchange
    with torch.no_grad():
        torch.testing.assert_close(alone(images), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def check_programs(folder: Path, images: Tensor, expected: Tensor) -> None:
    from onnxruntime import InferenceSession

    program = torch.export.load(folder / "model.pt2")
    allowed = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, float(expected.abs().max()))}
    torch.testing.assert_close(program.module()(images), expected, **allowed)
    assert "hsvit" not in str(program.graph)
    (onnx,) = InferenceSession(folder / "model.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(onnx), expected, **allowed)


def test_evaluation_scores_all_widths_in_one_pass_over_the_data(run: SavedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = command("evaluate", run.folder)
    assert code == 0, output
    assert (run.folder / "evaluate-widths-test-step-3.png").stat().st_size > 10_000
    for width in run.trained:
        assert f"│ {width}" in output
    read = run.reader.evaluation
    splits = []
    monkeypatch.setattr(run.reader, "evaluation", lambda split: splits.append(split) or read(split))
    found, _ = run.evaluate("val", run.trained)
    assert splits == ["val"]
    assert found["top1"] == found["top1_w1.00"]
    images, labels = digits.split("val")
    images = augment.normalise(images, run.reader.facts.mean, run.reader.facts.std)
    for width in run.trained:
        one, _ = run.evaluate("val", (width,))
        assert found[f"top1_w{width}"] == one["top1"]
        with torch.no_grad():
            logits = run.at(width).subnet(width)(images)
        assert one["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
        assert one["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()), rel=1e-5)


def test_an_average_can_be_taken(run: SavedRun) -> None:
    live, average = run.model.state_dict(), open_run(run.folder, ema=True).model.state_dict()
    assert live.keys() == average.keys()
    assert any(not torch.equal(live[name], average[name]) for name in live)


def test_a_width_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    run = saved(tmp_path, "scala", ["task.full_epochs=1"], 2)
    assert [str(width) for width in run.trained] == ["1.00"]
    code, output = command("export", tmp_path, "--width", "0.5")
    assert code == 2
    assert "width 0.50 was never trained (trained: 1.00); --untrained takes it anyway" in output
    code, output = command("evaluate", tmp_path, "--widths", "1/8,0.5,1", "--untrained")
    assert code == 0, output
    assert [line.split("│")[1].strip() for line in output.splitlines() if line.startswith("│")] == [
        "0.125 (untrained)", "0.50 (untrained)", "1.00",
    ]  # fmt: skip
    (table,) = tmp_path.glob("evaluate-widths-test-*.csv")
    lines = [line.split(",") for line in table.read_text().splitlines()]
    assert lines[0] == ["width", "trained", "parameters", "macs", "top1"]
    assert [line[:2] for line in lines[1:]] == [["0.125", "no"], ["0.50", "no"], ["1.00", "yes"]]
    assert all(f"{float(line[4]):.2f}" in output and f"{int(line[2]):,}" in output for line in lines[1:])
    code, output = command("export", tmp_path, "--width", "1/8", "--untrained")
    assert code == 0, output
    assert "| **0.125 (untrained)** |" in (tmp_path / "export-0.125/README.md").read_text()
    code, output = command("export", tmp_path, "--width", "0.3")
    assert code == 2
    assert "width 0.3 is not one of the 7 of this model; nearest: 0.25, 0.375" in output
    code, output = command("export", tmp_path, "--width", "0.3", "--untrained")
    assert code == 2
    assert "0.3 x embedding 32 = 9.6 is not a multiple of heads = 2" in output
    code, output = command("export", tmp_path, "--width", "0.5", "--budget", "1G")
    assert (code, "give one of --width and --budget" in output) == (2, True)
    code, output = command("evaluate", tmp_path, "--split", "dev")
    assert (code, "--split dev: must be one of train, val, test" in output) == (2, True)


def test_a_family_answers_at_widths_that_were_never_trained_between_and_below(tmp_path: Path) -> None:
    """With the statistics of each taken anew; a MobileNet at any, since its channels are rounded."""
    saved(tmp_path / "mobile", "mobilenet", [], 2)
    code, output = command("evaluate", tmp_path / "mobile", "--widths", "1/8,0.3,0.5,1", "--untrained")
    assert code == 0, output
    (table,) = (tmp_path / "mobile").glob("evaluate-widths-test-*.csv")
    rows = [line.split(",")[:2] for line in table.read_text().splitlines()[1:]]
    assert rows == [["0.125", "no"], ["0.30", "no"], ["0.50", "yes"], ["1.00", "yes"]]
    saved(tmp_path / "uni", "uniformer", ["model.pruned=true"], 2)
    code, output = command("evaluate", tmp_path / "uni", "--widths", "1/8,1/2", "--untrained")
    assert code == 0, output
    code, output = command("evaluate", tmp_path / "uni", "--widths", "0.3", "--untrained")
    assert (code, "width 0.30: 0.3 x the stem's channels 8 = 2.4 is not a whole number" in output) == (2, True)


def test_a_budget_picks_the_widest_subnet_within_it(run: SavedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = run.trained

    def cost(text: str) -> Width:
        return Budget.of(text).choose(run.model, widths, {}, "val").width

    from hsvit_ds import models

    same: dict[int, Width] = {}  # the widest of each size: rounding gives several widths of a MobileNet one
    for width in widths:
        same[models.macs(run.model, width)] = width
    for macs, width in same.items():
        assert cost(f"{macs}") == width
        assert cost(f"{models.parameters(run.model, width) / 1e6:.6f}Mparams") == width
    assert cost("100G") == widths[-1]
    (least, narrowest), (more, _), *_ = same.items()
    assert cost(f"{(least + more) / 2e3:.3f}k") == narrowest
    times = {float(models.macs(run.model, w)): 2.0 + i for i, w in enumerate(widths)}
    monkeypatch.setattr(
        "hsvit_ds.results.budget.latency_ms", lambda m: times[float(m.config.macs(m.image_size, m.channels, m.classes))]
    )
    run.at(*widths)
    assert cost("3.5ms") == [width for width in widths if times[float(models.macs(run.model, width))] <= 3.5][-1]
    with pytest.raises(RefusedError, match="no trained width costs at most 1 macs; the least costs"):
        cost("1")
    with pytest.raises(RefusedError, match=r"--budget 5 GB: must look like 1.3G \(multiply-adds\), 6Mparams or 8ms"):
        cost("5 GB")


def test_latency_is_measured(run: SavedRun) -> None:
    chosen = Budget.of("1000000ms").choose(run.model, run.trained[-1:], {}, "val")
    assert chosen.width == run.trained[-1]
    assert " ms here; the widest within 1000000ms, as none was measured" in chosen.words


def test_a_budget_picks_the_best_measured_subnet_not_the_widest(run: SavedRun) -> None:
    """The width above the smallest can be worse: 58.4, then 54.3 in Scala's run at X = 25."""
    widths = run.trained
    scores = {width: 50.0 - place for place, width in enumerate(widths)}
    chosen = Budget.of("100G").choose(run.model, widths, scores, "val")
    assert chosen.width == widths[0]
    assert f"width {widths[0]}: " in chosen.words
    assert "top-1 50.00 % on val, the best within 100G" in chosen.words
    del scores[widths[0]]
    assert Budget.of("100G").choose(run.model, widths, scores, "val").width == widths[1]
    same = dict.fromkeys(widths, 60.0)
    assert Budget.of("100G").choose(run.model, widths, same, "val").width == widths[0], "the cheapest of equals"
