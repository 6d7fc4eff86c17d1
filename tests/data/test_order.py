"""The order of samples depends on seed and epoch only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hsvit_ds.data.order import Order, Share
from tools.benchmarks.index import whole

ORDER = Order(shards=(40, 25, 60, 3), window=16, global_batch=12, seed=5)


@pytest.mark.parametrize("shards", [(128,), (1,) * 128, (40, 25, 60, 3), (0, 0, 7, 0, 120, 1, 0), (3,)])
@pytest.mark.parametrize("window", [1, 5, 12, 16, 64, 127, 128, 8192, 2**70])
@pytest.mark.parametrize(("batch", "repeats", "fill"), [(12, 1, False), (12, 1, True), (12, 5, True), (200, 3, True)])
def test_a_step_has_what_the_whole_permutation_has_there(
    shards: tuple[int, ...], window: int, batch: int, repeats: int, fill: bool
) -> None:
    order = Order(shards, window, batch, seed=5, repeats=repeats, fill=fill)
    distinct, slot = -(-batch // repeats), torch.arange(batch)
    for epoch in (0, 3):
        expected, step_of = whole(replace(order, window=min(window, 2**20)), epoch), order.batches(epoch)
        assert torch.equal(order.epoch(epoch), expected)
        for step in [*range(order.steps_per_epoch), 1, 0, order.steps_per_epoch - 1]:
            if 0 <= step < order.steps_per_epoch:
                samples, copies = step_of(step)
                assert torch.equal(samples, expected[(step * distinct + slot % distinct) % order.samples])
                assert torch.equal(copies, slot // distinct)


@pytest.mark.parametrize("length", [10_000, 10**9])
def test_a_step_computes_its_own_windows_only(length: int) -> None:
    """Of a billion samples, and of more than 32 bits can count."""
    order = Order((length,) * (100_000 if length < 10**9 else 100), 65_536, 1024, seed=1)
    last = order.batches(2)(order.steps_per_epoch - 1)[0]
    assert len(last.unique()) == 1024
    assert len((last // length).unique()) <= 8
    places = [order.batches(2)(order.steps_per_epoch * i // 50)[0] for i in range(50)]
    assert max(int(samples.max()) for samples in places) > 0.8 * order.samples
    assert all(0 <= int(samples.min()) <= int(samples.max()) < order.samples for samples in places)


def test_an_epoch_holds_every_sample_once() -> None:
    assert torch.equal(ORDER.epoch(3).sort().values, torch.arange(128))
    assert ORDER.steps_per_epoch == 10


def test_epochs_and_seeds_differ_and_repeat() -> None:
    other_seed = Order(ORDER.shards, ORDER.window, ORDER.global_batch, seed=6)
    assert torch.equal(ORDER.epoch(3), ORDER.epoch(3))
    for other in (ORDER.epoch(4), other_seed.epoch(3)):
        assert (other == ORDER.epoch(3)).double().mean() < 0.1


def test_reads_stay_almost_sequential() -> None:
    """Samples move within a window only, so few shards are open at a time."""
    order = Order(shards=(100,) * 50, window=200, global_batch=10, seed=0).epoch(0)
    for window in order.split(200):
        assert len((window // 100).unique()) == 2
    assert (order.diff() == 1).double().mean() < 0.05


@pytest.mark.parametrize(("replicas", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 3)])
def test_replicas_and_micro_batches_cover_the_global_batch_once(replicas: int, accumulation: int) -> None:
    shares = [Share(24, accumulation, replicas, r) for r in range(replicas)]
    indices = [share.indices(a) for a in range(accumulation) for share in shares]
    assert torch.equal(torch.cat(indices), torch.arange(24))


def test_the_order_is_fixed_for_good() -> None:
    """A run resumed with another version must see the same samples."""
    assert ORDER.epoch(0)[:6].tolist() == [55, 51, 52, 41, 46, 44]


@pytest.mark.parametrize("fill", [False, True])
def test_the_last_incomplete_batch_is_dropped_or_filled(fill: bool) -> None:
    order = replace(ORDER, fill=fill)
    batches = [order.batches(2)(step)[0] for step in range(order.steps_per_epoch)]
    assert len(batches) == (11 if fill else 10)
    assert all(len(batch) == 12 for batch in batches)
    seen = torch.cat(batches)
    assert torch.equal(seen[:120], order.epoch(2)[:120])
    if fill:
        assert torch.equal(seen.unique(), torch.arange(128))
        assert torch.equal(seen[128:], order.epoch(2)[:4])


@pytest.mark.parametrize(("repeats", "distinct"), [(1, 12), (3, 4), (5, 3)])
def test_repeated_samples_stand_in_one_global_batch_as_copies_of_their_own(repeats: int, distinct: int) -> None:
    order = replace(ORDER, repeats=repeats)
    seen = set()
    for step in range(order.steps_per_epoch):
        samples, copies = order.batches(0)(step)
        assert len(samples.unique()) == distinct
        assert len({*zip(samples.tolist(), copies.tolist(), strict=True)}) == 12
        assert not seen & set(samples.tolist())
        seen |= set(samples.tolist())
