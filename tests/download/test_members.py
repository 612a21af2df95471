"""Which members are known, whom to dial, and who belongs to the nearest."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from swarm.download.members import MAX_FAILURES, MAX_KNOWN, MAX_SEEN_CLAIMS, RECORDS_TOLD, Members
from swarm.download.policy import Policy
from swarm.edges import Address, NodeId, Provider, State
from swarm.identity import node_id_of

POLICY = Policy()
KEY = bytes(20)


def node_id(distance: int) -> NodeId:
    """The node so far from the task key."""
    return distance.to_bytes(20, "big")


def provider(distance: int, state: State = State.WANTS) -> Provider:
    return Provider(node_id(distance), b"k" * 32, (Address("192.0.2.1", 7400),), state, b"record %d" % distance)


def members(me: int) -> Members:
    return Members(node_id(me), KEY, POLICY)


def dialled(known: Members, linked: Iterable[NodeId] = (), *, now: float = 0.0, enough: int = 16, **options) -> set[int]:
    found = known.to_dial(set(linked), now, Random(1), enough=enough, **options)
    return {int.from_bytes(each.node_id, "big") for each in found}


def test_a_node_among_the_nearest_connects_to_all_the_nearest() -> None:
    known = members(5)
    known.learn(provider(distance) for distance in range(1, 60) if distance != 5)
    chosen = dialled(known)
    assert chosen >= set(range(1, 26)) - {5}
    assert not known.outranked


def test_a_node_far_away_connects_to_some_anywhere_and_leaves_the_origin_to_the_nearest() -> None:
    known = members(1000)
    known.learn(provider(distance) for distance in range(1, 101))
    chosen = dialled(known)
    assert len(chosen) == 16
    assert not chosen >= set(range(1, 25))
    assert known.outranked


def test_linked_or_not_enough_nearer_members_outrank_us() -> None:
    known = members(1000)
    known.learn(provider(distance) for distance in range(1, POLICY.mesh))
    assert not known.outranked
    known.learn([provider(POLICY.mesh)])
    assert known.outranked
    assert known.is_near(node_id(POLICY.mesh))
    assert not known.is_near(node_id(POLICY.mesh + 1))


def test_the_dead_and_the_complete_outrank_nobody() -> None:
    known = members(1000)
    known.learn(provider(distance) for distance in range(1, 25))
    known.learn([provider(25, State.COMPLETE), provider(26, State.SEED)])
    assert known.outranked
    for _ in range(MAX_FAILURES):
        known.failed(node_id(3))
    assert not known.outranked, "the origin must not be left to the dead"
    known.learn([provider(4, State.COMPLETE)])
    assert not known.outranked


def test_the_first_ones_known_do_not_become_everybodys_neighbours() -> None:
    chosen = set()
    for seed in range(20):
        known = members(1000)
        known.learn(provider(distance) for distance in range(100, 200))
        known.learn(provider(distance) for distance in range(1, 30))
        found = known.to_dial(set(), 0.0, Random(seed), enough=8)
        assert len(found) == 8
        chosen |= {each.node_id for each in found}
    assert len(chosen) > 80


def test_who_is_linked_or_dialled_already_is_not_dialled_again() -> None:
    known = members(1)
    known.learn([provider(2), provider(3), provider(4)])
    known.dialling.add(node_id(3))
    assert dialled(known, {node_id(2)}) == {4}


def test_after_enough_links_only_the_mesh_grows() -> None:
    known = members(1000)
    known.learn(provider(distance) for distance in range(1, 60))
    linked = {node_id(distance) for distance in range(40, 56)}
    assert dialled(known, linked) == set()
    assert dialled(known, linked, nearest=True) == set(range(1, 25)), "to find out whether they are alive"


def test_an_address_that_fails_is_given_up() -> None:
    known = members(1)
    known.learn([provider(2)])
    for _ in range(MAX_FAILURES):
        assert dialled(known) == {2}
        known.failed(node_id(2))
    assert dialled(known) == set()


def test_who_declined_is_left_alone_for_a_while() -> None:
    known = members(1000)
    known.learn(provider(distance) for distance in range(1, 31))
    known.declined(node_id(30), 100.0)
    assert 30 not in dialled(known, now=101.0, enough=30)
    assert 30 in dialled(known, now=100.0 + POLICY.declined, enough=30)


def test_we_do_not_know_ourselves() -> None:
    known = members(7)
    known.learn([provider(7)])
    assert len(known) == 0
    assert not known.knows(node_id(7))


def test_a_flood_of_records_claims_keys_and_failures_fills_no_memory() -> None:
    known = members(7)
    for distance in range(8, MAX_KNOWN + 600):
        known.learn([provider(distance)])
        known.failed(node_id(distance))
        known.declined(node_id(distance), 0.0)
        known.id_of(distance.to_bytes(32, "big"))
    for number in range(MAX_SEEN_CLAIMS + 100):
        known.note_claim(number.to_bytes(64, "big"))
    assert len(known) == MAX_KNOWN
    assert max(len(known._failures), len(known._declined), len(known._ids)) <= MAX_KNOWN
    assert len(known._seen_claims) == MAX_SEEN_CLAIMS


def test_a_newcomer_is_told_of_the_nearest_and_of_some_others_that_are_alive() -> None:
    known = members(1000)
    known.learn(provider(distance) for distance in range(1, 101))
    known.failed(node_id(2))
    records = known.records(node_id(3), Random(1))
    assert len(records) == len(set(records)) == RECORDS_TOLD
    assert b"record 1" in records
    assert b"record 2" not in records
    assert b"record 3" not in records, "it knows itself"


def test_a_claim_counts_as_seen_only_once_it_was_checked() -> None:
    known = members(1)
    assert not known.claim_seen(b"s" * 64)
    assert not known.claim_seen(b"s" * 64), "asking is not checking"
    known.note_claim(b"s" * 64)
    assert known.claim_seen(b"s" * 64)


def test_the_id_of_a_key_is_its_hash() -> None:
    known = members(1)
    assert known.id_of(b"k" * 32) == known.id_of(b"k" * 32) == node_id_of(b"k" * 32)
