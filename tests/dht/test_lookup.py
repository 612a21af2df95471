"""Lookups over a made-up network: whom they ask, and when they end."""

from __future__ import annotations

import ipaddress
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.dht.lookup import MAX_QUERIES, Lookup
from swarm.dht.routing import Contact
from swarm.edges import Address

OWN = b"\xaa" * 20


def network(size: int, seed: int = 1) -> list[Contact]:
    rng = random.Random(seed)
    return [Contact(rng.randbytes(20), Address(f"9.9.{n >> 8}.{n & 255}", 7400)) for n in range(size)]


def nearest(contacts: list[Contact], target: bytes, count: int = 8) -> list[Contact]:
    point = int.from_bytes(target, "big")
    return sorted(contacts, key=lambda contact: contact.long_id ^ point)[:count]


def known_to(contact: Contact, contacts: list[Contact]) -> list[Contact]:
    """A table as Kademlia keeps it: up to eight of each distance, so near ones in full."""
    buckets: dict[int, list[Contact]] = {}
    for other in contacts:
        if other is not contact:
            buckets.setdefault((other.long_id ^ contact.long_id).bit_length(), []).append(other)
    return [other for bucket in buckets.values() for other in bucket[:8]]


def test_a_lookup_finds_the_nearest_of_the_whole_network() -> None:
    contacts = network(500)
    target = b"\x42" * 20
    lookup = Lookup(target, OWN, contacts[:3], k=8, alpha=3)
    while asked := lookup.next_queries():
        assert len(asked) <= 3
        for contact in asked:
            lookup.answered(contact, nearest(known_to(contact, contacts), target))
    assert lookup.done
    assert lookup.nearest() == nearest(contacts, target)
    assert lookup.queries < 30


def test_an_empty_table_ends_the_lookup_at_once() -> None:
    assert Lookup(bytes(20), OWN, [], k=8, alpha=3).done


def test_a_slow_contact_does_not_hold_up_the_others_but_may_still_answer() -> None:
    contacts = network(20)
    lookup = Lookup(bytes(20), OWN, contacts, k=8, alpha=3)
    first = lookup.next_queries()
    assert lookup.next_queries() == []
    for contact in first:
        lookup.slow(contact)
    second = lookup.next_queries()
    assert len(second) == 3
    third: list[Contact] = []
    for contact in second:
        lookup.answered(contact, [])
        third += lookup.next_queries()
    for contact in third:
        lookup.answered(contact, [])
    assert not lookup.done
    for contact in first:
        lookup.answered(contact, [])
    assert lookup.done
    assert lookup.nearest() == nearest(contacts, bytes(20))


def test_a_dead_contact_makes_room_for_the_next() -> None:
    contacts = network(12)
    dead = set(nearest(contacts, bytes(20), 4))
    lookup = Lookup(bytes(20), OWN, contacts, k=8, alpha=3)
    while asked := lookup.next_queries():
        for contact in asked:
            if contact in dead:
                lookup.failed(contact)
            else:
                lookup.answered(contact, [])
    assert lookup.done
    assert lookup.nearest() == [contact for contact in nearest(contacts, bytes(20), 12) if contact not in dead]


def test_a_contact_that_names_ever_nearer_strangers_cannot_keep_a_lookup_going() -> None:
    lookup = Lookup(bytes(20), OWN, network(3), k=8, alpha=3)
    serial = 1 << 150
    asked = lookup.next_queries()
    while asked:
        for contact in asked:
            named = []
            for _ in range(100):
                serial -= 1 << 130
                host = ipaddress.IPv4Address((9 << 24) + (serial >> 130 & 0xFFFFFF))
                named.append(Contact(serial.to_bytes(20, "big"), Address(str(host), 7400)))
            lookup.answered(contact, named)
        asked = lookup.next_queries()
    assert lookup.done
    assert lookup.queries == MAX_QUERIES
    assert len(lookup._shortlist.heap) <= 3 + 8 * MAX_QUERIES


def test_two_hundred_sybils_on_one_host_do_not_crowd_out_the_honest() -> None:
    contacts = network(20)
    sybils = [Contact(bytes(18) + n.to_bytes(2, "big"), Address("8.8.8.8", 2000 + n)) for n in range(200)]
    lookup = Lookup(bytes(20), OWN, contacts[:3], k=8, alpha=3)
    while asked := lookup.next_queries():
        for contact in asked:
            lookup.answered(contact, sybils[:8] if contact in sybils else [*sybils[:2], *contacts][:8])
    assert len([contact for contact in lookup.nearest() if contact in contacts]) >= 6


def test_we_are_not_asked_ourselves() -> None:
    contacts = network(1)
    lookup = Lookup(bytes(20), OWN, contacts, k=8, alpha=3)
    lookup.answered(lookup.next_queries()[0], [Contact(OWN, Address("9.8.7.6", 7400))])
    assert lookup.done


def test_a_contact_far_from_the_target_puts_itself_out_by_naming_nearer_ones() -> None:
    contacts = network(100)
    target = bytes(20)
    far = nearest(contacts, target, 100)[-1]
    near = nearest(contacts, target)[0]
    lookup = Lookup(target, OWN, [far], k=8, alpha=3)
    lookup.next_queries()
    assert lookup.is_near(far)
    lookup.answered(far, nearest(contacts, target))
    assert not lookup.is_near(far)
    assert near in lookup.next_queries()
    lookup.answered(near, [])
    assert lookup.is_near(near)


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(0, 1000), st.sampled_from([1, 2, 3, 8]))
def test_whatever_happens_to_its_queries_a_lookup_ends_with_what_answered(size: int, seed: int, alpha: int) -> None:
    rng = random.Random(seed)
    contacts = network(size, seed)
    lookup = Lookup(bytes(20), OWN, contacts[: 1 + size // 3], k=8, alpha=alpha)
    waiting = lookup.next_queries()
    answered = set()
    slow: set[Contact] = set()
    while waiting:
        assert len([contact for contact in waiting if contact not in slow]) <= alpha
        contact = waiting.pop(rng.randrange(len(waiting)))
        match rng.randrange(4):
            case 0:
                lookup.failed(contact)
            case 1 if contact not in slow:
                lookup.slow(contact)
                slow.add(contact)
                waiting.append(contact)
            case _:
                lookup.answered(contact, rng.sample(contacts, min(8, size)))
                answered.add(contact)
        waiting += lookup.next_queries()
    assert lookup.done
    assert set(lookup.nearest()) <= answered
