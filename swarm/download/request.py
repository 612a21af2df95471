"""What can be asked of the download service, and what it tells while and after it works."""

from __future__ import annotations

from dataclasses import dataclass, field

from swarm.edges import Source
from swarm.task import Digest


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """One `swarm fetch`, mirror read or preheat.

    Attributes:
        source: Where the origin is; `None` when only a digest is known (then the swarm alone can serve it).
        digest: Expected digest of the whole content; makes it a `blob` task.
        immutable: The URL's content never changes: share it even without a validator.
        share: Announce although credentials were given.
        no_origin: Never read the origin.
        byte_range: Half-open range wanted, or `None` for all; only these pieces are fetched.
        length: Bytes, where the requester knows it already (from an OCI descriptor); saves asking the origin.
        private: It needed credentials that are not in `source`.
    """

    source: Source | None
    digest: Digest | None = None
    immutable: bool = False
    share: bool = False
    tag: str = ""
    application: str = ""
    no_origin: bool = False
    byte_range: tuple[int, int | None] | None = None
    length: int | None = None
    private: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot while a fetch runs.  Bytes are of verified pieces."""

    task_id: bytes
    length: int | None
    done: int
    from_peers: int
    from_origin: int
    from_local: int
    peers: int
    phase: str
    """One of resolving, finding, fetching, checking, done."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The numbers of a finished fetch.

    Attributes:
        digest: Content digest; `None` where only a range was fetched.
        why_origin: Pieces read from the origin, by reason (`rendezvous`, `alone`, `progress`, ...).
        seconds: The daemon's own, from the request to complete and verified.
    """

    task_id: bytes
    digest: Digest | None
    length: int
    seconds: float
    from_origin: int
    from_peers: int
    from_local: int
    peers: int
    why_origin: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskActivity:
    """A task the node takes part in right now, for `task show`, `/v1/tasks` and the node's page."""

    task_id: bytes
    state: str
    length: int | None
    piece_count: int
    held: int
    peers: tuple[tuple[str, int, int, int], ...]
    """Per neighbour: node id (hex), pieces it holds, bytes received from it, bytes sent to it."""
    from_origin: int
    from_peers: int
    why_origin: dict[str, int]
