"""IP addresses as the DHT packs, compares and mistrusts them.

Whoever names an address to us chooses where our datagrams go; `may_contact` is the one rule about that.
"""

from __future__ import annotations

import enum
import functools
import ipaddress
import socket
from collections.abc import Iterable
from typing import Final

from swarm.edges import Address
from swarm.errors import ConfigError, RemoteProtocolError

_MAPPED: Final = b"\0" * 10 + b"\xff\xff"

LOWEST_PORT: Final = 1024
"""Below live DNS, NTP and the like: nobody may aim our datagrams or dials at them."""

MAX_PER_PRIVATE_HOST: Final = 8
"""Daemons on one private address (containers of one host, a NAT) that may stand in a table or a lookup.

A public address gets one, so that whoever has few addresses gets few slots; on loopback, where only this machine's
own processes can be, the number is not limited.  One address *and port* is one node everywhere.
"""


class Scope(enum.Enum):
    LOOPBACK = "loopback"
    PRIVATE = "private"
    GLOBAL = "global"
    FORBIDDEN = "forbidden"
    """Unspecified, multicast, broadcast, reserved, link-local (no scope id travels) or a cloud's metadata service."""


_METADATA: Final = frozenset({"169.254.169.254", "fd00:ec2::254"})


@functools.lru_cache(maxsize=4096)
def scope_of(host: str) -> Scope:
    """The scope of a canonical IP address; a host name counts as forbidden."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return Scope.FORBIDDEN
    if ip.is_loopback:
        return Scope.LOOPBACK
    if ip.is_unspecified or ip.is_multicast or ip.is_link_local or ip.is_reserved or host in _METADATA:
        return Scope.FORBIDDEN
    return Scope.GLOBAL if ip.is_global else Scope.PRIVATE


def advertised(hosts: Iterable[str]) -> tuple[str, ...]:
    """Addresses to announce, as a person wrote them, in canonical form.

    Raises:
        ConfigError: A name, or an address nobody could reach.
    """
    found = []
    for text in hosts:
        try:
            host = str(ipaddress.ip_address(text.strip("[]")))
        except ValueError:
            raise ConfigError(f"{text!r} is not an IP address; --advertise takes addresses, not names") from None
        if scope_of(host) is Scope.FORBIDDEN:
            raise ConfigError(
                f"nobody can be reached at {host}; --advertise takes an address of this host that others can reach"
            )
        found.append(host)
    return tuple(dict.fromkeys(found))


def may_contact(address: Address, *, from_loopback: bool, low_ports: bool = False) -> bool:
    """Whether we may send to an address that somebody named to us.

    Args:
        from_loopback: Whoever named it is on loopback itself; only then does a loopback address mean the same machine.
        low_ports: The configuration allows ports below 1024.
    """
    if address.port < (1 if low_ports else LOWEST_PORT):
        return False
    scope = scope_of(address.host)
    return scope is not Scope.FORBIDDEN and (from_loopback or scope is not Scope.LOOPBACK)


def slots_of(host: str) -> int:
    """How many contacts of one table or lookup may share this host."""
    match scope_of(host):
        case Scope.LOOPBACK:
            return 1 << 16
        case Scope.PRIVATE:
            return MAX_PER_PRIVATE_HOST
        case _:
            return 1


def witness_of(address: Address) -> str:
    """Whose vote an address is: its host, and on loopback (where hosts are ports) its port too."""
    return str(address) if scope_of(address.host) is Scope.LOOPBACK else address.host


@functools.lru_cache(maxsize=4096)
def pack_host(host: str) -> bytes:
    """4 or 16 bytes.

    Raises:
        ValueError: Not a canonical IP address.
    """
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError as error:
        raise ValueError(f"not an IP address: {host!r}") from error


@functools.lru_cache(maxsize=4096)
def unpack_host(packed_untrusted: bytes) -> str:
    """The canonical text form, IPv4-mapped IPv6 unwrapped.

    Raises:
        RemoteProtocolError: Neither 4 nor 16 bytes.
    """
    if len(packed_untrusted) == 16 and packed_untrusted.startswith(_MAPPED):
        packed_untrusted = packed_untrusted[12:]
    if len(packed_untrusted) == 4:
        return socket.inet_ntop(socket.AF_INET, packed_untrusted)
    if len(packed_untrusted) == 16:
        return socket.inet_ntop(socket.AF_INET6, packed_untrusted)
    raise RemoteProtocolError(f"an IP address of {len(packed_untrusted)} bytes")


def pack(address: Address) -> bytes:
    """6 or 18 bytes: the host, then the port, big-endian."""
    return pack_host(address.host) + address.port.to_bytes(2, "big")


def unpack(packed_untrusted: bytes) -> Address:
    """The reverse of `pack`.

    Raises:
        RemoteProtocolError: Of another length.
    """
    return Address(unpack_host(packed_untrusted[:-2]), int.from_bytes(packed_untrusted[-2:], "big"))
