"""A model is one graph for torch.compile, in every precision, and stays that graph from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsvit_ds.models import hsvit, mobilenet, slimmable, uniformer, vit
from hsvit_ds.models.batchnorm import Statistics, move_running_statistics, set_statistics
from hsvit_ds.models.slimmable import FULL, Width
from hsvit_kernels import dispatch, force
from hsvit_kernels.random import Draw

pytestmark = pytest.mark.heavy

PRECISIONS = [torch.float32, torch.bfloat16]  # the graph of fp16 is bf16's
SLIM = {"smallest": 0.5, "granularity": 0.25}


class OneRank:
    """A grid without other ranks. Its collectives would break a graph."""

    submodule_ranks, absent = 1, ()

    @torch.compiler.disable
    def exchange(self, sums: Tensor, form: str) -> Tensor:
        return sums.sum(1)


def small_hsvit() -> nn.Module:
    widths = slimmable.Config(**SLIM)
    config = hsvit.Config(
        kernels=(8, 16), pool_strides=(4, 2), groups=8, depth=2, heads=2, embedding=16, submodules=2, widths=widths,
        submodule_drop=0.2,
    )  # fmt: skip
    return config.build(image_size=16, channels=3, classes=10, grid=OneRank())  # type: ignore[arg-type]


def rounding_hsvit() -> nn.Module:
    config = hsvit.Config(
        kernels=(8, 16), pool_strides=(4, 2), groups=8, depth=2, heads=2, embedding=16, submodules=2, depthwise=True,
        dropout=0.0,
    )  # fmt: skip
    return config.build(image_size=16, channels=3, classes=10, exchange="int8")


def small_vit() -> nn.Module:
    widths = slimmable.Config(**SLIM)
    config = vit.Config(embedding=16, heads=2, depth=2, patch_size=8, drop_path=0.2, widths=widths)
    return config.build(image_size=16, channels=3, classes=10)


def small_mobilenet() -> nn.Module:
    config = mobilenet.Config(
        channels=(16, 16, 32),
        depths=(1, 2),
        strides=(2, 1, 2),
        features=32,
        drop_path=0.2,
        widths=slimmable.Config(**SLIM),
    )
    return config.build(image_size=16, channels=3, classes=10)


def small_uniformer() -> nn.Module:
    config = uniformer.Config(
        channels=(16, 16, 32, 32), depths=(1, 1, 2, 1), heads=(2, 2), strides=(2, 1, 2, 1), drop_path=0.2, pruned=True,
        widths=slimmable.Config(**SLIM),
    )  # fmt: skip
    return config.build(image_size=16, channels=3, classes=10)


def step(model: nn.Module, low: torch.dtype, width: Width) -> Callable[[int], Tensor]:
    images = torch.randn(4, 3, 16, 16)

    def forward(images: Tensor, draw: Draw) -> Any:
        with torch.autocast("cpu", low, enabled=low != torch.float32):
            return model(images, draw=draw, width=width)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=False)
    return lambda number: compiled(images, Draw.of(0, number, image=torch.arange(4)))


@pytest.mark.parametrize(
    ("kernels", "low"), [*(("auto", low) for low in PRECISIONS), ("triton", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("build", [small_hsvit, rounding_hsvit, small_vit, small_mobilenet, small_uniformer])
def test_a_model_is_one_graph_that_is_compiled_once(
    build: Callable[[], nn.Module], kernels: str, low: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "triton" and not dispatch.INTERPRETED:
        pytest.skip("the model is on the CPU, and Triton's interpreter not chosen where there is a GPU")
    torch._dynamo.reset()
    force(kernels)
    monkeypatch.setattr(dispatch, "compiling", True)  # the graph is looked at, not its numbers
    model = build().train()
    set_statistics(model, Statistics(runs=2))
    forward = step(model, low, FULL)
    forward(0).float().sum().backward()  # fullgraph: it raises where the graph would break
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(1, 4):  # micro batches, and a step's end between them
            forward(number).float().sum().backward()
            if number == 2:
                move_running_statistics(model, applied=torch.tensor(True), channel=None)


@pytest.mark.slow
@pytest.mark.parametrize("build", [small_hsvit, small_vit])
def test_every_width_is_a_graph(build: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    model = build().train()
    for width in model.config.widths.all:  # type: ignore[union-attr]
        found = step(model, torch.bfloat16, width)(0)
        assert found.shape == (4, 10)


def test_statistics_are_noted_by_compiled_forwards_as_by_eager_ones() -> None:
    moved = []
    for compiled in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = small_hsvit().train()
        set_statistics(model, Statistics(runs=2))
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            torch.manual_seed(1)
            forward = step(model, torch.float32, FULL)
            for number in range(3):
                forward(number)
        move_running_statistics(model, applied=torch.tensor(True), channel=None)
        moved.append({name: b for name, b in model.named_buffers() if name.endswith(("mean", "var"))})
    assert len(moved[0]) == 8
    for name, buffer in moved[0].items():
        assert bool((buffer != buffer.round()).any()), name
        torch.testing.assert_close(buffer, moved[1][name])


def test_a_rounded_exchange_is_compiled_to_the_same_numbers_and_gradients() -> None:
    torch._dynamo.reset()
    model, x = rounding_hsvit().train(), torch.randn(4, 3, 16, 16)
    found = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        logits = forward(x)
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
