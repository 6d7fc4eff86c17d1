"""The yardstick trains: on the recipe's images, in its order, and as far as ours."""

from __future__ import annotations

import pytest

from hsvit_ds.errors import RefusedError
from tests.ranks import ROOT
from tools import train_published

DIGITS = ROOT / "recipes/digits/hsvit.toml"
AS_PUBLISHED = ['model={kind="hsvit", variant="C2A2"}', "optimizer.decay=all"]


@pytest.mark.heavy
def test_the_published_network_learns_the_digits() -> None:
    keys = ["run.epochs=1", "grid.submodule_ranks=1", "data.workers=0"]
    (epoch,) = train_published.train(DIGITS, [*AS_PUBLISHED, *keys])
    assert epoch["top1"] > 60


@pytest.mark.parametrize("change", ["model.submodules=2", "model.depthwise=true", "optimizer.decay=matrices"])
def test_what_the_published_code_does_not_have_is_refused(change: str) -> None:
    with pytest.raises(RefusedError, match=r"the published code (has|trains)"):
        train_published.train(DIGITS, [*AS_PUBLISHED, "grid.submodule_ranks=1", change])
