"""Engines that talk, and what a liar, a replayer and a flood achieve."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from swarm import wire
from swarm.dht import messages, rpc
from swarm.dht.addresses import pack
from swarm.dht.admission import PROVEN_BURST, TOKEN_ROTATION, UNPROVEN_RATE
from swarm.dht.messages import (
    Announce,
    Answer,
    ContactBody,
    FindNode,
    FindProviders,
    Ping,
    Pong,
    Providers,
    Query,
    Stored,
    Withdraw,
)
from swarm.dht.records import sign_withdrawal
from swarm.dht.routing import Contact
from swarm.dht.rpc import Engine
from swarm.edges import Address
from tests.dht.engines import WALL, Wire, address, engine, kinds, member, record

KEY = bytes(range(20))
A, B, C = address(1), address(2), address(3)


def ask(net: Wire, asker: Address, asked: Address, build: rpc.Build, expect: type[Answer]) -> list[Answer | None]:
    answers: list[Answer | None] = []
    net.engines[asker].ask(build, expect, asked, net.clock.now, answers.append)
    net.settle()
    return answers


def announce(raw: bytes, sender: Engine, cursor: int = 0) -> rpc.Build:
    return lambda tx, token, padding: Announce(tx, sender.node_id, token, raw, cursor, padding)


def find_providers(sender: Engine, key: bytes = KEY, cursor: int = 0) -> rpc.Build:
    return lambda tx, token, padding: FindProviders(tx, sender.node_id, token, key, cursor, padding)


def pair() -> tuple[Wire, Engine, Engine]:
    net = Wire()
    return net, net.add(1), net.add(2)


# --- who enters the table -------------------------------------------------------------------------------------------


def test_two_nodes_that_talk_know_each_other() -> None:
    net, one, other = pair()
    net.introduce(A, B)
    assert [contact.id for contact in one.table.contacts()] == [other.node_id]
    assert [contact.id for contact in other.table.contacts()] == [one.node_id]
    assert one.own.hosts() == (A.host,)


def test_a_query_alone_does_not_enter_the_table() -> None:
    net, one, other = pair()
    net.tap = lambda data, source, destination: "Pong" not in kinds([data])
    net.introduce(A, B)
    assert len(one.table) == len(other.table) == 0


def test_two_thousand_ids_pinging_from_one_address_occupy_at_most_one_slot() -> None:
    """The stock table gave 675 slots to this."""
    victim = engine(1, (net := Wire()).clock)
    net.engines[A] = victim
    for number in range(2000):
        sybil = member(number + 10)
        nonce = number.to_bytes(16, "big")
        ping = Ping(number.to_bytes(8, "big"), sybil.node_id, b"", sybil.public_key, nonce, bytes(300))
        victim.receive(messages.seal(ping, sybil), B, net.clock.now)
        while victim.outgoing:
            datagram, _ = victim.outgoing.popleft()
            message = messages.read(datagram)
            if isinstance(message, Ping):
                proof = sybil.sign("contact", ContactBody(message.nonce, message.key, pack(A)))
                pong = Pong(message.tx, pack(A), b"", WALL, proof)
                victim.receive(messages.seal(pong, sybil), B, net.clock.now)
        net.clock.now += 0.05
        victim.on_time(net.clock.now)
    assert len(victim.table) == 1


def test_an_id_that_does_not_match_its_key_is_dropped() -> None:
    net, one, other = pair()
    net.introduce(A, B)
    query = FindNode(b"t" * 8, b"\xee" * 20, b"", KEY, bytes(300))
    liar = net.add(3)
    liar.outgoing.append((messages.seal(query, liar.membership), A))
    net.settle()
    assert [contact.id for contact in one.table.contacts()] == [other.node_id]
    assert one.statistics(net.clock.now).dropped["bad proof"] == 1


Forge = Callable[[Engine, ContactBody], wire.Signed]


def tamper(net: Wire, signer: Engine, forge: Forge) -> None:
    """Let B's first pong carry another proof."""
    done = False

    def tap(data: bytes, source: Address, destination: Address) -> bool:
        nonlocal done
        message = messages.read(data)
        if not isinstance(message, Pong) or source != B or done:
            return True
        done = True
        proof = forge(signer, wire.decode(message.proof.body, ContactBody))
        pong = Pong(message.tx, message.observed, message.token, message.time, proof)
        net.engines[destination].receive(messages.seal(pong, signer.membership), source, net.clock.now)
        return False

    net.tap = tap


def resigned(**changes: bytes) -> Forge:
    return lambda signer, body: signer.membership.sign("contact", msgspec.structs.replace(body, **changes))


def in_the_name_of_another(signer: Engine, body: ContactBody) -> wire.Signed:
    own = signer.membership.sign("contact", body)
    return wire.Signed(own.body, member(77).public_key, own.signature)


@pytest.mark.parametrize(
    "forge",
    [
        resigned(nonce=b"x" * 16),
        resigned(asker=b"x" * 32),
        resigned(observed=b"half an"),
        in_the_name_of_another,
        lambda signer, body: signer.membership.sign("provider", body),
        lambda signer, body: member(2, "theirs").sign("contact", body),
    ],
    ids=["an old nonce", "made for another", "half an address", "another's name", "another kind", "another network"],
)
def test_a_proof_that_is_not_for_our_question_is_refused(forge: Forge) -> None:
    net, one, other = pair()
    tamper(net, other, forge)
    refused: list[Contact | None] = []
    one.ask_for_proof(B, net.clock.now, refused.append)
    net.settle()
    assert refused == [None]


def test_an_honest_proof_passes_the_same_hands() -> None:
    net, one, other = pair()
    tamper(net, other, resigned())
    proven: list[Contact | None] = []
    one.ask_for_proof(B, net.clock.now, proven.append)
    net.settle()
    assert [contact.id for contact in proven if contact] == [other.node_id]


def test_a_relayed_proof_does_not_put_an_honest_id_at_the_relays_address() -> None:
    """C passes A's ping on to B from its own address; B's answer says where it came from, and that is not A."""
    net, one, other = pair()
    for number in (4, 5):
        net.add(number)
        net.introduce(A, address(number))
    relay = net.add(3)

    def tap(data: bytes, source: Address, destination: Address) -> bool:
        if destination == C and source == A:
            other.receive(data, C, net.clock.now)
            return False
        if destination == C and source == B:
            one.receive(data, C, net.clock.now)
            return False
        return True

    net.tap = tap
    proofs: list[Contact | None] = []
    one.ask_for_proof(C, net.clock.now, proofs.append)
    net.settle()
    assert proofs == [None]
    assert one.table.get(other.node_id) is None
    assert relay.node_id != other.node_id


def test_knocking_at_our_own_door_proves_nobody() -> None:
    net, one, _ = pair()
    own: list[Contact | None] = []
    one.ask_for_proof(A, net.clock.now, own.append)
    net.settle()
    assert own == [None]
    assert len(one.table) == 0
    sent = one.statistics(net.clock.now).datagrams_out
    one.ask_for_proof(A, net.clock.now, own.append)
    assert own == [None, None]
    assert one.statistics(net.clock.now).datagrams_out == sent


# --- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_from_the_wrong_place_is_ignored() -> None:
    net, one, other = pair()
    net.engines[C] = net.engines.pop(B)
    net.tap = lambda data, source, destination: True
    answers: list[Answer | None] = []
    one.ask(find_providers(one), Providers, B, net.clock.now, answers.append)
    datagram, _ = one.outgoing.popleft()
    other.receive(datagram, A, net.clock.now)
    net.settle()
    assert answers == []
    assert one.statistics(net.clock.now).dropped["unasked answer"] == 1


def test_an_answer_to_a_transaction_we_did_not_begin_is_ignored() -> None:
    net, one, other = pair()
    answers: list[Answer | None] = []
    one.ask(find_providers(one), Providers, B, net.clock.now, answers.append)
    forged = Providers(b"guessed!", pack(A), b"", WALL, [], 0, 0, [])
    one.receive(messages.seal(forged, other.membership), B, net.clock.now)
    assert answers == []


def test_an_answer_of_another_kind_is_ignored() -> None:
    net, one, other = pair()
    answers: list[Answer | None] = []
    one.ask(find_providers(one), Providers, B, net.clock.now, answers.append)
    query = messages.read(one.outgoing.popleft()[0])
    forged = Stored(query.tx, pack(A), b"", WALL, messages.STORED)
    one.receive(messages.seal(forged, other.membership), B, net.clock.now)
    assert answers == []


def test_an_answer_replayed_is_ignored() -> None:
    net, one, _ = pair()
    seen: list[bytes] = []
    net.tap = lambda data, source, destination: not seen.append(data)  # type: ignore[func-returns-value]  # listens
    answers = ask(net, A, B, find_providers(one), Providers)
    for datagram in seen:
        one.receive(datagram, B, net.clock.now)
    assert len(answers) == 1


def test_a_lost_question_is_asked_again_before_its_contact_counts_as_silent() -> None:
    net, one, _ = pair()
    net.introduce(A, B)
    lose = iter([False])
    net.tap = lambda data, source, destination: next(lose, True)
    answers = ask(net, A, B, find_providers(one), Providers)
    assert answers == []
    net.pass_time(rpc.FIRST_TIMEOUT)
    assert len(answers) == 1
    assert answers[0] is not None
    assert len(one.table) == 1


def test_an_answer_to_the_first_question_after_the_second_was_sent_counts() -> None:
    net, one, other = pair()
    answers: list[Answer | None] = []
    one.ask(find_providers(one), Providers, B, net.clock.now, answers.append)
    first, _ = one.outgoing.popleft()
    net.clock.now += rpc.FIRST_TIMEOUT
    one.on_time(net.clock.now)
    one.outgoing.clear()
    other.receive(first, A, net.clock.now)
    net.settle()
    assert len(answers) == 1
    assert answers[0] is not None
    assert one.next_deadline() == float("inf")


def test_a_silent_contact_leaves_the_table_and_the_question_ends() -> None:
    net, one, _ = pair()
    net.introduce(A, B)
    lost: list[Contact] = []
    one.on_lost = lost.append
    del net.engines[B]
    answers = ask(net, A, B, find_providers(one), Providers)
    net.pass_time(2 * rpc.LONGEST_TIMEOUT)
    assert answers == [None]
    assert len(one.table) == 0
    assert one.table.is_silent(B, net.clock.now)
    assert [contact.address for contact in lost] == [B]
    assert one._pending == {}


def test_a_stranger_that_does_not_prove_itself_is_asked_once_and_not_called_silent() -> None:
    """Its source may be forged: the honest node there must not be shunned for it."""
    net, one, other = pair()
    stranger = FindNode(b"t" * 8, other.node_id, b"", KEY, bytes(300))
    net.tap = lambda data, source, destination: False
    one.receive(messages.seal(stranger, other.membership), B, net.clock.now)
    net.pass_time(10.0)
    assert one.statistics(net.clock.now).queries == {"FindNode": 1}
    assert one.statistics(net.clock.now).datagrams_out == 2
    assert not one.table.is_silent(B, net.clock.now)


def test_a_silent_contact_that_comes_back_with_a_token_is_asked_again() -> None:
    net, one, _ = pair()
    net.introduce(A, B)
    one.table.fell_silent(B, net.clock.now)
    one.table.wants = lambda node_id, address: False  # type: ignore[method-assign]  # its bucket has filled meanwhile
    ask(net, B, A, find_providers(net.engines[B]), Providers)
    assert not one.table.is_silent(B, net.clock.now)


def test_the_round_trip_is_timed_from_the_question_that_was_answered() -> None:
    net, one, other = pair()
    one.ask(find_providers(one), Providers, B, net.clock.now, lambda answer: None)
    question, _ = one.outgoing.popleft()
    net.clock.now += 0.4
    other.receive(question, A, net.clock.now)
    net.settle()
    # What followed at once (its proof) has pulled the mean down by an eighth.
    assert one._round_trips[B] == pytest.approx(0.35)
    assert one.slow_after(B) == pytest.approx(0.7)


def test_time_outs_follow_the_round_trip_within_their_bounds() -> None:
    _, one, _ = pair()
    assert one._timeout(B) == rpc.FIRST_TIMEOUT
    one._learn_round_trip(B, 0.001)
    assert one._timeout(B) == rpc.LEAST_TIMEOUT
    assert one._timeout(address(9)) == rpc.FIRST_TIMEOUT / 2
    one._learn_round_trip(C, 0.2)
    assert one._timeout(C) == pytest.approx(0.8)
    one._learn_round_trip(A, 5.0)
    assert one._timeout(A) == rpc.LONGEST_TIMEOUT


# --- tokens and budgets ---------------------------------------------------------------------------------------------


def test_an_announcement_is_stored_with_the_token_of_an_earlier_answer_and_shows_the_others() -> None:
    net, one, other = pair()
    third = net.add(3)
    raw = record(1, KEY)
    (refused,) = ask(net, A, B, announce(raw, one), Stored)
    assert isinstance(refused, Stored)
    assert refused.status == messages.BAD_TOKEN
    (stored,) = ask(net, A, B, announce(raw, one), Stored)
    assert isinstance(stored, Stored)
    assert (stored.status, stored.count, stored.records) == (messages.STORED, 1, [])
    ask(net, C, B, announce(record(3, KEY), third), Stored)
    (stored,) = ask(net, C, B, announce(record(3, KEY), third), Stored)
    assert isinstance(stored, Stored)
    assert (stored.count, stored.records) == (2, [raw])
    assert len(other.store) == 2


def test_a_token_of_another_address_does_not_store() -> None:
    net, one, other = pair()
    ask(net, A, B, find_providers(one), Providers)
    token = one._tokens[B][0]
    stolen = Announce(b"t" * 8, one.node_id, token, record(1, KEY), 0, b"")
    other.receive(messages.seal(stolen, one.membership), C, net.clock.now)
    assert len(other.store) == 0


def test_a_token_is_accepted_for_two_rotations_and_no_longer() -> None:
    net, one, other = pair()
    ask(net, A, B, find_providers(one), Providers)
    token = one._tokens[B][0]

    def stores(after: float) -> bool:
        fresh = engine(2, net.clock)
        fresh._admission = other._admission
        query = Announce(b"t" * 8, one.node_id, token, record(1, KEY, issued=int(WALL + after)), 0, b"")
        fresh.receive(messages.seal(query, one.membership), A, after)
        return len(fresh.store) == 1

    start = net.clock.now
    for each in (0.0, TOKEN_ROTATION - 1, TOKEN_ROTATION + 1):
        net.clock.now = start + each
        assert stores(net.clock.now)
    net.clock.now = start + 2 * TOKEN_ROTATION + 1
    assert not stores(net.clock.now)


def test_an_announcement_from_the_future_or_the_past_is_not_stored() -> None:
    net, one, other = pair()
    ask(net, A, B, find_providers(one), Providers)
    for issued in (int(WALL + net.clock.now) + 400, int(WALL + net.clock.now) - 700):
        (answer,) = ask(net, A, B, announce(record(1, KEY, issued=issued), one), Stored)
        assert isinstance(answer, Stored)
        assert answer.status == messages.INVALID
    assert len(other.store) == 0


def test_an_announcement_with_a_bad_signature_gets_no_answer() -> None:
    net, one, other = pair()
    ask(net, A, B, find_providers(one), Providers)
    raw = bytearray(record(1, KEY))
    raw[-1] ^= 1
    assert ask(net, A, B, announce(bytes(raw), one), Stored) == []
    assert len(other.store) == 0
    assert other.statistics(net.clock.now).dropped["bad signature"] == 1


def test_a_withdrawal_reaches_the_store() -> None:
    net, one, other = pair()
    ask(net, A, B, find_providers(one), Providers)
    ask(net, A, B, announce(record(1, KEY), one), Stored)
    assert len(other.store) == 1
    raw = sign_withdrawal(member(1), KEY, 2, int(WALL + net.clock.now))
    (answer,) = ask(net, A, B, lambda tx, token, padding: Withdraw(tx, one.node_id, token, raw, padding), Stored)
    assert isinstance(answer, Stored)
    assert answer.status == messages.STORED
    assert len(other.store) == 0


def test_a_withdrawal_of_long_ago_is_not_believed() -> None:
    net, one, other = pair()
    ask(net, A, B, find_providers(one), Providers)
    raw = sign_withdrawal(member(1), KEY, 2, int(WALL + net.clock.now) - 7201)
    (answer,) = ask(net, A, B, lambda tx, token, padding: Withdraw(tx, one.node_id, token, raw, padding), Stored)
    assert isinstance(answer, Stored)
    assert answer.status == messages.INVALID
    assert not other.store._tombstones


def crowded() -> tuple[Wire, Engine]:
    """A victim with a full table and a full page of records: as much to say as possible."""
    net = Wire()
    victim = net.add(1)
    for number in range(2, 40):
        net.add(number)
        net.introduce(A, address(number))
    for number in range(50, 90):
        raw = record(number, KEY, issued=int(WALL + net.clock.now))
        victim.store.put(victim.verifier.provider(raw), str(number), 600, net.clock.now)
    assert len(victim.table) > 20
    return net, victim


def queries(padding: int) -> list[Query]:
    sender = member(200)
    tx, pad, raw = b"t" * 8, bytes(padding), record(200, KEY)
    return [
        Ping(tx, sender.node_id, b"", sender.public_key, b"n" * 16, pad),
        FindNode(tx, sender.node_id, b"", KEY, pad),
        FindProviders(tx, sender.node_id, b"", KEY, 0, pad),
        FindProviders(tx, sender.node_id, b"", KEY, 6, pad),
        Announce(tx, sender.node_id, b"", raw, 0, pad),
        Withdraw(tx, sender.node_id, b"", raw, pad),
    ]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("padding", [0, 100, 300, 900])
def test_no_query_of_an_unproven_address_is_answered_with_more_than_three_times_its_bytes(number: int, padding: int) -> None:
    """The stock DHT gave x10.5 to x770."""
    net, victim = crowded()
    query = messages.seal(queries(padding)[number], member(200))
    if len(query) > messages.MAX_DATAGRAM_BYTES:
        query = messages.seal(queries(700)[number], member(200))
    stranger = Address("8.8.1.1", 7400)
    received = 0
    for _ in range(5):
        victim.receive(query, stranger, net.clock.now)
        received += len(query)
        sent = sum(len(data) for data, where in victim.outgoing if where == stranger)
        assert sent <= 3 * received
    net.clock.now += 5.0
    victim.on_time(net.clock.now)
    assert sum(len(data) for data, where in victim.outgoing if where == stranger) <= 3 * received
    assert victim.outgoing


def test_a_first_query_of_ours_is_long_enough_for_a_whole_answer() -> None:
    net, _ = crowded()
    asker = net.add(250)
    (answer,) = ask(net, address(250), A, find_providers(asker), Providers)
    assert isinstance(answer, Providers)
    assert (len(answer.contacts), answer.count) == (8, 40)
    assert len(answer.records) >= 3
    (again,) = ask(net, address(250), A, find_providers(asker, cursor=answer.cursor), Providers)
    assert isinstance(again, Providers)
    assert len(again.records) >= 6


def test_a_newcomer_is_asked_who_it_is_however_long_its_first_answer_may_be() -> None:
    net, victim = crowded()
    newcomer = member(200)
    for padding in range(100, 380, 5):
        query = FindProviders(b"t" * 8, newcomer.node_id, b"", KEY, 0, bytes(padding))
        victim.receive(messages.seal(query, newcomer), Address(f"8.8.8.{padding // 5}", 7400), net.clock.now)
        assert kinds([datagram for datagram, _ in victim.outgoing]) == ["Providers", "Ping"]
        victim.outgoing.clear()


def test_an_asker_is_not_told_its_own_address() -> None:
    net, _ = crowded()
    asker = net.engines[address(5)]
    (answer,) = ask(net, address(5), A, find_providers(asker, asker.node_id), Providers)
    assert isinstance(answer, Providers)
    assert len(answer.contacts) == 8
    assert asker.node_id not in {node_id for node_id, _ in answer.contacts}


def test_an_unproven_address_gets_five_answers_a_second() -> None:
    net, victim = crowded()
    query = messages.seal(queries(300)[1], member(200))
    stranger = Address("8.8.1.1", 7400)
    victim._vetted[stranger] = float("inf")  # count answers only, not the question who it is
    for _ in range(1000):
        victim.receive(query, stranger, net.clock.now)
        net.clock.now += 0.01
    assert 50 <= len(victim.outgoing) <= 56


def test_a_flood_from_forged_sources_gets_no_more_out_than_the_common_budget() -> None:
    net, victim = crowded()
    query = messages.seal(queries(300)[1], member(200))
    seconds, sent = 2, 0
    for number in range(10_000 * seconds):
        victim.receive(query, Address(f"8.{number >> 16}.{number >> 8 & 255}.{number & 255}", 7400), net.clock.now)
        net.clock.now += 1e-4
        sent += sum(len(data) for data, _ in victim.outgoing)
        victim.outgoing.clear()
    assert 0 < sent <= UNPROVEN_RATE * (seconds + 1) + messages.MAX_DATAGRAM_BYTES
    assert len(victim._admission._unproven) <= 8192
    assert len(victim._pending) <= 2 * rpc.MAX_VETTING


def test_a_proven_address_whose_queries_are_replayed_is_not_flooded() -> None:
    net, one, other = pair()
    net.introduce(A, B)
    seen: list[bytes] = []
    net.tap = lambda data, source, destination: source != A or not seen.append(data)  # type: ignore[func-returns-value]  # listens
    ask(net, A, B, find_providers(one), Providers)
    other.outgoing.clear()
    for _ in range(3000):
        other.receive(seen[0], A, net.clock.now)
    assert len(other.outgoing) <= PROVEN_BURST


def test_what_the_socket_does_not_take_is_bounded() -> None:
    _, one, _ = pair()
    for number in range(rpc.MAX_OUTGOING + 100):
        one._send(b"x", address(number))
    assert len(one.outgoing) == rpc.MAX_OUTGOING


def test_a_bounded_number_of_questions_wait_for_answers() -> None:
    net, one, _ = pair()
    answers: list[Answer | None] = []
    for number in range(rpc.MAX_PENDING + 10):
        one.ask(find_providers(one), Providers, address(number + 2), net.clock.now, answers.append)
    assert answers == [None] * 10


# --- addresses and clocks -------------------------------------------------------------------------------------------


def test_datagrams_from_well_known_ports_are_not_answered() -> None:
    """Else a forged query from port 53 would make us talk to somebody's name server."""
    net, victim = crowded()
    query = messages.seal(queries(300)[1], member(200))
    victim.receive(query, Address("8.8.8.8", 53), net.clock.now)
    victim.receive(query, Address("224.0.0.1", 7400), net.clock.now)
    assert not victim.outgoing


def test_clocks_of_others_are_learned_from_their_answers() -> None:
    net = Wire()
    wrong = net.add(1, ahead=3600.0)
    for number in (2, 3, 4):
        net.add(number)
        net.introduce(A, address(number))
    assert wrong.statistics(net.clock.now).clock_skew == pytest.approx(3600, abs=2)
    assert wrong.clock.stamp(net.clock.now) == pytest.approx(WALL + net.clock.now, abs=2)
