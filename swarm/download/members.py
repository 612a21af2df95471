"""Which members of a task are known, and whom to dial.  No I/O, no clock."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from random import Random
from typing import TypeVar

from swarm.download.policy import Policy
from swarm.edges import NodeId, Provider, State
from swarm.identity import node_id_of

MAX_KNOWN = 512
"""Members remembered per task; the nearest and the most recent suffice to find the others."""

INFINITY = float("inf")
FARTHEST = 1 << 160

Value = TypeVar("Value")

MAX_SEEN_CLAIMS = 8192
MAX_FAILURES = 3
RECORDS_TOLD = 16
"""Records in one `peers` message: about 5 KiB."""


class Members:
    """Known members of one task.  Known is not linked, and says nothing about honesty."""

    def __init__(self, me: NodeId, task_key: bytes, policy: Policy) -> None:
        self._me = me
        self._key = int.from_bytes(task_key, "big")
        self._policy = policy
        self._known: dict[NodeId, Provider] = {}
        self._failures: dict[NodeId, int] = {}
        self._declined: dict[NodeId, float] = {}
        self._seen_claims: dict[bytes, None] = {}
        self._ids: dict[bytes, NodeId] = {}
        self._mesh_edge: int | None = None
        """Distance of the last of the nearest; worked out anew when members were learned or found dead."""
        self.dialling: set[NodeId] = set()

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, found: Iterable[Provider]) -> None:
        self._mesh_edge = None
        for provider in found:
            if provider.node_id != self._me:
                self._known.pop(provider.node_id, None)
                self._known[provider.node_id] = provider
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]

    def failed(self, node_id: NodeId) -> None:
        """A dial failed; after a few it is no longer tried."""
        self._mesh_edge = None
        if node_id not in self._failures:
            _bound(self._failures, MAX_KNOWN)
        self._failures[node_id] = self._failures.get(node_id, 0) + 1

    def declined(self, node_id: NodeId, now: float) -> None:
        """It does not take part, or has neighbours enough."""
        self._declined.pop(node_id, None)
        _bound(self._declined, MAX_KNOWN)
        self._declined[node_id] = now

    @property
    def outranked(self) -> bool:
        """Whether so many members are nearer to the task key than we are that the origin is theirs to read.

        Members that were never linked count: far from the key nobody connects to the nearest, and who looked at its own
        links only would take itself for one of them.
        """
        return not self.is_near(self._me)

    def is_near(self, node_id: NodeId) -> bool:
        """Whether a member belongs to the mesh, as far as we know."""
        if self._mesh_edge is None:
            distances = (
                self._distance(known)
                for known, provider in self._known.items()
                if self._may_answer(known) and provider.state < State.COMPLETE
            )
            nearest = heapq.nsmallest(self._policy.mesh, distances)
            self._mesh_edge = nearest[-1] if len(nearest) == self._policy.mesh else FARTHEST
        return self._distance(node_id) <= self._mesh_edge

    def to_dial(self, linked: set[NodeId], now: float, rng: Random, *, enough: int, nearest: bool = False) -> list[Provider]:
        """Whom to connect to now.

        The mesh first: a node among the nearest connects to all the nearest it knows of.  Then others at random, so that
        the first ones known do not become everybody's neighbours, until there are enough.

        Args:
            enough: Neighbours wanted.
            nearest: Connect to the nearest wherever we are ourselves: to find out whether they are alive.
        """
        free = {
            node_id: provider
            for node_id, provider in self._known.items()
            if node_id not in linked and node_id not in self.dialling and self._may_answer(node_id)
        }
        chosen: dict[NodeId, Provider] = {}
        if nearest or not self.outranked:
            ranked = heapq.nsmallest(self._policy.mesh, filter(self._may_answer, self._known), key=self._distance)
            chosen = {node_id: free[node_id] for node_id in ranked if node_id in free}
        spare = enough - len(linked) - len(self.dialling) - len(chosen)
        others = [
            node_id
            for node_id in free
            if node_id not in chosen and self._declined.get(node_id, -INFINITY) + self._policy.declined <= now
        ]
        for node_id in rng.sample(others, max(0, min(spare, len(others)))):
            chosen[node_id] = free[node_id]
        return list(chosen.values())

    def _may_answer(self, node_id: NodeId) -> bool:
        return self._failures.get(node_id, 0) < MAX_FAILURES

    def records(self, receiver: NodeId, rng: Random) -> list[bytes]:
        """Signed records to pass to a new neighbour: the nearest, and some others."""
        ranked = sorted(
            (p for p in self._known.values() if p.record and p.node_id != receiver and not self._failures.get(p.node_id)),
            key=lambda provider: self._distance(provider.node_id),
        )
        near, rest = ranked[: RECORDS_TOLD // 2], ranked[RECORDS_TOLD // 2 :]
        chosen = [*near, *rng.sample(rest, min(len(rest), RECORDS_TOLD - len(near)))]
        return [provider.record for provider in chosen]

    def claim_seen(self, signature: bytes) -> bool:
        """Whether this very claim came, and was checked, before.  Spares a signature check for each further relay."""
        return signature in self._seen_claims

    def note_claim(self, signature: bytes) -> None:
        """A claim was checked.  Not before: a bad one with a good one's signature would keep the good one out."""
        _bound(self._seen_claims, MAX_SEEN_CLAIMS)
        self._seen_claims[signature] = None

    def knows(self, node_id: NodeId) -> bool:
        return node_id in self._known

    def id_of(self, public_key: bytes) -> NodeId:
        """`node_id_of`, remembered."""
        node_id = self._ids.get(public_key)
        if node_id is None:
            _bound(self._ids, MAX_KNOWN)
            node_id = self._ids[public_key] = node_id_of(public_key)
        return node_id

    def _distance(self, node_id: NodeId) -> int:
        return int.from_bytes(node_id, "big") ^ self._key


def _bound(table: dict[bytes, Value], most: int) -> None:
    """Make room for one more; the oldest goes."""
    while len(table) >= most:
        del table[next(iter(table))]
