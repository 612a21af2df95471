"""One authenticated connection to a member: its control socket, and the pieces channels we ask on."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import structlog
import trio

from swarm import wire
from swarm.edges import Address, NodeId, PeerEvents, Started
from swarm.errors import LocalProtocolError, PeerError, RemoteProtocolError, SwarmError
from swarm.peer import websocket
from swarm.peer.connection import SETUP_SECONDS, Connection, ConnectionStatistics, QueueFull
from swarm.peer.fetching import Fetcher
from swarm.peer.websocket import ControlSocket

if TYPE_CHECKING:
    from swarm.peer.hub import PeerHub

log = structlog.get_logger(__name__)

SEND_SECONDS: Final = 30.0
"""How long one frame may take to leave; a peer that does not read for so long is as good as dead."""


class Link:
    """`edges.PeerLink`, made and run by the hub.

    Attributes:
        certificate: The peer's, DER, checked.
        dialled: Whether we made the connection.
        up: Between `link_up` and `link_down`.
        clock_skew: Seconds by which the peer's clock is ahead of ours.
    """

    def __init__(
        self,
        hub: PeerHub,
        stream: trio.abc.Stream,
        *,
        public_key: bytes,
        node_id: NodeId,
        certificate: bytes,
        remote: Address,
        dialled: bool,
        ticket: bytes,
    ) -> None:
        self.node_id = node_id
        self.public_key = public_key
        self.certificate = certificate
        self.remote = remote
        self.dialled = dialled
        self.ticket = ticket
        self.up = False
        self.clock_skew = 0.0
        self.since = trio.current_time()
        self.settled = trio.Event()
        self.reason = ""
        self._hub = hub
        self._close_code = websocket.GOING_AWAY
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._open = False
        self._blocked = trio.Event()
        self._sending_since = float("inf")
        self._connection = Connection(trio.current_time())
        self._socket = ControlSocket(stream, self._frame_received, client=dialled, host=str(remote))
        self._fetchers: dict[bool, Fetcher] = {}

    # --- edges.PeerLink ------------------------------------------------------------------------------------------

    @property
    def address(self) -> Address:
        """Where its control port can be reached: what we dialled, or where it came from with the port it says it listens on."""
        if self.dialled or self.hello is None:
            return self.remote
        return Address(self.remote.host, self.hello.control)

    @property
    def encrypted_pieces(self) -> bool:
        return self._hub.settings.encrypt or (self.hello is not None and self.hello.encrypt)

    def post(self, message: wire.TaskMessage, *, urgent: bool = True) -> None:
        self.queue(message, urgent=urgent)

    def request(
        self,
        request_id: int,
        task_id: bytes,
        piece: int,
        offset: int,
        length: int,
        *,
        private: bool = False,
        spare: bool = False,
    ) -> None:
        if self.ended:
            return
        request = wire.Request(request_id, task_id, piece, offset, length, spare)
        self._fetcher(private or self.encrypted_pieces).request(request)

    def cancel(self, request_id: int) -> None:
        for fetcher in self._fetchers.values():
            if fetcher.cancel(request_id):
                return

    def drop(self, reason: str) -> None:
        self.end(reason, code=1000)

    # --- what the hub asks ---------------------------------------------------------------------------------------

    @property
    def hello(self) -> wire.Hello | None:
        """The peer's."""
        return self._connection.hello

    @property
    def peer_hello(self) -> wire.Hello:
        """The same, of a link that is up."""
        if self._connection.hello is None:
            raise LocalProtocolError("no hello yet")
        return self._connection.hello

    @property
    def ended(self) -> bool:
        return bool(self.reason)

    @property
    def close_code(self) -> int:
        """What the peer closed the WebSocket with, 0 if it did not."""
        return self._socket.close_code

    @property
    def received_bytes(self) -> int:
        """Of pieces."""
        return sum(fetcher.received for fetcher in self._fetchers.values())

    def statistics(self) -> ConnectionStatistics:
        return self._connection.statistics()

    def queue(self, message: wire.Message, *, urgent: bool = True) -> None:
        """As `post`, for any message."""
        if self.ended:
            return
        try:
            if self._connection.post(message, trio.current_time(), urgent=urgent):
                self._hub.flusher.soon(self)
        except QueueFull as error:
            self.end(str(error), code=websocket.VIOLATION)

    def end(self, reason: str, *, code: int = websocket.GOING_AWAY) -> None:
        """Close the connection; the first reason given is the one that is kept."""
        if self.ended:
            return
        self.reason = reason
        self._close_code = code
        self._hub.link_ending(self)
        self._scope.cancel()

    def tick(self, now: float) -> float:
        """Look for silence; returns when to look again.  The hub does this for all links: a timer for each frame sent, of
        each link, would be a fifth of what a frame costs."""
        if self.ended:
            return float("inf")
        try:
            self._connection.tick(now)
            if now >= self._sending_since + SEND_SECONDS:
                raise PeerError(f"took nothing for {SEND_SECONDS:g} s")
        except SwarmError as error:
            self.end(str(error), code=websocket.REFUSED if self.hello is None else websocket.GOING_AWAY)
        if self._connection.flush_at <= now:
            self._hub.flusher.soon(self)
        return min(self._connection.deadline(), self._sending_since + SEND_SECONDS)

    async def run(self) -> None:
        """From the WebSocket handshake to the end; the caller (the hub) cleans up after it.  Never raises but by
        cancellation."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._guard, self._read)
                    await self._guard(self._open_and_write)
        finally:
            if not self.ended:
                self.reason = "going away"
            await self._socket.aclose(self._close_code, self.reason)

    # --- inside --------------------------------------------------------------------------------------------------

    async def _guard(self, body: Callable[[], Awaitable[None]]) -> None:
        try:
            await body()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Whatever goes wrong on this connection ends this connection, and nothing else.  Called where it was caught."""
        match error:
            case RemoteProtocolError():
                self._hub.peer_violated(self, str(error))
                self.end(str(error), code=websocket.VIOLATION)
            case SwarmError():
                log.debug("connection ended", peer=self.node_id, reason=str(error))
                self.end(str(error), code=websocket.REFUSED if self.hello is None else 1000)
            case trio.TooSlowError():
                self.end(f"no opening handshake within {SETUP_SECONDS:g} s", code=websocket.REFUSED)
            case _:
                log.exception("connection failed", peer=self.node_id)
                self.end("internal error", code=1011)

    async def _read(self) -> None:
        raise PeerError(await self._socket.read())

    async def _open_and_write(self) -> None:
        with trio.fail_after(SETUP_SECONDS):
            await (self._socket.connect() if self.dialled else self._socket.accept())
        if not self._hub.is_arbiter(self.node_id):
            self._hub.check_room(self)  # before the other side believes that it has a link
            self.queue(self._hub.make_hello(self.ticket))
        self._open = True
        while True:
            self._hub.flusher.soon(self)
            await self._blocked.wait()
            await self._socket.send_rest()
            self._blocked = trio.Event()
            self._sending_since = float("inf")

    def flush(self, now: float) -> float:
        """Send what is due, as far as the socket takes it.  For the hub's `Flusher`."""
        if not self._open or self.ended or self._blocked.is_set():
            return float("inf")
        try:
            while (frame := self._connection.next_frame(now)) is not None:
                if not self._socket.send_nowait(frame):
                    self._sending_since = now
                    self._blocked.set()
                    return float("inf")
        except Exception as error:
            self._failed(error)
            return float("inf")
        return self._connection.flush_at

    def _frame_received(self, frame_untrusted: bytes) -> None:
        if self.ended:
            return
        now = trio.current_time()
        messages = self._connection.receive_frame(frame_untrusted, now)
        if not self.settled.is_set():
            self._hub.hello_received(self)
        for message in messages:
            if self.ended:
                return
            self._events.message_received(self, message)
        if self._connection.flush_at <= now:
            self._hub.flusher.soon(self)  # a ping to answer

    @property
    def _events(self) -> PeerEvents:
        return self._hub.events

    # --- pieces --------------------------------------------------------------------------------------------------

    def _fetcher(self, encrypted: bool) -> Fetcher:
        fetcher = self._fetchers.get(encrypted)
        if fetcher is None:
            fetcher = self._fetchers[encrypted] = self._hub.make_fetcher(self, encrypted)
            if self._nursery is None:
                raise LocalProtocolError("a request before the link runs")
            self._nursery.start_soon(self._guard, fetcher.run)
        return fetcher

    def fetch_started(self, started: Started) -> bool:
        return not self.ended and self._events.piece_started(self, started)

    def fetch_received(self, request_id: int, digest: bytes, data: memoryview) -> None:
        if not self.ended:
            self._events.piece_received(self, request_id, digest, data)

    def fetch_failed(self, request_id: int, status: int) -> None:
        if not self.ended:
            self._events.piece_failed(self, request_id, status)

    async def dial_pieces(self, encrypted: bool) -> socket.socket:
        return await self._hub.dial_pieces(self, encrypted)
