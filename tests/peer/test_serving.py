"""The server of pieces channels against clients of every kind, over socket pairs and a virtual clock."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from swarm import wire
from swarm.edges import FileSlice, NodeId, Served
from swarm.errors import PeerError, RemoteProtocolError, StoreError
from swarm.peer import serving
from swarm.peer.limits import ProgressRule, RateLimit
from swarm.peer.pieces_channel import MAGIC, NONCE_BYTES, FrameReader, Pipe, Watch, frame
from swarm.peer.serving import PiecesServer
from swarm.peer.upload import MAX_REQUESTS_PER_CHANNEL, MAX_SLOTS, STALL_SECONDS, Uploader

TASK = bytes(32)
OTHER = b"\1" * 32
PIECE = 1 << 20
CONTENT = random.Random(1).randbytes(4 * PIECE)
TABLE = b"table" * 100


class Source:
    """Serves `CONTENT`, and keeps account."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(CONTENT)
        self.fd = os.open(path, os.O_RDONLY)
        self.open = 0
        self.sent: Counter[NodeId] = Counter()
        self.answer: Callable[[wire.Request], Served | int] = self.slice

    def slice(self, request: wire.Request) -> Served | int:
        if request.piece == wire.SEAL_TABLE:
            return Served(TABLE)
        self.open += 1
        signed = wire.Signed(b"proof", bytes([request.piece % 2]) * 32, bytes(64))
        return Served(FileSlice(self.fd, request.piece * PIECE + request.offset, request.length, self.release), signed, b"cert")

    def release(self) -> None:
        self.open -= 1

    def serve(self, node_id: NodeId, request: wire.Request, *, encrypted: bool) -> Served | int:
        return self.answer(request)

    def replication(self, task_id: bytes, piece: int) -> int:
        return 0

    def held_by(self, task_id: bytes, node_id: NodeId) -> int:
        return 0

    def uploaded(self, node_id: NodeId, request: wire.Request, sent: int) -> None:
        self.sent[node_id] += sent


class Client:
    """The other end of a channel, by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.pipe = Pipe(sock)
        self.reader = FrameReader(self.pipe, read_ahead=512)

    async def ask(self, *requests: wire.Request | wire.Cancel) -> None:
        await self.pipe.send_all(b"".join(map(frame, requests)))

    async def reply(self) -> wire.Reply:
        data = await self.reader.frame()
        if data is None:
            raise PeerError("closed")
        return wire.decode(data, wire.Reply)

    async def answer(self) -> tuple[wire.Reply, bytes]:
        reply = await self.reply()
        body = self.reader.surplus(reply.length)
        return reply, body + await self.pipe.receive_exactly(reply.length - len(body))

    async def wait_closed(self) -> None:
        view = memoryview(bytearray(65536))
        with contextlib.suppress(PeerError):
            while await self.pipe.receive(view):
                pass


class World:
    def __init__(self, path: Path, nursery: trio.Nursery, congestion_control: str = "", **rates: float) -> None:
        self.nursery = nursery
        self.source = Source(path)
        self.watch = Watch()
        self.uploader = Uploader(self.source, rng=random.Random(1), slots=1)
        self.errors: list[Exception] = []
        self.admitted: set[NodeId] | None = None
        self.server = PiecesServer(
            self,
            self.source,
            self.uploader,
            watch=self.watch,
            rate=RateLimit(rates.get("node", 0), rates.get("task", 0), trio.current_time()),
            rule=ProgressRule(),
            congestion_control=congestion_control,
        )
        self.sockets: list[Client] = []

    async def secure(self, sock: socket.socket) -> tuple[socket.socket, NodeId]:
        raise PeerError("no TLS here")

    async def admit(self, opening_untrusted: wire.ChannelOpen, nonce: bytes, *, tls: NodeId | None) -> NodeId:
        if self.admitted is not None and opening_untrusted.node not in self.admitted:
            raise PeerError("unknown")
        return opening_untrusted.node

    def raw(self, pair: tuple[socket.socket, socket.socket] | None = None) -> Client:
        ours, theirs = pair or socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.nursery.start_soon(self.serve, theirs)
        self.sockets.append(Client(ours))
        return self.sockets[-1]

    async def client(self, number: int = 1, pair: tuple[socket.socket, socket.socket] | None = None) -> Client:
        client = self.raw(pair)
        await client.pipe.send_all(MAGIC)
        await client.pipe.receive_exactly(NONCE_BYTES)
        await client.ask()
        await client.pipe.send_all(frame(wire.ChannelOpen(node(number), bytes(16), bytes(32))))
        return client

    async def serve(self, sock: socket.socket) -> None:
        try:
            await self.server.serve(await self.server.handshake(sock))
        except (PeerError, RemoteProtocolError) as error:
            self.errors.append(error)
        finally:
            sock.close()


def node(number: int) -> NodeId:
    return number.to_bytes(20, "big")


def ask(request_id: int, piece: int = 0, offset: int = 0, length: int = PIECE, task: bytes = TASK) -> wire.Request:
    return wire.Request(request_id, task, piece, offset, length)


@asynccontextmanager
async def world(path: Path, congestion_control: str = "", **rates: float) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        result = World(path / "content", nursery, congestion_control, **rates)
        nursery.start_soon(result.watch.run)
        await nursery.start(result.server.run)
        yield result
        for client in result.sockets:
            client.pipe.close()
        nursery.cancel_scope.cancel()
    assert result.source.open == 0, "a slice was not released"
    assert result.uploader.active == 0
    os.close(result.source.fd)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize(("offset", "length"), [(0, PIECE), (17, 1000), (PIECE - 1, 1), (0, 0)])
def test_the_bytes_asked_for_are_sent(tmp_path, offset, length):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            await client.ask(ask(1, 2, offset, length))
            reply, body = await client.answer()
            assert (reply.id, reply.status, reply.length) == (1, wire.OK, length)
            start = 2 * PIECE + offset
            assert body == CONTENT[start : start + length]
            await trio.testing.wait_all_tasks_blocked()
            assert w.source.sent == {node(1): length}

    run(main)


def test_the_seal_table_is_sent_from_memory(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            await client.ask(ask(1, wire.SEAL_TABLE, 0, len(TABLE)))
            assert (await client.answer())[1] == TABLE

    run(main)


def test_a_signers_certificate_goes_out_once_on_a_channel(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            certificates = []
            for number in range(4):
                await client.ask(ask(number, number, 0, 10))
                reply, _ = await client.answer()
                assert reply.proof is not None
                certificates.append(reply.certificate)
            assert certificates == [b"cert", b"cert", b"", b""]
            again = await w.client(2)
            await again.ask(ask(1, 0, 0, 10))
            assert (await again.answer())[0].certificate == b"cert"

    run(main)


def test_pieces_go_out_under_the_congestion_control_asked_for(tmp_path):
    async def main() -> None:
        async with world(tmp_path, congestion_control="reno") as w:
            pair = tcp_pair()
            before = pair[1].getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
            client = await w.client(pair=pair)
            await client.ask(ask(1))
            await client.answer()
            assert pair[1].getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
            assert pair[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16) == before

    run(main)


def test_a_congestion_control_this_machine_has_not_is_told_once_and_pieces_go_out(tmp_path):
    async def main() -> None:
        with capture_logs() as logs:
            async with world(tmp_path, congestion_control="none_such") as w:
                for number in (1, 2):
                    client = await w.client(number, tcp_pair())
                    await client.ask(ask(1))
                    assert (await client.answer())[1] == CONTENT[:PIECE]
        assert [entry["name"] for entry in logs if "congestion" in entry["event"]] == ["none_such"]

    run(main)


def test_one_connection_that_takes_no_congestion_control_does_not_take_it_from_the_others(tmp_path):
    async def main() -> None:
        async with world(tmp_path, congestion_control="reno") as w:
            for number, pair in ((1, socket.socketpair()), (2, tcp_pair())):
                client = await w.client(number, pair)
                await client.ask(ask(1))
                assert (await client.answer())[1] == CONTENT[:PIECE]
            assert pair[1].getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"

    run(main)


def test_a_refusal_has_no_body_and_the_channel_goes_on(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            w.source.answer = lambda request: wire.REFUSED if request.id == 1 else w.source.slice(request)
            await client.ask(ask(1), ask(2, 1, 0, 100))
            replies = {}
            for _ in range(2):
                reply, body = await client.answer()
                replies[reply.id] = (reply.status, body)
            assert replies == {1: (wire.REFUSED, b""), 2: (wire.OK, CONTENT[PIECE : PIECE + 100])}

    run(main)


def test_a_disk_that_fails_is_no_reason_to_drop_the_peer(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()

            def broken(request: wire.Request) -> Served:
                raise StoreError("input/output error")

            w.source.answer = broken
            await client.ask(ask(1))
            assert (await client.reply()).status == wire.NOT_HELD
            w.source.answer = w.source.slice
            await client.ask(ask(2, 0, 0, 5))
            assert (await client.answer())[1] == CONTENT[:5]

    run(main)


def test_a_bug_in_serving_one_request_closes_that_channel_only(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            victim, other = await w.client(1), await w.client(2)

            def bug(request: wire.Request) -> Served:
                raise ZeroDivisionError

            w.source.answer = bug
            await victim.ask(ask(1))
            await victim.wait_closed()
            w.source.answer = w.source.slice
            await other.ask(ask(1, 0, 0, 5))
            assert (await other.answer())[1] == CONTENT[:5]

    run(main)


def test_a_cancelled_request_is_answered_and_not_served(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            await client.ask(ask(1), ask(2), wire.Cancel(2), wire.Cancel(77))
            first, _ = await client.answer()
            second = await client.reply()
            assert {(first.id, first.status), (second.id, second.status)} in (
                {(1, wire.OK), (2, wire.CANCELLED)},
                {(1, wire.CANCELLED), (2, wire.OK)},
            )

    run(main)


def test_requests_without_end_are_told_busy(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            count = MAX_REQUESTS_PER_CHANNEL + 50
            await client.ask(*[ask(number, 0, 0, 1) for number in range(count)])
            statuses: Counter[int] = Counter()
            for _ in range(count):
                reply, _ = await client.answer()
                statuses[reply.status] += 1
            assert statuses[wire.BUSY] >= 1
            assert statuses[wire.OK] >= MAX_REQUESTS_PER_CHANNEL

    run(main)


def test_a_flood_of_requests_closes_the_channel(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()

            async def flood() -> None:
                for number in range(100):
                    await client.ask(*[ask(number * 100 + extra, 0, 0, 1) for extra in range(100)])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ignoring_close, flood)
                nursery.start_soon(client.wait_closed)
            assert any("too many requests" in str(error) for error in w.errors)

    run(main)


async def ignoring_close(body: Callable[[], Awaitable[None]]) -> None:
    with contextlib.suppress(PeerError):
        await body()


def test_a_client_that_asks_without_reading_the_refusals_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "MAX_UNSENT_REPLIES_BYTES", 1000)

    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            await client.ask(ask(0))  # fills the socket: nothing more leaves
            await trio.testing.wait_all_tasks_blocked()
            for number in range(1, 2000):
                if w.errors:
                    break
                await client.ask(ask(number), wire.Cancel(number))
                await trio.testing.wait_all_tasks_blocked()
            assert "without reading" in str(w.errors[0])

    run(main)


def test_a_client_that_stops_reading_is_given_up_and_its_slice_released(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            began = trio.current_time()
            await client.ask(ask(1))
            while w.uploader.active or trio.current_time() == began:
                await trio.sleep(0.5)
                assert trio.current_time() - began < 20
            assert trio.current_time() - began >= 10
            assert w.source.open == 0
            assert 0 < w.source.sent[node(1)] < PIECE
            assert w.server.channels == 0

    run(main)


def test_stalled_clients_do_not_keep_a_good_one_waiting(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            for number in range(1, MAX_SLOTS):
                stalled = await w.client(number)
                await stalled.ask(ask(1))
            good = await w.client(100)
            began = trio.current_time()
            await good.ask(ask(1))
            assert (await good.answer())[1] == CONTENT[:PIECE]
            assert trio.current_time() - began < MAX_SLOTS * STALL_SECONDS + 0.1

    run(main)


def test_eight_stalled_clients_hold_their_slots_for_seconds_and_not_for_ever(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            for number in range(1, 3 * MAX_SLOTS):
                stalled = await w.client(number)
                await stalled.ask(ask(1))
            await trio.sleep(5)
            assert w.uploader.active == MAX_SLOTS
            good = await w.client(100)
            await good.ask(ask(1))
            with trio.fail_after(120):
                assert (await good.answer())[1] == CONTENT[:PIECE]

    run(main)


def test_one_transfer_at_a_time_goes_to_clients_that_read(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            most = 0
            done = 0

            async def read(number: int) -> None:
                nonlocal most, done
                client = await w.client(number)
                await client.ask(ask(1, number % 4))
                await client.reply()
                most = max(most, w.uploader.active)
                view = memoryview(bytearray(4096))
                left = PIECE - len(client.reader.surplus(PIECE))
                while left > 0 and (count := await client.pipe.receive(view)):
                    left -= count
                    most = max(most, w.uploader.active)
                done += 1

            async with trio.open_nursery() as nursery:
                for number in range(5):
                    nursery.start_soon(read, number)
            assert done == 5
            assert most == 1

    run(main)


def test_a_client_that_vanishes_frees_its_slot_at_once(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            await client.ask(ask(1), ask(2, 1))
            await client.reply()
            client.pipe.close()
            await trio.testing.wait_all_tasks_blocked()
            assert (w.uploader.active, w.uploader.queued, w.server.channels) == (0, 0, 0)

    run(main)


def test_a_file_that_became_shorter_ends_the_channel_instead_of_hanging_it(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            os.truncate(tmp_path / "content", PIECE // 2)
            await client.ask(ask(1))
            with pytest.raises(PeerError):
                await client.answer()

    run(main)


def test_a_peer_has_one_channel_the_newest(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            first = await w.client(1)
            await first.ask(ask(1, 0, 0, 3))
            await first.answer()
            for _ in range(50):
                newest = await w.client(1)
                await newest.ask(ask(1, 0, 0, 3))
                assert (await newest.answer())[1] == CONTENT[:3]
            assert w.server.channels == 1
            await first.wait_closed()

    run(main)


def test_a_forgotten_peers_channel_is_closed(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client(1)
            await client.ask(ask(1, 0, 0, 3))
            await client.answer()
            w.server.forget(node(1))
            await client.wait_closed()
            assert w.server.channels == 0

    run(main)


def test_whoever_is_not_admitted_is_closed_without_a_word(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            w.admitted = set()
            client = await w.client(1)
            assert await client.reader.frame() is None
            assert w.server.channels == 0

    run(main)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        MAGIC + (1 << 30).to_bytes(4, "big"),
        MAGIC + (257).to_bytes(4, "big") + bytes(257),
        MAGIC + (4).to_bytes(4, "big") + b"\xff\xff\xff\xff",
        b"\x16\x03\x01",
    ],
)
def test_an_outsider_gets_nowhere(tmp_path, sent):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = w.raw()
            await client.pipe.send_all(sent)
            await client.wait_closed()
            assert len(w.errors) == 1
            assert w.server.channels == 0

    run(main)


def test_the_upload_limit_of_the_node_holds(tmp_path):
    async def main() -> None:
        async with world(tmp_path, node=PIECE) as w:
            clients = [await w.client(number) for number in range(4)]
            began = trio.current_time()

            async def fetch(client: Client, number: int) -> None:
                await client.ask(ask(1, number))
                await client.answer()

            async with trio.open_nursery() as nursery:
                for number, client in enumerate(clients):
                    nursery.start_soon(fetch, client, number)
            assert 3.6 <= trio.current_time() - began <= 4.4
            assert w.errors == []

    run(main)


def test_a_limited_task_does_not_slow_another(tmp_path):
    async def main() -> None:
        async with world(tmp_path, task=PIECE // 4) as w:
            one, other = await w.client(1), await w.client(2)
            took: dict[str, float] = {}

            async def fetch(client: Client, task: bytes, length: int, name: str) -> None:
                began = trio.current_time()
                await client.ask(ask(1, 0, 0, length, task))
                await client.answer()
                took[name] = trio.current_time() - began

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch, one, TASK, PIECE, "limited")
                await trio.sleep(0.2)
                nursery.start_soon(fetch, other, OTHER, 10_000, "small")
            assert 3.3 <= took["limited"] <= 4.5
            assert took["small"] < 1.5

    run(main)


def test_draining_ends_what_is_under_way_and_starts_nothing(tmp_path):
    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            await client.ask(ask(1), ask(2))
            await trio.testing.wait_all_tasks_blocked()
            drained = trio.Event()

            async def drain() -> None:
                await w.server.wait_drained()
                drained.set()

            w.nursery.start_soon(drain)
            await trio.testing.wait_all_tasks_blocked()
            assert not drained.is_set()
            await client.ask(ask(3))
            assert (await client.answer())[1] == CONTENT[:PIECE]
            busy = await client.reply()
            assert (busy.id, busy.status) == (3, wire.BUSY)
            with trio.fail_after(1):
                await drained.wait()
            assert w.uploader.queued == 1

    run(main)


def test_waiting_for_one_stalled_client_costs_no_turns_of_the_loop(tmp_path):
    class Turns(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.count += 1

    async def main() -> None:
        async with world(tmp_path) as w:
            client = await w.client()
            await client.ask(ask(1), ask(2), ask(3))
            await trio.testing.wait_all_tasks_blocked()
            turns = Turns()
            trio.lowlevel.add_instrument(turns)
            await trio.sleep(5)
            trio.lowlevel.remove_instrument(turns)
            assert turns.count < 60

    run(main)
