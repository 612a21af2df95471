"""HTTP/1.1 connections to origins: pooled, kept alive, each dialled through the egress policy.

httpcore, the engine of httpx, without httpx's client around it: redirects, credentials, cookies, proxies from the
environment and content codings are all ours to decide here, so the client would only be something to switch off.  Its
log of every header is switched off below for the same reason.

Reads take up to 256 KiB instead of httpcore's 64 KiB, which halves the CPU a GiB costs (tests/benchmarks/origin.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote_to_bytes, urlsplit

import httpcore
import trio

from swarm.edges import Address
from swarm.egress import EgressPolicy, Permit, Zone, unwrap, zone_of
from swarm.errors import ConfigError, NotPermitted, OriginUnreachable
from swarm.origin.answers import Headers
from swarm.origin.retry import AttemptFailed, Cause, Health
from swarm.origin.settings import OriginSettings, matches_host
from swarm.origin.tls import TlsStream

# At DEBUG it writes whole header lists, Location and Set-Cookie among them.
logging.getLogger("httpcore").setLevel(logging.WARNING)

READ_BYTES: Final = 256 * 1024

MAX_HOSTS: Final = 64
"""Hosts whose idle connections are kept; a server that redirects to ever new names must not collect our descriptors."""

KEEP_ALIVE: Final = 30.0
"""Seconds an idle connection is kept; servers close theirs after 5 to 75."""

PROXIED_LOOKUP_SECONDS: Final = 3.0
"""Behind an outgoing proxy there is often no DNS for the outside; do not wait for it before each request."""

MAX_CHALLENGES: Final = 8

MAX_DRAIN_BYTES: Final = 64 * 1024
"""The body of a redirect or an error is read to its end if it is no longer, so that the connection can be used again."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where one request goes.  Requests share connections only if all of this is equal."""

    scheme: str
    host: str
    port: int
    permit: Permit

    @property
    def explicit_port(self) -> int | None:
        """The port, unless it is the scheme's own."""
        return None if self.port == (443 if self.scheme == "https" else 80) else self.port

    def is_host_of(self, other: Target) -> bool:
        """Whether both are the same server, whatever either may reach."""
        return (self.scheme, self.host, self.port) == (other.scheme, other.host, other.port)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.explicit_port is None else f"{host}:{self.port}"


@dataclass(slots=True)
class Host:
    """One target's connections."""

    pool: httpcore.AsyncConnectionPool
    slots: trio.Semaphore
    health: Health = field(default_factory=Health)
    users: int = 0


class Exchange:
    """One answered request.  `close` it, whatever happened; the connection is kept if the body was read to its end."""

    def __init__(self, target: Target, host: Host, response: httpcore.Response, *, has_body: bool) -> None:
        self._host = host
        self._response = response
        self._stream: PinnedStream = response.extensions["network_stream"]
        self._parts: AsyncIterator[bytes] | None = None
        self._has_body = has_body
        self._ended = False
        self.target = target
        self.status = response.status
        self.headers: Headers = _readable(response.headers)

    @property
    def health(self) -> Health:
        return self._host.health

    @property
    def challenges(self) -> tuple[str, ...]:
        """Every `WWW-Authenticate`: a server that takes several kinds of credentials sends several."""
        named = (value.decode("latin-1") for name, value in self._response.headers if name.lower() == b"www-authenticate")
        return tuple(named)[:MAX_CHALLENGES]

    @property
    def from_public(self) -> bool:
        """Whether a server with a public address answered."""
        return self._stream.is_public

    async def part(self) -> bytes:
        """The next bytes of the body as they came, at most about `READ_BYTES`; empty at its end.

        Raises:
            OriginUnreachable: The connection broke before the end, or stalled.
        """
        if self._ended:
            return b""
        if self._parts is None:
            self._parts = self._response.stream.__aiter__()  # type: ignore[union-attr]  # we made an asynchronous request
        try:
            with _translated(self.target, OriginUnreachable):
                return await anext(self._parts)
        except StopAsyncIteration:
            self._ended = True
            return b""
        except BaseException:
            self._ended = True  # the generators are finished, by whatever it was
            raise

    async def close(self) -> None:
        """Give the connection back, or close it.  Waits for no network."""
        with trio.CancelScope(shield=True):
            self._stream.abandoned = self._has_body and not self._ended
            try:
                with contextlib.suppress(OriginUnreachable):
                    # httpcore's generators must end by themselves: one that is dropped half-way is finished by the garbage
                    # collector, with a warning.  From an abandoned stream the next read fails, which ends them all.
                    while self._parts is not None and not self._ended:
                        await self.part()
                await self._response.aclose()
            finally:
                self._host.slots.release()
                self._host.users -= 1

    async def drain(self) -> None:
        """Read a short rest, then close."""
        size = 0
        with trio.move_on_after(1.0), contextlib.suppress(OriginUnreachable):
            while size <= MAX_DRAIN_BYTES and (data := await self.part()):
                size += len(data)
        await self.close()


class Connections:
    """Every connection to an origin.  `aclose` it."""

    def __init__(self, egress: EgressPolicy, settings: OriginSettings) -> None:
        self._egress = egress
        self._settings = settings
        self._hosts: OrderedDict[Target, Host] = OrderedDict()
        self._proxy = _read_proxy(settings.proxy)

    async def exchange(
        self,
        target: Target,
        method: str,
        path: bytes,
        headers: list[tuple[str, str]],
        timeouts: dict[str, float],
        body: bytes = b"",
    ) -> Exchange:
        """Send one request and wait for the head of its answer.

        Args:
            path: Path and query, ASCII.
            timeouts: httpcore's: `connect`, `read`, `write`, in seconds.

        Raises:
            NotPermitted: Egress policy; nothing was sent.
            AttemptFailed: Worth another try.
            OriginUnreachable: Not worth one.
        """
        host = await self._host(target)
        host.users += 1
        try:
            await host.slots.acquire()
        except BaseException:
            host.users -= 1
            raise
        try:
            public = await self._check_behind_proxy(target) if self._is_proxied(target) else None
            response = await self._send(host, target, method, path, headers, timeouts, body)
        except BaseException as error:
            host.slots.release()
            host.users -= 1
            if isinstance(error, AttemptFailed):
                error.health = host.health
            raise
        answer = Exchange(target, host, response, has_body=method != "HEAD")
        if public is not None:
            answer._stream.is_public = public
        return answer

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            while self._hosts:
                await self._hosts.popitem()[1].pool.aclose()

    def health(self, target: Target) -> Health | None:
        host = self._hosts.get(target)
        return host.health if host is not None else None

    async def _send(
        self,
        host: Host,
        target: Target,
        method: str,
        path: bytes,
        headers: list[tuple[str, str]],
        timeouts: dict[str, float],
        body: bytes,
    ) -> httpcore.Response:
        request = httpcore.Request(
            method,
            httpcore.URL(scheme=target.scheme.encode(), host=target.host.encode(), port=target.explicit_port, target=path),
            headers=[(name.encode("ascii"), value.encode("utf-8")) for name, value in headers],
            content=body,
            extensions={"timeout": timeouts},
        )
        with trio.move_on_after(self._settings.header_timeout), _translated(target, AttemptFailed):
            return await host.pool.handle_async_request(request)
        raise AttemptFailed(f"{target.authority} gave no answer within {self._settings.header_timeout:g} s", Cause.DISCONNECTED)

    async def _host(self, target: Target) -> Host:
        host = self._hosts.get(target)
        if host is None:
            host = self._hosts[target] = Host(self._pool(target), trio.Semaphore(self._settings.connections_per_host))
        self._hosts.move_to_end(target)
        idle = [known for known, kept in self._hosts.items() if not kept.users and known != target]
        for known in idle[: max(0, len(self._hosts) - MAX_HOSTS)]:
            await self._hosts.pop(known).pool.aclose()
        return host

    def _pool(self, target: Target) -> httpcore.AsyncConnectionPool:
        proxied = self._is_proxied(target)
        return httpcore.AsyncConnectionPool(
            ssl_context=self._tls(target.host) if target.scheme == "https" else None,
            proxy=self._proxy if proxied else None,
            max_connections=self._settings.connections_per_host,
            keepalive_expiry=KEEP_ALIVE,
            network_backend=PinnedBackend(self._egress, None if proxied else target.permit),
        )

    def _is_proxied(self, target: Target) -> bool:
        return self._proxy is not None and not any(matches_host(p, target.host) for p in self._settings.proxy_except)

    async def _check_behind_proxy(self, target: Target) -> bool:
        """The policy holds for the destination, though the proxy dials it.  Returns whether it is a public one."""
        found: list[Address] = []
        with trio.move_on_after(PROXIED_LOOKUP_SECONDS), contextlib.suppress(socket.gaierror):
            found = await self._egress.resolve(target.host, target.port, target.permit)
        if not found and not self._egress.permits_unseen(target.host, target.permit):
            raise NotPermitted(
                f"refused: {target.host} cannot be looked up here, so where it leads cannot be checked; "
                "list it in egress.allow to leave it to the proxy"
            )
        # What only the proxy can look up counts as public: where it redirects to is judged the stricter way.
        return all(zone_of(unwrap(address.host)) is Zone.PUBLIC for address in found)

    def _tls(self, host: str) -> ssl.SSLContext:
        for pattern, file in self._settings.ca:
            if matches_host(pattern, host):
                return private_tls(file)
        return public_tls()


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """httpcore's way to the network.

    Args:
        permit: What may be reached; `None` for the configured proxy, which is the operator's own choice.
    """

    def __init__(self, egress: EgressPolicy, permit: Permit | None) -> None:
        self._egress = egress
        self._permit = permit

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None, socket_options: Any = None
    ) -> httpcore.AsyncNetworkStream:
        seconds = timeout if timeout is not None else float("inf")
        stage, cause = f"looking up {host}", Cause.LOOKUP
        try:
            with trio.move_on_after(seconds):
                if self._permit is None:
                    dialled = await self._egress.connect_trusted(host, port)
                else:
                    addresses = await self._egress.resolve(host, port, self._permit)
                    stage, cause = "connecting", Cause.CONNECT
                    dialled = await self._egress.connect_resolved(addresses)
                return PinnedStream(dialled.stream, is_public=zone_of(unwrap(dialled.address.host)) is Zone.PUBLIC)
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise AttemptFailed(f"the name {host} cannot be looked up now: {error.strerror}", Cause.LOOKUP) from error
            raise OriginUnreachable(f"there is no host {host}: {error.strerror}; check the URL") from error
        except OSError as error:
            raise httpcore.ConnectError(os.strerror(error.errno) if error.errno else str(error)) from error
        raise AttemptFailed(f"{stage} took longer than {seconds:g} s", cause)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class PinnedStream(httpcore.AsyncNetworkStream):
    """A connection to a checked address.

    Attributes:
        abandoned: Further reads fail at once.
        is_public: Whether the other end has a public address.
    """

    def __init__(self, tcp: trio.abc.Stream, tls: TlsStream | None = None, *, is_public: bool) -> None:
        self._tcp = tcp
        self._stream: trio.abc.Stream = tls if tls is not None else tcp
        self.abandoned = False
        self.is_public = is_public

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self.abandoned:
            raise httpcore.ReadError("not read further")
        try:
            with trio.fail_after(timeout if timeout is not None else float("inf")):
                return bytes(await self._stream.receive_some(READ_BYTES))
        except trio.TooSlowError as error:
            raise httpcore.ReadTimeout(f"nothing came for {timeout:g} s") from error
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpcore.ReadError("the connection broke") from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            with trio.fail_after(timeout if timeout is not None else float("inf")):
                await self._stream.send_all(buffer)
        except trio.TooSlowError as error:
            raise httpcore.WriteTimeout(f"nothing could be sent for {timeout:g} s") from error
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpcore.WriteError("the connection broke") from error

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        tls = TlsStream(self._tcp, ssl_context, server_hostname or "")
        try:
            with trio.fail_after(timeout if timeout is not None else float("inf")):
                await tls.handshake()
        except BaseException as error:
            await trio.aclose_forcefully(self._tcp)
            if isinstance(error, trio.TooSlowError):
                raise httpcore.ConnectTimeout(f"no TLS within {timeout:g} s") from error
            if isinstance(error, ssl.SSLError):
                raise _tls_failure(server_hostname or "", error) from error
            if isinstance(error, (trio.BrokenResourceError, trio.ClosedResourceError)):
                raise httpcore.ConnectError("the connection broke during the TLS handshake") from error
            raise
        return PinnedStream(self._tcp, tls, is_public=self.is_public)

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return None  # httpcore would ask it about HTTP/2
        if info == "is_readable":
            return isinstance(self._tcp, trio.SocketStream) and self._tcp.socket.is_readable()
        return None


def _tls_failure(host: str, error: ssl.SSLError) -> Exception:
    """A wrong certificate does not become right by asking again; a broken connection may."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return OriginUnreachable(
            f"the certificate of {host} is refused: {error.verify_message}; a private authority can be named in origin.ca"
        )
    if isinstance(error, ssl.SSLEOFError):
        return httpcore.ConnectError("the connection broke during the TLS handshake")
    return OriginUnreachable(f"no TLS with {host}: {error.reason or 'handshake failed'}; is it an http:// address?")


@contextlib.contextmanager
def _translated(target: Target, failure: type[OriginUnreachable]) -> Iterator[None]:
    """httpcore's exceptions -> ours."""

    def failed(what: str, cause: Cause) -> OriginUnreachable:
        message = f"{target.authority}: {what}"
        return AttemptFailed(message, cause) if failure is AttemptFailed else OriginUnreachable(f"{message}; try again later")

    try:
        yield
    except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
        raise failed(f"cannot connect: {error}", Cause.CONNECT) from error
    except httpcore.ProxyError as error:
        raise failed("the proxy (origin.proxy) refused to connect", Cause.CONNECT) from error
    except httpcore.RemoteProtocolError:
        # Its message quotes the server, which may echo what it was sent: not even a traceback gets to see it.
        raise failed("the connection ended too early, or its answer is not HTTP", Cause.DISCONNECTED) from None
    except (httpcore.NetworkError, httpcore.TimeoutException) as error:
        raise failed(str(error), Cause.DISCONNECTED) from error


def _readable(raw: list[tuple[bytes, bytes]]) -> Headers:
    """Lower-case names; of repeated headers the first, as none that we read may repeat (h11 refuses two lengths)."""
    found: dict[str, str] = {}
    for name, value in raw:
        found.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return found


def _read_proxy(url: str) -> httpcore.Proxy | None:
    if not url:
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("origin.proxy: give http://host:port")
    auth = None
    if parts.username is not None:
        auth = (unquote_to_bytes(parts.username), unquote_to_bytes(parts.password or ""))
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return httpcore.Proxy(
        f"{parts.scheme}://{host}:{parts.port or (443 if parts.scheme == 'https' else 3128)}",
        auth=auth,
        ssl_context=public_tls() if parts.scheme == "https" else None,
    )


@lru_cache(maxsize=1)
def public_tls() -> ssl.SSLContext:
    """The system's authorities, or certifi's where the system has none."""
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if not context.cert_store_stats()["x509_ca"] and not _has_files(paths.capath):
        import certifi

        context.load_verify_locations(certifi.where())
    return context


@lru_cache(maxsize=64)
def private_tls(file: str) -> ssl.SSLContext:
    """Only the authorities in this file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return ssl.create_default_context(cafile=file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"origin.ca: cannot read authorities from {file}: {error}") from error


def _has_files(directory: str | None) -> bool:
    if not directory:
        return False
    try:
        with os.scandir(directory) as entries:
            return any(True for _ in entries)
    except OSError:
        return False
