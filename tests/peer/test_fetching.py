"""The client of a pieces channel against servers of every kind, over a socket pair and a virtual clock.

Nothing here waits for a real clock: a socket pair delivers at once, and the virtual one jumps when all tasks wait.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from blake3 import blake3

from swarm import wire
from swarm.edges import Started
from swarm.errors import LocalProtocolError, PeerError, RemoteProtocolError
from swarm.peer import fetching
from swarm.peer.fetching import BufferPool, Fetcher
from swarm.peer.limits import Progress, ProgressRule, RateLimit
from swarm.peer.pieces_channel import MAGIC, NONCE_BYTES, FrameReader, Pipe, Watch, frame, open_mac

TASK = bytes(32)
TICKET = b"k" * 32
KEY = b"s" * 32
SIGNED = wire.Signed(b"body", KEY, bytes(64))


@dataclass
class Events:
    started: list[Started] = field(default_factory=list)
    received: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    failed: list[tuple[int, int]] = field(default_factory=list)
    accept: bool = True
    on_failed: Callable[[int], None] = lambda request_id: None

    def fetch_started(self, started: Started) -> bool:
        self.started.append(started)
        return self.accept

    def fetch_received(self, request_id: int, digest: bytes, data: memoryview) -> None:
        assert request_id not in self.received
        self.received[request_id] = (digest, bytes(data))

    def fetch_failed(self, request_id: int, status: int) -> None:
        self.failed.append((request_id, status))
        self.on_failed(request_id)


class World:
    """A fetcher whose channels lead to a server the test writes."""

    def __init__(self, nursery: trio.Nursery, server: Callable[[Pipe], Awaitable[None]], rate: float = 0) -> None:
        self.events = Events()
        self.nursery = nursery
        self.server = server
        self.dials = 0
        self.refuse_dials = False
        self.pool = BufferPool()
        self.watch = Watch()
        self.error: Exception | None = None
        self.fetcher = Fetcher(
            self.events,
            self.dial,
            lambda nonce: wire.ChannelOpen(bytes(20), bytes(16), open_mac(TICKET, nonce)),
            pool=self.pool,
            watch=self.watch,
            rate=RateLimit(rate, 0, trio.current_time()),
            rule=ProgressRule(),
        )

    async def dial(self) -> socket.socket:
        self.dials += 1
        if self.refuse_dials:
            raise PeerError("nobody there")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.nursery.start_soon(self._serve, Pipe(theirs))
        return ours

    async def _serve(self, pipe: Pipe) -> None:
        try:
            assert await pipe.receive_exactly(4) == MAGIC
            nonce = os.urandom(NONCE_BYTES)
            await pipe.send_all(nonce)
            opening = wire.decode(await receive_frame(pipe), wire.ChannelOpen)
            assert opening.mac == open_mac(TICKET, nonce)
            await self.server(pipe)
        except PeerError:
            pass  # the client hung up
        finally:
            pipe.close()

    async def run(self) -> None:
        try:
            await self.fetcher.run()
        except RemoteProtocolError as error:
            self.error = error


async def receive_frame(pipe: Pipe) -> bytes:
    return await pipe.receive_exactly(int.from_bytes(await pipe.receive_exactly(4), "big"))


async def receive_request(pipe: Pipe) -> wire.Request:
    message = wire.decode_channel_frame(await receive_frame(pipe))
    assert isinstance(message, wire.Request)
    return message


@asynccontextmanager
async def world(server: Callable[[Pipe], Awaitable[None]], rate: float = 0) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        result = World(nursery, server, rate)
        nursery.start_soon(result.watch.run)
        nursery.start_soon(result.run)
        yield result
        nursery.cancel_scope.cancel()


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def ask(w: World, request_id: int, length: int) -> None:
    w.fetcher.request(wire.Request(request_id, TASK, request_id, 0, length))


async def until(condition: Callable[[], object], seconds: float = 600) -> float:
    """Virtual seconds until the condition holds."""
    began = trio.current_time()
    while not condition():
        await trio.sleep(0.05)
        assert trio.current_time() - began < seconds, "it never happened"
    return trio.current_time() - began


def content(request: wire.Request) -> bytes:
    return random.Random(request.id).randbytes(request.length)


async def honest(pipe: Pipe) -> None:
    while True:
        request = await receive_request(pipe)
        await pipe.send_all(frame(wire.Reply(request.id, wire.OK, request.length, SIGNED, b"certificate")) + content(request))


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 1025, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, 4 << 20])
def test_a_piece_of_any_size_arrives_whole_with_its_digest(length):
    async def main() -> None:
        async with world(honest) as w:
            ask(w, 7, length)
            await until(lambda: w.events.received)
            digest, data = w.events.received[7]
            assert data == content(wire.Request(7, TASK, 7, 0, length))
            assert digest == blake3(data).digest()
            assert w.fetcher.received == length
            assert w.events.failed == []

    run(main)


def test_many_requests_share_one_channel_and_answers_may_come_in_any_order():
    async def backwards(pipe: Pipe) -> None:
        requests = [await receive_request(pipe) for _ in range(5)]
        for request in reversed(requests):
            await pipe.send_all(frame(wire.Reply(request.id, wire.OK, request.length)) + content(request))
        await trio.sleep_forever()

    async def main() -> None:
        async with world(backwards) as w:
            for number in range(5):
                ask(w, number, 300_000 + number)
            await until(lambda: len(w.events.received) == 5)
            assert [started.request_id for started in w.events.started] == [4, 3, 2, 1, 0]
            for number, (_, data) in w.events.received.items():
                assert data == content(wire.Request(number, TASK, number, 0, 300_000 + number))
            assert w.dials == 1

    run(main)


def test_a_signers_certificate_is_passed_on_once():
    async def main() -> None:
        async with world(honest) as w:
            for number in range(3):
                ask(w, number, 10)
            await until(lambda: len(w.events.received) == 3)
            assert [started.certificate for started in w.events.started] == [b"certificate", b"", b""]
            assert w.events.started[0].proof == SIGNED

    run(main)


@pytest.mark.parametrize("status", [wire.NOT_HELD, wire.BUSY, wire.REFUSED, wire.CANCELLED])
def test_a_refusal_fails_that_request_only(status):
    async def server(pipe: Pipe) -> None:
        first = await receive_request(pipe)
        await pipe.send_all(frame(wire.Reply(first.id, status)))
        await honest(pipe)

    async def main() -> None:
        async with world(server) as w:
            ask(w, 1, 10)
            ask(w, 2, 10)
            await until(lambda: w.events.received)
            assert w.events.failed == [(1, status)]
            assert list(w.events.received) == [2]
            assert w.dials == 1

    run(main)


def test_a_cancel_reaches_the_server_and_its_answer_ends_the_request():
    async def server(pipe: Pipe) -> None:
        await receive_request(pipe)
        cancel = wire.decode_channel_frame(await receive_frame(pipe))
        assert cancel == wire.Cancel(1)
        await pipe.send_all(frame(wire.Reply(1, wire.CANCELLED)))
        await trio.sleep_forever()

    async def main() -> None:
        async with world(server) as w:
            ask(w, 1, 10)
            assert w.fetcher.cancel(1)
            assert not w.fetcher.cancel(2)
            await until(lambda: w.events.failed)
            assert w.events.failed == [(1, wire.CANCELLED)]
            assert not w.fetcher.cancel(1)

    run(main)


def test_a_request_id_under_way_cannot_be_used_again():
    async def main() -> None:
        async with world(honest) as w:
            ask(w, 1, 10)
            with pytest.raises(LocalProtocolError):
                ask(w, 1, 10)

    run(main)


# --- servers that do not play by the rules -----------------------------------------------------------------------------


def fails_within(server: Callable[[Pipe], Awaitable[None]], seconds: float, length: int = 4 << 20) -> None:
    """The request fails over within so many seconds, and the peer is not blamed for breaking the protocol."""

    async def main() -> None:
        async with world(server) as w:
            ask(w, 1, length)
            ask(w, 2, length)
            took = await until(lambda: len(w.events.failed) == 2)
            assert took <= seconds
            assert sorted(w.events.failed) == [(1, wire.BUSY), (2, wire.BUSY)]
            assert w.events.received == {}
            assert w.error is None

    run(main)


def test_a_server_that_stops_after_the_header_is_given_up_within_ten_seconds():
    async def server(pipe: Pipe) -> None:
        request = await receive_request(pipe)
        await pipe.send_all(frame(wire.Reply(request.id, wire.OK, request.length)))
        await trio.sleep_forever()

    fails_within(server, 12)


def test_a_server_that_sends_one_byte_a_second_is_given_up_within_twenty_seconds():
    async def server(pipe: Pipe) -> None:
        request = await receive_request(pipe)
        await pipe.send_all(frame(wire.Reply(request.id, wire.OK, request.length)))
        while True:
            await trio.sleep(1)
            await pipe.send_all(b"x")

    fails_within(server, 22)


def test_a_server_that_hangs_up_inside_a_piece_fails_over_at_once():
    async def server(pipe: Pipe) -> None:
        request = await receive_request(pipe)
        await pipe.send_all(frame(wire.Reply(request.id, wire.OK, request.length)) + bytes(100_000))

    fails_within(server, 1)


def test_a_slow_server_above_the_floor_is_borne_although_its_bytes_never_fill_a_chunk():
    async def server(pipe: Pipe) -> None:
        request = await receive_request(pipe)
        data = content(request)
        await pipe.send_all(frame(wire.Reply(request.id, wire.OK, request.length)))
        for start in range(0, len(data), 70_000):
            await trio.sleep(1)
            await pipe.send_all(data[start : start + 70_000])
        await trio.sleep_forever()

    async def main() -> None:
        async with world(server) as w:
            ask(w, 1, 4 << 20)
            took = await until(lambda: w.events.received)
            assert took > 55
            assert w.events.failed == []
            assert w.events.received[1][1] == content(wire.Request(1, TASK, 1, 0, 4 << 20))

    run(main)


def test_bytes_below_the_low_water_mark_of_a_real_socket_are_progress_too():
    """A socket pair has no low-water mark, TCP has; so this one is real, and its clock is moved by hand."""
    clock = trio.testing.MockClock(rate=0)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
        ours.setblocking(False)
        theirs.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        progress = Progress(ProgressRule(), 0.0)
        watch = Watch()
        failures: list[str] = []
        pipe = Pipe(ours)
        watch.add(pipe, progress, failures.append)

        async def read() -> None:
            view = memoryview(bytearray(1 << 20))
            while True:
                if (count := pipe.receive_nowait(view)) is None:
                    await pipe.wait_readable(200_000)
                else:
                    progress.moved(count, trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            nursery.start_soon(read)
            for _ in range(15):
                await Pipe(theirs).send_all(bytes(100))
                await turns(20)
                clock.jump(1.0)
                await turns(20)
            nursery.cancel_scope.cancel()
        pipe.close()
        theirs.close()
        assert failures == []

    trio.run(main, clock=clock)


async def turns(count: int) -> None:
    for _ in range(count):
        await trio.lowlevel.checkpoint()


def test_a_server_may_keep_a_request_waiting_without_being_given_up():
    async def server(pipe: Pipe) -> None:
        request = await receive_request(pipe)
        await trio.sleep(300)
        await pipe.send_all(frame(wire.Reply(request.id, wire.OK, request.length)) + content(request))
        await trio.sleep_forever()

    async def main() -> None:
        async with world(server) as w:
            ask(w, 1, 1000)
            await until(lambda: w.events.received)
            assert w.events.failed == []

    run(main)


def breaks_the_protocol(server: Callable[[Pipe], Awaitable[None]], match: str, *, accept: bool = True) -> Events:
    events: list[Events] = []

    async def main() -> None:
        async with world(server) as w:
            w.events.accept = accept
            events.append(w.events)
            ask(w, 1, 1000)
            await until(lambda: w.error)
            assert match in str(w.error)

    run(main)
    return events[0]


def test_right_header_then_endless_bytes_is_a_violation_after_the_piece():
    async def server(pipe: Pipe) -> None:
        request = await receive_request(pipe)
        await pipe.send_all(frame(wire.Reply(request.id, wire.OK, request.length)) + content(request))
        while True:
            await pipe.send_all(b"\xff" * 65536)

    events = breaks_the_protocol(server, "pieces channel frame of")
    assert list(events.received) == [1]


def test_more_bytes_than_asked_for_are_refused_before_they_are_received():
    async def server(pipe: Pipe) -> None:
        request = await receive_request(pipe)
        await pipe.send_all(frame(wire.Reply(request.id, wire.OK, 8 << 20)))
        await trio.sleep_forever()

    assert breaks_the_protocol(server, "where 1000 were asked for").started == []


def test_fewer_bytes_than_asked_for_are_refused_too():
    async def server(pipe: Pipe) -> None:
        request = await receive_request(pipe)
        await pipe.send_all(frame(wire.Reply(request.id, wire.OK, 999)))
        await trio.sleep_forever()

    assert breaks_the_protocol(server, "999 bytes").started == []


def test_an_answer_nobody_asked_for_is_a_violation():
    async def server(pipe: Pipe) -> None:
        await receive_request(pipe)
        await pipe.send_all(frame(wire.Reply(99, wire.OK, 1000)))
        await trio.sleep_forever()

    breaks_the_protocol(server, "nothing we asked")


def test_a_second_answer_to_one_request_is_a_violation():
    async def server(pipe: Pipe) -> None:
        request = await receive_request(pipe)
        for _ in range(2):
            await pipe.send_all(frame(wire.Reply(request.id, wire.OK, request.length)) + content(request))
        await trio.sleep_forever()

    assert len(breaks_the_protocol(server, "nothing we asked").received) == 1


def test_a_huge_header_is_refused_without_reading_it():
    async def server(pipe: Pipe) -> None:
        await receive_request(pipe)
        await pipe.send_all((1 << 31).to_bytes(4, "big"))
        await trio.sleep_forever()

    breaks_the_protocol(server, "pieces channel frame of")


def test_garbage_for_a_header_is_refused():
    async def server(pipe: Pipe) -> None:
        await receive_request(pipe)
        await pipe.send_all((5).to_bytes(4, "big") + b"\xff\xff\xff\xff\xff")
        await trio.sleep_forever()

    breaks_the_protocol(server, "CBOR")


def test_bytes_that_are_refused_at_their_header_are_not_received():
    async def server(pipe: Pipe) -> None:
        request = await receive_request(pipe)
        await pipe.send_all(frame(wire.Reply(request.id, wire.OK, request.length)) + content(request))
        await trio.sleep_forever()

    events = breaks_the_protocol(server, "cannot be right", accept=False)
    assert events.received == {}
    assert len(events.started) == 1


# --- the channel itself --------------------------------------------------------------------------------------------------


def test_a_lost_channel_is_opened_again_and_requests_made_meanwhile_are_served():
    lives = 0

    async def server(pipe: Pipe) -> None:
        nonlocal lives
        lives += 1
        if lives == 1:
            await receive_request(pipe)
            return
        await honest(pipe)

    async def main() -> None:
        async with world(server) as w:
            w.events.on_failed = lambda request_id: ask(w, request_id + 10, 500)  # fail over, to the same peer
            ask(w, 1, 500)
            await until(lambda: w.events.received)
            assert w.events.failed == [(1, wire.BUSY)]
            assert list(w.events.received) == [11]

    run(main)


def test_asking_a_peer_whose_channel_cannot_be_opened_is_no_busy_loop():
    async def main() -> None:
        async with world(honest) as w:
            w.refuse_dials = True
            w.events.on_failed = lambda request_id: ask(w, request_id + 1, 500)
            ask(w, 0, 500)
            await trio.sleep(60)
            assert 5 <= len(w.events.failed) <= 15
            assert all(status == wire.BUSY for _, status in w.events.failed)

    run(main)


def test_a_server_that_never_finishes_the_opening_is_given_up():
    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        async with world(honest) as w:

            async def dial() -> socket.socket:
                return ours

            w.fetcher._dial = dial
            ask(w, 1, 500)
            took = await until(lambda: w.events.failed)
            assert took <= 11
        theirs.close()

    run(main)


def test_an_idle_channel_is_closed_and_opened_again_when_needed():
    ended: list[float] = []

    async def server(pipe: Pipe) -> None:
        try:
            await honest(pipe)
        finally:
            ended.append(trio.current_time())

    async def main() -> None:
        async with world(server) as w:
            ask(w, 1, 10)
            await until(lambda: w.events.received)
            await until(lambda: ended)
            assert fetching.IDLE_SECONDS <= ended[0] <= fetching.IDLE_SECONDS + 5
            ask(w, 2, 10)
            await until(lambda: 2 in w.events.received)
            assert w.dials == 2
            assert w.events.failed == []

    run(main)


def test_the_download_limit_holds_by_not_reading():
    async def main() -> None:
        async with world(honest, rate=1 << 20) as w:
            ask(w, 1, 4 << 20)
            took = await until(lambda: w.events.received)
            assert 3.5 <= took <= 4.5
            assert w.events.failed == []

    run(main)


def test_a_cancelled_fetcher_leaves_no_socket_and_keeps_no_buffer():
    async def server(pipe: Pipe) -> None:
        request = await receive_request(pipe)
        await pipe.send_all(frame(wire.Reply(request.id, wire.OK, request.length)) + bytes(100))
        await trio.sleep_forever()

    async def main() -> None:
        async with world(server) as w:
            ask(w, 1, 1 << 20)
            await until(lambda: w.events.started)
        assert w.watch._watched == {}
        assert len(w.pool._free) == 1

    run(main)  # an open socket would be a ResourceWarning, which is an error


def test_buffers_are_reused_and_let_go_when_idle():
    pool = BufferPool()
    first = pool.take(1 << 20)
    pool.give(first, 0.0)
    assert pool.take(1000) is first
    pool.give(first, 5.0)
    pool.trim(14.0)
    assert pool.take(1 << 20) is first
    pool.give(first, 15.0)
    pool.trim(25.0)
    assert pool.take(1 << 20) is not first


def test_frames_are_read_without_swallowing_what_follows():
    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        reader = FrameReader(Pipe(ours), read_ahead=1024)
        theirs.sendall(frame([1]) + frame([2, 3]) + b"body" * 100)
        assert await reader.frame() == wire.encode([1])
        assert reader.frame_nowait() == wire.encode([2, 3])
        assert reader.surplus(8) == b"bodybody"
        assert reader.surplus(10_000) == b"body" * 98
        theirs.close()
        assert await reader.frame() is None
        ours.close()

    run(main)


def test_an_end_inside_a_frame_is_not_an_orderly_end():
    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.sendall(frame([1])[:-1])
        theirs.close()
        with pytest.raises(PeerError):
            await FrameReader(Pipe(ours), read_ahead=1024).frame()
        ours.close()

    run(main)
