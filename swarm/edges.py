"""The edges of a node: everything the engines need from the world, each with a real and an in-memory version.

`daemon.py` puts sockets, disks and an HTTP client behind these; `simulations/` puts a modelled network behind
them and runs the same discovery, announcement, claim and download code under a virtual clock.  Clocks are not
here: every driver reads `trio.current_time()`, which a virtual clock replaces.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import trio

from swarm import wire
from swarm.pieces import PieceSet
from swarm.task import Digest, Geometry, Task

NodeId = bytes
"""20 bytes: SHA-256 of the raw Ed25519 public key, cut."""


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """An IP address in its canonical text form (no scope, IPv4-mapped IPv6 unwrapped) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


# --- membership -----------------------------------------------------------------------------------------------

Body = TypeVar("Body", bound=msgspec.Struct)


class Membership(Protocol):
    """The closed network this node belongs to, as the engines see it (`network.Network` is the real one)."""

    @property
    def network_id(self) -> bytes:
        """32 bytes."""
        ...

    @property
    def node_id(self) -> NodeId: ...
    @property
    def public_key(self) -> bytes: ...
    @property
    def certificate(self) -> bytes:
        """Our own certificate, DER."""
        ...

    @property
    def is_open(self) -> bool:
        """An open network protects nothing: private content is never shared in it."""
        ...

    def sign(self, kind: str, body: msgspec.Struct) -> wire.Signed: ...

    def verify(self, kind: str, signed_untrusted: wire.Signed, body: type[Body]) -> Body:
        """Check that a known member signed it, and decode the body.

        Raises:
            IntegrityError: Bad signature.
            NotAMember: The signer's certificate is not known, no longer valid, or revoked; see `learn`.
            RemoteProtocolError: The body is malformed.
        """
        ...

    def learn(self, certificate_untrusted: bytes) -> bytes:
        """Check a DER certificate against the authority, dates, revocation and key type; remember it; return its public key.

        Raises:
            NotAMember: What is wrong with it.
        """
        ...

    def certificate_of(self, public_key: bytes) -> bytes | None:
        """DER of a known, still valid member."""
        ...

    def task_key(self, task_id: bytes) -> bytes:
        """20-byte DHT key of a task: BLAKE2b keyed with the network id, so an outsider cannot link it to a digest."""
        ...

    def datagram_mac(self, data: bytes) -> tuple[int, bytes]:
        """Epoch (one byte) and 16-byte MAC under the current group secret."""
        ...

    def check_datagram_mac(self, epoch: int, mac: bytes, data: bytes) -> bool:
        """Whether a current or previous group secret made this MAC (constant time)."""
        ...


# --- discovery -------------------------------------------------------------------------------------------------


class State(enum.IntEnum):
    """What a provider record says its signer has of the task."""

    WANTS = 0
    PARTIAL = 1
    COMPLETE = 2
    SEED = 3


@dataclass(frozen=True, slots=True)
class Provider:
    """A verified provider record, as the rest of the node sees it.

    Attributes:
        control: Where its control port may be reached; several for dual stack.
        record: The signed record as it came, for peer exchange.
    """

    node_id: NodeId
    public_key: bytes
    control: tuple[Address, ...]
    state: State
    record: bytes = b""


class Discovery(Protocol):
    """Finding who has a task.  All of it is hints: membership is proven when connecting."""

    async def announce(self, task_id: bytes, state: State) -> list[Provider]:
        """Announce `state` and return members seen in the same round trips, nearest to the task key first.

        From then on the announcement is repeated until `withdraw`.  Never raises for an unreachable network:
        it returns what it found, possibly nothing.
        """
        ...

    async def find(self, task_id: bytes) -> list[Provider]:
        """Members, without announcing."""
        ...

    async def withdraw(self, task_id: bytes) -> None:
        """Stop repeating, and leave tombstones at the holders that are reachable now."""
        ...

    def own_record(self, task_id: bytes) -> bytes | None:
        """Our signed record for peer exchange; `None` if we do not announce the task, or know no address of ours."""
        ...

    def read_record(self, record_untrusted: bytes, task_id: bytes) -> Provider | None:
        """Verify a record that came by peer exchange; `None` if it is not valid, expired, for another task, or our own."""
        ...


class DatagramTransport(Protocol):
    """Unreliable datagrams; the simulated one has latency and loss."""

    @property
    def local_address(self) -> Address: ...

    async def send(self, data: bytes, address: Address) -> None:
        """Send, or drop silently as UDP may."""
        ...

    async def receive(self) -> tuple[bytes, Address]:
        """The next datagram and where it claims to come from."""
        ...


# --- peers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """A transfer begins: its header arrived."""

    request_id: int
    length: int
    proof: wire.Signed | None
    certificate: bytes


class PeerLink(Protocol):
    """One authenticated connection to a member, for all tasks: control messages and its pieces channel."""

    @property
    def node_id(self) -> NodeId: ...
    @property
    def public_key(self) -> bytes: ...
    @property
    def address(self) -> Address: ...
    @property
    def encrypted_pieces(self) -> bool:
        """Whether bytes to and from this peer travel over TLS (required for private content)."""
        ...

    def post(self, message: wire.TaskMessage, *, urgent: bool = True) -> None:
        """Queue a message; never blocks.  Not urgent ones may wait up to 50 ms for company in one frame.

        A peer that lets its queue fill is disconnected, not waited for.
        """
        ...

    def request(
        self,
        request_id: int,
        task_id: bytes,
        piece: int,
        offset: int,
        length: int,
        *,
        private: bool = False,
        spare: bool = False,
    ) -> None:
        """Ask for part of a piece (piece -1: the seal table); the pieces channel is opened at the first request.

        `private` bytes travel over TLS; a `spare` request waits at another peer too.

        Exactly one of `PeerEvents.piece_received`, `piece_failed` follows, unless the link goes down first.
        """
        ...

    def cancel(self, request_id: int) -> None:
        """Withdraw a request; if it had not started, `piece_failed(..., CANCELLED)` follows."""
        ...

    def drop(self, reason: str) -> None:
        """Close the connection now; `PeerEvents.link_down` follows."""
        ...


class PeerEvents(Protocol):
    """What the peer layer tells the download service.  All synchronous, called from the trio thread."""

    def link_up(self, link: PeerLink) -> None: ...
    def link_down(self, link: PeerLink, reason: str) -> None: ...
    def message_received(self, link: PeerLink, message: wire.TaskMessage) -> None:
        """A control message.

        Raises:
            RemoteProtocolError: The peer broke the protocol; the link is to be dropped.
        """
        ...

    def piece_started(self, link: PeerLink, started: Started) -> bool:
        """Header of an ok reply.  `False` refuses the bytes: the channel is closed and the peer has failed."""
        ...

    def piece_received(self, link: PeerLink, request_id: int, digest: bytes, data: memoryview) -> None:
        """All bytes are in; `digest` is their BLAKE3.  `data` is a reused buffer, valid only during the call."""
        ...

    def piece_failed(self, link: PeerLink, request_id: int, status: int) -> None:
        """`status` is one of `wire.NOT_HELD BUSY REFUSED CANCELLED`; a missed deadline reads as BUSY."""
        ...


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Bytes [offset, offset + length) of an open file; whoever made it keeps the descriptor open until `release`."""

    fd: int
    offset: int
    length: int
    release: Callable[[], None] = field(default=lambda: None, compare=False)


@dataclass(frozen=True, slots=True)
class Served:
    """What the upload side sends: the header's proof and the bytes, as a file slice or (seal table) in memory."""

    body: FileSlice | bytes
    proof: wire.Signed | None = None
    certificate: bytes = b""


class UploadSource(Protocol):
    """What the upload side asks of the download service.  Synchronous; called when a transfer is about to start."""

    def serve(self, node_id: NodeId, request: wire.Request, *, encrypted: bool) -> Served | int:
        """The bytes, or a refusing status (`wire.NOT_HELD`, `wire.REFUSED`)."""
        ...

    def replication(self, task_id: bytes, piece: int) -> int:
        """How many neighbours are known to have the piece; the least replicated is served first."""
        ...

    def held_by(self, task_id: bytes, node_id: NodeId) -> int:
        """How many pieces of the task this neighbour has; ties go to the one that has fewer."""
        ...

    def uploaded(self, node_id: NodeId, request: wire.Request, sent: int) -> None:
        """A transfer ended after `sent` bytes."""
        ...


class PeerNetwork(Protocol):
    """Making connections.  `PeerEvents.link_up` is called for dialled and accepted links alike."""

    async def connect(self, node_id: NodeId, addresses: Sequence[Address]) -> PeerLink:
        """The link to this node: the one that exists, or a new one.

        Raises:
            PeerError: Nothing answered, it refused, it is somebody else, or these addresses failed lately.
        """
        ...

    def link(self, node_id: NodeId) -> PeerLink | None: ...

    def links(self) -> Sequence[PeerLink]: ...


# --- origin ------------------------------------------------------------------------------------------------------


class Authorization(Protocol):
    """What a source is read with where that changes over time (tokens).  Equal ones open the same; hashable."""

    async def headers(self) -> tuple[tuple[str, str], ...]:
        """For the next request to the host of the source's URL; no redirect takes them to another.

        Raises:
            OriginError, NotPermitted: There is nothing to authorise a request with.
        """
        ...

    def refused(self, headers: tuple[tuple[str, str], ...], challenges: tuple[str, ...]) -> bool:
        """That host answered 401 to these headers.  Whether `headers` will have others to try with."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """Where content comes from, as its requester gave it.  Headers and userinfo go to the origin only.

    Attributes:
        requester: Row of the egress table: "user", "mirror", "proxy" or "job".
        authorization: Asked for headers when a request is made, so that a token that ran out is replaced.
    """

    url: str
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    requester: str = "user"
    authorization: Authorization | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        from swarm.task import canonical_url

        return f"Source({canonical_url(self.url)})"


@dataclass(frozen=True, slots=True)
class OriginInfo:
    """What the origin said about the content.

    Attributes:
        length: Bytes, or `None` if it does not say.
        validator: `"etag:..."` for a strong ETag, else `"lm:<Last-Modified>:<length>"`, else empty.
        ranges: Whether it serves ranges; `None` until one was tried.
        if_range: What to send as `If-Range`, empty if there is nothing strong enough.
    """

    length: int | None
    validator: str = ""
    ranges: bool | None = None
    if_range: str = ""


class OriginBody(Protocol):
    """An open read."""

    @property
    def start(self) -> int:
        """Offset of the first byte that will come: 0 where the origin ignored the range."""
        ...

    @property
    def length(self) -> int | None:
        """Length of the whole content, if now known."""
        ...

    def chunks(self) -> AsyncIterator[bytes | memoryview]:
        """The bytes.

        Raises:
            OriginUnreachable: The connection broke or stalled; what came is good and a new read may go on from there.
        """
        ...


class Origin(Protocol):
    """Reading from where content comes from, under the egress policy, with retries inside."""

    async def head(self, source: Source) -> OriginInfo:
        """One HEAD (or what does its work).

        Raises:
            OriginError: As the subclass says.
            NotPermitted: Egress policy.
        """
        ...

    def read(
        self, source: Source, start: int = 0, stop: int | None = None, *, expect: OriginInfo | None = None
    ) -> AbstractAsyncContextManager[OriginBody]:
        """Read bytes [start, stop) of the content that `expect` describes.

        Raises:
            ContentChanged: The origin has another version now.
            OriginError, NotPermitted: As `head`.
        """
        ...


# --- store --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of `task ls`: what the store has of one task."""

    task: Task
    geometry: Geometry | None
    held: int
    complete: bool
    digest: Digest | None
    pinned: bool
    in_use: bool
    bytes_on_disk: int
    created: float
    last_used: float
    private: bool = False
    tag: str = ""
    application: str = ""


class StoredTask(Protocol):
    """An open task in the store.  While one is open the task is in use and is not evicted; `close` it."""

    @property
    def task(self) -> Task: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def held(self) -> PieceSet:
        """Live view of what is held and verified; do not change it."""
        ...

    @property
    def complete(self) -> bool: ...
    @property
    def digest(self) -> Digest | None:
        """Content digest, once complete (or given in the task)."""
        ...

    @property
    def private(self) -> bool: ...

    def write_piece(self, piece: int, data: memoryview, blake3: bytes, proof: wire.Signed | None) -> None:
        """Write a verified piece, once; a piece already held is left alone.

        Raises:
            NoSpace, StoreError: Nothing is marked; other tasks go on.
        """
        ...

    def piece_digest(self, piece: int) -> bytes | None:
        """BLAKE3 of a held piece."""
        ...

    def proof(self, piece: int) -> wire.Signed | None: ...

    def slice(self, piece: int, offset: int, length: int) -> FileSlice | None:
        """Bytes to serve; `None` if not held.  Hashes the piece at its first serving per boot and when the file changed.

        A rotten piece is quarantined: dropped from `held`, and every `on_lost` callback is told.
        """
        ...

    def read(self, offset: int, length: int) -> bytes: ...

    def on_lost(self, callback: Callable[[list[int]], None]) -> None: ...

    async def content_digest(self, algorithm: str = "sha256") -> Digest:
        """Digest of the whole content (all pieces held), in a thread; prefixes hashed while pieces came are not read again."""
        ...

    def drop_pieces(self, pieces: Sequence[int]) -> None:
        """Forget pieces that turned out wrong."""
        ...

    async def complete_with(self, digest: Digest) -> None:
        """Sync the content to disk, then mark it complete under its own id and as the blob of `digest`."""
        ...

    async def verify(self) -> list[int]:
        """Hash, in a thread, what this process has not checked yet or what changed on disk since; the rotten pieces.

        They are dropped and told as in `slice`.  Await it before handing out `open_read_only` of content from an earlier run.
        """
        ...

    @property
    def path(self) -> Path | None:
        """Where the bytes are (for a hard link); `None` if they are in memory."""
        ...

    def open_read_only(self, *, partial: bool = False) -> int:
        """A new read-only descriptor of the complete content, or with `partial` of what there is; the caller closes it."""
        ...

    def close(self) -> None: ...


class Store(Protocol):
    """Where verified pieces live."""

    def open(self, task_id: bytes) -> StoredTask | None:
        """Open what the store has of this task, complete or not; follows the alias of a `url` task's content."""
        ...

    async def create(
        self, task: Task, geometry: Geometry, *, private: bool = False, tag: str = "", application: str = ""
    ) -> StoredTask:
        """Reserve room (evicting by LRU where needed) and open; an existing entry of the same geometry is resumed.

        Raises:
            NoSpace: Not even eviction makes room; the message says how much is missing.
        """
        ...

    def entries(self) -> list[Entry]: ...

    def pin(self, task_id: bytes, pinned: bool) -> bool:
        """`False` if there is no such task."""
        ...

    async def remove(self, task_id: bytes) -> bool:
        """Un-announce (through `on_evict`), then delete.

        Raises:
            NotPermitted: It is in use.
        """
        ...

    def has_room(self, wanted: int) -> bool:
        """Whether so many bytes more would fit now, after eviction; nothing is evicted."""
        ...

    def on_evict(self, callback: Callable[[bytes], object]) -> None:
        """An async callable awaited with the task id before its content is deleted."""
        ...

    def public_names(self, task_id: bytes) -> list[bytes]:
        """The ids under which others may be told of this content, the task of its digest first; none until it is complete."""
        ...

    def on_incomplete(self, callback: Callable[[list[bytes]], None]) -> None:
        """Called with every id of content that was complete and is not any more: pieces rotted, or its file vanished."""
        ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Batch writer, scrub and watermarks, until cancelled; then everything is flushed."""
        ...
