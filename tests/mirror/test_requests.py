"""Requests out of bytes: whole, in parts, one after another, and everything that two programs might read differently (T18)."""

from __future__ import annotations

import contextlib

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.mirror.requests import MAX_HEAD_BYTES, MAX_LINES, BadRequest, Request, RequestReader

GET = b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\n"


def read(data: bytes) -> Request | None:
    reader = RequestReader()
    reader.receive(data)
    return reader.next_request()


def test_a_request_is_read_however_it_is_cut() -> None:
    data = GET + b"Accept: a\r\nAccept: b\r\n\r\n"
    for cut in range(1, len(data)):
        reader = RequestReader()
        reader.receive(data[:cut])
        assert reader.next_request() is None
        reader.receive(data[cut:])
        request = reader.next_request()
        assert request == Request("GET", b"/v2/", {"host": "localhost", "accept": "a, b"})


def test_six_accept_lines_are_one_list() -> None:
    lines = b"".join(b"Accept: type/%d\r\n" % number for number in range(6))
    request = read(GET + lines + b"\r\n")
    assert request is not None
    assert request.header("accept") == ", ".join(f"type/{number}" for number in range(6))


def test_requests_follow_one_another_on_one_connection() -> None:
    reader = RequestReader()
    reader.receive(GET + b"\r\n" + GET.replace(b"/v2/", b"/v2/a") + b"\r\n")
    first = reader.next_request()
    assert first is not None
    reader.http.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
    reader.http.send(h11.EndOfMessage())
    assert reader.may_continue
    second = reader.next_request()
    assert second is not None
    assert second.target == b"/v2/a"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (GET + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (GET + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n", 400),
        (GET + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n", 400),
        (GET + b"Transfer-Encoding: chunked, identity\r\n\r\n", 400),
        (GET + b"Transfer-Encoding: chunked\r\n\r\n", 400),
        (GET + b"Content-Length: 5\r\n\r\nhello", 400),
        (GET + b"Content-Length: +0\r\n\r\n", 400),
        (GET.replace(b"\r\n", b"\n") + b"\n", 400),
        (GET + b"A: b\nC: d\r\n\r\n", 400),
        (GET + b"A: b\rC: d\r\n\r\n", 400),
        (GET + b"A: b\0\r\n\r\n", 400),
        (GET + b"A: b\r\n c\r\n\r\n", 400),
        (GET + b"A: b\r\n\tc\r\n\r\n", 400),
        (GET + b"A : b\r\n\r\n", 400),
        (GET + b": b\r\n\r\n", 400),
        (GET + b"Host: other\r\n\r\n", 400),
        (b"GET /v2/ HTTP/1.1\r\n\r\n", 400),
        (b"GET /v2/ HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"GET /v2/\0 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /v2/ x HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET  /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"POST /v2/a/blobs/uploads/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", 405),
        (GET + b"A: " + b"b" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
        (GET + b"A: b\r\n" * MAX_LINES + b"\r\n", 431),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    ],
)
def test_t18_what_two_programs_may_read_differently_is_refused(data: bytes, status: int) -> None:
    with pytest.raises(BadRequest) as caught:
        read(data)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "data", [b"GET /v2/ HTTP/1.1\nHost", b"GET /" + b"a" * 9000, GET + b"A: " + b"b" * (MAX_HEAD_BYTES + 1)]
)
def test_t18_a_head_that_cannot_become_a_request_is_refused_before_it_ends(data: bytes) -> None:
    with pytest.raises(BadRequest):
        read(data)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_are_read_or_refused(data: bytes, step: int) -> None:
    reader = RequestReader()
    with contextlib.suppress(BadRequest):
        for start in range(0, len(data), step):
            reader.receive(data[start : start + step])
            reader.next_request()


FORM = (
    b"POST /hf/api/models/a/b/paths-info/main HTTP/1.1\r\n"
    b"Host: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
)


def test_a_form_is_read_however_it_is_cut_and_what_follows_is_the_next_request() -> None:
    data = FORM + b"Content-Length: 22\r\n\r\npaths=GET+%2F+HTTP%2F1"
    for cut in range(1, len(data)):
        reader = RequestReader()
        reader.receive(data[:cut])
        assert reader.next_request() is None
        assert reader.pending
        reader.receive(data[cut:] + GET + b"\r\n")
        request = reader.next_request()
        assert request is not None
        assert (request.method, request.body) == ("POST", b"paths=GET+%2F+HTTP%2F1")
        reader.http.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
        reader.http.send(h11.EndOfMessage())
        assert reader.may_continue
        following = reader.next_request()
        assert following is not None
        assert (following.target, following.body) == (b"/v2/", b"")


@pytest.mark.parametrize(
    ("more", "status"),
    [
        (b"Transfer-Encoding: chunked\r\n\r\n", 405),
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 405),
        (b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"Content-Length: +5\r\n\r\n", 400),
        (b"Content-Length: 99999999999999999999\r\n\r\n", 413),
    ],
)
def test_t18_a_form_of_doubtful_length_is_refused(more: bytes, status: int) -> None:
    with pytest.raises(BadRequest) as caught:
        read(FORM + more)
    assert caught.value.status == status
