"""Which piece to send next, to whom, and how many at a time.

Participants: one `Uploader` per node; channels (one peer, clear or encrypted) that carry one transfer at a time; a driver
that moves bytes and reports progress.  `hub` drives it over sockets, a simulation over a modelled uplink.

Goal: the uplink is never idle while somebody waits, and each piece is multiplied as early as possible: the least replicated
piece among the requests of *all* peers goes first.  Sending many at a time delays the moment when the first of them can
be passed on (simulated: 1 to 4 slots alike, 5 some 2 % slower, first come first served 11 %).  Large pieces need more
side by side, since each binds its slot to one receiver.

Non-goal: fairness in bytes; ties go to the peer that has fewer pieces.

Units: bytes, and monotonic seconds passed in as `now`.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from swarm import wire
from swarm.edges import NodeId, UploadSource

MAX_SLOTS: Final = 8
"""Transfers at a time when every one is blocked: eight stalled peers must not leave the uplink idle, eighty would thrash."""

SLOTS: Final = 4
"""Transfers side by side.  One would do if it filled the link, but a TCP connection that comes back from a pause takes round
trips to find its rate: twenty hosts moved a third more in the first seconds of a fetch with two or more than with one, and end
1 % sooner with four than with three (simulated, up to four are alike, and five take 2 % longer)."""

SLOTS_LARGE: Final = 5
LARGE_BYTES: Final = 1024 * 1024
"""Transfers side by side while all of them are at least this large.  A small piece soon is in the buffers of its way, and the
slot goes to somebody else; a large one holds its slot while its receiver is busy with others, and three receivers that are
leave the uplink idle (ten hosts, 1 GiB in pieces of 4 MiB: 1.38 times the floor with three, 1.19 with five; simulated, six
are no better, and two take 1.44)."""

STALL_SECONDS: Final = 0.2
"""Without progress for so long a transfer does not fill the uplink, and another may start beside it."""

MAX_REQUESTS_PER_CHANNEL: Final = 256
"""Against one peer that queues without end; a well-behaved one keeps two."""

MAX_REQUESTS: Final = 4096
"""In all: bounds the time of one choice (a pass over all of them) to a few milliseconds."""

SPARE_RANK: Final = 1 << 40
"""Puts requests that wait elsewhere too behind all others: sent as often as not in vain, 6-9 % of all bytes in simulations."""

MAX_COUNTED_PIECES: Final = 1 << 16
"""Pieces of which the number of copies sent is remembered; the task not served for longest is forgotten first."""


class Channel(NamedTuple):
    """One direction of one peer's pieces channel."""

    node_id: NodeId
    encrypted: bool = False


@dataclass(slots=True, eq=False)
class Transfer:
    """One upload under way.

    Attributes:
        progressed: When bytes last moved.
        sent: Bytes of the body so far.
        limited: Its task's rate limit holds it up, so it does not fill the uplink and others may go on beside it.
    """

    channel: Channel
    request: wire.Request
    progressed: float
    sent: int = 0
    limited: bool = False

    @property
    def node_id(self) -> NodeId:
        return self.channel.node_id


@dataclass(slots=True)
class _Queue:
    requests: dict[int, wire.Request] = field(default_factory=dict)
    active: Transfer | None = None


class Uploader:
    """Holds all queued requests and chooses.

    The driver calls `next` after every change (a request came, a transfer ended) and at `next_deadline`, and starts what
    it returns.
    """

    def __init__(self, source: UploadSource, *, rng: random.Random, slots: int | None = None) -> None:
        """`slots` transfers at a time (`SLOTS`, or `SLOTS_LARGE`), and up to `MAX_SLOTS` while all of them are blocked."""
        self._source = source
        self._random = rng
        self._slots = SLOTS if slots is None else slots
        self._slots_large = SLOTS_LARGE if slots is None else slots
        self._most = MAX_SLOTS
        self._queues: dict[Channel, _Queue] = {}
        self._queued = 0
        self._active: list[Transfer] = []
        self._copies: OrderedDict[bytes, dict[int, int]] = OrderedDict()
        self._counted = 0
        self._table_first = True

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._queued

    @property
    def active(self) -> int:
        """Transfers under way."""
        return len(self._active)

    def enqueue(self, channel: Channel, request: wire.Request) -> bool:
        """Queue a request; `False` if there is no room (answer `wire.BUSY`) or the peer used this id for another one
        that waits."""
        queue = self._queues.setdefault(channel, _Queue())
        if request.id in queue.requests or len(queue.requests) >= MAX_REQUESTS_PER_CHANNEL or self._queued >= MAX_REQUESTS:
            return False
        queue.requests[request.id] = request
        self._queued += 1
        return True

    def cancel(self, channel: Channel, request_id: int) -> bool:
        """Forget a waiting request; `False` if it is not waiting (it started, ended, or never was)."""
        queue = self._queues.get(channel)
        if queue is None or queue.requests.pop(request_id, None) is None:
            return False
        self._queued -= 1
        return True

    def forget(self, channel: Channel) -> None:
        """The channel is gone: drop what waits on it and what it carries."""
        queue = self._queues.pop(channel, None)
        if queue is None:
            return
        self._queued -= len(queue.requests)
        if queue.active is not None:
            self._remove(queue.active)

    def next(self, now: float) -> Transfer | None:
        """The transfer to start now, or `None`; it counts as active until `ended` or `forget`."""
        if not self._queued or not self._slot_free(now):
            return None
        chosen = self._choose()
        if chosen is None:
            return None
        channel, request = chosen
        # A seal table goes first (a few kilobytes, and its asker can check nothing without), but never twice in a row:
        # a peer that asks for tables without end gets half of the uplink's turns at most.
        self._table_first = request.piece != wire.SEAL_TABLE
        queue = self._queues[channel]
        del queue.requests[request.id]
        self._queued -= 1
        transfer = queue.active = Transfer(channel, request, now)
        self._active.append(transfer)
        # Counted when it starts: otherwise the second slot would choose the very same piece again.
        self._count(request.task, request.piece, 1)
        return transfer

    def progressed(self, transfer: Transfer, now: float, count: int) -> None:
        """`count` bytes of the body moved.  With `count` 0 and a later `now`: it is held up by us, not by its peer,
        until then."""
        transfer.progressed = now
        transfer.sent += count

    def ended(self, transfer: Transfer, *, complete: bool) -> None:
        """The transfer is over; incomplete ones do not count as a copy."""
        queue = self._queues.get(transfer.channel)
        if queue is not None and queue.active is transfer:
            queue.active = None
            if not queue.requests:
                del self._queues[transfer.channel]
        self._remove(transfer)
        if not complete:
            self._count(transfer.request.task, transfer.request.piece, -1)

    def forget_task(self, task_id: bytes) -> None:
        """Forget how often its pieces were sent."""
        self._counted -= len(self._copies.pop(task_id, ()))

    def next_deadline(self) -> float:
        """When `next`, which has just answered `None`, may answer differently although nothing happened; infinite if never."""
        if not self._queued or not self._active or len(self._active) >= self._most:
            return float("inf")
        if all(queue.active is not None or not queue.requests for queue in self._queues.values()):
            # Whatever waits, waits behind a transfer on its own channel: time alone changes nothing.
            return float("inf")
        return self._stalled_at()

    def _slot_free(self, now: float) -> bool:
        large = all(transfer.request.length >= LARGE_BYTES for transfer in self._active)
        if len(self._active) < (self._slots_large if large else self._slots):
            return True
        return len(self._active) < self._most and now >= self._stalled_at()

    def _stalled_at(self) -> float:
        """When every transfer that could fill the uplink will have stalled, if none moves before."""
        return max((t.progressed + STALL_SECONDS for t in self._active if not t.limited), default=float("-inf"))

    def _choose(self) -> tuple[Channel, wire.Request] | None:
        """The waiting request with the least (copies, pieces its asker has); ties at random among peers.

        One call of `replication` for each piece and of `held_by` for each task and peer, however many ask.
        """
        copies: dict[tuple[bytes, int], int] = {}
        least = 1 << 62
        candidates: list[tuple[Channel, wire.Request]] = []
        for channel, queue in self._queues.items():
            if queue.active is not None:
                continue
            for request in queue.requests.values():
                piece = (request.task, request.piece)
                count = copies.get(piece)
                if count is None:
                    count = copies[piece] = self._copies_of(*piece)
                if request.spare:
                    count += SPARE_RANK
                if count < least:
                    least = count
                    candidates = [(channel, request)]
                elif count == least:
                    candidates.append((channel, request))
        return self._poorest(candidates) if candidates else None

    def _poorest(self, candidates: list[tuple[Channel, wire.Request]]) -> tuple[Channel, wire.Request]:
        held: dict[tuple[bytes, NodeId], int] = {}
        fewest = 1 << 62
        ties: dict[Channel, tuple[Channel, wire.Request]] = {}
        for candidate in candidates:
            asker = (candidate[1].task, candidate[0].node_id)
            count = held.get(asker)
            if count is None:
                count = held[asker] = self._source.held_by(*asker)
            if count < fewest:
                fewest = count
                ties = {candidate[0]: candidate}
            elif count == fewest:
                # Of one peer the request it made first: what its reader waits for, if there is one.
                ties.setdefault(candidate[0], candidate)
        return self._random.choice(list(ties.values()))

    def _copies_of(self, task_id: bytes, piece: int) -> int:
        # The larger of the two: what we sent may not have been announced yet, and others send copies too.
        if piece == wire.SEAL_TABLE:
            return -1 if self._table_first else 1 << 61
        return max(self._source.replication(task_id, piece), self._copies.get(task_id, {}).get(piece, 0))

    def _count(self, task_id: bytes, piece: int, change: int) -> None:
        counts = self._copies.get(task_id)
        if counts is None:
            if change < 0:
                return
            counts = self._copies[task_id] = {}
        self._copies.move_to_end(task_id)
        self._counted += piece not in counts
        counts[piece] = max(0, counts.get(piece, 0) + change)
        while self._counted > MAX_COUNTED_PIECES and len(self._copies) > 1:
            self.forget_task(next(iter(self._copies)))

    def _remove(self, transfer: Transfer) -> None:
        if transfer in self._active:
            self._active.remove(transfer)
