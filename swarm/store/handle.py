"""An open task, as the rest of the node holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from swarm import wire
from swarm.edges import FileSlice
from swarm.errors import LocalProtocolError
from swarm.pieces import PieceSet
from swarm.store.content import Content, Name, Pieces
from swarm.task import Digest, Geometry, Task

if TYPE_CHECKING:
    from swarm.store.store import TaskStore


class OpenTask:
    """A `StoredTask`.  Several may be open on one content."""

    def __init__(self, store: TaskStore, content: Content, name: Name) -> None:
        self._store = store
        self._content: Content | None = content
        self._name = name
        self._lost: list[Callable[[list[int]], None]] = []

    @property
    def content(self) -> Content:
        if self._content is None:
            raise LocalProtocolError(f"task {self._name.task.short} was closed")
        return self._content

    @property
    def _pieces(self) -> Pieces:
        return self.content.known

    @property
    def task(self) -> Task:
        return self._name.task

    @property
    def geometry(self) -> Geometry:
        return self.content.geometry

    @property
    def held(self) -> PieceSet:
        """Ask anew after every await: completing may merge two contents."""
        return self._pieces.held

    @property
    def complete(self) -> bool:
        return self.content.complete

    @property
    def digest(self) -> Digest | None:
        return self.content.digest or self._name.task.digest

    @property
    def private(self) -> bool:
        return self._name.private

    @property
    def path(self) -> Path | None:
        return self.content.opened.path

    def write_piece(self, piece: int, data: memoryview, blake3: bytes, proof: wire.Signed | None) -> None:
        self._store.write(self, piece, data, blake3, proof)

    def piece_digest(self, piece: int) -> bytes | None:
        known = self._pieces
        return known.digest(piece) if 0 <= piece < len(known.held) and known.held[piece] else None

    def proof(self, piece: int) -> wire.Signed | None:
        """`None` too if it was given for another task of the same content."""
        known = self._pieces
        if not (0 <= piece < len(known.held) and known.held[piece]):
            return None
        found = known.proofs.get(piece) or self._store.load_proof(self.content, piece)
        return found[1] if found is not None and found[0] == self.task.id else None

    def slice(self, piece: int, offset: int, length: int) -> FileSlice | None:
        return self._store.slice(self.content, piece, offset, length)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of held pieces.

        Raises:
            StoreError: Not all of them are held, or one turned out rotten just now.
        """
        return self._store.read(self.content, offset, length)

    def on_lost(self, callback: Callable[[list[int]], None]) -> None:
        """Until `close`.  Also told of pieces that another handle of the same content dropped."""
        self._lost.append(callback)

    def tell_lost(self, lost: list[int]) -> None:
        for callback in tuple(self._lost):
            callback(list(lost))

    async def verify(self) -> list[int]:
        return await self._store.verify(self.content)

    async def content_digest(self, algorithm: str = "sha256") -> Digest:
        """As the contract says.

        Raises:
            LocalProtocolError: Not all pieces are held.
            StoreError: Pieces of an earlier run have rotted meanwhile; they were dropped: fetch them and ask again.
        """
        return await self._store.content_digest(self.content, algorithm)

    def drop_pieces(self, pieces: Sequence[int]) -> None:
        self._store.lose(self.content, pieces, dropped_by=self)

    async def complete_with(self, digest: Digest) -> None:
        """As the contract says.

        Raises:
            LocalProtocolError: Pieces are missing.
            DigestMismatch: The task itself names another digest.
            NoSpace, StoreError: It could not be synced; ask again later.
        """
        await self._store.complete(self, digest)

    def open_read_only(self, *, partial: bool = False) -> int:
        if not (partial or self.complete):
            raise LocalProtocolError(f"task {self.task.short} is not complete")
        return self.content.opened.open_read_only()

    def close(self) -> None:
        content, self._content = self._content, None
        if content is not None:
            self._lost.clear()
            content.handles.remove(self)
            self._store.release(content)

    def _move(self, content: Content) -> None:
        self._content = content

    def __enter__(self) -> OpenTask:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
