from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Ping, Request
from wsproto.utilities import RemoteProtocolError as WebSocketViolation

from swarm.errors import PeerError, RemoteProtocolError
from swarm.peer import websocket
from swarm.peer.websocket import MAX_HEAD_BYTES, ControlSocket, Frames
from swarm.wire import MAX_FRAME_BYTES
from tests.peer.sending import send


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def open_server(now: Callable[[], float] = lambda: 0.0) -> tuple[Frames, WSConnection, list[bytes]]:
    """Our server side with its handshake done, a stock client to attack it with, and what was delivered."""
    received: list[bytes] = []
    server = Frames(ConnectionType.SERVER, received.append, now)
    client = WSConnection(ConnectionType.CLIENT)
    server.receive_data(client.send(Request(host="x", target=websocket.PATH)))
    assert [type(event) for event in server.events()] == [Request]
    client.receive_data(server.send(AcceptConnection()))
    assert [type(event) for event in client.events()] == [AcceptConnection]
    return server, client, received


def feed(frames: Frames, data: bytes) -> list[object]:
    frames.receive_data(data)
    return list(frames.events())


def close_code(violation: pytest.ExceptionInfo[WebSocketViolation]) -> int:
    hint = violation.value.event_hint
    assert isinstance(hint, CloseConnection)
    return hint.code


MASK = bytes(4)


def masked(first: int, payload: bytes) -> bytes:
    assert len(payload) < 126
    return bytes((first, 0x80 | len(payload))) + MASK + payload


def test_a_stock_client_and_our_server_understand_each_other():
    server, client, received = open_server()
    for size in (0, 1, 125, 126, 65535, 65536):
        message = bytes(range(256)) * 257
        assert feed(server, client.send(BytesMessage(data=message[:size]))) == []
        assert received.pop() == message[:size]
        client.receive_data(server.message(message[:size]))
        parts = b"".join(bytes(event.data) for event in client.events() if isinstance(event, BytesMessage))
        assert parts == message[:size]


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(1, 400), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_messages_survive_any_cutting_of_the_stream(messages, cuts):
    server, client, received = open_server()
    data = b"".join(client.send(BytesMessage(data=message)) for message in messages)
    position = 0
    while position < len(data):
        for cut in cuts:
            assert feed(server, data[position : position + cut]) == []
            position += cut
    assert received == messages


def test_a_fragment_is_refused_before_a_single_one_is_kept():
    server, client, received = open_server()
    with pytest.raises(WebSocketViolation) as violation:
        feed(server, client.send(BytesMessage(data=b"x", message_finished=False)))
    assert close_code(violation) == websocket.NOT_BINARY
    assert received == []


def test_an_empty_fragment_is_refused_too():
    server, _, _ = open_server()
    with pytest.raises(WebSocketViolation):
        feed(server, masked(0x02, b""))


def test_a_continuation_without_a_beginning_is_refused():
    server, _, _ = open_server()
    with pytest.raises(WebSocketViolation):
        feed(server, masked(0x80, b"x"))


def test_text_is_refused():
    server, _, _ = open_server()
    with pytest.raises(WebSocketViolation) as violation:
        feed(server, masked(0x81, b"hello"))
    assert close_code(violation) == websocket.NOT_BINARY


def test_a_compressed_frame_is_refused():
    server, _, _ = open_server()
    with pytest.raises(WebSocketViolation):
        feed(server, masked(0xC2, b"bomb"))


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_that_announces_too_much_is_refused_at_once(length):
    server, _, _ = open_server()
    with pytest.raises(WebSocketViolation) as violation:
        feed(server, bytes((0x82, 0xFF)) + length.to_bytes(8, "big"))
    assert close_code(violation) == websocket.TOO_BIG


def test_a_control_frame_that_is_too_long_is_refused():
    server, _, _ = open_server()
    with pytest.raises(WebSocketViolation):
        feed(server, bytes((0x89, 0x80 | 126)) + (200).to_bytes(2, "big"))


def test_a_client_that_does_not_mask_is_refused():
    server, _, _ = open_server()
    with pytest.raises(WebSocketViolation):
        feed(server, bytes((0x82, 1)) + b"x")


def test_a_server_that_masks_is_refused():
    received: list[bytes] = []
    client = Frames(ConnectionType.CLIENT, received.append, lambda: 0.0)
    server = WSConnection(ConnectionType.SERVER)
    server.receive_data(client.send(Request(host="x", target="/")))
    list(server.events())
    feed(client, server.send(AcceptConnection()))
    with pytest.raises(WebSocketViolation):
        feed(client, masked(0x82, b"x"))


def test_a_real_mask_is_undone():
    server, _, received = open_server()
    mask = b"\x0f\xf0\x55\xaa"
    payload = bytes(range(101))
    hidden = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    feed(server, bytes((0x82, 0x80 | len(payload))) + mask + hidden)
    assert received == [payload]


def test_a_flood_of_websocket_pings_closes_the_connection():
    now = 0.0
    server, client, _ = open_server(lambda: now)
    ping = client.send(Ping(payload=b"x"))
    answered = 0

    def flood() -> None:
        nonlocal now, answered
        for number in range(10_000):
            now = number / 10_000
            answered += len(feed(server, ping))

    with pytest.raises(WebSocketViolation) as violation:
        flood()
    assert close_code(violation) == websocket.VIOLATION
    assert answered <= 30


def test_a_frame_in_the_packet_of_the_handshake_is_parsed_by_our_rules_too():
    received: list[bytes] = []
    client = Frames(ConnectionType.CLIENT, received.append, lambda: 0.0)
    server = WSConnection(ConnectionType.SERVER)
    server.receive_data(client.send(Request(host="x", target="/")))
    list(server.events())
    answer = server.send(AcceptConnection()) + server.send(BytesMessage(data=b"early"))
    cut = len(answer) - 3
    feed(client, answer[:cut])
    feed(client, answer[cut:])
    assert received == [b"early"]
    with pytest.raises(WebSocketViolation):
        feed(client, server.send(BytesMessage(data=b"part", message_finished=False)))


def test_a_head_that_never_ends_is_refused():
    server = Frames(ConnectionType.SERVER, lambda message: None, lambda: 0.0)
    for _ in range(MAX_HEAD_BYTES // 100):
        server.receive_data(b"GET " + b"x" * 96)
    with pytest.raises(WebSocketViolation):
        server.receive_data(b"x" * 100)


def test_frames_before_the_handshake_is_answered_are_refused():
    server = Frames(ConnectionType.SERVER, lambda message: None, lambda: 0.0)
    client = WSConnection(ConnectionType.CLIENT)
    server.receive_data(client.send(Request(host="x", target="/")))
    with pytest.raises(WebSocketViolation):
        server.receive_data(masked(0x82, b"early"))


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_garbage_is_only_ever_a_violation(data):
    server, _, _ = open_server()
    with contextlib.suppress(WebSocketViolation):
        feed(server, data)


# --- the driver, over streams in memory ------------------------------------------------------------------------------


async def open_pair(
    nursery: trio.Nursery, on_client: Callable[[bytes], None], on_server: Callable[[bytes], None]
) -> tuple[ControlSocket, ControlSocket]:
    ours, theirs = trio.testing.memory_stream_pair()
    client = ControlSocket(ours, on_client, client=True)
    server = ControlSocket(theirs, on_server, client=False)
    nursery.start_soon(client.read)
    nursery.start_soon(server.read)
    async with trio.open_nursery() as both:
        both.start_soon(client.connect)
        both.start_soon(server.accept)
    return client, server


def test_messages_go_both_ways_and_a_close_says_why():
    async def main() -> None:
        at_client: list[bytes] = []
        at_server: list[bytes] = []
        ours, theirs = trio.testing.memory_stream_pair()
        client = ControlSocket(ours, at_client.append, client=True)
        server = ControlSocket(theirs, at_server.append, client=False)
        reasons: list[str] = []

        async def read(socket: ControlSocket) -> None:
            reasons.append(await socket.read())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, client)
            nursery.start_soon(server.read)
            async with trio.open_nursery() as both:
                both.start_soon(client.connect)
                both.start_soon(server.accept)
            await send(client, b"to the server")
            await send(server, b"to the client" * 1000)
            await trio.testing.wait_all_tasks_blocked()
            assert at_server == [b"to the server"]
            assert at_client == [b"to the client" * 1000]
            await server.aclose(websocket.DUPLICATE, "there is another")
        assert client.close_code == websocket.DUPLICATE
        assert "there is another" in reasons[0]
        with pytest.raises(PeerError):
            await send(client, b"too late")
        await client.aclose()

    run(main)


def test_a_reason_with_control_characters_is_shown_without_them():
    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        client = ControlSocket(ours, lambda message: None, client=True)
        server = ControlSocket(theirs, lambda message: None, client=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.read)
            nursery.start_soon(server.read)
            async with trio.open_nursery() as both:
                both.start_soon(client.connect)
                both.start_soon(server.accept)
            await server.aclose(4000, "\x1b[2Jboo\nsecond line")
        assert "\x1b" not in client.close_reason
        assert "\n" not in client.close_reason
        await client.aclose()

    run(main)


def test_a_request_for_another_path_is_refused():
    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        server = ControlSocket(theirs, lambda message: None, client=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.read)
            await ours.send_all(WSConnection(ConnectionType.CLIENT).send(Request(host="x", target="/other")))
            with pytest.raises(RemoteProtocolError):
                await server.accept()
            assert b"404" in await ours.receive_some()
            await server.aclose()

    run(main)


@pytest.mark.parametrize("path", [websocket.PATH, "/other"])
def test_a_client_that_goes_away_before_it_is_answered_is_a_lost_connection(path):
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        server = ControlSocket(near, lambda message: None, client=False)

        async def hang_up() -> None:
            raise trio.BrokenResourceError

        near.send_stream.send_all_hook = hang_up
        await far.send_all(WSConnection(ConnectionType.CLIENT).send(Request(host="x", target=path)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.read)
            with pytest.raises(PeerError, match="connection lost"):
                await server.accept()
            await server.aclose()

    run(main)


def test_what_the_receiver_of_messages_raises_ends_the_reader():
    async def main() -> None:
        def refuse(message: bytes) -> None:
            raise RemoteProtocolError("no")

        ours, theirs = trio.testing.memory_stream_pair()
        client = ControlSocket(ours, refuse, client=True)
        server = ControlSocket(theirs, lambda message: None, client=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.read)

            async def open_and_send() -> None:
                await server.accept()
                await send(server, b"x")

            nursery.start_soon(open_and_send)
            with pytest.raises(RemoteProtocolError, match="no"):
                await client.read()
            await client.aclose()

    run(main)


def test_closing_a_connection_nobody_reads_does_not_hang():
    async def main() -> None:
        ours, theirs = trio.testing.lockstep_stream_pair()  # a send waits until somebody receives
        client = ControlSocket(ours, lambda message: None, client=True)
        began = trio.current_time()
        await client.aclose(1000, "bye")
        assert trio.current_time() - began <= websocket.CLOSE_SECONDS
        await theirs.aclose()

    run(main)
