"""Which widths a step trains, what they learn from, and each part of Scala switched off by itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hsvit_ds.data.augment import Config as AugmentConfig
from hsvit_ds.data.batch import Batch
from hsvit_ds.data.sets import SETS
from hsvit_ds.models.network import Distilled
from hsvit_ds.models.slimmable import Change
from hsvit_ds.models.slimmable import Config as Widths
from hsvit_ds.tasks import teacher
from hsvit_ds.tasks.scala import SAMPLING, Config, Sampler, Scala

# Section 3.1 and the published code's ranges: the widths that the large (m2) and the small (m1) one are drawn from.
RANGES = [
    (0.25, 0.25, "code", [0.5, 0.75], []),
    (0.25, 0.125, "code", [0.625, 0.75, 0.875], [0.375, 0.5]),
    (0.25, 0.0625, "code", 6, 5),
    (0.25, 0.03125, "code", 12, 11),
    (0.5, 0.0625, "code", 4, 3),
    (0.25, 0.25, "paper", [0.75], [0.5]),
    (0.25, 0.125, "paper", [0.75, 0.875], [0.375, 0.5, 0.625]),
    (0.25, 0.0625, "paper", 5, 6),
    (0.25, 0.03125, "paper", 11, 12),
    (0.5, 0.0625, "paper", 3, 4),
]


def sampler(
    smallest: float = 0.25,
    granularity: float = 0.125,
    seed: int = 0,
    then: tuple[Change, ...] = (),
    **options: Any,
) -> Sampler:
    widths = Widths(smallest=smallest, granularity=granularity, then=then)
    return Sampler(Config(**options), widths, seed, steps_per_epoch=10)


@pytest.mark.parametrize(("smallest", "granularity", "kind", "large", "small"), RANGES)
def test_stable_sampling_draws_from_the_published_ranges(
    smallest: float, granularity: float, kind: str, large: Any, small: Any
) -> None:
    if granularity == 0.125 and kind == "code":  # mid = 0.625 is one of the widths: it goes to the larger half
        assert 0.625 in large
    draws = [sampler(smallest, granularity, sampling=kind).draw(step) for step in range(600)]
    middles = [[float(w) for w in widths[1:-1]] for widths in draws]
    assert {float(widths[0]) for widths in draws} == {1.0}
    assert {float(widths[-1]) for widths in draws} == {smallest}
    if small == []:  # the published code fails there; an empty range gives no pass
        assert {len(widths) for widths in draws} == {3}
        assert {m[0] for m in middles} == set(large)
        return
    found_large, found_small = ({m[i] for m in middles} for i in (0, 1))
    if isinstance(large, int):
        assert (len(found_large), len(found_small)) == (large, small)
        mid = (smallest + 1) / 2
        assert min(found_large) >= mid >= max(found_small)
        assert (mid in found_large) == (kind == "code")
    else:
        assert (found_large, found_small) == (set(large), set(small))


def test_draws_are_even_and_depend_on_seed_and_step_only() -> None:
    draws = [sampler(0.25, 0.0625).draw(step)[2] for step in range(6000)]
    counts = torch.tensor([draws.count(width) for width in set(draws)]).float()
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 4 * (1000 * 5 / 6) ** 0.5
    one, other = sampler(seed=0), sampler(seed=1)
    assert [one.draw(s) for s in range(50)] == [sampler(seed=0).draw(s, first=s % 3) for s in range(50)]
    assert [one.draw(s) for s in range(50)] != [other.draw(s) for s in range(50)]


def test_micro_batches_can_draw_their_own_widths() -> None:
    own = sampler(same_widths=False)
    assert any(own.draw(step, first=0) != own.draw(step, first=8) for step in range(20))
    assert [own.draw(s, first=0) for s in range(20)] == [sampler().draw(s) for s in range(20)]


@pytest.mark.parametrize(
    ("options", "passes", "drawn"),
    [
        ({"sampling": "sandwich"}, 4, 7),
        ({"sampling": "interior"}, 4, 7),
        ({"sampling": "interior", "granularity": 0.375}, 3, 3),
        ({"sampling": "all"}, 7, 7),
        ({"sampling": "all", "granularity": 0.25}, 4, 4),
        ({"sampling": "single"}, 1, 7),
        ({"sampling": "fixed", "width": 0.5}, 1, 1),
        ({"sampling": "paper", "full_epochs": 1}, 4, 7),
    ],
)
def test_baselines_draw_as_they_should(options: dict[str, Any], passes: int, drawn: int) -> None:
    found = sampler(**options)
    draws = [found.draw(step) for step in range(10, 300)]
    assert {len(set(widths)) for widths in draws} == {passes} == {found.passes(10)}
    assert len({width for widths in draws for width in widths}) == drawn
    assert all(list(map(float, widths)) == sorted(map(float, widths), reverse=True) for widths in draws)
    assert len(found.trained(300)) == drawn


@pytest.mark.parametrize(
    ("family", "sampling", "large", "small"),
    [
        (("1/8", "1/4", "1/2", 1), "paper", [], [0.25, 0.5]),  # mid is 9/16
        (("1/8", "1/4", "1/2", 1), "code", [0.5], [0.25]),
        ((0.125, 0.25, 0.75, 0.875, 1), "paper", [0.75, 0.875], [0.25]),
        ((0.5, 0.75, 1), "paper", [], [0.75]),
        ((0.5, 1), "code", [], []),
    ],
)
def test_the_ranges_of_named_widths_meet_in_the_middle_of_smallest_and_full(
    family: tuple[Any, ...], sampling: str, large: list[float], small: list[float]
) -> None:
    widths = Widths(family=family)
    ranges = Config(sampling=sampling).ranges(widths, widths.all)
    expected = [[1.0], large, small, [float(widths.all[0])]]
    assert [[float(width) for width in range_] for range_ in ranges] == [range_ for range_ in expected if range_]


def test_all_of_a_named_family_are_in_every_step() -> None:
    widths = Widths(family=("1/8", "1/4", "1/2", 1))
    found = Sampler(Config(sampling="all"), widths, seed=0, steps_per_epoch=10)
    assert {found.draw(step) for step in range(50)} == {tuple(reversed(widths.all))}
    assert found.trained(1) == found.possible == widths.all
    assert list(found.expected_epochs(30).values()) == [3.0] * 4


def test_interior_widths_are_all_below_full_alike() -> None:
    """Three of the X - 1 widths in each step, so each, the smallest among them, in 3 / (X - 1) of the steps."""
    draws = [sampler(0.25, 0.0625, sampling="interior").draw(step) for step in range(4000)]
    assert {float(widths[0]) for widths in draws} == {1.0}
    counts = torch.tensor([sum(width in widths for widths in draws) for width in set(sum(draws, ()))]).float()
    below = counts[counts < 4000]
    assert len(below) == 12
    assert (below - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("sampling", ["paper", "code"])
@pytest.mark.parametrize(("pinned", "place"), [(0.8125, 1), (0.4375, 2)])
def test_a_pinned_width_takes_the_place_of_the_one_of_its_range(sampling: str, pinned: float, place: int) -> None:
    """Figure 14's widths; the other three are those of the unpinned run."""
    free, held = sampler(0.25, 0.0625, sampling=sampling), sampler(0.25, 0.0625, sampling=sampling, pinned=(pinned,))
    for step in range(200):
        expected = [float(width) for width in free.draw(step)]
        expected[place] = pinned
        assert [float(width) for width in held.draw(step)] == expected
    assert len(held.trained(200)) == 13 - len(free.phases[0][1][place]) + 1
    both = sampler(0.25, 0.0625, sampling=sampling, pinned=(0.4375, 0.8125))
    assert [float(width) for width in both.trained(200)] == [0.25, 0.4375, 0.8125, 1.0]


@pytest.mark.parametrize(("granularity", "epochs"), [(0.0625, 55), (0.125, 120), (0.25, 300)])
def test_expected_epochs_are_those_of_equation_1(granularity: float, epochs: int) -> None:
    """300 epochs, X = 13, 7, 4: the paper's figures."""
    found = sampler(0.25, granularity).expected_epochs(3000)
    smallest, *between, full = found.values()
    assert smallest == full == pytest.approx(300)
    assert sum(between) / len(between) == pytest.approx(600 / (len(found) - 2))
    assert sum(between) / len(between) == pytest.approx(epochs, abs=0.5)


def test_expected_epochs_are_those_of_the_published_code() -> None:
    """Its ranges and 10 epochs of full width alone: 48 of 300 for the large ones, 58 for the small ones."""
    smallest, *between, full = sampler(0.25, 0.0625, sampling="code", full_epochs=10).expected_epochs(3000).values()
    assert (smallest, full) == (pytest.approx(290), pytest.approx(300))
    assert [round(epochs) for epochs in between] == [58] * 5 + [48] * 6


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": "paper"}, {"sampling": "code", "full_epochs": 30}, {"sampling": "sandwich"},
        {"sampling": "interior"}, {"sampling": "single"}, {"sampling": "fixed", "width": 0.5}, {"pinned": (0.75,)},
        {"full_epochs": 500},
    ],
    ids=str,
)  # fmt: skip
def test_expected_epochs_are_the_mean_of_what_is_drawn(options: dict) -> None:  # type: ignore[type-arg]
    """Epochs of 10 steps, another family after 200 of 400."""
    widths = Widths(smallest=0.25, granularity=0.125, then=(Change(epoch=200, granularity=0.25),))
    found = Sampler(Config(**options), widths, 0, 10)
    drawn = Counter(width for step in range(4000) for width in found.draw(step))
    expected = found.expected_epochs(4000)
    assert drawn.keys() <= expected.keys()
    for width, epochs in expected.items():
        assert drawn[width] / 10 == pytest.approx(epochs, abs=max(15, 0.1 * epochs) if 0 < epochs < 400 else 0)


@pytest.mark.parametrize("sampling", ["paper", "code", "sandwich", "interior", "single"])
def test_a_family_that_changes_is_drawn_as_the_other_from_there_on(sampling: str) -> None:
    """Epochs of 10 steps: 13 widths, 25 after 7 epochs, 4 after 9."""
    then = (Change(epoch=7, granularity=0.03125), Change(epoch=9, granularity=0.25))
    found = sampler(0.25, 0.0625, then=then, sampling=sampling)
    alone = [sampler(0.25, granularity, sampling=sampling) for granularity in (0.0625, 0.03125, 0.25)]
    for step in range(100):
        expected = alone[0 if step < 70 else 1 if step < 90 else 2]
        assert list(map(str, found.draw(step))) == list(map(str, expected.draw(step)))
        assert found.passes(step) == expected.passes(step) == len(found.draw(step))
    assert len(found.possible) == 25


def test_a_width_that_is_abandoned_is_no_longer_trained_and_a_new_one_is_once_it_is_drawn() -> None:
    found = sampler(0.25, 0.125, then=(Change(epoch=7, granularity=0.25), Change(epoch=30, granularity=0.125)))
    assert len(found.trained(70)) == 7  # an evaluation at the end of the seventh epoch
    assert [str(width) for width in found.trained(71)] == ["0.25", "0.50", "0.75", "1.00"]  # drawn before, too
    assert len(found.trained(300)) == 4
    assert [str(width) for width in found.trained(400)] == [str(w) for w in Widths(smallest=0.25).all]
    grows = sampler(0.25, 0.375, then=(Change(epoch=1, granularity=0.09375),))
    assert len(grows.trained(10)) == 3
    assert set(grows.trained(11)) == {*grows.trained(10), *grows.draw(10)}


def test_an_unsliced_model_has_one_pass() -> None:
    found = sampler(smallest=1.0)
    assert found.passes(0) == 1
    assert found.trained(1) == found.draw(0)
    assert {sampler(smallest=1.0, sampling=kind).passes(0) for kind in SAMPLING} == {1}


def test_the_full_only_phase_halves_the_rate_and_trains_one_width() -> None:
    config = Config(full_epochs=3)
    task = Scala(config, AugmentConfig(), SETS["digits"], sampler(full_epochs=3), None)
    assert [(task.passes(s), task.lr_factor(s)) for s in (0, 29, 30)] == [(1, 0.5), (1, 0.5), (4, 1.0)]
    assert [str(w) for w in task.widths(29)] == ["1.00"]
    assert task.trained(30) == task.widths(0)
    assert len(task.trained(31)) == 4
    assert len(task.trained(300)) == 7


class Echo:
    """An engine whose logits are given, one pair a pass; the pass's width is noted."""

    def __init__(self, logits: list[tuple[Tensor, Tensor]], distilled: bool) -> None:
        self.logits, self.distilled, self.widths = iter(logits), distilled, list[str]()

    def __call__(self, images: Tensor, draw: Any, width: Any) -> Any:
        self.widths.append(str(width))
        z, u = next(self.logits)
        return Distilled(z, u) if self.distilled else z


def losses(
    config: Config, distilled: bool = True, answers: Tensor | None = None
) -> tuple[list[Tensor], list[Any], Tensor]:
    """The losses of a step over four images, the logits, and the labels."""
    generator = torch.Generator().manual_seed(0)
    logits = [tuple(torch.randn(4, 10, generator=generator).requires_grad_() for _ in range(2)) for _ in range(4)]
    labels = torch.tensor([1, 5, 2, 2])
    batch = Batch(
        torch.zeros(4, 1, 32, 32, dtype=torch.uint8), labels, torch.empty(4, 0), torch.arange(4), seed=0, step=0
    )
    teach: Any = None if answers is None else lambda _batch, _images: answers
    task = Scala(config, AugmentConfig(), SETS["digits"], Sampler(config, Widths(smallest=0.25), 0, 10), teach)
    engine: Any = Echo(logits, distilled)  # type: ignore[arg-type]
    found: Iterator[Tensor] = task.losses(engine, batch)
    return list(found), logits, labels


def kl(p: Tensor, q: Tensor) -> Tensor:
    a, b = p.softmax(-1), q.softmax(-1)
    return (a * (a / b).log()).sum(-1).mean()


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("label_weight", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("transfer", ["progressive", "full", "none"])
@pytest.mark.parametrize("token", ["distillation", "class"])
def test_losses_and_their_gradients_are_the_papers(
    token: str, transfer: str, label_weight: float, distilled: bool
) -> None:
    if transfer == "none" and not label_weight:
        return
    config = Config(transfer=transfer, label_weight=label_weight, transfer_token=token)
    found, logits, labels = losses(config, distilled)
    second = 1 if distilled and token == "distillation" else 0  # without a token, one output has both parts
    expected = [F.cross_entropy(logits[0][0], labels)]
    for index in (1, 2, 3):
        loss = label_weight * F.cross_entropy(logits[index][0], labels)
        if transfer != "none":
            larger = logits[index - 1 if transfer == "progressive" else 0][second]
            loss = loss + kl(larger.detach(), logits[index][second])
        expected.append(loss)
    torch.testing.assert_close(found, expected)
    every = [x for pair in logits for x in pair]
    mine, theirs = (
        torch.autograd.grad(torch.stack(all_).sum(), every, materialize_grads=True) for all_ in (found, expected)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("distillation", "temperature"), [("hard", 1.0), ("soft", 1.0), ("soft", 3.0)])
def test_the_full_network_learns_from_the_teacher(distillation: str, temperature: float) -> None:
    taught = teacher.Config(name="somebody", distillation=distillation, temperature=temperature, alpha=0.3)
    logits_of_teacher = torch.randn(4, 10)
    answers = logits_of_teacher.argmax(-1) if distillation == "hard" else logits_of_teacher
    (found, *_), logits, labels = losses(Config(teacher=taught), answers=answers)
    u = logits[0][1]
    if distillation == "hard":
        second = F.cross_entropy(u, answers)
    else:
        second = temperature**2 * kl(logits_of_teacher / temperature, u / temperature)
    torch.testing.assert_close(found, 0.7 * F.cross_entropy(logits[0][0], labels) + 0.3 * second)


def test_no_gradient_reaches_the_larger_network() -> None:
    config = Config()
    z, u = (torch.randn(4, 10, requires_grad=True) for _ in range(2))
    labels = torch.tensor([1, 5, 2, 2])
    batch = Batch(
        torch.zeros(4, 1, 32, 32, dtype=torch.uint8), labels, torch.empty(4, 0), torch.arange(4), seed=0, step=0
    )
    task = Scala(config, AugmentConfig(), SETS["digits"], Sampler(config, Widths(smallest=0.25), 0, 10), None)
    pairs = [(z, u), *[(torch.randn(4, 10, requires_grad=True),) * 2 for _ in range(3)]]
    engine: Any = Echo(pairs, True)
    sum(list(task.losses(engine, batch))[1:]).backward()  # type: ignore[union-attr]
    assert z.grad is None
    assert u.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "some"}, 'sampling = "some": must be one of paper, code, sandwich, interior, all, single, fixed'),
        ({"transfer_token": "cls"}, 'transfer_token = "cls": must be one of distillation, class'),
        (
            {"sampling": "sandwich", "pinned": (0.5,)},
            'pinned = [0.5] is for sampling = "paper" or "code"; this is "sand',
        ),
        ({"transfer": "none", "label_weight": 0.0}, "the smaller widths would learn nothing"),
        ({"full_lr": 0.0}, "full_lr = 0.0: must be above 0 and at most 1"),
        ({"teacher": {"weights": "x.pth"}}, "weights and cache are a teacher's: set name too"),
        ({"teacher": {"name": "runs/a", "weights": "x.pth"}}, 'weights = "x.pth": only for a timm teacher'),
        ({"teacher": {"alpha": 0.0}}, "alpha = 0.0: must be above 0 and at most 1"),
        ({"teacher": {"distillation": "warm"}}, 'distillation = "warm": must be "hard" or "soft"'),
    ],
)
def test_impossible_tasks_are_refused(options: dict[str, Any], message: str) -> None:
    def build() -> Config:
        if "teacher" in options:
            return Config(teacher=teacher.Config(**options["teacher"]))
        return Config(**options)

    with pytest.raises(ValueError, match=re.escape(message)):
        build()


@pytest.mark.parametrize(
    ("options", "widths", "message"),
    [
        (
            {"pinned": (0.25,)},
            {"granularity": 0.0625},
            "pinned = [0.25]: width 0.25 is in neither range between: they are 0.6875 to 0.9375 and 0.3125 to 0.625",
        ),
        ({"pinned": (1.0,)}, {"granularity": 0.25}, "they are 0.75 to 0.75 and 0.50 to 0.50"),
        ({"pinned": (0.8,)}, {}, "width 0.8 is not one of the 7 of this model; nearest: 0.75, 0.875"),
        (
            {"pinned": (0.75, 0.875)},
            {},
            "pinned = [0.75, 0.875]: two of one range; pin at most one of each of 0.75 to 0.875 and 0.375 to 0.625",
        ),
        ({"pinned": (0.75, 0.75)}, {}, "pinned = [0.75, 0.75]: two of one range"),
        ({"pinned": (0.625,)}, {"then": (Change(epoch=7, granularity=0.25),)}, "width 0.625 is in neither range"),
        ({"pinned": (0.25,)}, {"granularity": 0.75}, "this family has none; leave it out"),
        ({"pinned": (1.0,)}, {"smallest": 1.0}, "this family has none; leave it out"),
        (
            {"sampling": "fixed", "width": 0.625},
            {"then": (Change(epoch=7, granularity=0.25),)},
            "width 0.625 is not in every family of model.widths.then; nearest: 0.50, 0.75",
        ),
        ({"transfer_token": "class"}, {}, 'transfer_token = "class": model.distilled = false has one output; leave it'),
    ],
)
def test_what_does_not_fit_the_widths_is_refused(options: Any, widths: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**options).check(Widths(**{"smallest": 0.25, **widths}), distilled=False)
    with pytest.raises(ValueError, match='transfer_token = "class": transfer = "none" passes nothing on'):
        Config(transfer_token="class", transfer="none").check(Widths(), distilled=True)
