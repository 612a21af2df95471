"""Putting answers on a connection: heads through h11, bodies of blobs from the store's files by `sendfile`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Final, TypeVar

import h11
import trio

from swarm.download.reading import Reader
from swarm.errors import SwarmError
from swarm.mirror.requests import RequestReader
from swarm.mirror.resolve import Contained
from swarm.mirror.routes import Answer, Blob
from swarm.peer.limits import Progress, ProgressRule

SEND_CHUNK_BYTES: Final = 1024 * 1024
"""Offered to `sendfile` at once; between two of them others get their turn."""

CLIENT_RULE: Final = ProgressRule(silence=60.0, floor=2048.0, window=120.0)
"""A client slower than that only holds a connection.  Generous: a runtime may unpack to a slow disk while it reads."""

REOPENINGS: Final = 3
"""Times that rotten pieces are fetched again for one answer."""


T = TypeVar("T")


class ClientGone(Exception):
    """Nobody listens any more."""


class BodyCut(Exception):
    """The body cannot be finished; the connection must be closed, so that the client sees that it is short."""


class Sent:
    """What became of a body.

    Attributes:
        sources: Bytes by where they came from.
        first_byte: When the first one was sent; `None` where none was.
    """

    __slots__ = ("first_byte", "sources")

    def __init__(self) -> None:
        self.sources: Counter[str] = Counter()
        self.first_byte: float | None = None

    @property
    def total(self) -> int:
        return self.sources.total()


class _Run:
    """So many bytes that h11 only counts."""

    __slots__ = ("_length",)

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class Sender:
    """One connection's sending side.

    Args:
        patience: Seconds that a body may wait for its next piece.
    """

    def __init__(self, stream: trio.SocketStream, reader: RequestReader, service: Contained, patience: float) -> None:
        self._stream = stream
        self._http = reader.http
        self._pending = reader
        self._service = service
        self._patience = patience

    async def send(self, answer: Answer, sent: Sent) -> None:
        """Send it, and count in `sent` what went out.

        Raises:
            ClientGone: The client closed, or takes nothing.
            BodyCut: What was promised cannot be sent.
        """
        head = self._head(answer)
        if not isinstance(answer.body, Blob):
            await self._send_all(head + self._data(answer.body) + self._end())
            return
        try:
            await self._send_all(head)
            await self._send_blob(answer.body, sent)
        finally:
            answer.body.reader.close()
        self._end()

    def _head(self, answer: Answer) -> bytes:
        headers = [("Date", formatdate(usegmt=True)), *answer.headers]
        if answer.status != 304 and answer.length is not None:
            headers.append(("Content-Length", str(answer.length)))
        response = h11.Response(status_code=answer.status, headers=[(n.encode(), v.encode("latin-1")) for n, v in headers])
        return self._http.send(response) or b""

    def _data(self, body: bytes) -> bytes:
        return (self._http.send(h11.Data(data=body)) or b"") if body else b""

    def _end(self) -> bytes:
        return self._http.send(h11.EndOfMessage()) or b""

    async def _send_all(self, data: bytes) -> None:
        progress = Progress(CLIENT_RULE, trio.current_time())
        view = memoryview(data)
        socket = self._stream.socket
        try:
            while view:
                with trio.CancelScope(deadline=progress.deadline()):
                    count = await socket.send(view)
                    view = view[count:]
                    progress.moved(count, trio.current_time())
                    continue
                if progress.failed(trio.current_time()):
                    raise ClientGone
        except OSError as error:
            raise ClientGone from error

    # --- blobs ---

    async def _send_blob(self, blob: Blob, sent: Sent) -> None:
        progress = Progress(CLIENT_RULE, trio.current_time())
        reopened = 0
        while blob.reader.start < blob.reader.stop:
            limit = await self._available(blob.reader)
            piece = blob.reader.slice(limit)
            if piece is None:
                reopened += 1
                if reopened > REOPENINGS:
                    raise BodyCut("what is stored rots faster than it can be fetched")
                await self._reopen(blob)
                continue
            try:
                if sent.first_byte is None:
                    sent.first_byte = trio.current_time()
                source = blob.reader.source(blob.reader.start // blob.reader.geometry.piece_length)
                progress.excuse(trio.current_time())
                await self._send_file(piece.fd, piece.offset, piece.length, progress)
            finally:
                piece.release()
            sent.sources[source] += piece.length
            blob.reader.advance(piece.length)

    async def _available(self, reader: Reader) -> int:
        """Up to where bytes can be sent, once some can; notices a client that leaves meanwhile."""
        try:
            limit = reader.available()
            if limit > reader.start:
                return limit
            with trio.move_on_after(self._patience):
                return await self.unless_gone(reader.wait)
        except SwarmError as error:
            raise BodyCut(str(error)) from error
        raise BodyCut(f"no further byte within {self._patience:g} s")

    async def _reopen(self, blob: Blob) -> None:
        """Stored bytes rotted; they are fetched again from where we are."""
        old, start, stop = blob.reader, blob.reader.start, blob.reader.stop
        try:
            with trio.fail_after(self._patience):
                blob.reader = await self._service.read(blob.reopen(), lambda _length: (start, stop))
        except (SwarmError, trio.TooSlowError) as error:
            raise BodyCut("stored bytes rotted and could not be fetched again") from error
        finally:
            old.close()

    async def unless_gone(self, wait: Callable[[], Awaitable[T]]) -> T:
        """Wait, unless the client closes first.

        Raises:
            ClientGone: It did, and `wait` was cancelled.
        """
        gone = False
        result: T | None = None
        failure: SwarmError | None = None

        async def watch() -> None:
            nonlocal gone
            gone = await self._closed()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            if not self._pending.pending:
                nursery.start_soon(watch)
            try:
                result = await wait()
            except SwarmError as error:
                failure = error  # raised outside, or the nursery would wrap it in a group
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if result is None:
            raise ClientGone if gone else BodyCut("interrupted")
        return result

    async def _closed(self) -> bool:
        """Wait until the client closes its side; what it sends instead is its next request, and ends the watch."""
        try:
            data = await self._stream.socket.recv(65536)
        except OSError:
            return True
        if not data:
            return True
        self._pending.receive(data)
        return await _never()

    async def _send_file(self, descriptor: int, offset: int, length: int, progress: Progress) -> None:
        self._http.send_with_data_passthrough(h11.Data(data=_Run(length)))  # type: ignore[arg-type]  # documented: it is only counted
        socket = self._stream.socket
        number = socket.fileno()
        end = offset + length
        while offset < end:
            try:
                count = os.sendfile(number, descriptor, offset, min(SEND_CHUNK_BYTES, end - offset))
            except BlockingIOError:
                await self._writable(progress)
                continue
            except OSError as error:
                raise ClientGone from error
            if not count:
                raise BodyCut("the stored file ends early")
            offset += count
            progress.moved(count, trio.current_time())
            await trio.lowlevel.checkpoint()

    async def _writable(self, progress: Progress) -> None:
        while True:
            with trio.CancelScope(deadline=progress.deadline()):
                try:
                    await trio.lowlevel.wait_writable(self._stream.socket)
                except (OSError, trio.ClosedResourceError) as error:
                    raise ClientGone from error
                return
            if progress.failed(trio.current_time()):
                raise ClientGone


async def _never() -> bool:
    await trio.sleep_forever()
    return True
