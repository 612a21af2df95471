"""Heads of answers: whatever a server writes is read, or refused, and never crashes."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.edges import OriginInfo
from swarm.errors import OriginError
from swarm.origin import answers
from swarm.origin.answers import Ask, ContentRange
from swarm.origin.inflate import MAX_OUTPUT_BYTES, Inflater

TEXT = st.text(alphabet=st.characters(max_codepoint=255), max_size=40)
NUMBER = st.integers(0, 1 << 60).map(str)
VALUE = st.one_of(
    TEXT,
    NUMBER,
    st.builds("bytes {}-{}/{}".format, NUMBER, NUMBER, st.one_of(NUMBER, st.just("*"))),
    st.sampled_from(['"v1"', 'W/"v1"', "Wed, 01 Jan 2020 00:00:00 GMT", "gzip", "multipart/byteranges", "bytes", "none"]),
    st.sampled_from(["Wed, 32 Jan 2020 00:00:00 GMT", "Mon, 01 Jan 99999 00:00:00 GMT", "-0000", "1 Jan 20 1:1"]),
)
NAME = st.sampled_from(
    ["content-length", "content-range", "content-type", "content-encoding", "etag", "last-modified", "date", "retry-after",
     "accept-ranges"]
)  # fmt: skip
HEADERS = st.dictionaries(NAME, VALUE)
INFO = st.builds(
    OriginInfo, st.one_of(st.none(), st.integers(0, 1000)), st.sampled_from(["", 'etag:"v1"', "lm:x:5"]), st.none(), st.just("")
)


@given(st.sampled_from([200, 206, 416]), HEADERS, st.integers(0, 50), st.integers(51, 99), st.one_of(st.none(), INFO))
def test_any_head_is_planned_or_refused(
    status: int, headers: dict[str, str], start: int, stop: int, expect: OriginInfo | None
) -> None:
    ask = Ask.of(start, stop, expect)
    try:
        plan = answers.plan(status, headers, ask, expect)
    except OriginError:
        return
    assert plan.start in (0, start)
    assert plan.framed is None or plan.framed >= 0
    if status == 206:
        assert plan.start == start
        assert plan.framed is not None
        assert plan.start + plan.framed <= stop
    if expect is not None and expect.length is not None and plan.length is not None:
        assert plan.length == expect.length


@given(st.sampled_from([200, 206]), HEADERS, st.sampled_from(["", "etag", "last-modified", "none"]))
def test_any_head_is_described_or_refused(status: int, headers: dict[str, str], rule: str) -> None:
    try:
        info = answers.info_of(status, headers, rule)
    except OriginError:
        return
    assert info.validator.startswith(("etag:", "lm:")) or info.validator == ""
    assert (rule, info.validator) == ("none", "") or rule != "none"
    assert len(info.validator) < 700
    assert not any(ord(c) < 0x20 for c in info.if_range)


@given(HEADERS)
def test_any_retry_after_is_a_wait_or_nothing(headers: dict[str, str]) -> None:
    wait = answers.retry_after(headers)
    assert wait is None or wait >= 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("bytes 0-0/1", ContentRange(0, 1, 1)),
        ("Bytes 5-9/*", ContentRange(5, 10, None)),
        ("bytes */7", ContentRange(0, 0, 7)),
        ("bytes 5-4/10", None),
        ("bytes 5-10/10", None),
        ("bytes 5-9", None),
        ("bytes=5-9/10", None),
        ("bytes 5-9/10, bytes 1-2/10", None),
        ("bytes \uff15-9/10", None),
        ("", None),
    ],
)
def test_a_content_range_is_exact_or_nothing(text: str, found: ContentRange | None) -> None:
    assert answers.parse_content_range(text) == found


@pytest.mark.parametrize(
    "headers",
    [
        {"etag": 'W/"v1"'},
        {"etag": "v1"},
        {"etag": '"a"b"'},
        {"etag": '"a\xff"'},
        {"etag": '"' + "a" * 600 + '"'},
        {"etag": '"a b"'},
        {"last-modified": "yesterday"},
        {"last-modified": "Wed, 01 Jan 2020 00:00:00 GMT" + " " * 100 + "x"},
        {},
    ],
)
def test_what_is_no_strong_validator_is_none(headers: dict[str, str]) -> None:
    assert answers.validator_of(headers, 5) == ("", "")


def test_a_date_without_length_is_no_validator() -> None:
    assert answers.validator_of({"last-modified": "Wed, 01 Jan 2020 00:00:00 GMT"}, None) == ("", "")


def test_the_longest_prefix_chooses_the_rule() -> None:
    rules = (("http://a/", "none"), ("http://a/b/", "etag"), ("http://", "last-modified"))
    assert [answers.rule_for(url, rules) for url in ("http://a/b/c", "http://a/x", "http://b/", "https://a/")] == [
        "etag",
        "none",
        "last-modified",
        "",
    ]


@given(st.binary(max_size=5000), st.integers(1, 700), st.sampled_from(["gzip", "zlib", "raw"]), st.integers(1, 3))
def test_whatever_was_compressed_comes_back_however_it_is_cut(data: bytes, cut: int, form: str, repeat: int) -> None:
    bits = {"gzip": 31, "zlib": 15, "raw": -15}[form]
    members = repeat if form == "gzip" else 1
    coded = zlib.compress(data, wbits=bits) * members
    inflater = Inflater("gzip" if form == "gzip" else "deflate")
    found = b"".join(part for at in range(0, len(coded), cut) for part in inflater.feed(coded[at : at + cut]))
    assert found == data * members
    assert inflater.finish()


@given(st.binary(min_size=1, max_size=300), st.sampled_from(["gzip", "deflate"]))
def test_garbage_is_refused_or_ends_early(data: bytes, encoding: str) -> None:
    inflater = Inflater(encoding)
    try:
        for part in inflater.feed(data):
            assert len(part) <= MAX_OUTPUT_BYTES
    except OriginError:
        return
    inflater.finish()


def test_output_comes_in_bounded_parts() -> None:
    parts = list(Inflater("gzip").feed(zlib.compress(bytes(10 << 20), wbits=31)))
    assert max(map(len, parts)) <= MAX_OUTPUT_BYTES
    assert sum(map(len, parts)) == 10 << 20


@pytest.mark.parametrize("bits", [31, 15, -15])
def test_sizes_around_a_full_part_lose_nothing(bits: int) -> None:
    for size in (*range(MAX_OUTPUT_BYTES - 3, MAX_OUTPUT_BYTES + 4), 2 * MAX_OUTPUT_BYTES):
        inflater = Inflater("gzip" if bits == 31 else "deflate")
        coded = zlib.compress(bytes(size), wbits=bits)
        assert sum(len(part) for at in range(len(coded)) for part in inflater.feed(coded[at : at + 1])) == size
        assert inflater.finish()
