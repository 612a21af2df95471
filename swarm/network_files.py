"""A network directory: which files it has, what they hold, whether they changed.

===============  ====================================================================================
`ca.crt`         the authority's certificate
`node.crt`       this node's certificate (or `tls.crt`, as cert-manager calls it)
`node.key`       its private key, PEM (or `tls.key`)
`group.secret`   the MAC secrets of the DHT, see `group_secret`
`ca.crl`         revoked members; optional
`ca.key`         the authority's private key; only where members are issued, or every node issues itself
===============  ====================================================================================

The files may be links that somebody else swaps, as Kubernetes does when a Secret changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from swarm import certificates, group_secret, private_files
from swarm.certificates import Authority, Revoked
from swarm.errors import ConfigError
from swarm.group_secret import Epoch
from swarm.identity import Identity

AUTHORITY: Final = "ca.crt"
AUTHORITY_KEY: Final = "ca.key"
REVOKED: Final = "ca.crl"
GROUP: Final = "group.secret"
CERTIFICATES: Final = ("node.crt", "tls.crt")
KEYS: Final = ("node.key", "tls.key")

MAX_FILE_BYTES: Final = 64 * 1024
MAX_REVOKED_BYTES: Final = 8 * 1024 * 1024
"""About 200,000 entries: a network that revoked more needs a new authority."""

Print = tuple[tuple[int, int, int] | None, ...]
"""Inode, modification time and size of each file; two equal ones mean that nothing changed."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NetworkFiles:
    """The files of one directory, read anew at each call.  Every error names the file."""

    directory: Path

    def fingerprint(self, *names: str) -> Print:
        """What these files look like from outside, links followed."""
        prints: list[tuple[int, int, int] | None] = []
        for name in names:
            try:
                status = (self.directory / name).stat()
            except OSError:
                prints.append(None)
            else:
                prints.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(prints)

    def authority(self) -> Authority:
        """Raises `ConfigError`: missing, unreadable, not an authority."""
        authority = self._read(AUTHORITY, certificates.load_authority)
        if authority is None:
            raise ConfigError(
                f"{self.directory} is not a network directory: it has no {AUTHORITY}; make one with: swarm network create DIR"
            )
        return authority

    def certificate(self) -> tuple[str, bytes] | None:
        """Name and DER of this node's certificate, if there is one."""
        for name in CERTIFICATES:
            if (der := self._read(name, certificates.load_certificate)) is not None:
                return name, der
        return None

    def key(self) -> Identity | None:
        """This node's key, if it is kept here."""
        for name in KEYS:
            if (key := self._read_private(name, certificates.load_key)) is not None:
                return key
        return None

    def authority_key(self) -> Identity | None:
        return self._read_private(AUTHORITY_KEY, certificates.load_key)

    def secret(self) -> tuple[Epoch, ...]:
        """Raises `ConfigError`: missing, unreadable, malformed."""
        epochs = self._read_private(GROUP, group_secret.parse)
        if epochs is None:
            raise ConfigError(f"{self.directory} has no {GROUP}; copy the one that the other members have")
        return epochs

    def revoked(self, authority: Authority) -> Revoked | None:
        """The revocation list, if there is one."""
        return self._read(REVOKED, authority.read_revoked, max_bytes=MAX_REVOKED_BYTES)

    def _read(self, name: str, parse: Callable[[bytes], T], *, max_bytes: int = MAX_FILE_BYTES) -> T | None:
        path = self.directory / name
        try:
            data = private_files.read_public(path, max_bytes=max_bytes)
        except FileNotFoundError:
            return None
        return _parse(path, parse, data)

    def _read_private(self, name: str, parse: Callable[[bytes], T]) -> T | None:
        path = self.directory / name
        try:
            data = private_files.read_private(path, max_bytes=MAX_FILE_BYTES)
        except FileNotFoundError:
            return None
        return _parse(path, parse, data)


def _parse(path: Path, parse: Callable[[bytes], T], data: bytes) -> T:
    try:
        return parse(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
