"""Teachers: what may teach, and answers that are computed once and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsvit_ds.data.batch import Batch
from hsvit_ds.data.sets import SETS
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.errors import RefusedError
from hsvit_ds.run import recipe as recipes
from hsvit_ds.tasks.teacher import Config, Teacher, load

from ..workers.common import ROOT, steps, trainer

TIMM = "timm/vit_tiny_patch16_224"
RESNET = "timm/resnet18"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to learn from."""
    folder = tmp_path_factory.mktemp("teacher")
    made = trainer(folder, ["model.widths.smallest=1"], base="scala")
    steps(made, 1)
    made.checkpoints.save(Position(0, 1, 1))
    assert made.checkpoints.wait() is None
    return folder


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a timm model for digits, as DeiT's training code saves them."""
    import timm

    path = tmp_path_factory.mktemp("timm") / "resnet.pth"
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("resnet18", num_classes=10, in_chans=1).state_dict()}, path)
    return path


def batch(step: int, start: int = 0) -> tuple[Batch, Tensor]:
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(step * 100 + start))
    index = torch.arange(start, start + 4)
    return Batch(images.to(torch.uint8), torch.zeros(4), torch.empty(4, 0), index, 0, step), images


def teacher(config: Config, seed: int = 0) -> Teacher:
    return Teacher(config, SETS["digits"], torch.device("cpu"), torch.float32, batch=8, key={"seed": seed})


@pytest.mark.parametrize("kind", ["run", "timm"])
def test_a_teacher_is_frozen_and_answers_as_itself(kind: str, run: Path, resnet: Path) -> None:
    config = Config(name=str(run)) if kind == "run" else Config(name=RESNET, weights=str(resnet))
    module = load(config, SETS["digits"])
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    made, images = batch(0)
    assert torch.equal(teacher(config)(made, images), module(images).argmax(-1))
    soft = teacher(replace(config, distillation="soft"))(made, images)
    torch.testing.assert_close(soft, module(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_cached_answers_are_the_same_and_computed_once(
    distillation: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(name=str(run), distillation=distillation, cache=str(tmp_path))
    asked = []
    places = [(0, 0), (0, 4), (3, 4)]
    expected = {place: teacher(replace(config, cache=""))(*batch(*place)) for place in places}
    for _ in range(2):
        cached = teacher(config)
        forward = cached.module.forward
        monkeypatch.setattr(cached.module, "forward", lambda x, f=forward: asked.append(len(x)) or f(x))
        for place in places:
            assert torch.equal(cached(*batch(*place)), expected[place])
    assert asked == [4, 4, 4]
    teacher(config, seed=1)
    assert len(list(tmp_path.iterdir())) == 2, "another seed has other images"


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            {"name": "timm/vit_tinny"},
            {},
            r'task.teacher.name = "vit_tinny": timm .* has no such model; near it: vit_',
        ),
        ({"name": TIMM}, {}, "task.teacher.name = timm/vit_tiny_patch16_224 is for 1000 classes, the data has 10"),
        (
            {"name": "timm/deit_tiny_patch16_224"},
            {"classes": 1000},
            "task.teacher.name = timm/deit_tiny_patch16_224 is for 224 pixels a side, the data has 32",
        ),
        (
            {"name": RESNET, "weights": "RESNET"},
            {"classes": 7},
            r"does not fit .* for 7 classes .*fc.weight has shape",
        ),
        ({"name": RESNET, "weights": "missing.pth"}, {}, "missing.pth: no such file"),
        ({"name": "RUN"}, {"classes": 7}, r"is for 10 classes, the data has 7"),
        ({"name": "RUN"}, {"image_size": 64}, r"is for 32 pixels a side, the data has 64"),
        ({"name": "nowhere"}, {}, r"nowhere: no checkpoint latest of a run there"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    config: dict[str, str], change: dict[str, int], message: str, run: Path, resnet: Path
) -> None:
    places = {"RUN": str(run), "RESNET": str(resnet)}
    made = Config(**{key: places.get(value, value) for key, value in config.items()})
    with pytest.raises(RefusedError, match=message):
        load(made, replace(SETS["digits"], **change))  # type: ignore[arg-type]


def test_weights_that_timm_cannot_download_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # 40 s of retries otherwise
    facts = replace(SETS["digits"], classes=1000, channels=3, image_size=224)
    with pytest.raises(RefusedError, match=r"timm cannot get the weights .* set task.teacher.weights to the file"):
        load(Config(name="timm/deit_tiny_patch16_224"), facts)


def test_its_memory_is_part_of_the_plan(run: Path) -> None:
    recipe = recipes.read(ROOT / "recipes/digits/scala.toml", [f"task.teacher.name={run}", "model.distilled=true"])
    _, plan = recipes.resolve(recipe, 1)
    expected = sum(p.numel() for p in load(Config(name=str(run)), SETS["digits"]).parameters())
    assert plan.teacher_bytes == 4 * expected
    assert recipes.resolve(recipes.read(ROOT / "recipes/digits/scala.toml"), 1)[1].teacher_bytes == 0
