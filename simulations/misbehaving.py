"""Nodes of a `World` that do not keep to the protocol, or keep to it and lie: give them as `kinds`.

Each runs the real service and changes one thing about it, so that it takes part, is believed at first, and has to be found
out by the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec
from blake3 import blake3

from simulations.pipes import Uplink
from simulations.world import Link, Node, SimulatedMembership, World
from swarm import pieces, wire
from swarm.edges import Served
from swarm.identity import Identity

DRIP_RATE = 20_000.0
"""Bytes a second of a `Dripper`: never silent for long, and far below what a transfer has to reach."""


class Flipper(Node):
    """Sends bytes that do not match the proof it sends with them."""

    def sends(self, served: Served) -> tuple[bytes, memoryview]:
        _, data = super().sends(served)
        return blake3(b"flipped").digest(), data


class LyingMembership(SimulatedMembership):
    """Signs for other bytes than it read."""

    def sign(self, kind: str, body: msgspec.Struct) -> wire.Signed:
        if isinstance(body, wire.ProofBody):
            body = msgspec.structs.replace(body, blake3=blake3(b"a lie" + body.blake3).digest())
        return super().sign(kind, body)


class Liar(Node):
    """Sends wrong bytes that match the proof it signed itself: found at the content digest only."""

    def __init__(self, world: World, number: int, seed: bytes, rate: float) -> None:
        super().__init__(world, number, seed, rate)
        self.membership = LyingMembership(Identity(seed))


class Silent(Node):
    """Promises everything, takes every request and never sends a byte."""

    def says(self, message: wire.TaskMessage) -> Sequence[wire.TaskMessage]:
        return (_with_everything(message),)

    def asked(self, asker: Link, request: wire.Request) -> None:
        return None


class Dripper(Node):
    """Takes what it can get, and passes it on byte by byte."""

    def __init__(self, world: World, number: int, seed: bytes, rate: float) -> None:
        super().__init__(world, number, seed, rate)
        self.uplink = Uplink(world.events, DRIP_RATE)


class Boaster(Silent):
    """Says that it has everything, and then that it has not."""

    def asked(self, asker: Link, request: wire.Request) -> None:
        asker.failed(request.id, wire.NOT_HELD)


class Refuser(Silent):
    """Says that it has everything, and gives nothing."""

    def asked(self, asker: Link, request: wire.Request) -> None:
        asker.failed(request.id, wire.REFUSED)


class Oscillator(Node):
    """Has and has not."""

    def says(self, message: wire.TaskMessage) -> Sequence[wire.TaskMessage]:
        if isinstance(message, wire.Have):
            every = list(range(self.world.content.geometry.piece_count))
            oscillation: list[wire.TaskMessage] = [wire.Have(message.task, every), wire.Lost(message.task, every)]
            return [message, *oscillation * 20]
        return (message,)


class WrongBitmap(Node):
    """Its bitmap is a byte too long."""

    def says(self, message: wire.TaskMessage) -> Sequence[wire.TaskMessage]:
        if isinstance(message, wire.Join) and not message.complete:
            message = msgspec.structs.replace(message, held=message.held + b"\0")
        return (message,)


class Claimer(Node):
    """Claims every piece, again and again, and delivers none."""

    _seq = 0

    def says(self, message: wire.TaskMessage) -> Sequence[wire.TaskMessage]:
        if isinstance(message, wire.Have):
            return ()
        if isinstance(message, wire.Join):
            message = msgspec.structs.replace(message, held=bytes(len(message.held)), complete=False, seal=None)
        geometry = self.world.content.geometry
        self._seq += 1
        order = Random(self._seq).sample(range(geometry.piece_count), min(32, geometry.piece_count))
        claims = [
            self.membership.sign(
                "claim",
                wire.ClaimBody(message.task, geometry.length, geometry.piece_length, piece, 120.0, (1 << 60) + self._seq),
            )
            for piece in order
        ]
        return message, wire.Claims(message.task, claims)

    def asked(self, asker: Link, request: wire.Request) -> None:
        asker.failed(request.id, wire.NOT_HELD)


def _with_everything(message: wire.TaskMessage) -> wire.TaskMessage:
    if isinstance(message, wire.Join) and not message.complete:
        count = -(-message.length // message.piece_length)
        return msgspec.structs.replace(message, held=pieces.to_wire(pieces.full(count)))
    return message
