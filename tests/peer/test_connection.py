from __future__ import annotations

import contextlib
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import wire
from swarm.errors import PeerError, RemoteProtocolError
from swarm.peer import connection as module
from swarm.peer.connection import (
    DEAD_SECONDS,
    LINGER_SECONDS,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_MESSAGES,
    PING_SECONDS,
    SETUP_SECONDS,
    Connection,
    QueueFull,
    skew,
)

TASK = bytes(32)
OTHER = b"\1" * 32


def hello(**changes: Any) -> wire.Hello:
    fields: dict[str, Any] = {
        "version": wire.PROTOCOL_VERSION,
        "boot": bytes(16),
        "time": 1e9,
        "control": 7400,
        "pieces": 7401,
        "ticket": bytes(32),
    }
    return wire.Hello(**(fields | changes))


def opened(now: float = 0.0) -> Connection:
    """A connection that has heard the peer's hello."""
    connection = Connection(now)
    connection.receive_frame(wire.encode_frame([hello()]), now)
    return connection


def frames(connection: Connection, now: float) -> list[list[wire.Message]]:
    """Everything due now, decoded."""
    result = []
    while (frame := connection.next_frame(now)) is not None:
        assert len(frame) <= wire.MAX_FRAME_BYTES
        result.append(wire.decode_frame(frame))
    return result


def test_the_hello_is_kept_and_what_follows_in_its_frame_is_delivered():
    connection = Connection(0.0)
    messages = connection.receive_frame(wire.encode_frame([hello(control=1), wire.Leave(TASK)]), 0.0)
    assert connection.hello is not None
    assert connection.hello.control == 1
    assert messages == [wire.Leave(TASK)]


@pytest.mark.parametrize("first", [[], [wire.Leave(TASK)], [wire.Leave(TASK), hello()]])
def test_a_peer_that_does_not_begin_with_a_hello_is_refused(first):
    with pytest.raises(RemoteProtocolError, match="not a hello"):
        Connection(0.0).receive_frame(wire.encode_frame(first), 0.0)


def test_another_protocol_version_is_refused_and_named():
    with pytest.raises(RemoteProtocolError, match="version 2"):
        Connection(0.0).receive_frame(wire.encode_frame([hello(version=2)]), 0.0)


def test_a_second_hello_cannot_change_the_ticket():
    connection = opened()
    with pytest.raises(RemoteProtocolError, match="second hello"):
        connection.receive_frame(wire.encode_frame([hello(ticket=b"\1" * 32)]), 0.0)
    assert connection.hello is not None
    assert connection.hello.ticket == bytes(32)


def test_everything_that_waits_goes_in_one_frame_in_order():
    connection = opened()
    sent: list[wire.Message] = [wire.Leave(TASK), wire.Ask(OTHER), wire.Lost(TASK, [1])]
    for message in sent:
        connection.post(message, 0.0)
    assert frames(connection, 0.0) == [sent]
    assert connection.next_frame(0.0) is None


def test_a_message_that_is_not_urgent_waits_for_company_but_not_longer_than_the_linger():
    connection = opened()
    assert connection.post(wire.Have(TASK, [1]), 0.0, urgent=False)
    assert connection.next_frame(LINGER_SECONDS * 0.9) is None
    assert not connection.post(wire.Have(OTHER, [1]), 0.04, urgent=False)
    assert connection.flush_at == LINGER_SECONDS
    assert frames(connection, LINGER_SECONDS) == [[wire.Have(TASK, [1]), wire.Have(OTHER, [1])]]
    assert connection.flush_at == float("inf")


def test_an_urgent_message_takes_the_waiting_ones_along_and_overtakes_none():
    connection = opened()
    connection.post(wire.Have(TASK, [1]), 0.0, urgent=False)
    assert connection.post(wire.Lost(TASK, [1]), 0.01)
    assert frames(connection, 0.01) == [[wire.Have(TASK, [1]), wire.Lost(TASK, [1])]]


def test_haves_of_one_task_are_merged_but_never_across_a_lost():
    connection = opened()
    for message in (
        wire.Have(TASK, [1]),
        wire.Have(TASK, [2]),
        wire.Lost(TASK, [1]),
        wire.Have(TASK, [1]),
        wire.Have(OTHER, [9]),
    ):
        connection.post(message, 0.0, urgent=False)
    expected = [wire.Have(TASK, [1, 2]), wire.Lost(TASK, [1]), wire.Have(TASK, [1]), wire.Have(OTHER, [9])]
    assert frames(connection, 1.0) == [expected]


def test_merging_leaves_the_callers_message_alone():
    first = wire.Have(TASK, [1])
    one, other = opened(), opened()
    for connection in (one, other):
        connection.post(first, 0.0, urgent=False)
    one.post(wire.Have(TASK, [2]), 0.0, urgent=False)
    assert frames(other, 1.0) == [[wire.Have(TASK, [1])]]
    assert first.pieces == [1]


def test_merged_haves_stay_within_what_a_have_may_hold():
    connection = opened()
    for _ in range(3):
        connection.post(wire.Have(TASK, list(range(3000))), 0.0, urgent=False)
    received = [message for frame in frames(connection, 1.0) for message in frame]
    assert [len(message.pieces) for message in received if isinstance(message, wire.Have)] == [3000, 3000, 3000]


def test_more_than_a_frame_is_split_and_nothing_is_lost():
    connection = opened()
    sent = [wire.Join(bytes([n]) * 32, 1 << 30, 1 << 22, held=bytes(30_000)) for n in range(5)]
    for message in sent:
        connection.post(message, 0.0)
    received = frames(connection, 0.0)
    assert len(received) == 3
    assert [message for frame in received for message in frame] == sent


def test_one_message_posted_to_every_neighbour_is_encoded_once(monkeypatch):
    calls = []
    encode = wire.encode

    def counting(value: object) -> bytes:
        calls.append(value)
        return encode(value)

    monkeypatch.setattr(wire, "encode", counting)
    message = wire.Have(TASK, [1, 2, 3])
    for connection in [opened() for _ in range(24)]:
        connection.post(message, 0.0)
        assert frames(connection, 0.0) == [[message]]
    assert calls.count(message) == 1


def test_a_peer_that_does_not_read_cannot_make_us_hold_messages_without_end():
    connection = opened()
    for _ in range(MAX_QUEUED_MESSAGES):
        connection.post(wire.Leave(TASK), 0.0)
    with pytest.raises(QueueFull):
        connection.post(wire.Leave(TASK), 0.0)


def test_nor_bytes_in_few_large_messages():
    connection = opened()
    large = wire.Join(TASK, 1, 1 << 20, held=bytes(32_000))
    for _ in range(MAX_QUEUED_BYTES // module.weight(large)):
        connection.post(large, 0.0)
    with pytest.raises(QueueFull):
        connection.post(large, 0.0)


def test_what_was_sent_makes_room_again():
    connection = opened()
    for _ in range(20):
        for number in range(MAX_QUEUED_MESSAGES // 2):
            connection.post(wire.Ask(bytes([number % 256]) * 32), 0.0)
        assert sum(map(len, frames(connection, 0.0))) == MAX_QUEUED_MESSAGES // 2


def test_silence_is_answered_with_a_ping_and_a_pong_keeps_the_connection():
    ours, theirs = opened(), opened()
    now = 0.0
    pings = 0
    while now < 200:
        now = min(ours.deadline(), theirs.deadline())
        for one, other in ((ours, theirs), (theirs, ours)):
            one.tick(now)
            for frame in frames(one, now):
                pings += sum(isinstance(message, wire.Ping) for message in frame)
                assert other.receive_frame(wire.encode_frame(frame), now) == []
        for one, other in ((ours, theirs), (theirs, ours)):
            for frame in frames(one, now):
                assert other.receive_frame(wire.encode_frame(frame), now) == []
    assert 15 <= pings <= 45


def test_a_silent_peer_is_pinged_at_ten_seconds_and_dead_at_thirty():
    connection = opened()
    pinged = []
    while (now := connection.deadline()) < DEAD_SECONDS:
        connection.tick(now)
        assert len(frames(connection, now)) == 1
        pinged.append(now)
    assert pinged == [PING_SECONDS, 2 * PING_SECONDS]
    with pytest.raises(PeerError, match="nothing heard"):
        connection.tick(DEAD_SECONDS)


def test_our_own_sending_is_no_sign_of_the_peers_life():
    connection = opened()
    connection.post(wire.Leave(TASK), 29.0)
    assert frames(connection, 29.0)
    with pytest.raises(PeerError, match="nothing heard"):
        connection.tick(DEAD_SECONDS)


def test_a_connection_without_a_hello_ends_after_ten_seconds():
    connection = Connection(5.0)
    connection.tick(5.0 + SETUP_SECONDS - 0.1)
    assert connection.deadline() == 5.0 + SETUP_SECONDS
    with pytest.raises(PeerError, match="no hello"):
        connection.tick(5.0 + SETUP_SECONDS)


def test_a_flood_of_pings_is_refused():
    connection = opened()

    def flood() -> None:
        for number in range(10_000):
            connection.receive_frame(wire.encode_frame([wire.Ping(number)]), number / 10_000)

    with pytest.raises(RemoteProtocolError, match="too many pings"):
        flood()
    assert len(frames(connection, 1.0)) <= 1


def test_a_flood_of_cheap_messages_is_refused():
    connection = opened()
    frame = wire.encode_frame([wire.Leave(TASK)] * 1000)

    def flood() -> None:
        for number in range(100):
            connection.receive_frame(frame, number / 100)

    with pytest.raises(RemoteProtocolError, match="too many messages"):
        flood()


def test_a_flood_of_empty_frames_is_refused():
    connection = opened()

    def flood() -> None:
        for number in range(100_000):
            connection.receive_frame(b"\x80", number / 100_000)

    with pytest.raises(RemoteProtocolError, match="too many messages"):
        flood()


def test_a_peer_that_reconnects_may_join_two_thousand_tasks_at_once():
    connection = opened()
    for start in range(0, 2000, 200):
        joins = [wire.Join(number.to_bytes(32, "big"), 1, 1 << 20) for number in range(start, start + 200)]
        assert len(connection.receive_frame(wire.encode_frame(list(joins)), 0.0)) == 200


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_garbage_raises_only_a_remote_protocol_error(data):
    connection = opened()
    with contextlib.suppress(RemoteProtocolError):
        connection.receive_frame(data, 1.0)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=40),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["t", "task", "pieces", "nonce"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
@settings(max_examples=100, deadline=None)
def test_well_formed_cbor_of_the_wrong_shape_raises_only_a_remote_protocol_error(value):
    connection = opened()
    with contextlib.suppress(RemoteProtocolError):
        connection.receive_frame(cbor2.dumps([value]), 1.0)


@pytest.mark.parametrize(
    "frame",
    [
        b"\x81" * 100_000,  # depth
        b"\x9b\x7f" + b"\xff" * 7,  # an array of 2**63 messages
        wire.encode([{"t": "have", "task": TASK, "pieces": list(range(5000))}]),
        wire.encode([{"t": "have", "task": TASK, "pieces": [1 << 18]}]),
        wire.encode([{"t": "leave", "task": b"short"}]),
        wire.encode([{"t": "leave", "task": TASK}] * 1025),
        wire.encode([{"t": "unheard-of"}]),
        wire.encode([{"t": "leave", "task": TASK}]) + b"\0",
        b"\x81\xd8\x23\x78\x40" + b"(" * 64,  # a regular expression to compile
        b"\x81\xd8\x1c\x80",  # a shared value
    ],
)
def test_what_breaks_a_bound_is_refused(frame):
    with pytest.raises(RemoteProtocolError):
        opened().receive_frame(frame, 0.0)


messages = st.one_of(
    st.builds(wire.Have, st.sampled_from([TASK, OTHER]), st.lists(st.integers(0, 100), min_size=1, max_size=5)),
    st.builds(wire.Lost, st.sampled_from([TASK, OTHER]), st.lists(st.integers(0, 100), min_size=1, max_size=5)),
    st.builds(wire.Leave, st.sampled_from([TASK, OTHER])),
    st.builds(wire.Join, st.just(TASK), st.just(1 << 30), st.just(1 << 22), held=st.integers(20_000, 32_768).map(bytes)),
)


def story(received: list[wire.Message]) -> list[object]:
    """Messages with `Have`s taken apart, so that merging does not show."""
    return [
        part
        for message in received
        for part in ([("have", message.task, p) for p in message.pieces] if isinstance(message, wire.Have) else [message])
    ]


@given(st.lists(st.tuples(messages, st.booleans(), st.floats(0, 0.06)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_whatever_is_posted_arrives_once_and_in_order(posts):
    ours, theirs = opened(), opened()
    now, received = 0.0, []
    for message, urgent, pause in posts:
        ours.post(message, now, urgent=urgent)
        now += pause
        while (frame := ours.next_frame(now)) is not None:
            received += theirs.receive_frame(frame, now)
    while (frame := ours.next_frame(now + LINGER_SECONDS)) is not None:
        received += theirs.receive_frame(frame, now)
    assert story(list(received)) == story([message for message, _, _ in posts])


def test_every_message_has_a_weight_near_its_size():
    signed = wire.Signed(bytes(120), bytes(32), bytes(64))
    for message in (
        wire.Have(TASK, list(range(4096))),
        wire.Join(TASK, 1, 1 << 20, held=bytes(32_768), seal=signed),
        wire.Claims(TASK, [signed] * 32, bytes(256)),
        wire.Peers(TASK, [bytes(300)] * 32),
        wire.SealOffer(TASK, signed),
    ):
        size = len(wire.encode(message))
        assert size / 2 <= module.weight(message) <= 3 * size + 512


def test_the_skew_is_how_far_the_peer_is_ahead():
    assert skew(hello(time=1100.0), 1000.0) == 100.0
