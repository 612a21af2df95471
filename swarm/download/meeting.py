"""Finding the members of a task and connecting to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import structlog
import trio

from swarm import wire
from swarm.download.active import GREETED_LINKS, Active, Parts
from swarm.download.bans import Bans
from swarm.edges import NodeId, PeerLink, Provider, State
from swarm.errors import PeerError

log = structlog.get_logger(__name__)

FIND_AGAIN = (1.0, 2.0, 5.0, 15.0, 30.0)
"""Seconds between searches for more members while a download runs; the last repeats."""

CLAIMS_FOLLOW = 0.02
"""Who answers that it takes part says next what it reads; who read at once would read the same again (2-4 % of small content
where nodes come one after another, simulated)."""

DIAL_PATIENCE = 0.15
"""Of two nodes that find each other at the same moment the one with the larger id waits this long for the other's dial."""


class Meeting:
    """Announces, dials and greets on behalf of each task."""

    def __init__(self, parts: Parts, bans: Bans) -> None:
        self._parts = parts
        self._bans = bans

    async def seek(self, active: Active, found: list[Provider]) -> None:
        """Announce, connect, settle; then look for more members from time to time until the download is over."""
        policy = self._parts.policy
        if not active.shared:
            active.exchange.settle(trio.current_time())
            active.touch()
            return
        for link in self._parts.links()[:GREETED_LINKS]:
            self.greet(active, link)
        announced = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, active, found, announced)
            if not self._parts.all_linked():
                # Where every node we know of is greeted already, the DHT has nobody to add, and nothing waits for it.
                await announced.wait()
            with trio.move_on_after(policy.settle_bound):
                await trio.sleep(policy.settle)
                await self._first_answers(active)
            if active.exchange.neighbours:
                await trio.sleep(CLAIMS_FOLLOW)
            active.exchange.settle(trio.current_time())
            active.touch()
        await self.connect_to(active, [])
        await self._keep_looking(active)

    async def _announce(self, active: Active, found: list[Provider], announced: trio.Event) -> None:
        found = [*found, *await self._parts.discovery.announce(active.task.id, State.WANTS)]
        announced.set()
        await self.connect_to(active, found)

    async def _keep_looking(self, active: Active) -> None:
        policy, exchange = self._parts.policy, active.exchange
        for interval in itertools.chain(FIND_AGAIN, itertools.repeat(FIND_AGAIN[-1])):
            with trio.move_on_after(interval):
                await active.done.wait()
                return
            stuck = trio.current_time() - active.last_byte >= policy.progress_after(active.geometry)
            if stuck or len(exchange.neighbours) < self._enough(active):
                await self.connect_to(active, await self._parts.discovery.find(active.task.id), nearest=stuck)

    def lost(self, active: Active) -> None:
        """A neighbour is gone.  Who has lost the last one looks for others before it reads the origin as if it were alone:
        after a pause, or a failure of its own network, the others are still there."""
        exchange = active.exchange
        if exchange.neighbours or not exchange.settled or not active.downloading or active.nursery is None:
            return
        exchange.settled = False
        active.nursery.start_soon(self._meet_again, active)

    async def _meet_again(self, active: Active) -> None:
        with trio.move_on_after(self._parts.policy.settle_bound):
            await self.connect_to(active, await self._parts.discovery.find(active.task.id))
            await self._first_answers(active)
        active.exchange.settle(trio.current_time())
        active.touch()

    async def _first_answers(self, active: Active) -> None:
        """Until everybody who was dialled or greeted has answered or failed."""
        while active.awaiting or active.members.dialling:
            active.joined = trio.Event()
            await active.joined.wait()

    async def connect_to(self, active: Active, found: Iterable[Provider], *, nearest: bool = False) -> None:
        """Remember these members, and connect to those the task needs (and to the `nearest`, see `Members.to_dial`)."""
        members = active.members
        members.learn(found)
        active.exchange.outranked = members.outranked
        linked = set(active.exchange.neighbours) | active.awaiting
        enough = self._enough(active)
        async with trio.open_nursery() as nursery:
            for provider in members.to_dial(linked, trio.current_time(), self._parts.rng, enough=enough, nearest=nearest):
                members.dialling.add(provider.node_id)
                nursery.start_soon(self._join_with, active, provider)

    def _enough(self, active: Active) -> int:
        """How many neighbours it is to have."""
        policy = self._parts.policy
        if not active.exchange.settled:
            return policy.starving  # only the first to announce are known, to everybody; the rest is chosen when more are
        return policy.accepted if active.exchange.is_starved(trio.current_time()) else policy.neighbours

    async def _join_with(self, active: Active, provider: Provider) -> None:
        try:
            link = await self.dial(provider)
        finally:
            active.members.dialling.discard(provider.node_id)
        if link is None:
            active.members.failed(provider.node_id)
            active.exchange.outranked = active.members.outranked
        else:
            self.greet(active, link)
        active.joined.set()

    async def dial(self, provider: Provider) -> PeerLink | None:
        """The link to this member, made if there is none; `None` if it is banned or cannot be reached."""
        network = self._parts.network
        if network is None or provider.node_id == self._parts.me or self.is_banned(provider.node_id):
            return None
        link = network.link(provider.node_id)
        if link is None and provider.state is State.WANTS and provider.node_id < self._parts.me:
            # It is likely to be dialling us at this very moment; two set-ups cost twice the CPU of one.
            await trio.sleep(DIAL_PATIENCE)
            link = network.link(provider.node_id)
        if link is not None:
            return link
        try:
            return await network.connect(provider.node_id, provider.control)
        except PeerError as error:
            log.debug("peer_unreachable", peer=provider.node_id.hex(), reason=str(error))
            return None

    def greet(self, active: Active, link: PeerLink) -> None:
        """Say that we take part, and ask whether it does."""
        if link.node_id in active.greeted or not active.shared:
            return
        active.greeted.add(link.node_id)
        active.awaiting.add(link.node_id)
        link.post(active.join_message(link.node_id, reply=True))
        record = self._parts.discovery.own_record(active.task.id)
        if record is not None:
            # Who is greeted by many sends them on to one another; the DHT keeps 64 records of a task.
            link.post(wire.Peers(active.task.id, [record]), urgent=False)

    def introduced(self, active: Active, records_untrusted: list[bytes]) -> None:
        """A neighbour told us of other members."""
        discovery = self._parts.discovery
        read = (discovery.read_record(record, active.task.id) for record in records_untrusted)
        found = [provider for provider in read if provider is not None]
        if found and not active.done.is_set() and active.nursery is not None:
            active.nursery.start_soon(self.connect_to, active, found)

    def introduce(self, active: Active, newcomer: PeerLink) -> None:
        """Tell a new neighbour of the members we know."""
        known = active.members.records(newcomer.node_id, self._parts.rng)
        if known:
            newcomer.post(wire.Peers(active.task.id, known), urgent=False)

    def is_banned(self, node_id: NodeId) -> bool:
        return self._bans.is_banned(node_id, trio.current_time())
