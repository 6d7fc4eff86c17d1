"""`hsvit explain` shows what the network did: its own attention, its own answers; and its page needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.data.preprocessing import Preprocessing
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.models import Model, hsvit, slimmable, timm_models, vit
from hsvit_ds.models.backbone import Config as Backbone
from hsvit_ds.models.batchnorm import recalibrate
from hsvit_ds.results import explain, explain_page
from hsvit_ds.results.predict import Predictor

from .. import browser, photographs
from ..workers.common import steps, trainer

SLIM = slimmable.Config(smallest=0.5, granularity=0.25)
SMALL: dict[str, Any] = {"kernels": (8, 16), "pool_strides": (4, 2), "groups": 8, "depth": 2, "heads": 2}
HSVITS = {
    "one submodule": hsvit.Config(**SMALL, widths=SLIM),
    "two submodules": hsvit.Config(**SMALL, submodules=2, widths=SLIM),
    "tiles": hsvit.Config(**SMALL, submodules=4, tiles=2),
    "without attention": hsvit.Config(**SMALL | {"depth": 0}, submodules=2),
    "without convolutions": hsvit.Config(**SMALL | {"pool_strides": (), "embedding": 1024}, convolution=False),
    "a backbone": hsvit.Config(backbone=Backbone(name="test_resnet"), depth=2, groups=4, submodules=2),
}
VITS = {
    "plain": vit.Config(embedding=32, heads=2, depth=3, patch_size=8, widths=SLIM),
    "by heads": vit.Config(embedding=32, heads=4, depth=3, patch_size=8, widths=replace(SLIM, slice="heads")),
    "distilled": vit.Config(embedding=32, heads=2, depth=3, patch_size=8, distilled=True, layer_scale=0.5),
    "as published": vit.Config(
        embedding=32, heads=2, depth=3, patch_size=8, softmax_scale="full", qkv="fused", widths=SLIM
    ),
}
EVIL = "</style><script>document.title='evil'<b>"


def built(config: Any, seed: int = 1) -> list[Model]:
    """The networks at all widths, their norms and biases like nothing that they start with."""
    model = config.build(image_size=32, channels=3, classes=7, seed=seed).eval()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=source), alpha=0.1)
    widths = model.config.widths.all
    if isinstance(model, hsvit.HSViT) and len(widths) > 1:
        with recalibrate(model, widths):
            for width in widths:
                model(images(), width=width)
    return [model.subnet(width).eval() for width in widths]


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def predictor(model: Model) -> Predictor:
    names = tuple(f"<b>class {label}" for label in range(7))
    return Predictor(model, Preprocessing(32, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), names, f"a {EVIL} network")


def inputs_and_outputs(layer: nn.Module) -> list[tuple[Any, Tensor]]:
    found: list[tuple[Any, Tensor]] = []
    layer.register_forward_hook(lambda _, given, gave: found.append((given, gave)))
    return found


@pytest.mark.parametrize("kind", HSVITS)
@torch.no_grad()
def test_an_hsvits_attention_gives_the_vectors_that_it_computed(kind: str) -> None:
    for model in built(HSVITS[kind]):
        model, x = model.double(), images(1).double()
        maps, groups = explain.groups_of(model, x)
        assert (groups is None) == (model.config.depth == 0)
        if groups is not None:
            torch.testing.assert_close(groups.vectors, model.forward_features(x)[0].float(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(groups.cls_rows.sum(-1), torch.ones(2, model.config.groups))
            assert len(groups.channels) == model.config.kernels[-1]
        assert (maps is None) == (not model.config.convolution)
        if maps is not None:
            own = maps.double().flatten(1).unflatten(0, (model.config.submodules, -1))
            weight, bias = model.submodules.projection_weight, model.submodules.projection_bias
            tokens = (own @ weight.mT + bias[:, None]).relu().flatten(0, 1)
            given = x if model.backbone is None else maps.double().flatten(1)[None]
            torch.testing.assert_close(tokens, model.submodules.tokens(given)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", VITS)
@torch.no_grad()
def test_a_vits_attention_gives_what_its_layers_gave(kind: str) -> None:
    for model in built(VITS[kind]):
        noted = [inputs_and_outputs(block.attn) for block in model.blocks]
        model.forward_features(images())
        for block, ((given, gave),) in zip(model.blocks, noted, strict=True):
            weights = explain.attention(block.attn, given[0])
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            v = block.attn.qkv(given[0]).unflatten(-1, (3, block.attn.heads, -1))[:, :, 2].transpose(1, 2)
            residual = 0 if given[2] is None else given[2]
            out = block.attn.proj((weights @ v).transpose(1, 2).flatten(2)) + residual
            torch.testing.assert_close(out, gave, atol=1e-5, rtol=1e-5)


def test_a_layer_mixes_half_its_attention_and_half_of_what_passes_by() -> None:
    heads = torch.tensor([[[[1.0, 0.0], [0.4, 0.6]], [[0.0, 1.0], [0.0, 1.0]]]])
    torch.testing.assert_close(explain.mixing(heads), torch.tensor([[[0.75, 0.25], [0.1, 0.9]]]))


@torch.no_grad()
def test_rollout_is_the_product_of_rows_that_sum_to_one() -> None:
    for model in built(VITS["plain"]):
        noted = [inputs_and_outputs(block.attn) for block in model.blocks]
        found = explain.rollout(model, images())
        product = torch.eye(17).expand(3, -1, -1)
        for block, ((given, _),) in zip(model.blocks, noted, strict=True):
            mixing = explain.mixing(explain.attention(block.attn, given[0]))
            torch.testing.assert_close(mixing.sum(-1), torch.ones(3, 17))
            product = mixing @ product
        torch.testing.assert_close(found.flatten(1), product[:, 0, 1:])
        torch.testing.assert_close(found.sum((1, 2)) + product[:, 0, 0], torch.ones(3))
        assert found.shape == (3, 4, 4)


@torch.no_grad()
def test_a_submodule_alone_answers_as_where_the_others_are_absent(tmp_path: Path) -> None:
    (*_, model) = built(HSVITS["two submodules"])
    asked = predictor(model)
    photographs.draw(tmp_path / "a.png", *photographs.CLASSES["rote Rose"], 1)
    (seen,) = explain.explain({"width 1.00": asked}, "a", tmp_path / "a.png").seen
    x = asked.preprocessing((tmp_path / "a.png").read_bytes())[None]
    present = {
        "all": None,
        "submodule 0 alone": torch.tensor([True, False]),
        "submodule 1 alone": torch.tensor([False, True]),
    }
    assert list(seen.answers) == list(present)
    for who, mask in present.items():
        (expected,) = asked.best(model(x, present=mask).softmax(-1), explain.TOP)
        assert [name for name, _ in seen.answers[who]] == [name for name, _ in expected]
        assert [p for _, p in seen.answers[who]] == pytest.approx([p for _, p in expected], abs=1e-6)


@torch.no_grad()
def test_where_a_submodule_looks_is_of_its_own_maps() -> None:
    (*_, model) = built(HSVITS["two submodules"])
    maps, groups = explain.groups_of(model, images(1))
    assert maps is not None
    assert groups is not None
    seen = explain.SeenByHSViT("", {}, 2, 1, maps, groups)
    weights = groups.cls_rows[..., 1:].mean(0).flatten()
    expected = torch.stack([sum(weights[c] * maps[c] for c in part) for part in (range(8), range(8, 16))])  # type: ignore[misc]
    torch.testing.assert_close(seen.looked, expected)
    torch.testing.assert_close(groups.agreement.diagonal(), torch.ones(8))


@torch.no_grad()
def test_a_submodule_that_sees_a_tile_looks_there() -> None:
    """Other pixels in the tile at the right of the upper row change what is seen there, and nothing elsewhere."""
    (*_, model) = built(HSVITS["tiles"])
    image = images(1)
    other = image.clone()
    other[..., :16, 16:] += 1
    looked = []
    for given in (image, other):
        maps, groups = explain.groups_of(model, given)
        seen = explain.SeenByHSViT("", {}, 4, 2, maps, groups).looked
        assert seen is not None
        looked.append(seen.unflatten(1, (2, -1)).unflatten(3, (2, -1)).transpose(2, 3))  # [M, row, column, h, w]
    changed = (looked[0] != looked[1]).flatten(3).any(3)
    assert changed.nonzero().tolist() == [[1, 0, 1]]
    assert looked[0].flatten(3).any(3).nonzero().tolist() == [[m, m // 2, m % 2] for m in range(4)]


def test_the_image_is_shown_as_the_network_was_given_it(tmp_path: Path) -> None:
    pixels = torch.arange(32 * 32 * 3, dtype=torch.float32).remainder(256).to(torch.uint8).view(32, 32, 3)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    (*_, model) = built(VITS["plain"])
    found = explain.explain({"": predictor(model)}, "a", tmp_path / "a.png")
    assert found.pixels is not None
    torch.testing.assert_close(found.pixels, pixels)


def test_a_timm_model_is_refused() -> None:
    model = timm_models.Config(name="test_resnet").build(image_size=32, channels=3, classes=7)
    with pytest.raises(explain.RefusedError, match='of kind "timm", whose layers are not known here'):
        explain._check(Path("run"), model)


def run_of(folder: Path, base: str, overrides: list[str]) -> Path:
    made = trainer(folder, overrides, base=base)
    steps(made, 1)
    made.checkpoints.save(Position(0, 1, 1))
    assert made.checkpoints.wait() is None
    made.reader.close()
    return folder


def command(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["explain", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.heavy
def test_the_command_writes_a_page_and_names_damaged_images(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "hsvit", ["grid.submodule_ranks=1"])
    photos, out = tmp_path / "photos", tmp_path / "page.html"
    photos.mkdir()
    photographs.draw(photos / "a.jpg", *photographs.CLASSES["rote Rose"], 1)
    assert command(run, photos, "-o", out)[0] == 0
    assert "submodule 1 alone" in out.read_text()
    (photos / "odd.jpg").write_text("no image")
    code, said = command(run, photos, "-o", out)
    assert (code, "odd.jpg: not read: not an image" in said) == (1, True)
    assert "odd.jpg: not read: not an image" in out.read_text()
    slim = ["model.widths.smallest=0.5", "model.widths.granularity=0.25"]
    scala = run_of(tmp_path / "scala", "scala", slim)
    assert command(scala, photos / "a.jpg", "-o", out, "--width", "0.5,1")[0] == 0
    assert [f"width {width}" in out.read_text() for width in ("0.50", "0.75", "1.00")] == [True, False, True]
    out.write_text("mine")
    assert "is no report of hsvit explain" in command(run, photos / "a.jpg", "-o", out)[1]
    for n in range(51):
        (tmp_path / f"{n}.jpg").write_bytes(b"")
    assert "51 images: a page shows at most 50; name fewer" in command(run, tmp_path / "*.jpg", "-o", out)[1]


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Page]:
    with browser.opened() as opened:
        yield opened


@pytest.mark.heavy
@pytest.mark.skipif(browser.program() is None, reason=f"none of {', '.join(browser.NAMES)} is installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("config", [*HSVITS.values(), VITS["plain"]], ids=[*HSVITS, "ViT"])
def test_the_page_asks_for_nothing_and_shows_every_picture(
    config: Any, scheme: str, chromium: browser.Page, tmp_path: Path
) -> None:
    networks = {f"<b>width {number}": predictor(model) for number, model in enumerate(built(config))}
    photographs.draw(tmp_path / "a.png", *photographs.CLASSES["rote Rose"], 1)
    found = [explain.explain(networks, name, tmp_path / "a.png") for name in (EVIL, "b")]
    found.append(explain.explain(networks, f"damaged {EVIL}", b"no image"))
    page = tmp_path / "page.html"
    page.write_text(explain_page.html(found, [one.chosen for one in networks.values()], EVIL), "utf-8")
    chromium.said.clear()
    chromium.asked.clear()
    chromium.size(390, 844)
    chromium.scheme(scheme)
    chromium.open(page)
    chromium.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert chromium.run("document.documentElement.scrollWidth") == 390
    chromium.run("document.getElementById('theme').click()")
    assert chromium.run("document.documentElement.dataset.theme") == {"light": "dark", "dark": "light"}[scheme]
    assert chromium.said == []
    assert [url for url in chromium.asked if not url.startswith("data:")] == [page.resolve().as_uri()]
    pictures = "[...document.querySelectorAll('main img')]"
    assert chromium.run(f"{pictures}.length") > 2
    assert chromium.run(f"{pictures}.every((one) => one.complete && one.naturalWidth && one.clientWidth)")
    named = "one.alt || one.closest('[role=img]')?.getAttribute('aria-label')"
    assert chromium.run(f"{pictures}.every((one) => {named})")
    assert chromium.run("document.querySelectorAll('b').length") == 0
    assert chromium.run("document.title") == f"What {EVIL} looks at"
    assert chromium.run("document.querySelectorAll('section').length") == 2
    assert chromium.run(
        "[...document.querySelectorAll('a, button, summary, .scroll')].every((one) => one.tabIndex >= 0)"
    )
