"""Ranges in every form, and validators."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.mirror.ranges import NoSuchRange, Span, choose_span, is_fresh, may_resume


@pytest.mark.parametrize(
    ("header", "span"),
    [
        (None, Span(0, 3000)),
        ("bytes=500-1499", Span(500, 1500, True, False)),
        ("bytes=500-", Span(500, 3000, True, True)),
        ("bytes=-500", Span(2500, 3000, True, False)),
        ("bytes=-5000", Span(0, 3000, True, True)),
        ("bytes=2000-5000", Span(2000, 3000, True, False)),
        ("bytes=0-", Span(0, 3000, True, True)),
        ("bytes=0-2999", Span(0, 3000, True, True)),
        ("bytes=0-0", Span(0, 1, True, False)),
        ("bytes = 1 - 2", Span(1, 3, True, False)),
        ("BYTES=1-2", Span(1, 3, True, False)),
        ("bytes=1-2,5-6", Span(0, 3000)),
        ("bytes=a-b", Span(0, 3000)),
        ("bytes=-", Span(0, 3000)),
        ("bytes", Span(0, 3000)),
        ("lines=1-2", Span(0, 3000)),
        ("bytes=1-2-3", Span(0, 3000)),
    ],
)
def test_a_range_is_open_a_suffix_clamped_or_passed_over(header: str | None, span: Span) -> None:
    assert choose_span(header, 3000) == span


@pytest.mark.parametrize(
    "header", ["bytes=500-0", "bytes=5000-10000", "bytes=3000-", "bytes=-0", "bytes=99999999999999999999-"]
)
def test_a_range_that_is_not_there_is_refused(header: str) -> None:
    with pytest.raises(NoSuchRange):
        choose_span(header, 3000)


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=0-0", "bytes=-1"])
def test_empty_content_has_no_range(header: str) -> None:
    with pytest.raises(NoSuchRange):
        choose_span(header, 0)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.integers(0, 10_000))
def test_any_range_lies_within_the_content(header: str, length: int) -> None:
    for text in (header, f"bytes={header}"):
        try:
            span = choose_span(text, length)
        except NoSuchRange:
            continue
        assert 0 <= span.start <= span.stop <= length


@pytest.mark.parametrize(
    ("header", "fresh"),
    [(None, False), ('"x"', True), ('W/"x"', True), ('"y"', False), ('"y", "x"', True), ("*", True), ("x", False)],
)
def test_a_version_the_client_has_is_not_sent_again(header: str | None, fresh: bool) -> None:
    assert is_fresh(header, '"x"') is fresh


def test_a_range_of_another_version_is_answered_whole() -> None:
    assert may_resume(None, '"x"')
    assert may_resume('"x"', '"x"')
    assert not may_resume('"y"', '"x"')
    assert not may_resume('W/"x"', '"x"')
