"""Reading content while it arrives: verified bytes in order, and the download told what its readers wait for.

Several readers share one download.  What a reader waits for is asked for first; everything else stays in the order that
spreads best, because a swarm whose members all ask for the same next piece has nothing to exchange.
"""

from __future__ import annotations

from collections.abc import Callable

from swarm.download.active import WHOLE_CHECKED, Active
from swarm.edges import FileSlice, StoredTask
from swarm.errors import Interrupted, SwarmError
from swarm.task import Geometry

AHEAD = 2
"""Pieces from its position on that a blocked reader asks for first."""

MAX_URGENT = 64
"""Pieces that go before all others at one time, however many readers there are."""


class Reader:
    """Bytes [start, stop) of one content for one reader.  `close` it.

    Args:
        stored: A handle of its own.
        active: The download; `None` where the content is complete already.
        start: First byte wanted.
        stop: Byte after the last.
        held_back: Give out the last piece only when the digest of the whole content matched.
        strict: Give out nothing before that.
        closed: Called once, by `close`.
    """

    def __init__(
        self,
        stored: StoredTask,
        active: Active | None,
        start: int,
        stop: int,
        *,
        held_back: bool,
        strict: bool = False,
        closed: Callable[[Reader], None] = lambda reader: None,
    ) -> None:
        self._stored = stored
        self._active = active
        self._held_back = held_back
        self._strict = strict
        self._closed: Callable[[Reader], None] | None = closed
        self._first_byte = start
        self._tainted = False
        self.start = start
        self.stop = stop
        self.local = stored.held.copy()
        """What was here when the reader came."""
        stored.on_lost(self._lost)

    @property
    def geometry(self) -> Geometry:
        return self._stored.geometry

    @property
    def complete(self) -> bool:
        """All of it is here and its digest matched."""
        return self._stored.complete

    def source(self, piece: int) -> str:
        """Where a piece came from: `store`, `peers` or `origin`."""
        if self._active is None or self.local[piece]:
            return "store"
        return "origin" if piece in self._active.read_here else "peers"

    def available(self) -> int:
        """Up to where bytes from `start` on may be given out; `start` itself if none may yet.

        Raises:
            SwarmError: Bytes that were given out turned out wrong, or the download failed.
        """
        if self._tainted:
            raise Interrupted("bytes that were given out already turned out wrong; ask again")
        if self.start >= self.stop or self._stored.complete:
            return self.stop
        limit = self.start
        if not self._strict:
            geometry, held = self.geometry, self._stored.held
            piece = self.start // geometry.piece_length
            if held[piece]:
                end = held.find(0, piece)
                limit = self.stop if end < 0 else min(self.stop, geometry.offset(end))
                if self._held_back:
                    limit = min(limit, max(self.start, geometry.offset(geometry.piece_count - 1)))
        if limit == self.start:
            self._check()
        return limit

    async def wait(self) -> int:
        """Wait until something is available; `available`.

        Raises:
            SwarmError: As `available`.
        """
        while (limit := self.available()) == self.start < self.stop:
            await self._wait_for(self.start // self.geometry.piece_length)
        return limit

    def slice(self, limit: int) -> FileSlice | None:
        """The next bytes, at most up to `limit` and the end of a piece; `None` if they rotted: they are being fetched again."""
        geometry = self.geometry
        piece = self.start // geometry.piece_length
        offset = self.start - geometry.offset(piece)
        return self._stored.slice(piece, offset, min(limit - self.start, geometry.size(piece) - offset))

    def read(self) -> bytes:
        """Everything that is left, of content that is complete; for what is small.

        Raises:
            StoreError: It rotted just now.
        """
        return self._stored.read(self.start, self.stop - self.start)

    def advance(self, count: int) -> None:
        """So many bytes were given out."""
        self.start += count

    def close(self) -> None:
        """The download ends soon if nobody else needs it.  May be called again."""
        closed, self._closed = self._closed, None
        if closed is not None:
            self._stored.close()
            closed(self)

    def _check(self) -> None:
        active = self._active
        if active is None:
            raise Interrupted("stored content rotted; ask again")
        if active.error is not None or active.closed:
            raise _again(active.error)

    async def _wait_for(self, piece: int) -> None:
        active = self._active
        if active is None:
            raise Interrupted("stored content rotted; ask again")
        if self._stored.held[piece]:
            await active.awaited(WHOLE_CHECKED).wait()
            return
        first = piece not in active.blocked
        event = active.awaited(piece)
        if first:
            prioritise(active)
        await event.wait()

    def _lost(self, lost: list[int]) -> None:
        geometry = self.geometry
        given = geometry.pieces_covering(self._first_byte, self.start)
        self._tainted = self._tainted or any(piece in given for piece in lost)


def _again(error: SwarmError | None) -> SwarmError:
    """Each reader raises an exception of its own: one object raised in many tasks would collect all their tracebacks."""
    if error is None:
        return Interrupted("the download was closed; ask again")
    return type(error)(*error.args)


def prioritise(active: Active) -> None:
    """Ask first for what readers wait for, whoever has waited longest before the others."""
    blocked = [piece for piece in active.blocked if piece != WHOLE_CHECKED][: MAX_URGENT // AHEAD]
    ahead = [piece + step for step in range(1, AHEAD) for piece in blocked if piece + step < active.geometry.piece_count]
    first = list(dict.fromkeys([*blocked, *ahead]))
    if first != active.exchange.first:
        active.exchange.want(active.exchange.wanted, first)
        active.touch()
