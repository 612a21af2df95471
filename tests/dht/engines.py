"""Engines wired to one another without a loop: datagrams are handed over by the test, time is a number."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from simulations.membership import SimulatedMembership
from swarm.dht import messages
from swarm.dht.records import sign_provider
from swarm.dht.rpc import Engine
from swarm.edges import Address, State
from swarm.errors import RemoteProtocolError

WALL = 1_800_000_000


@dataclass(eq=False)
class Clock:
    now: float = 1000.0


def member(number: int, name: str = "simulation") -> SimulatedMembership:
    return SimulatedMembership.draw(random.Random(number), name)


def address(number: int, port: int = 7400) -> Address:
    """A public address, which a table gives one slot."""
    return Address(f"9.9.{number >> 8}.{number & 255}", port)


def engine(number: int, clock: Clock, *, ahead: float = 0.0, name: str = "simulation") -> Engine:
    rng = random.Random(number)
    return Engine(member(number, name), rng=rng, randbytes=rng.randbytes, wall=lambda: WALL + clock.now + ahead)


@dataclass(eq=False)
class Wire:
    """Engines by address.  `settle` delivers until nothing is on its way; `tap` sees, and may drop, every datagram."""

    clock: Clock = field(default_factory=Clock)
    engines: dict[Address, Engine] = field(default_factory=dict)
    tap: Callable[[bytes, Address, Address], bool] = lambda data, source, destination: True
    delivered: int = 0

    def add(self, number: int, where: Address | None = None, *, ahead: float = 0.0) -> Engine:
        made = engine(number, self.clock, ahead=ahead)
        self.engines[where or address(number)] = made
        return made

    def settle(self) -> None:
        busy = True
        while busy:
            busy = False
            for source, sender in list(self.engines.items()):
                while sender.outgoing:
                    data, destination = sender.outgoing.popleft()
                    busy = True
                    receiver = self.engines.get(destination)
                    if receiver is not None and self.tap(data, source, destination):
                        self.delivered += 1
                        receiver.receive(data, source, self.clock.now)

    def pass_time(self, seconds: float) -> None:
        """Advance in steps at which every engine is punctual."""
        end = self.clock.now + seconds
        while True:
            due = min((each.next_deadline() for each in self.engines.values()), default=end)
            self.clock.now = min(end, max(due, self.clock.now))
            for each in self.engines.values():
                each.on_time(self.clock.now)
            self.settle()
            if self.clock.now >= end:
                return

    def introduce(self, one: Address, other: Address) -> None:
        """Let `one` ask `other` for its proof."""
        self.engines[one].ask_for_proof(other, self.clock.now, lambda contact: None)
        self.settle()


def record(number: int, key: bytes, *, seq: int = 1, state: State = State.WANTS, issued: int | None = None) -> bytes:
    """A provider record of member `number`."""
    stamp = WALL + 1000 if issued is None else issued
    return sign_provider(member(number), key, [address(number).host], 7400, state, seq, stamp)


def kinds(sent: list[bytes]) -> list[str]:
    """The message types in captured datagrams."""
    names = []
    for datagram in sent:
        try:
            names.append(type(messages.read(datagram)).__name__)
        except RemoteProtocolError:
            names.append("malformed")
    return names
