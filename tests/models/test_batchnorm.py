"""BatchNorm is PyTorch's over the samples it is told, and its running statistics move once a step."""

from __future__ import annotations

import torch
from torch import nn

from hsvit_ds.models.batchnorm import BatchNorm, Statistics, move_running_statistics


def pair(channels: int = 3) -> tuple[BatchNorm, nn.BatchNorm2d]:
    ours, theirs = BatchNorm(channels), nn.BatchNorm2d(channels)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


def test_equals_pytorchs_in_training_and_evaluation() -> None:
    ours, theirs = pair()
    ours.statistics = Statistics()
    for _ in range(3):
        x = torch.randn(8, 3, 5, 5)
        torch.testing.assert_close(ours(x), theirs(x))
        move_running_statistics(ours, applied=torch.tensor(True), channel=None)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_statistics_over_fixed_runs_do_not_depend_on_accumulation() -> None:
    (whole, _), (parts, _) = pair(), pair()
    parts.load_state_dict(whole.state_dict())
    x = torch.randn(12, 3, 4, 4)
    whole.statistics, parts.statistics = Statistics(runs=3), Statistics()
    outputs = whole(x)
    torch.testing.assert_close(torch.cat([parts(run) for run in x.chunk(3)]), outputs)
    for layer in (whole, parts):
        assert not layer.running_mean.any()  # nothing moves before the step's end
        move_running_statistics(layer, applied=torch.tensor(True), channel=None)
    torch.testing.assert_close(parts.running_mean, whole.running_mean)
    torch.testing.assert_close(parts.running_var, whole.running_var)
    torch.testing.assert_close(whole.running_mean, 0.1 * x.mean((0, 2, 3)))


def test_a_skipped_step_moves_nothing() -> None:
    layer, _ = pair()
    layer.statistics = Statistics()
    layer(torch.randn(4, 3, 2, 2))
    move_running_statistics(layer, applied=torch.tensor(False), channel=None)
    assert not layer.running_mean.any()
    assert not any(sums.any() for sums in layer.noted.values())
