"""Links a node keeps while nothing is fetched, so that a fetch finds neighbours at once.

Setting up a link costs some milliseconds of CPU at both ends and a few round trips; done when everybody starts the same
fetch, it stands between the command and the first byte.  Here it is done in quiet moments, with contacts of the DHT drawn
at random, so that the links of all nodes together form a random graph, in which news is a few hops from everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

CONTENT: Final = 60.0
"""Seconds between looks while there are enough."""


class Neighbourhood:
    """Keeps `wanted` links, however they came about.  `run` it.

    Args:
        contacts: Nodes that proved their id to the DHT, and where their control port is.
    """

    def __init__(
        self,
        me: NodeId,
        contacts: Callable[[], Sequence[tuple[NodeId, Address]]],
        network: PeerNetwork,
        *,
        rng: Random,
        wanted: int = WANTED,
    ) -> None:
        self._me = me
        self._contacts = contacts
        self._network = network
        self._rng = rng
        self._wanted = wanted

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Dial now and then, until cancelled."""
        task_status.started()
        pause = FIRST_LOOK
        while True:
            await trio.sleep(pause * self._rng.uniform(0.5, 1.0))
            await self._dial(self.lacking(own_turn=pause == FIRST_LOOK))
            pause = min(LOOK_AGAIN, pause * PAUSE_GROWTH)
            if len(self._network.links()) >= self._wanted:
                await trio.sleep(CONTENT * self._rng.uniform(0.5, 1.0))

    def complete(self) -> bool:
        """Whether there are links to all contacts, of which there is at least one."""
        known = [node_id for node_id, _ in self._contacts() if node_id != self._me]
        return bool(known) and all(self._network.link(node_id) is not None for node_id in known)

    def lacking(self, *, own_turn: bool) -> list[tuple[NodeId, Address]]:
        """Whom to dial now, at random.

        Args:
            own_turn: Leave those with a smaller id to dial us: nodes that start together would all dial one another twice.
        """
        unlinked = [
            (node_id, address)
            for node_id, address in self._contacts()
            if node_id != self._me and self._network.link(node_id) is None and not (own_turn and node_id < self._me)
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
                log.debug("peer_unreachable", peer=node_id.hex(), reason=str(error))
