"""Links a node keeps while nothing is fetched, so that a fetch finds neighbours at once.

Setting up a link costs some milliseconds of CPU at both ends and a few round trips; done when everybody starts the same
fetch, it stands between the command and the first byte.  Here it is done in quiet moments, with nodes of the DHT drawn at
random, so that the links of all nodes together form a random graph, in which news is a few hops from everybody.

A routing table is no list of all nodes: of the far half of the ids it keeps a bucket, so that already among twenty some are
missing.  Hence nodes are also looked up near random ids.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Final

import structlog
import trio

from swarm.edges import Address, NodeId, PeerNetwork
from swarm.errors import PeerError

log = structlog.get_logger(__name__)

WANTED: Final = 24
"""Links every node keeps: a network no larger than the mesh of a task is linked completely, and each fetch meets at once."""

AT_ONCE: Final = 4
"""Dials at a time: a rollout that starts a thousand nodes at once is to set up links in minutes, not in a second."""

FIRST_LOOK: Final = 1.0
LOOK_AGAIN: Final = 5.0
"""Seconds to the first look, and between looks while links are lacking: soon after start there are few contacts yet, so the
pauses grow from the first to the second."""

PAUSE_GROWTH: Final = 1.5

FRUITLESS: Final = 8
"""Searches in a row that named nobody new, after which there is hardly anybody: one names a node of twenty with a chance of
8 in 20."""

CONTENT: Final = 60.0
"""Seconds between looks while there are enough links, and between searches while there is nobody to be found."""

MAX_FOUND: Final = 256
"""Nodes remembered beside the routing table, against whoever makes up many."""


class Neighbourhood:
    """Keeps `wanted` links, however they came about.  `run` it.

    Args:
        contacts: Nodes that proved their id to the DHT, and where their control port is.
        search: Those near a random id that answered, likewise.
    """

    def __init__(
        self,
        me: NodeId,
        contacts: Callable[[], Sequence[tuple[NodeId, Address]]],
        search: Callable[[], Awaitable[Sequence[tuple[NodeId, Address]]]],
        network: PeerNetwork,
        *,
        rng: Random,
        wanted: int = WANTED,
    ) -> None:
        self._me = me
        self._contacts = contacts
        self._search = search
        self._found: dict[NodeId, Address] = {}
        self._network = network
        self._rng = rng
        self._wanted = wanted

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Dial now and then, until cancelled."""
        task_status.started()
        pause, fruitless, search_at = FIRST_LOOK, 0, trio.current_time()
        while True:
            await trio.sleep(pause * self._rng.uniform(0.5, 1.0))
            if len(self._network.links()) >= self._wanted:
                pause = CONTENT
                continue
            if trio.current_time() >= search_at:
                fruitless = 0 if await self._look() else fruitless + 1
                search_at = trio.current_time() + (CONTENT if fruitless >= FRUITLESS else 0.0)
            await self._dial(self.lacking(own_turn=pause == FIRST_LOOK))
            pause = min(LOOK_AGAIN, pause * PAUSE_GROWTH)

    def complete(self) -> bool:
        """Whether there are links to all nodes we have heard of, of which there is at least one."""
        known = self._known()
        return bool(known) and all(self._network.link(node_id) is not None for node_id in known)

    async def _look(self) -> bool:
        """Whether the search named anybody we did not know."""
        before = self._known()
        for node_id, address in await self._search():
            self._found.pop(node_id, None)
            self._found[node_id] = address
        while len(self._found) > MAX_FOUND:
            del self._found[next(iter(self._found))]
        return any(node_id not in before for node_id in self._known())

    def _known(self) -> dict[NodeId, Address]:
        known = self._found | dict(self._contacts())
        known.pop(self._me, None)
        return known

    def lacking(self, *, own_turn: bool) -> list[tuple[NodeId, Address]]:
        """Whom to dial now, at random.

        Args:
            own_turn: Leave those with a smaller id to dial us: nodes that start together would all dial one another twice.
        """
        unlinked = [
            (node_id, address)
            for node_id, address in self._known().items()
            if self._network.link(node_id) is None and not (own_turn and node_id < self._me)
        ]
        number = min(len(unlinked), max(0, self._wanted - len(self._network.links())))
        return self._rng.sample(unlinked, number)

    async def _dial(self, chosen: Sequence[tuple[NodeId, Address]]) -> None:
        limiter = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for node_id, address in chosen:
                nursery.start_soon(self._connect, node_id, address, limiter)

    async def _connect(self, node_id: NodeId, address: Address, limiter: trio.CapacityLimiter) -> None:
        async with limiter:
            try:
                await self._network.connect(node_id, [address])
            except PeerError as error:
                self._found.pop(node_id, None)
                log.debug("peer_unreachable", peer=node_id.hex(), reason=str(error))
