"""Reading the head of an HTTP answer: which bytes will come, of which version.  No I/O.

Header names are lower case; values are untrusted until a function here has read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

from swarm.edges import OriginInfo
from swarm.errors import ContentChanged, OriginError
from swarm.task import MAX_CONTENT_BYTES

Headers = Mapping[str, str]

MAX_VALIDATOR_CHARACTERS: Final = 512
"""Real ones have under 100; a validator is kept per task and sent with every ranged read."""

_CONTENT_RANGE: Final = re.compile(r"bytes\s+(?:(\d{1,16})-(\d{1,16})|(\*))/(\d{1,16}|\*)", re.IGNORECASE | re.ASCII)
_STRONG_ETAG: Final = re.compile(r'"[\x21\x23-\x7e]*"')
_INTEGER: Final = re.compile(r"\d{1,16}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ContentRange:
    """`bytes start-(stop-1)/total`; an unsatisfied one (`bytes */total`) is empty."""

    start: int
    stop: int
    total: int | None


@dataclass(frozen=True, slots=True)
class Ask:
    """What was asked of the origin.

    Attributes:
        stop: End of the wanted bytes, or `None` for the end of the content.
        ranged: Whether a Range header was sent.
    """

    start: int = 0
    stop: int | None = None
    ranged: bool = False
    if_range: str = ""

    @classmethod
    def of(cls, start: int, stop: int | None, expect: OriginInfo | None) -> Ask:
        """Ask for a range only where one is needed and the origin is not known to ignore them."""
        length = expect.length if expect is not None else None
        partial = start > 0 or (stop is not None and (length is None or stop < length))
        ranged = partial and not (expect is not None and expect.ranges is False)
        return cls(start, stop, ranged, expect.if_range if expect is not None and ranged else "")

    def headers(self) -> list[tuple[str, str]]:
        if not self.ranged:
            return []
        last = "" if self.stop is None else str(self.stop - 1)
        condition = [("If-Range", self.if_range)] if self.if_range else []
        return [("Range", f"bytes={self.start}-{last}"), *condition]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the body of an accepted answer is.

    Attributes:
        start: Offset in the content of the first byte that will come.
        framed: Bytes the answer says it carries, `None` if it does not say.
        take: Bytes of it that are wanted; what follows is not read.
        wanted: Bytes without which the read is not what was asked for; `None` if only the origin knows.
        length: Of the whole content, if known.
        encoding: `""`, `"gzip"` or `"deflate"`.
    """

    start: int
    framed: int | None
    take: int | None
    wanted: int | None
    length: int | None
    encoding: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, kept in memory.

    Attributes:
        challenges: Every `WWW-Authenticate`, as it came.
        body: Empty but for 2xx.
        redirected: Another host than that of the source gave it.
    """

    status: int
    headers: Headers = field(repr=False)
    challenges: tuple[str, ...] = field(default=(), repr=False)
    body: bytes = field(default=b"", repr=False)
    redirected: bool = False


def parse_content_range(text: str) -> ContentRange | None:
    """Read a Content-Range; `None` if it is malformed or contradicts itself."""
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None:
        return None
    total = None if match[4] == "*" else int(match[4])
    if match[3]:
        return ContentRange(0, 0, total)
    start, stop = int(match[1]), int(match[2]) + 1
    if start >= stop or (total is not None and stop > total) or stop > MAX_CONTENT_BYTES:
        return None
    return ContentRange(start, stop, total)


def content_length(headers: Headers) -> int | None:
    """Content-Length; `None` if absent.

    Raises:
        OriginError: It is not a length.
    """
    text = headers.get("content-length")
    if text is None:
        return None
    if not _INTEGER.fullmatch(text) or int(text) > MAX_CONTENT_BYTES:
        raise OriginError("its Content-Length is not a length")
    return int(text)


def encoding_of(headers: Headers) -> str:
    """How the body is coded although identity was asked: `""`, `"gzip"` or `"deflate"`.

    Some servers label a file that *is* a gzip archive as gzip-coded as well; decoding it would hand out another file than
    the one that was asked for, so a gzip type wins over the coding (as in browsers).

    Raises:
        OriginError: A coding we cannot undo.
    """
    coding = headers.get("content-encoding", "").strip().lower()
    if coding in ("", "identity"):
        return ""
    if coding in ("gzip", "x-gzip"):
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        return "" if media in ("application/gzip", "application/x-gzip", "application/x-tgz") else "gzip"
    if coding == "deflate":
        return "deflate"
    raise OriginError("it sends a content coding nobody asked for (swarm asks for identity; gzip and deflate are undone)")


def strong_etag(headers: Headers) -> str:
    """The ETag with its quotes, if it is a strong one, else empty."""
    text = headers.get("etag", "").strip()
    return text if _STRONG_ETAG.fullmatch(text) and len(text) <= MAX_VALIDATOR_CHARACTERS else ""


def last_modified(headers: Headers) -> str:
    """The Last-Modified text, if it is a date, else empty."""
    text = headers.get("last-modified", "").strip()
    return text if _date(text) is not None else ""


def validator_of(headers: Headers, length: int | None, rule: str = "") -> tuple[str, str]:
    """The validator of an answer and what to send as If-Range.

    Args:
        rule: `etag`, `last-modified` or `none` where a setting chose one; empty for the strongest there is.
    """
    etag = strong_etag(headers) if rule in ("", "etag") else ""
    if etag:
        return f"etag:{etag}", etag
    modified = last_modified(headers) if rule in ("", "last-modified") else ""
    if modified and length is not None:
        return f"lm:{modified}:{length}", modified if _is_strong_date(modified, headers) else ""
    return "", ""


def info_of(status: int, headers: Headers, rule: str = "") -> OriginInfo:
    """What a HEAD, or a GET of the first byte, says about the content.

    Raises:
        OriginError: The head is malformed.
    """
    if status == 206:
        found = _checked_range(headers)
        validator, if_range = validator_of(headers, found.total, rule)
        return OriginInfo(found.total, validator, True, if_range)
    if encoding_of(headers):
        # Ranges would be of the coded bytes, whose length says nothing of ours.
        return OriginInfo(None, validator_of(headers, None, rule)[0], False, "")
    length = content_length(headers)
    validator, if_range = validator_of(headers, length, rule)
    units = headers.get("accept-ranges", "").strip().lower()
    return OriginInfo(length, validator, {"bytes": True, "none": False}.get(units), if_range)


def plan(status: int, headers: Headers, ask: Ask, expect: OriginInfo | None) -> Plan:
    """Decide whether this answer (200, 206 or 416) carries what was asked for.

    Raises:
        ContentChanged: It is of another version than `expect`.
        OriginError: It contradicts itself or the question.
    """
    if status == 416:
        raise _unsatisfied(headers, ask, expect)
    coding = encoding_of(headers)
    if status == 200:
        framed = content_length(headers)
        length = None if coding else framed
        _check_version(headers, length, expect, vouched=False)
        if length is None and expect is not None:
            length = expect.length
        wanted = length if length is None or ask.stop is None else min(ask.stop, length)
        return Plan(0, framed, ask.stop, wanted, length, coding)
    if not ask.ranged:
        raise OriginError("it answered 206 although no range was asked for")
    if coding:
        raise OriginError("it sends ranges of a coded representation; nothing useful can be made of them")
    found = _checked_range(headers)
    if found.start != ask.start or (ask.stop is not None and found.stop > ask.stop):
        raise OriginError("its Content-Range is not the range that was asked for")
    _check_version(headers, found.total, expect, vouched=bool(ask.if_range))
    length = found.total if found.total is not None else expect.length if expect is not None else None
    end = ask.stop if ask.stop is not None else length
    size = found.stop - found.start
    if end is not None and length is not None:
        end = min(end, length)
    return Plan(found.start, size, size, None if end is None else end - found.start, length)


def retry_after(headers: Headers) -> float | None:
    """Seconds an answer asks us to wait; a date is read against the answer's own Date, so no clock is needed."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return float(text)
    until, now = _date(text), _date(headers.get("date", ""))
    return max(0.0, (until - now).total_seconds()) if until is not None and now is not None else None


def rule_for(url: str, rules: Sequence[tuple[str, str]]) -> str:
    """The validator rule of the longest prefix that fits, else empty."""
    fitting = [(len(prefix), rule) for prefix, rule in rules if url.startswith(prefix)]
    return max(fitting)[1] if fitting else ""


def _checked_range(headers: Headers) -> ContentRange:
    if headers.get("content-type", "").strip().lower().startswith("multipart/"):
        raise OriginError("it answered one range with a multipart body")
    found = parse_content_range(headers.get("content-range", ""))
    if found is None or found.stop == 0:
        raise OriginError("it answered 206 without a valid Content-Range")
    length = content_length(headers)
    if length is not None and length != found.stop - found.start:
        raise OriginError("its Content-Length contradicts its Content-Range")
    return found


def _check_version(headers: Headers, total: int | None, expect: OriginInfo | None, *, vouched: bool) -> None:
    """Args:
    vouched: The origin answered If-Range with 206, which says that it is the same version.
    """
    if expect is None:
        return
    if expect.length is not None and total is not None and total != expect.length:
        raise ContentChanged(f"its length changed from {expect.length} to {total} bytes")
    if not expect.validator:
        return
    if expect.validator.startswith("etag:"):
        etag = strong_etag(headers)
        same = f"etag:{etag}" == expect.validator if etag else vouched
    else:
        modified = last_modified(headers)
        length = total if total is not None else expect.length
        same = f"lm:{modified}:{length}" == expect.validator if modified else vouched
    if not same:
        raise ContentChanged("it has another version now")


def _unsatisfied(headers: Headers, ask: Ask, expect: OriginInfo | None) -> OriginError:
    found = parse_content_range(headers.get("content-range", ""))
    total = found.total if found is not None else None
    if expect is not None and expect.length is not None and total != expect.length and total is not None:
        return ContentChanged(f"its length changed from {expect.length} to {total} bytes")
    if expect is not None and expect.length is not None and ask.start < expect.length:
        return ContentChanged("it no longer has the bytes that were asked for")
    return OriginError(f"it has no bytes from {ask.start} on")


def _date(text: str) -> datetime | None:
    if not text or len(text) > 64:
        return None
    try:
        found = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return found if found.tzinfo is not None else None


def _is_strong_date(modified: str, headers: Headers) -> bool:
    """RFC 9110, 8.8.2.2: a date vouches for every byte only if it is at least a second older than the answer."""
    changed, answered = _date(modified), _date(headers.get("date", ""))
    return changed is not None and answered is not None and answered - changed >= timedelta(seconds=1)
