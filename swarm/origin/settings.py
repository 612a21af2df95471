"""What can be set about reading origins: section `[origin]`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class OriginSettings:
    """Section `[origin]`.  Times are seconds.

    Attributes:
        connect_timeout: Longest wait for a connection, name look-up and TLS included.
        header_timeout: Longest wait for the head of an answer, connecting included.
        stall_timeout: A body from which no byte came for so long is given up.
        retry_seconds: How long one request is tried again (no connection, 408, 425, 429, 5xx) before it fails; a longer
            `Retry-After` fails at once.
        retries: Most attempts after the first, within `retry_seconds`.
        connections_per_host: Most connections to one host at a time.
        proxy: URL of an outgoing HTTP proxy (`http://user:password@proxy.example:3128`), empty for none.
        proxy_except: Hosts reached without it: `host` or `*.domain`.
        ca: (host or `*.domain`, PEM file): the only authorities trusted for that host.
        validators: (URL prefix, `etag` | `last-modified` | `none`): which validator tells versions apart.
        redirect_memory: How long the end of a redirect chain is used again without walking the chain.
    """

    connect_timeout: float = 10.0
    header_timeout: float = 15.0
    stall_timeout: float = 10.0
    retry_seconds: float = 30.0
    retries: int = 4
    connections_per_host: int = 16
    proxy: str = field(default="", repr=False)
    proxy_except: tuple[str, ...] = ()
    ca: tuple[tuple[str, str], ...] = ()
    validators: tuple[tuple[str, str], ...] = ()
    redirect_memory: float = 60.0


def matches_host(pattern: str, host: str) -> bool:
    """Whether `host` is what `host` or `*.domain` names."""
    pattern, host = pattern.lower().rstrip("."), host.lower().rstrip(".")
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


class Metrics(Protocol):
    """What is counted about origin reads; bytes and reasons are counted by whoever asked for them."""

    def origin_answered(self, status: int) -> None: ...
    def origin_retried(self) -> None: ...


class NoMetrics:
    """Counts nothing."""

    def origin_answered(self, status: int) -> None: ...
    def origin_retried(self) -> None: ...
