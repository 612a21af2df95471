"""The server of pieces channels: lets members in, queues what they ask, sends what `upload.Uploader` chooses."""

from __future__ import annotations

import errno
import os
import socket
from typing import Final, Protocol

import structlog
import trio

from swarm import wire
from swarm.edges import FileSlice, NodeId, Served, UploadSource
from swarm.errors import PeerError, RemoteProtocolError, StoreError, SwarmError
from swarm.peer.limits import Flood, Progress, ProgressRule, RateLimit
from swarm.peer.pieces_channel import (
    CHUNK_BYTES,
    MAGIC,
    NONCE_BYTES,
    TLS_RECORD,
    FrameReader,
    Pipe,
    Watch,
    frame,
)
from swarm.peer.upload import Channel, Transfer, Uploader

log = structlog.get_logger(__name__)

MAX_UNSENT_REPLIES_BYTES: Final = 64 * 1024
"""Refusals a client has not read yet; more than this and it asks without listening."""

MAX_SIGNERS: Final = 4096
"""Signers whose certificate a channel is known to have carried; the client counts the same way."""

SEND_CHUNK_BYTES: Final = 1024 * 1024
"""Offered to `sendfile` at once; how much it takes is up to the low-water mark."""

MIN_UNSENT_BYTES: Final = 256 * 1024
MAX_UNSENT_BYTES: Final = 1024 * 1024
UNSENT_SECONDS: Final = 0.04
"""What may wait unsent in the kernel (`TCP_NOTSENT_LOWAT`): 40 ms at the rate seen, so that a transfer that "ended" nearly has,
and one upload at a time is real; within bounds, since each wake-up costs CPU."""

DRAIN_POLL_SECONDS: Final = 0.05

SLOW_GRACE: Final = 1.5
"""The server gives up on a slow client later than the client on a slow server: the client knows more about why."""


class Doorkeeper(Protocol):
    """Who may open a channel; `hub.PeerHub` knows."""

    async def secure(self, sock: socket.socket) -> tuple[socket.socket, NodeId]:
        """Do the TLS handshake; the socket to use from then on, and the member at the other end.

        Raises:
            PeerError: Not a member, or the handshake failed.
        """
        ...

    async def admit(self, opening_untrusted: wire.ChannelOpen, nonce: bytes, *, tls: NodeId | None) -> NodeId:
        """
        Raises:
            PeerError: Unknown node, stale boot, wrong MAC, or clear where TLS is required.
        """
        ...


class ServedChannel:
    """An admitted channel."""

    __slots__ = ("channel", "lock", "pipe", "rate", "replies", "signers")

    def __init__(self, channel: Channel, pipe: Pipe) -> None:
        self.channel = channel
        self.pipe = pipe
        self.lock = trio.Lock()  # frames and bodies follow one another
        self.replies = bytearray()
        self.signers: set[bytes] = set()
        self.rate = 0.0


class PiecesServer:
    """All channels on which we send."""

    def __init__(
        self,
        doorkeeper: Doorkeeper,
        source: UploadSource,
        uploader: Uploader,
        *,
        watch: Watch,
        rate: RateLimit,
        rule: ProgressRule,
        congestion_control: str = "",
    ) -> None:
        """`congestion_control`: of TCP, for what we send; empty for the system's."""
        self._doorkeeper = doorkeeper
        self._source = source
        self._uploader = uploader
        self._watch = watch
        self._rate = rate
        self._rule = ProgressRule(rule.silence * SLOW_GRACE, rule.floor / SLOW_GRACE, rule.window * SLOW_GRACE)
        self._congestion_control = congestion_control
        self._channels: dict[Channel, ServedChannel] = {}
        self._timer = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._idle = trio.Event()
        self._draining = False
        self.sent = 0

    @property
    def channels(self) -> int:
        return len(self._channels)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carries the transfers; until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await self._start_when_stalled()

    async def wait_drained(self) -> None:
        """Start no further transfer, and wait for those under way."""
        self._draining = True
        while self._uploader.active:
            self._idle = trio.Event()
            await self._idle.wait()
        while any(served.pipe.unsent() for served in self._channels.values()):  # noqa: ASYNC110 - the kernel has no event for it
            await trio.sleep(DRAIN_POLL_SECONDS)
        await trio.sleep(DRAIN_POLL_SECONDS)  # for the client to read what has arrived, before its link is closed

    def forget(self, node_id: NodeId) -> None:
        """The control connection is gone: its channels are too."""
        for encrypted in (False, True):
            served = self._channels.get(Channel(node_id, encrypted))
            if served is not None:
                self._close(served)

    # --- one channel -------------------------------------------------------------------------------------------

    async def handshake(self, sock: socket.socket) -> ServedChannel:
        """Everything before the first request; the caller bounds the time, and closes `sock` when this raises.

        Raises:
            PeerError, RemoteProtocolError: Not let in.
        """
        first = await _peek(sock)
        tls: NodeId | None = None
        if first == TLS_RECORD:
            sock, tls = await self._doorkeeper.secure(sock)
        pipe = Pipe(sock)
        try:
            if await pipe.receive_exactly(len(MAGIC)) != MAGIC:
                raise RemoteProtocolError("not a pieces channel")
            nonce = os.urandom(NONCE_BYTES)
            await pipe.send_all(nonce)
            length = int.from_bytes(await pipe.receive_exactly(4), "big")
            if length > 256:
                raise RemoteProtocolError("opening too long")
            opening = wire.decode(await pipe.receive_exactly(length), wire.ChannelOpen, max_bytes=256)
            node_id = await self._doorkeeper.admit(opening, nonce, tls=tls)
        except BaseException:
            pipe.close()
            raise
        return self._add(Channel(node_id, pipe.encrypted), pipe)

    def _add(self, channel: Channel, pipe: Pipe) -> ServedChannel:
        known = self._channels.get(channel)
        if known is not None:
            self._close(known)  # One of each kind for each peer, the newest: a thousand would be a thousand buffers.
        served = self._channels[channel] = ServedChannel(channel, pipe)
        _set_unsent(pipe, MIN_UNSENT_BYTES)
        self._control_congestion(pipe)
        return served

    def _control_congestion(self, pipe: Pipe) -> None:
        if not self._congestion_control:
            return
        try:
            pipe.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._congestion_control.encode())
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EPERM):
                return  # this connection's own trouble: its next use finds it, and the other channels keep what was asked for
            log.warning(
                "TCP congestion control not to be had, the system's is used; see net.ipv4.tcp_available_congestion_control, "
                "or set peers.congestion_control to nothing",
                name=self._congestion_control,
                reason=error.strerror,
            )
            self._congestion_control = ""  # once is enough

    def _close(self, served: ServedChannel) -> None:
        served.pipe.close()
        if self._channels.get(served.channel) is served:
            del self._channels[served.channel]
            self._uploader.forget(served.channel)
            self._start()

    async def serve(self, served: ServedChannel) -> None:
        """Take requests until the channel ends; closes it.

        Raises:
            RemoteProtocolError: The client broke the protocol.
        """
        reader = FrameReader(served.pipe, read_ahead=8192)
        flood = Flood("requests", 2_000, 4_000, trio.current_time())
        try:
            while (data := await reader.frame()) is not None:
                while data is not None:
                    flood.count(1, trio.current_time())
                    self._receive(served, wire.decode_channel_frame(data))
                    data = reader.frame_nowait()
                self._start()
        except PeerError as error:
            log.debug("pieces channel ended", peer=served.channel.node_id, reason=str(error))
        finally:
            self._close(served)

    def _receive(self, served: ServedChannel, message: wire.ChannelFrame) -> None:
        if isinstance(message, wire.Cancel):
            if self._uploader.cancel(served.channel, message.id):
                self._refuse(served, message.id, wire.CANCELLED)
        elif self._draining or not self._uploader.enqueue(served.channel, message):
            self._refuse(served, message.id, wire.BUSY)

    def _refuse(self, served: ServedChannel, request_id: int, status: int) -> None:
        served.replies += frame(wire.Reply(request_id, status))
        if len(served.replies) > MAX_UNSENT_REPLIES_BYTES:
            raise RemoteProtocolError("asks without reading the answers")
        self._flush_soon(served)

    def _flush_soon(self, served: ServedChannel) -> None:
        # A transfer that holds the lock sees to it when it ends.
        if not served.lock.locked() and self._nursery is not None:
            self._nursery.start_soon(self._flush, served)

    async def _flush(self, served: ServedChannel) -> None:
        async with served.lock:
            try:
                while served.replies:
                    data = bytes(served.replies)
                    served.replies.clear()
                    await served.pipe.send_all(data)
            except PeerError:
                self._close(served)

    # --- transfers -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start what the uploader chooses now."""
        if self._nursery is None or self._draining:
            return
        now = trio.current_time()
        while (transfer := self._uploader.next(now)) is not None:
            self._nursery.start_soon(self._send, self._channels[transfer.channel], transfer)
        if self._uploader.queued and self._uploader.active:
            self._timer.set()

    async def _start_when_stalled(self) -> None:
        while True:
            deadline = self._uploader.next_deadline()
            if deadline == float("inf"):
                self._timer = trio.Event()
                await self._timer.wait()
                continue
            await trio.sleep_until(deadline)
            # A transfer whose socket became writable while we were not running has not stalled: let it run first.
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            self._start()

    async def _send(self, served: ServedChannel, transfer: Transfer) -> None:
        complete = False
        try:
            complete = await self._carry(served, transfer)
        except SwarmError as error:
            log.debug("upload broke", peer=transfer.node_id, reason=str(error))
            self._close(served)  # Part of an answer may be out: nothing else can follow it.
        except Exception:
            log.exception("upload failed", peer=transfer.node_id)
            self._close(served)
        finally:
            self._uploader.ended(transfer, complete=complete)
            self._idle.set()
            self._start()
            if served.replies:
                self._flush_soon(served)

    async def _carry(self, served: ServedChannel, transfer: Transfer) -> bool:
        """Ask the source, send header and bytes; whether it was a whole piece."""
        request = transfer.request
        try:
            answer = self._source.serve(transfer.node_id, request, encrypted=served.pipe.encrypted)
        except StoreError as error:
            log.warning("a piece cannot be read", task=request.task, piece=request.piece, reason=str(error))
            answer = wire.NOT_HELD
        if isinstance(answer, int):
            self._refuse(served, request.id, answer)
            return False
        try:
            return await self._send_watched(served, transfer, answer)
        finally:
            if isinstance(answer.body, FileSlice):
                answer.body.release()
            self._source.uploaded(transfer.node_id, request, transfer.sent)

    async def _send_watched(self, served: ServedChannel, transfer: Transfer, answer: Served) -> bool:
        progress = Progress(self._rule, trio.current_time())
        began = trio.current_time()

        def give_up(reason: str) -> None:
            log.debug("upload given up", peer=transfer.node_id, reason=reason)
            self._close(served)

        # Before the lock: a client that does not read its refusals holds the lock, and would hold an upload slot with it.
        self._watch.add(served.pipe, progress, give_up)
        try:
            async with served.lock:
                header, length = self._header(served, transfer.request, answer)
                await served.pipe.send_all(header, more=length > 0)
                if isinstance(answer.body, FileSlice):
                    await self._send_file(served, transfer, answer.body, progress)
                else:
                    await self._send_bytes(served, transfer, answer.body, progress)
        finally:
            self._watch.remove(served.pipe)
        self._adapt(served, length, trio.current_time() - began)
        return True

    def _header(self, served: ServedChannel, request: wire.Request, answer: Served) -> tuple[bytes, int]:
        length = answer.body.length if isinstance(answer.body, FileSlice) else len(answer.body)
        certificate = b""
        if answer.proof is not None and answer.proof.key not in served.signers:
            if len(served.signers) >= MAX_SIGNERS:
                served.signers.clear()
            served.signers.add(answer.proof.key)
            certificate = answer.certificate
        header = bytes(served.replies) + frame(wire.Reply(request.id, wire.OK, length, answer.proof, certificate))
        served.replies.clear()
        return header, length

    async def _send_file(self, served: ServedChannel, transfer: Transfer, body: FileSlice, progress: Progress) -> None:
        send = _send_encrypted if served.pipe.encrypted else _sendfile
        buffer = memoryview(bytearray(64 * 1024)) if served.pipe.encrypted else memoryview(b"")
        while transfer.sent < body.length:
            left = body.length - transfer.sent
            allowed = await self._allowed(transfer, min(SEND_CHUNK_BYTES, left), progress)
            # The same amount again when the socket is full: OpenSSL insists on it.
            while (count := send(served.pipe, body, transfer.sent, allowed, buffer)) is None:
                await served.pipe.wait_writable()
            if not count:
                raise PeerError("the file is shorter than it was")
            self._moved(transfer, count, progress)

    async def _send_bytes(self, served: ServedChannel, transfer: Transfer, body: bytes, progress: Progress) -> None:
        view = memoryview(body)
        while transfer.sent < len(body):
            allowed = await self._allowed(transfer, min(CHUNK_BYTES, len(body) - transfer.sent), progress)
            while (count := served.pipe.send_nowait(view[transfer.sent : transfer.sent + allowed])) is None:
                await served.pipe.wait_writable()
            self._moved(transfer, count, progress)

    def _moved(self, transfer: Transfer, count: int, progress: Progress) -> None:
        now = trio.current_time()
        self._uploader.progressed(transfer, now, count)
        self.sent += count
        progress.moved(count, now)
        if self._rate.limits:
            self._rate.take(transfer.request.task, count, now)

    async def _allowed(self, transfer: Transfer, wanted: int, progress: Progress) -> int:
        """How much of `wanted` the rate limits let through, after waiting for some."""
        if not self._rate.limits:
            return wanted
        while True:
            now = trio.current_time()
            allowed = self._rate.allowed(transfer.request.task, wanted, now)
            if allowed:
                return allowed
            delay = self._rate.delay(transfer.request.task, wanted, now)
            if self._rate.task_is_tighter(transfer.request.task, wanted, now):
                transfer.limited = True
                self._start()
            else:
                self._uploader.progressed(transfer, now + delay, 0)
            progress.excuse(now + delay)
            await trio.sleep(delay)

    def _adapt(self, served: ServedChannel, length: int, seconds: float) -> None:
        """Let as much wait in the kernel as leaves in `UNSENT_SECONDS`."""
        if length < MIN_UNSENT_BYTES:
            return
        rate = length / max(seconds, 1e-4)
        served.rate = rate if not served.rate else 0.7 * served.rate + 0.3 * rate
        _set_unsent(served.pipe, int(min(MAX_UNSENT_BYTES, max(MIN_UNSENT_BYTES, served.rate * UNSENT_SECONDS))))


def _set_unsent(pipe: Pipe, size: int) -> None:
    try:
        pipe.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, size)
    except OSError as error:
        log.debug("TCP_NOTSENT_LOWAT not set", reason=error.strerror)


def _sendfile(pipe: Pipe, body: FileSlice, offset: int, count: int, _buffer: memoryview) -> int | None:
    try:
        return os.sendfile(pipe.sock.fileno(), body.fd, body.offset + offset, count)
    except BlockingIOError:
        return None
    except (OSError, ValueError) as error:
        raise PeerError(f"channel broke: {error}") from error


def _send_encrypted(pipe: Pipe, body: FileSlice, offset: int, count: int, buffer: memoryview) -> int | None:
    # Read again when the socket took less: the page cache has it, and OpenSSL accepts a moved buffer with the same bytes.
    try:
        read = os.preadv(body.fd, [buffer[:count]], body.offset + offset)
    except OSError as error:
        raise PeerError(f"reading a piece failed: {error.strerror}") from error
    return pipe.send_nowait(buffer[:read]) if read else 0


async def _peek(sock: socket.socket) -> int:
    """The first byte, left where it is."""
    while True:
        try:
            first = sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        except OSError as error:
            raise PeerError("connection lost") from error
        if not first:
            raise PeerError("connection closed")
        return first[0]
