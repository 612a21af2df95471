"""Hubs over real sockets on loopback: TLS, WebSocket, pieces, and what outsiders and bad members try.

Where time matters the clock stands still and is moved by hand, so that nothing waits and nothing races.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from swarm import wire
from swarm.edges import Address
from swarm.errors import ConfigError, PeerError
from swarm.identity import Identity
from swarm.network import open_network
from swarm.peer import sockets, websocket
from swarm.peer.connection import DEAD_SECONDS, SETUP_SECONDS
from swarm.peer.link import Link
from swarm.peer.pieces_channel import MAGIC, Pipe, frame, open_mac
from swarm.peer.settings import PeerSettings
from tests.integration.peers import TASK, Node, make_node, ordered_identities, running, until
from tests.peer.sending import send

CONTENT = random.Random(5).randbytes(3 << 20)


def run(main: Callable[[], Awaitable[None]], seconds: float = 20) -> None:
    """In real time."""

    async def bounded() -> None:
        with trio.fail_after(seconds):
            await main()

    trio.run(bounded)


def run_by_hand(main: Callable[[trio.testing.MockClock], Awaitable[None]]) -> None:
    """Time moves only when the test says so."""
    clock = trio.testing.MockClock(rate=0)

    async def bounded() -> None:
        await main(clock)

    trio.run(bounded, clock=clock)


async def spin(condition: Callable[[], object]) -> None:
    """Wait for real input while the clock stands still."""
    stop = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < stop, "it never happened"
        await trio.lowlevel.checkpoint()


async def pass_time(clock: trio.testing.MockClock, seconds: float) -> None:
    """Move the clock in steps, letting everybody act in between."""
    for _ in range(int(seconds)):
        clock.jump(1.0)
        for _ in range(50):
            await trio.lowlevel.checkpoint()


# --- links ----------------------------------------------------------------------------------------------------------


def test_two_nodes_connect_and_exchange_messages_and_pieces():
    async def main() -> None:
        one, two = make_node(CONTENT), make_node()
        async with running(one, two):
            link = await two.connect(one)
            assert link.node_id == one.id
            assert link.public_key == one.network.public_key
            assert link.address == one.address
            assert two.hub.link(one.id) is link
            await until(lambda: one.service.ups)
            back = one.service.ups[0]
            assert back.node_id == two.id
            assert back.address == two.address
            back.post(wire.Have(TASK, [1]), urgent=False)
            link.post(wire.Ask(TASK))
            await until(lambda: one.service.messages and two.service.messages)
            assert one.service.messages == [(two.id, wire.Ask(TASK))]
            assert two.service.messages == [(one.id, wire.Have(TASK, [1]))]
            for number, length in enumerate((1, 100_000, len(CONTENT))):
                link.request(number, TASK, 0, 0, length)
            link.request(9, bytes(32), 0, 0, 10)
            await until(lambda: len(two.service.pieces) == 3 and two.service.failures)
            assert two.service.pieces == {0: CONTENT[:1], 1: CONTENT[:100_000], 2: CONTENT}
            assert two.service.failures == [(9, wire.NOT_HELD)]
            assert not any(one.service.served_encrypted)
            statistics = two.hub.statistics()
            assert statistics.received == one.hub.statistics().sent == 1 + 100_000 + len(CONTENT)
            assert statistics.links == 1
            assert statistics.dials == 1

    run(main)


def test_connecting_again_gives_the_same_link():
    async def main() -> None:
        one, two = make_node(), make_node()
        async with running(one, two):
            link = await two.connect(one)
            assert await two.connect(one) is link
            await until(lambda: one.service.ups)
            assert await one.hub.connect(two.id, []) is one.service.ups[0]
            assert one.hub.statistics().accepted == 1

    run(main)


def test_many_who_ask_for_one_node_share_one_dial():
    async def main() -> None:
        one, two = make_node(), make_node()
        async with running(one, two):
            links: set[Link] = set()

            async def connect() -> None:
                links.add(await two.connect(one))

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(connect)
            assert len(links) == 1
            assert one.hub.statistics().accepted == 1

    run(main)


def test_one_who_stops_waiting_does_not_take_the_link_from_the_others():
    async def main() -> None:
        one, two = make_node(), make_node()
        async with running(one, two):
            async with trio.open_nursery() as nursery:
                impatient = trio.CancelScope()

                async def connect_impatiently() -> None:
                    with impatient:
                        await two.connect(one)

                nursery.start_soon(connect_impatiently)
                await trio.testing.wait_all_tasks_blocked()
                impatient.cancel()
                link = await two.connect(one)
            assert link.up

    run(main)


@pytest.mark.parametrize("attempt", range(6))
def test_when_both_dial_at_once_one_link_comes_up_once_on_each_side(attempt):
    async def main() -> None:
        first, second = ordered_identities(2)
        one, two = make_node(CONTENT, identity=first), make_node(identity=second)
        async with running(one, two):
            links: dict[str, Link] = {}

            async def connect(name: str, node: Node, other: Node, pause: float) -> None:
                await trio.sleep(pause)
                links[name] = await node.connect(other)

            pauses = random.Random(attempt)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect, "one", one, two, pauses.uniform(0, 0.004))
                nursery.start_soon(connect, "two", two, one, pauses.uniform(0, 0.004))
            await until(lambda: one.service.ups and two.service.ups)
            links["two"].request(1, TASK, 0, 0, 1000)
            await until(lambda: two.service.pieces)
            assert links["one"].dialled != links["two"].dialled, "two connections are in use"
            assert len(one.service.log) == len(two.service.log) == 1
            assert len(one.hub.links()) == len(two.hub.links()) == 1

    run(main)


def test_a_full_mesh_that_dials_all_at_once_has_one_link_for_each_pair():
    async def main() -> None:
        nodes = [make_node() for _ in range(6)]
        async with running(*nodes):
            async with trio.open_nursery() as nursery:
                for node in nodes:
                    for other in nodes:
                        if node is not other:
                            nursery.start_soon(node.connect, other)
            await until(lambda: all(len(node.hub.links()) == 5 for node in nodes))
            for node in nodes:
                assert sorted(peer for _, peer in node.service.log) == sorted(n.id for n in nodes if n is not node)
                assert node.hub.statistics().violations == 0

    run(main)


@pytest.mark.parametrize("decides", ["we", "the restarted peer"])
def test_a_peer_that_restarted_replaces_its_old_link(decides):
    async def main() -> None:
        mine, its = ordered_identities(2) if decides == "we" else reversed(ordered_identities(2))
        one, old, new = make_node(identity=mine), make_node(identity=its), make_node(identity=its)
        async with running(one, old):
            await old.connect(one)
            await until(lambda: one.service.ups)
            async with running(new):
                await new.connect(one)
                await until(lambda: len(one.service.ups) == 2)
                assert [kind for kind, _ in one.service.log] == ["up", "down", "up"]
                assert "replaced" in one.service.downs[0][1]
                assert one.hub.link(old.id) is one.service.ups[1]
                await until(lambda: old.service.downs)

    run(main)


def test_a_dropped_link_goes_down_on_both_sides_and_can_be_made_again():
    async def main() -> None:
        one, two = make_node(), make_node()
        async with running(one, two):
            link = await two.connect(one)
            await until(lambda: one.service.ups)
            link.drop("enough")
            assert two.hub.link(one.id) is None
            await until(lambda: one.service.downs and two.service.downs)
            assert two.service.downs == [(link, "enough")]
            assert "enough" in one.service.downs[0][1]
            link.post(wire.Ask(TASK))
            link.request(1, TASK, 0, 0, 1)
            again = await two.connect(one)
            assert again is not link
            assert one.service.messages == []

    run(main)


def test_a_hub_that_closes_says_so_and_refuses_new_links():
    async def main() -> None:
        one, two, three = make_node(), make_node(), make_node()
        async with running(one, two, three):
            await two.connect(one)
            await until(lambda: one.service.ups)
            await one.hub.aclose(grace=1)
            await until(lambda: two.service.downs)
            assert "going away" in two.service.downs[0][1]
            with pytest.raises(PeerError):
                await three.connect(one)
            with pytest.raises(PeerError, match="shutting down"):
                await one.connect(three)

    run(main)


def test_closing_lets_an_upload_under_way_end():
    async def main() -> None:
        one, two = make_node(CONTENT, settings=PeerSettings(upload_rate=8 << 20)), make_node()
        async with running(one, two):
            link = await two.connect(one)
            link.request(1, TASK, 0, 0, len(CONTENT))
            await until(lambda: two.service.started)
            await one.hub.aclose(grace=5)
            await until(lambda: two.service.pieces or two.service.downs)
            assert two.service.pieces == {1: CONTENT}

    run(main)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ipv4_and_ipv6(host):
    async def main() -> None:
        one, two = make_node(CONTENT), make_node()
        async with running(one, two, listen=host):
            link = await two.hub.connect(one.id, [Address(host, one.hub.ports.control)])
            link.request(1, TASK, 0, 0, 1000)
            await until(lambda: two.service.pieces)
            await until(lambda: one.service.ups)
            assert one.service.ups[0].address == Address(host, two.hub.ports.control)

    run(main)


def test_a_host_that_sends_from_another_address_than_it_listens_on_serves_pieces():
    async def main() -> None:
        one, two = make_node(CONTENT), make_node()
        async with running(one, listen="127.0.0.2"), running(two, listen="127.0.0.3"):
            await one.hub.connect(two.id, [Address("127.0.0.3", two.hub.ports.control)])
            await until(lambda: two.service.ups)
            link = two.service.ups[0]
            assert link.address.host == "127.0.0.1", "the kernel's choice of a source, where nobody listens"
            link.request(1, TASK, 0, 0, 1000)
            await until(lambda: two.service.pieces)

    run(main)


def test_addresses_a_peer_tells_that_are_none_are_not_dialled():
    async def main() -> None:
        told = (Address("169.254.169.254", 80), Address("224.0.0.1", 5000), Address("127.0.0.1", 1))
        one, two = make_node(CONTENT, settings=PeerSettings(advertise=told)), make_node()
        async with running(one, two):
            link = await two.connect(one)
            assert [address.host for address in two.hub._pieces_addresses(link)] == ["127.0.0.1"]
            link.request(1, TASK, 0, 0, 1000)
            await until(lambda: two.service.pieces)

    run(main)


def test_one_dual_stack_listener_serves_both_and_addresses_are_canonical():
    async def main() -> None:
        one = make_node(CONTENT)
        four, six = make_node(), make_node()
        async with running(one, listen="::"), running(four), running(six, listen="::1"):
            for node, host in ((four, "127.0.0.1"), (six, "::1")):
                link = await node.hub.connect(one.id, [Address(host, one.hub.ports.control)])
                link.request(1, TASK, 0, 0, 1000)
                await until(partial(getattr, node.service, "pieces"))
            await until(lambda: len(one.service.ups) == 2)
            assert {link.address.host for link in one.service.ups} == {"127.0.0.1", "::1"}

    run(main)


def test_a_dead_address_does_not_hold_up_a_live_one():
    async def main() -> None:
        silent = socket.create_server(("127.0.0.1", 0))  # accepts, and never says a word
        one, two = make_node(), make_node()
        async with running(one, two):
            began = trio.current_time()
            dead = Address("127.0.0.1", silent.getsockname()[1])
            refused = Address("127.0.0.1", one.hub.ports.control + 7)
            link = await two.hub.connect(one.id, [refused, dead, one.address])
            assert link.node_id == one.id
            assert trio.current_time() - began < 3
        silent.close()

    run(main)


# --- TLS and private pieces -----------------------------------------------------------------------------------------


def test_private_pieces_travel_over_tls_beside_a_clear_channel():
    async def main() -> None:
        one, two = make_node(CONTENT), make_node()
        async with running(one, two):
            link = await two.connect(one)
            assert not link.encrypted_pieces
            link.request(1, TASK, 0, 0, len(CONTENT), private=True)
            link.request(2, TASK, 0, 0, 1000)
            await until(lambda: len(two.service.pieces) == 2)
            assert two.service.pieces == {1: CONTENT, 2: CONTENT[:1000]}
            assert sorted(one.service.served_encrypted) == [False, True]

    run(main)


@pytest.mark.parametrize("who", ["server", "client"])
def test_if_either_side_wants_it_all_pieces_are_encrypted(who):
    async def main() -> None:
        one = make_node(CONTENT, settings=PeerSettings(encrypt=who == "server"))
        two = make_node(settings=PeerSettings(encrypt=who == "client"))
        async with running(one, two):
            link = await two.connect(one)
            assert link.encrypted_pieces
            link.request(1, TASK, 0, 0, len(CONTENT))
            await until(lambda: two.service.pieces)
            assert two.service.pieces == {1: CONTENT}
            assert one.service.served_encrypted == [True]

    run(main)


def opening(link: Link, by: Node, nonce: bytes, **changes: bytes) -> wire.ChannelOpen:
    assert link.hello is not None
    return wire.ChannelOpen(
        changes.get("node", by.id), changes.get("boot", by.hub.boot), open_mac(changes.get("ticket", link.hello.ticket), nonce)
    )


async def open_channel(one: Node, link: Link, by: Node, **changes: bytes) -> bool:
    """Whether a hand-made clear channel to `one` is served."""
    sock = await sockets.dial(Address("127.0.0.1", one.hub.ports.pieces))
    pipe = Pipe(sock)
    try:
        await pipe.send_all(MAGIC)
        nonce = await pipe.receive_exactly(32)
        await pipe.send_all(frame(opening(link, by, nonce, **changes)))
        await pipe.send_all(frame(wire.Request(1, TASK, 0, 0, 10)))
        return await pipe.receive(memoryview(bytearray(1))) > 0
    except PeerError:
        return False
    finally:
        pipe.close()


def test_a_pieces_channel_needs_the_ticket_the_boot_and_a_known_node():
    async def main() -> None:
        one, two, three = make_node(CONTENT), make_node(), make_node()
        async with running(one, two, three):
            link = await two.connect(one)
            other = await three.connect(one)
            assert await open_channel(one, link, two)
            assert not await open_channel(one, link, two, ticket=b"\0" * 32)
            assert not await open_channel(one, link, two, boot=bytes(16))
            assert other.hello is not None
            assert not await open_channel(one, link, two, ticket=other.hello.ticket), "another member's ticket"
            assert not await open_channel(one, link, two, node=three.id), "in another member's name"

    run(main)


def test_a_recorded_opening_cannot_be_played_again():
    async def main() -> None:
        one, two = make_node(CONTENT), make_node()
        async with running(one, two):
            link = await two.connect(one)
            recorded = frame(opening(link, two, bytes(32)))
            pipe = Pipe(await sockets.dial(Address("127.0.0.1", one.hub.ports.pieces)))
            await pipe.send_all(MAGIC)
            await pipe.receive_exactly(32)
            await pipe.send_all(recorded)
            with contextlib.suppress(PeerError):
                assert await pipe.receive(memoryview(bytearray(1))) == 0
            pipe.close()

    run(main)


def test_a_clear_channel_is_refused_where_tls_is_required():
    async def main() -> None:
        one, two = make_node(CONTENT, settings=PeerSettings(encrypt=True)), make_node()
        async with running(one, two):
            link = await two.connect(one)
            assert not await open_channel(one, link, two)
            assert one.service.served_encrypted == []

    run(main)


def test_a_members_certificate_opens_no_channel_in_another_members_name():
    async def main() -> None:
        one, two, thief = make_node(CONTENT), make_node(), make_node()
        async with running(one, two, thief):
            link = await two.connect(one)
            sock = await sockets.dial(Address("127.0.0.1", one.hub.ports.pieces))
            pipe = Pipe(await sockets.start_tls(sock, thief.network.client_context(), server_side=False))
            await pipe.send_all(MAGIC)
            nonce = await pipe.receive_exactly(32)
            await pipe.send_all(frame(opening(link, two, nonce)))  # the ticket was stolen too
            with contextlib.suppress(PeerError):
                assert await pipe.receive(memoryview(bytearray(1))) == 0
            pipe.close()

    run(main)


def test_a_private_request_is_not_sent_to_another_member_on_the_peers_port(monkeypatch):
    async def main() -> None:
        one, two, thief = make_node(CONTENT), make_node(), make_node(CONTENT)
        async with running(one, two, thief):
            openings: list[wire.ChannelOpen] = []

            async def admit(opening_untrusted: wire.ChannelOpen, nonce: bytes, *, tls: bytes | None) -> bytes:
                openings.append(opening_untrusted)
                raise PeerError("caught")

            monkeypatch.setattr(thief.hub, "admit", admit)
            one.hub._ports = one.hub.ports._replace(pieces=thief.hub.ports.pieces)
            link = await two.connect(one)
            link.request(1, TASK, 0, 0, 1000, private=True)
            await until(lambda: two.service.failures)
            assert openings == []

    run(main)


# --- who is let in --------------------------------------------------------------------------------------------------


def test_an_address_where_another_node_answers_is_an_error_and_not_asked_again_for_that_node():
    async def main() -> None:
        one, two, three = make_node(), make_node(), make_node()
        async with running(one, two, three):
            with pytest.raises(PeerError, match="another node"):
                await three.hub.connect(two.id, [one.address])
            accepted = one.hub.statistics().accepted
            with pytest.raises(PeerError, match="failed lately"):
                await three.hub.connect(two.id, [one.address])
            assert one.hub.statistics().accepted == accepted
            # The node that really lives there is not punished for the lie.
            assert (await three.connect(one)).up

    run(main)


def test_a_member_of_another_network_is_refused_on_both_sides():
    async def main() -> None:
        ours, stranger = make_node(), make_node(network=open_network("elsewhere", Identity.generate()))
        async with running(ours, stranger):
            for node, other in ((ours, stranger), (stranger, ours)):
                with pytest.raises(PeerError):
                    await node.connect(other)
            await until(lambda: ours.hub.statistics().handshakes == 0)
            assert ours.service.log == stranger.service.log == []

    run(main)


def test_our_own_key_on_another_address_is_refused():
    async def main() -> None:
        identity = Identity.generate()
        one, mirror, other = make_node(identity=identity), make_node(identity=identity), make_node()
        async with running(one, mirror, other):
            with pytest.raises(PeerError, match="this node itself"):
                await one.hub.connect(one.id, [mirror.address])
            with pytest.raises(PeerError, match="this node itself"):
                await one.hub.connect(other.id, [mirror.address])

    run(main)


def test_a_revoked_peer_is_dropped_when_the_membership_changes(monkeypatch):
    async def main() -> None:
        one, two = make_node(), make_node()
        async with running(one, two):
            await two.connect(one)
            await until(lambda: one.service.ups)
            monkeypatch.setattr(one.network, "certificate_of", lambda key: None)
            for callback in one.network._callbacks:
                callback()
            await until(lambda: two.service.downs)
            assert "no longer a member" in one.service.downs[0][1]

    run(main)


def test_a_peer_revoked_while_it_replaces_its_link_gets_no_new_one(monkeypatch):
    """Its second connection has shown its certificate, and would say hello next."""

    async def main() -> None:
        one, bad = make_node(), make_node()
        async with running(one, bad):
            await bad.connect(one)
            await until(lambda: one.service.ups)
            _, control, _ = await raw_link(bad, one)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(control.read)
                await control.connect()
                assert len(one.hub._all) == 2
                monkeypatch.setattr(one.network, "certificate_of", lambda key: None)
                for callback in one.network._callbacks:
                    callback()
                await until(lambda: bad.service.downs and control.close_code)
            await control.aclose()
            assert control.close_code == websocket.REFUSED
            assert len(one.service.ups) == len(one.service.downs) == 1

    run(main, seconds=5)  # well before the ten seconds after which it would be closed for its silence


def test_a_banned_peer_is_dropped_and_gets_no_new_link():
    async def main() -> None:
        one, two = make_node(), make_node()
        async with running(one, two):
            await two.connect(one)
            await until(lambda: one.service.ups)
            one.hub.ban(two.id, 600, "sent wrong bytes")
            await until(lambda: two.service.downs)
            with pytest.raises(PeerError):
                await two.connect(one)
            with pytest.raises(PeerError, match="misbehaved"):
                await one.connect(two)

    run(main)


def test_more_members_than_a_node_takes_are_told_so():
    async def main() -> None:
        one = make_node(settings=PeerSettings(max_links=2))
        others = [make_node() for _ in range(4)]
        async with running(one, *others):
            results = []
            for other in others:
                try:
                    await other.connect(one)
                    results.append(True)
                except PeerError:
                    results.append(False)
            await until(lambda: one.hub.statistics().handshakes == 0)
            assert results == [True, True, False, False]
            assert len(one.hub.links()) == 2

    run(main)


@pytest.mark.parametrize(
    "host",
    ["224.0.0.1", "0.0.0.0", "::", "169.254.169.254", "fe80::1", "::ffff:127.0.0.1", "255.255.255.255"],  # noqa: S104
)
def test_a_record_cannot_make_us_dial_what_no_peer_can_be(host):
    async def main() -> None:
        one = make_node()
        async with running(one):
            with pytest.raises(PeerError, match="may be dialled"):
                await one.hub.connect(bytes(20), [Address(host, 7400)])
            assert one.hub.statistics().dials == 0

    run(main)


def test_nor_a_service_on_a_low_port():
    assert not sockets.may_be_dialled(Address("10.0.0.1", 22))
    assert not sockets.may_be_dialled(Address("10.0.0.1", 70_000))
    assert not sockets.may_be_dialled(Address("example.org", 7400))
    assert sockets.may_be_dialled(Address("10.0.0.1", 7400))
    assert sockets.may_be_dialled(Address("2001:db8::1", 7400))


def test_a_victims_address_in_a_record_is_dialled_at_most_once():
    async def main() -> None:
        victim = socket.create_server(("127.0.0.1", 0))
        victim.setblocking(False)
        dials = 0

        async def count() -> None:
            nonlocal dials
            while True:
                await trio.lowlevel.wait_readable(victim)
                sock, _ = victim.accept()
                sock.close()
                dials += 1

        one = make_node()
        async with running(one), trio.open_nursery() as nursery:
            nursery.start_soon(count)
            for number in range(20):  # twenty made-up nodes, all said to live there
                with pytest.raises(PeerError):
                    await one.hub.connect(number.to_bytes(20, "big"), [Address(*victim.getsockname())])
            assert dials == 1
            nursery.cancel_scope.cancel()
        victim.close()

    run(main)


# --- members that break the protocol --------------------------------------------------------------------------------


async def raw_link(node: Node, other: Node) -> tuple[ssl.SSLSocket, websocket.ControlSocket, list[bytes]]:
    """A member's connection without a hub behind it: TLS done, nothing said."""
    sock = await sockets.dial(other.address)
    secure = await sockets.start_tls(sock, node.network.client_context(), server_side=False)
    received: list[bytes] = []
    return secure, websocket.ControlSocket(sockets.SocketStream(secure), received.append, client=True), received


@pytest.mark.parametrize(
    "attack",
    [
        [wire.encode_frame([wire.Leave(TASK)])],
        [b"\xff"],
        [b"\x81" * 60_000],
        [b"\x9b" + b"\xff" * 8],
        [wire.encode([{"t": "hello", "version": 7}])],
    ],
)
def test_a_member_that_sends_nonsense_is_closed_with_a_code_and_not_let_in_again_at_once(attack):
    async def main() -> None:
        one, bad, good = make_node(), make_node(), make_node()
        async with running(one, bad, good):
            link = await good.connect(one)
            _, control, _ = await raw_link(bad, one)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(control.read)
                await control.connect()
                for message in attack:
                    await send(control, message)
                await until(lambda: control.close_code)
            await control.aclose()
            assert control.close_code == websocket.VIOLATION
            assert one.hub.statistics().violations == 1
            with pytest.raises(PeerError):
                await bad.connect(one)
            assert link.up

    run(main)


def raw_frames(count: int, first: int, payload: bytes) -> bytes:
    return (bytes((first, 0x80 | len(payload))) + bytes(4) + payload) * count


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (raw_frames(1, 0x02, b"x") + raw_frames(1000, 0x00, b"x"), websocket.NOT_BINARY),
        (raw_frames(1, 0x02, b"") + raw_frames(1000, 0x00, b""), websocket.NOT_BINARY),
        (raw_frames(1, 0x81, b"text"), websocket.NOT_BINARY),
        (bytes((0x82, 0xFF)) + (1 << 40).to_bytes(8, "big"), websocket.TOO_BIG),
        (raw_frames(10_000, 0x89, b"ping"), websocket.VIOLATION),
    ],
    ids=["fragments", "empty fragments", "text", "2^40 bytes", "pings"],
)
def test_websocket_attacks_end_with_a_code_and_touch_nobody_else(attack, code):
    async def main() -> None:
        one, bad, good = make_node(CONTENT), make_node(), make_node()
        async with running(one, bad, good):
            link = await good.connect(one)
            secure, control, _ = await raw_link(bad, one)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(control.read)
                await control.connect()
                with contextlib.suppress(trio.BrokenResourceError):
                    await sockets.SocketStream(secure).send_all(attack)
                await until(lambda: control.close_code)
            assert control.close_code in (code, 1006)  # 1006: the code was lost with what we had still to send
            await control.aclose()
            link.request(1, TASK, 0, 0, 1000)
            await until(lambda: good.service.pieces)

    run(main)


def test_a_member_that_opens_ten_thousand_connections_keeps_one():
    async def main() -> None:
        one, bad = make_node(), make_node()
        async with running(one, bad):
            controls = []
            async with trio.open_nursery() as nursery:
                for _ in range(100):  # the same code path a hundred times over
                    _, control, _ = await raw_link(bad, one)
                    nursery.start_soon(control.read)
                    controls.append(control)
                await until(lambda: sum(control.close_code == 0 for control in controls) <= 1)
                assert len(one.hub._all) <= 1
                for control in controls:
                    await control.aclose()
                nursery.cancel_scope.cancel()

    run(main, seconds=8)  # well before the ten seconds after which each would be closed for its silence


def test_what_follows_in_the_frame_of_a_message_that_ended_the_link_is_not_delivered():
    async def main() -> None:
        one, two = make_node(), make_node()
        async with running(one, two):
            link = await two.connect(one)
            await until(lambda: one.service.ups)
            one.service.on_message = lambda link, message: link.drop("enough")
            link.post(wire.Ask(TASK))
            link.post(wire.Leave(TASK))
            await until(lambda: one.service.downs)
            assert one.service.messages == [(two.id, wire.Ask(TASK))]

    run(main)


def test_bytes_the_service_refuses_cost_the_peer_its_link():
    async def main() -> None:
        one, two = make_node(CONTENT), make_node()
        async with running(one, two):
            two.service.accept = False
            link = await two.connect(one)
            link.request(1, TASK, 0, 0, 1000)
            await until(lambda: two.service.downs)
            assert two.service.pieces == {}
            assert two.hub.statistics().violations == 1

    run(main)


def test_a_service_that_chokes_on_a_message_loses_that_link_only():
    async def main() -> None:
        one, two, three = make_node(), make_node(), make_node()

        def choke(link: object, message: object) -> None:
            if isinstance(message, wire.Leave):
                raise ZeroDivisionError

        one.service.on_message = choke
        async with running(one, two, three):
            bad, good = await two.connect(one), await three.connect(one)
            bad.post(wire.Leave(TASK))
            await until(lambda: two.service.downs)
            good.post(wire.Ask(TASK))
            await until(lambda: (three.id, wire.Ask(TASK)) in one.service.messages)

    run(main)


# --- time, by hand --------------------------------------------------------------------------------------------------


def test_five_hundred_half_open_connections_are_closed_within_ten_seconds_and_keep_nobody_out():
    async def main(clock: trio.testing.MockClock) -> None:
        one, two = make_node(CONTENT), make_node()
        async with running(one, two):
            half_open = []
            for number in range(500):
                port = one.hub.ports.pieces if number % 2 else one.hub.ports.control
                sock = socket.create_connection(("127.0.0.1", port))
                sock.setblocking(False)
                half_open.append(sock)
                if number % 50 == 0:
                    await trio.lowlevel.checkpoint()
            await spin(lambda: one.hub.statistics().accepted == 500)
            assert one.hub.statistics().handshakes <= 64
            link = await two.connect(one)  # from the very same address
            link.request(1, TASK, 0, 0, 1000)
            await spin(lambda: two.service.pieces)
            await pass_time(clock, SETUP_SECONDS + 1)
            await spin(lambda: one.hub.statistics().handshakes == 0)
            for sock in half_open:
                sock.setblocking(True)
                sock.settimeout(5)
                with contextlib.suppress(ConnectionResetError):
                    assert sock.recv(1) == b""
                sock.close()
            assert link.up

    run_by_hand(main)


@pytest.mark.parametrize("decides", ["we", "the silent member"])
def test_a_member_that_never_says_hello_is_closed_after_ten_seconds(decides):
    async def main(clock: trio.testing.MockClock) -> None:
        mine, its = ordered_identities(2) if decides == "we" else reversed(ordered_identities(2))
        one, silent = make_node(identity=mine), make_node(identity=its)
        async with running(one):
            _, control, _ = await raw_link(silent, one)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(control.read)
                await control.connect()
                await pass_time(clock, SETUP_SECONDS + 1)
                await spin(lambda: control.close_code)
                assert control.close_code == websocket.REFUSED
                await control.aclose()
        os.close(silent.service.fd)

    run_by_hand(main)


def test_a_peer_whose_host_vanished_is_noticed_within_thirty_seconds():
    async def main(clock: trio.testing.MockClock) -> None:
        one, two = make_node(), make_node()
        async with running(one, two):
            link = await two.connect(one)
            await spin(lambda: one.service.ups)
            # Nothing is read or sent any more on the other side, and no FIN comes: as if its cable were cut.
            other = one.service.ups[0]
            assert isinstance(other, Link)
            freeze(one, other)
            began = trio.current_time()
            while not two.service.downs:
                await pass_time(clock, 1)
                assert trio.current_time() - began <= DEAD_SECONDS + 1
            assert "nothing heard" in two.service.downs[0][1]
            assert not link.up

    run_by_hand(main)


def freeze(node: Node, link: Link) -> None:
    """Stop a link's node from hearing and answering, without closing anything."""
    link._connection.receive_frame = lambda frame_untrusted, now: []  # type: ignore[method-assign]
    link.tick = lambda now: float("inf")  # type: ignore[method-assign]


def test_what_a_peer_that_does_not_read_leaves_in_our_socket_arrives_whole_and_in_order_when_it_does():
    async def main() -> None:
        one, two = make_node(), make_node()
        async with running(one, two):
            link = await two.connect(one)
            await until(lambda: one.service.ups)
            (theirs,) = one.service.ups
            assert isinstance(theirs, Link)
            stream, reads = theirs._socket._stream, trio.Event()
            receive = stream.receive_some

            async def receive_later(max_bytes: int | None = None) -> bytes:
                await reads.wait()
                return bytes(await receive(max_bytes))

            stream.receive_some = receive_later  # type: ignore[method-assign]
            posted: list[wire.TaskMessage] = []
            while not link._blocked.is_set() or len(posted) % 8:  # and some more behind what is stuck
                posted.append(wire.Peers(TASK, [len(posted).to_bytes(4, "big") * 100] * 32))
                link.post(posted[-1])
                await trio.testing.wait_all_tasks_blocked()
            assert len(one.service.messages) < len(posted)
            reads.set()
            await until(lambda: len(one.service.messages) == len(posted))
            assert [message for _, message in one.service.messages] == posted
            assert link.up

    run(main)


def test_a_ping_is_answered_at_once():
    async def main(clock: trio.testing.MockClock) -> None:
        one, two = make_node(), make_node()
        async with running(one):
            _, control, received = await raw_link(two, one)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(control.read)
                await control.connect()
                await send(control, wire.encode_frame([two.hub.make_hello(bytes(32)), wire.Ping(7)]))
                await spin(lambda: any(wire.Pong(7) in wire.decode_frame(frame) for frame in received))
                await control.aclose()
                nursery.cancel_scope.cancel()
        os.close(two.service.fd)

    run_by_hand(main)


def test_an_idle_link_stays_up_for_hours():
    async def main(clock: trio.testing.MockClock) -> None:
        one, two = make_node(), make_node()
        async with running(one, two):
            link = await two.connect(one)
            await spin(lambda: one.service.ups)
            await pass_time(clock, 200)
            assert link.up
            assert two.service.downs == []
            sent = two.hub.statistics().frames_sent
            assert 10 <= sent <= 45, "a ping or its answer every ten seconds or so"

    run_by_hand(main)


def test_a_failed_address_is_dialled_again_after_thirty_seconds():
    async def main(clock: trio.testing.MockClock) -> None:
        one, two = make_node(), make_node()
        async with running(two):
            placeholder = socket.create_server(("127.0.0.1", 0))
            port = placeholder.getsockname()[1]
            placeholder.close()
            with pytest.raises(PeerError, match="ECONNREFUSED"):
                await two.hub.connect(one.id, [Address("127.0.0.1", port)])
            with pytest.raises(PeerError, match="failed lately"):
                await two.hub.connect(one.id, [Address("127.0.0.1", port)])
            assert two.hub.statistics().dials == 1
            clock.jump(31)
            with pytest.raises(PeerError, match="ECONNREFUSED"):
                await two.hub.connect(one.id, [Address("127.0.0.1", port)])
            clock.jump(31)
            with pytest.raises(PeerError, match="failed lately"):
                await two.hub.connect(one.id, [Address("127.0.0.1", port)])
        os.close(one.service.fd)

    run_by_hand(main)


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_a_clock_off_by_an_hour_warns_once_and_works(ahead, capsys):
    async def main() -> None:
        late = make_node(CONTENT, clock=lambda: 1e9)
        early = [make_node(clock=lambda: 1e9 + ahead) for _ in range(3)]
        async with running(late, *early):
            for node in early:
                link = await node.connect(late)
                assert round(link.clock_skew) == -ahead
                link.request(1, TASK, 0, 0, 1000)
                await until(partial(getattr, node.service, "pieces"))
            await until(lambda: len(late.service.ups) == 3)
            assert [round(link.clock_skew) for link in late.service.ups if isinstance(link, Link)] == [ahead] * 3

    run(main)
    output = capsys.readouterr()
    assert (output.out + output.err).count("clocks differ") == 4  # each node warned once


# --- descriptors and ports ------------------------------------------------------------------------------------------


def test_running_out_of_descriptors_pauses_accepting_and_recovers():
    async def main() -> None:
        one, two = make_node(), make_node()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with running(one, two):
            waiting = [socket.socket() for _ in range(40)]
            used = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 3, hard))
            try:
                for sock in waiting:
                    sock.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        sock.connect(("127.0.0.1", one.hub.ports.control))
                spent = time.process_time()
                await trio.sleep(1.0)
                assert time.process_time() - spent < 0.3, "accepting spins"
                assert one.hub.statistics().accepted < 40
                for sock in waiting:
                    sock.close()
                with trio.fail_after(5):
                    await until(lambda: one.hub.statistics().accepted >= 40)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert (await two.connect(one)).up

    run(main)


def test_a_port_in_use_is_named_and_nothing_stays_open():
    async def main() -> None:
        taken = socket.create_server(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        one = make_node()
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            await one.hub.run([Address("127.0.0.1", port)])
        # The pieces port is taken: the control port must be free again afterwards.
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            await one.hub.run([Address("127.0.0.1", port - 1)])
        socket.create_server(("127.0.0.1", port - 1)).close()
        taken.close()
        os.close(one.service.fd)

    run(main)


def test_pieces_are_one_port_above_control_when_a_port_is_given():
    for _ in range(20):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        try:
            control, pieces = sockets.listen([Address("127.0.0.1", port), Address("::1", port)])
        except ConfigError:
            continue  # somebody took the port above in the meantime
        assert [sock.getsockname()[1] for sock in control] == [port, port]
        assert [sock.getsockname()[1] for sock in pieces] == [port + 1, port + 1]
        for sock in control + pieces:
            sock.close()
        return
    pytest.fail("no two ports in a row were free")


def test_errors_of_dialling_are_peer_errors():
    async def main() -> None:
        one = make_node()
        async with running(one):
            with pytest.raises(PeerError):
                await one.hub.connect(bytes(20), [])
            with pytest.raises(PeerError, match=errno.errorcode[errno.ECONNREFUSED]):
                await one.hub.connect(bytes(20), [Address("127.0.0.1", 1025)])
        with pytest.raises(PeerError, match="shutting down"):
            await one.hub.connect(bytes(20), [Address("127.0.0.1", 1025)])

    run(main)
