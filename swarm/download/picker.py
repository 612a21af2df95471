"""Which piece to ask of which neighbour.  No I/O, no clock, randomness injected.

The asker spreads its requests (rarest first, `queued` at each neighbour); the server picks among everybody's requests.
The simulations found that the server's choice matters and the asker's hardly does, as long as every server has something
to choose from: hence requests at all neighbours at once, withdrawn elsewhere when one of them starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from swarm.download.policy import Policy
from swarm.pieces import PieceSet, indices, none

NodeId = bytes

RAREST_SAMPLE = 64
"""Candidates compared for rarity; a sample keeps the choice cheap for content of thousands of pieces."""


@dataclass(slots=True)
class Neighbour:
    """A linked member of the task.

    Attributes:
        queued: Pieces requested of it that have not started, and when they were.
        arriving: Pieces it is sending us.
        told: Of how many of the pieces that we verified it was told, in their order.
        last_spread: When a piece it had alone was last seen elsewhere.
        lost: How many pieces it has withdrawn so far.
        gave: When it last began to send a piece, or joined.
        doubted: It was asked and gave nothing: what it says it holds keeps nobody from reading it elsewhere.
    """

    node_id: NodeId
    distance: int
    held: PieceSet
    reads_origin: bool = True
    complete: bool = False
    queued: dict[int, float] = field(default_factory=dict)
    arriving: set[int] = field(default_factory=set)
    told: int = 0
    paused_until: float = 0.0
    failures: int = 0
    last_spread: float = 0.0
    lost: int = 0
    gave: float = 0.0
    doubted: bool = False


@dataclass(slots=True)
class Requests:
    """What is on its way to us.

    Attributes:
        arriving: Piece -> neighbours whose transfer has started.
        queued: Piece -> neighbours where it waits, and since when.  Dictionaries, because sets have another order in each
            process.
    """

    arriving: dict[int, dict[NodeId, None]] = field(default_factory=dict)
    queued: dict[int, dict[NodeId, float]] = field(default_factory=dict)

    def add(self, neighbour: Neighbour, piece: int, now: float) -> None:
        neighbour.queued[piece] = now
        self.queued.setdefault(piece, {})[neighbour.node_id] = now

    def started(self, neighbour: Neighbour, piece: int) -> None:
        self._unqueue(neighbour, piece)
        neighbour.arriving.add(piece)
        self.arriving.setdefault(piece, {})[neighbour.node_id] = None

    def ended(self, neighbour: Neighbour, piece: int) -> None:
        """The request was answered, refused, cancelled or lost."""
        self._unqueue(neighbour, piece)
        neighbour.arriving.discard(piece)
        holders = self.arriving.get(piece)
        if holders is not None:
            holders.pop(neighbour.node_id, None)
            if not holders:
                del self.arriving[piece]

    def _unqueue(self, neighbour: Neighbour, piece: int) -> None:
        neighbour.queued.pop(piece, None)
        holders = self.queued.get(piece)
        if holders is not None:
            holders.pop(neighbour.node_id, None)
            if not holders:
                del self.queued[piece]


class _Spares:
    """Pieces that were asked for and have waited for a while, at not too many neighbours: they may be asked of another one too.

    Whoever starts first sends it, and the others' requests are cancelled when its header is read here.  What is asked of two
    that are idle both is sent by both, for neither cancel comes in time.
    """

    def __init__(self, requests: Requests, wanted: PieceSet, *, holders: int, asked_before: float) -> None:
        self._requests = requests
        self._wanted = wanted
        self._holders = holders
        self._asked_before = asked_before
        self.pieces = none(len(wanted))
        for piece in requests.queued:
            self.look_at(piece)

    def look_at(self, piece: int) -> None:
        """It was asked for again, perhaps."""
        asked = self._requests.queued[piece]
        patient = len(asked) < self._holders and all(since <= self._asked_before for since in asked.values())
        self.pieces[piece] = patient and bool(self._wanted[piece])


def choose_requests(
    neighbours: Sequence[Neighbour],
    missing: PieceSet,
    requests: Requests,
    counts: Sequence[int],
    policy: Policy,
    rng: Random,
    now: float,
    *,
    patience: float,
    spare_after: float,
    extra: int,
    fetching: bool,
    first: Sequence[int] = (),
) -> list[tuple[Neighbour, int, bool]]:
    """Pieces to ask for now, already entered in `requests`; with `True` for those that wait at another neighbour too.

    Args:
        missing: Pieces wanted, not held, and not being read from the origin by us.
        counts: How many neighbours hold each piece.
        patience: Seconds a request may wait before the node it waits at counts as overloaded.
        spare_after: Seconds a request must have waited before the same piece is asked for elsewhere too.
        extra: Pieces that may arrive beyond `policy.arriving`.
        fetching: Whether we read anything from the origin at the moment.
        first: Pieces a reader waits for, most urgent first; they go before rarity.
    """
    if len(requests.arriving) >= policy.arriving + extra:
        return []
    outstanding = policy.outstanding + 2 * extra
    # What has waited long sits in the queue of a node that everybody asks, or is no longer rare there, and whatever is goes
    # before it: something else is asked for in its place.
    overdue = now - patience
    expected = {n.node_id: sum(asked > overdue for asked in n.queued.values()) if n.queued else 0 for n in neighbours}
    room = outstanding - len(requests.arriving) - sum(expected.values())
    if room <= 0:
        return []
    wanted = missing.copy()
    for under_way in requests.arriving:
        wanted[under_way] = False
    fresh = wanted.copy()
    for waiting in requests.queued:
        fresh[waiting] = False
    queued = policy.queued_at_each(len(neighbours), outstanding)
    most = max(queued, policy.queued_overdue)
    order = [n for n in neighbours if expected[n.node_id] < queued and len(n.queued) < most and n.paused_until <= now]
    rng.shuffle(order)
    order.sort(key=lambda neighbour: len(neighbour.queued))
    holders = policy.endgame_holders if fetching or requests.arriving else policy.endgame_holders_starving
    spares = _Spares(requests, wanted, holders=holders, asked_before=now - spare_after)
    may_spare = len(requests.arriving) < policy.spare_arriving
    chosen: list[tuple[Neighbour, int, bool]] = []
    for neighbour in order:
        while expected[neighbour.node_id] < queued and len(neighbour.queued) < most and len(chosen) < room:
            piece = _pick(fresh & neighbour.held, counts, rng, first)
            spare = piece is None
            if piece is None and may_spare and not neighbour.queued:
                piece = _pick(spares.pieces & neighbour.held, counts, rng, first)
            if piece is None:
                break
            fresh[piece] = False
            requests.add(neighbour, piece, now)
            spares.look_at(piece)
            expected[neighbour.node_id] += 1
            chosen.append((neighbour, piece, spare))
        if len(chosen) >= room:
            break
    return chosen


def _pick(available: PieceSet, counts: Sequence[int], rng: Random, first: Sequence[int]) -> int | None:
    count = available.count()
    if not count:
        return None
    for urgent in first:
        if available[urgent]:
            return urgent
    candidates = list(indices(available))
    if count > RAREST_SAMPLE:
        candidates = rng.sample(candidates, RAREST_SAMPLE)
    rarest = min(counts[piece] for piece in candidates)
    return rng.choice([piece for piece in candidates if counts[piece] == rarest])
