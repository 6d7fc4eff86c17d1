"""A training step of MobileNetV2 and UniFormer beside the same network elsewhere: `python -m tools.benchmark families`.

All of a step: forward, backward and AdamW, of ours under the engine with random drop path off, as the others have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsvit_ds.engine.engine import BatchStatistics, Engine
from hsvit_ds.engine.engine import Config as EngineConfig
from hsvit_ds.engine.optimizer import Config as OptimizerConfig
from hsvit_ds.grid.grid import Config as GridConfig
from hsvit_ds.grid.grid import Grid
from hsvit_ds.models import mobilenet, uniformer
from hsvit_kernels.random import Draw

from .published_uniformer import UniFormer
from .steps import Step, machine, median_ms, show

SIZE, BATCH, CLASSES = 224, 8, 1000


def plain_uniformer(config: uniformer.Config) -> nn.Module:
    """All tokens attend, also of XS: the published loop over stages, without what leaves tokens out."""
    return UniFormer(replace(config, pruned=False).resolved(SIZE), 3, CLASSES)


S_PLUS, XS = uniformer.Config(variant="UniFormer-S+"), uniformer.Config(variant="UniFormer-XS")
CASES: dict[str, tuple[Any, str, Callable[[], nn.Module]]] = {
    "MobileNetV2": (mobilenet.Config(variant="MobileNetV2"), "timm", lambda: timm.create_model("mobilenetv2_100")),
    "UniFormer-S+": (S_PLUS, "plain PyTorch", lambda: plain_uniformer(S_PLUS)),
    "UniFormer-XS": (XS, "plain PyTorch, all tokens attend", lambda: plain_uniformer(XS)),
}
"""Name: ours, what the other one is called, and how it is made."""


def ours(config: Any, images: Tensor, labels: Tensor, grid: Grid, bf16: bool) -> Step:
    engine = Engine(
        config.build(image_size=SIZE, channels=3, classes=CLASSES),
        EngineConfig(zero_stage=0),
        OptimizerConfig(),
        grid,
        micro_batch=BATCH,
        accumulation=1,
        batch_statistics=BatchStatistics(runs=1, synced=False),
        bf16=bf16,
    )
    draw = Draw.of(0, image=torch.arange(BATCH), device=grid.device)

    def losses() -> Iterator[Tensor]:
        output = engine(images, draw=draw)
        heads = output if isinstance(output, tuple) else (output,)
        yield torch.stack([F.cross_entropy(logits.float(), labels) for logits in heads]).mean()

    return lambda: engine.step(lambda: iter([losses()]), 1, 1e-3, 0)


def other(model: nn.Module, images: Tensor, labels: Tensor, bf16: bool) -> Step:
    model = model.to(images.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images = images.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def run(repeats: int, threads: int, out: Path | None) -> None:
    torch.set_num_threads(threads)
    grid, rows = Grid(GridConfig(), submodules=1), list[dict[str, Any]]()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to(grid.device)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator).to(grid.device)
    for name, (config, beside, make) in CASES.items():
        for bf16 in (False, True):
            steps = {
                "hsvit-ds": ours(config, images, labels, grid, bf16),
                beside: other(make(), images, labels, bf16),
            }
            took = median_ms(steps, repeats, grid.device)
            for implementation, ms in took.items():
                rows.append(
                    {
                        "network": name,
                        "precision": "bf16" if bf16 else "fp32",
                        "implementation": implementation,
                        "images/s": round(1000 * BATCH / ms, 2),
                        "over the other": f"{took[beside] / ms:.2f}x",
                    }
                )
    show(rows, f"A step of {BATCH} images of {SIZE} px, median of {repeats}: {machine(grid.device)}", out)
