"""Messages between peers: golden bytes, round trips, and what a peer may not send."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import wire
from swarm.errors import LocalProtocolError, RemoteProtocolError

VECTORS = Path(__file__).parent / "vectors" / "wire.json"

TASK = bytes(range(32))
SIGNED = wire.Signed(b"a body", b"k" * 32, b"s" * 64)
MIB = 1024 * 1024

MESSAGES: dict[str, wire.Message] = {
    "hello": wire.Hello(1, b"b" * 16, 1_800_000_000.5, 7400, 7401, b"t" * 32, True, ["192.0.2.1", "2001:db8::1"], "swarm/1"),
    "join": wire.Join(TASK, 3 * MIB, MIB // 4, held=b"\xf0\x00", reply=True, private=True, reads=False, starving=True),
    "join_complete": wire.Join(TASK, 3 * MIB, MIB // 4, complete=True, seal=SIGNED),
    "ask": wire.Ask(TASK),
    "have": wire.Have(TASK, [0, 1, 255]),
    "lost": wire.Lost(TASK, [7]),
    "seal": wire.SealOffer(TASK, SIGNED),
    "claims": wire.Claims(TASK, [SIGNED, SIGNED], b"abcdefgh"),
    "unclaim": wire.Unclaim(TASK, [-1, 3]),
    "leave": wire.Leave(TASK),
    "peers": wire.Peers(TASK, [b"record one", b"record two"]),
    "ping": wire.Ping(1),
    "pong": wire.Pong((1 << 62) - 1),
}

OTHERS: dict[str, msgspec.Struct] = {
    "proof body": wire.ProofBody(TASK, 3 * MIB, MIB // 4, 11, b"d" * 32, 1_800_000_000),
    "seal body": wire.SealBody(TASK, 3 * MIB, MIB // 4, "sha256:" + "5e" * 32, b"r" * 32, 1_800_000_000),
    "claim body": wire.ClaimBody(TASK, 3 * MIB, MIB // 4, -1, 3.0, 1_800_000_000_000),
    "channel open": wire.ChannelOpen(b"n" * 20, b"b" * 16, b"m" * 32),
    "request": wire.Request(7, TASK, 11, 0, MIB // 4, True),
    "cancel": wire.Cancel(7),
    "reply": wire.Reply(7, wire.OK, MIB // 4, SIGNED, b"certificate"),
    "refusal": wire.Reply(8, wire.NOT_HELD),
}


# --- golden bytes -----------------------------------------------------------------------------------------------------


def test_there_is_a_golden_example_of_every_kind() -> None:
    golden = json.loads(VECTORS.read_text())
    assert set(golden) == set(MESSAGES) | set(OTHERS)
    assert {type(message) for message in MESSAGES.values()} == set(wire.Message.__args__)


@pytest.mark.parametrize("name", MESSAGES)
def test_the_bytes_of_every_message_never_change_silently(name: str) -> None:
    golden = bytes.fromhex(json.loads(VECTORS.read_text())[name])
    assert wire.encode_frame([MESSAGES[name]]) == golden
    assert wire.decode_frame(golden) == [MESSAGES[name]]


@pytest.mark.parametrize("name", OTHERS)
def test_the_bytes_of_bodies_and_channel_frames_never_change_silently(name: str) -> None:
    golden = bytes.fromhex(json.loads(VECTORS.read_text())[name])
    assert wire.encode(OTHERS[name]) == golden
    assert wire.decode(golden, type(OTHERS[name])) == OTHERS[name]


def test_a_channel_frame_tells_requests_from_cancels() -> None:
    for frame in (OTHERS["request"], OTHERS["cancel"], wire.Request(1, TASK, 0, 0, 5)):
        assert wire.decode_channel_frame(wire.encode(frame)) == frame


def test_messages_encoded_one_by_one_make_the_same_frame() -> None:
    for count in (0, 1, 23, 24, 255, 256, 1000):
        messages: list[wire.Message] = [wire.Ping(number) for number in range(count)]
        assert wire.join_frame([wire.encode(message) for message in messages]) == wire.encode_frame(messages)


# --- round trips ------------------------------------------------------------------------------------------------------

ids = st.binary(min_size=32, max_size=32)
signed = st.builds(wire.Signed, st.binary(max_size=512), ids, st.binary(min_size=64, max_size=64))
numbers = st.lists(st.integers(0, wire.MAX_PIECES - 1), max_size=20)
any_message = st.one_of(
    st.builds(
        wire.Join,
        ids,
        st.integers(0, 1 << 50),
        st.sampled_from([1 << power for power in range(18, 23)]),
        held=st.binary(max_size=100),
        complete=st.booleans(),
        seal=st.none() | signed,
        reply=st.booleans(),
        private=st.booleans(),
        reads=st.booleans(),
        starving=st.booleans(),
    ),
    st.builds(wire.Have, ids, numbers),
    st.builds(wire.Claims, ids, st.lists(signed, max_size=3), st.binary(max_size=256)),
    st.builds(wire.Unclaim, ids, st.lists(st.integers(-1, wire.MAX_PIECES - 1), max_size=20)),
    st.builds(wire.Peers, ids, st.lists(st.binary(max_size=400), max_size=5)),
    st.builds(wire.Ask, ids),
)


@given(st.lists(any_message, max_size=5))
def test_every_frame_survives_the_wire(messages: list[wire.Message]) -> None:
    assert wire.decode_frame(wire.encode_frame(messages)) == messages


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error_and_nothing_else(garbage: bytes) -> None:
    for read in (wire.decode_frame, wire.decode_channel_frame, lambda data: wire.decode(data, wire.Reply)):
        try:
            read(garbage)
        except RemoteProtocolError:
            continue


@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_a_damaged_frame_is_a_protocol_error_or_another_valid_one(name: str, data: Any) -> None:
    frame = bytearray(wire.encode_frame([MESSAGES[name]]))
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(RemoteProtocolError):
        wire.decode_frame(bytes(frame))


# --- what a peer may not send -----------------------------------------------------------------------------------------


def frame_of(**fields: Any) -> bytes:
    return cbor2.dumps([fields], canonical=True)


JOIN = {"t": "join", "task": TASK, "length": 5, "piece_length": MIB}

VIOLATIONS = {
    "no array": cbor2.dumps({"t": "ask", "task": TASK}),
    "unknown kind": frame_of(t="format", task=TASK),
    "no kind": frame_of(task=TASK),
    "short task": frame_of(t="ask", task=TASK[:31]),
    "long task": frame_of(t="ask", task=TASK + b"x"),
    "text for bytes": frame_of(t="ask", task="x" * 32),
    "a length below zero": frame_of(**{**JOIN, "length": -1}),
    "a length beyond a petabyte": frame_of(**{**JOIN, "length": (1 << 50) + 1}),
    "a length that is a float": frame_of(**{**JOIN, "length": 5.0}),
    "tiny pieces": frame_of(**{**JOIN, "piece_length": 1}),
    "huge pieces": frame_of(**{**JOIN, "piece_length": 1 << 23}),
    "a bitmap too long": frame_of(**JOIN, held=bytes(wire.MAX_PIECES // 8 + 1)),
    "too many pieces": frame_of(t="have", task=TASK, pieces=[0] * 4097),
    "a piece beyond the last": frame_of(t="have", task=TASK, pieces=[wire.MAX_PIECES]),
    "a piece below zero": frame_of(t="have", task=TASK, pieces=[-1]),
    "unclaiming minus two": frame_of(t="unclaim", task=TASK, pieces=[-2]),
    "too many claims": frame_of(t="claims", task=TASK, claims=[[b"", b"k" * 32, b"s" * 64]] * 33),
    "a body too long": frame_of(t="claims", task=TASK, claims=[[bytes(513), b"k" * 32, b"s" * 64]]),
    "a short key": frame_of(t="seal", task=TASK, seal=[b"", b"k" * 31, b"s" * 64]),
    "a short signature": frame_of(t="seal", task=TASK, seal=[b"", b"k" * 32, b"s" * 63]),
    "too many records": frame_of(t="peers", task=TASK, records=[b""] * 33),
    "a record too long": frame_of(t="peers", task=TASK, records=[bytes(401)]),
    "too many messages": cbor2.dumps([{"t": "ping", "nonce": 1}] * 1025),
    "a number too large": frame_of(t="ping", nonce=1 << 62),
    "a bignum": bytes.fromhex("81a261746470696e67656e6f6e6365c249010000000000000000"),
    "trailing bytes": wire.encode_frame([wire.Ping(1)]) + b"\0",
    "half a frame": wire.encode_frame([wire.Ping(1)])[:-1],
    "duplicate keys": bytes.fromhex("81a3617464" + "70696e67" + "656e6f6e636501" + "656e6f6e636502"),
    "an indefinite array": bytes.fromhex("9fff"),
    "an indefinite string": bytes.fromhex("815f4161ff"),
    "a date": cbor2.dumps([{"t": "ping", "nonce": cbor2.CBORTag(1, 0)}]),
    "a regular expression": cbor2.dumps([{"t": "ping", "nonce": cbor2.CBORTag(35, "(a+)+$")}]),
    "a back reference": bytes.fromhex("82d81c80d81d00"),
    "empty": b"",
    "deep": b"\x81" * 100_000 + b"\x00",
    "an array of 2^63 elements": bytes.fromhex("9b8000000000000000"),
    "a string of 2^63 bytes": bytes.fromhex("5b8000000000000000"),
    "too long": bytes(wire.MAX_FRAME_BYTES + 1),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_each_violation_is_refused(name: str) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode_frame(VIOLATIONS[name])


CHANNEL_VIOLATIONS = {
    "a piece below the table": [1, TASK, -2, 0, 5],
    "a negative offset": [1, TASK, 0, -1, 5],
    "an offset beyond a piece": [1, TASK, 0, 4 * MIB + 1, 5],
    "a length beyond any": [1, TASK, 0, 0, wire.MAX_PIECES * 32 + 1],
    "a request id too large": [1 << 32, TASK, 0, 0, 5],
    "a cancel below zero": [-1],
    "nothing": [],
    "two numbers": [1, 2],
    "a map": {"id": 1},
}


@pytest.mark.parametrize("name", CHANNEL_VIOLATIONS)
def test_each_violation_of_the_pieces_channel_is_refused(name: str) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode_channel_frame(cbor2.dumps(CHANNEL_VIOLATIONS[name]))


def test_a_channel_frame_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(RemoteProtocolError, match="too long"):
        wire.decode_channel_frame(bytes(wire.MAX_CHANNEL_FRAME_BYTES + 1))


@pytest.mark.parametrize("lease", [0.0, -1.0, 120.1, float("inf"), float("nan")])
def test_a_claim_whose_lease_is_no_lease_is_refused(lease: float) -> None:
    body = cbor2.dumps([TASK, 5, MIB, 0, lease, 1])
    with pytest.raises(RemoteProtocolError):
        wire.decode(body, wire.ClaimBody)


def test_a_newer_peer_may_add_keys_and_fields() -> None:
    assert wire.decode_frame(frame_of(t="ask", task=TASK, colour="green")) == [wire.Ask(TASK)]
    assert wire.decode(cbor2.dumps([7, 0, 0, None, b"", "more"]), wire.Reply) == wire.Reply(7, 0)


def test_we_never_send_a_frame_that_others_refuse() -> None:
    with pytest.raises(LocalProtocolError):
        wire.encode_frame([wire.Join(TASK, 1, MIB, held=bytes(32768))] * 2)
