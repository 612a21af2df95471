"""Cut a stream of bytes from the origin into pieces, hashing as they come."""

from __future__ import annotations

from collections.abc import Iterator

from blake3 import blake3

from swarm.errors import ContentChanged
from swarm.task import Geometry


class PieceCutter:
    """Collects bytes from `start` on; whole pieces come out of `feed`.

    One buffer of a piece is reused; a view handed out is valid until the next step of the iteration.
    Bytes before the first piece boundary at or after `start` are passed over.
    """

    def __init__(self, geometry: Geometry, start: int) -> None:
        self._geometry = geometry
        self.position = start
        """Offset of the next byte expected."""
        self._skip = -start % geometry.piece_length
        self._buffer = bytearray(min(geometry.piece_length, geometry.length))
        self._filled = 0
        self._hasher = blake3()

    def feed(self, chunk: bytes | memoryview) -> Iterator[tuple[int, memoryview, bytes]]:
        """Take in bytes; yields (piece, its bytes, their BLAKE3) for each piece that became whole.

        Raises:
            ContentChanged: More bytes than the content has.
        """
        view = memoryview(chunk)
        if self.position + len(view) > self._geometry.length:
            raise ContentChanged("the origin sends more bytes than the content has")
        if self._skip:
            passed = min(self._skip, len(view))
            self._skip -= passed
            self.position += passed
            view = view[passed:]
        while len(view):
            piece = (self.position - self._filled) // self._geometry.piece_length
            size = self._geometry.size(piece)
            taken = view[: size - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._hasher.update(taken)
            self._filled += len(taken)
            self.position += len(taken)
            view = view[len(taken) :]
            if self._filled == size:
                digest = self._hasher.digest()
                self._hasher = blake3()
                self._filled = 0
                with memoryview(self._buffer) as whole, whole[:size] as data:
                    yield piece, data, digest
