"""One control connection after TLS and the WebSocket handshake, without I/O.

Participants: two members.  The *arbiter* of a pair is the one with the smaller node id.  Both send `Hello` first; the arbiter
sends its own only once it has admitted the connection, so that of several set-ups under way between two nodes exactly one comes
up, on both sides, without a link that appears and disappears again.

Goals: few frames (everything that waits goes in one), bounded queues, a dead peer noticed within `DEAD_SECONDS`.
Non-goals: what the messages of a task mean; how bytes travel.

Units: bytes, and monotonic seconds passed in as `now`; `Hello.time` alone is wall time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, cast

from swarm import wire
from swarm.errors import PeerError, RemoteProtocolError
from swarm.peer.limits import Flood

SETUP_SECONDS: Final = 10.0
"""From the TCP connection to both hellos; against connections that never finish (SECURITY: T5)."""

PING_SECONDS: Final = 10.0
DEAD_SECONDS: Final = 30.0
LINGER_SECONDS: Final = 0.05
"""How long a message that is not urgent may wait for company in its frame."""

MAX_QUEUED_MESSAGES: Final = 1024
MAX_QUEUED_BYTES: Final = 1024 * 1024
"""What may wait for a peer that does not read; past either bound it is dropped, so that it cannot hold our memory."""

MAX_SKEW_SECONDS: Final = 300.0

_FRAME_ROOM: Final = wire.MAX_FRAME_BYTES - 8
"""Left for messages beside the array header."""

_MAX_HAVE: Final = 4096
_MAX_FRAME_MESSAGES: Final = 1024


class QueueFull(PeerError):
    """The peer does not take what we send."""


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    """Counts since the connection was made."""

    frames_sent: int
    frames_received: int
    messages_sent: int
    messages_received: int


class Connection:
    """Frames in, messages out; messages in, frames out.

    Attributes:
        hello: The peer's, once it has come.
        flush_at: When `next_frame` has something, infinite if nothing waits.
    """

    def __init__(self, now: float) -> None:
        self.hello: wire.Hello | None = None
        self._opened = now
        self._heard = now
        self._pinged = now
        self._nonce = 0
        self._queue: deque[wire.Message] = deque()
        self._queued_bytes = 0
        self.flush_at = float("inf")
        self._messages = Flood("messages", 5_000, 10_000, now)
        self._pings = Flood("pings", 5, 20, now)
        self._frames_sent = self._frames_received = self._messages_sent = self._messages_received = 0

    # --- in ---------------------------------------------------------------------------------------------------

    def receive_frame(self, frame_untrusted: bytes, now: float) -> list[wire.TaskMessage]:
        """Take in one frame; returns the messages that are for the layer above.

        `hello` is set once the peer's has come.  A ping is answered through the queue.

        Raises:
            RemoteProtocolError: Malformed, out of order, or too much.
        """
        messages = wire.decode_frame(frame_untrusted)
        self._messages.count(len(messages) or 1, now)
        self._heard = now
        self._frames_received += 1
        self._messages_received += len(messages)
        if self.hello is None:
            self._take_hello(messages)
            messages = messages[1:]
        return [cast(wire.TaskMessage, message) for message in messages if self._is_for_above(message, now)]

    def _take_hello(self, messages: list[wire.Message]) -> None:
        if not messages or not isinstance(messages[0], wire.Hello):
            raise RemoteProtocolError("the first message is not a hello")
        if messages[0].version != wire.PROTOCOL_VERSION:
            raise RemoteProtocolError(f"peer speaks protocol version {messages[0].version}, we {wire.PROTOCOL_VERSION}")
        self.hello = messages[0]

    def _is_for_above(self, message: wire.Message, now: float) -> bool:
        if isinstance(message, wire.Ping):
            self._pings.count(1, now)
            self.post(wire.Pong(message.nonce), now)
            return False
        if isinstance(message, wire.Pong):
            self._pings.count(1, now)
            return False
        if isinstance(message, wire.Hello):
            raise RemoteProtocolError("a second hello")
        return True

    # --- out --------------------------------------------------------------------------------------------------

    def post(self, message: wire.Message, now: float, *, urgent: bool = True) -> bool:
        """Queue a message; returns whether `flush_at` is nearer now.

        Raises:
            QueueFull: The peer does not read; close the connection.
        """
        flush_at = self.flush_at
        if not self._merged(message):
            self._queue.append(message)
            self._queued_bytes += weight(message)
            if len(self._queue) > MAX_QUEUED_MESSAGES or self._queued_bytes > MAX_QUEUED_BYTES:
                raise QueueFull(f"{len(self._queue)} messages of {self._queued_bytes} bytes wait for the peer")
        self.flush_at = min(flush_at, now if urgent else now + LINGER_SECONDS)
        return self.flush_at < flush_at

    def _merged(self, message: wire.Message) -> bool:
        """Join a `Have` to the one before it: order is kept, and the other side has one message to decode instead of many."""
        if not isinstance(message, wire.Have) or not self._queue:
            return False
        last = self._queue[-1]
        if not isinstance(last, wire.Have) or last.task != message.task or len(last.pieces) + len(message.pieces) > _MAX_HAVE:
            return False
        self._queue[-1] = wire.Have(message.task, last.pieces + message.pieces)
        self._queued_bytes += 5 * len(message.pieces)
        return True

    def next_frame(self, now: float) -> bytes | None:
        """The next frame to send, or `None` if nothing is due."""
        if now < self.flush_at:
            return None
        parts: list[bytes] = []
        size = 0
        queue = self._queue
        while queue and len(parts) < _MAX_FRAME_MESSAGES:
            part = _encode(queue[0])
            if parts and size + len(part) > _FRAME_ROOM:
                break
            size += len(part)
            parts.append(part)
            self._queued_bytes -= weight(queue.popleft())
        if not queue:
            self.flush_at = float("inf")
            self._queued_bytes = 0
        if not parts:
            return None
        self._frames_sent += 1
        self._messages_sent += len(parts)
        return wire.join_frame(parts)

    # --- time -------------------------------------------------------------------------------------------------

    def deadline(self) -> float:
        """When to call `tick` if nothing happens before."""
        if self.hello is None:
            return self._opened + SETUP_SECONDS
        return min(max(self._heard, self._pinged) + PING_SECONDS, self._heard + DEAD_SECONDS)

    def tick(self, now: float) -> None:
        """Notice silence: ping after 10 s of it.

        Raises:
            PeerError: No hello within 10 s, or nothing heard for 30 s.
        """
        if self.hello is None:
            if now >= self._opened + SETUP_SECONDS:
                raise PeerError(f"no hello within {SETUP_SECONDS:g} s")
            return
        if now >= self._heard + DEAD_SECONDS:
            raise PeerError(f"nothing heard for {DEAD_SECONDS:g} s")
        if now >= max(self._heard, self._pinged) + PING_SECONDS:
            self._pinged = now
            self._nonce += 1
            self.post(wire.Ping(self._nonce), now)

    def statistics(self) -> ConnectionStatistics:
        return ConnectionStatistics(self._frames_sent, self._frames_received, self._messages_sent, self._messages_received)


def weight(message: wire.Message) -> int:
    """About the bytes a message occupies while it waits, without encoding it."""
    match message:
        case wire.Have() | wire.Lost() | wire.Unclaim():
            return 64 + 5 * len(message.pieces)
        case wire.Join():
            return 512 + len(message.held)
        case wire.Claims():
            return 64 + 400 * len(message.claims) + len(message.reached)
        case wire.Peers():
            return 64 + sum(map(len, message.records))
        case _:
            return 512


_encoded: deque[tuple[wire.Message, bytes]] = deque(maxlen=8)
"""The last few encodings: a message is usually posted to every neighbour in one go, and need be encoded once."""


def _encode(message: wire.Message) -> bytes:
    for known, data in _encoded:
        if known is message:
            return data
    data = wire.encode(message)
    _encoded.append((message, data))
    return data


def skew(hello: wire.Hello, wall_time: float) -> float:
    """Seconds by which the peer's clock is ahead of ours."""
    return hello.time - wall_time
