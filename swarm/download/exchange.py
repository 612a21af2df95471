"""The exchange of one task, as one node takes part in it: events and `now` in, actions and a deadline out.

Participants: us, our *neighbours* (linked members of the task) and the origin.  It decides what to ask of whom, what to
read from the origin, what to tell and when; it does no I/O, reads no clock and draws from an injected generator, so
the simulator runs this very code.  Bytes are verified by the driver: what comes here as verified, is.

Units: seconds on one monotonic axis; pieces by number.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from swarm import pieces, wire
from swarm.download.claims import WHOLE, ClaimBook, Rendezvous, slow
from swarm.download.picker import Neighbour, Requests, choose_requests
from swarm.download.policy import Policy
from swarm.errors import RemoteProtocolError
from swarm.task import MIN_PIECE_BYTES, Geometry

NodeId = bytes
INFINITY = float("inf")

NO_NEWS = -1
"""In place of a piece that was lost before everybody was told of it."""

MAX_TOLD = 4096
"""Pieces in one message; `wire` refuses more."""

LOSSES_PER_PIECE = 4
LOSSES_AT_LEAST = 64
"""Pieces a neighbour may withdraw: each a few times, as when liars are found out; who has and has not a piece without end
makes us ask for it without end."""

JOINS_PER_MINUTE = 30
"""Of one member: each is answered with all that we hold and whom we know, and may say the opposite of the one before."""

MAX_JOINERS = 1024
"""Members whose joins are counted; the ones that joined longest ago are forgotten first."""


class Why(enum.StrEnum):
    """Why a piece was read from the origin: a label of a counter, and a line in `task show`."""

    ALONE = "alone"
    """No other member was known."""
    RENDEZVOUS = "rendezvous"
    """The piece was ours in the order."""
    SPARE = "spare"
    """Our own pieces were done and this one was free."""
    LEASE = "lease_expired"
    """Its claim ran out."""
    PROGRESS = "no_progress"
    """Nothing had arrived for too long."""
    STUCK = "stuck_holder"
    """The only holder had spread nothing for too long."""
    DISPUTE = "dispute"
    """Members' statements differ, or the content digest did not match."""
    STREAM = "stream"
    """The origin serves no ranges, or no length: one reader reads it all."""
    UNSHARED = "unshared"
    """The content may not be shared."""


@dataclass(frozen=True, slots=True)
class Send:
    node_id: NodeId
    message: wire.TaskMessage
    urgent: bool = True


@dataclass(frozen=True, slots=True)
class Request:
    """Ask a neighbour for a piece; a spare request waits elsewhere too."""

    node_id: NodeId
    piece: int
    spare: bool = False


@dataclass(frozen=True, slots=True)
class CancelRequest:
    node_id: NodeId
    piece: int


@dataclass(frozen=True, slots=True)
class ReadOrigin:
    """Read this piece (or, `claims.WHOLE`, everything from the first missing piece on)."""

    piece: int
    why: Why


@dataclass(frozen=True, slots=True)
class AbortOrigin:
    piece: int


Action = Send | Request | CancelRequest | ReadOrigin | AbortOrigin


@dataclass(slots=True)
class Reading:
    """One of our own origin reads.  The driver keeps `done` (0..1) up to date."""

    since: float
    lease: float
    why: Why
    done: float = 0.0
    renewals: int = 0


class Exchange:
    """One task's exchange.

    Call the `..._` event methods, then `take_actions`; call `tick` no later than `next_deadline`.

    Args:
        me: Our node id.
        task_key: 20 bytes; distance to it ranks members.
        held: Pieces we hold and have verified; copied.
        sign_claim: Signs a claim; `None` where the origin may not be read.
        ranges: Whether the origin serves ranges; without, one member reads all of it.  `None`: not known yet.
    """

    def __init__(
        self,
        *,
        me: NodeId,
        task_id: bytes,
        task_key: bytes,
        geometry: Geometry,
        held: pieces.PieceSet,
        rng: Random,
        now: float,
        sign_claim: Callable[[int, float], wire.Signed] | None,
        policy: Policy | None = None,
        ranges: bool | None = True,
        shared: bool = True,
    ) -> None:
        self.me = me
        self.task_id = task_id
        self.geometry = geometry
        self.policy = policy or Policy()
        self.held = held.copy()
        self.wanted = pieces.full(geometry.piece_count)
        self.neighbours: dict[NodeId, Neighbour] = {}
        self.requests = Requests()
        self.claims = ClaimBook(self.policy)
        self.reading: dict[int, Reading] = {}
        self.why_origin: Counter[Why] = Counter()
        self.counts = [0] * geometry.piece_count
        self.first: list[int] = []
        self.ranges = ranges
        self.shared = shared
        self.settled = False
        self.outranked = False
        """Many members that we have no link to are nearer to the task key: reading the origin is theirs (see `Members`)."""
        self._key = int.from_bytes(task_key, "big")
        self._distance = int.from_bytes(me, "big") ^ self._key
        self._sign_claim = sign_claim
        self._rng = rng
        self._rendezvous = Rendezvous(task_id)
        self._actions: list[Action] = []
        self._news: list[int] = []
        self._greeted: dict[NodeId, int] = {}
        self._rare = False
        self._flush_at = INFINITY
        self._late_at = INFINITY
        self._tick_at = now
        self._unspread: set[int] = set()
        self._expired: set[int] = set()
        self._copies_sent: Counter[int] = Counter()
        self._single_since: dict[int, float] = {}
        self._last_progress = now
        self._last_from_peer = -INFINITY
        self._patience = rng.uniform(1.0, 1.5)
        self._own_read_time = 0.0
        self._piece_time = 0.0
        self._fetched_before = False
        self._origin_paused_until = -INFINITY
        self._disputed: set[int] = set()
        self._extra_now = 0
        self._extra_until = -INFINITY
        self._joins: dict[NodeId, tuple[float, int]] = {}
        self._mesh: list[Neighbour] | None = None
        self._candidates: list[NodeId] = []
        self._candidates_until = -INFINITY

    # --- what is known ---------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Every wanted piece is held."""
        return not (self.wanted & ~self.held).any()

    @property
    def may_read_origin(self) -> bool:
        return self._sign_claim is not None

    def replication(self, piece: int) -> int:
        """At how many neighbours the piece is known to be, or was sent by us."""
        return max(self.counts[piece], self._copies_sent[piece])

    def held_by(self, node_id: NodeId) -> int:
        neighbour = self.neighbours.get(node_id)
        return neighbour.held.count() if neighbour is not None else 0

    def missing(self) -> pieces.PieceSet:
        return self.wanted & ~self.held

    def is_starved(self, now: float) -> bool:
        """Whether our neighbours keep us waiting: most of what we asked for has been in their queues for long."""
        asked = [since for neighbour in self.neighbours.values() for since in neighbour.queued.values()]
        late = now - self._request_patience()
        return not self.complete and sum(since <= late for since in asked) > len(asked) / 2

    def _request_patience(self) -> float:
        return max(self.policy.overloaded, self.policy.overloaded_piece_times * self._piece_time)

    def _extra(self, now: float) -> int:
        """Pieces that may arrive beyond `Policy.arriving`, for we are behind; worked out twice a second."""
        if now >= self._extra_until:
            self._extra_until = now + self.policy.tick
            theirs = sum(neighbour.held.count() for neighbour in self.neighbours.values())
            behind = theirs / max(1, len(self.neighbours)) - self.held.count()
            steps = int(behind / (self.policy.behind_step * self.geometry.piece_count))
            self._extra_now = max(0, min(self.policy.behind_extra, steps))
        return self._extra_now

    def _spare_after(self) -> float:
        return max(self.policy.spare_after, self.policy.spare_after_piece_times * self._piece_time)

    def held_anywhere(self) -> pieces.PieceSet:
        """By neighbours that are not doubted."""
        somewhere = pieces.none(self.geometry.piece_count)
        for neighbour in self.neighbours.values():
            if not neighbour.doubted:
                somewhere |= neighbour.held
        return somewhere

    def distance(self, node_id: NodeId) -> int:
        return int.from_bytes(node_id, "big") ^ self._key

    def mesh(self) -> list[Neighbour]:
        """The linked members among the nearest; with us among them they are all to hear our claims."""
        if self._mesh is None:
            ranked = sorted(self.neighbours.values(), key=lambda neighbour: neighbour.distance)
            self._mesh = ranked[: self.policy.mesh]
        return self._mesh

    def candidates(self) -> list[NodeId]:
        """Who reads the origin: the nearest that are alive, still incomplete, allowed to, not struck out, not slow."""
        times = self.claims.read_times()
        if self._own_read_time:
            times = {**times, self.me: self._own_read_time}
        out = slow(times, self.policy)
        ranked = [
            (neighbour.distance, neighbour.node_id)
            for neighbour in self.neighbours.values()
            if neighbour.reads_origin
            and not neighbour.complete
            and neighbour.node_id not in out
            and not self.claims.struck_out(neighbour.node_id)
        ]
        if self.may_read_origin and self.me not in out:
            ranked.append((self._distance, self.me))
        ranked.sort()
        return [node_id for _, node_id in ranked[: self.policy.candidates]]

    # --- events ------------------------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """The first dials are through; from here on the origin may be read."""
        if not self.settled:
            self.settled = True
            self._last_progress = now

    def join_message(
        self, receiver: NodeId, *, reply: bool, complete: bool, seal: wire.Signed | None, private: bool
    ) -> wire.Join:
        """Our part in the task, for a neighbour or one that may become one: what is verified from now on it is told of."""
        neighbour = self.neighbours.get(receiver)
        if neighbour is not None:
            neighbour.told = len(self._news)
        else:
            while len(self._greeted) >= MAX_JOINERS:
                del self._greeted[next(iter(self._greeted))]
            self._greeted[receiver] = len(self._news)
        return wire.Join(
            self.task_id,
            self.geometry.length,
            self.geometry.piece_length,
            held=b"" if complete else pieces.to_wire(self.held),
            complete=complete,
            seal=seal,
            reply=reply,
            private=private,
            reads=self.may_read_origin,
            starving=not complete and len(self.neighbours) < self.policy.starving,
        )

    def has_room(self, join: wire.Join) -> bool:
        """Whether to take a newcomer as a neighbour, or to send it on to others."""
        count = len(self.neighbours)
        return count < self.policy.accepted or (join.starving and count < self.policy.accepted_starving)

    def peer_joined(self, node_id: NodeId, join: wire.Join, now: float) -> None:
        """A linked member takes part; a second `Join` replaces what the first said.

        Raises:
            RemoteProtocolError: Its bitmap does not fit the geometry, or it joins again and again.
        """
        self._count_join(node_id, now)
        count = self.geometry.piece_count
        held = pieces.full(count) if join.complete else pieces.from_wire(join.held, count)
        known = self.neighbours.get(node_id)
        if known is None:
            told = self._greeted.pop(node_id, 0)
            known = Neighbour(node_id, self.distance(node_id), pieces.none(count), told=told, last_spread=now, gave=now)
            self.neighbours[node_id] = known
            self._mesh = None
            self._introduce(known)
        self._candidates_until = -INFINITY
        known.reads_origin = join.reads
        known.complete = join.complete
        self._replace_held(known, held, now)

    def peer_left(self, node_id: NodeId, now: float) -> None:
        """The link went down, or it left the task: its holdings and claims go with it."""
        neighbour = self.neighbours.pop(node_id, None)
        if neighbour is None:
            return
        self._mesh = None
        self._candidates_until = -INFINITY
        for piece in [*neighbour.queued, *neighbour.arriving]:
            self.requests.ended(neighbour, piece)
        for piece in pieces.indices(neighbour.held):
            self._count_down(piece)
        self.claims.died(node_id)

    def peer_has(self, node_id: NodeId, told: Iterable[int], now: float) -> None:
        neighbour = self.neighbours.get(node_id)
        if neighbour is None:
            return
        for piece in told:
            if piece < len(self.counts):
                if not neighbour.held[piece]:
                    self._note_held(neighbour, piece, now)
                    self.claims.progressed(node_id)
                self.claims.delivered(node_id, piece, now)
        self._note_complete(neighbour)

    def peer_complete(self, node_id: NodeId, now: float) -> None:
        """It sealed the task: it holds all of it."""
        neighbour = self.neighbours.get(node_id)
        if neighbour is not None:
            self.peer_has(node_id, list(pieces.indices(~neighbour.held)), now)
            neighbour.complete = True

    def peer_lost(self, node_id: NodeId, told: Sequence[int]) -> None:
        """It withdraws pieces.

        Raises:
            RemoteProtocolError: It has lost more than can rot: it keeps us busy.
        """
        neighbour = self.neighbours.get(node_id)
        if neighbour is None:
            return
        neighbour.lost += len(told)
        if neighbour.lost > LOSSES_PER_PIECE * len(self.counts) + LOSSES_AT_LEAST:
            raise RemoteProtocolError("it has and has not the same pieces again and again")
        neighbour.complete = False
        self._candidates_until = -INFINITY
        for piece in told:
            if piece < len(self.counts) and neighbour.held[piece]:
                self._withdraw(neighbour, piece)

    def claim_received(self, owner: NodeId, piece: int, lease: float, seq: int, now: float) -> bool:
        """A claim whose signature was checked.  Returns whether it was new and is to be relayed."""
        if piece >= len(self.counts) or piece < WHOLE or owner == self.me:
            return False
        present = self.claims.get(piece)
        theirs = self._rendezvous.score(owner, piece)
        wins = present is None or theirs >= self._rendezvous.score(present.owner, piece)
        lease = min(lease, 2 * self.policy.first_lease(self.geometry))
        if not self.claims.accept(piece, owner, lease, seq, wins, now):
            return False
        if piece != WHOLE and self.held[piece]:
            self.claims.held(piece)
        mine = self.reading.get(piece)
        if (
            mine is not None
            and mine.why not in (Why.DISPUTE, Why.UNSHARED)
            and mine.done < 0.5
            and theirs > self._rendezvous.score(self.me, piece)
        ):
            self._abort(piece)
        return True

    def unclaimed(self, owner: NodeId, told: Iterable[int]) -> None:
        self.claims.give_up(owner, told)

    def piece_started(self, node_id: NodeId, piece: int, now: float) -> None:
        """A transfer began: the same piece is no longer asked elsewhere."""
        neighbour = self.neighbours.get(node_id)
        if neighbour is None:
            return
        self._last_progress = neighbour.gave = now
        self.requests.started(neighbour, piece)
        for other_id in list(self.requests.queued.get(piece, ())):
            self._cancel(other_id, piece)

    def piece_verified(self, piece: int, source: NodeId | None, now: float, *, took: float = 0.0) -> None:
        """A verified piece was written; `source` is the neighbour it came from, `None` for the origin.

        Args:
            took: Seconds from the start of its transfer.
        """
        self._last_progress = now
        self._patience = self._rng.uniform(1.0, 1.5)
        self._disputed.discard(piece)
        if source is None:
            self._read_done(piece, took)
        else:
            neighbour = self.neighbours.get(source)
            if neighbour is not None:
                self.requests.ended(neighbour, piece)
                neighbour.failures = 0
                neighbour.doubted = False
            self._last_from_peer = now
        if took > 0:
            self._piece_time = took if not self._piece_time else 0.8 * self._piece_time + 0.2 * took
        if self.held[piece]:
            return
        self.held[piece] = True
        self.claims.held(piece)
        self._expired.discard(piece)
        self._single_since.pop(piece, None)
        if source is not None and piece in self.reading:
            self._abort(piece)
        for other_id in list(self.requests.queued.get(piece, ())):
            self._cancel(other_id, piece)
        if source is None and not self.counts[piece] and self.neighbours:
            self._unspread.add(piece)
        self._tell(piece, now, claimed=source is None)

    def piece_failed(self, node_id: NodeId, piece: int, now: float, *, status: int, gone: bool = False) -> None:
        """A request came to nothing.

        Args:
            status: As in `wire`; `NOT_HELD` also clears the piece from what the neighbour is believed to hold.
            gone: The piece was cancelled by us: nobody's failure.
        """
        neighbour = self.neighbours.get(node_id)
        if neighbour is None:
            return
        self.requests.ended(neighbour, piece)
        if gone or status == wire.CANCELLED:
            return
        self._candidates_until = -INFINITY
        if status == wire.NOT_HELD and neighbour.held[piece]:
            neighbour.held[piece] = False
            neighbour.complete = False
            self._count_down(piece)
        neighbour.failures += 1
        if neighbour.failures >= self.policy.peer_failures or status == wire.REFUSED:
            neighbour.paused_until = now + self.policy.peer_pause
            neighbour.failures = 0
            neighbour.doubted = True

    def piece_uploaded(self, node_id: NodeId, piece: int, now: float) -> None:
        """We sent the whole piece: the neighbour has it, or will say that it was bad."""
        self._copies_sent[piece] += 1
        self._unspread.discard(piece)
        neighbour = self.neighbours.get(node_id)
        if neighbour is not None:
            self._note_held(neighbour, piece, now)

    def piece_lost(self, lost: Iterable[int], now: float) -> None:
        """Pieces of ours turned out rotten or wrong: withdraw them and want them again."""
        gone = [piece for piece in lost if self.held[piece]]
        if not gone:
            return
        for piece in gone:
            self.held[piece] = False
        lost_now = set(gone)
        self._news = [NO_NEWS if piece in lost_now else piece for piece in self._news]
        for neighbour in self.neighbours.values():
            for start in range(0, len(gone), MAX_TOLD):
                self._do(Send(neighbour.node_id, wire.Lost(self.task_id, gone[start : start + MAX_TOLD])))

    def origin_failed(self, piece: int, now: float, *, pause: float) -> None:
        """Our read of `piece` failed; the claim is given back and the origin left alone for `pause` seconds."""
        if self.reading.pop(piece, None) is not None:
            self._tell_mesh(wire.Unclaim(self.task_id, [piece]))
        self._origin_paused_until = max(self._origin_paused_until, now + pause)

    def origin_has_no_ranges(self, piece: int) -> None:
        """It answered our read of `piece` with everything.  From here on one member reads the content from the start.

        With no neighbour that is us, and the answer that is coming will do.
        """
        self.ranges = False
        reading = self.reading.pop(piece, None)
        if reading is None:
            return
        if self.neighbours:
            self._tell_mesh(wire.Unclaim(self.task_id, [piece]))
        else:
            self.reading[WHOLE] = reading

    def want(self, wanted: pieces.PieceSet, first: Sequence[int] = ()) -> None:
        """Narrow or widen what is wanted (a range read), and say which pieces a reader waits for, in order."""
        self.wanted = wanted
        self.first = list(first)

    def allow_origin(self, sign_claim: Callable[[int, float], wire.Signed], now: float) -> None:
        """From here on the origin may be read."""
        self._sign_claim = sign_claim
        self._candidates_until = -INFINITY
        self._last_progress = now

    def dispute(self, disputed: Iterable[int]) -> None:
        """Read these from the origin ourselves, whoever says he has them."""
        self._disputed.update(disputed)

    # --- time and decisions ------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Decide anew.  Cheap when nothing changed."""
        self._expire(now)
        if not self.complete:
            self._doubt(now)
            self._choose_origin(now)
            self._choose_requests(now)
        self._renew(now)
        self._flush(now)
        self._tick_at = now + self.policy.tick

    def next_deadline(self) -> float:
        """When `tick` has to be called at the latest; infinite for a complete task with nothing left to tell."""
        deadline = min(self._flush_at, self._late_at)
        if self.complete:
            return deadline
        return min(deadline, self._tick_at, self.claims.next_expiry())

    def take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    # --- inside --------------------------------------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        self._actions.append(action)

    def _introduce(self, newcomer: Neighbour) -> None:
        """Tell a newcomer which pieces are claimed, so that it does not read them again."""
        if self._sign_claim is None:
            return
        signed = [self._sign_claim(piece, reading.lease) for piece, reading in self.reading.items()]
        if signed:
            self._do(Send(newcomer.node_id, wire.Claims(self.task_id, signed, b"")))

    def _replace_held(self, neighbour: Neighbour, held: pieces.PieceSet, now: float) -> None:
        for piece in pieces.indices(neighbour.held & ~held):
            self._withdraw(neighbour, piece)
        for piece in pieces.indices(held & ~neighbour.held):
            self._note_held(neighbour, piece, now)

    def _withdraw(self, neighbour: Neighbour, piece: int) -> None:
        neighbour.held[piece] = False
        self._count_down(piece)
        if piece in neighbour.queued:
            self.requests.ended(neighbour, piece)
            self._do(CancelRequest(neighbour.node_id, piece))

    def _count_join(self, node_id: NodeId, now: float) -> None:
        since, count = self._joins.pop(node_id, (now, 0))
        if now - since >= 60:
            since, count = now, 0
        while len(self._joins) >= MAX_JOINERS:
            del self._joins[next(iter(self._joins))]
        self._joins[node_id] = since, count + 1
        if count >= JOINS_PER_MINUTE:
            raise RemoteProtocolError("it joins the same task again and again")

    def _note_held(self, neighbour: Neighbour, piece: int, now: float) -> None:
        if neighbour.held[piece]:
            return
        neighbour.held[piece] = True
        self.counts[piece] += 1
        self._unspread.discard(piece)
        if self.counts[piece] == 1:
            self._single_since[piece] = now
        elif self._single_since.pop(piece, None) is not None:
            for other in self.neighbours.values():
                if other is not neighbour and other.held[piece]:
                    other.last_spread = now

    def _note_complete(self, neighbour: Neighbour) -> None:
        if not neighbour.complete and neighbour.held.all():
            neighbour.complete = True
            self._candidates_until = -INFINITY

    def _count_down(self, piece: int) -> None:
        self.counts[piece] -= 1
        if self.counts[piece] == 0:
            self._single_since.pop(piece, None)

    def _cancel(self, node_id: NodeId, piece: int) -> None:
        neighbour = self.neighbours.get(node_id)
        if neighbour is not None:
            self.requests.ended(neighbour, piece)
        self._do(CancelRequest(node_id, piece))

    def _abort(self, piece: int) -> None:
        del self.reading[piece]
        self._do(AbortOrigin(piece))
        self._tell_mesh(wire.Unclaim(self.task_id, [piece]))

    def _read_done(self, piece: int, took: float) -> None:
        reading = self.reading.get(WHOLE)
        if reading is not None:
            self.why_origin[reading.why] += 1
            if self.complete:
                del self.reading[WHOLE]
            return
        reading = self.reading.pop(piece, None)
        if reading is None:
            return
        self.why_origin[reading.why] += 1
        self._fetched_before = True
        if self.ranges is None and piece > 0:
            # The first piece says nothing: an answer with everything begins with the same bytes.
            self.ranges = True
        if took > 0:
            self._own_read_time = took if not self._own_read_time else 0.7 * self._own_read_time + 0.3 * took

    def whole_read_done(self) -> None:
        """The read of everything ended."""
        self.reading.pop(WHOLE, None)

    def _expire(self, now: float) -> None:
        if self.claims.next_expiry() <= now:
            before = set(self.claims.pieces())
            self.claims.expire(now)
            self._expired.update(before - set(self.claims.pieces()))
            self._candidates_until = -INFINITY

    # telling

    def _tell(self, piece: int, now: float, *, claimed: bool) -> None:
        self._news.append(piece)
        self._rare = self._rare or self.counts[piece] <= self.policy.have_rare
        # A claim is answered at once: it may be close to running out.
        self._flush_at = min(self._flush_at, now if claimed else now + self.policy.have_batch_of(self.geometry))

    def _flush(self, now: float) -> None:
        """Tell what is new: what is rare at once, to a few; the rest in batches; late to those that hold all of it anyway."""
        if self._late_at <= now:
            self._late_at = self._flush_at = INFINITY
            self._tell_news(self.neighbours.values())
        elif self._flush_at <= now:
            self._flush_at = INFINITY
            lacking = [neighbour for neighbour in self.neighbours.values() if self._lacks_news(neighbour)]
            self._tell_news(lacking)
            if any(neighbour.told < len(self._news) for neighbour in self.neighbours.values()):
                self._late_at = min(self._late_at, now + self.policy.have_late)
        elif self._rare:
            lacking = [neighbour for neighbour in self.neighbours.values() if self._lacks_news(neighbour)]
            self._tell_news(self._rng.sample(lacking, min(self.policy.have_at_once, len(lacking))))
        self._rare = False

    def _lacks_news(self, neighbour: Neighbour) -> bool:
        """Whether we have anything new for it that it does not hold itself."""
        if neighbour.complete:
            return False
        held = neighbour.held
        return any(piece != NO_NEWS and not held[piece] for piece in self._news[neighbour.told :])

    def _tell_news(self, neighbours: Iterable[Neighbour]) -> None:
        """Everything these were not told of yet.  Those that are told the same are sent the same message, encoded once."""
        messages: dict[int, list[wire.Have]] = {}
        for neighbour in neighbours:
            told, neighbour.told = neighbour.told, len(self._news)
            if told not in messages:
                news = [piece for piece in self._news[told:] if piece != NO_NEWS]
                parts = [news[start : start + MAX_TOLD] for start in range(0, len(news), MAX_TOLD)]
                messages[told] = [wire.Have(self.task_id, part) for part in parts]
            for message in messages[told]:
                self._do(Send(neighbour.node_id, message))

    def _tell_mesh(self, message: wire.TaskMessage) -> None:
        for neighbour in self.mesh():
            if not neighbour.complete:
                self._do(Send(neighbour.node_id, message))

    # asking neighbours

    def _choose_requests(self, now: float) -> None:
        missing = self.missing()
        for piece in self.reading:
            if piece != WHOLE:
                missing[piece] = False
        for piece in self._disputed:
            missing[piece] = False
        if not missing.any() or not self.neighbours:
            return
        holders = [neighbour for neighbour in self.neighbours.values() if neighbour.held.any()]
        for neighbour, piece, spare in choose_requests(
            holders, missing, self.requests, self.counts, self.policy, self._rng, now,
            patience=self._request_patience(), spare_after=self._spare_after(), extra=self._extra(now),
            fetching=bool(self.reading), first=self.first,
        ):  # fmt: skip
            self._do(Request(neighbour.node_id, piece, spare))

    # reading the origin

    def _choose_origin(self, now: float) -> None:
        if not self.settled or self._sign_claim is None or self._origin_paused_until > now:
            return
        if self._disputed:
            self._read_disputed(now)
            return
        candidates = self._candidates_now(now)
        if self.ranges is False:
            self._choose_whole(candidates, now)
        elif self.me in candidates and not self.outranked:
            self._choose_pieces(candidates, now)
        self._no_progress(now)

    def _candidates_now(self, now: float) -> list[NodeId]:
        """`candidates`, worked out again when members came, went or became complete, and otherwise twice a second."""
        if now >= self._candidates_until:
            self._candidates = self.candidates()
            self._candidates_until = now + self.policy.tick
        return self._candidates

    def _choose_pieces(self, candidates: list[NodeId], now: float) -> None:
        alone = not self.neighbours
        streams = max(1, min(self.policy.streams_alone, self.policy.stream_budget // len(candidates)))
        if self.ranges is None:
            streams = 1  # The first read shows whether it does; four would bring four whole copies if it does not.
        if len(self.reading) >= streams or self._gated(now):
            return
        free = self.missing() & ~self.held_anywhere()
        for piece in (*self.requests.arriving, *self.reading, *self.claims.pieces()):
            if piece != WHOLE:
                free[piece] = False
        self._rendezvous.elect(candidates)
        started: list[int] = []
        while len(self.reading) < streams and free.any():
            mine = self._first_own(free)
            if mine is not None:
                why = Why.ALONE if alone else Why.LEASE if mine in self._expired else Why.RENDEZVOUS
            elif not self.reading and self._fetched_before and (spare := self._spare(free, len(candidates))) is not None:
                mine, why = spare, Why.SPARE
            else:
                break
            free[mine] = False
            self._begin(mine, why, now)
            started.append(mine)
        if started:
            self._claim(started)
        elif not self.reading and not free.any():
            self._unstick(now)

    def _first_own(self, free: pieces.PieceSet) -> int | None:
        """Our lowest free piece (or the most urgent one): in order, so that readers and the content digest follow closely."""
        for piece in self.first:
            if free[piece] and self._rendezvous.owner(piece) == self.me:
                return piece
        return next((piece for piece in pieces.indices(free) if self._rendezvous.owner(piece) == self.me), None)

    def _spare(self, free: pieces.PieceSet, candidates: int) -> int | None:
        """Somebody else's free piece: the last one we are next in line for, while its owner takes its first ones.

        Any other one only while there are many: two idle candidates that choose at random among few read the same piece.
        """
        left = list(pieces.indices(free))
        for piece in reversed(left):
            if self._rendezvous.runner_up(piece) == self.me:
                return piece
        return self._rng.choice(left) if len(left) > 2 * candidates else None

    def _gated(self, now: float) -> bool:
        """Backlog gate: what nobody else has yet would be lost with us, and the uplink cannot keep up anyway.

        Only while something also comes from peers: two nodes arriving ten seconds apart otherwise take half as long again.
        """
        receiving = bool(self.requests.arriving) or now - self._last_from_peer < 1.0
        return receiving and len(self._unspread) >= self.policy.backlog

    def _choose_whole(self, candidates: list[NodeId], now: float) -> None:
        if self.reading or not candidates or self.claims.get(WHOLE) is not None:
            return
        missing = self.missing()
        if not (missing & ~self.held_anywhere()).any():
            return
        self._rendezvous.elect(candidates)
        if self._rendezvous.owner(WHOLE) == self.me:
            self._begin(WHOLE, Why.STREAM, now)
            self._claim([WHOLE])

    def _stuck_after(self) -> float:
        return max(self.policy.stuck_holder, self.policy.stuck_piece_times * self._piece_time)

    def _doubt(self, now: float) -> None:
        """Whoever lets our requests wait and sends nothing may have nothing; two such would hide all pieces from every reader.

        While no piece was timed yet, large ones are given more time.
        """
        bound = self._stuck_after()
        if not self._piece_time:
            bound *= self.geometry.piece_length / MIN_PIECE_BYTES
        for neighbour in self.neighbours.values():
            if neighbour.queued and not neighbour.doubted and now - neighbour.gave >= bound:
                waiting_since = min(neighbour.queued.values())
                neighbour.doubted = now - waiting_since >= bound

    def _unstick(self, now: float) -> None:
        """Nothing is free, yet a piece sits at one holder that spreads nothing: it may be a liar or a dying link."""
        bound = self._stuck_after()
        for piece, since in self._single_since.items():
            if self.held[piece] or not self.wanted[piece] or now - since < bound or piece in self.requests.arriving:
                continue
            if self.claims.get(piece) is not None:
                continue
            holder = next((n for n in self.neighbours.values() if n.held[piece]), None)
            if holder is not None and not holder.complete and now - holder.last_spread >= bound:
                self._begin(piece, Why.STUCK, now)
                self._claim([piece])
                return

    def _no_progress(self, now: float) -> None:
        """Availability depends on nobody's honesty: after a while without a byte, read one piece ourselves."""
        waited = now - self._last_progress
        if self.reading or waited < self.policy.progress_after(self.geometry):
            return
        rank = sum(n.distance < self._distance and n.reads_origin and not n.complete for n in self.neighbours.values())
        patience = max(self.policy.progress_after(self.geometry) * self._patience, 3 * self._piece_time)
        if len(self.claims):
            # Somebody promised to read; wait for it, but not for one promise after another.
            patience += 2 * self.policy.first_lease(self.geometry)
        if waited < patience + self.policy.progress_stagger * rank:
            return
        missing = self.missing()
        for piece in self.requests.arriving:
            missing[piece] = False
        if not missing.any():
            return
        if self.ranges is False:
            self._begin(WHOLE, Why.PROGRESS, now)
            self._claim([WHOLE])
            return
        nowhere = missing & ~self.held_anywhere()
        piece = self._rng.choice(list(pieces.indices(nowhere if nowhere.any() else missing)))
        for other_id in list(self.requests.queued.get(piece, ())):
            self._cancel(other_id, piece)
        self._begin(piece, Why.PROGRESS, now)
        self._claim([piece])

    def _read_disputed(self, now: float) -> None:
        if self.ranges is False:
            if not self.reading:
                self._begin(WHOLE, Why.DISPUTE, now)
            return
        for piece in sorted(self._disputed):
            if len(self.reading) >= self.policy.streams_alone:
                return
            if piece not in self.reading:
                self._begin(piece, Why.DISPUTE, now)

    def _begin(self, piece: int, why: Why, now: float) -> None:
        if not self.shared:
            why = Why.UNSHARED
        first = self.policy.first_lease(self.geometry)
        lease = first
        if self._own_read_time:
            lease = min(first, max(self.policy.lease_least, 4 * self._own_read_time))
        self.reading[piece] = Reading(now, lease, why)
        for other_id in list(self.requests.queued.get(piece, ())):
            self._cancel(other_id, piece)
        self._do(ReadOrigin(piece, why))

    def _claim(self, claimed: list[int]) -> None:
        if self._sign_claim is None:
            return
        audience = [neighbour for neighbour in self.mesh() if not neighbour.complete]
        if not audience:
            return
        signed = [self._sign_claim(piece, self.reading[piece].lease) for piece in claimed]
        reached = b"".join(sorted(neighbour.node_id[:4] for neighbour in audience))
        claims = wire.Claims(self.task_id, signed, reached)
        for neighbour in audience:
            self._do(Send(neighbour.node_id, claims))
        self._tell_news(audience)  # in the same frames

    def _renew(self, now: float) -> None:
        """A read that will outlast its lease but makes real progress is claimed again, a few times at most."""
        for piece, reading in self.reading.items():
            age = now - reading.since
            if piece == WHOLE:
                due = age > 0.5 * reading.lease * (reading.renewals + 1)
            else:
                due = (
                    age > 0.75 * reading.lease * (reading.renewals + 1)
                    and reading.done >= 0.2 * (reading.renewals + 1)
                    and reading.renewals < self.policy.lease_renewals
                )
            if due:
                reading.renewals += 1
                self._claim([piece])

    def relay(self, sender: NodeId, owner: NodeId, claims: list[wire.Signed], reached: bytes) -> None:
        """Pass claims that came from their owner on to the mesh members the owner could not reach itself."""
        if sender == owner:
            for node_id in self.unreached(sender, reached):
                self._do(Send(node_id, wire.Claims(self.task_id, claims, b""), urgent=False))

    def unreached(self, sender: NodeId, reached: bytes) -> list[NodeId]:
        """Mesh members that somebody who sent its claims to those in `reached` did not reach."""
        if not reached:
            return []  # it relayed them itself
        known = {reached[i : i + 4] for i in range(0, len(reached), 4)}
        return [
            neighbour.node_id
            for neighbour in self.mesh()
            if neighbour.node_id != sender and neighbour.node_id[:4] not in known and not neighbour.complete
        ]
