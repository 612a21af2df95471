"""TLS over a trio stream, reading many records at a time.

`trio.SSLStream` hands out one record (16 KiB) per call, each with a lock, a checkpoint and two scheduler hooks; over a GiB
that is most of the CPU an https origin costs (tests/benchmarks/origin.py).  Here whatever has arrived is decrypted in one
loop.  Everything that makes TLS secure stays in `ssl`.
"""

from __future__ import annotations

import ssl
from typing import Final

import trio

RECEIVE_BYTES: Final = 256 * 1024
RECORD_BYTES: Final = 16 * 1024


class TlsStream(trio.abc.Stream):
    """The client's side.  One task reads and one writes at a time, as HTTP/1.1 does; closing sends no close_notify.

    Args:
        transport: Closed with this stream.
        context: Verifies certificate and host name, or nothing here is secure.
    """

    def __init__(self, transport: trio.abc.Stream, context: ssl.SSLContext, server_hostname: str) -> None:
        self._transport = transport
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self._flushing = trio.Lock()

    async def handshake(self) -> None:
        """Raises:
        ssl.SSLError: The other side is not who it should be, or speaks no TLS.
        trio.BrokenResourceError: The connection broke.
        """
        while True:
            try:
                self._tls.do_handshake()
                return await self._flush()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError:
                # Let the alert that says why go out, if the other side still listens.
                with trio.move_on_after(1), trio.CancelScope(shield=True):
                    await self._flush_quietly()
                raise

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Whatever has arrived, at most about `max_bytes`; empty at the end, with or without a close_notify.

        HTTP says itself where an answer ends, and half of the servers leave the close_notify out.

        Raises:
            trio.BrokenResourceError: The connection broke, or what came is not from the other side.
        """
        limit = max_bytes or RECEIVE_BYTES
        while True:
            try:
                data = self._decrypt(limit)
            except ssl.SSLError as error:
                raise trio.BrokenResourceError from error
            if self._outgoing.pending:  # an answer to a key update
                await self._flush()
            if data is not None:
                return data
            await self._fill()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Raises:
        trio.BrokenResourceError: The connection broke.
        """
        if data:
            try:
                self._tls.write(data)
            except ssl.SSLError as error:
                raise trio.BrokenResourceError from error
        await self._flush()

    async def wait_send_all_might_not_block(self) -> None:
        await self._transport.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._transport.aclose()

    def _decrypt(self, limit: int) -> bytes | None:
        """All records that are here, `b""` at the end of the stream, `None` if there is nothing yet."""
        parts: list[bytes] = []
        size = 0
        while size < limit:
            try:
                part = self._tls.read(RECORD_BYTES)
            except ssl.SSLWantReadError:
                break
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                part = b""
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
        return b"".join(parts) if parts else None

    async def _fill(self) -> None:
        data = await self._transport.receive_some(RECEIVE_BYTES)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def _flush(self) -> None:
        async with self._flushing:  # a key update and a request may want to at once
            if self._outgoing.pending:
                await self._transport.send_all(self._outgoing.read())

    async def _flush_quietly(self) -> None:
        try:
            await self._flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
