"""The bytes of an accepted answer: in useful sizes, never too few without saying so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Final, Protocol

import trio

from swarm.errors import OriginError, OriginUnreachable
from swarm.origin.answers import Plan
from swarm.origin.inflate import Inflater

MIN_CHUNK_BYTES: Final = 64 * 1024
"""Smaller parts (a slow link brings 1,400 bytes at a time, TLS 16 KiB) are put together: hashing and writing cost per call."""

MAX_HOLD_SECONDS: Final = 0.25
"""But not for longer than this, so that progress is seen on a slow link."""

MIN_RATE: Final = 1024
RATE_SECONDS: Final = 30.0
"""Bytes per second, over this long a wait, below which an origin counts as stalled: one byte every nine seconds would
otherwise hold a download for ever."""


PARTS_PER_CHECKPOINT: Final = 64
"""A body in chunks of one byte is 40,000 parts per read from the socket: let others run in between."""


class Parts(Protocol):
    """What a body is read from."""

    async def part(self) -> bytes: ...


class HttpBody:
    """An `edges.OriginBody`.

    Args:
        name: Who sends, for messages.
    """

    def __init__(self, parts: Parts, plan: Plan, name: str) -> None:
        self._parts = parts
        self._plan = plan
        self.name = name
        self._inflater = Inflater(plan.encoding) if plan.encoding else None
        self.delivered = 0

    @property
    def start(self) -> int:
        return self._plan.start

    @property
    def length(self) -> int | None:
        return self._plan.length

    def chunks(self) -> AsyncIterator[bytes]:
        """The bytes, in chunks of 64 KiB (at the end, or on a slow link, fewer) to 1 MiB.  Ask for them once.

        Raises:
            OriginUnreachable: The connection broke, stalled, or ended early; what came is good.
            OriginError: The origin sent something else than it said it would.
        """
        return _Chunks(self)

    # --- called by _Chunks ---

    async def receive(self) -> bytes:
        return await self._parts.part()

    def decode(self, part: bytes) -> Iterator[bytes]:
        return iter((part,)) if self._inflater is None else self._inflater.feed(part)

    def cut(self, data: bytes) -> bytes:
        """Bytes that are wanted; the rest of the body is not."""
        take = self._plan.take
        if self._plan.framed is not None and self._inflater is None and self.delivered + len(data) > self._plan.framed:
            raise OriginError(f"{self.name} sends more than it said it would")
        return data if take is None or self.delivered + len(data) <= take else data[: take - self.delivered]

    @property
    def is_complete(self) -> bool:
        """Whether every byte the answer was to carry came."""
        return self._inflater is None and self._plan.framed is not None and self.delivered == self._plan.framed

    @property
    def is_coded(self) -> bool:
        return self._inflater is not None

    @property
    def satisfied(self) -> bool:
        """Whether all that was wanted came, though the body goes on."""
        return self._plan.take is not None and self.delivered >= self._plan.take != self._plan.framed

    def check_end(self) -> None:
        """Raises:
        OriginUnreachable: The body ended before what was asked for did.
        """
        if self._inflater is not None and not self._inflater.finish():
            raise OriginUnreachable(f"{self.name} ended its compressed answer early")
        wanted = self._plan.wanted
        if wanted is not None and self.delivered < wanted:
            raise OriginUnreachable(f"{self.name} sent {self.delivered} bytes of {wanted}")


class _Chunks:
    """Not an async generator: one that is left half-way must be closed by hand, which callers forget."""

    def __init__(self, body: HttpBody) -> None:
        self._body = body
        self._decoded: Iterator[bytes] = iter(())
        self._failure: Exception | None = None
        self._ended = False
        self._waited = 0.0
        self._received = 0
        self._parts = 0

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> bytes:
        held: list[bytes] = []
        size = 0
        since: float | None = None
        while not self._ended and size < MIN_CHUNK_BYTES:
            if since is not None and trio.current_time() - since >= MAX_HOLD_SECONDS:
                break
            data = await self._next()
            if data:
                held.append(data)
                size += len(data)
                since = trio.current_time() if since is None else since
        if not self._ended and self._body.is_complete:
            await self._next()  # waits for nothing: it tells the connection that it can be used again
        if held:
            return held[0] if len(held) == 1 else b"".join(held)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        raise StopAsyncIteration

    async def _next(self) -> bytes:
        """The next wanted bytes; empty at the end, with `_failure` saying if it was a bad one."""
        body = self._body
        try:
            for data in self._decoded:
                if body.is_coded:
                    await trio.lowlevel.checkpoint()  # one part may hold hundreds of chunks
                wanted = body.cut(data)
                body.delivered += len(wanted)
                self._ended = body.satisfied
                return wanted
            part = await self._receive()
            if part:
                self._decoded = body.decode(part)
            else:
                self._ended = True
                body.check_end()
        except OriginError as error:
            # What came before it is good and goes out first.
            self._ended, self._failure = True, error
        return b""

    async def _receive(self) -> bytes:
        self._parts += 1
        if self._parts % PARTS_PER_CHECKPOINT == 0:
            await trio.lowlevel.checkpoint()
        began = trio.current_time()
        part = await self._body.receive()
        self._waited += trio.current_time() - began
        self._received += len(part)
        if self._waited >= RATE_SECONDS:
            if part and self._received < MIN_RATE * self._waited:
                raise OriginUnreachable(f"{self._body.name} sends less than {MIN_RATE} bytes per second")
            self._waited, self._received = 0.0, 0
        return part
