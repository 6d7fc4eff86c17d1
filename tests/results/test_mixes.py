"""Mixes of a run's widths are scored, exported and met by a budget."""

from __future__ import annotations

import json
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import torch

from hsvit_ds import models
from hsvit_ds.data import augment, digits
from hsvit_ds.engine.interop import load_model
from hsvit_ds.errors import RefusedError
from hsvit_ds.models.slimmable import Mix, Width
from hsvit_ds.results.budget import Budget, mixes
from hsvit_ds.results.predict import open_predictor
from hsvit_ds.results.saved import SavedRun, drawn_name

from .test_export import check_programs, command, saved

pytestmark = pytest.mark.heavy

MATFORMER = [
    "model.sliced=mlp",
    "model.depth=3",
    "model.widths={family=['1/8', '1/4', '1/2', 1]}",
    "task.sampling=all",
    "task.transfer=none",
]
TEXT = "1/8,0.5x2"
MIX = "0.125,0.50x2"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return saved(tmp_path_factory.mktemp("run"), "scala", MATFORMER, 2)


def rows(output: str) -> dict[str, list[str]]:
    """{name: the other cells} of a printed table."""
    lines = [line.strip("│").split("│") for line in output.splitlines() if line.startswith("│")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


def test_every_format_of_a_mix_has_its_logits(run: SavedRun, tmp_path: Path) -> None:
    code, output = command("export", run.folder, "--mix", TEXT, "-o", tmp_path)
    assert code == 0, output
    images = torch.randn(5, 1, 32, 32)
    with torch.no_grad():
        expected = run.model(images, width=["1/8", 0.5, 0.5])
        check_programs(tmp_path, images, expected)
        alone = load_model(tmp_path)
        torch.testing.assert_close(alone(images), expected, rtol=1e-5, atol=1e-5)
    assert alone.config.mlp_ratio == (0.5, 2.0, 2.0)
    assert not (tmp_path / "config.json").exists(), "timm has no such network"
    card = (tmp_path / "README.md").read_text()
    assert f"# ViT at mix {MIX}" in card
    assert "(sliced in its MLPs as MatFormer, arXiv 2310.07707)" in card
    assert f"| **{MIX} (mix)** |" in card
    assert "hsvit_ds.create_model" in card
    assert "timm's config has one size for the MLPs of all blocks" in card
    assert f"`hsvit evaluate RUN --mix {MIX}` does." in card
    assert f"mix {MIX}: {models.parameters(alone, 1.0):,} parameters, " in output
    opened = open_predictor(tmp_path)
    assert opened.chosen.startswith(f"mix {MIX}: {models.parameters(alone, 1.0):,} parameters")
    with pytest.raises(RefusedError, match=r"has width 0.125,0.50x2 alone, not 0.5; export that one from its run"):
        open_predictor(tmp_path, width="0.5")
    torch.testing.assert_close(opened.probabilities(images), expected.softmax(-1), rtol=1e-5, atol=1e-5)


def test_an_export_of_one_width_is_timms_still(run: SavedRun, tmp_path: Path) -> None:
    code, output = command("export", run.folder, "--width", "1/8", "-o", tmp_path)
    assert code == 0, output
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["mlp_ratio"] == 0.5


def test_mixes_are_scored_beside_widths_in_one_pass(run: SavedRun) -> None:
    code, output = command(
        "evaluate", run.folder, "--mix", TEXT, "--mix", "1/4x2,1", "--widths", "0.5", "--split", "val"
    )
    assert code == 0, output
    table = rows(output)
    assert list(table) == [f"{MIX} (mix)", "0.50", "0.25x2,1.00 (mix)"], "by their mean"
    assert [cells[0] for cells in table.values()] == ["both", "leading", "leading"], "sides"
    images, labels = digits.split("val")
    images = augment.normalise(images, run.reader.facts.mean, run.reader.facts.std)
    for name, given in ((f"{MIX} (mix)", ["1/8", 0.5, 0.5]), ("0.25x2,1.00 (mix)", [0.25, 0.25, 1])):
        with torch.no_grad():
            right = run.model(images, width=given).argmax(1) == labels
        _, parameters, gmacs, top1 = table[name]
        assert top1 == f"{100 * float(right.float().mean()):.2f}"
        assert parameters == f"{models.parameters(run.model, given):,}"
        assert gmacs == f"{models.macs(run.model, given) / 1e9:.4f}"
    code, output = command("evaluate", run.folder, "--mix", TEXT)
    assert code == 0, output
    assert list(rows(output)) == [f"{MIX} (mix)"], "without --widths it alone"
    classes = run.folder / f"evaluate-classes-test-step-2-{MIX}.csv"
    assert f"top-1 at mix {MIX}, %" in classes.read_text().replace('"', "")
    (mix,) = run.mixes([TEXT])
    small = run.model.subnet(mix)
    assert "## By class\n\n| class |" in run.card(mix).text(small, mix, in_timm=False)


def test_many_mixes_make_no_name_that_is_too_long_for_a_file(run: SavedRun) -> None:
    widths = run.model.config.widths
    many = [widths.mix(text) for text in ("1/8x9,1/4x9,1/2x9,1x9", "1/8x18,1/4x9,1/2x8,1")]
    assert drawn_name(run, "widths", "test", many[:1]).endswith(f"-{many[0]}")
    name = drawn_name(run, "widths", "test", many * 20)
    assert name.endswith(f"-{many[0]}-38-more-{many[1]}")
    assert len(name) < 250


def test_untrained_widths_of_a_mix_are_refused_and_marked(tmp_path: Path) -> None:
    run = saved(tmp_path, "scala", [*MATFORMER, "task.full_epochs=1"], 1)
    assert [str(width) for width in run.trained] == ["1.00"]
    code, output = command("export", tmp_path, "--mix", "1/8x2,1")
    assert (code, "width 0.125 was never trained (trained: 1.00); --untrained takes it any" in output) == (2, True)
    code, output = command("evaluate", tmp_path, "--mix", "1/8x2,1", "--mix", "3/4,1x2", "--untrained")
    assert code == 0, output
    assert list(rows(output)) == ["0.125x2,1.00 (untrained mix)", "0.75,1.00x2 (untrained mix)"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mix", "0.5,1/8,1"], "mix 0.50,0.125,1.00: 0.125 after 0.50; widths must not decrease"),
        (["--mix", "0.5,1"], "mix 0.50,1.00 has 2 widths for 3 blocks; give one a block"),
        (["--mix", "0.5,0.75,1"], "width 0.75 is not one of the 4 of this model; nearest: 0.50, 1.00"),
        (["--mix", "0.5x"], 'mix "0.5x": 0.5x must be a width, or one of several layers in a row, as 0.5x3'),
        (["--mix", TEXT, "--width", "0.5"], "give one of --width, --mix and --budget"),
        (["--mix", TEXT, "--budget", "1G"], "give one of --width, --mix and --budget"),
    ],
)
def test_impossible_mixes_are_refused_in_one_line(run: SavedRun, arguments: list[str], said: str) -> None:
    code, output = command("export", run.folder, *arguments)
    assert (code, said in output) == (2, True), output


def test_runs_whose_widths_are_not_of_mlps_alone_refuse_a_mix(tmp_path: Path) -> None:
    saved(tmp_path / "vit", "scala", [], 1)
    slim = ["model.widths.smallest=0.5", "model.widths.granularity=0.5", "task.kind=scala", "grid.submodule_ranks=1"]
    saved(tmp_path / "hsvit", "hsvit", slim, 1)
    for kind, said in (
        ("vit", 'a mix needs a network that was trained with sliced = "mlp"'),
        ("hsvit", "a mix needs a ViT"),
    ):
        for arguments in (["evaluate", tmp_path / kind, "--present", "0"], ["export", tmp_path / kind]):
            code, output = command(*arguments, "--mix", "0.5,1")
            assert (code, said in output) == (2, True), output


def test_a_budget_between_two_widths_is_met_by_the_largest_mix(run: SavedRun) -> None:
    """Compared with all mixes there are, of two kinds of cost."""
    every = [Mix.of_layers(layers) for layers in combinations_with_replacement(run.trained, 3)]
    for kind, cost in (("macs", models.macs), ("params", models.parameters)):
        costs = {mix: cost(run.model, mix) for mix in every}
        for most in sorted(costs.values()):
            for spare in (0, 1):
                chosen = Budget.of(f"{most + spare}{kind}").choose(run.model, run.trained, {}, "val")
                assert cost(run.model, chosen.width) == most
                if any(cost(run.model, width) == most for width in run.trained):
                    assert chosen.width in run.trained, "a trained width rather than a mix of the same cost"
                else:
                    assert isinstance(chosen.width, Mix)
                    assert "the mix with the most multiply-adds within" in chosen.words
    with pytest.raises(RefusedError, match="no trained width costs at most 1 macs; the least costs"):
        Budget.of("1").choose(run.model, run.trained, {}, "val")


def test_a_budget_takes_no_mix_above_a_width_that_is_worse_than_a_smaller_one(run: SavedRun) -> None:
    widths, budget = run.trained, Budget.of(f"{models.macs(run.model, run.trained[-1]) - 1}")
    rising = {width: 50.0 + place for place, width in enumerate(widths)}
    chosen = budget.choose(run.model, widths, rising, "val")
    assert str(chosen.width) == "0.50,1.00x2"
    assert "not measured; width 0.50: top-1 52.00 % on val, the best within" in chosen.words
    falling = {width: 50.0 - place for place, width in enumerate(widths)}
    assert budget.choose(run.model, widths, falling, "val").width == widths[0]


def test_a_latency_is_met_by_a_mix_too(run: SavedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(model: Any) -> float:
        return models.macs(model, 1.0) / 1e6

    monkeypatch.setattr("hsvit_ds.results.budget.latency_ms", slow)
    most = models.macs(run.model, ["1/8", 0.5, 0.5])
    chosen = Budget.of(f"{most / 1e6 + 1e-6:.6f}ms").choose(run.model, run.trained, {}, "val")
    assert models.macs(run.model, chosen.width) == most
    assert f", {most / 1e6:.2f} ms here; the mix with the most multiply-adds within" in chosen.words


def test_of_mixes_of_one_size_the_most_even_is_taken() -> None:
    quarters = [Width(n, 8) for n in (1, 2, 3, 4)]
    found = dict(mixes(quarters, [64] * 4))
    assert sorted(found) == list(found)
    for total, mix in found.items():
        same = [
            layers for layers in combinations_with_replacement(quarters, 4) if sum(w.of(64) for w in layers) == total
        ]
        assert sum(w.of(64) ** 2 for w in mix.layers) == min(sum(w.of(64) ** 2 for w in layers) for layers in same)
    assert str(found[8 + 24 + 24 + 24]) == "0.25x2,0.375x2", "not 0.125,0.375x3"
    assert [str(mix) for total, mix in mixes(quarters, [64, 32]) if total == 16] == ["0.125,0.25"]


def test_many_blocks_and_widths_are_mixed_at_once() -> None:
    widths = [Width(n, 12) for n in range(3, 13)]
    found = mixes(widths, [3072] * 24)
    assert len(found) == len({hidden for hidden, _ in found}) == 24 * 9 + 1 - 10  # every sum but those of one width
