"""What became of the steps: left on the device until it is asked for, as reading it waits for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RefusedError, counted
from ..grid.grid import Grid
from ..models.batchnorm import forget
from .zero import Shards

Passes = Callable[[], Iterator[Iterable[Tensor]]]
"""For each micro batch, the losses of its passes, each computed when asked for."""


class NonFiniteError(RefusedError):
    """Too many steps in a row had a non-finite gradient."""


@dataclass(frozen=True)
class StepResult:
    """Of one step, on the device."""

    step: int
    losses: Tensor
    """[P], of each pass the mean over this rank's micro batches."""
    grad_norm: Tensor
    """Global norm before clipping; not finite for a skipped step."""
    applied: Tensor
    """Whether the gradient was finite; a bool."""


class Settled(NamedTuple):
    """A `StepResult` on the host."""

    step: int
    losses: list[float]
    grad_norm: float
    applied: bool


class Outcomes:
    """The results of steps that are still to be looked at, and how many were skipped.

    Args:
        limit: steps in a row that may be skipped.
    """

    def __init__(self, module: nn.Module, shards: Shards, grid: Grid, limit: int) -> None:
        self.module, self.shards, self.grid, self.limit = module, shards, grid, limit
        self.skipped = 0
        self._in_a_row = 0
        self._unsettled: list[StepResult] = []
        self._passes: Passes = lambda: iter(())

    def add(self, result: StepResult, passes: Passes) -> None:
        """passes: give the step's micro batches anew."""
        self._unsettled.append(result)
        self._passes = passes

    def settle(self) -> Iterator[Settled]:
        """What became of the steps since the last call, brought from the device at once. Collective.

        Raises:
            NonFiniteError: too many in a row were skipped.
        """
        unsettled, self._unsettled = self._unsettled, []
        if not unsettled:
            return
        rows = [torch.cat((r.losses.double(), torch.stack((r.grad_norm, r.applied.double())))) for r in unsettled]
        found = iter(torch.cat(rows).tolist())
        for result, row in zip(unsettled, rows, strict=True):
            *losses, norm, applied = islice(found, len(row))
            if applied:
                self._in_a_row = 0
            else:
                self._skip(result.step, sum(losses), is_last=result is unsettled[-1])
            yield Settled(result.step, losses, norm, bool(applied))

    def forget(self) -> None:
        """Begin anew: the run goes back to a checkpoint."""
        self._in_a_row, self._unsettled = 0, []

    def _skip(self, step: int, loss: float, is_last: bool) -> None:
        """Count a skipped step; at the limit stop, naming where the first non-finite number appears."""
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row <= self.limit:
            return
        if is_last:
            places = self.grid.gather(self._diagnose())
            rank = next((rank for rank, place in enumerate(places) if place), None)
            where = "every loss and output is finite, so the backward pass overflowed"
            if rank is not None:
                where = f"rank {rank}: loss {loss:g}, {places[rank]}"
        else:
            where = "its images are gone; run.log_every = 1 looks at once and names the place"
        raise NonFiniteError(
            f"{counted(self._in_a_row, 'step')} in a row, up to step {step}, had a non-finite gradient "
            f"(engine.max_skipped_steps = {self.limit}); {where}"
        )

    def _diagnose(self) -> str:
        """Where this rank's first non-finite number is, empty where there is none. Collective.

        Repeats the last step's forwards: randomness is counted, so they are the same.
        """
        found = [
            f"non-finite parameter {fragment.name}"
            for flat, fragments in zip(self.shards.masters, self.shards.layout, strict=True)
            for fragment in fragments
            if not bool(fragment.of(flat).isfinite().all())
        ]

        def look(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                    found.append(f"non-finite output of {name or 'the model'}")

            return hook

        hooks = [m.register_forward_hook(look(n)) for n, m in self.module.named_modules()]
        try:
            with torch.no_grad():
                for micro in self._passes():
                    found += ["non-finite loss" for loss in micro if not bool(loss.isfinite())]
        finally:
            for hook in hooks:
                hook.remove()
            forget(self.module)
        return found[0] if found else ""
