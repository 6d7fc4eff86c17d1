"""Which network of a slimmable one to take: the best measured within a budget."""

from __future__ import annotations

import re
import statistics
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .. import models
from ..errors import RefusedError
from ..models import Model
from ..models.slimmable import Mix, Width
from ..models.vit import ViT

REPEATS = 20
"""Forwards that a latency is the median of, after five to warm up."""
_UNITS = {"": "macs", "macs": "macs", "params": "params", "ms": "ms"}


@dataclass(frozen=True)
class Chosen:
    """A width or a mix, and in words what it costs and why it is this one."""

    width: Width
    words: str


@dataclass(frozen=True)
class Budget:
    """What a network may cost: multiply-adds or parameters, or milliseconds of one image on this machine."""

    text: str
    most: float
    kind: str

    @classmethod
    def of(cls, text: str) -> Budget:
        """1.3G (multiply-adds of an image), 6Mparams or 8ms.

        Raises:
            RefusedError: anything else.
        """
        match = re.fullmatch(r"([0-9.]+)([kMG]?)(|macs|params|ms)", text)
        try:
            assert match is not None
            number, scale, unit = match.groups()
            return cls(text, float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[scale], _UNITS[unit])
        except (AssertionError, ValueError):
            raise RefusedError(f"--budget {text}: must look like 1.3G (multiply-adds), 6Mparams or 8ms") from None

    def cost(self, model: Model, width: Width) -> float:
        if self.kind == "ms":
            return latency_ms(model.subnet(width))
        return models.macs(model, width) if self.kind == "macs" else models.parameters(model, width)

    def choose(self, model: Model, widths: Sequence[Width], top1: Mapping[Width, float], split: str) -> Chosen:
        """Of the `widths` that cost no more the one with the best top-1, %, on a split (a wider network can be a worse
        one: Scala's at X = 25); where nothing was measured, the widest. Where that is the widest within, and
        only MLPs are sliced, the mix of these widths with the most multiply-adds within, which is not measured.

        Raises:
            RefusedError: none of them.
        """
        costs = {width: self.cost(model, width) for width in widths}
        within = [width for width in widths if costs[width] <= self.most]
        if not within:
            least = min(costs.values())
            raise RefusedError(
                f"--budget {self.text}: no trained width costs at most {self.most:g} {self.kind}; the least costs "
                f"{least:g}"
            )
        if measured := [width for width in within if width in top1]:
            best = max(measured, key=lambda width: (top1[width], -float(width)))
            why = f"top-1 {top1[best]:.2f} % on {split}, the best within {self.text}"
        else:
            best = max(within, key=float)
            why = f"the widest within {self.text}, as none was measured at this checkpoint"
        if best == max(within, key=float) and (mix := self._mix(model, widths, best, costs)) is not None:
            best, why = (
                mix,
                f"the mix with the most multiply-adds within {self.text}, not measured; {best.words}: {why}",
            )
        took = f", {costs[best]:.2f} ms here" if self.kind == "ms" else ""
        return Chosen(best, f"{cost_of(model, best)}{took}; {why}")

    def _mix(self, model: Model, widths: Sequence[Width], above: Width, costs: dict[Width, float]) -> Mix | None:
        """The largest mix of the `widths` within, None where no mix above a width is; what was asked for is noted in
        `costs`."""
        if not isinstance(model, ViT) or model.config.sliced != "mlp":
            return None

        def cost(mix: Mix) -> float:
            costs[mix] = self.cost(model, mix)
            return costs[mix]

        # Each kind of cost grows with the hidden features.
        larger = [mix for hidden, mix in mixes(widths, model.config.hidden) if hidden > _hidden(model, above)]
        count = bisect_right(larger, self.most, key=cost)
        return larger[count - 1] if count else None


def cost_of(model: Model, width: Width) -> str:
    """Width 0.50: 206,026 parameters, 0.0036 GMACs."""
    return f"{width.words}: {models.parameters(model, width):,} parameters, {models.macs(model, width) / 1e9:.4f} GMACs"


def _hidden(model: ViT, width: Width) -> int:
    return sum(width.layer(number).of(size) for number, size in enumerate(model.config.hidden))


def mixes(widths: Sequence[Width], sizes: Sequence[int]) -> list[tuple[int, Mix]]:
    """(Hidden features, mix) of every sum of hidden features that mixes of several of the `widths` have, the smallest
    first; of mixes of one sum the most even one, by the sum of squares.

    Args:
        widths: the smallest first. sizes: hidden features of each block at full width.
    """
    # By (last width, sum): the sum of squares, and the places of the widths. None is narrower than the one before it.
    found: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {(0, 0): (0, ())}
    for size in sizes:
        longer: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        for (last, total), (squares, places) in found.items():
            for place in range(last, len(widths)):
                own = widths[place].of(size)
                key, value = (place, total + own), (squares + own * own, (*places, place))
                longer[key] = min(value, longer.get(key, value))
        found = longer
    best: dict[int, tuple[int, tuple[int, ...]]] = {}
    for (_, total), value in found.items():
        best[total] = min(value, best.get(total, value))
    return [
        (total, Mix.of_layers([widths[place] for place in places]))
        for total, (_, places) in sorted(best.items())
        if len(set(places)) > 1
    ]


@torch.no_grad()
def latency_ms(model: Model) -> float:
    """Milliseconds of one image on the model's device, the median of `REPEATS`."""
    model.eval()
    device = next(model.parameters()).device
    x = torch.zeros(1, model.channels, model.image_size, model.image_size, device=device)
    times = []
    for _ in range(5 + REPEATS):
        start = time.perf_counter()
        model(x).sum().item()  # waits for a GPU
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[5:])
