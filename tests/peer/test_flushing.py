"""Frames of many links from one task: when each is sent, and that what a socket does not take is sent later, in order."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from swarm.errors import PeerError
from swarm.peer.flushing import LINKS_AT_ONCE, Flusher
from swarm.peer.sockets import SocketStream
from swarm.peer.websocket import ControlSocket
from tests.peer.sending import send

NEVER = float("inf")


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


class FakeLink:
    """Notes when it was flushed; `again` is what it answers, one after the other."""

    def __init__(self, *again: float) -> None:
        self.again = list(again)
        self.flushed: list[float] = []

    def flush(self, now: float) -> float:
        self.flushed.append(now)
        return self.again.pop(0) if self.again else NEVER


def test_a_link_that_has_something_is_flushed_once_however_often_it_says_so() -> None:
    async def main() -> None:
        flusher, link, silent = Flusher(), FakeLink(), FakeLink()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flusher.run)
            for _ in range(3):
                flusher.soon(link)
            assert link.flushed == [], "what is posted in one go belongs into one frame"
            await trio.sleep(10)
            assert link.flushed == [0.0]
            flusher.soon(link)
            await trio.sleep(10)
            assert link.flushed == [0.0, 10.0]
            assert silent.flushed == []
            nursery.cancel_scope.cancel()

    run(main)


def test_a_link_that_waits_for_company_is_flushed_when_its_time_has_come() -> None:
    async def main() -> None:
        flusher, waits, other = Flusher(), FakeLink(5.0, 5.0), FakeLink()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flusher.run)
            flusher.soon(waits)
            await trio.sleep(1)
            flusher.soon(other)
            await trio.sleep(20)
            assert other.flushed == [1.0]
            assert waits.flushed[0] == 0.0
            assert waits.flushed[-1] == 5.0
            nursery.cancel_scope.cancel()

    run(main)


def test_other_tasks_have_their_turn_between_many_links() -> None:
    async def main() -> None:
        flusher, links = Flusher(), [FakeLink() for _ in range(2 * LINKS_AT_ONCE)]
        seen: list[int] = []

        async def other() -> None:
            while not links[-1].flushed:
                seen.append(sum(bool(link.flushed) for link in links))
                await trio.lowlevel.checkpoint()

        for link in links:
            flusher.soon(link)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flusher.run)
            nursery.start_soon(other)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert LINKS_AT_ONCE in seen

    run(main)


def small_pair() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    for sock in near, far:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return near, far


async def read_all(sock: socket.socket) -> bytes:
    stream, data = trio.SocketStream(trio.socket.from_stdlib_socket(sock)), bytearray()
    async with stream:
        async for part in stream:
            data += part
    return bytes(data)


def test_what_a_full_socket_does_not_take_goes_out_before_what_is_sent_next() -> None:
    async def main() -> None:
        near, far = small_pair()
        stream, parts = SocketStream(near), [bytes([number]) * 3000 for number in range(20)]
        assert stream.send_nowait(parts[0])
        gone = [stream.send_nowait(part) for part in parts[1:]]
        assert not all(gone)
        assert gone == sorted(gone, reverse=True), "nothing may overtake what is left"

        async def finish() -> None:
            await stream.send_all(b"the end")
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(finish)
            assert await read_all(far) == b"".join(parts) + b"the end"

    run(main)


def test_a_socket_that_is_gone_is_told() -> None:
    async def main() -> None:
        near, far = small_pair()
        stream = SocketStream(near)
        far.close()
        with pytest.raises(trio.BrokenResourceError):
            stream.send_nowait(b"x")
        await stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            stream.send_nowait(b"x")

    run(main)


async def opened(nursery: trio.Nursery) -> tuple[ControlSocket, ControlSocket, list[bytes]]:
    """Two control sockets over small buffers, and what the second one gets once it reads; it does not yet."""
    received: list[bytes] = []
    near, far = small_pair()
    client = ControlSocket(SocketStream(near), lambda _: None, client=True)
    server = ControlSocket(SocketStream(far), received.append, client=False)
    nursery.start_soon(client.read)
    with trio.CancelScope() as reading:
        async with trio.open_nursery() as both:
            both.start_soon(server.read)
            both.start_soon(client.connect)
            await server.accept()
            await trio.testing.wait_all_tasks_blocked()
            reading.cancel()
    return client, server, received


def test_a_frame_is_whole_though_the_reader_answers_a_ping_in_the_middle_of_it() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            client, server, received = await opened(nursery)
            message = bytes(range(256)) * 200
            assert not client.send_nowait(message)
            assert server.send_nowait(b"")  # keeps the other direction open
            await server._stream.send_all(bytes((0x89, 0)))  # a ping, which the client's reader answers now
            await trio.testing.wait_all_tasks_blocked()
            assert not client.send_nowait(b"after the ping")
            nursery.start_soon(server.read)
            await client.send_rest()
            await trio.testing.wait_all_tasks_blocked()
            assert received == [message, b"after the ping"]
            await client.aclose()
            await server.aclose()
            nursery.cancel_scope.cancel()

    run(main)


def test_nothing_is_sent_while_the_reader_sends_an_answer() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            client, server, received = await opened(nursery)
            nursery.start_soon(server.read)
            async with client._socket._stream_lock:  # as the reader holds it, half of its answer sent
                assert not client.send_nowait(b"waits")
                await trio.testing.wait_all_tasks_blocked()
                assert received == []
            await client.send_rest()
            await trio.testing.wait_all_tasks_blocked()
            assert received == [b"waits"]
            await client.aclose()
            await server.aclose()
            nursery.cancel_scope.cancel()

    run(main)


def test_nothing_is_sent_over_a_connection_that_is_closed() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            client, server, _ = await opened(nursery)
            await server.aclose()
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(PeerError):
                client.send_nowait(b"too late")
            with pytest.raises(PeerError):
                await send(client, b"too late")
            await client.aclose()
            nursery.cancel_scope.cancel()

    run(main)
