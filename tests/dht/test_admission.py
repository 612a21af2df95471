"""Tokens and budgets on their own."""

from __future__ import annotations

import random

from swarm.dht import messages
from swarm.dht.admission import (
    AMPLIFICATION,
    MAX_ADDRESSES,
    PROOF_LIFETIME,
    PROVEN_BURST,
    PROVEN_PER_SECOND,
    TOKEN_FRESH,
    TOKEN_ROTATION,
    UNPROVEN_PER_SECOND,
    Admission,
)
from swarm.edges import Address

HERE = Address("9.9.9.9", 7400)


def admission() -> Admission:
    return Admission(random.Random(1).randbytes)


def other(number: int) -> Address:
    return Address(f"8.{number >> 16}.{number >> 8 & 255}.{number & 255}", 7400)


def test_a_token_proves_the_address_it_was_given_to_and_no_other() -> None:
    gate = admission()
    token = gate.token(HERE, 0.0)
    for impostor in (Address("9.9.9.9", 7401), Address("9.9.9.8", 7400), Address("::1", 7400)):
        assert not gate.check_token(impostor, token, 1.0)
        assert not gate.is_proven(impostor, 1.0)
    assert gate.check_token(HERE, token, 1.0)
    assert gate.is_proven(HERE, 1.0)


def test_an_empty_or_cut_token_proves_nothing() -> None:
    gate = admission()
    token = gate.token(HERE, 0.0)
    for cut in (b"", token[:-1], token + b"\0"):
        assert not gate.check_token(HERE, cut, 1.0)


def test_a_token_lives_from_five_to_ten_minutes_whenever_it_was_given() -> None:
    for given in (0.0, 100.0, TOKEN_ROTATION - 1):
        gate = admission()
        gate.token(HERE, 0.0)
        token = gate.token(HERE, given)
        assert gate.check_token(HERE, token, given + TOKEN_FRESH)
        assert not gate.check_token(HERE, token, given + 2 * TOKEN_ROTATION)


def test_a_token_given_before_a_long_silence_is_worth_nothing_after_it() -> None:
    gate = admission()
    token = gate.token(HERE, 0.0)
    assert not gate.check_token(HERE, token, 10 * TOKEN_ROTATION)


def test_a_proof_of_address_expires() -> None:
    gate = admission()
    gate.prove(HERE, 0.0)
    assert gate.is_proven(HERE, PROOF_LIFETIME - 1)
    assert not gate.is_proven(HERE, PROOF_LIFETIME + 1)


def test_who_sent_nothing_gets_nothing() -> None:
    assert admission().room(HERE, 0.0) == 0


def test_unproven_bytes_out_never_exceed_three_times_bytes_in() -> None:
    rng = random.Random(2)
    gate = admission()
    received = sent = 0
    now = 0.0
    for _ in range(2000):
        now += rng.random()
        length = rng.randrange(20, 1200)
        received += length
        gate.received(HERE, length, now)
        room = gate.room(HERE, now)
        spent = min(room, rng.randrange(1, 1200))
        if room:
            gate.spend(HERE, spent, now)
            sent += spent
        assert sent <= AMPLIFICATION * received
    assert sent > received


def test_unused_credit_does_not_pile_up() -> None:
    gate = admission()
    for _ in range(1000):
        gate.received(HERE, 1200, 0.0)
    sent = 0
    for second in range(100):
        while room := gate.room(HERE, float(second)):
            gate.spend(HERE, room, float(second))
            sent += room
    assert sent <= AMPLIFICATION * messages.MAX_DATAGRAM_BYTES


def test_unproven_answers_come_five_a_second_at_most() -> None:
    gate = admission()
    sent = 0
    for step in range(1000):
        now = step / 100
        gate.received(HERE, 400, now)
        if gate.room(HERE, now):
            gate.spend(HERE, 10, now)
            sent += 1
    assert sent <= 10 * UNPROVEN_PER_SECOND + UNPROVEN_PER_SECOND + 1


def test_a_proven_address_has_whole_datagrams_within_its_rate() -> None:
    gate = admission()
    gate.prove(HERE, 0.0)
    sent = 0
    for step in range(20_000):
        now = step / 2000
        if gate.room(HERE, now) == messages.MAX_DATAGRAM_BYTES:
            gate.spend(HERE, 1200, now)
            sent += 1
    assert PROVEN_BURST < sent <= PROVEN_BURST + 10 * PROVEN_PER_SECOND + 1


def test_proving_again_does_not_refill_the_budget() -> None:
    gate = admission()
    token = gate.token(HERE, 0.0)
    sent = 0
    for _ in range(5000):
        assert gate.check_token(HERE, token, 1.0)
        if gate.room(HERE, 1.0):
            gate.spend(HERE, 1200, 1.0)
            sent += 1
    assert sent <= PROVEN_BURST


def test_a_flood_of_addresses_is_remembered_only_in_part() -> None:
    gate = admission()
    for number in range(MAX_ADDRESSES + 500):
        gate.received(other(number), 100, 0.0)
        gate.prove(Address("7.7.7.7", number % 60_000 + 1), 0.0)
    assert len(gate._unproven) == len(gate._proven) == MAX_ADDRESSES
