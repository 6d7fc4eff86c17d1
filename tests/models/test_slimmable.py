"""Widths are whole numbers of T-ths, and a slice is what its layer computes with."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from hsvit_ds.models.layers import Conv2d, LayerNorm, Linear
from hsvit_ds.models.slimmable import FULL, Change, Config, Width

NAMED = {"family": ("1/8", "1/4", "1/2", 1)}


@pytest.mark.parametrize(
    ("smallest", "granularity", "count"),
    [(0.25, 0.25, 4), (0.25, 0.125, 7), (0.25, 0.0625, 13), (0.25, 0.03125, 25), (0.2, 0.1, 9), (1.0, 0.125, 1)],
)
def test_a_family_has_x_widths_without_rounding(smallest: float, granularity: float, count: int) -> None:
    family = Config(smallest=smallest, granularity=granularity).all
    assert len(family) == count
    assert len({width.denominator for width in family[:-1]}) <= 1
    steps = {b.numerator - a.numerator for a, b in pairwise(family[:-1])}
    assert len(steps) <= 1
    assert family[-1] == FULL
    assert float(family[0]) == smallest


@pytest.mark.parametrize(
    ("side", "isolated", "sides"),
    [
        ("trailing", True, ["trailing", "leading", "leading"]),
        ("leading", True, ["leading", "trailing", "trailing"]),
        ("leading", False, ["leading", "leading", "leading"]),
        ("trailing", False, ["trailing", "trailing", "trailing"]),
    ],
)
def test_isolated_activation_takes_opposite_ends(side: str, isolated: bool, sides: list[str]) -> None:
    family = Config(smallest=0.25, granularity=0.25, side=side, isolated=isolated).all
    assert [width.side for width in family[:-1]] == sides


@pytest.mark.parametrize(
    ("isolated", "sides"),
    [("large", "sss" + "s" + "oo"), ("small", "s" + "ooo" + "ss"), (True, "s" + "ooooo"), (False, "ssssss")],
)
def test_each_range_can_take_the_smallests_side(isolated: bool | str, sides: str) -> None:
    """Of 0.25 to 0.875; mid, 0.625, is small (table 10 of arXiv 2412.04786)."""
    for side, other in (("trailing", "leading"), ("leading", "trailing")):
        family = Config(smallest=0.25, granularity=0.125, side=side, isolated=isolated).all
        assert [width.side for width in family[:-1]] == [side if letter == "s" else other for letter in sides]


def test_a_family_can_change_and_keeps_the_widths_that_stay() -> None:
    then = (Change(epoch=70, granularity=0.25), Change(epoch=90, granularity=0.09375))
    widths = Config(smallest=0.25, granularity=0.125, then=then)
    assert [epoch for epoch, _ in widths.families] == [0, 70, 90]
    seven, four, nine = (family for _, family in widths.families)
    assert [len(seven), len(four), len(nine)] == [7, 4, 9]
    assert set(four) < set(seven)  # the same objects to a table, sides among it
    assert {float(width) for width in set(seven) & set(nine)} == {0.25, 0.625, 1.0}
    assert [float(w) for w in four] == [0.25, 0.5, 0.75, 1.0]
    assert widths.all == tuple(sorted({*seven, *nine}, key=float))
    assert widths.find(0.34375) in nine


def test_a_width_is_written_with_two_decimals_at_least() -> None:
    assert [str(w) for w in Config(smallest=0.25, granularity=0.03125).all[:3]] == ["0.25", "0.28125", "0.3125"]
    assert str(FULL) == "1.00"
    assert str(Width(1, 2)) == "0.50"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"smallest": 0.25, "granularity": 0.2},
            r"granularity = 0.2 does not divide 1 - smallest = 0.75; .*0.25, 0.1875",
        ),
        ({"smallest": 0.0}, "smallest = 0.0: must be above 0 and at most 1"),
        ({"smallest": 1.5}, "smallest = 1.5: must be above 0 and at most 1"),
        ({"side": "left"}, 'side = "left": must be "leading" or "trailing"'),
        ({"isolated": "both"}, 'isolated = "both": must be true, false, "large" or "small"'),
        (
            {"smallest": 0.25, "then": (Change(epoch=70, granularity=0.5),)},
            "then: after epoch 70 granularity = 0.5 does not divide 1 - smallest = 0.75, which would lose the smallest"
            "; the nearest that do: 0.75, 0.375",
        ),
        (
            {"smallest": 0.5, "then": (Change(epoch=1, granularity=0.0),)},
            "granularity = 0.0: must be above 0 and at most",
        ),
        ({"smallest": 0.5, "then": (Change(epoch=0, granularity=0.5),)}, "then: epoch = 0: must be at least 1"),
        (
            {"smallest": 0.5, "then": (Change(epoch=7, granularity=0.5), Change(epoch=7, granularity=0.25))},
            "then: epoch = 7: must be above the 7 before it",
        ),
        ({"then": (Change(epoch=1, granularity=0.5),)}, "then: smallest = 1 has one width, which stays; set smallest"),
        ({"family": (0.5, 0.25, 1)}, r"family = \[0.5, 0.25, 1\]: width 0.25 must be above the 0.5 before it"),
        ({"family": ("1/2", 0.5, 1)}, r"family = .*: width 0.5 must be above the 1/2 before it"),
        ({"family": (0.25, 0.5)}, r"family = \[0.25, 0.5\]: must end with 1, the full width"),
        ({"family": (0.5, 1.5)}, r"family = .*: must end with 1"),
        ({"family": (0, 1)}, r"family = \[0, 1\]: width 0 must be above 0"),
        ({"family": ("-1/4", 1)}, r"family = .*: width -1/4 must be above 0"),
        ({"family": ("1/0", 1)}, r'family: width = "1/0": a fraction\'s denominator must not be 0'),
        ({"family": ("half", 1)}, r'family: width = "half": must be a number such as 0.5, or a fraction'),
        ({"family": (1,)}, r"family = \[1\] has one width, which a model that is not sliced has; leave family out"),
        ({**NAMED, "smallest": 0.25}, "family = .* says every width of the run; leave smallest out, or family"),
        ({**NAMED, "granularity": 0.25}, "family = .* says every width of the run; leave granularity out, or family"),
        (
            {**NAMED, "then": (Change(epoch=1, granularity=0.5),)},
            "family = .* says every width of the run; leave then out, or family",
        ),
    ],
)
def test_impossible_families_are_refused(options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.parametrize(
    ("value", "untrained", "message"),
    [
        ("0.3", False, "width 0.3 is not one of the 4 of this model; nearest: 0.25, 0.50"),
        (0.2, False, "width 0.2: must be from 0.25 to 1"),
        (1.1, True, "width 1.1: must be above 0 and at most 1"),
        (0.0, True, "width 0.0: must be above 0 and at most 1"),
        ("wide", True, 'width = "wide": must be a number such as 0.5, or a fraction such as "1/12"'),
        ("1/0", True, 'width = "1/0": a fraction\'s denominator must not be 0'),
    ],
)
def test_a_width_off_the_grid_is_refused_with_the_nearest(value: float | str, untrained: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(smallest=0.25, granularity=0.25).find(value, untrained)


def test_an_untrained_width_takes_the_side_of_those_between() -> None:
    widths = Config(smallest=0.25, granularity=0.25)
    assert widths.find(0.375, untrained=True) == Width(3, 8, "leading")
    assert widths.find("0.5") == widths.find(0.5) == widths.all[1]


@pytest.mark.parametrize("side", ["leading", "trailing"])
def test_an_untrained_width_below_the_smallest_takes_its_side(side: str) -> None:
    widths = Config(smallest=0.25, granularity=0.25, side=side)
    assert widths.find(0.125, untrained=True) == Width(1, 8, side)
    assert widths.find("1/12", untrained=True) == Width(1, 12, side)


def test_widths_are_fractions_too() -> None:
    twelfths = Config(smallest="3/12", granularity="1/12", isolated=False, side="leading")
    assert twelfths.all == (*(Width(n, 12) for n in range(3, 12)), Width(1, 1))
    assert Config(smallest="1/12", granularity="1/12").all[0] == Width(1, 12, "trailing")
    assert Config(smallest="0.25", granularity="1/4").all == Config(smallest=0.25, granularity=0.25).all


@pytest.mark.parametrize("denominator", [*range(1, 33), 48, 64, 96, 100, 128, 192, 256, 384])
def test_every_width_that_is_printed_is_accepted_again(denominator: int) -> None:
    for numerator in range(1, denominator + 1):
        width = Width(numerator, denominator)
        for value in (str(width), float(width), f"{numerator}/{denominator}"):
            found = Config(smallest=str(width), granularity=f"{max(denominator - numerator, 1)}/{denominator}").find(
                value
            )
            assert float(found) == float(width)
            assert str(found) == str(width)


def test_the_granularity_that_is_advised_is_accepted() -> None:
    with pytest.raises(ValueError, match=r"granularity = 0\.0833 does not divide") as refused:
        Config(smallest=0.25, granularity=0.0833)
    advised = re.findall(r'"?([\d./]+)"?', str(refused.value).partition("the nearest that do: ")[2])
    assert advised == ["1/12", "0.075"]
    for value in advised:
        assert Config(smallest=0.25, granularity=value).all


@pytest.mark.parametrize(
    ("isolated", "sides"), [(False, "ttt"), (True, "tll"), ("large", "ttt"), ("small", "tll"), ("far", "ttl")]
)
def test_widths_are_named_one_by_one_with_the_sides_of_their_places(isolated: bool | str, sides: str) -> None:
    """The middle of 1/8 and 1 is 9/16."""
    family: tuple[float | str, ...] = ("1/8", 0.25, "1/2", 1)
    if isolated == "far":
        family, isolated = ("1/8", 0.25, "3/4", 1), "large"
    widths = Config(family=family, isolated=isolated)
    assert [float(width) for width in widths.all] == [0.125, 0.25, 0.75 if family[2] == "3/4" else 0.5, 1.0]
    assert "".join(width.side[0] for width in widths.all[:-1]) == sides
    assert widths.all[-1] is FULL
    assert widths.families == ((0, widths.all),)


def test_named_widths_are_found_and_others_refused_with_the_nearest() -> None:
    widths = Config(**NAMED)
    assert widths.find("0.125") == widths.find(1 / 8) == widths.all[0] == Width(1, 8, "trailing")
    with pytest.raises(ValueError, match=r"width 0.75 is not one of the 4 of this model; nearest: 0.50, 1.00"):
        widths.find(0.75)
    with pytest.raises(ValueError, match=r"width 1/16: must be from 0.125 to 1"):
        widths.find("1/16")
    assert widths.find("3/4", untrained=True) == Width(3, 4, "leading")
    assert widths.find("1/16", untrained=True) == Width(1, 16, "trailing")


def test_named_widths_with_the_steps_of_a_family_are_that_family() -> None:
    steps = Config(smallest=0.25, granularity=0.125, isolated="large")
    named = Config(family=tuple(float(width) for width in steps.all), isolated="large")
    assert [(width.ratio, width.side) for width in named.all] == [(width.ratio, width.side) for width in steps.all]


def test_a_width_that_does_not_divide_an_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width 0.25 of 10 is 2.5, not a whole number"):
        Width(1, 4).of(10)


def test_segments_are_taken_one_by_one() -> None:
    x = torch.arange(12)
    assert Width(1, 2, "leading").take(x, 0, 3).tolist() == [0, 1, 4, 5, 8, 9]
    assert Width(1, 2, "trailing").take(x, 0, 3).tolist() == [2, 3, 6, 7, 10, 11]
    assert Width(1, 2, "trailing").take(x.view(2, 6), 1, 3).tolist() == [[1, 3, 5], [7, 9, 11]]
    assert FULL.take(x) is x


@pytest.mark.parametrize("side", ["leading", "trailing"])
def test_layers_compute_with_their_slices(side: str) -> None:
    width = Width(1, 2, side)
    linear = Linear(8, 12, in_segments=2, out_segments=3)
    x = torch.randn(5, 4)
    own = linear.slices(width)
    assert own["weight"].shape == (6, 4)
    torch.testing.assert_close(linear(x, width), F.linear(x, own["weight"], own["bias"]))
    norm = LayerNorm(8, 1e-6)
    torch.nn.init.normal_(norm.weight)
    expected = torch.nn.LayerNorm(4, 1e-6)
    expected.load_state_dict(norm.slices(width))
    torch.testing.assert_close(norm(x, width), expected(x))
    conv = Conv2d(8, 12, 3, slice_in=True, slice_out=True, out_segments=2, groups=2)
    images = torch.randn(2, 4, 5, 5)
    own = conv.slices(width)
    assert own["weight"].shape == (6, 2, 3, 3)
    torch.testing.assert_close(conv(images, width), F.conv2d(images, own["weight"], own["bias"], groups=2))
