"""What is published of HSViT's six data sets is what a recipe of each builds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hsvit_ds.data import splits
from hsvit_ds.data.sets import SETS
from hsvit_ds.models.hsvit import Config
from hsvit_ds.models.hsvit_config import VARIANTS
from hsvit_ds.run import recipe as recipes

from ..ranks import RECIPES, ROOT

COUNTS = re.compile(r"([\d,]+) parameters(?:, |.* and )([\d,.]+) MFLOPs")
PUBLISHED = {path: found for path in RECIPES if (found := COUNTS.search(path.read_text()))}
"""Recipes whose header has the published counts."""
SIX = ("cifar10", "cifar100", "fashion_mnist", "tiny_imagenet", "food101", "imagenet1k")
# Of the fact sheet's closed forms and the published code's own count.
TABLE = {
    ("cifar10", "C2A2"): (812_298, 203.43),
    ("cifar10", "C3A4"): (2_242_826, 687.75),
    ("cifar10", "C4A8"): (6_873_354, 1_276.54),
    ("cifar100", "C2A2"): (818_148, 203.44),
    ("cifar100", "C3A4"): (2_248_676, 687.76),
    ("cifar100", "C4A8"): (6_879_204, 1_276.56),
    ("fashion_mnist", "C2A2"): (810_186, 156.31),
    ("fashion_mnist", "C3A4"): (2_240_714, 534.22),
    ("fashion_mnist", "C4A8"): (6_871_242, 1_016.35),
    ("tiny_imagenet", "C2A2"): (824_648, 440.57),
    ("tiny_imagenet", "C3A4"): (2_255_176, 1_264.62),
    ("tiny_imagenet", "C4A8"): (6_885_704, 1_853.42),
    ("food101", "C2A2"): (818_213, 1_728.73),
    ("food101", "C3A4"): (2_248_741, 2_213.05),
    ("food101", "C4A8"): (6_879_269, 6_878.70),
    ("imagenet1k", "ImageNet-256"): (6_964_616, 8_747.38),
}


# GFLOPs of table 2's baselines on Tiny-ImageNet; CvT's are of transformers' networks, where the paper has 1.0 and 1.7.
BASELINES = {
    "resnet18": 0.3,
    "resnet50": 0.7,
    "efficientnet_b0": 0.1,
    "efficientnet_b3": 0.2,
    "mobilenetv2_100": 0.1,
    "mobilenetv2_140": 0.1,
    "mobilevit_xs": 0.1,
    "mobilevit_s": 0.2,
    "efficientformer_l1": 0.2,
    "efficientformer_l3": 0.6,
    "swiftformer_xs": 0.1,
    "swiftformer_s": 0.2,
    "cvt_13": 0.7,
    "cvt_21": 1.1,
    "ViT-B": 46.1,
}
WORD = re.compile(r"(?<![\w\"])(?:resnet\d+|(?:efficient|mobile|swift|cvt)[a-z0-9]*_\w+)")


def numbers(row: str) -> list[float]:
    return [float(cell.replace(",", "")) for cell in re.findall(r"\d[\d,.]*", row)]


def counts(config: Config, facts: splits.Facts) -> tuple[int, float]:
    """(parameters, MFLOPs as the paper counts them)."""
    with torch.device("meta"):
        model = config.build(image_size=facts.image_size, channels=facts.channels, classes=facts.classes)
    macs = config.macs(facts.image_size, facts.channels, facts.classes)
    return sum(p.numel() for p in model.parameters()), round(2 * macs / 1e6, 2)


def recipe_of(name: str, variant: str) -> Path:
    """The recipe with the published settings, found by what it says."""
    found = []
    for path in PUBLISHED:
        recipe = recipes.read(path)
        model = recipe.model
        if isinstance(model, Config) and (recipe.data.name, model.variant) == (name, variant) and model.submodules == 1:
            found.append(path)
    assert len(found) == 1, (name, variant, found)
    return found[0]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_has_the_counts_that_its_header_says(path: Path) -> None:
    recipe = recipes.read(path)
    said = PUBLISHED[path].groups()
    assert isinstance(recipe.model, Config)
    facts = splits.facts(recipe.data)
    found = counts(recipe.model.resolved(facts.image_size), facts)
    assert found == tuple(float(number.replace(",", "")) for number in said)


@pytest.mark.parametrize(("name", "variant"), TABLE)
def test_every_variant_on_every_set_has_a_recipe_with_the_published_counts(name: str, variant: str) -> None:
    recipe = recipes.read(recipe_of(name, variant))
    facts = splits.facts(recipe.data)
    assert isinstance(recipe.model, Config)
    assert counts(recipe.model.resolved(facts.image_size), facts) == TABLE[name, variant]


def test_no_set_and_no_variant_of_the_paper_is_left_out() -> None:
    small = {name for name in SIX if name != "imagenet1k"}
    assert {name for name in SIX if name not in SETS} == set()
    assert set(TABLE) == {(name, v) for name in small for v in VARIANTS if v != "ImageNet-256"} | {
        ("imagenet1k", "ImageNet-256")
    }


def rows() -> Iterator[tuple[str, list[float]]]:
    """(variant, parameters and MFLOPs) of table 2 in the results."""
    text = (ROOT / "docs/results.md").read_text().partition("### Table 2: small data sets")[2].partition("###")[0]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 5 and cells[2] in VARIANTS:
            yield cells[2], numbers(f"{cells[3]} {cells[4]}")


def test_the_results_have_the_same_table() -> None:
    assert [(variant, *found) for variant, found in rows()] == [
        (variant, float(parameters), flops)
        for (_, variant), (parameters, flops) in TABLE.items()
        if variant != "ImageNet-256"
    ]


@pytest.mark.parametrize("name", [name for name in SIX if name != "imagenet1k"])
def test_every_small_set_has_the_baselines_as_one_recipe(name: str) -> None:
    path = ROOT / "recipes" / name / "baseline.toml"
    recipe = recipes.read(path)
    assert (recipe.model.kind, recipe.data.name) == ("timm", name)
    assert splits.facts(recipe.data).image_size == (128 if name == "food101" else 64)
    assert "SMT is in neither timm nor transformers" in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/baseline.toml")), ids=lambda path: path.parent.name)
def test_a_set_names_every_baseline_and_each_answers_at_its_size(path: Path) -> None:
    """As in the recipe's header, which is all that a person has."""
    text = path.read_text().partition("model.name is the one key")[2].partition("# Published")[0]
    assert {*WORD.findall(text), "ViT-B"} == {*BASELINES}
    for_cvt = re.findall(r"cvt_21, with (data.image_size=\d+)", text)
    override = re.search(r"'(model=\{kind=\"vit\".*\})'(?: (data.image_size=\d+))?", text)
    assert override
    asked = {name: [f"model.name={name}", *(for_cvt if "cvt" in name else [])] for name in BASELINES}
    asked["ViT-B"] = [part for part in override.groups() if part]
    for name, keys in asked.items():
        recipe = recipes.read(path, keys)
        facts = splits.facts(recipe.data)
        flops = 2e-9 * recipe.model.resolved(facts.image_size).macs(facts.image_size, facts.channels, facts.classes)
        if recipe.data.name == "tiny_imagenet":
            assert flops == pytest.approx(BASELINES[name], abs=0.051)
