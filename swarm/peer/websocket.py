"""Binary messages over trio-websocket, as our subprotocol uses it: one frame each, small, and never compressed.

trio-websocket does the opening and closing handshakes, pings and close codes.  Data frames are parsed here, in the place
wsproto has for it, for two reasons: wsproto collects fragments without a bound (500,000 one-byte fragments hold 28 MB;
SECURITY: F5), and frames parsed by hand and delivered without a queue cost much less CPU (docs/decisions/peers.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import Final

import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Event, RejectConnection
from wsproto.utilities import LocalProtocolError as WebSocketMisuse
from wsproto.utilities import RemoteProtocolError as WebSocketViolation

from swarm import errors
from swarm.errors import PeerError
from swarm.peer.limits import Flood
from swarm.peer.sockets import SocketStream
from swarm.wire import MAX_FRAME_BYTES

PATH: Final = "/swarm/1"

RECEIVE_BYTES: Final = 64 * 1024
"""One read; trio-websocket's default of 4 KiB costs twice the CPU."""

MAX_HEAD_BYTES: Final = 8 * 1024
"""Of the opening request or answer; ours have 200.  Against a head that never ends."""

CLOSE_SECONDS: Final = 1.0
"""How long a close frame may take to be sent: nothing depends on it but a readable reason on the other side."""

GOING_AWAY: Final = 1001
VIOLATION: Final = 1002
NOT_BINARY: Final = 1003
TOO_BIG: Final = 1009
REFUSED: Final = 4000
"""Not a member, banned, silent, or of another protocol version."""
DUPLICATE: Final = 4001
"""There is a connection between us already; use that one."""
FULL: Final = 4002
"""We have as many connections as we take."""

_BINARY: Final = 0x82  # FIN and opcode 2, nothing reserved
_CONTROL: Final = frozenset((0x88, 0x89, 0x8A))  # FIN and close, ping, pong
_MAX_CONTROL_BYTES: Final = 125
_HEAD_END: Final = b"\r\n\r\n"
_NO_MASK: Final = bytes(4)


class Frames(WSConnection):
    """wsproto's connection with a strict parser of our own for data frames.

    Args:
        on_message: Called with each whole message, from within `events`; what it raises ends the reader.
        clock: Monotonic seconds.
    """

    def __init__(self, kind: ConnectionType, on_message: Callable[[bytes], None], clock: Callable[[], float]) -> None:
        super().__init__(kind)
        self._on_message = on_message
        self._clock = clock
        self._unparsed = bytearray()
        self._messages: deque[bytes] = deque()
        self._head_seen = False
        self._control_frames = Flood("WebSocket control frames", 5, 20, clock())

    def receive_data(self, data: bytes | None) -> None:
        """
        Raises:
            WebSocketViolation: With the close frame that answers it.
        """
        if data is None:
            super().receive_data(None)
            return
        self._unparsed += data
        if self.connection is None:
            self._receive_head()
        if self.connection is not None:
            self._parse()

    def events(self) -> Generator[Event, None, None]:
        while self._messages:
            self._on_message(self._messages.popleft())
        yield from super().events()

    def _receive_head(self) -> None:
        """Pass the head on, and only that: wsproto would parse frames that came in the same packet by its own rules."""
        end = self._unparsed.find(_HEAD_END)
        if self._head_seen or (end < 0 and len(self._unparsed) > MAX_HEAD_BYTES):
            raise WebSocketViolation("malformed opening handshake", event_hint=_rejection(self.client))
        if end < 0:
            return
        self._head_seen = True
        head = bytes(self._unparsed[: end + len(_HEAD_END)])
        del self._unparsed[: len(head)]
        super().receive_data(head)

    def _parse(self) -> None:
        buffer = self._unparsed
        position = 0
        while len(buffer) - position >= 2:
            head, length = self._header(position)
            end = position + head + length
            if head == 0 or end > len(buffer):
                break
            if buffer[position] == _BINARY:
                self._messages.append(self._payload(position, position + head, end))
            else:
                self._control_frame(bytes(buffer[position:end]))
            position = end
        del buffer[:position]
        if self.state is not ConnectionState.OPEN:
            self._messages.clear()

    def _header(self, position: int) -> tuple[int, int]:
        """Length of the header (0: not all here yet) and of the payload; everything that can be refused is, before a
        payload is kept."""
        buffer = self._unparsed
        first, second = buffer[position], buffer[position + 1]
        if first != _BINARY and first not in _CONTROL:
            # A fragment, text, or a reserved bit: no peer of ours sends these, and fragments are how to hold memory
            # without bound.
            raise _violation(NOT_BINARY, "only unfragmented binary messages")
        if bool(second & 0x80) is self.client:
            raise _violation(VIOLATION, "wrong masking")
        head, length = 2, second & 0x7F
        if length > _MAX_CONTROL_BYTES:
            head = 4 if length == 126 else 10
            if len(buffer) - position < head:
                return 0, 0
            length = int.from_bytes(buffer[position + 2 : position + head], "big")
        if length > (MAX_FRAME_BYTES if first == _BINARY else _MAX_CONTROL_BYTES):
            raise _violation(TOO_BIG, f"at most {MAX_FRAME_BYTES} bytes")
        return head + (0 if self.client else 4), length

    def _payload(self, position: int, start: int, end: int) -> bytes:
        payload = bytes(self._unparsed[start:end])
        mask = _NO_MASK if self.client else bytes(self._unparsed[start - 4 : start])
        return payload if mask == _NO_MASK else _unmask(payload, mask)

    def _control_frame(self, frame: bytes) -> None:
        try:
            self._control_frames.count(1, self._clock())
        except errors.RemoteProtocolError as error:
            raise _violation(VIOLATION, str(error)) from error
        if self.state in (ConnectionState.OPEN, ConnectionState.LOCAL_CLOSING):
            super().receive_data(frame)

    def message(self, payload: bytes) -> bytes:
        """One binary message as one frame."""
        length = len(payload)
        # The mask protects HTTP proxies from content chosen by web pages; under TLS there are neither, so its key is zero.
        bit, mask = (0x80, _NO_MASK) if self.client else (0, b"")
        if length <= _MAX_CONTROL_BYTES:
            return bytes((_BINARY, bit | length)) + mask + payload
        if length <= 0xFFFF:
            return bytes((_BINARY, bit | 126)) + length.to_bytes(2, "big") + mask + payload
        return bytes((_BINARY, bit | 127)) + length.to_bytes(8, "big") + mask + payload


def _unmask(payload: bytes, mask: bytes) -> bytes:
    keys = (mask * (len(payload) // 4 + 1))[: len(payload)]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(keys, "big")).to_bytes(len(payload), "big")


def _violation(code: int, reason: str) -> WebSocketViolation:
    return WebSocketViolation(reason, event_hint=CloseConnection(code=code, reason=reason))


def _rejection(client: bool) -> Event | None:
    return None if client else RejectConnection(status_code=400)


class ControlSocket:
    """An open WebSocket of our subprotocol on any stream.

    `connect` or `accept` first, then `send_nowait` and `send_rest` while `read` runs in another task.  `aclose` closes it.
    """

    def __init__(
        self, stream: trio.abc.Stream, on_message: Callable[[bytes], None], *, client: bool, host: str = "swarm"
    ) -> None:
        self._stream = stream
        self._unsent = b""
        self._frames = Frames(ConnectionType.CLIENT if client else ConnectionType.SERVER, on_message, trio.current_time)
        self._socket = WebSocketConnection(
            stream,
            self._frames,
            host=host if client else None,
            path=PATH if client else None,
            max_message_size=MAX_FRAME_BYTES,
            receive_buffer_size=RECEIVE_BYTES,
        )

    async def read(self) -> str:
        """Deliver messages until the connection ends; returns why it did.

        Raises:
            PeerError: The other side refused the handshake.
            SwarmError: What `on_message` raised.
        """
        try:
            await self._socket._reader_task()  # what trio-websocket's own wrap functions start
        except ConnectionRejected as error:
            raise PeerError(f"refused the connection (HTTP {error.status_code})") from error
        except (ConnectionClosed, WebSocketMisuse):
            pass
        except UnicodeError as error:
            raise errors.RemoteProtocolError("malformed opening handshake") from error
        return self.close_reason

    @property
    def close_code(self) -> int:
        """The WebSocket close code, 0 while open."""
        return self._socket.closed.code if self._socket.closed else 0

    @property
    def close_reason(self) -> str:
        closed = self._socket.closed
        if closed is None or closed.code == 1006:
            return "connection lost"
        return f"closed by peer: {_printable(closed.reason or closed.name)} ({closed.code})"

    async def connect(self) -> None:
        """Wait for the opening handshake; `read` must be running, and ends if it fails."""
        await self._socket._open_handshake.wait()

    async def accept(self) -> None:
        """Answer the opening handshake; `read` must be running.

        Raises:
            RemoteProtocolError: It was for something else.
            PeerError: The other side went away meanwhile.
        """
        try:
            request = await self._socket._get_request()
            if request.path != PATH:
                await request.reject(404)
                raise errors.RemoteProtocolError("opening handshake for another path")
            await request.accept()
        except (ConnectionClosed, WebSocketMisuse) as error:
            raise PeerError("connection lost") from error

    def send_nowait(self, message: bytes) -> bool:
        """Send what goes at once; `False` if that is not all: `send_rest` then sends what is left.

        Raises:
            PeerError: The connection is closed.
        """
        if self._socket.closed:
            raise PeerError(self.close_reason)
        frame = self._frames.message(message)
        stream = self._stream
        if self._unsent or self._socket._stream_lock.locked() or not isinstance(stream, SocketStream):
            self._unsent += frame
            return False
        try:
            return stream.send_nowait(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerError("connection lost") from error

    async def send_rest(self) -> None:
        """What `send_nowait` left.

        Raises:
            PeerError: The connection is closed.
        """
        async with self._socket._stream_lock:  # the reader answers a close or a ping
            unsent, self._unsent = self._unsent, b""
            try:
                await self._stream.send_all(unsent)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise PeerError("connection lost") from error

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        """Send a close frame if that is quickly done, then close the stream.  Safe to call when cancelled."""
        with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS):
            try:
                if not self._socket.closed:
                    await self._socket._send(CloseConnection(code=code, reason=reason))
            except (ConnectionClosed, WebSocketMisuse, trio.BusyResourceError, trio.BrokenResourceError):
                pass  # Nothing was opened, or it is closed, or a frame is half sent: then the reason stays unsaid.
        await trio.aclose_forcefully(self._stream)


def _printable(text: str) -> str:
    """Text from a peer for a log line or a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:120])
