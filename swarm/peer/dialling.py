"""Making a link to a node of which we know addresses: once however many ask, politely, and not again where it failed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio

from swarm.edges import Address, NodeId
from swarm.errors import PeerError
from swarm.peer import websocket
from swarm.peer.connection import SETUP_SECONDS
from swarm.peer.limits import Failures
from swarm.peer.link import Link

MAX_DIALS: Final = 16
"""Connection attempts at a time; more only compete with one another for the same ten seconds."""

MAX_ADDRESSES: Final = 8
"""Of one node; what a provider record can hold."""

STAGGER_SECONDS: Final = 0.25
"""Head start of one address over the next (RFC 8305)."""


class Unwanted(PeerError):
    """The address answers, but it is not (or does not want to be) the peer of that node id."""


class Links(Protocol):
    """What dialling needs of the hub."""

    def existing(self, node_id: NodeId) -> Link | None: ...

    async def wait_changed(self) -> None:
        """Until a link came or went."""
        ...

    def spawn(self, body: Callable[[Link], Awaitable[None]], link: Link) -> None:
        """Run this for as long as the hub runs."""
        ...

    async def open(self, node_id: NodeId, address: Address) -> Link:
        """TCP and TLS, and make sure who answers.

        Raises:
            PeerError: Nobody, or (`Unwanted`) somebody else.
        """
        ...

    async def run_link(self, link: Link) -> None: ...


@dataclass(slots=True, eq=False)
class _Dial:
    """One link being made, however many wait for it."""

    done: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    link: Link | None = None
    errors: list[str] = field(default_factory=list)


class Dialler:
    """Single flight for each node; a few addresses at a time, each with a head start over the next.

    What failed is left alone for 30 s, doubling to 5 minutes: an address that does not answer for everybody, one where
    another node answers only for the node that was expected there (else a record could make an honest node's address unusable).
    """

    def __init__(self, links: Links, may_dial: Callable[[Address], bool]) -> None:
        self._links = links
        self._may_dial = may_dial
        self._dials: dict[NodeId, _Dial] = {}
        self._slots = trio.Semaphore(MAX_DIALS)
        self._failed: Failures[tuple[NodeId, Address] | Address] = Failures()
        self.attempts = 0
        self.failures = 0

    async def connect(self, node_id: NodeId, addresses: Sequence[Address], nursery: trio.Nursery) -> Link:
        """
        Raises:
            PeerError: As `edges.PeerNetwork.connect`.
        """
        dial = self._dials.get(node_id)
        if dial is None:
            candidates = self._candidates(node_id, addresses)
            dial = self._dials[node_id] = _Dial()
            nursery.start_soon(self._dial, node_id, candidates, dial)
        await dial.done.wait()
        if dial.link is None or dial.link.ended:
            raise PeerError(f"cannot connect to {node_id.hex()}: {'; '.join(dial.errors) or 'connection lost'}")
        return dial.link

    def link_up(self, link: Link) -> None:
        """There is a link to this node now, whoever made it: whoever waits for one gets it."""
        dial = self._dials.get(link.node_id)
        if dial is not None:
            dial.link = link
            dial.done.set()
            dial.scope.cancel()

    def _candidates(self, node_id: NodeId, addresses: Sequence[Address]) -> list[Address]:
        now = trio.current_time()
        allowed = [address for address in dict.fromkeys(addresses) if self._may_dial(address)]
        fresh = [a for a in allowed if not self._failed.blocked(a, now) and not self._failed.blocked((node_id, a), now)]
        if not fresh:
            why = "its addresses failed lately" if allowed else "it has no address that may be dialled"
            raise PeerError(f"not connecting to {node_id.hex()}: {why}")
        return fresh[:MAX_ADDRESSES]

    async def _dial(self, node_id: NodeId, addresses: list[Address], dial: _Dial) -> None:
        try:
            with dial.scope:
                async with trio.open_nursery() as nursery:
                    for address in addresses:
                        failed = trio.Event()
                        nursery.start_soon(self._attempt, node_id, address, dial, failed)
                        with trio.move_on_after(STAGGER_SECONDS):
                            await failed.wait()
        finally:
            del self._dials[node_id]
            dial.done.set()

    async def _attempt(self, node_id: NodeId, address: Address, dial: _Dial, failed: trio.Event) -> None:
        link: Link | None = None
        try:
            async with self._slots:
                self.attempts += 1
                with trio.fail_after(SETUP_SECONDS):
                    link = await self._links.open(node_id, address)
                self._links.spawn(self._links.run_link, link)
                await link.settled.wait()
            await self._settle(link)
        except (PeerError, trio.TooSlowError) as error:
            self.failures += 1
            dial.errors.append(str(error) or f"{address} did not answer within {SETUP_SECONDS:g} s")
            self._failed.failed((node_id, address) if isinstance(error, Unwanted) else address, trio.current_time())
        finally:
            if link is not None and link.up:
                self._failed.succeeded(address)
            elif link is not None:
                link.end("another connection was faster", code=websocket.DUPLICATE)
            failed.set()

    async def _settle(self, link: Link) -> None:
        """After an attempt: fine if there is a link, this one or another; else raise why not.

        Raises:
            PeerError: As said.
        """
        if link.close_code == websocket.DUPLICATE:
            # The other side has admitted another connection between us: it is about to come up here too.
            with trio.move_on_after(SETUP_SECONDS):
                while self._links.existing(link.node_id) is None:
                    await self._links.wait_changed()
        if link.up or self._links.existing(link.node_id) is not None:
            return
        lost = link.close_code in (0, 1006)
        raise (PeerError if lost else Unwanted)(f"{link.remote}: {link.reason}")
