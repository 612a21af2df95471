"""All connections of a node: who is let in, which of two stays, and the pieces channels beside them.

Participants: the download service above (`PeerEvents`, `UploadSource`), the membership that says who is who, members,
and anybody else who can reach our ports.

Goals: one link for each member, up on both sides or on neither; nothing an outsider does costs more than a bounded number of
sockets for ten seconds; a member that breaks the protocol loses its link, and nobody else anything.
Non-goals: choosing whom to connect to.
"""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, NoReturn, Protocol

import structlog
import trio

from swarm import wire
from swarm.edges import Address, NodeId, PeerEvents, PeerLink, UploadSource
from swarm.errors import LocalProtocolError, NotAMember, PeerError, RemoteProtocolError, SwarmError
from swarm.identity import node_id_of
from swarm.peer import sockets, websocket
from swarm.peer.connection import MAX_SKEW_SECONDS, SETUP_SECONDS, skew
from swarm.peer.dialling import MAX_ADDRESSES, Dialler, Unwanted
from swarm.peer.fetching import BufferPool, Fetcher
from swarm.peer.flushing import Flusher
from swarm.peer.limits import Failures, RateLimit
from swarm.peer.link import Link
from swarm.peer.pieces_channel import Watch, check_open, open_mac
from swarm.peer.serving import PiecesServer
from swarm.peer.settings import PeerSettings, PeerStatistics, Ports, TlsMembership
from swarm.peer.upload import Uploader

log = structlog.get_logger(__name__)

OVERLAP_SECONDS: Final = 20.0
"""A second connection this soon after the first was dialled without knowing of it; later, the peer has lost the first."""

PIECES_DIAL_SECONDS: Final = 2.0
"""How long an address of a peer's pieces port may take where there is another one to try."""

HOUSEKEEPING_SECONDS: Final = 10.0
SKEW_WARNING_SECONDS: Final = 3600.0


class _Handshakes:
    """Connections that have not proven anything yet.  A new one is let in always; the oldest, first of the same host,
    gives way."""

    def __init__(self, limit: int, per_host: int) -> None:
        self._limit = limit
        self._per_host = per_host
        self._hosts: dict[str, OrderedDict[trio.CancelScope, None]] = {}
        self._all: OrderedDict[trio.CancelScope, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, host: str, scope: trio.CancelScope) -> None:
        same = self._hosts.setdefault(host, OrderedDict())
        if len(same) >= self._per_host:
            self._evict(next(iter(same)))
        elif len(self._all) >= self._limit:
            self._evict(next(iter(self._all)))
        self._hosts.setdefault(host, OrderedDict())[scope] = None
        self._all[scope] = host

    def remove(self, scope: trio.CancelScope) -> None:
        host = self._all.pop(scope, None)
        if host is None:
            return
        self._hosts[host].pop(scope, None)
        if not self._hosts[host]:
            del self._hosts[host]

    def _evict(self, scope: trio.CancelScope) -> None:
        self.remove(scope)
        scope.cancel()


class PeerHub:
    """`edges.PeerNetwork` over real sockets.

    Run `run` in a nursery; it listens, and carries every link, until it is cancelled or `aclose` is called.

    Args:
        clock: Wall time, told to peers and compared with theirs.
        may_dial: Which addresses of peers may be dialled at all.
    """

    def __init__(
        self,
        membership: TlsMembership,
        events: PeerEvents,
        uploads: UploadSource,
        *,
        settings: PeerSettings | None = None,
        rng: random.Random,
        clock: Callable[[], float] = time.time,
        may_dial: Callable[[Address], bool] = sockets.may_be_dialled,
    ) -> None:
        self.settings = settings or PeerSettings()
        self.events = events
        self.boot = os.urandom(16)
        self._membership = membership
        self._clock = clock
        self._links: dict[NodeId, Link] = {}
        self._all: set[Link] = set()
        self._unfinished: dict[NodeId, Link] = {}
        self._opening: dict[NodeId, Link] = {}
        self._dialler = Dialler(self, may_dial)
        self._may_dial = may_dial
        self._told: list[str] = []
        self._violators: Failures[NodeId] = Failures(first=10, longest=600)
        self._bans: OrderedDict[NodeId, float] = OrderedDict()
        self._handshakes = _Handshakes(self.settings.max_handshakes, self.settings.max_handshakes_per_host)
        self._link_changed = trio.Event()
        self._skew_warned = -SKEW_WARNING_SECONDS
        self._ports = Ports(0, 0)
        self._state: _Running | None = None
        self._listeners: list[socket.socket] = []
        self._closing = False
        self._pool = BufferPool()
        self._watch = Watch()
        self.flusher = Flusher()
        self._uploader = Uploader(uploads, rng=rng)
        self._uploads = uploads
        self._count_accepted = self._count_refused = self._count_violations = 0
        self._past = _Past()
        membership.on_change(self._membership_changed)

    # --- edges.PeerNetwork -----------------------------------------------------------------------------------------

    async def connect(self, node_id: NodeId, addresses: Sequence[Address]) -> PeerLink:
        link = self._links.get(node_id)
        if link is not None:
            return link
        if self._state is None or self._closing:
            raise PeerError("not connecting: this node is shutting down")
        if node_id == self._membership.node_id:
            raise PeerError("not connecting: that is this node itself")
        if self._banned(node_id, trio.current_time()):
            raise PeerError(f"not connecting to {node_id.hex()}: it misbehaved lately")
        return await self._dialler.connect(node_id, addresses, self._state.nursery)

    def link(self, node_id: NodeId) -> PeerLink | None:
        return self._links.get(node_id)

    def links(self) -> Sequence[PeerLink]:
        return list(self._links.values())

    # --- more for the daemon ----------------------------------------------------------------------------------------

    @property
    def ports(self) -> Ports:
        """The bound ports, once `run` has started."""
        return self._ports

    def ban(self, node_id: NodeId, seconds: float, reason: str) -> None:
        """Drop this peer and have nothing to do with it for a while."""
        self._bans.pop(node_id, None)
        self._bans[node_id] = trio.current_time() + seconds
        if len(self._bans) > 4096:
            self._bans.popitem(last=False)
        link = self._links.get(node_id)
        if link is not None:
            link.end(reason, code=websocket.REFUSED)

    def statistics(self) -> PeerStatistics:
        total = self._past.copy()
        for link in self._links.values():
            total.add(link)
        return PeerStatistics(
            links=len(self._links),
            channels=self._state.server.channels if self._state is not None else 0,
            handshakes=len(self._handshakes),
            uploads=self._uploader.active,
            queued=self._uploader.queued,
            sent=self._state.server.sent if self._state is not None else 0,
            received=total.received,
            dials=self._dialler.attempts,
            dials_failed=self._dialler.failures,
            accepted=self._count_accepted,
            refused=self._count_refused,
            violations=self._count_violations,
            frames_sent=total.frames_sent,
            frames_received=total.frames_received,
            messages_sent=total.messages_sent,
            messages_received=total.messages_received,
        )

    async def run(self, listen: Sequence[Address], *, task_status: trio.TaskStatus[Ports] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on these addresses (control; pieces one port higher; port 0 takes two free ones) and carry all links.

        Ends when cancelled or closed, with every link closed and `link_down` called for each.

        Raises:
            ConfigError: An address is taken or not ours.
        """
        control, pieces = sockets.listen(list(listen))
        self._listeners = control + pieces
        try:
            self._ports = Ports(control[0].getsockname()[1], pieces[0].getsockname()[1]) if control else Ports(0, 0)
            self._told = _told(self.settings.advertise, listen, self._ports)
            async with trio.open_nursery() as nursery:
                await self._start(nursery)
                for listener in control:
                    nursery.start_soon(sockets.accept_forever, listener, self._control_accepted)
                for listener in pieces:
                    nursery.start_soon(sockets.accept_forever, listener, self._pieces_accepted)
                task_status.started(self._ports)
        finally:
            self._state = None
            for listener in self._listeners:
                sockets.close(listener)

    async def _start(self, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        settings = self.settings
        upload_rate = RateLimit(settings.upload_rate, settings.task_upload_rate, now)
        download_rate = RateLimit(settings.download_rate, settings.task_download_rate, now)
        server = PiecesServer(
            self,
            self._uploads,
            self._uploader,
            watch=self._watch,
            rate=upload_rate,
            rule=settings.rule,
            congestion_control=settings.congestion_control,
        )
        await nursery.start(server.run)
        self._state = _Running(nursery, server, download_rate)
        nursery.start_soon(self._watch.run)
        nursery.start_soon(self.flusher.run)
        nursery.start_soon(self._liveness)
        nursery.start_soon(self._housekeeping)

    @property
    def _running(self) -> _Running:
        if self._state is None:
            raise LocalProtocolError("the peer hub does not run")
        return self._state

    async def aclose(self, grace: float = 10.0) -> None:
        """Accept and start nothing more, let uploads under way end for up to `grace` seconds, close every link; `run`
        then returns."""
        self._closing = True
        for listener in self._listeners:
            sockets.close(listener)
        with trio.move_on_after(grace):
            if self._state is not None:
                await self._state.server.wait_drained()
        if self._state is not None:
            self._state.nursery.cancel_scope.cancel()

    # --- dialling.Links ---------------------------------------------------------------------------------------------

    def existing(self, node_id: NodeId) -> Link | None:
        return self._links.get(node_id)

    async def wait_changed(self) -> None:
        await self._link_changed.wait()

    def spawn(self, body: Callable[[Link], Awaitable[None]], link: Link) -> None:
        self._running.nursery.start_soon(body, link)

    async def open(self, node_id: NodeId, address: Address) -> Link:
        secure = await sockets.start_tls(await sockets.dial(address), self._membership.client_context(), server_side=False)
        try:
            certificate = sockets.certificate_of(secure)
            public_key = self._identify(certificate)
            if node_id_of(public_key) != node_id:
                raise Unwanted(f"{address} is another node, {node_id_of(public_key).hex()}")
            return self._make_link(secure, public_key, certificate, address, dialled=True)
        except BaseException:
            sockets.close(secure)
            raise

    def _identify(self, certificate_untrusted: bytes) -> bytes:
        """The public key of a member's certificate.

        Raises:
            PeerError: Not a member, or ourselves.
        """
        try:
            public_key = self._membership.learn(certificate_untrusted)
        except NotAMember as error:
            raise Unwanted(str(error)) from error
        if public_key == self._membership.public_key:
            raise Unwanted("that is this node itself")
        return public_key

    # --- accepting ----------------------------------------------------------------------------------------------------

    def _control_accepted(self, sock: socket.socket, remote: Address) -> None:
        self._accepted(self._incoming, sock, remote)

    def _pieces_accepted(self, sock: socket.socket, remote: Address) -> None:
        self._accepted(self._incoming_pieces, sock, remote)

    def _accepted(self, handler: _Handler, sock: socket.socket, remote: Address) -> None:
        if self._state is None or self._closing:
            sock.close()
            return
        self._count_accepted += 1
        scope = trio.CancelScope()
        self._handshakes.add(remote.host, scope)
        self._state.nursery.start_soon(self._guarded, handler, sock, remote, scope)

    async def _guarded(self, handler: _Handler, sock: socket.socket, remote: Address, scope: trio.CancelScope) -> None:
        """Whatever an outsider sends ends its own connection only."""
        try:
            await handler(sock, remote, scope)
        except (SwarmError, trio.TooSlowError) as error:
            self._count_refused += 1
            log.debug("connection refused", host=remote.host, reason=str(error) or "time-out")
        except Exception:
            self._count_refused += 1
            log.exception("accepted connection failed", host=remote.host)
        finally:
            self._handshakes.remove(scope)
            sockets.close(sock)

    async def _incoming(self, sock: socket.socket, remote: Address, scope: trio.CancelScope) -> None:
        link: Link | None = None
        with scope, trio.fail_after(SETUP_SECONDS):
            secure = await sockets.start_tls(sock, self._membership.server_context(), server_side=True)
            try:
                certificate = sockets.certificate_of(secure)
                public_key = self._identify(certificate)
                if self._banned(node_id_of(public_key), trio.current_time()):
                    raise PeerError("misbehaved lately")
                link = self._make_link(secure, public_key, certificate, remote, dialled=False)
            except BaseException:
                sockets.close(secure)
                raise
        if link is not None:
            self._handshakes.remove(scope)  # A member from here on, with 10 s for its hello.
            await self._run_accepted(link)

    async def _run_accepted(self, link: Link) -> None:
        """One connection without a hello for each member, the newest: ten thousand would be ten thousand buffers."""
        older = self._opening.pop(link.node_id, None)
        if older is not None and not older.up:
            older.end("another connection was made", code=websocket.DUPLICATE)
        self._opening[link.node_id] = link
        try:
            await self.run_link(link)
        finally:
            if self._opening.get(link.node_id) is link:
                del self._opening[link.node_id]

    async def _incoming_pieces(self, sock: socket.socket, remote: Address, scope: trio.CancelScope) -> None:
        server = self._running.server
        served = None
        with scope, trio.fail_after(SETUP_SECONDS):
            served = await server.handshake(sock)
        self._handshakes.remove(scope)
        if served is None:
            return
        try:
            await server.serve(served)
        except RemoteProtocolError as error:
            link = self._links.get(served.channel.node_id)
            if link is not None:
                self.peer_violated(link, str(error))
                link.end(str(error), code=websocket.VIOLATION)

    # --- serving.Doorkeeper ---------------------------------------------------------------------------------------------

    async def secure(self, sock: socket.socket) -> tuple[socket.socket, NodeId]:
        secure = await sockets.start_tls(sock, self._membership.server_context(), server_side=True)
        try:
            return secure, node_id_of(self._identify(sockets.certificate_of(secure)))
        except BaseException:
            sockets.close(secure)
            raise

    async def admit(self, opening_untrusted: wire.ChannelOpen, nonce: bytes, *, tls: NodeId | None) -> NodeId:
        node_id = opening_untrusted.node
        if tls is not None and tls != node_id:
            raise PeerError("pieces channel for another node")
        # The peer may have seen the link come up half a round trip before us.
        while (link := self._links.get(node_id)) is None:
            await self._link_changed.wait()
        if (
            link.hello is None
            or link.hello.boot != opening_untrusted.boot
            or not check_open(opening_untrusted, link.ticket, nonce)
        ):
            raise PeerError("pieces channel with a wrong or stale ticket")
        if tls is None and link.encrypted_pieces:
            raise PeerError("pieces channel in clear where TLS is required")
        return node_id

    # --- links ------------------------------------------------------------------------------------------------------------

    def is_arbiter(self, node_id: NodeId) -> bool:
        """Whether we decide which connection between us and this node stays: the smaller id does."""
        return self._membership.node_id < node_id

    def make_hello(self, ticket: bytes) -> wire.Hello:
        return wire.Hello(
            version=wire.PROTOCOL_VERSION,
            boot=self.boot,
            time=self._clock(),
            control=self._ports.control,
            pieces=self._ports.pieces,
            ticket=ticket,
            encrypt=self.settings.encrypt,
            addresses=self._told,
            agent=self.settings.agent[:200],
        )

    def _make_link(self, sock: socket.socket, public_key: bytes, certificate: bytes, remote: Address, *, dialled: bool) -> Link:
        return Link(
            self,
            sockets.SocketStream(sock),
            public_key=public_key,
            node_id=node_id_of(public_key),
            certificate=certificate,
            remote=remote,
            dialled=dialled,
            ticket=os.urandom(32),
        )

    async def run_link(self, link: Link) -> None:
        self._all.add(link)
        try:
            await link.run()
        finally:
            self._all.discard(link)
            self._finish(link)
            link.settled.set()

    def hello_received(self, link: Link) -> None:
        """The peer's hello has come: decide, synchronously, whether this is *the* link.

        Raises:
            PeerError: It is not.
        """
        old = self._links.get(link.node_id)
        self.check_room(link)
        if self.is_arbiter(link.node_id):
            if old is not None and self._overlaps(old, link):
                self._refuse(link, websocket.DUPLICATE, "there is a connection already")
            link.queue(self.make_hello(link.ticket))
        self._admit(link)

    def check_room(self, link: Link) -> None:
        """
        Raises:
            PeerError: As many links as this node takes; `link` is closed.
        """
        if link.node_id not in self._links and len(self._links) >= self.settings.max_links:
            self._refuse(link, websocket.FULL, "as many connections as this node takes")

    def _overlaps(self, old: Link, new: Link) -> bool:
        """Whether the new one was dialled in ignorance of the old one.  A restarted peer, or one that dials again much later,
        has lost the old one: then the new one is the link."""
        return old.peer_hello.boot == new.peer_hello.boot and new.since - old.since < OVERLAP_SECONDS

    def _refuse(self, link: Link, code: int, reason: str) -> NoReturn:
        link.end(reason, code=code)
        raise PeerError(reason)

    def _admit(self, link: Link) -> None:
        old = self._unfinished.get(link.node_id)
        if old is not None:
            old.end("replaced by a new connection", code=websocket.DUPLICATE)
            self._finish(old)
        self._links[link.node_id] = self._unfinished[link.node_id] = link
        link.up = True
        self._note_skew(link)
        self._dialler.link_up(link)
        self._changed()
        link.settled.set()
        log.debug("link up", peer=link.node_id, address=str(link.address))
        self.events.link_up(link)

    def link_ending(self, link: Link) -> None:
        """From now on nobody gets this link from us; `link_down` follows when its task has ended."""
        if self._links.get(link.node_id) is link:
            del self._links[link.node_id]
            if self._state is not None:
                self._state.server.forget(link.node_id)
            self._changed()

    def _finish(self, link: Link) -> None:
        """`link_down`, once, for a link that was up."""
        self.link_ending(link)
        if not link.up:
            return
        link.up = False
        if self._unfinished.get(link.node_id) is link:
            del self._unfinished[link.node_id]
        self._past.add(link)
        log.debug("link down", peer=link.node_id, reason=link.reason)
        self.events.link_down(link, link.reason)

    def _changed(self) -> None:
        self._link_changed.set()
        self._link_changed = trio.Event()

    def peer_violated(self, link: Link, reason: str) -> None:
        """It broke the protocol: not again for 10 s, doubling."""
        self._count_violations += 1
        self._violators.failed(link.node_id, trio.current_time())
        log.debug("peer broke the protocol", peer=link.node_id, reason=reason)

    def _banned(self, node_id: NodeId, now: float) -> bool:
        return self._violators.blocked(node_id, now) or now < self._bans.get(node_id, 0.0)

    def _note_skew(self, link: Link) -> None:
        link.clock_skew = skew(link.peer_hello, self._clock())
        now = trio.current_time()
        if abs(link.clock_skew) > MAX_SKEW_SECONDS and now - self._skew_warned >= SKEW_WARNING_SECONDS:
            self._skew_warned = now
            log.warning(
                "clocks differ; downloads work, but check this machine's and the peer's time",
                peer=link.node_id,
                address=str(link.address),
                skew=round(link.clock_skew),
            )

    def _membership_changed(self) -> None:
        for link in list(self._all):  # also those without a hello yet, one of which may be about to replace another
            if self._membership.certificate_of(link.public_key) is None:
                link.end("no longer a member", code=websocket.REFUSED)

    async def _liveness(self) -> None:
        while True:
            now = trio.current_time()
            # At least once a second, for the links made meanwhile.
            await trio.sleep_until(min([now + 1.0, *(link.tick(now) for link in list(self._all))]))

    async def _housekeeping(self) -> None:
        while True:
            await trio.sleep(HOUSEKEEPING_SECONDS)
            self._pool.trim(trio.current_time())
            self._membership_changed()  # certificates run out without anybody saying so

    # --- pieces -------------------------------------------------------------------------------------------------------------

    def make_fetcher(self, link: Link, encrypted: bool) -> Fetcher:
        ticket = link.peer_hello.ticket

        def opening(nonce: bytes) -> wire.ChannelOpen:
            return wire.ChannelOpen(self._membership.node_id, self.boot, open_mac(ticket, nonce))

        return Fetcher(
            link,
            partial(self.dial_pieces, link, encrypted),
            opening,
            pool=self._pool,
            watch=self._watch,
            rate=self._running.download_rate,
            rule=self.settings.rule,
        )

    async def dial_pieces(self, link: Link, encrypted: bool) -> socket.socket:
        """Where its control connection comes from, or where it says it is: of several addresses a host may send from one
        and listen on another.

        Raises:
            PeerError: It does not listen, or somebody else does.
        """
        sock = await self._dial_one_of(self._pieces_addresses(link))
        if not encrypted:
            return sock
        secure = await sockets.start_tls(sock, self._membership.client_context(), server_side=False)
        try:
            if self._identify(sockets.certificate_of(secure)) != link.public_key:
                raise Unwanted("another node listens on the peer's pieces port")
        except BaseException:
            sockets.close(secure)
            raise
        return secure

    def _pieces_addresses(self, link: Link) -> list[Address]:
        hello = link.peer_hello
        if not hello.pieces:
            raise PeerError("the peer does not listen for pieces")
        found = {Address(link.remote.host, hello.pieces): None}
        for text in hello.addresses:
            with suppress(ValueError):
                address = Address(sockets.canonical_host(text.rpartition(":")[0].strip("[]")), hello.pieces)
                if self._may_dial(address):
                    found[address] = None
        return list(found)

    async def _dial_one_of(self, addresses: Sequence[Address]) -> socket.socket:
        for address in addresses[:-1]:
            with suppress(PeerError), trio.move_on_after(PIECES_DIAL_SECONDS):
                return await sockets.dial(address)
        return await sockets.dial(addresses[-1])


def _told(advertise: Sequence[Address], listen: Sequence[Address], ports: Ports) -> list[str]:
    """What peers are told of where we are: what is configured, else the addresses we listen on and no others."""
    if advertise:
        return [str(address) for address in advertise[:MAX_ADDRESSES]]
    own = [address for address in listen if not ipaddress.ip_address(address.host).is_unspecified]
    return [str(Address(address.host, ports.control)) for address in own[:MAX_ADDRESSES]]


class _Handler(Protocol):
    async def __call__(self, sock: socket.socket, remote: Address, scope: trio.CancelScope, /) -> None: ...


@dataclass(frozen=True, slots=True)
class _Running:
    """What exists while `run` runs."""

    nursery: trio.Nursery
    server: PiecesServer
    download_rate: RateLimit


@dataclass(slots=True)
class _Past:
    """Counts of links that are gone."""

    received: int = 0
    frames_sent: int = 0
    frames_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0

    def add(self, link: Link) -> None:
        counts = link.statistics()
        self.received += link.received_bytes
        self.frames_sent += counts.frames_sent
        self.frames_received += counts.frames_received
        self.messages_sent += counts.messages_sent
        self.messages_received += counts.messages_received

    def copy(self) -> _Past:
        return _Past(self.received, self.frames_sent, self.frames_received, self.messages_sent, self.messages_received)
