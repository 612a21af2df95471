"""What the mirror needs from outside: registries, and rights.  `registry.py` and `authorize.py` are the real ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from swarm.edges import Source
from swarm.errors import SwarmError
from swarm.task import Digest

if TYPE_CHECKING:
    from swarm.mirror.paths import ClientCredentials, Name


class MirrorError(SwarmError):
    """A request is answered with an error of the distribution specification.

    Attributes:
        status: HTTP status; never 429, which podman waits on instead of asking the registry itself.
        code: The specification's word (`MANIFEST_UNKNOWN`, `DENIED`, ...).
        challenge: `WWW-Authenticate` of the registry, where the client is to answer it; empty: none is sent.
        headers: Further headers of the answer.
    """

    headers: tuple[tuple[str, str], ...] = ()

    def __init__(self, status: int, code: str, message: str, *, challenge: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.challenge = challenge


class MirrorDenied(MirrorError):
    """The client may not read this (or nobody may who cannot prove that he may)."""


@dataclass(frozen=True, slots=True)
class ManifestInfo:
    """What a registry says about a manifest.

    Attributes:
        media_type: As stored, without parameters.
        length: Bytes.
    """

    digest: Digest
    media_type: str
    length: int


@dataclass(frozen=True, slots=True)
class Passed:
    """An answer that is passed on as it came: tags and referrers.

    Attributes:
        headers: Only those a client of the mirror may see (`Content-Type`, `Link` made relative, `OCI-Filters-Applied`).
        body: Bounded.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Grant:
    """The client may read it.

    Attributes:
        private: It needed credentials: never in an open network, and to members only over TLS.
        shared: Whether members may have it from this node at all; not where the mode is `never`.
    """

    private: bool
    shared: bool = True


class Registries(Protocol):
    """Origin registries.  Every method may raise `OriginError`, `NotPermitted` and `MirrorDenied`."""

    def allowed(self, registry: str) -> bool:
        """Whether the configuration lets the mirror read this registry."""
        ...

    async def head_manifest(self, name: Name, reference: str, client: ClientCredentials | None) -> ManifestInfo:
        """One HEAD (a GET where the registry refuses HEAD or leaves out the digest)."""
        ...

    async def get_manifest(self, name: Name, reference: str, client: ClientCredentials | None) -> tuple[ManifestInfo, bytes]:
        """The original bytes, checked against the digest."""
        ...

    async def pass_through(self, name: Name, tail: str, query: str, client: ClientCredentials | None) -> Passed:
        """`tail` is `tags/list` or `referrers/<digest>`."""
        ...

    def manifest_source(self, name: Name, digest: Digest, client: ClientCredentials | None) -> Source:
        """Where the manifest is, with all media types accepted; else as `blob_source`."""
        ...

    def blob_source(self, name: Name, digest: Digest, client: ClientCredentials | None) -> Source:
        """Where the blob is; what the request needs to be authorised is attached when it is made."""
        ...


class Authorizer(Protocol):
    """Who may read what (SECURITY: 1.11)."""

    async def check(
        self, name: Name, digest: Digest, client: ClientCredentials | None, *, manifest: bool | None = None
    ) -> Grant:
        """Ask, or remember, whether this client may read this content of this repository.

        Args:
            manifest: Whether it is one; `None` if that is not known.

        Raises:
            MirrorDenied: It may not, or nobody can say.
        """
        ...
