"""Provider records and the store: forged, replayed, expired, too many."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from swarm import wire
from swarm.dht import messages, records
from swarm.dht.records import (
    LIFETIME,
    MAX_PER_KEY,
    NEAREST,
    Outcome,
    ProviderBody,
    ProviderRecord,
    ProviderStore,
    Verifier,
    sign_provider,
    sign_withdrawal,
)
from swarm.edges import Address, State
from swarm.errors import IntegrityError, RemoteProtocolError
from swarm.identity import node_id_of
from tests.dht.engines import WALL, member, record

KEY = bytes(20)
NETWORK = member(0).network_id


def distance(one: bytes, other: bytes) -> int:
    return int.from_bytes(one, "big") ^ int.from_bytes(other, "big")


def made_up(number: int, key: bytes = KEY, *, seq: int = 1, state: State = State.WANTS) -> ProviderRecord:
    """As if verified: the store does not look at signatures, and ten thousand of them take a while."""
    public_key = number.to_bytes(32, "big")
    body = ProviderBody(key, [bytes(4)], 7400, int(state), seq, 0, 600)
    return ProviderRecord(b"r" * 160 + number.to_bytes(4, "big"), public_key, node_id_of(public_key), body)


def store(**options: int) -> ProviderStore:
    return ProviderStore(bytes(20), random.Random(1), **options)


# --- records --------------------------------------------------------------------------------------------------------


def test_a_record_names_its_signer_and_where_to_dial_it() -> None:
    signer = member(1)
    raw = sign_provider(signer, KEY, ["192.0.2.7", "2001:db8::7"], 7400, State.SEED, 5, WALL)
    read = Verifier(NETWORK).provider(raw)
    assert (read.public_key, read.node_id) == (signer.public_key, signer.node_id)
    assert read.control == (Address("192.0.2.7", 7400), Address("2001:db8::7", 7400))
    assert (read.body.seq, read.body.state, read.body.expires) == (5, State.SEED, WALL + 7200)


def test_the_largest_record_fits_in_three_hundred_bytes() -> None:
    hosts = [f"2001:db8:{n}:ffff:ffff:ffff:ffff:ffff" for n in range(1, 6)]
    raw = sign_provider(member(1), b"\xff" * 20, hosts, 65535, State.SEED, (1 << 62) - 1, (1 << 40) - 8000)
    assert len(raw) <= messages.MAX_RECORD_BYTES
    assert len(Verifier(NETWORK).provider(raw).control) == records.MAX_HOSTS


def test_a_flipped_bit_anywhere_in_a_record_is_rejected() -> None:
    raw = record(1, KEY)
    verifier = Verifier(NETWORK)
    verifier.provider(raw)
    for place in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises((IntegrityError, RemoteProtocolError)):
            verifier.provider(bytes(flipped))


def test_a_record_of_another_network_is_rejected() -> None:
    raw = sign_provider(member(1, "theirs"), KEY, ["192.0.2.7"], 7400, State.WANTS, 1, WALL)
    with pytest.raises(IntegrityError):
        Verifier(NETWORK).provider(raw)


def test_a_withdrawal_is_not_taken_for_a_record_nor_a_record_for_a_withdrawal() -> None:
    verifier = Verifier(NETWORK)
    with pytest.raises((IntegrityError, RemoteProtocolError)):
        verifier.provider(sign_withdrawal(member(1), KEY, 1, WALL))
    with pytest.raises((IntegrityError, RemoteProtocolError)):
        verifier.withdrawal(record(1, KEY))


@pytest.mark.parametrize("kind", ["provider", "withdrawal"])
def test_what_is_signed_in_the_name_of_another_is_rejected(kind: str) -> None:
    verifier = Verifier(NETWORK)
    raw = record(1, KEY) if kind == "provider" else sign_withdrawal(member(1), KEY, 1, WALL)
    signed = wire.decode(raw, wire.Signed)
    forged = wire.encode(wire.Signed(signed.body, member(2).public_key, signed.signature))
    with pytest.raises(IntegrityError):
        getattr(verifier, kind)(forged)


def test_a_record_that_claims_to_live_for_a_year_is_rejected() -> None:
    body = ProviderBody(KEY, [bytes(4)], 7400, 0, 1, WALL, WALL + LIFETIME[State.WANTS] + 1)
    with pytest.raises(RemoteProtocolError):
        Verifier(NETWORK).provider(wire.encode(member(1).sign("provider", body)))


@pytest.mark.parametrize("host", [bytes(5), bytes(15)])
def test_a_record_with_half_an_address_is_rejected(host: bytes) -> None:
    body = ProviderBody(KEY, [host], 7400, 0, 1, WALL, WALL + 600)
    with pytest.raises(RemoteProtocolError):
        Verifier(NETWORK).provider(wire.encode(member(1).sign("provider", body)))


def test_a_verifier_remembers_a_bounded_number_of_records() -> None:
    verifier = Verifier(NETWORK)
    for seq in range(verifier.MAX_REMEMBERED + 50):
        verifier.provider(record(1, KEY, seq=seq))
    assert len(verifier._known) == verifier.MAX_REMEMBERED


# --- the store ------------------------------------------------------------------------------------------------------


def test_a_record_is_kept_until_it_expires_and_no_longer_than_its_state_allows() -> None:
    shelf = store()
    shelf.put(made_up(1), "a", 100.0, 0.0)
    shelf.put(made_up(2), "a", 99_999.0, 0.0)
    assert len(shelf.records(KEY, 99.0)) == 2
    assert [each.public_key for each in shelf.records(KEY, 101.0)] == [made_up(2).public_key]
    assert shelf.records(KEY, 600.0) == []
    assert (len(shelf), shelf.keys) == (0, 0)


def test_an_old_sequence_number_after_a_new_one_is_ignored() -> None:
    shelf = store()
    assert shelf.put(made_up(1, seq=5, state=State.COMPLETE), "a", 600, 0.0) is Outcome.STORED
    assert shelf.put(made_up(1, seq=4), "a", 600, 1.0) is Outcome.OUTDATED
    assert shelf.put(made_up(1, seq=6, state=State.PARTIAL), "a", 600, 2.0) is Outcome.STORED
    assert [each.body.seq for each in shelf.records(KEY, 3.0)] == [6]


def test_a_withdrawn_record_replayed_does_not_come_back() -> None:
    verifier, shelf = Verifier(NETWORK), store()
    old = verifier.provider(record(1, KEY, seq=5))
    shelf.put(old, "a", 600, 0.0)
    public_key, withdrawal = verifier.withdrawal(sign_withdrawal(member(1), KEY, 6, WALL))
    assert shelf.withdraw(public_key, withdrawal, 600, 1.0) is Outcome.STORED
    assert shelf.records(KEY, 2.0) == []
    assert shelf.put(old, "a", 600, 3.0) is Outcome.OUTDATED
    assert shelf.put(verifier.provider(record(1, KEY, seq=7)), "a", 600, 4.0) is Outcome.STORED


def test_a_withdrawal_that_overtakes_its_record_still_counts() -> None:
    verifier, shelf = Verifier(NETWORK), store()
    shelf.withdraw(*verifier.withdrawal(sign_withdrawal(member(1), KEY, 6, WALL)), 600, 0.0)
    assert shelf.put(verifier.provider(record(1, KEY, seq=5)), "a", 600, 1.0) is Outcome.OUTDATED


def test_an_old_withdrawal_replayed_does_not_remove_a_newer_record() -> None:
    verifier, shelf = Verifier(NETWORK), store()
    old = verifier.withdrawal(sign_withdrawal(member(1), KEY, 6, WALL))
    old_of_all = verifier.withdrawal(sign_withdrawal(member(1), b"", 6, WALL))
    shelf.put(verifier.provider(record(1, KEY, seq=7)), "a", 600, 0.0)
    assert shelf.withdraw(*old, 600, 1.0) is Outcome.OUTDATED
    shelf.withdraw(*old_of_all, 600, 1.0)
    assert len(shelf.records(KEY, 2.0)) == 1


def test_one_withdrawal_takes_back_everything_of_its_signer_and_nothing_of_others() -> None:
    verifier, shelf = Verifier(NETWORK), store()
    keys = [bytes([n]) * 20 for n in range(5)]
    olds = [verifier.provider(record(1, key, seq=5)) for key in keys]
    for old in olds:
        shelf.put(old, "a", 600, 0.0)
    shelf.put(verifier.provider(record(2, keys[0], seq=5)), "b", 600, 0.0)
    shelf.withdraw(*verifier.withdrawal(sign_withdrawal(member(1), b"", 6, WALL)), 600, 1.0)
    assert [each.node_id for key in keys for each in shelf.records(key, 2.0)] == [member(2).node_id]
    assert all(shelf.put(old, "a", 600, 3.0) is Outcome.OUTDATED for old in olds)


def test_somebody_else_cannot_withdraw_my_record() -> None:
    verifier, shelf = Verifier(NETWORK), store()
    shelf.put(verifier.provider(record(1, KEY, seq=5)), "a", 600, 0.0)
    shelf.withdraw(*verifier.withdrawal(sign_withdrawal(member(2), KEY, 99, WALL)), 600, 1.0)
    shelf.withdraw(*verifier.withdrawal(sign_withdrawal(member(2), b"", 99, WALL)), 600, 1.0)
    assert len(shelf.records(KEY, 2.0)) == 1


def test_ten_thousand_records_by_ten_thousand_keys_of_one_host_fill_only_its_quota() -> None:
    """Signing is no quota: whoever can make keys can make records."""
    shelf = store()
    ours = made_up(50_000, b"\xff" * 20)
    shelf.put(ours, "honest", 600, 0.0)
    for number in range(10_000):
        shelf.put(made_up(number, number.to_bytes(20, "big")), "attacker", 600, 0.0)
    assert len(shelf) == records.MAX_PER_SOURCE + 1
    assert shelf.records(ours.body.key, 1.0) == [ours]


def test_one_signer_fills_only_its_quota() -> None:
    shelf = store()
    outcomes = [shelf.put(made_up(1, n.to_bytes(20, "big")), str(n), 600, 0.0) for n in range(5000)]
    assert outcomes.count(Outcome.STORED) == len(shelf) == records.MAX_PER_SIGNER


def test_a_full_store_drops_the_keys_farthest_from_itself_first() -> None:
    shelf = store(max_records=100)
    numbers = list(range(1, 301))
    random.Random(2).shuffle(numbers)
    for number in numbers:
        shelf.put(made_up(number, number.to_bytes(20, "big")), str(number), 600, 0.0)
        assert len(shelf) <= 100
    kept = [number for number in numbers if shelf.records(number.to_bytes(20, "big"), 1.0)]
    assert sorted(kept) == list(range(1, 101))
    assert shelf.put(made_up(301, (301).to_bytes(20, "big")), "late", 600, 0.0) is Outcome.FULL
    assert shelf.records((100).to_bytes(20, "big"), 1.0)


def test_the_nearest_twenty_four_are_kept_and_come_first_whatever_the_order_of_arrival() -> None:
    members = [made_up(number) for number in range(500)]
    nearest = sorted(members, key=lambda each: distance(each.node_id, KEY))[:NEAREST]
    for seed in range(5):
        shelf = ProviderStore(bytes(20), random.Random(seed))
        random.Random(seed).shuffle(members)
        for each in members:
            shelf.put(each, each.raw.hex(), 600, 0.0)
        kept = shelf.records(KEY, 1.0)
        assert len(kept) == MAX_PER_KEY
        assert kept[:NEAREST] == nearest


def test_the_answer_carries_the_true_count_though_only_a_part_is_kept() -> None:
    shelf = store()
    for number in range(300):
        shelf.put(made_up(number), str(number), 600 if number % 2 else 300, 0.0)
    for number in range(0, 300, 3):
        shelf.put(made_up(number, seq=2), str(number), 600 if number % 2 else 300, 1.0)
    assert shelf.page(KEY, 0, 1000, 2.0)[2] == 300
    assert shelf.page(KEY, 0, 1000, 400.0)[2] == 150
    shelf.expire(601.0)
    assert shelf._unlisted == 0


def test_beyond_the_nearest_the_sample_is_random() -> None:
    members = [made_up(number) for number in range(1000)]
    members.sort(key=lambda each: distance(each.node_id, KEY))
    early = 0
    for seed in range(40):
        shelf = ProviderStore(bytes(20), random.Random(seed))
        order = members[NEAREST:]
        random.Random(seed + 1000).shuffle(order)
        for each in members[:NEAREST] + order:
            shelf.put(each, each.raw.hex(), 600, 0.0)
        first_half = {each.public_key for each in order[: len(order) // 2]}
        early += sum(each.public_key in first_half for each in shelf.records(KEY, 1.0))
    assert 0.45 < early / (40 * (MAX_PER_KEY - NEAREST)) < 0.55


def test_pages_follow_one_another_and_fit_their_room() -> None:
    shelf = store()
    for number in range(20):
        shelf.put(made_up(number), str(number), 600, 0.0)
    everything = [each.raw for each in shelf.records(KEY, 1.0)]
    seen: list[bytes] = []
    cursor = 0
    for _ in range(20):
        page, cursor, count = shelf.page(KEY, cursor, 600, 1.0)
        assert count == 20
        assert 0 < sum(len(raw) + 3 for raw in page) <= 600
        seen += page
        if not cursor:
            break
    assert seen == everything


def test_a_page_without_room_ends_and_does_not_loop() -> None:
    shelf = store()
    shelf.put(made_up(1), "a", 600, 0.0)
    assert shelf.page(KEY, 0, 10, 1.0) == ([], 0, 1)


def test_a_cursor_beyond_the_end_begins_anew() -> None:
    shelf = store()
    shelf.put(made_up(1), "a", 600, 0.0)
    assert shelf.page(KEY, 12, 1000, 1.0) == ([made_up(1).raw], 0, 1)


def test_the_asker_does_not_get_its_own_record() -> None:
    shelf = store()
    for number in (1, 2):
        shelf.put(made_up(number), "a", 600, 0.0)
    assert shelf.page(KEY, 0, 1000, 1.0, without=made_up(1).public_key)[0] == [made_up(2).raw]


class StoreMachine(RuleBasedStateMachine):
    """The store against a plain dictionary, below every quota."""

    def __init__(self) -> None:
        super().__init__()
        self.store = store()
        self.now = 0.0
        self.model: dict[tuple[bytes, int], tuple[int, float]] = {}
        self.withdrawn: dict[tuple[bytes, int], tuple[int, float]] = {}

    keys = st.sampled_from([bytes(20), b"\x01" * 20, b"\xff" * 20])
    signers = st.integers(1, 4)
    seqs = st.integers(0, 6)

    @rule(key=keys, signer=signers, seq=seqs, life=st.integers(1, 600))
    def put(self, key: bytes, signer: int, seq: int, life: int) -> None:
        outcome = self.store.put(made_up(signer, key, seq=seq), str(signer), life, self.now)
        known = self.model.get((key, signer), (-1, 0.0))[0]
        gone, until = self.withdrawn.get((key, signer), (-1, 0.0))
        if seq < known or (until > self.now and seq <= gone):
            assert outcome is Outcome.OUTDATED
        else:
            assert outcome is Outcome.STORED
            self.model[(key, signer)] = (seq, self.now + life)

    @rule(key=keys, signer=signers, seq=seqs, life=st.integers(1, 600))
    def withdraw(self, key: bytes, signer: int, seq: int, life: int) -> None:
        body = records.WithdrawBody(key, seq, 0, 600)
        outcome = self.store.withdraw(made_up(signer).public_key, body, life, self.now)
        known = self.model.get((key, signer), (-1, 0.0))[0]
        gone, until = self.withdrawn.get((key, signer), (-1, 0.0))
        if seq < known or (until > self.now and seq <= gone):
            assert outcome is Outcome.OUTDATED
        else:
            assert outcome is Outcome.STORED
            self.model.pop((key, signer), None)
            self.withdrawn[(key, signer)] = (seq, self.now + life)

    @rule(seconds=st.integers(1, 400))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.store.expire(self.now)
        self.model = {which: kept for which, kept in self.model.items() if kept[1] > self.now}

    @invariant()
    def the_store_holds_what_the_model_holds(self) -> None:
        held = {
            (key, int.from_bytes(each.public_key, "big")): each.body.seq
            for key in (bytes(20), b"\x01" * 20, b"\xff" * 20)
            for each in self.store.records(key, self.now)
        }
        assert held == {which: kept[0] for which, kept in self.model.items()}
        assert len(self.store) == len(held)
        assert self.store.keys == len({key for key, _ in held})
        assert len(self.store._expiring) <= 2 * len(held) + 64
        assert len(self.store._farthest) <= 2 * len(held) + 64


StoreMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestTheStoreAgainstADictionary = StoreMachine.TestCase
