"""What the download service keeps: one `Active` for each task it takes part in, and the parts of the node all of them use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import trio

from swarm import wire
from swarm.download.exchange import Exchange
from swarm.download.members import Members
from swarm.download.pace import Pace
from swarm.download.policy import Policy
from swarm.edges import (
    Discovery,
    Membership,
    NodeId,
    Origin,
    OriginInfo,
    PeerLink,
    PeerNetwork,
    Source,
    Store,
    StoredTask,
)
from swarm.errors import NotPermitted, OriginError, SwarmError
from swarm.task import Geometry, Task, blob_task

WHOLE_CHECKED = -1
"""What a reader waits for that has every piece: the digest of the whole content."""

GREETED_LINKS = 32
"""Links of earlier tasks that are asked about a new one before the DHT answers."""


@dataclass(slots=True)
class Totals:
    """Counters since start, read by the metrics."""

    bytes_from_peers: int = 0
    bytes_from_origin: int = 0
    bytes_to_peers: int = 0
    pieces_from_peers: int = 0
    pieces_from_origin: int = 0
    pieces_to_peers: int = 0
    pieces_bad: int = 0
    pieces_wasted: int = 0
    why_origin: Counter[str] = field(default_factory=Counter)
    fetches: Counter[str] = field(default_factory=Counter)
    bytes_from_local: int = 0
    lies: int = 0
    bans: int = 0


@dataclass(slots=True)
class Parts:
    """The parts of the node that downloads work with.

    Attributes:
        wall_clock: Wall seconds, for signed statements only.
        spool_dir: Takes content of unknown length while it is read; `None`: the system's.
        network: Connections; `None` until the peer layer is attached.
        all_linked: Whether every node we know of is connected to us.
    """

    membership: Membership
    store: Store
    discovery: Discovery
    origin: Origin
    policy: Policy
    rng: Random
    wall_clock: Callable[[], float]
    spool_dir: str | None = None
    network: PeerNetwork | None = None
    all_linked: Callable[[], bool] = lambda: False
    totals: Totals = field(default_factory=Totals)
    claim_seq: int = 0

    @property
    def me(self) -> NodeId:
        return self.membership.node_id

    def now(self) -> int:
        """Wall seconds for a signature."""
        return int(self.wall_clock())

    def link(self, node_id: NodeId) -> PeerLink | None:
        return self.network.link(node_id) if self.network is not None else None

    def links(self) -> Sequence[PeerLink]:
        return self.network.links() if self.network is not None else ()

    def sign_claim(self, task_id: bytes, geometry: Geometry, piece: int, lease: float) -> wire.Signed:
        self.claim_seq += 1
        body = wire.ClaimBody(task_id, geometry.length, geometry.piece_length, piece, lease, self.claim_seq)
        return self.membership.sign("claim", body)


@dataclass(slots=True)
class Traffic:
    """Bytes exchanged with one neighbour for one task."""

    received: int = 0
    sent: int = 0


@dataclass(eq=False, slots=True)
class Active:
    """One task this node takes part in: the exchange and what drives it.

    Attributes:
        info: What the origin said; `None` where it was not asked.
        pace: When its driver decides anew; see `touch`.
        done: The download is over: the wanted pieces are here and checked, or `error` says why not.
        joined: Set when somebody we greeted or dialled answered or failed.
        awaiting: Greeted, and not answered yet.
        signers: Piece -> who vouched for it, for pieces that came in this run.
        private_for: Neighbours that have it as private content too, so that their readers show a right to it.
        seals: Who sealed the task, and what.
        banned: Public keys of members that vouched for wrong bytes of this task.
        strict: Only the origin is believed.
        repairing: It was complete, and pieces that rotted since are being fetched again.
        closed: We have left the task; nothing of it may be written or served any more.
        last_asked: When a peer last joined or asked for a piece.
        whole_content: Everything is wanted, not only a range.
        told_by: Who said how long the content is, where the origin did not.
        read_here: Pieces this node itself read from the origin.
        readers: Ranges that are read while they arrive, by reader.
        blocked: Pieces that readers wait for, longest first, or `WHOLE_CHECKED`.
    """

    task: Task
    stored: StoredTask
    exchange: Exchange
    members: Members
    source: Source | None
    info: OriginInfo | None
    started: float
    shared: bool
    pace: Pace = field(default_factory=Pace)
    done: trio.Event = field(default_factory=trio.Event)
    joined: trio.Event = field(default_factory=trio.Event)
    error: SwarmError | None = None
    finished: float = 0.0
    waiters: int = 0
    from_origin: int = 0
    from_peers: int = 0
    from_local: int = 0
    traffic: dict[NodeId, Traffic] = field(default_factory=dict)
    signers: dict[int, bytes] = field(default_factory=dict)
    awaiting: set[NodeId] = field(default_factory=set)
    greeted: set[NodeId] = field(default_factory=set)
    private_for: set[NodeId] = field(default_factory=set)
    reads: dict[int, trio.CancelScope] = field(default_factory=dict)
    seals: dict[NodeId, tuple[bytes, wire.SealBody]] = field(default_factory=dict)
    banned: set[bytes] = field(default_factory=set)
    request_ids: dict[tuple[NodeId, int], int] = field(default_factory=dict)
    seal: wire.Signed | None = None
    nursery: trio.Nursery | None = None
    finishing: bool = False
    strict: bool = False
    repairing: bool = False
    closed: bool = False
    last_asked: float = 0.0
    disputes: int = 0
    origin_error: OriginError | NotPermitted | None = None
    last_byte: float = 0.0
    whole_content: bool = True
    told_by: tuple[NodeId, ...] = ()
    read_here: set[int] = field(default_factory=set)
    readers: dict[object, tuple[int, int]] = field(default_factory=dict)
    blocked: dict[int, trio.Event] = field(default_factory=dict)

    @property
    def geometry(self) -> Geometry:
        # Not the store's: bytes may still arrive for a task we have left and closed.
        return self.exchange.geometry

    @property
    def downloading(self) -> bool:
        """Whether pieces are still to come, for the first time or again."""
        return not self.done.is_set() or self.repairing

    @property
    def is_blob(self) -> bool:
        """Whether the task id itself names the content."""
        return self.task.digest is not None and blob_task(self.task.digest).id == self.task.id

    def touch(self) -> None:
        """Something changed that cannot wait: the driver is to decide anew."""
        self.pace.soon()

    def touch_lightly(self) -> None:
        """Something changed as it does with each message and piece: on a busy machine one decision is made for many."""
        self.pace.at_leisure()

    def awaited(self, piece: int) -> trio.Event:
        """Set when this piece is verified (or the whole checked), and when the download ends in whatever way."""
        return self.blocked.setdefault(piece, trio.Event())

    def wake(self, piece: int | None = None) -> None:
        """Wake who waits for this piece; all readers if none is named."""
        if piece is None:
            blocked, self.blocked = self.blocked, {}
            for event in blocked.values():
                event.set()
        elif piece in self.blocked:
            self.blocked.pop(piece).set()

    def answered(self, node_id: NodeId) -> None:
        """Nobody waits for this node's answer any more."""
        self.awaiting.discard(node_id)
        self.joined.set()

    def join_message(self, receiver: NodeId, *, reply: bool) -> wire.Join:
        """Our part in the task."""
        return self.exchange.join_message(
            receiver, reply=reply, complete=self.stored.complete, seal=self.seal, private=self.stored.private
        )


Fail = Callable[[Active, SwarmError], None]
"""Ends a download; verified pieces stay in the store for the next attempt."""
