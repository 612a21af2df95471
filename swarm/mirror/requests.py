"""Requests out of the bytes of a connection, strictly (SECURITY: T18).

h11 parses; what it is lenient about is refused before it sees it: whatever two programs may read differently (bare line
feeds, folded lines, two framings) is how one client's request becomes part of another's.  Nothing here does I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

import h11

from swarm.mirror.hub_paths import takes_body

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_LINES: Final = 128
"""A client that sends six `Accept` lines and a token stays below 20."""

MAX_REQUEST_LINE_BYTES: Final = 8 * 1024

MAX_BODY_BYTES: Final = 256 * 1024
"""Of the one kind of request that has a body: some thousand paths."""

FORM: Final = "application/x-www-form-urlencoded"

_BARE: Final = re.compile(rb"\r(?!\n)|(?<!\r)\n|\0")


class BadRequest(Exception):
    """The connection can carry no further request; answer with `status` and close it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """A request.

    Attributes:
        headers: Names in lower case; values of repeated ones joined by commas, in order.
        body: Of the few that may have one (`hub_paths.takes_body`).
    """

    method: str
    target: bytes
    headers: dict[str, str]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        return self.headers.get(name)


class RequestReader:
    """The client's side of one connection: bytes in, requests out; and h11's view of what we answer."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._headed: tuple[Request, int] | None = None
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES + 4)

    @property
    def pending(self) -> bool:
        """Whether part of a request has come."""
        return bool(self._buffer) or self._headed is not None

    @property
    def may_continue(self) -> bool:
        """Whether another request may follow the one just answered."""
        return self.http.our_state is h11.DONE and self.http.their_state is h11.DONE

    def receive(self, data_untrusted: bytes) -> None:
        self._buffer += data_untrusted

    def next_request(self) -> Request | None:
        """The next request, or `None` until more has come.

        Raises:
            BadRequest: It is not one we read.
        """
        buffer = self._buffer
        if self._headed is not None:
            return self._with_body(*self._headed)
        if buffer[:2] == b"\r\n":  # one empty line before a request is to be passed over (RFC 9112, 2.2)
            del buffer[:2]
        end = buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        if end < 0:
            self._check_incomplete()
            self._scanned = len(buffer)
            return None
        head = bytes(buffer[:end])
        del buffer[: end + 4]
        self._scanned = 0
        _check_head(head)
        request, length = self._parse(head)
        if length:
            self._headed = request, length
            return self._with_body(request, length)
        return request

    def _with_body(self, request: Request, length: int) -> Request | None:
        if len(self._buffer) < length:
            return None
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._headed = None
        self.http.receive_data(body)
        while not isinstance(self.http.next_event(), h11.EndOfMessage):
            pass
        return replace(request, body=body)

    def _check_incomplete(self) -> None:
        buffer = self._buffer
        if len(buffer) > MAX_HEAD_BYTES:
            raise BadRequest(431, "the head of the request is too long")
        if b"\r\n" not in buffer[: MAX_REQUEST_LINE_BYTES + 2] and len(buffer) > MAX_REQUEST_LINE_BYTES:
            raise BadRequest(414, "the request line is too long")
        if _BARE.search(buffer, 0, len(buffer) - buffer.endswith(b"\r")):
            raise BadRequest(400, "lines end with CR LF")

    def _parse(self, head: bytes) -> tuple[Request, int]:
        """The request, and how long its body is, which h11 waits for then."""
        http = self.http
        if http.our_state is h11.DONE:
            http.start_next_cycle()
        try:
            http.receive_data(head + b"\r\n\r\n")
            event = http.next_event()
            if not isinstance(event, h11.Request):
                raise BadRequest(400, "not a request")
            if event.http_version not in (b"1.0", b"1.1"):
                raise BadRequest(505, "only HTTP/1.1 is spoken here")
            headers: dict[str, str] = {}
            for name, value in event.headers:
                key, text = name.decode("ascii"), value.decode("latin-1")
                headers[key] = f"{headers[key]}, {text}" if key in headers else text
            request = Request(event.method.decode("ascii"), bytes(event.target), headers)
            length = _body_length(request)
            if not length:
                http.next_event()
        except h11.RemoteProtocolError as error:
            raise BadRequest(_known(error.error_status_hint), "not a valid HTTP/1.1 request") from error
        return request, length


def _body_length(request: Request) -> int:
    """How long a body follows.

    Raises:
        BadRequest: None is read here, or none so long, or of another kind.
    """
    length = request.headers.get("content-length", "0")
    if "transfer-encoding" not in request.headers and length == "0":
        return 0
    if "transfer-encoding" in request.headers or not takes_body(request.method, request.target):
        raise BadRequest(400 if request.method in ("GET", "HEAD") else 405, "requests have no body here")
    if len(length) > 15 or int(length) > MAX_BODY_BYTES:
        raise BadRequest(413, "the body of the request is too long")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
        raise BadRequest(415, "the body of the request is no form")
    return int(length)


def _known(status: int) -> int:
    return status if status in (400, 414, 431, 505) else 400


def _check_head(head: bytes) -> None:
    if len(head) > MAX_HEAD_BYTES:
        raise BadRequest(431, "the head of the request is too long")
    if _BARE.search(head):
        raise BadRequest(400, "lines end with CR LF")
    lines = head.split(b"\r\n")
    if len(lines[0]) > MAX_REQUEST_LINE_BYTES:
        raise BadRequest(414, "the request line is too long")
    if len(lines) > MAX_LINES:
        raise BadRequest(431, "too many header lines")
    if any(line[:1] in (b" ", b"\t") for line in lines[1:]):
        raise BadRequest(400, "folded header lines are not read")
    lengths = [line for line in lines[1:] if line[:15].lower() == b"content-length:"]
    if len(lengths) > 1:
        raise BadRequest(400, "more than one Content-Length")
