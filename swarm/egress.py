"""The one policy every outgoing dial passes: who asks decides what may be reached.

Goal: no URL, redirect, DNS answer or odd spelling of an address makes this node talk to something its asker may not
reach.  A name is resolved once, every address of the answer is checked, and the connection goes to a checked address and
nowhere else, so a DNS server that answers differently the second time gains nothing.

Non-goals: what is said on the connection (`swarm.origin`), and dialling peers, whose addresses come from signed records.

The tables are our own.  `ipaddress.is_global` of Python 3.11 lets through fec0::/10, 2002::/16 (2002:7f00:1:: is
127.0.0.1 to a 6to4 relay), 3fff::/20 and 192.0.0.8.
"""

from __future__ import annotations

import enum
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

import trio

from swarm.edges import Address
from swarm.errors import ConfigError, NotPermitted

HAPPY_EYEBALLS_DELAY: Final = 0.25
"""Seconds before the next address is tried beside a silent one (RFC 8305, section 8: 250 ms)."""

MAX_ADDRESSES: Final = 16
"""Addresses of one name we look at; a hostile DNS answer of hundreds must not become hundreds of connection attempts."""

REQUESTERS: Final = ("user", "mirror", "proxy", "job")

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network


class Zone(enum.Enum):
    """Where an address leads."""

    PUBLIC = "public"
    PRIVATE = "private"
    LOOPBACK = "loopback"
    FORBIDDEN = "link-local, metadata or no destination at all"


class Reach(enum.IntEnum):
    """How far an asker may go; what `egress.allow` lists comes on top."""

    NOTHING = 0
    PUBLIC = 1
    LOCAL = 2
    """Public, private and loopback."""


Rule = Callable[[str, int, bool], Reach]
"""(host, port, redirected) -> how far.  `redirected` is true from the second hop on."""

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Name (or literal) and port -> addresses as text.  Raises `socket.gaierror`."""

Connector = Callable[[Address], Awaitable[trio.abc.Stream]]
"""One TCP connection to one literal address.  Raises `OSError`."""


@dataclass(frozen=True, slots=True)
class EgressSettings:
    """Section `[egress]`.

    Attributes:
        allow: Networks (`10.1.0.0/16`), addresses, host names or `*.domain` that may be reached although the rules refuse
            them.  A host name opens private and loopback addresses; link-local and metadata addresses are opened only by
            an entry that names them and nothing wider (`169.254.169.254`, not `0.0.0.0/0`).
        ports: Ports below 1024, beside 80 and 443, that jobs and clients of the mirror or proxy may reach.
    """

    allow: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Permit:
    """What one hop may reach; connections are shared only between hops with equal permits."""

    requester: str
    reach: Reach


@dataclass(frozen=True, slots=True)
class Dialled:
    """A connection, and the address it was made to; whoever gets it closes the stream."""

    stream: trio.abc.Stream
    address: Address


def _networks(*texts: str) -> tuple[IPNetwork, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


_LOOPBACK: Final = _networks("127.0.0.0/8", "::1/128")

_FORBIDDEN: Final = _networks(
    "0.0.0.0/8",  # "this host": Linux connects to itself
    "169.254.0.0/16",  # link-local: metadata of most clouds
    "100.100.100.200/32",  # metadata, Alibaba
    "168.63.129.16/32",  # host agent, Azure
    "192.0.0.0/24",  # protocol assignments; 192.0.0.192 is metadata at Oracle, 192.0.0.8 is the dummy address
    "192.88.99.0/24",  # 6to4 relays
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, broadcast
    "::/96",  # unspecified, and IPv4-compatible spellings
    "::ffff:0:0:0/96",  # IPv4-translated (SIIT)
    "64:ff9b:1::/48",  # a local translator's IPv4, at a place only it knows
    "100::/64",  # discard
    "2001::/23",  # Teredo, ORCHID, benchmarking and other protocol assignments
    "2002::/16",  # 6to4: any IPv4 address
    "5f00::/16",  # segment routing
    "fd00:ec2::/32",  # metadata and services, AWS
    "fd20:ce::254/128",  # metadata, Google
    "fd00:42::42/128",  # metadata, Scaleway
    "fd00:c1::a9fe:a9fe/128",  # metadata, Oracle
    "fe80::/10",  # link-local
    "fec0::/10",  # site-local
    "ff00::/8",  # multicast
)

_PRIVATE: Final = _networks(
    "10.0.0.0/8",
    "100.64.0.0/10",  # carrier-grade address translation
    "172.16.0.0/12",
    "192.168.0.0/16",
    "192.0.2.0/24",  # documentation, three times
    "198.51.100.0/24",
    "203.0.113.0/24",
    "198.18.0.0/15",  # benchmarking
    "2001:db8::/32",  # documentation, twice
    "3fff::/20",
    "fc00::/7",  # unique local
)

_GLOBAL_IPV6: Final = IPv6Network("2000::/3")
"""The only part of IPv6 ever given out; whatever else appears is refused until somebody learns what it is."""

_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_NAT64: Final = IPv6Network("64:ff9b::/96")

_METADATA_NAMES: Final = frozenset(
    {
        "metadata",
        "metadata.google.internal",
        "metadata.goog",
        "metadata.azure.internal",
        "metadata.tencentyun.com",
        "metadata.packet.net",
        "instance-data",
        "instance-data.ec2.internal",
    }
)
"""Names that clouds answer themselves; refused before DNS is asked, whatever it would say."""


def unwrap(text: str) -> IPAddress:
    """Parse an address, without its scope; an IPv4-mapped IPv6 address becomes the IPv4 address it stands for.

    Raises:
        ValueError: Not an address.
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address in _MAPPED:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def zone_of(address: IPAddress) -> Zone:
    """Where an address leads, looking through every known way to spell one address as another."""
    if isinstance(address, IPv6Address):
        if address in _MAPPED:
            return zone_of(unwrap(str(address)))
        if address in _NAT64:
            # Behind DNS64 every public IPv4 host looks like this.  RFC 6052, 3.1: never for an address that is not global.
            inner = zone_of(IPv4Address(int(address) & 0xFFFF_FFFF))
            return Zone.PUBLIC if inner is Zone.PUBLIC else Zone.FORBIDDEN
    if _within(address, _LOOPBACK):
        return Zone.LOOPBACK
    if _within(address, _FORBIDDEN):
        return Zone.FORBIDDEN
    if _within(address, _PRIVATE):
        return Zone.PRIVATE
    if isinstance(address, IPv6Address) and address not in _GLOBAL_IPV6:
        return Zone.FORBIDDEN
    return Zone.PUBLIC


def _within(address: IPAddress, networks: Sequence[IPNetwork]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


class EgressPolicy:
    """Decides for every dial and every redirect, on the address really connected to.

    Args:
        settings: Section `[egress]`.
        rules: How far each requester may go, by name; replaces the default of that requester.  A mirror gives one that
            answers `LOCAL` for its registries and `PUBLIC` for where those redirect to.
        resolver: Looks names up; default is the system's.
        connector: Makes one TCP connection; default is a socket.

    Raises:
        ConfigError: An entry of `egress.allow` is neither a network nor a host.
    """

    def __init__(
        self,
        settings: EgressSettings | None = None,
        *,
        rules: Mapping[str, Rule] | None = None,
        resolver: Resolver | None = None,
        connector: Connector | None = None,
    ) -> None:
        settings = settings or EgressSettings()
        self._allow = _Allow.read(settings.allow)
        self._ports = frozenset(settings.ports) | {80, 443}
        self._rules: dict[str, Rule] = {name: _default_rule(name) for name in REQUESTERS} | dict(rules or {})
        self._resolve: Resolver = resolver or system_resolver
        self._connect: Connector = connector or connect_tcp

    def permit(self, requester: str, host: str, port: int, *, redirected: bool = False, from_public: bool = False) -> Permit:
        """What this hop may reach; asks no DNS.

        Args:
            redirected: A server sent us here.
            from_public: That server was a public one.  It may not send us to an address it could not reach itself, even
                for a user who could.

        Raises:
            NotPermitted: The requester may not go there at all: a peer, a metadata name, a port, a rule.
        """
        rule = self._rules.get(requester)
        if rule is None:
            raise NotPermitted(f"refused to connect to {host}: {requester or 'nobody'!r} may not name what is fetched")
        name = host.rstrip(".").lower()
        if name in _METADATA_NAMES and not self._allow.names(name):
            raise NotPermitted(
                f"refused to connect to {host}: it names a metadata service; list it in egress.allow to permit it"
            )
        reach = rule(host, port, redirected)
        if reach is Reach.NOTHING and not self._allow.names(name):
            raise NotPermitted(
                f"refused to connect to {host} for a {requester}: it is not among what the {requester} may reach"
            )
        if requester != "user" and port < 1024 and port not in self._ports:
            raise NotPermitted(f"refused to connect to {host}:{port} for a {requester}: list port {port} in egress.ports")
        return Permit(requester, min(reach, Reach.PUBLIC) if from_public else reach)

    async def resolve(self, host: str, port: int, permit: Permit) -> list[Address]:
        """Every address of the name, all of them permitted.

        One refused address refuses the name, so that an answer that mixes public and private ones gets nowhere; only
        link-local ones beside others are passed over, because mDNS adds those to every name it answers.

        Raises:
            NotPermitted: Which address, and what to set.
            socket.gaierror: The name cannot be looked up.
        """
        found = [unwrap(text) for text in (await self._resolve(host, port))[:MAX_ADDRESSES]]
        kept = [address for address in found if not (address.is_link_local and isinstance(address, IPv6Address))]
        for address in kept or found:
            self.check(address, host, permit)
        return [Address(str(address), port) for address in dict.fromkeys(kept or found)]

    def check(self, address: IPAddress, host: str, permit: Permit) -> None:
        """Raises:
        NotPermitted: The permit does not reach this address.
        """
        zone = zone_of(address)
        if self._allow.covers(address, host, zone):
            return
        if zone is Zone.PUBLIC and permit.reach >= Reach.PUBLIC:
            return
        if zone in (Zone.PRIVATE, Zone.LOOPBACK) and permit.reach >= Reach.LOCAL:
            return
        literal = host.strip("[]") == str(address)
        what = f"{host} is" if literal else f"{host} is {address},"
        raise NotPermitted(f"refused to connect: {what} {_describe(zone)}; list {address} in egress.allow to permit it")

    def permits_unseen(self, host: str, permit: Permit) -> bool:
        """Whether a name that only an outgoing proxy can look up may be left to it: for a user, or where it is listed."""
        return permit.reach >= Reach.LOCAL or self._allow.names(host)

    async def connect(self, host: str, port: int, permit: Permit) -> Dialled:
        """A TCP connection to one of the checked addresses of this name; the caller closes it.

        Addresses are tried in the resolver's order with families taking turns, each beside the silent ones before it
        (RFC 8305).

        Raises:
            NotPermitted: As `resolve`; nothing was sent.
            OSError: No address answered, or (`socket.gaierror`) there is none.
        """
        return await self.connect_resolved(await self.resolve(host, port, permit))

    async def connect_resolved(self, addresses: Sequence[Address]) -> Dialled:
        """A TCP connection to one of the addresses that `resolve` returned just now.

        Raises:
            OSError: As `connect`.
        """
        return await connect_first(addresses, self._connect)

    async def connect_trusted(self, host: str, port: int) -> Dialled:
        """A TCP connection to what the configuration itself names (an outgoing proxy), without a check.

        Raises:
            OSError: As `connect`.
        """
        addresses = [Address(str(unwrap(text)), port) for text in (await self._resolve(host, port))[:MAX_ADDRESSES]]
        return await connect_first(addresses, self._connect)


@dataclass(frozen=True, slots=True)
class _Allow:
    """`egress.allow`, read."""

    networks: tuple[IPNetwork, ...]
    hosts: frozenset[str]
    suffixes: tuple[str, ...]

    @classmethod
    def read(cls, entries: Sequence[str]) -> _Allow:
        networks: list[IPNetwork] = []
        hosts: set[str] = set()
        suffixes: list[str] = []
        for entry in entries:
            try:
                networks.append(ipaddress.ip_network(entry.strip("[]")))
                continue
            except ValueError as error:
                if "/" in entry or ":" in entry or not entry.strip("*.") or entry.strip("*.").replace(".", "").isdigit():
                    raise ConfigError(
                        f"egress.allow: {entry!r} is neither a network (10.1.0.0/16), an address, a host nor *.domain: {error}"
                    ) from error
            name = entry.rstrip(".").lower()
            if name.startswith("*."):
                suffixes.append(name[1:])
            else:
                hosts.add(name)
        return cls(tuple(networks), frozenset(hosts), tuple(suffixes))

    def names(self, host: str) -> bool:
        """Whether an entry names this host, or is exactly this literal address."""
        name = host.rstrip(".").lower()
        if name in self.hosts or name.endswith(self.suffixes):
            return True
        try:
            return _within(unwrap(name.strip("[]")), self.networks)
        except ValueError:
            return False

    def covers(self, address: IPAddress, host: str, zone: Zone) -> bool:
        if zone is Zone.FORBIDDEN:  # only an entry as narrow as what is refused: 0.0.0.0/0 was not meant to open metadata
            return any(
                address.version == network.version and address in network and _is_forbidden(network)
                for network in self.networks
            )
        return self.names(host) or _within(address, self.networks)


def _is_forbidden(network: IPNetwork) -> bool:
    return any(
        network.version == forbidden.version and network.subnet_of(forbidden)  # type: ignore[arg-type]  # versions are equal
        for forbidden in (*_FORBIDDEN, _NAT64)
    )


def _default_rule(requester: str) -> Rule:
    reach = Reach.LOCAL if requester == "user" else Reach.PUBLIC
    return lambda host, port, redirected: reach


def _describe(zone: Zone) -> str:
    match zone:
        case Zone.FORBIDDEN:
            return "a link-local, metadata or otherwise special address"
        case Zone.LOOPBACK:
            return "a loopback address"
        case Zone.PRIVATE:
            return "a private address"
        case Zone.PUBLIC:
            return "a public address"


# --- the system's resolver and sockets -------------------------------------------------------------------------------


async def system_resolver(host: str, port: int) -> Sequence[str]:
    """`getaddrinfo`, in its order of preference (RFC 6724).

    It also reads 127.1, 0x7f000001, 2130706433 and 0177.0.0.1, which is why only its result is checked.

    Raises:
        socket.gaierror: No such name, or no answer.
    """
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label that is empty or longer than 63 bytes
        raise socket.gaierror(socket.EAI_NONAME, "not a valid host name") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def connect_tcp(address: Address) -> trio.SocketStream:
    """Connect to one literal address, and look again at who answered.

    Raises:
        OSError: It did not answer, or the connection is not with this address.
    """
    wanted = ipaddress.ip_address(address.host)
    family = socket.AF_INET6 if wanted.version == 6 else socket.AF_INET
    connection = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await connection.connect((address.host, address.port))
        if ipaddress.ip_address(str(connection.getpeername()[0]).partition("%")[0]) != wanted:
            raise OSError(f"connected to {connection.getpeername()[0]} instead of {address.host}")
        return trio.SocketStream(connection)
    except BaseException:
        connection.close()
        raise


async def connect_first(addresses: Sequence[Address], connect: Connector = connect_tcp) -> Dialled:
    """The first of several addresses that answers (RFC 8305).

    Raises:
        OSError: None did; the first one's reason.
    """
    winner: Dialled | None = None
    failures: list[OSError] = []

    async def attempt(address: Address, failed: trio.Event) -> None:
        nonlocal winner
        try:
            stream = await connect(address)
        except OSError as error:
            failures.append(error)
            failed.set()
            return
        if winner is None:
            winner = Dialled(stream, address)
            nursery.cancel_scope.cancel()
        else:  # two answered in the same tick
            await trio.aclose_forcefully(stream)

    try:
        async with trio.open_nursery() as nursery:
            for address in take_turns(addresses):
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                with trio.move_on_after(HAPPY_EYEBALLS_DELAY):
                    await failed.wait()
    except BaseException:
        if winner is not None:
            await trio.aclose_forcefully(winner.stream)
        raise
    if winner is None:
        raise failures[0] if failures else OSError("the name has no address")
    return winner


def take_turns(addresses: Sequence[Address]) -> list[Address]:
    """Families alternate, beginning with the resolver's first choice, so that a dead one costs one delay, not many."""
    first = [a for a in addresses if (":" in a.host) == (":" in addresses[0].host)]
    second = [a for a in addresses if (":" in a.host) != (":" in addresses[0].host)]
    turns = [pair for both in zip(first, second, strict=False) for pair in both]
    return turns + first[len(second) :] + second[len(first) :]
