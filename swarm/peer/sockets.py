"""TCP and TLS as the peer layer needs them: non-blocking standard-library sockets under trio, no copies in between.

`ssl.SSLSocket` works on the descriptor itself; `trio.SSLStream` moves every byte through two memory buffers and two
locks, for half as much CPU again on each control frame (docs/decisions/peers.md).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from swarm.edges import Address
from swarm.errors import ConfigError, PeerError

log = structlog.get_logger(__name__)

BACKLOG: Final = 512
PAUSE_SECONDS: Final = 0.1
"""How long accepting pauses when descriptors run out; the kernel's queue holds what arrives meanwhile (SECURITY: T32)."""

_EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
_TRANSIENT: Final = frozenset(
    (errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH)
)
_WARN_SECONDS: Final = 60.0

WOULD_BLOCK: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def canonical_address(name: tuple[object, ...]) -> Address:
    """What `getpeername` or `accept` returned, without scope, and IPv4-mapped IPv6 unwrapped."""
    return Address(canonical_host(str(name[0])), int(str(name[1])))


def canonical_host(host: str) -> str:
    """
    Raises:
        ValueError: Not an IP address.
    """
    ip = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return str(ip)


def may_be_dialled(address: Address) -> bool:
    """Whether a peer's address is one that a peer can have: records are hints, and must not make us knock on anything else."""
    try:
        ip = ipaddress.ip_address(address.host)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return False  # not canonical: it would get around what is remembered of the plain form
    return 1024 <= address.port <= 65535 and not (ip.is_multicast or ip.is_unspecified or ip.is_link_local or ip == _BROADCAST)


_BROADCAST: Final = ipaddress.ip_address("255.255.255.255")


async def wait_for(sock: socket.socket, want: BaseException) -> None:
    """Wait until the operation that raised `want` may succeed."""
    if isinstance(want, ssl.SSLWantWriteError):
        await trio.lowlevel.wait_writable(sock)
    else:
        await trio.lowlevel.wait_readable(sock)


def close(sock: socket.socket) -> None:
    """Close, and wake whoever waits for it."""
    if sock.fileno() >= 0:
        trio.lowlevel.notify_closing(sock)
        sock.close()


async def dial(address: Address) -> socket.socket:
    """A connected, non-blocking TCP socket; the caller closes it, and bounds the time.

    Raises:
        PeerError: Nothing answers there.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise PeerError(f"cannot connect to {address}: {error.strerror}") from error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        failure = sock.connect_ex((address.host, address.port))
        if failure == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            raise PeerError(f"cannot connect to {address}: {errno.errorcode.get(failure, failure)}")
        return sock
    except OSError as error:
        close(sock)
        raise PeerError(f"cannot connect to {address}: {error.strerror}") from error
    except BaseException:
        close(sock)
        raise


async def start_tls(sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> ssl.SSLSocket:
    """The TLS handshake.  The returned socket takes the place of `sock`, which is closed on failure; the caller bounds
    the time.

    Raises:
        PeerError: The handshake failed; under TLS 1.3 a client learns that the server refused its certificate only when
        it reads.
    """
    try:
        secure = context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)
    except (OSError, ValueError) as error:
        close(sock)
        raise PeerError(f"TLS handshake failed: {_tls_reason(error)}") from error
    try:
        while True:
            try:
                secure.do_handshake()
                return secure
            except WOULD_BLOCK as want:
                await wait_for(secure, want)
    except (OSError, ValueError) as error:
        close(secure)
        raise PeerError(f"TLS handshake failed: {_tls_reason(error)}") from error
    except BaseException:
        close(secure)
        raise


def _tls_reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or "closed by peer").lower().replace("_", " ")
    return (error.strerror if isinstance(error, OSError) else None) or "connection lost"


def certificate_of(secure: ssl.SSLSocket) -> bytes:
    """The peer's certificate, DER.

    Raises:
        PeerError: It presented none.
    """
    certificate = secure.getpeercert(binary_form=True)
    if not certificate:
        raise PeerError("the peer presented no certificate")
    return certificate


class SocketStream(trio.abc.Stream):
    """A non-blocking socket, plain or TLS, as a trio stream.

    No close_notify is sent: what ends a connection is said above TLS, by a close frame or a length.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._rest = b""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        # Nearly always nothing has come yet: waiting first saves a system call and an exception.
        if self._nothing_decrypted():
            await self._wait(ssl.SSLWantReadError())
        while True:
            try:
                return self._sock.recv(max_bytes or 65536)
            except WOULD_BLOCK as want:
                await self._wait(want)
            except (OSError, ValueError) as error:
                raise self._error() from error

    def _nothing_decrypted(self) -> bool:
        try:
            return not (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending())
        except (OSError, ValueError) as error:
            raise self._error() from error

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        unsent = memoryview(self._rest + data if self._rest else data)
        self._rest = b""
        while unsent:
            try:
                unsent = unsent[self._sock.send(unsent) :]
            except ssl.SSLWantReadError as want:
                await self._wait(want)
            except (BlockingIOError, ssl.SSLWantWriteError):
                await self._wait(ssl.SSLWantWriteError())
            except (OSError, ValueError) as error:
                raise self._error() from error

    def send_nowait(self, data: bytes) -> bool:
        """Send what the socket takes at once; `False` if something is left, which the next `send_all` sends before its own.

        Not while a `send_all` runs.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: As `send_all`.
        """
        if self._rest:
            self._rest += data
            return False
        try:
            count = self._sock.send(data)
        except WOULD_BLOCK:
            count = 0
        except (OSError, ValueError) as error:
            raise self._error() from error
        self._rest = data[count:]
        return not self._rest

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.wait_writable(self._sock)

    async def aclose(self) -> None:
        close(self._sock)
        await trio.lowlevel.checkpoint()

    async def _wait(self, want: BaseException) -> None:
        if self._sock.fileno() < 0:
            raise trio.ClosedResourceError
        await wait_for(self._sock, want)

    def _error(self) -> trio.BrokenResourceError | trio.ClosedResourceError:
        return trio.ClosedResourceError() if self._sock.fileno() < 0 else trio.BrokenResourceError()


# --- listening ----------------------------------------------------------------------------------------------------


def listen(addresses: list[Address]) -> tuple[list[socket.socket], list[socket.socket]]:
    """Listening sockets for control and, one port higher, for pieces; the same two ports on every address.

    `::` serves IPv4 too unless `0.0.0.0` is asked for as well.  Port 0 takes two free ports.  The caller closes them.

    Raises:
        ConfigError: An address is taken or not ours.
    """
    control: list[socket.socket] = []
    pieces: list[socket.socket] = []
    dual = not any(address.host == "0.0.0.0" for address in addresses)  # noqa: S104 - compared with, not bound to
    control_port = pieces_port = 0
    try:
        for address in addresses:
            control.append(_bind(address.host, address.port or control_port, dual))
            control_port = control_port or control[-1].getsockname()[1]
            wanted = address.port + 1 if address.port else pieces_port
            pieces.append(_bind(address.host, wanted, dual))
            pieces_port = pieces_port or pieces[-1].getsockname()[1]
    except BaseException:
        for sock in control + pieces:
            sock.close()
        raise
    return control, pieces


def _bind(host: str, port: int, dual: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock: socket.socket | None = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual and host == "::" else 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        return sock
    except (OSError, OverflowError) as error:
        if sock is not None:
            sock.close()
        if isinstance(error, OSError) and error.errno == errno.EAFNOSUPPORT and host == "::":
            return _bind("0.0.0.0", port, dual)  # noqa: S104 - "everywhere" on a host without IPv6
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise ConfigError(
            f"cannot listen on {Address(host, port)}: {reason}; stop what uses it, or choose another address with --listen"
        ) from error


async def accept_forever(listener: socket.socket, handle: Callable[[socket.socket, Address], Awaitable[None] | None]) -> None:
    """Hand each connection to `handle` (which must return at once), until the listener is closed or this is cancelled.

    When descriptors run out accepting pauses; nothing is lost, and nothing spins.
    """
    warned = -_WARN_SECONDS
    while True:
        try:
            sock, name = listener.accept()
        except BlockingIOError:
            try:
                await trio.lowlevel.wait_readable(listener)
            except trio.ClosedResourceError:
                return
            continue
        except OSError as error:
            if listener.fileno() < 0:
                return
            if error.errno not in _EXHAUSTED and error.errno not in _TRANSIENT:
                raise
            if error.errno in _EXHAUSTED:
                if trio.current_time() - warned >= _WARN_SECONDS:
                    warned = trio.current_time()
                    log.warning("accepting paused", reason=error.strerror)
                await trio.sleep(PAUSE_SECONDS)
            continue
        _prepare(sock)
        handle(sock, canonical_address(name))


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
