"""The pieces channel: what both ends agree on.

Participants: the *client* wants pieces and dials; the *server* listens one port above its control port.  They already
have a control connection, whose `Hello` gave the client a ticket key.

    client                                   server
    (TLS handshake, or nothing)
    b"SWP1"                            ->
                                       <-    32-byte nonce
    frame: ChannelOpen                 ->    MAC checked, or closed
    frame: Request, Cancel, ...        ->
                                       <-    frame: Reply, and for an ok one `length` raw bytes; in the order the server chooses

A frame is a big-endian u32 length and so many bytes of CBOR.  The server tells TLS from clear by the first byte: a ClientHello
begins with 0x16, our magic with "S".  What travels in clear is protected against change by proofs and seals, not against
being read.

Goal: bytes at the speed of `sendfile` and `recv`, in the trio thread (handing a piece to a thread costs twice the CPU).
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import socket
import ssl
import sys
import termios
from collections.abc import Callable
from typing import Final

import trio

from swarm import wire
from swarm.errors import PeerError, RemoteProtocolError
from swarm.peer import sockets
from swarm.peer.limits import Progress
from swarm.peer.sockets import WOULD_BLOCK

MAGIC: Final = b"SWP1"
TLS_RECORD: Final = 0x16
NONCE_BYTES: Final = 32

CHUNK_BYTES: Final = 512 * 1024
"""Sent at a time, of what is in memory."""

OPEN_SECONDS: Final = 10.0
"""From dialling to `ChannelOpen`."""

WATCH_SECONDS: Final = 1.0
"""How often transfers are looked at for lack of progress; one timer for all is cheaper than one for each read."""


def open_mac(ticket: bytes, nonce: bytes) -> bytes:
    """Proves knowledge of the ticket key the server gave in its `Hello`."""
    return hashlib.blake2b(nonce, digest_size=32, key=ticket).digest()


def check_open(opening_untrusted: wire.ChannelOpen, ticket: bytes, nonce: bytes) -> bool:
    return hmac.compare_digest(opening_untrusted.mac, open_mac(ticket, nonce))


def frame(value: object) -> bytes:
    """A struct, encoded and with its length before it."""
    data = wire.encode(value)
    return len(data).to_bytes(4, "big") + data


class Pipe:
    """A connected non-blocking socket, clear or TLS, with buffers of the caller's."""

    __slots__ = ("_low_water", "encrypted", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.encrypted = isinstance(sock, ssl.SSLSocket)
        self._low_water = 1

    @property
    def closed(self) -> bool:
        return self.sock.fileno() < 0

    def close(self) -> None:
        sockets.close(self.sock)

    def receive_nowait(self, view: memoryview) -> int | None:
        """Bytes read into `view`, 0 at the end of the stream, `None` if there are none yet.

        Raises:
            PeerError: The connection broke.
        """
        try:
            return self.sock.recv_into(view)
        except WOULD_BLOCK:
            return None
        except (OSError, ValueError) as error:
            raise _broken(error) from error

    async def wait_readable(self, wanted: int = 1) -> None:
        """Wait until about `wanted` bytes are there, or the stream ended, or `nudge` found that it takes long.

        One wake-up for many packets: on a 50 Mbit/s link this is the difference between 4,000 and 25 a second.
        """
        if self.encrypted:
            wanted = max(
                1, wanted - 32 * 1024
            )  # up to a record may already be inside OpenSSL; never wait for more than will come
        self._set_low_water(wanted)
        if self.closed:
            raise PeerError("channel closed")
        try:
            await trio.lowlevel.wait_readable(self.sock)
        except (trio.ClosedResourceError, OSError) as error:
            raise PeerError("channel closed") from error

    async def wait_writable(self) -> None:
        if self.closed:
            raise PeerError("channel closed")
        try:
            await trio.lowlevel.wait_writable(self.sock)
        except (trio.ClosedResourceError, OSError) as error:
            raise PeerError("channel closed") from error

    def unsent(self) -> int:
        """Bytes given to the socket that the other end has not acknowledged."""
        if self.closed:
            return 0
        try:
            return int.from_bytes(fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except OSError:
            return 0

    def nudge(self) -> None:
        """Let `wait_readable` return for any byte at all."""
        if not self.closed:
            self._set_low_water(1)

    async def receive(self, view: memoryview) -> int:
        """At least one byte into `view`, or 0 at the end of the stream."""
        while (count := self.receive_nowait(view)) is None:
            await self.wait_readable()
        return count

    async def receive_exactly(self, count: int) -> bytes:
        """
        Raises:
            PeerError: The stream ended before.
        """
        data = bytearray(count)
        with memoryview(data) as view:
            filled = 0
            while filled < count:
                got = await self.receive(view[filled:])
                if not got:
                    raise PeerError("channel closed by peer")
                filled += got
        return bytes(data)

    def send_nowait(self, data: memoryview | bytes, flags: int = 0) -> int | None:
        """Bytes taken by the socket; `None` if it takes none now.

        Raises:
            PeerError: The connection broke.
        """
        try:
            return self.sock.send(data) if self.encrypted else self.sock.send(data, flags)
        except WOULD_BLOCK:
            return None
        except (OSError, ValueError) as error:
            raise _broken(error) from error

    async def send_all(self, data: bytes, *, more: bool = False, progress: Callable[[int], None] | None = None) -> None:
        """`more`: bytes follow at once, so the kernel may wait for a full segment."""
        flags = socket.MSG_MORE if more else 0
        unsent = memoryview(data)
        while unsent:
            count = self.send_nowait(unsent[:CHUNK_BYTES], flags)
            if count is None:
                await self.wait_writable()
                continue
            unsent = unsent[count:]
            if progress is not None:
                progress(count)

    def _set_low_water(self, wanted: int) -> None:
        if wanted == self._low_water or self.closed:
            return
        self._low_water = wanted
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
        except OSError as error:
            raise _broken(error) from error


def _broken(error: Exception) -> PeerError:
    return PeerError(f"channel broke: {getattr(error, 'strerror', None) or error}")


class FrameReader:
    """Frames out of a stream, without reading much of what follows them.

    Args:
        read_ahead: Bytes read at once; what is beyond the frame comes out of `surplus` and has to be copied.
    """

    def __init__(self, pipe: Pipe, *, read_ahead: int) -> None:
        self._pipe = pipe
        self._read_ahead = read_ahead
        self._buffer = bytearray(4 + wire.MAX_CHANNEL_FRAME_BYTES + read_ahead)
        self._start = self._stop = 0

    async def frame(self) -> bytes | None:
        """The next frame, or `None` at the end of the stream between frames.

        Raises:
            RemoteProtocolError: Too long.
            PeerError: The connection broke, or ended inside a frame.
        """
        while True:
            data = self.frame_nowait()
            if data is not None:
                return data
            if not await self._fill():
                if self._start == self._stop:
                    return None
                raise PeerError("channel closed by peer")

    def frame_nowait(self) -> bytes | None:
        """The next frame if it is all here.

        Raises:
            RemoteProtocolError: Too long.
        """
        available = self._stop - self._start
        if available < 4:
            return None
        length = int.from_bytes(self._buffer[self._start : self._start + 4], "big")
        if not 0 < length <= wire.MAX_CHANNEL_FRAME_BYTES:
            raise RemoteProtocolError(f"pieces channel frame of {length} bytes")
        if available < 4 + length:
            return None
        begin = self._start + 4
        self._start = begin + length
        return bytes(self._buffer[begin : self._start])

    def surplus(self, limit: int) -> bytes:
        """Take up to `limit` bytes that were read beyond the last frame."""
        stop = min(self._stop, self._start + limit)
        data = bytes(self._buffer[self._start : stop])
        self._start = stop
        return data

    async def _fill(self) -> int:
        if self._start:
            self._buffer[: self._stop - self._start] = self._buffer[self._start : self._stop]
            self._stop -= self._start
            self._start = 0
        with memoryview(self._buffer) as view:
            count = await self._pipe.receive(view[self._stop : self._stop + self._read_ahead])
        self._stop += count
        return count


class Watch:
    """Ends transfers that make no progress, and closes their channel.  One task looks at all of them."""

    def __init__(self) -> None:
        self._watched: dict[Pipe, tuple[Progress, Callable[[str], None]]] = {}
        self._something = trio.Event()

    def add(self, pipe: Pipe, progress: Progress, on_failure: Callable[[str], None]) -> None:
        """From now on `on_failure` is called with what is wrong, once, if the transfer breaks the rule."""
        self._watched[pipe] = (progress, on_failure)
        self._something.set()

    def remove(self, pipe: Pipe) -> None:
        self._watched.pop(pipe, None)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if not self._watched:
                self._something = trio.Event()
                await self._something.wait()
            await trio.sleep(WATCH_SECONDS)
            # Bytes below the low-water mark are progress too: let them be read before anything is judged.
            for pipe in self._watched:
                pipe.nudge()
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            self._judge(trio.current_time())

    def _judge(self, now: float) -> None:
        for pipe, (progress, on_failure) in list(self._watched.items()):
            reason = progress.failed(now)
            if reason:
                self.remove(pipe)
                on_failure(reason)
