"""Reading a task's content from its origin: one piece by range, or everything in one stream."""

from __future__ import annotations

from collections.abc import AsyncIterator

import structlog
import trio

from swarm import pieces, proofs
from swarm.download.active import Active, Fail, Parts
from swarm.download.claims import WHOLE
from swarm.download.cutting import PieceCutter
from swarm.download.exchange import Why
from swarm.edges import OriginBody, Source
from swarm.errors import ContentChanged, NotPermitted, OriginError, OriginUnreachable, StoreError

log = structlog.get_logger(__name__)

ORIGIN_PAUSE = 1.0
"""After a failed origin read; the reader has already retried."""

ORIGIN_ATTEMPTS = 4
"""Reads of one piece that broke in the middle and went on from there."""


class OriginReads:
    """Carries out what the exchange decides to read."""

    def __init__(self, parts: Parts, fail: Fail) -> None:
        self._parts = parts
        self._fail = fail

    async def read(self, active: Active, piece: int, scope: trio.CancelScope) -> None:
        """Read one piece, or `WHOLE`, with every way it can end; cancel `scope` to give it up."""
        try:
            with scope:
                await (self._read_whole(active) if piece == WHOLE else self._read_piece(active, piece))
                active.origin_error = None
        except (ContentChanged, StoreError) as error:
            self._fail(active, error)
        except (OriginError, NotPermitted) as error:
            active.origin_error = error
            log.info("origin_read_failed", task=active.task.short, piece=piece, reason=str(error))
            active.exchange.origin_failed(piece, trio.current_time(), pause=ORIGIN_PAUSE)
            if not active.exchange.neighbours:
                self._fail(active, error)
        finally:
            if active.reads.get(piece) is scope:
                del active.reads[piece]
            if piece not in active.reads:
                # Also where a read of one piece became one of everything: whoever reads next must not wait for it.
                active.exchange.whole_read_done()
            active.touch()

    async def _read_piece(self, active: Active, piece: int) -> None:
        """Read one piece by range, going on where a broken read stopped."""
        geometry = active.geometry
        start, size = geometry.offset(piece), geometry.size(piece)
        cutter = PieceCutter(geometry, start)
        begun = trio.current_time()
        source = source_of(active)
        for attempt in range(ORIGIN_ATTEMPTS):
            try:
                async with self._parts.origin.read(source, cutter.position, start + size, expect=active.info) as body:
                    if body.start != cutter.position:
                        await self._without_ranges(active, piece, body)
                        return
                    async for chunk in body.chunks():
                        for done, data, digest in cutter.feed(chunk):
                            self.piece_read(active, done, data, digest, trio.current_time() - begun)
                        reading = active.exchange.reading.get(piece)
                        if reading is not None:
                            reading.done = (cutter.position - start) / size
                if active.exchange.held[piece]:
                    return
            except OriginUnreachable:
                if attempt + 1 == ORIGIN_ATTEMPTS:
                    raise
        raise OriginUnreachable(f"the origin sent {cutter.position - start} of {size} bytes of a piece")

    async def _without_ranges(self, active: Active, piece: int, body: OriginBody) -> None:
        """The origin sends everything although one piece was asked for: alone we take it, else one of us is to read."""
        active.exchange.origin_has_no_ranges(piece)
        if not active.exchange.neighbours:
            await self._take_all(active, body.chunks(), PieceCutter(active.geometry, body.start))

    async def _read_whole(self, active: Active) -> None:
        """Read everything from the first missing piece on, in one request."""
        geometry = active.geometry
        first = next(pieces.indices(active.exchange.missing()), 0)
        start = geometry.offset(first) if active.info is not None and active.info.ranges else 0
        for attempt in range(ORIGIN_ATTEMPTS):
            try:
                async with self._parts.origin.read(source_of(active), start, None, expect=active.info) as body:
                    await self._take_all(active, body.chunks(), PieceCutter(geometry, body.start))
                if active.exchange.complete:
                    return
                if active.told_by:
                    raise ContentChanged("the content is shorter than members of the swarm said")
            except OriginUnreachable:
                if attempt + 1 == ORIGIN_ATTEMPTS:
                    raise
        raise OriginUnreachable("the origin sent less than it announced")

    async def _take_all(self, active: Active, chunks: AsyncIterator[bytes | memoryview], cutter: PieceCutter) -> None:
        begun = trio.current_time()
        async for chunk in chunks:
            for done, data, digest in cutter.feed(chunk):
                self.piece_read(active, done, data, digest, trio.current_time() - begun)
                begun = trio.current_time()

    def piece_read(self, active: Active, piece: int, data: memoryview, digest: bytes, took: float) -> None:
        """A whole piece came from the origin: prove it, write it, tell."""
        if active.closed:
            return
        parts = self._parts
        reading = active.exchange.reading.get(piece) or active.exchange.reading.get(WHOLE)
        self._count(active, len(data), reading.why if reading is not None else None)
        if not active.exchange.held[piece]:
            proof = proofs.prove(parts.membership, active.task.id, active.geometry, piece, digest, parts.now())
            active.stored.write_piece(piece, data, digest, proof)
        active.signers[piece] = parts.membership.public_key
        now = active.last_byte = trio.current_time()
        active.exchange.piece_verified(piece, None, now, took=took)
        active.read_here.add(piece)
        active.wake(piece)
        active.touch()

    async def digest_of(self, active: Active, piece: int) -> bytes:
        """BLAKE3 of one piece as the origin has it, to settle a dispute.

        Raises:
            OriginError, NotPermitted: It cannot be read.
        """
        geometry = active.geometry
        start = geometry.offset(piece)
        stop = start + geometry.size(piece)
        async with self._parts.origin.read(source_of(active), start, stop, expect=active.info) as body:
            cutter = PieceCutter(geometry, body.start)
            async for chunk in body.chunks():
                for done, data, digest in cutter.feed(chunk):
                    self._count(active, len(data), Why.DISPUTE)
                    active.exchange.why_origin[Why.DISPUTE] += 1
                    if done == piece:
                        return digest
        raise OriginUnreachable("the origin sent less than a piece")

    def _count(self, active: Active, size: int, why: Why | None) -> None:
        active.from_origin += size
        totals = self._parts.totals
        totals.bytes_from_origin += size
        totals.pieces_from_origin += 1
        if why is not None:
            totals.why_origin[str(why)] += 1


def source_of(active: Active) -> Source:
    """Where the content comes from.

    Raises:
        OriginUnreachable: Its requester named no origin, or forbade to read it.
    """
    if active.source is None:
        raise OriginUnreachable("there is no origin to read")
    return active.source
