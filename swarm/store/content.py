"""The state of one content: which pieces are held, and how much each of them is to be trusted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from swarm import pieces, wire
from swarm.errors import StoreError
from swarm.pieces import PieceSet
from swarm.store.body import Body
from swarm.task import Digest, Geometry, Task

if TYPE_CHECKING:
    from swarm.store.handle import OpenTask
    from swarm.store.hashing import PrefixHasher

BLAKE3_BYTES: Final = 32

MAX_RECENT_PROOFS: Final = 4096
"""Proofs of an open content kept in memory (below 2 MiB); older ones are read from the data base."""


@dataclass(slots=True, eq=False)
class Name:
    """A task under which content was asked for."""

    task: Task
    private: bool
    tag: str
    application: str
    pinned: bool
    created: float


@dataclass(slots=True)
class Pieces:
    """What is known of the pieces of an open content.

    Attributes:
        held: Verified and to be served.
        checked: Held, and hashed or written by this process with the file unchanged since.
        suspect: Recorded by an earlier boot and never synced: not held until hashed again.
        digests: BLAKE3 of held and suspect pieces, one after another.
        proofs: Of pieces written lately, with the task they were given for.
        end: Number of the first piece not held.
    """

    held: PieceSet
    checked: PieceSet
    suspect: PieceSet
    digests: bytearray
    proofs: dict[int, tuple[bytes, wire.Signed]] = field(default_factory=dict)
    end: int = 0

    @classmethod
    def none(cls, count: int) -> Pieces:
        return cls(pieces.none(count), pieces.none(count), pieces.none(count), bytearray(BLAKE3_BYTES * count))

    def digest(self, piece: int) -> bytes:
        return bytes(self.digests[piece * BLAKE3_BYTES : (piece + 1) * BLAKE3_BYTES])

    def put(self, piece: int, blake3: bytes, *, checked: bool) -> None:
        self.digests[piece * BLAKE3_BYTES : (piece + 1) * BLAKE3_BYTES] = blake3
        self.held[piece] = True
        self.checked[piece] = checked
        self.suspect[piece] = False
        if piece == self.end:
            self.find_end()

    def load(self, piece: int, blake3: bytes, *, held: bool) -> None:
        """From the records; `find_end` after the last."""
        self.digests[piece * BLAKE3_BYTES : (piece + 1) * BLAKE3_BYTES] = blake3
        (self.held if held else self.suspect)[piece] = True

    def remember_proof(self, piece: int, task_id: bytes, proof: wire.Signed) -> None:
        self.proofs[piece] = (task_id, proof)
        if len(self.proofs) > MAX_RECENT_PROOFS:
            del self.proofs[next(iter(self.proofs))]

    def drop(self, dropped: list[int]) -> None:
        """`dropped` is in ascending order."""
        for piece in dropped:
            self.held[piece] = self.checked[piece] = self.suspect[piece] = False
            self.proofs.pop(piece, None)
        self.end = min(self.end, dropped[0])

    def find_end(self) -> None:
        end = self.held.find(0, self.end)
        self.end = len(self.held) if end < 0 else end


@dataclass(slots=True, eq=False)
class Content:
    """Bytes, their names, and who uses them.

    Attributes:
        key: Its number in the data base.
        file: Its file, relative to the directory of tasks.
        digest: Once it was complete; it stays when a piece is lost later.
        private: Every name under which it became complete was private, so none made it public.
        used: Orders contents by last use, whatever the clock does.
        held_count: Pieces held, or -1 while nobody asked the data base.
        epoch: Changes whenever a piece is dropped, so that work done in a thread meanwhile can be told stale.
        references: Open tasks, slices being served, and threads at work.  Nothing in use is deleted.
        replaced: Former bodies; what was sliced from them may still be on its way out.
        seen: `Body.seen` when it was last closed.
        gone: Set while it is being deleted; fires when that is done or was given up.
    """

    key: int
    file: str
    geometry: Geometry
    created: float
    last_used: float
    digest: Digest | None = None
    complete: bool = False
    private: bool = False
    scrubbed: float = 0.0
    used: int = 0
    held_count: int = 0
    names: dict[bytes, Name] = field(default_factory=dict)
    handles: list[OpenTask] = field(default_factory=list)
    references: int = 0
    epoch: int = 0
    body: Body | None = None
    replaced: list[Body] = field(default_factory=list)
    seen: tuple[int, ...] = ()
    pieces: Pieces | None = None
    hasher: PrefixHasher | None = None
    hashed_until: int = 0
    unsynced: list[int] = field(default_factory=list)
    unsynced_bytes: int = 0
    sync_failed: str = ""
    last_statement: int = 0
    saved_use: float = 0.0
    gone: trio.Event | None = None

    @property
    def pinned(self) -> bool:
        return any(name.pinned for name in self.names.values())

    @property
    def opened(self) -> Body:
        """Its body; an error once the store was closed under it."""
        if self.body is None:
            raise StoreError("the store is closed")
        return self.body

    @property
    def known(self) -> Pieces:
        """Its piece table; an error if it is not open."""
        if self.pieces is None:
            raise StoreError("the store is closed")
        return self.pieces
