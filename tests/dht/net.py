"""Whole DHT nodes on a simulated network, under a virtual clock."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from simulations.datagrams import DatagramNetwork
from simulations.membership import SimulatedMembership
from swarm.announce import Announcer
from swarm.dht.node import DhtNode
from swarm.edges import Address, Provider

WALL = 1_800_000_000.0


def address(number: int) -> Address:
    return Address(f"10.0.{number >> 8}.{number & 255}", 7400)


@dataclass(eq=False)
class SimNode:
    number: int
    membership: SimulatedMembership
    dht: DhtNode
    announcer: Announcer
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@dataclass(eq=False)
class Net:
    """Nodes come and go; everything is drawn from one seed."""

    nursery: trio.Nursery
    datagrams: DatagramNetwork
    rng: random.Random
    nodes: list[SimNode] = field(default_factory=list)

    def make(
        self,
        number: int,
        *,
        join: Sequence[str] | None = None,
        ahead: float = 0.0,
        state: Path | None = None,
        key: int | None = None,
        **options: object,
    ) -> SimNode:
        membership = SimulatedMembership.draw(random.Random(number if key is None else key))
        where = address(number)
        if where in self.datagrams._endpoints:
            del self.datagrams._endpoints[where]
        dht = DhtNode(
            self.datagrams.endpoint(where),
            membership,
            rng=self.rng,
            join=[str(address(0))] if join is None and number else join or [],
            wall=lambda: WALL + ahead + trio.current_time(),
            randbytes=self.rng.randbytes,
            state_path=state / f"dht-{number}" if state else None,
            **options,  # type: ignore[arg-type]  # as DhtNode takes them
        )
        announcer = Announcer(
            dht, membership, control_port=7400, rng=self.rng, state_path=state / f"announce-{number}" if state else None
        )
        return SimNode(number, membership, dht, announcer)

    async def start(self, node: SimNode) -> SimNode:
        async def serve(task_status: trio.TaskStatus[None]) -> None:
            with node.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(node.dht.run)
                    await nursery.start(node.announcer.run)
                    task_status.started()

        await self.nursery.start(serve)
        self.nodes.append(node)
        return node

    async def add(self, count: int, **options: object) -> list[SimNode]:
        first = len(self.nodes)
        return [await self.start(self.make(first + each, **options)) for each in range(count)]  # type: ignore[arg-type]

    def kill(self, node: SimNode) -> None:
        """As kill -9: nothing is said to anybody."""
        self.datagrams.kill(address(node.number).host)
        node.scope.cancel()

    def ids(self, nodes: Sequence[SimNode]) -> set[bytes]:
        return {node.membership.node_id for node in nodes}


@asynccontextmanager
async def network(seed: int = 1, *, latency: tuple[float, float] = (0.001, 0.010), loss: float = 0.0) -> AsyncIterator[Net]:
    async with trio.open_nursery() as nursery:
        rng = random.Random(seed)
        datagrams = DatagramNetwork(rng, latency=latency, loss=loss)
        await nursery.start(datagrams.run)
        yield Net(nursery, datagrams, rng)
        nursery.cancel_scope.cancel()


def ids_of(providers: Sequence[Provider]) -> set[bytes]:
    return {provider.node_id for provider in providers}
