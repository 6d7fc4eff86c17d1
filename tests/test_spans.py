"""Spans: what lies in what, and nothing at all where no recorder is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import count

import pytest
import torch

from hsvit_ds import spans
from hsvit_ds.models.hsvit import Config
from hsvit_ds.spans import Part, Recorder, Span, each, span, spanned


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Whose moments are 0, 1, 2, …"""
    made = Recorder(count().__next__)
    spans.record(made)
    yield made
    spans.record(None)


def test_spans_know_what_they_lie_in_and_end_where_an_error_leaves_them(recorder: Recorder) -> None:
    @spanned(Part.TRUNK)
    def fail() -> None:
        raise KeyError

    with suppress(KeyError), span(Part.FORWARD):
        assert list(each(Part.IMAGES, "a")) == ["a"]
        fail()
    expected = [(Part.IMAGES, 1, 1, 2), (Part.IMAGES, 1, 3, 4), (Part.TRUNK, 1, 5, 6), (Part.FORWARD, 0, 0, 7)]
    assert recorder.take() == [Span(*found) for found in expected]
    assert recorder.take() == []


def test_without_a_recorder_nothing_is_noted() -> None:
    assert span(Part.FORWARD) is span(Part.LOSS)
    assert list(each(Part.IMAGES, [1, 2])) == [1, 2]


def test_what_has_no_moment_is_not_noted() -> None:
    made = Recorder(lambda: None)
    made.begin(Part.FORWARD)
    made.end()
    assert made.take() == []


def test_a_compiled_model_stays_one_graph_while_spans_are_recorded(recorder: Recorder) -> None:
    config = Config(kernels=(8, 16), pool_strides=(4, 2), groups=4, depth=2, heads=3, embedding=15, dropout=0.0)
    model = config.build(image_size=16, channels=1, classes=3).eval()
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        expected = model(images)
        assert {found.part for found in recorder.take()} == {Part.TRUNK, Part.EMBEDDING, Part.ATTENTION, Part.HEAD}
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected)
    assert recorder.take() == []
