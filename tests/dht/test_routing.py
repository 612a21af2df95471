"""The routing table: ranges, slots, neighbours, silence."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from swarm.dht.addresses import MAX_PER_PRIVATE_HOST
from swarm.dht.routing import MAX_SILENT, SILENCE, Contact, Shortlist, Table
from swarm.edges import Address

OWN = bytes(20)


def contact(number: int, where: Address | None = None) -> Contact:
    node_id = random.Random(number).randbytes(20)
    return Contact(node_id, where or Address(f"9.{number >> 16}.{number >> 8 & 255}.{number & 255}", 7400))


def test_every_id_falls_into_the_bucket_whose_range_holds_it() -> None:
    """The original compares inclusive ranges with `<`, and puts the last id of a bucket into the next."""
    table = Table(OWN, 2)
    for number in range(1, 200):
        table.add(contact(number))
    assert len(table.buckets) > 5
    for bucket in table.buckets:
        for end in bucket.range:
            found = table.buckets[table.get_bucket_for(Contact(end.to_bytes(20, "big"), Address("9.9.9.9", 7400)))]
            assert found is bucket
    assert [low for low, _ in (bucket.range for bucket in table.buckets)][1:] == [
        high + 1 for _, high in (bucket.range for bucket in table.buckets)
    ][:-1]
    assert table.buckets[-1].range[1] == (1 << 160) - 1


def test_one_address_and_port_with_two_thousand_ids_occupies_one_slot() -> None:
    table = Table(OWN, 8)
    where = Address("9.9.9.9", 7400)
    for number in range(2000):
        table.add(Contact(random.Random(number).randbytes(20), where))
    assert len(table.contacts()) == len(table) == 1


def test_one_public_host_with_two_thousand_ports_occupies_one_slot() -> None:
    table = Table(OWN, 8)
    for number in range(2000):
        table.add(contact(number, Address("9.9.9.9", 2000 + number)))
    assert len(table.contacts()) == 1


def test_one_private_host_has_a_few_slots_and_loopback_many() -> None:
    table = Table(OWN, 8)
    for number in range(100):
        table.add(contact(number, Address("10.1.2.3", 2000 + number)))
    assert len(table.contacts()) == MAX_PER_PRIVATE_HOST
    for number in range(100, 120):
        table.add(contact(number, Address("127.0.0.1", 2000 + number)))
    assert sum(each.address.host == "127.0.0.1" for each in table.contacts()) > MAX_PER_PRIVATE_HOST


def test_a_daemon_restarted_with_a_new_key_takes_its_old_slot() -> None:
    table = Table(OWN, 8)
    old, new = contact(1), contact(2, contact(1).address)
    assert table.add(old)
    assert table.wants(new.id, new.address)
    assert table.add(new)
    assert table.contacts() == [new]
    assert table.get(old.id) is None


def test_a_contact_that_moved_is_known_at_its_new_address_only() -> None:
    table = Table(OWN, 8)
    table.add(contact(1))
    moved = contact(1, Address("9.8.7.6", 7400))
    assert table.wants(moved.id, moved.address)
    table.add(moved)
    assert table.at(contact(1).address) is None
    assert table.at(moved.address) is moved


def test_we_are_not_our_own_contact() -> None:
    table = Table(OWN, 8)
    assert not table.wants(OWN, Address("9.9.9.9", 7400))
    assert not table.add(Contact(OWN, Address("9.9.9.9", 7400)))


def test_parts_of_the_id_space_with_few_contacts_are_named() -> None:
    table = Table(OWN, 4)
    assert table.sparse() == []
    # Ids that begin with 1 and 001, and near ones: nobody begins with 01.
    firsts = (0x80, 0x90, 0xA0, 0xC0, 0x20, 0x28, 0x30, 0x38, 0x10, 0x18, 0x00, 0x01, 0x02, 0x04, 0x08, 0x0C)
    for number, first in enumerate(firsts):
        table.add(Contact(bytes([first, 1]) + bytes(18), Address(f"9.9.9.{number}", 7400)))
    found = {target[0] for target in table.sparse()}
    assert 0x40 in found
    assert not found & {0x80, 0x20}


def test_a_full_bucket_keeps_whoever_proved_itself_first() -> None:
    table = Table(OWN, 2, max_contacts=0)
    far = [Contact(b"\xff" + bytes([n]) + bytes(18), Address(f"9.9.9.{n}", 7400)) for n in range(1, 9)]
    for each in far:
        table.add(each)
    assert len(table) < len(far)
    refused = next(each for each in far if table.get(each.id) is None)
    assert not table.wants(refused.id, refused.address)


def test_a_table_does_not_grow_beyond_its_limit_but_for_our_own_neighbourhood() -> None:
    unlimited, limited = Table(OWN, 8), Table(OWN, 8, max_contacts=50)
    for number in range(3000):
        unlimited.add(contact(number))
        limited.add(contact(number))
    assert len(unlimited) > 150
    assert len(limited) < 120


def test_loopback_contacts_are_not_given_to_askers_elsewhere() -> None:
    table = Table(OWN, 8)
    table.add(contact(1, Address("127.0.0.1", 7401)))
    table.add(contact(2))
    assert [each.id for each in table.nearest(OWN, 8, asker="9.9.9.9")] == [contact(2).id]
    assert len(table.nearest(OWN, 8, asker="127.0.0.1")) == 2


def test_a_silent_contact_is_dropped_and_remembered_until_it_is_heard_or_time_has_passed() -> None:
    table = Table(OWN, 8)
    known = contact(1)
    table.add(known)
    assert table.fell_silent(known.address, 0.0) is known
    assert len(table) == 0
    assert table.is_silent(known.address, SILENCE - 1)
    assert not table.is_silent(known.address, SILENCE + 1)
    table.fell_silent(known.address, 0.0)
    table.heard(known.address, 1.0)
    assert not table.is_silent(known.address, 2.0)


def test_a_bounded_number_of_silent_addresses_is_remembered() -> None:
    table = Table(OWN, 8)
    for number in range(MAX_SILENT + 100):
        table.fell_silent(contact(number).address, 0.0)
    assert len(table._silent) == MAX_SILENT
    assert table.is_silent(contact(MAX_SILENT + 99).address, 1.0)


def test_a_shortlist_takes_one_contact_of_a_public_host_however_many_sybils_live_there() -> None:
    shortlist = Shortlist(OWN, 8)
    sybils = [
        shortlist.offer(Contact(bytes(18) + number.to_bytes(2, "big"), Address("9.9.9.9", number)))
        for number in range(2000, 2200)
    ]
    honest = [shortlist.offer(contact(number)) for number in range(20)]
    assert (sum(sybils), sum(honest)) == (1, 20)


def test_an_id_that_was_first_named_at_a_wrong_address_gets_a_second_chance() -> None:
    shortlist = Shortlist(OWN, 8)
    lie, truth = contact(1, Address("9.9.9.9", 7400)), contact(1)
    assert shortlist.offer(lie)
    assert not shortlist.offer(truth)
    shortlist.drop(lie)
    assert not shortlist.offer(lie)
    assert shortlist.offer(truth)


class TableMachine(RuleBasedStateMachine):
    """Whatever happens: counts agree, slots hold, and neighbours are the nearest of all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(OWN, 3)
        self.now = 0.0

    numbers = st.integers(0, 60)
    hosts = st.sampled_from(["9.9.9.1", "9.9.9.2", "9.9.9.3", "10.0.0.1", "127.0.0.1", "2001:db8::1"])
    ports = st.integers(2000, 2012)

    @rule(number=numbers, host=hosts, port=ports)
    def add(self, number: int, host: str, port: int) -> None:
        new = contact(number, Address(host, port))
        if self.table.add(new):
            assert self.table.get(new.id) is new
            assert self.table.at(new.address) is new

    @rule(number=numbers)
    def add_elsewhere(self, number: int) -> None:
        self.table.add(contact(number))

    @rule(number=numbers)
    def remove(self, number: int) -> None:
        known = self.table.get(contact(number).id)
        if known is not None:
            self.table.remove(known)
            assert self.table.get(known.id) is None

    @rule(host=hosts, port=ports)
    def fall_silent(self, host: str, port: int) -> None:
        self.table.fell_silent(Address(host, port), self.now)
        assert self.table.at(Address(host, port)) is None

    @rule(point_at=st.binary(min_size=20, max_size=20), count=st.integers(1, 10))
    def neighbours_are_the_nearest(self, point_at: bytes, count: int) -> None:
        point = int.from_bytes(point_at, "big")
        expected = sorted(self.table.contacts(), key=lambda each: each.long_id ^ point)[:count]
        assert self.table.nearest(point_at, count) == expected

    @invariant()
    def everything_agrees(self) -> None:
        contacts = self.table.contacts()
        assert len(contacts) == len(self.table) == len({each.address for each in contacts})
        public = [each.address.host for each in contacts if each.address.host.startswith("9.")]
        assert len(public) == len(set(public))
        for bucket in self.table.buckets:
            assert len(bucket.nodes) <= 3
            assert all(bucket.range[0] <= each.long_id <= bucket.range[1] for each in bucket.nodes.values())


TableMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestTheTable = TableMachine.TestCase
