"""Addresses, packed and mistrusted."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.dht.addresses import Scope, advertised, may_contact, pack, scope_of, slots_of, unpack, witness_of
from swarm.edges import Address
from swarm.errors import ConfigError, RemoteProtocolError

hosts = st.ip_addresses().filter(lambda ip: ip.version == 4 or ip.ipv4_mapped is None).map(str)


@given(hosts, st.integers(0, 65535))
def test_addresses_survive_packing(host: str, port: int) -> None:
    packed = pack(Address(host, port))
    assert len(packed) in (6, 18)
    back = unpack(packed)
    assert (ipaddress.ip_address(back.host), back.port) == (ipaddress.ip_address(host), port)


def test_an_ipv4_address_inside_an_ipv6_one_is_the_same_address() -> None:
    mapped = bytes(10) + b"\xff\xff" + bytes((127, 0, 0, 1)) + bytes((28, 232))
    assert unpack(mapped) == Address("127.0.0.1", 7400)


@pytest.mark.parametrize("length", [0, 1, 2, 5, 7, 17, 19])
def test_other_lengths_are_malformed(length: int) -> None:
    with pytest.raises(RemoteProtocolError):
        unpack(bytes(length))


def test_names_are_not_packed() -> None:
    with pytest.raises(ValueError, match="not an IP address"):
        pack(Address("localhost", 7400))


@pytest.mark.parametrize(
    ("host", "scope"),
    [
        ("127.0.0.1", Scope.LOOPBACK),
        ("::1", Scope.LOOPBACK),
        ("10.1.2.3", Scope.PRIVATE),
        ("100.64.0.1", Scope.PRIVATE),
        ("fd00::1", Scope.PRIVATE),
        ("8.8.8.8", Scope.GLOBAL),
        ("2606:4700::1", Scope.GLOBAL),
        ("0.0.0.0", Scope.FORBIDDEN),  # noqa: S104  # nothing is bound
        ("::", Scope.FORBIDDEN),
        ("224.0.0.1", Scope.FORBIDDEN),
        ("ff02::1", Scope.FORBIDDEN),
        ("255.255.255.255", Scope.FORBIDDEN),
        ("169.254.169.254", Scope.FORBIDDEN),
        ("fd00:ec2::254", Scope.FORBIDDEN),
        ("fe80::1", Scope.FORBIDDEN),
        ("node.example", Scope.FORBIDDEN),
    ],
)
def test_every_host_has_its_scope(host: str, scope: Scope) -> None:
    assert scope_of(host) is scope


def test_a_stranger_elsewhere_cannot_aim_us_at_our_own_machine() -> None:
    assert not may_contact(Address("127.0.0.1", 7400), from_loopback=False)
    assert may_contact(Address("127.0.0.1", 7400), from_loopback=True)


def test_nobody_aims_us_at_well_known_ports_unless_configured() -> None:
    assert not may_contact(Address("8.8.8.8", 53), from_loopback=False)
    assert may_contact(Address("8.8.8.8", 443), from_loopback=False, low_ports=True)
    assert not may_contact(Address("8.8.8.8", 0), from_loopback=False, low_ports=True)


def test_slots_and_votes_go_by_host_but_on_loopback_by_port() -> None:
    assert slots_of("8.8.8.8") == 1 < slots_of("10.0.0.1") < slots_of("127.0.0.1")
    assert witness_of(Address("8.8.8.8", 1)) == witness_of(Address("8.8.8.8", 2))
    assert witness_of(Address("127.0.0.1", 1)) != witness_of(Address("127.0.0.1", 2))


def test_advertised_addresses_become_canonical() -> None:
    assert advertised(["10.0.0.1", "FD00:0::1", "[fd00::1]"]) == ("10.0.0.1", "fd00::1")


@pytest.mark.parametrize("text", ["node1.example", "10.0.0.1:7400", "", "0.0.0.0", "::", "fe80::1", "224.0.0.1"])  # noqa: S104
def test_what_nobody_can_reach_is_not_advertised(text: str) -> None:
    with pytest.raises(ConfigError, match="--advertise"):
        advertised([text])
