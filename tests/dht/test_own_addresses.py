"""Whose word we take for where we are."""

from __future__ import annotations

from swarm.dht.own_addresses import MAX_WITNESSES, OwnAddresses
from swarm.edges import Address


def at(host: str, port: int = 7400) -> Address:
    return Address(host, port)


def test_the_majority_of_hosts_says_where_we_are() -> None:
    own = OwnAddresses()
    own.vote(at("9.9.9.1"), at("8.8.8.8"))
    own.vote(at("9.9.9.2"), at("8.8.4.4"))
    own.vote(at("9.9.9.3"), at("8.8.8.8"))
    assert own.hosts() == ("8.8.8.8",)


def test_a_host_has_one_vote_however_many_ports_it_speaks_from() -> None:
    own = OwnAddresses()
    for port in range(2000, 2100):
        own.vote(at("9.9.9.9", port), at("8.8.4.4"))
    own.vote(at("9.9.9.1"), at("8.8.8.8"))
    own.vote(at("9.9.9.2"), at("8.8.8.8"))
    assert own.hosts() == ("8.8.8.8",)


def test_each_family_and_scope_has_an_address_of_its_own() -> None:
    own = OwnAddresses()
    own.vote(at("10.0.0.2"), at("10.0.0.1"))
    own.vote(at("9.9.9.2"), at("8.8.8.8"))
    own.vote(at("2001:db8::2"), at("2606:4700::1"))
    assert set(own.hosts()) == {"10.0.0.1", "8.8.8.8", "2606:4700::1"}


def test_loopback_counts_only_while_there_is_nothing_else() -> None:
    own = OwnAddresses()
    own.vote(at("127.0.0.1", 7401), at("127.0.0.1"))
    assert own.hosts() == ("127.0.0.1",)
    own.vote(at("10.0.0.2"), at("10.0.0.1"))
    assert own.hosts() == ("10.0.0.1",)


def test_fixed_addresses_come_first_and_stay() -> None:
    own = OwnAddresses(("10.0.0.9",))
    own.vote(at("10.0.0.2"), at("10.0.0.1"))
    assert own.hosts() == ("10.0.0.9", "10.0.0.1")
    assert own.believes(at("10.0.0.9"))


def test_nobody_makes_us_believe_in_addresses_that_cannot_be_ours() -> None:
    own = OwnAddresses()
    for host in ("::", "224.0.0.1", "169.254.169.254", "fe80::1", "255.255.255.255"):
        assert not own.vote(at("9.9.9.2"), at(host))
        assert not own.believes(at(host))
    assert own.hosts() == ()


def test_one_witness_against_what_is_known_is_not_believed_two_are() -> None:
    own = OwnAddresses()
    assert own.believes(at("8.8.8.8"))
    own.vote(at("9.9.9.1"), at("8.8.8.8"))
    own.vote(at("9.9.9.2"), at("8.8.8.8"))
    own.vote(at("9.9.9.3"), at("8.8.4.4"))
    assert own.believes(at("8.8.8.8"))
    assert not own.believes(at("8.8.4.4"))
    own.vote(at("9.9.9.4"), at("8.8.4.4"))
    assert own.believes(at("8.8.4.4"))


def test_vote_tells_whether_our_hosts_changed() -> None:
    own = OwnAddresses()
    assert own.vote(at("9.9.9.1"), at("8.8.8.8"))
    assert not own.vote(at("9.9.9.1"), at("8.8.8.8"))
    assert not own.vote(at("9.9.9.2"), at("8.8.8.8"))


def test_votes_are_bounded() -> None:
    own = OwnAddresses()
    for number in range(1000):
        own.vote(at(f"9.9.{number >> 8}.{number & 255}"), at("8.8.8.8"))
    assert [len(votes) for votes in own._votes.values()] == [MAX_WITNESSES]
