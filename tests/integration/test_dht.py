"""The DHT over real UDP sockets on loopback."""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack

import pytest
import trio
import trio.testing

from simulations.membership import SimulatedMembership
from swarm.announce import Announcer
from swarm.dht.messages import MAX_DATAGRAM_BYTES
from swarm.dht.node import DhtNode
from swarm.dht.transport import UdpTransport
from swarm.edges import Address, State
from swarm.errors import ConfigError

TASK = bytes(32)


def test_datagrams_travel_both_ways_with_canonical_addresses() -> None:
    async def main() -> None:
        with trio.fail_after(5):
            with UdpTransport.open(Address("127.0.0.1", 0)) as one, UdpTransport.open(Address("::", 0)) as dual:
                there = Address("127.0.0.1", dual.local_address.port)
                await one.send(b"to dual stack", there)
                data, source = await dual.receive()
                assert (data, source) == (b"to dual stack", one.local_address)
                await dual.send(b"and back", source)
                assert await one.receive() == (b"and back", there)

    trio.run(main)


def test_ipv6_datagrams_travel() -> None:
    async def main() -> None:
        with trio.fail_after(5):
            with UdpTransport.open(Address("::1", 0)) as one, UdpTransport.open(Address("::", 0)) as dual:
                await one.send(b"six", Address("::1", dual.local_address.port))
                assert await dual.receive() == (b"six", one.local_address)

    trio.run(main)


@pytest.mark.parametrize("everywhere", ["::", "0.0.0.0"])  # noqa: S104  # as daemons bind
def test_an_answer_leaves_from_the_address_that_was_asked(everywhere: str) -> None:
    """Linux would answer from 127.0.0.1, its choice by route, and the asker would not know the answer."""

    async def main() -> None:
        with trio.fail_after(5):
            with UdpTransport.open(Address("127.0.0.1", 0)) as asker, UdpTransport.open(Address(everywhere, 0)) as asked:
                second = Address("127.0.0.2", asked.local_address.port)
                await asker.send(b"question", second)
                _, source = await asked.receive()
                await asked.send(b"answer", source)
                assert await asker.receive() == (b"answer", second)

    trio.run(main)


def test_routes_say_where_our_datagrams_leave_from() -> None:
    with UdpTransport.open(Address("::", 0)) as transport:
        assert transport.source_towards(Address("127.0.0.1", 7400)) == "127.0.0.1"
        assert transport.source_towards(Address("::1", 7400)) == "::1"
    with UdpTransport.open(Address("127.0.0.1", 0)) as transport:
        assert transport.source_towards(Address("::1", 7400)) is None


def test_a_port_in_use_is_refused_with_advice() -> None:
    with (
        UdpTransport.open(Address("127.0.0.1", 0)) as first,
        pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{first.local_address.port} .*--listen"),
    ):
        UdpTransport.open(first.local_address)


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        UdpTransport.open(Address("192.0.2.1", 0))


def test_a_host_without_ipv6_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def without_ipv6(family: int, *rest: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, os.strerror(97))
        return real(family, *rest)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    with UdpTransport.open(Address("::", 0)) as transport:
        assert transport.local_address.host == "0.0.0.0"  # noqa: S104  # asked, not bound
        assert transport._name(Address("::1", 7400)) is None


def test_sending_to_nobody_and_to_nowhere_is_silent() -> None:
    async def main() -> None:
        with trio.fail_after(5), UdpTransport.open(Address("127.0.0.1", 0)) as transport:
            closed = UdpTransport.open(Address("127.0.0.1", 0))
            gone = closed.local_address
            closed.close()
            for destination in (gone, Address("::1", 7400), Address("255.255.255.255", 7400), Address("192.0.2.1", 0)):
                await transport.send(b"x", destination)
                await transport.send(b"y", destination)
            await transport.send(b"to ourselves", transport.local_address)
            assert await transport.receive() == (b"to ourselves", transport.local_address)

    trio.run(main)


def test_a_datagram_that_is_too_long_is_still_seen_as_too_long() -> None:
    async def main() -> None:
        with trio.fail_after(5), UdpTransport.open(Address("127.0.0.1", 0)) as transport:
            await transport.send(bytes(9000), transport.local_address)
            data, _ = await transport.receive()
            assert len(data) == MAX_DATAGRAM_BYTES + 1

    trio.run(main)


def test_closing_wakes_whoever_receives() -> None:
    async def main() -> None:
        with trio.fail_after(5):
            transport = UdpTransport.open(Address("127.0.0.1", 0))

            async def receive() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await transport.receive()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await trio.testing.wait_all_tasks_blocked()
                transport.close()
            with pytest.raises(trio.ClosedResourceError):
                await transport.send(b"x", Address("127.0.0.1", 7400))

    trio.run(main)


def test_twenty_nodes_on_loopback_that_announce_at_once_soon_all_know_all_others() -> None:
    async def main() -> None:
        rng = random.Random(1)
        with trio.fail_after(20), ExitStack() as sockets:
            async with trio.open_nursery() as nursery:
                nodes: list[tuple[SimulatedMembership, Announcer]] = []
                join: list[str] = []
                for _ in range(20):
                    transport = sockets.enter_context(UdpTransport.open(Address("127.0.0.1", 0)))
                    membership = SimulatedMembership.draw(rng)
                    dht = DhtNode(transport, membership, rng=rng, join=join)
                    announcer = Announcer(dht, membership, control_port=transport.local_address.port, rng=rng)
                    await nursery.start(dht.run)
                    await nursery.start(announcer.run)
                    await dht.wait_joined()
                    nodes.append((membership, announcer))
                    join = join or [str(transport.local_address)]
                found: dict[bytes, set[bytes]] = {}

                async def announce(membership: SimulatedMembership, announcer: Announcer) -> None:
                    members = await announcer.announce(TASK, State.WANTS)
                    found[membership.node_id] = {member.node_id for member in members}

                async with trio.open_nursery() as announcing:
                    for membership, announcer in nodes:
                        announcing.start_soon(announce, membership, announcer)
                # That one announcement is enough is shown under the virtual clock; here a busy processor may cost an answer.
                everybody = {membership.node_id for membership, _ in nodes}
                for membership, announcer in nodes:
                    own = membership.node_id
                    while found[own] | {own} != everybody:
                        found[own] |= {member.node_id for member in await announcer.find(TASK)}
                nursery.cancel_scope.cancel()

    trio.run(main)
