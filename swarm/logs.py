"""What is logged, and how: structlog to standard error, text on a terminal and JSON lines otherwise.

Fields pass an allow-list: a line written in haste cannot put a header, a key or a signed URL into a log, because a field
nobody decided to show is replaced by its name.  A test keeps the list complete for every log call in the source.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final, TextIO

import structlog

FIELDS: Final = frozenset(
    {
        # of every line
        "event", "level", "timestamp", "exception", "unlisted",
        # who and where
        "node", "peer", "address", "host", "listen", "network", "open", "pid", "version", "path", "name",
        # what
        "task", "content", "digest", "url", "piece", "method", "part", "kind", "state", "files", "example", "signal",
        # how it went
        "reason", "cause", "error", "problem", "outcome", "status", "seconds", "delay", "attempt", "limit", "skew",
        "seconds_ahead",
        # how much
        "count", "bytes", "pieces", "peers", "tasks", "held", "dropped", "from_origin", "from_peers", "from_local",
        "why_origin",
        # pulls through the mirror; names of images and addresses of clients, never what clients showed
        "image", "reference", "client", "blobs", "not_asked", "failed", "from_store", "slowest_first_byte", "sent", "length",
    }
)  # fmt: skip

_CREDENTIALS_IN_URL: Final = re.compile(r"([a-z][a-z0-9+.-]*://)[^/?# \t\r\n\"']*@", re.IGNORECASE)
_QUERY_IN_URL: Final = re.compile(r"([a-z][a-z0-9+.-]*://[^\s?#]+)[?#][^\s\"']*", re.IGNORECASE)
_AUTHORIZATION: Final = re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE)


def redact(text: str) -> str:
    """Take userinfo, query strings and authorization values out of a text meant for a log."""
    text = _CREDENTIALS_IN_URL.sub(r"\1***@", text)
    text = _QUERY_IN_URL.sub(r"\1?***", text)
    return _AUTHORIZATION.sub(r"\1 ***", text)


def keep_listed(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Drop fields that are not in `FIELDS`, and say which."""
    unlisted = sorted(name for name in event if name not in FIELDS and not name.startswith("_"))
    for name in unlisted:
        del event[name]
    if unlisted:
        event["unlisted"] = unlisted
    return event


def redact_values(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Texts are redacted, bytes become hexadecimal, anything else keeps its own (redacted) `repr`."""
    for name, value in event.items():
        if name.startswith("_"):
            continue
        if isinstance(value, bytes):
            event[name] = value.hex()
        elif isinstance(value, BaseException) or (isinstance(value, str) and name != "timestamp"):
            event[name] = redact(str(value))
    return event


def configure(level: str = "info", form: str = "auto", stream: TextIO | None = None) -> None:
    """Set up logging for this process.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        form: `text`, `json`, or `auto` for text on a terminal.
        stream: Default standard error.
    """
    stream = sys.stderr if stream is None else stream
    on_terminal = stream.isatty()
    text = form == "text" or (form == "auto" and on_terminal)
    number = getattr(logging, level.upper())
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        keep_listed,
        redact_values,
    ]
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=on_terminal, exception_formatter=structlog.dev.plain_traceback)
        if text
        else structlog.processors.JSONRenderer(default=str)
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    _adopt_libraries(stream, shared, renderer)


def _adopt_libraries(stream: TextIO, shared: list[Any], renderer: Any) -> None:
    """Libraries log through `logging`: only their warnings are wanted, in our form.  httpx would log whole URLs at INFO."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=[
        structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer,
    ], foreign_pre_chain=shared))  # fmt: skip
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
