"""Workers that die are replaced without a gap; what a worker raises is not hidden."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import pytest
import torch

from hsvit_ds.data.batch import Images
from hsvit_ds.data.loader import RESTARTS, Loader
from hsvit_ds.errors import RefusedError

# What PyTorch raises when a worker dies: seen at rest, while it hands over a tensor, while it is asked.
DEATHS = [
    RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
    ConnectionResetError(104, "Connection reset by peer"),
    EOFError(),
]


def answer(number: int) -> Images:
    return Images(torch.tensor([number]), torch.empty(0), torch.empty(0), [])


class Fragile:
    """Gives the numbers from the first on, and raises when it comes to some of them for the first time."""

    def __init__(self, faults: dict[int, list[Exception]]) -> None:
        self.faults = faults

    def __call__(self, first: int) -> Iterator[Images]:
        for number in count(first):
            if self.faults.get(number):
                raise self.faults[number].pop(0)
            yield answer(number)


@pytest.mark.parametrize("death", DEATHS, ids=lambda e: type(e).__name__)
def test_answers_go_on_where_a_worker_died(death: Exception) -> None:
    loader = Loader(Fragile({0: [death], 3: [death] * RESTARTS, 4: [death]}), workers=1)
    assert [int(a.pixels) for a in islice(iter(loader), 8)] == list(range(8))
    loader.close()


def test_workers_that_keep_dying_are_refused() -> None:
    loader = Loader(Fragile({2: [DEATHS[0]] * (RESTARTS + 1)}), workers=1)
    answers = iter(loader)
    assert [int(next(answers).pixels) for _ in range(2)] == [0, 1]
    with pytest.raises(RefusedError, match=r"the data workers died 4 times in a row .* Set data.workers lower"):
        next(answers)


@pytest.mark.parametrize(
    "error", [OSError("Caught OSError in DataLoader worker process 0."), RuntimeError("no"), KeyError(1)]
)
def test_a_defect_in_a_worker_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)):
        list(islice(iter(Loader(Fragile({2: [error]}), workers=1)), 4))


def test_a_closed_loader_leaves_no_thread() -> None:
    loader = Loader(Fragile({}), workers=1)
    next(iter(loader))
    loader.close()
    assert loader._thread is not None
    assert not loader._thread.is_alive()
