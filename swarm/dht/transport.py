"""Datagrams over a real UDP socket, dual stack where the host has both families."""

from __future__ import annotations

import errno
import socket
from collections import OrderedDict, deque
from contextlib import suppress
from typing import Final

import trio

from swarm.dht import messages
from swarm.edges import Address
from swarm.errors import ConfigError

_RECEIVE_BUFFER_BYTES: Final = 1 << 20
"""A burst of answers while the event loop is busy with something else; the kernel halves what it cannot give."""

_BATCH: Final = 64
"""Datagrams taken at one wake-up; the other tasks run in between."""

_MAPPED: Final = "::ffff:"
_IP_PKTINFO: Final = 8
"""Linux's number; the socket module of Python 3.11 does not name it."""
_CONTROL_BYTES: Final = socket.CMSG_SPACE(20)
_ANY_INTERFACE: Final = b"\0\0\0\0"
_MAX_REMEMBERED: Final = 4096
"""Senders of whom it is remembered which of our addresses they wrote to."""


class UdpTransport:
    """`edges.DatagramTransport` over one bound socket.  Whoever opened it closes it (it is a context manager).

    Bound to every address, it answers each sender from the address that sender wrote to: on a host with several, the
    kernel would choose by its routes, and the sender would not know the answer.
    """

    def __init__(self, sock: socket.socket) -> None:
        """`sock` is bound and non-blocking; it belongs to the transport from here on."""
        self._socket = sock
        self._is_ipv6 = sock.family == socket.AF_INET6
        self._received: deque[tuple[bytes, Address]] = deque()
        self._local = self._address(sock.getsockname())
        self._written_to: OrderedDict[Address, bytes] | None = None
        if self._local.host in ("::", "0.0.0.0"):  # noqa: S104  # asking, not binding
            self._written_to = OrderedDict()
            level, option = (
                (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO) if self._is_ipv6 else (socket.IPPROTO_IP, _IP_PKTINFO)
            )
            sock.setsockopt(level, option, 1)

    @classmethod
    def open(cls, address: Address) -> UdpTransport:
        """Bind; the host ``::`` means IPv4 too, and falls back to ``0.0.0.0`` on a host without IPv6.

        Raises:
            ConfigError: The address is in use, not ours, or not permitted.
        """
        try:
            return cls(_bind(address))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address} (UDP): {error.strerror}; choose another address with --listen"
            ) from error

    @property
    def local_address(self) -> Address:
        return self._local

    async def send(self, data: bytes, address: Address) -> None:
        """Send, or drop as UDP may: no route, no buffer, an ICMP error of an earlier datagram, a family we lack."""
        await trio.lowlevel.checkpoint()
        name = self._name(address)
        if name is None:
            return
        for _ in range(2):
            try:
                self._socket.sendmsg((data,), self._control_for(address), 0, name)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise trio.ClosedResourceError("this UDP transport is closed") from error
                if self._written_to is not None:
                    self._written_to.pop(address, None)  # perhaps that address is no longer ours
                return
            else:
                return

    async def receive(self) -> tuple[bytes, Address]:
        """The next datagram, cut one byte beyond what the protocol allows."""
        await trio.lowlevel.checkpoint()
        while not self._received:
            await trio.lowlevel.wait_readable(self._socket)
            self._drain()
        return self._received.popleft()

    def source_towards(self, address: Address) -> str | None:
        """The host our datagrams to an address leave from, by this machine's routes; `None` if there is no route."""
        name = self._name(address)
        if name is None:
            return None
        try:
            with socket.socket(self._socket.family, socket.SOCK_DGRAM) as probe:
                probe.connect(name)  # sends nothing
                return self._address(probe.getsockname()).host
        except OSError:
            return None

    def close(self) -> None:
        """Close the socket; whoever waits in `receive` gets `trio.ClosedResourceError`."""
        with suppress(OSError, RuntimeError):  # closed already; closed where no trio runs
            trio.lowlevel.notify_closing(self._socket)
        self._socket.close()

    def __enter__(self) -> UdpTransport:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _drain(self) -> None:
        for _ in range(_BATCH):
            try:
                if self._written_to is None:
                    data, name = self._socket.recvfrom(messages.MAX_DATAGRAM_BYTES + 1)
                    self._received.append((data, self._address(name)))
                else:
                    self._receive_with_destination(self._written_to)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise trio.ClosedResourceError("this UDP transport is closed") from error
                continue  # an ICMP error for something sent earlier: reading took it off the socket

    def _receive_with_destination(self, written_to: OrderedDict[Address, bytes]) -> None:
        data, control, _, name = self._socket.recvmsg(messages.MAX_DATAGRAM_BYTES + 1, _CONTROL_BYTES)
        address = self._address(name)
        for level, kind, value in control:
            if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
                written_to[address] = value[:16] + _ANY_INTERFACE
            elif (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
                written_to[address] = _ANY_INTERFACE + value[4:8] + b"\0\0\0\0"
        if len(written_to) > _MAX_REMEMBERED:
            written_to.popitem(last=False)
        self._received.append((data, address))

    def _control_for(self, address: Address) -> list[tuple[int, int, bytes]]:
        source = self._written_to.get(address) if self._written_to is not None else None
        if source is None:
            return []
        return [
            (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, source) if self._is_ipv6 else (socket.IPPROTO_IP, _IP_PKTINFO, source)
        ]

    def _name(self, address: Address) -> tuple[str, int] | None:
        if ":" in address.host:
            return (address.host, address.port) if self._is_ipv6 else None
        return (_MAPPED + address.host if self._is_ipv6 else address.host, address.port)

    @staticmethod
    def _address(name: tuple[str, int] | tuple[str, int, int, int]) -> Address:
        host = name[0].partition("%")[0]
        return Address(host.removeprefix(_MAPPED) if "." in host else host, name[1])


def _bind(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM)
    except OSError:
        if address.host != "::":
            raise
        return _bind(Address("0.0.0.0", address.port))  # noqa: S104  # the caller asked for every address
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host != "::")
        sock.bind((address.host, address.port))
    except OSError as error:
        sock.close()
        if address.host == "::" and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return _bind(Address("0.0.0.0", address.port))  # noqa: S104  # as above
        raise
    return sock
