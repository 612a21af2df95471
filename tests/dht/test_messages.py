"""Datagrams: golden bytes, strictness, and the MAC."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import wire
from swarm.dht import messages
from swarm.dht.messages import (
    Announce,
    ContactBody,
    Contacts,
    FindNode,
    FindProviders,
    Message,
    Ping,
    Pong,
    Providers,
    Stored,
    Withdraw,
)
from swarm.dht.records import sign_provider, sign_withdrawal
from swarm.edges import State
from swarm.errors import RemoteProtocolError
from tests.dht.engines import Clock, Wire, address, engine, member

VECTORS = Path(__file__).parent.parent / "vectors" / "dht.json"

TX, ID, TOKEN, KEY = b"t" * 8, b"i" * 20, b"k" * 8, bytes(range(20))
SEEN = bytes((192, 0, 2, 7, 28, 232))
SEEN6 = bytes.fromhex("20010db8000000000000000000000007") + SEEN[4:]


def examples() -> dict[str, Message]:
    signer = member(1)
    record = sign_provider(signer, KEY, ["192.0.2.7", "2001:db8::7"], 7400, State.COMPLETE, 12, 1_800_000_000)
    withdrawal = sign_withdrawal(signer, KEY, 13, 1_800_000_000)
    proof = signer.sign("contact", ContactBody(b"n" * 16, b"a" * 32, SEEN))
    return {
        "ping": Ping(TX, ID, b"", signer.public_key, b"n" * 16, b"\0" * 4),
        "find_node": FindNode(TX, ID, TOKEN, KEY),
        "find_providers": FindProviders(TX, ID, TOKEN, KEY, 6),
        "announce": Announce(TX, ID, TOKEN, record, 12),
        "withdraw": Withdraw(TX, ID, TOKEN, withdrawal),
        "pong": Pong(TX, SEEN, TOKEN, 1_800_000_000, proof),
        "contacts": Contacts(TX, SEEN6, TOKEN, 1_800_000_000, [(ID, SEEN), (KEY, SEEN6)]),
        "providers": Providers(TX, SEEN, TOKEN, 1_800_000_000, [(ID, SEEN)], 30, 6, [record]),
        "stored": Stored(TX, SEEN, TOKEN, 1_800_000_000, messages.FULL, 2, 0, [record]),
    }


@pytest.mark.parametrize("name", examples())
def test_the_bytes_of_every_message_never_change_silently(name: str) -> None:
    golden = json.loads(VECTORS.read_text())
    datagram = messages.seal(examples()[name], member(1))
    assert datagram.hex() == golden[name]
    assert messages.read(bytes.fromhex(golden[name])) == examples()[name]
    assert set(golden) == set(examples())


def test_a_newer_minor_version_may_append_elements() -> None:
    body = wire.encode([2, TX, ID, TOKEN, KEY, b"", "something new"])
    assert messages.read(bytes(messages.HEADER_BYTES) + body) == FindNode(TX, ID, TOKEN, KEY)


def test_every_flipped_bit_of_a_datagram_is_noticed() -> None:
    us = member(1)
    datagram = messages.seal(examples()["find_node"], us)
    assert messages.authentic(datagram, us)
    for place in range(8 * len(datagram)):
        flipped = bytearray(datagram)
        flipped[place // 8] ^= 1 << place % 8
        assert not messages.authentic(bytes(flipped), us)


def test_a_datagram_of_another_network_is_not_authentic() -> None:
    assert not messages.authentic(messages.seal(examples()["find_node"], member(1, "theirs")), member(2, "ours"))


def test_a_datagram_beyond_the_limit_is_not_authentic() -> None:
    us = member(1)
    fits = FindNode(TX, ID, TOKEN, KEY, bytes(1200 - 18 - 1 - 1 - 9 - 21 - 9 - 21 - 3))
    assert len(messages.seal(fits, us)) == 1200
    assert messages.authentic(messages.seal(fits, us), us)
    too_long = FindNode(TX, ID, TOKEN, KEY, fits.padding + b"\0")
    assert not messages.authentic(messages.seal(too_long, us), us)


@pytest.mark.parametrize(
    "value",
    [
        [2, TX[:7], ID, TOKEN, KEY],
        [2, TX, ID + b"i", TOKEN, KEY],
        [2, TX, ID, TOKEN + b"k", KEY],
        [2, TX, ID, TOKEN],
        [3, TX, ID, TOKEN, KEY, -1],
        [3, TX, ID, TOKEN, KEY, 4096],
        [4, TX, ID, TOKEN, b"r" * 301, 0],
        [9, TX],
        [18, TX, SEEN, TOKEN, 0, [[ID, SEEN]] * 17],
        [18, TX, SEEN[:5], TOKEN, 0, []],
        [19, TX, SEEN, TOKEN, 0, [], 1, 0, [b"r"] * 17],
        [],
        {},
        "text",
        None,
    ],
    ids=repr,
)
def test_what_is_out_of_bounds_is_malformed(value: object) -> None:
    with pytest.raises(RemoteProtocolError):
        messages.read(bytes(messages.HEADER_BYTES) + wire.encode(value))


@given(st.binary(max_size=200))
def test_garbage_raises_only_remote_protocol_error(garbage: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        messages.read(bytes(messages.HEADER_BYTES) + garbage + b"\xff")


packed = st.binary(min_size=6, max_size=6) | st.binary(min_size=18, max_size=18)
ids = st.binary(min_size=20, max_size=20)


@given(
    st.builds(
        Providers,
        st.binary(min_size=8, max_size=8),
        packed,
        st.binary(max_size=8),
        st.integers(0, (1 << 40) - 1),
        st.lists(st.tuples(ids, packed), max_size=8),
        st.integers(0, (1 << 32) - 1),
        st.integers(0, 4095),
        st.lists(st.binary(max_size=300), max_size=3),
    )
)
def test_providers_survive_the_wire(answer: Providers) -> None:
    datagram = messages.seal(answer, member(1))
    assert messages.read(datagram) == answer


def test_ten_thousand_random_datagrams_never_raise_and_leave_nothing_behind() -> None:
    rng = random.Random(5)
    net = Wire(Clock())
    victim = net.add(1)
    net.add(2)
    net.introduce(address(1), address(2))
    seeds = [messages.seal(message, member(1)) for message in examples().values()]
    for number in range(10_000):
        if number % 2:
            datagram = rng.randbytes(rng.randrange(1300))
        else:
            changed = bytearray(rng.choice(seeds))
            for _ in range(rng.randrange(1, 5)):
                changed[rng.randrange(messages.HEADER_BYTES, len(changed))] = rng.randrange(256)
            body = bytes((messages.VERSION,)) + bytes(changed[messages.HEADER_BYTES :])
            epoch, mac = victim.membership.datagram_mac(body)
            datagram = bytes((messages.VERSION, epoch)) + mac + body[1:]
        victim.receive(datagram, address(rng.randrange(2, 250)), net.clock.now)
        net.clock.now += 0.001
    dropped = victim.statistics(net.clock.now).dropped
    assert dropped["malformed"] > 500
    assert dropped["not authentic"] > 4000
    assert [contact.address for contact in victim.table.contacts()] == [address(2)]


def test_nobody_outside_the_network_gets_an_answer() -> None:
    inside = engine(1, Clock())
    outside = member(9, "elsewhere")
    inside.receive(messages.seal(FindNode(TX, ID, b"", KEY, bytes(300)), outside), address(9), 1000.0)
    assert not inside.outgoing
