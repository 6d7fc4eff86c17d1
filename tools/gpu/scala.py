"""Scala's step of four widths on one GPU, captured and not, beside the published code's shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hsvit_kernels
from hsvit_ds.engine.captured import Captured
from hsvit_ds.models import slimmable, vit
from tools.benchmarks.published_scala import RATIOS, Network, total

from .here import Here, fitting, smaller
from .kernels import use_tuned

BATCH = 256
SHAPES = {"DeiT-S": (384, 6), "DeiT-B": (768, 12)}
Step = Callable[[], Any]


def _trained(model: torch.nn.Module, forwards: Callable[[], Iterator[Any]], labels: Tensor) -> Step:
    """Forward and backward of every width, and AdamW: without the engine, which needs more than a bare machine has."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        for loss in total(forwards(), labels):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ours(name: str, images: Tensor, labels: Tensor, captured: bool, toy: bool) -> Step:
    widths = slimmable.Config(smallest=0.25, granularity=0.25)
    tiny: dict[str, Any] = {"depth": 1, "embedding": 64, "heads": 4} if toy else {"variant": name}
    config = vit.Config(patch_size=16, distilled=True, widths=widths, **tiny)
    model = config.build(image_size=images.shape[-1], channels=3, classes=1000).to(images.device).train()
    model.set_distilled_training()
    low = torch.bfloat16 if images.is_cuda else None
    if images.is_cuda:
        with hsvit_kernels.listing() as cases, torch.autocast("cuda", torch.bfloat16):
            for width in widths.all:
                model(images, width=width)
        hsvit_kernels.prepare(cases, images.device)
    if captured:
        model.forward = Captured(model, model.forward, low)  # type: ignore[assignment,method-assign]

    def forwards() -> Iterator[Any]:
        for width in reversed(widths.all):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=low is not None):
                yield model(images, width=width)

    return _trained(model, forwards, labels)


def _published(name: str, images: Tensor, labels: Tensor, toy: bool) -> Step:
    width, heads = (64, 4) if toy else SHAPES[name]
    model = Network(width, heads, 1 if toy else 12, images.shape[-1], 16, 1000).to(images.device)

    def forwards() -> Iterator[Any]:
        for ratio in RATIOS:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
                yield model(images, ratio)

    return _trained(model, forwards, labels)


def _timed(make: Callable[[], Step], here: Here) -> dict[str, float]:
    """Milliseconds of a step, the median of some after the first, and GiB at the peak."""
    if here.toy:
        make()()
        return {"ms": 0.0, "GiB": 0.0}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step, times = make(), []
    for number in range(13):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number > 2:
            times.append(1000 * (time.perf_counter() - began))
    return {"ms": round(statistics.median(times), 2), "GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def four_widths(name: str, here: Here) -> dict[str, Any]:
    use_tuned(here)
    asked, side = (2, 32) if here.toy else (BATCH, 224)
    torch.manual_seed(0)

    def all_of(batch: int) -> dict[str, Any]:
        images = torch.randn(batch, 3, side, side, device=here.device)
        labels = torch.randint(1000, (batch,), device=here.device)
        ways = {
            "hsvit-ds, captured": partial(_ours, name, images, labels, not here.toy, here.toy),
            "hsvit-ds": partial(_ours, name, images, labels, False, here.toy),
            "published": partial(_published, name, images, labels, here.toy),
        }
        found = {way: _timed(make, here) for way, make in ways.items()}
        for row in found.values():
            row["images/s"] = round(1000 * batch / row["ms"], 1) if row["ms"] else 0.0
        return found

    batch, found = fitting(asked, all_of)
    return {"batch": batch, "ways": found, "why": smaller(asked, batch)}
