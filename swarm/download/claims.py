"""Who reads which piece from the origin: rendezvous order, claims with leases, strikes.  No I/O, no clock.

Participants: the *candidates* (the live members nearest to the task key, us among them where we are near enough).
Goal: each piece is read from the origin once, without a coordinator, however many nodes want it.  Non-goal: agreement;
two nodes that see different members read a piece twice now and then, and nothing else goes wrong.

Rendezvous hashing after Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous" (1996).
"""

from __future__ import annotations

import hashlib
import heapq
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from swarm.download.policy import Policy

NodeId = bytes

WHOLE = -1
"""The piece number that claims the content as a whole."""

MAX_HISTORY = 16384
"""Pairs of owner and piece whose claims are remembered for a task: 64 owners of 256 pieces."""


def score(node_id: NodeId, task_id: bytes, piece: int) -> int:
    """The rendezvous weight of a node for a piece; the highest reads it."""
    data = node_id + task_id + (piece & 0xFFFFFFFF).to_bytes(4, "big")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class Rendezvous:
    """Which candidate each piece falls to.

    Worked out piece by piece when asked for, and remembered until the candidates change: content of many pieces must not
    cost a hash for each piece and candidate whenever a member comes or goes.
    """

    def __init__(self, task_id: bytes) -> None:
        self._task_id = task_id
        self._candidates: tuple[NodeId, ...] = ()
        self._ranked: dict[int, list[NodeId]] = {}

    def score(self, node_id: NodeId, piece: int) -> int:
        return score(node_id, self._task_id, piece)

    def elect(self, candidates: Sequence[NodeId]) -> None:
        """From here on pieces fall to these."""
        chosen = tuple(candidates)
        if chosen != self._candidates:
            self._candidates = chosen
            self._ranked.clear()

    def owner(self, piece: int) -> NodeId:
        """Who reads `piece` (or `WHOLE`); there must be a candidate."""
        return self._best(piece)[0]

    def runner_up(self, piece: int) -> NodeId | None:
        """Who reads `piece` if its owner does not come to it."""
        best = self._best(piece)
        return best[1] if len(best) > 1 else None

    def _best(self, piece: int) -> list[NodeId]:
        best = self._ranked.get(piece)
        if best is None:
            best = heapq.nlargest(2, self._candidates, key=lambda node_id: score(node_id, self._task_id, piece))
            self._ranked[piece] = best
        return best


@dataclass(slots=True)
class Claim:
    """A live claim: `renewals` counts how often its owner said so again."""

    owner: NodeId
    since: float
    expires: float
    renewals: int = 0


@dataclass(slots=True)
class _History:
    """What one owner claimed of one piece: the last number, and how often anew without ever having it."""

    seq: int
    attempts: int = 0


class ClaimBook:
    """Other nodes' claims on one task.

    Only claims whose signature was checked come here, so a strike always follows from what its bearer signed.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._claims: dict[int, Claim] = {}
        self._strikes: dict[NodeId, int] = {}
        self._read_times: dict[NodeId, float] = {}
        self._history: dict[tuple[NodeId, int], _History] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def get(self, piece: int) -> Claim | None:
        return self._claims.get(piece)

    def pieces(self) -> Iterable[int]:
        return self._claims.keys()

    def owners(self) -> Iterator[NodeId]:
        return (claim.owner for claim in self._claims.values())

    def struck_out(self, owner: NodeId) -> bool:
        return self._strikes.get(owner, 0) >= self._policy.strikes

    def accept(self, piece: int, owner: NodeId, lease: float, seq: int, wins: bool, now: float) -> bool:
        """Note a claim.

        Args:
            wins: Whether `owner` ranks at least as high for this piece as the present claim's owner.

        Returns:
            Whether it was new; an old one, one of a struck-out owner, or one too many is ignored.
        """
        history = self._history.get((owner, piece))
        if self.struck_out(owner) or (history is not None and seq <= history.seq):
            return False
        if history is None:
            history = self._remember(owner, piece)
        history.seq = seq
        expires = now + lease + self._policy.lease_slack
        present = self._claims.get(piece)
        if present is not None and present.owner == owner:
            if present.renewals >= self._policy.lease_renewals:
                return False
            present.renewals += 1
            present.expires = expires
            return True
        if history.attempts >= self._policy.claim_attempts or self._count(owner) >= self._policy.claims_per_owner:
            return False
        if present is not None and not wins:
            return True
        history.attempts += 1
        self._claims[piece] = Claim(owner, now, expires)
        return True

    def _count(self, owner: NodeId) -> int:
        return sum(claim.owner == owner for claim in self._claims.values())

    def _remember(self, owner: NodeId, piece: int) -> _History:
        # The oldest are forgotten: all they could do is come once more.
        while len(self._history) >= MAX_HISTORY:
            del self._history[next(iter(self._history))]
        history = self._history[owner, piece] = _History(-1)
        return history

    def delivered(self, owner: NodeId, piece: int, now: float) -> None:
        """`owner` says it has `piece`: its claim is done.  Anybody else's claim on it is kept: that one may be alone alive."""
        history = self._history.get((owner, piece))
        if history is not None:
            history.attempts = 0
        claim = self._claims.get(piece)
        if claim is None or claim.owner != owner:
            return
        del self._claims[piece]
        took = now - claim.since
        before = self._read_times.get(owner)
        self._read_times[owner] = took if before is None else 0.7 * before + 0.3 * took

    def progressed(self, owner: NodeId) -> None:
        """`owner` has a piece it did not have before: if it reads the whole, it may go on."""
        whole = self._claims.get(WHOLE)
        if whole is not None and whole.owner == owner:
            whole.renewals = 0

    def held(self, piece: int) -> None:
        """We hold and verified the piece ourselves; a claim on it says nothing any more and is no reason for a strike."""
        self._claims.pop(piece, None)

    def give_up(self, owner: NodeId, pieces: Iterable[int]) -> None:
        """The owner took claims back."""
        for piece in pieces:
            claim = self._claims.get(piece)
            if claim is not None and claim.owner == owner:
                del self._claims[piece]

    def died(self, owner: NodeId) -> None:
        self.give_up(owner, [piece for piece, claim in self._claims.items() if claim.owner == owner])

    def expire(self, now: float) -> int:
        """Drop overdue claims and strike their owners; returns how many there were."""
        overdue = [piece for piece, claim in self._claims.items() if claim.expires <= now]
        for piece in overdue:
            owner = self._claims.pop(piece).owner
            self._strikes[owner] = self._strikes.get(owner, 0) + 1
        return len(overdue)

    def next_expiry(self) -> float:
        return min((claim.expires for claim in self._claims.values()), default=float("inf"))

    def read_times(self) -> dict[NodeId, float]:
        """Mean claim-to-have seconds by owner."""
        return self._read_times


def slow(times: dict[NodeId, float], policy: Policy) -> set[NodeId]:
    """Who takes more than `slow_factor` medians; nobody while fewer than three were measured."""
    if len(times) < 3:
        return set()
    bound = policy.slow_factor * statistics.median(times.values())
    return {owner for owner, took in times.items() if took > bound}
