"""UDP as a model: seeded latency and loss, no sockets, any clock.

One task delivers for the whole network, so a thousand nodes cost a thousand queues and nothing else.  With trio's
`MockClock` a simulated hour takes as long as its messages take to handle.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Final

import trio

from swarm.edges import Address

QUEUE: Final = 1024
"""Datagrams a receiver may have waiting; beyond, they are lost, as in a socket's buffer."""


@dataclass(slots=True)
class DatagramNetwork:
    """Every endpoint reaches every other, unless `cut` says no.

    Attributes:
        latency: Least and most seconds one way; drawn anew for each datagram, so datagrams overtake one another.
        loss: Share of datagrams lost.
        tick: Datagrams arrive on a grid of so many seconds, if not 0: fewer wake-ups for a large network.
        cut: Called with the two addresses for each datagram; `True` loses it (a partition, a dead host).
    """

    rng: random.Random
    latency: tuple[float, float] = (0.001, 0.040)
    loss: float = 0.0
    tick: float = 0.0
    sent: int = 0
    sent_bytes: int = 0
    lost: int = 0
    _endpoints: dict[Address, SimulatedDatagrams] = field(default_factory=dict)
    _flying: list[tuple[float, int, bytes, Address, Address]] = field(default_factory=list)
    _serial: itertools.count[int] = field(default_factory=itertools.count)
    _wake: trio.Event | None = None
    _sleeping_until: float = math.inf
    _dead: set[str] = field(default_factory=set)
    _sides: dict[str, int] = field(default_factory=dict)

    def endpoint(self, address: Address) -> SimulatedDatagrams:
        """A transport bound to an address, which must be free."""
        if address in self._endpoints:
            raise ValueError(f"{address} is taken")
        endpoint = self._endpoints[address] = SimulatedDatagrams(self, address)
        return endpoint

    def kill(self, host: str) -> None:
        """From now on nothing reaches or leaves this host, and nobody is told."""
        self._dead.add(host)

    def revive(self, host: str) -> None:
        self._dead.discard(host)

    def split(self, sides: dict[str, int]) -> None:
        """Hosts on different sides do not reach one another; hosts not named are on side 0.  `{}` heals."""
        self._sides = dict(sides)

    def post(self, data: bytes, source: Address, destination: Address) -> None:
        """Put a datagram on its way; `source` is whatever the sender says, as with a forged address."""
        self.sent += 1
        self.sent_bytes += len(data)
        if self._is_cut(source.host, destination.host) or self.rng.random() < self.loss:
            self.lost += 1
            return
        arrival = trio.current_time() + self.rng.uniform(*self.latency)
        if self.tick:
            arrival = math.ceil(arrival / self.tick) * self.tick
        heapq.heappush(self._flying, (arrival, next(self._serial), data, source, destination))
        if arrival < self._sleeping_until and self._wake is not None:
            self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Deliver until cancelled."""
        task_status.started()
        while True:
            self._wake = trio.Event()
            self._sleeping_until = self._flying[0][0] if self._flying else math.inf
            with trio.move_on_at(self._sleeping_until):
                await self._wake.wait()
            now = trio.current_time()
            while self._flying and self._flying[0][0] <= now:
                _, _, data, source, destination = heapq.heappop(self._flying)
                self._deliver(data, source, destination)

    def _is_cut(self, one: str, other: str) -> bool:
        return one in self._dead or other in self._dead or self._sides.get(one, 0) != self._sides.get(other, 0)

    def _deliver(self, data: bytes, source: Address, destination: Address) -> None:
        endpoint = self._endpoints.get(destination)
        if endpoint is None or self._is_cut(source.host, destination.host) or not endpoint.put(data, source):
            self.lost += 1


class SimulatedDatagrams:
    """`edges.DatagramTransport` on a `DatagramNetwork`."""

    def __init__(self, network: DatagramNetwork, address: Address) -> None:
        self._network = network
        self._address = address
        self._put, self._take = trio.open_memory_channel[tuple[bytes, Address]](QUEUE)

    @property
    def local_address(self) -> Address:
        return self._address

    async def send(self, data: bytes, address: Address) -> None:
        await trio.lowlevel.checkpoint()
        self._network.post(data, self._address, address)

    async def receive(self) -> tuple[bytes, Address]:
        return await self._take.receive()

    def put(self, data: bytes, source: Address) -> bool:
        """Hand a datagram to the receiver; `False` if its queue is full."""
        try:
            self._put.send_nowait((data, source))
        except trio.WouldBlock:
            return False
        return True
