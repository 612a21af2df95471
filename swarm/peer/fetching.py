"""The client of a pieces channel: asks, receives into reused memory, hashes as bytes come."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn, Protocol

import structlog
import trio
from blake3 import blake3

from swarm import wire
from swarm.edges import Started
from swarm.errors import LocalProtocolError, PeerError, RemoteProtocolError, SwarmError
from swarm.peer.limits import Progress, ProgressRule, RateLimit
from swarm.peer.pieces_channel import MAGIC, NONCE_BYTES, OPEN_SECONDS, FrameReader, Pipe, Watch, frame

log = structlog.get_logger(__name__)

IDLE_SECONDS: Final = 60.0
"""A channel nobody uses is closed after this, for the descriptor's sake; a new one costs two round trips."""

FIRST_BACKOFF: Final = 0.5
LONGEST_BACKOFF: Final = 8.0
"""How long a request waits, and fails, at a server whose channel cannot be opened; else asking again would be a busy loop."""

MAX_SIGNERS: Final = 4096
"""Certificates a server may believe we know; both sides start anew when there are more."""

WAIT_BYTES: Final = 1024 * 1024
"""Waited for, and then hashed, at a time; what has come beyond is read with it.  Each read tells the sender of the room it
made: reads of half a megabyte at most take a quarter more time, and processor time (`one-to-one`)."""

_SMALLEST_BUFFER: Final = 256 * 1024
_KEPT_BUFFERS: Final = 4


class BufferPool:
    """Memory for pieces on their way in, reused: fresh megabytes cost a page fault each 4 KiB.

    A buffer belongs to one transfer from `take` to `give`, so a node holds as many as pieces are arriving.
    """

    def __init__(self) -> None:
        self._free: list[bytearray] = []
        self._used_at = 0.0

    def take(self, size: int) -> bytearray:
        for index, buffer in enumerate(self._free):
            if len(buffer) >= size:
                return self._free.pop(index)
        return bytearray(max(_SMALLEST_BUFFER, 1 << (max(1, size) - 1).bit_length()))

    def give(self, buffer: bytearray, now: float) -> None:
        self._used_at = now
        if len(self._free) < _KEPT_BUFFERS:
            self._free.append(buffer)

    def trim(self, now: float, idle: float = 10.0) -> None:
        """Let go of what nobody has used for `idle` seconds."""
        if now - self._used_at >= idle:
            self._free.clear()


class FetchEvents(Protocol):
    """What the link is told; synchronous."""

    def fetch_started(self, started: Started) -> bool: ...
    def fetch_received(self, request_id: int, digest: bytes, data: memoryview) -> None: ...
    def fetch_failed(self, request_id: int, status: int) -> None: ...


class Fetcher:
    """Requests to one peer, over one channel that is opened when needed.

    Args:
        dial: Opens the connection, with its TLS handshake where there is one; raises `PeerError`.
        opening: Makes the `ChannelOpen` for a nonce.
    """

    def __init__(
        self,
        events: FetchEvents,
        dial: Callable[[], Awaitable[socket.socket]],
        opening: Callable[[bytes], wire.ChannelOpen],
        *,
        pool: BufferPool,
        watch: Watch,
        rate: RateLimit,
        rule: ProgressRule,
    ) -> None:
        self._events = events
        self._dial = dial
        self._opening = opening
        self._pool = pool
        self._watch = watch
        self._rate = rate
        self._rule = rule
        self._asked: dict[int, wire.Request] = {}
        self._outgoing = bytearray()
        self._wake = trio.Event()
        self._signers: set[bytes] = set()
        self.received = 0

    @property
    def waiting(self) -> int:
        """Requests without an answer."""
        return len(self._asked)

    def request(self, request: wire.Request) -> None:
        """Ask; exactly one of `fetch_received` and `fetch_failed` follows, later."""
        if request.id in self._asked:
            raise LocalProtocolError(f"request {request.id} is under way")
        self._asked[request.id] = request
        self._outgoing += frame(request)
        self._wake.set()

    def cancel(self, request_id: int) -> bool:
        """Withdraw; `False` if there is no such request waiting (its bytes may be arriving)."""
        if request_id not in self._asked:
            return False
        self._outgoing += frame(wire.Cancel(request_id))
        self._wake.set()
        return True

    async def run(self) -> None:
        """Serve requests until cancelled.

        Raises:
            RemoteProtocolError: The server broke the protocol, or sent bytes that were refused; drop the peer.
        """
        backoff = FIRST_BACKOFF
        while True:
            await self._wait_for_work()
            try:
                with trio.fail_after(OPEN_SECONDS):
                    pipe = await self._open()
            except (PeerError, trio.TooSlowError) as error:
                log.debug("pieces channel not opened", reason=str(error) or "time-out")
                await trio.sleep(backoff)
                backoff = min(LONGEST_BACKOFF, backoff * 2)
                self._fail_all()
                continue
            backoff = FIRST_BACKOFF
            try:
                await self._use(pipe)
            except PeerError as error:
                log.debug("pieces channel closed", reason=str(error))
            finally:
                pipe.close()
            self._fail_all()

    async def _wait_for_work(self) -> None:
        while not self._asked:
            self._outgoing.clear()
            self._wake = trio.Event()
            await self._wake.wait()

    def _fail_all(self) -> None:
        """Everything asked so far fails over to other peers; what is asked in answer to that waits for the next channel."""
        asked = list(self._asked)
        self._asked.clear()
        self._outgoing.clear()
        self._signers.clear()
        for request_id in asked:
            self._events.fetch_failed(request_id, wire.BUSY)

    async def _open(self) -> Pipe:
        pipe = Pipe(await self._dial())
        try:
            await pipe.send_all(MAGIC)
            nonce = await pipe.receive_exactly(NONCE_BYTES)
            await pipe.send_all(frame(self._opening(nonce)))
        except BaseException:
            pipe.close()
            raise
        return pipe

    async def _use(self, pipe: Pipe) -> None:
        failure: SwarmError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, pipe)
            try:
                await self._read(pipe)
            except SwarmError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _write(self, pipe: Pipe) -> None:
        try:
            while True:
                if not self._outgoing:
                    self._wake = trio.Event()
                    await self._wake.wait()
                    continue
                data, self._outgoing = bytes(self._outgoing), bytearray()
                await pipe.send_all(data)
        except PeerError:
            pipe.close()  # the reader finds out why, and tells

    async def _read(self, pipe: Pipe) -> NoReturn:
        reader = FrameReader(pipe, read_ahead=1024)
        while True:
            if self._asked:
                data = await reader.frame()
            else:
                with trio.move_on_after(IDLE_SECONDS) as idle:
                    data = await reader.frame()
                if idle.cancelled_caught:
                    if self._asked:
                        continue
                    raise PeerError("idle")
            if data is None:
                raise PeerError("channel closed by peer")
            reply = wire.decode(data, wire.Reply, max_bytes=wire.MAX_CHANNEL_FRAME_BYTES)
            request = self._asked.pop(reply.id, None)
            if request is None:
                raise RemoteProtocolError("an answer to nothing we asked")
            if reply.status == wire.OK:
                await self._receive_body(pipe, reader, request, reply)
            else:
                self._events.fetch_failed(reply.id, reply.status)

    async def _receive_body(self, pipe: Pipe, reader: FrameReader, request: wire.Request, reply: wire.Reply) -> None:
        if reply.length != request.length:
            raise RemoteProtocolError(f"{reply.length} bytes where {request.length} were asked for")
        if not self._events.fetch_started(Started(reply.id, reply.length, reply.proof, self._certificate(reply))):
            raise RemoteProtocolError("sent bytes that cannot be right")
        buffer = self._pool.take(reply.length)
        done = False
        try:
            with memoryview(buffer)[: reply.length] as view:
                digest = await self._receive(pipe, reader, request, view)
                done = True
                self._events.fetch_received(reply.id, digest, view)
        finally:
            self._pool.give(buffer, trio.current_time())
            if not done:
                # Popped when its header came, so that a second answer to it is refused; put back for `_fail_all`.
                self._asked[reply.id] = request

    def _certificate(self, reply: wire.Reply) -> bytes:
        if reply.proof is None or reply.proof.key in self._signers:
            return b""
        if len(self._signers) >= MAX_SIGNERS:
            self._signers.clear()
        self._signers.add(reply.proof.key)
        return reply.certificate

    async def _receive(self, pipe: Pipe, reader: FrameReader, request: wire.Request, view: memoryview) -> bytes:
        """All of `view`, and its BLAKE3."""
        progress = Progress(self._rule, trio.current_time())

        def give_up(reason: str) -> None:
            log.debug("transfer given up", reason=reason)
            pipe.close()

        self._watch.add(pipe, progress, give_up)
        try:
            return await self._fill(pipe, reader.surplus(len(view)), request.task, view, progress)
        finally:
            self._watch.remove(pipe)

    async def _fill(self, pipe: Pipe, first: bytes, task_id: bytes, view: memoryview, progress: Progress) -> bytes:
        hasher = blake3()
        total = len(view)
        view[: len(first)] = first
        filled, hashed = len(first), 0
        self.received += filled
        limited = self._rate.limits
        if limited:
            self._rate.take(task_id, filled, trio.current_time())
        while filled < total:
            stop = total
            if limited:
                stop = filled + await self._allowed(task_id, min(total, hashed + WAIT_BYTES) - filled, progress)
            count = pipe.receive_nowait(view[filled:stop])
            if count is None:
                await pipe.wait_readable(min(stop, hashed + WAIT_BYTES) - filled)
                continue
            if not count:
                raise PeerError("channel closed by peer inside a piece")
            filled += count
            self.received += count
            now = trio.current_time()
            progress.moved(count, now)
            if limited:
                self._rate.take(task_id, count, now)
            if filled - hashed >= WAIT_BYTES:
                hasher.update(view[hashed:filled])
                hashed = filled
                await trio.lowlevel.checkpoint()
        hasher.update(view[hashed:filled])
        return hasher.digest()

    async def _allowed(self, task_id: bytes, wanted: int, progress: Progress) -> int:
        while True:
            now = trio.current_time()
            allowed = self._rate.allowed(task_id, wanted, now)
            if allowed:
                return allowed
            progress.excuse(now)
            await trio.sleep(self._rate.delay(task_id, wanted, now))
            progress.excuse(trio.current_time())
