"""A run's summary for tests that need one without a run."""

from __future__ import annotations

from typing import Any

from hsvit_ds.run.summary import Cost, Data, Summary


def summary(**changes: Any) -> Summary:
    """Of a small HSViT on the digits."""
    known: dict[str, Any] = {
        "id": "0" * 32,
        "title": "run-001",
        "recipe": "recipes/digits/hsvit.toml",
        "changed": {"model.variant": "C2A2"},
        "data": Data(
            name="digits",
            fingerprint="",
            counts={"train": 1150, "val": 288, "test": 359},
            val="val",
            test="test",
            classes=10,
            image_size=32,
        ),
        "costs": (Cost(width="1.00", parameters=812_298, macs=101_700_000),),
        "ranks": 2,
        "cores": 2,
        "gpus": 0,
        "hosts": ("here",),
        "device": "a CPU",
        "launcher": "deepspeed",
        "commit": "",
        "dirty": False,
        "versions": {"python": "3.11.0"},
        "started": 1_700_000_000.0,
        "steps": 360,
        "steps_per_epoch": 36,
        "epochs": 10,
    }
    return Summary(**known | changes)
