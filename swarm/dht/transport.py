"""Datagrams over a real UDP socket, dual stack where the host has both families."""

from __future__ import annotations

import errno
import socket
from collections import deque
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


class UdpTransport:
    """`edges.DatagramTransport` over one bound socket.  Whoever opened it closes it (it is a context manager)."""

    def __init__(self, sock: socket.socket) -> None:
        """`sock` is bound and non-blocking; it belongs to the transport from here on."""
        self._socket = sock
        self._is_ipv6 = sock.family == socket.AF_INET6
        self._received: deque[tuple[bytes, Address]] = deque()
        name = sock.getsockname()
        self._local = self._address(name)

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
                self._socket.sendto(data, name)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise trio.ClosedResourceError("this UDP transport is closed") from error
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

    def _drain(self) -> None:
        for _ in range(_BATCH):
            try:
                data, name = self._socket.recvfrom(messages.MAX_DATAGRAM_BYTES + 1)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise trio.ClosedResourceError("this UDP transport is closed") from error
                continue  # an ICMP error for something sent earlier: reading took it off the socket
            self._received.append((data, self._address(name)))

    def close(self) -> None:
        with suppress(OSError):
            trio.lowlevel.notify_closing(self._socket)
        self._socket.close()

    def __enter__(self) -> UdpTransport:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

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
