"""What is distributed: task ids, content digests and geometry.

A task id is a SHA-256 over tagged canonical CBOR, so no two different field tuples can collide by
concatenation (SECURITY: T27), and a golden vector in `tests/vectors/` keeps ids from changing silently.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlsplit, urlunsplit

import cbor2

from swarm.errors import ConfigError

KIB: Final = 1024
MIB: Final = 1024 * KIB

MIN_PIECE_BYTES: Final = 256 * KIB
MAX_PIECE_BYTES: Final = 4 * MIB
TARGET_PIECES: Final = 256
"""Smaller pieces spread faster, larger ones cost fewer messages; 256 a task was the best of those simulated."""

MAX_CONTENT_BYTES: Final = 1 << 50
"""A petabyte: far above any content, low enough that every product of lengths fits 64 bits."""

_HEX_LENGTHS: Final = {"sha256": 64, "sha512": 128}
_DIGEST: Final = re.compile(r"(sha256|sha512):([0-9a-f]+)")

SIGNATURE_PARAMETERS: Final = (
    re.compile(r"(?i)x-(amz|goog|oss|ms|cos)-.*"),
    re.compile(
        r"(?i)(expires|signature|awsaccesskeyid|googleaccessid|key-pair-id|policy|sig|se|sp|sv|sr|st|skoid|sktid|skt|ske|sks|skv)"
    ),
)
"""Query parameters that sign one request and say nothing about the content (S3, GCS, Azure SAS, CloudFront)."""


@dataclass(frozen=True, slots=True)
class Digest:
    """A content digest, `sha256:<64 hex>` or `sha512:<128 hex>`, lower case."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read ``algorithm:hex``.

        Raises:
            ConfigError: Unknown algorithm, wrong length, or not lower-case hexadecimal.
        """
        match = _DIGEST.fullmatch(text)
        if match is None or len(match[2]) != _HEX_LENGTHS[match[1]]:
            raise ConfigError(
                f"not a digest: {text[:80]!r}; give sha256:<64 hex digits> or sha512:<128 hex digits>, lower case"
            )
        return cls(match[1], match[2])

    def hasher(self) -> hashlib._Hash:
        return hashlib.new(self.algorithm)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


@dataclass(frozen=True, slots=True)
class Geometry:
    """How content is cut: `length` bytes in pieces of `piece_length`, the last one shorter.

    Two geometries of one task never mix; both numbers stand in every join, claim, proof and seal.
    Empty content has no pieces.
    """

    length: int
    piece_length: int

    @classmethod
    def of(cls, length: int) -> Geometry:
        """The one geometry every node derives for content of this length."""
        return cls(length, piece_length_for(length))

    @property
    def piece_count(self) -> int:
        return -(-self.length // self.piece_length)

    def offset(self, piece: int) -> int:
        return piece * self.piece_length

    def size(self, piece: int) -> int:
        """Bytes in this piece."""
        return min(self.piece_length, self.length - piece * self.piece_length)

    def pieces_covering(self, start: int, stop: int) -> range:
        """The pieces that hold bytes [start, stop)."""
        stop = min(stop, self.length)
        if start >= stop:
            return range(0)
        return range(start // self.piece_length, -(-stop // self.piece_length))


def piece_length_for(length: int) -> int:
    """Next power of two of length/256, clamped to 256 KiB..4 MiB (3 MiB: 256 KiB; 100 MiB: 512 KiB; 1 GiB: 4 MiB)."""
    wanted = max(1, -(-length // TARGET_PIECES))
    power: int = 1 << (wanted - 1).bit_length()
    return max(MIN_PIECE_BYTES, min(MAX_PIECE_BYTES, power))


@dataclass(frozen=True, slots=True)
class Task:
    """What is distributed under one id.

    Attributes:
        id: 32 bytes.
        digest: Known content digest; `None` for a `url` task until its content was read once.
        url: Canonical URL of a `url` task, without userinfo, fragment or signature parameters.
        shared: Whether it may be announced and exchanged at all.
    """

    id: bytes
    digest: Digest | None = None
    url: str = ""
    shared: bool = True

    @property
    def short(self) -> str:
        """First twelve hexadecimal digits, for people."""
        return self.id.hex()[:12]


def _task_id(fields: list[str]) -> bytes:
    return hashlib.sha256(b"swarm/1/task\0" + cbor2.dumps(fields, canonical=True)).digest()


def blob_task(digest: Digest, *, shared: bool = True) -> Task:
    """The task of any content whose digest is known, whatever registry, repository or URL it comes from."""
    return Task(_task_id(["blob", str(digest)]), digest=digest, shared=shared)


def url_task(url: str, *, tag: str = "", application: str = "", validator: str = "", shared: bool = True) -> Task:
    """The task of one version of a URL; `validator` (ETag, or Last-Modified and length) keeps versions apart."""
    canonical = canonical_url(url)
    return Task(_task_id(["url", canonical, tag, application, validator]), url=canonical, shared=shared)


def canonical_url(url: str) -> str:
    """Drop userinfo, fragment and signature parameters; change nothing else but the case of scheme and host.

    Raises:
        ConfigError: Not an absolute http, https or file URL.
    """
    parts = split_url(url)
    host = parts.hostname or ""
    netloc = f"[{host}]" if ":" in host else host
    if parts.port is not None:
        netloc += f":{parts.port}"
    query = "&".join(
        pair for pair in parts.query.split("&") if not any(p.fullmatch(pair.split("=", 1)[0]) for p in SIGNATURE_PARAMETERS)
    )
    return urlunsplit((parts.scheme, netloc, parts.path or "/", query, ""))


def split_url(url: str) -> SplitResult:
    """Split and check a URL a person or a client gave.

    Raises:
        ConfigError: Not an absolute http, https or file URL, or its port is not a number.
    """
    if any(ord(c) <= 0x20 or ord(c) == 0x7F for c in url):
        raise ConfigError(f"not a URL: {url[:80]!r} holds white space or control characters; percent-encode them")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"not a URL: {url[:80]!r}: {error}") from error
    if parts.scheme not in ("http", "https", "file"):
        raise ConfigError(f"cannot fetch {url[:80]!r}: give an http://, https:// or file:// URL")
    if parts.scheme != "file" and (not parts.hostname or port == 0):
        raise ConfigError(f"not a URL: {url[:80]!r} names no host")
    return parts
