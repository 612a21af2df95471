"""Ranges and validators of a request (RFC 9110, 13 and 14), for one answer of a known length.  No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ONE_RANGE = re.compile(r"[ \t]*([0-9]{0,20})[ \t]*-[ \t]*([0-9]{0,20})[ \t]*")


@dataclass(frozen=True, slots=True)
class Span:
    """Which bytes to answer with, half-open.

    Attributes:
        partial: 206, not 200.
        prefix: The client says or may be taken to have everything before `start`: it reads from the beginning, or resumes.
    """

    start: int
    stop: int
    partial: bool = False
    prefix: bool = True

    @property
    def size(self) -> int:
        return self.stop - self.start


class NoSuchRange(Exception):
    """416: none of the bytes asked for is there."""


def choose_span(range_untrusted: str | None, length: int) -> Span:
    """The bytes a `Range` header asks for; all of them for one that is malformed, of another unit, or of several ranges.

    Raises:
        NoSuchRange: It begins after the end, or ends before it begins.
    """
    whole = Span(0, length)
    if range_untrusted is None:
        return whole
    unit, equals, spec = range_untrusted.partition("=")
    if not equals or unit.strip().lower() != "bytes":
        return whole
    match = _ONE_RANGE.fullmatch(spec)
    if match is None or not (match[1] or match[2]):
        return whole
    if not match[1]:
        wanted = int(match[2])
        if not wanted or not length:
            raise NoSuchRange
        return Span(max(0, length - wanted), length, True, wanted >= length)
    first = int(match[1])
    last = int(match[2]) if match[2] else length - 1
    if first >= length or last < first:
        raise NoSuchRange
    stop = min(last + 1, length)
    return Span(first, stop, True, not match[2] or (first == 0 and stop == length))


def is_fresh(if_none_match_untrusted: str | None, etag: str) -> bool:
    """Whether the client has this version already (weak comparison, as RFC 9110 asks of `If-None-Match`)."""
    if if_none_match_untrusted is None:
        return False
    tags = (tag.strip().removeprefix("W/") for tag in if_none_match_untrusted.split(","))
    return any(tag in ("*", etag) for tag in tags)


def may_resume(if_range_untrusted: str | None, etag: str) -> bool:
    """Whether a range may be answered: no `If-Range`, or exactly this version."""
    return if_range_untrusted is None or if_range_untrusted.strip() == etag
