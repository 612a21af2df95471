"""The real DHT and announcer of each node of a `World`, over simulated datagrams."""

from __future__ import annotations

from random import Random

import trio

from simulations.datagrams import DatagramNetwork
from simulations.events import TICK
from simulations.world import Node, World
from swarm.announce import Announcer
from swarm.dht.node import DhtNode

WALL = 1_800_000_000.0


class Overlay:
    """Discovery for every node of a world; give `for_node` to `World.run`, and some seconds before the first fetch."""

    def __init__(self, world: World, *, loss: float = 0.0) -> None:
        self.datagrams = DatagramNetwork(Random(world.rng.getrandbits(64)), latency=(0.001, 0.02), loss=loss, tick=TICK)
        self._first: Node | None = None

    def for_node(self, node: Node, nursery: trio.Nursery) -> Announcer:
        """Start this node's DHT; the first one is whom the others join."""
        if self._first is None:
            self._first = node
            nursery.start_soon(self.datagrams.run)
        rng = Random(node.world.rng.getrandbits(64))
        dht = DhtNode(
            self.datagrams.endpoint(node.address),
            node.membership,
            rng=rng,
            join=[str(self._first.address)] if node is not self._first else [],
            wall=lambda: WALL + trio.current_time(),
            randbytes=rng.randbytes,
        )
        announcer = Announcer(dht, node.membership, control_port=node.address.port, rng=rng)
        scope = trio.CancelScope()

        async def live() -> None:
            with scope:
                async with trio.open_nursery() as both:
                    await both.start(dht.run)
                    await both.start(announcer.run)

        def die() -> None:
            self.datagrams.kill(node.address.host)
            scope.cancel()

        node.when_killed.append(die)
        nursery.start_soon(live)
        return announcer
