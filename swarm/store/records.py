"""What the store remembers beyond the process: nothing, or rows in SQLite."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

from swarm import wire
from swarm.errors import StoreError
from swarm.store import database
from swarm.store.content import BLAKE3_BYTES, Content, Name, Pieces
from swarm.task import Digest, Geometry, Task


class Records:
    """Remembers nothing: contents in memory keep their own piece tables."""

    def content(self, content: Content, *, durable: bool = False) -> None:
        """A new content, or new facts of an old one; `durable` facts survive a power loss once flushed."""

    def deletion(self, content: Content) -> None:
        """The content and its pieces are no more."""

    def name(self, content: Content, name: Name) -> None:
        """A name of the content, new or changed."""

    def no_name(self, task_id: bytes) -> None:
        """Nothing has this name any more."""

    def piece(self, content: Content, piece: int, proof: tuple[bytes, wire.Signed] | None) -> None:
        """A piece was written.

        Raises:
            NoSpace, StoreError: Too much waits to be recorded already; this was not taken.
        """

    def loss(self, content: Content, lost: list[int]) -> None:
        """Pieces are not held any more."""

    def synced(self, content: Content, synced: list[int]) -> None:
        """The bytes of these pieces are on the disk, and no power loss takes them away."""

    def load_pieces(self, content: Content) -> Pieces:
        return Pieces.none(content.geometry.piece_count)

    def load_proof(self, content: Content, piece: int) -> tuple[bytes, wire.Signed] | None:
        """A recorded proof, with the task it was given for."""
        return None

    def count_held(self, content: Content) -> int:
        return content.held_count


class SqliteRecords(Records):
    """Rows in ``store.db``.  Writing queues them; reading waits for what was queued of the same content.  `close` it."""

    def __init__(self, path: Path, boot_id: str) -> None:
        """Open, migrate and note the boot.

        Raises:
            StoreTooNew, StoreError: As they say.
        """
        self._path = path
        self._reader = database.connect(path)
        try:
            os.chmod(path, 0o600)
            database.prepare(self._reader, path)
            self._boot = database.boot_number(self._reader, boot_id)
            self.writer = database.Writer(database.connect(path))
        except BaseException as error:
            self._reader.close()
            if isinstance(error, sqlite3.Error):
                raise database.translated(error, f"cannot use {path}") from error
            raise

    def close(self) -> None:
        """Commit, then close."""
        self.writer.close()
        self._reader.close()

    # --- reading ------------------------------------------------------------------------------------------------

    def load(self) -> list[Content]:
        """Every content with its names, least recently used first; without pieces.

        Raises:
            StoreError: The data base is damaged.
        """
        try:
            contents = {row[0]: _content(row) for row in self._reader.execute(_SELECT_CONTENT)}
            for key, *rest in self._reader.execute(_SELECT_NAME):
                name = _name(rest)
                contents[key].names[name.task.id] = name
        except sqlite3.Error as error:
            raise database.translated(error, f"cannot read {self._path}") from error
        return list(contents.values())

    def load_pieces(self, content: Content) -> Pieces:
        known = Pieces.none(content.geometry.piece_count)
        for piece, digest, boot in self._query(content, "SELECT piece, blake3, boot FROM piece WHERE content = ?", content.key):
            if 0 <= piece < len(known.held) and len(digest) == BLAKE3_BYTES:
                # What was complete was synced as a whole, whatever its rows say.
                known.load(piece, digest, held=content.complete or boot in (database.SYNCED, self._boot))
        known.find_end()
        return known

    def load_proof(self, content: Content, piece: int) -> tuple[bytes, wire.Signed] | None:
        rows = self._query(content, "SELECT proof FROM piece WHERE content = ? AND piece = ?", content.key, piece)
        return _unpack_proof(rows[0][0]) if rows and rows[0][0] is not None else None

    def count_held(self, content: Content) -> int:
        sql = "SELECT count(*) FROM piece WHERE content = ? AND boot IN (?, ?)"
        return int(self._query(content, sql, content.key, database.SYNCED, self._boot)[0][0])

    def _query(self, content: Content, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        if content.last_statement > self.writer.committed:
            self.writer.wait(content.last_statement)
        try:
            return self._reader.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise database.translated(error, f"cannot read {self._path}") from error

    # --- writing ------------------------------------------------------------------------------------------------

    def content(self, content: Content, *, durable: bool = False) -> None:
        geometry = content.geometry
        row = (
            content.key, content.file, geometry.length, geometry.piece_length, _text(content.digest), content.complete,
            content.private, content.created, content.last_used, content.scrubbed,
        )  # fmt: skip
        self._put(content, (_PUT_CONTENT, row), durable=durable)

    def deletion(self, content: Content) -> None:
        self._put(
            content,
            ("DELETE FROM piece WHERE content = ?", (content.key,)),
            ("DELETE FROM content WHERE key = ?", (content.key,)),
        )

    def name(self, content: Content, name: Name) -> None:
        task = name.task
        row = (
            task.id, content.key, _text(task.digest), task.url, task.shared, name.private, name.tag, name.application,
            name.pinned, name.created,
        )  # fmt: skip
        self._put(content, (_PUT_NAME, row))

    def no_name(self, task_id: bytes) -> None:
        self.writer.put(("DELETE FROM name WHERE task = ?", (task_id,)))

    def piece(self, content: Content, piece: int, proof: tuple[bytes, wire.Signed] | None) -> None:
        known = content.pieces
        if known is None:
            raise StoreError(f"{content.file} is not open")
        packed = None if proof is None else _pack_proof(*proof)
        row = (content.key, piece, known.digest(piece), self._boot, packed)
        self._put(content, (_PUT_PIECE, row), refusable=True)

    def loss(self, content: Content, lost: list[int]) -> None:
        self._put(content, *((_DROP_PIECE, (content.key, piece)) for piece in lost))

    def synced(self, content: Content, synced: list[int]) -> None:
        self._put(content, *((_SYNCED, (content.key, piece)) for piece in synced))

    def _put(self, content: Content, *statements: database.Statement, durable: bool = False, refusable: bool = False) -> None:
        content.last_statement = self.writer.put(*statements, durable=durable, refusable=refusable)


_SELECT_CONTENT = (
    "SELECT key, file, length, piece_length, digest, complete, private, created, last_used, scrubbed"
    " FROM content ORDER BY last_used, key"
)
_SELECT_NAME = "SELECT content, task, digest, url, shared, private, tag, application, pinned, created FROM name"
_PUT_CONTENT = "INSERT OR REPLACE INTO content VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_PUT_NAME = "INSERT OR REPLACE INTO name VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_PUT_PIECE = "INSERT OR REPLACE INTO piece VALUES (?, ?, ?, ?, ?)"
_DROP_PIECE = "DELETE FROM piece WHERE content = ? AND piece = ?"
_SYNCED = "UPDATE piece SET boot = 0 WHERE content = ? AND piece = ?"


def _content(row: tuple[Any, ...]) -> Content:
    key, file, length, piece_length, digest, complete, private, created, last_used, scrubbed = row
    content = Content(key, file, Geometry(length, piece_length), created, last_used)
    content.digest, content.complete, content.private = _digest(digest), bool(complete), bool(private)
    content.scrubbed, content.saved_use = scrubbed, last_used
    content.held_count = content.geometry.piece_count if complete else -1
    return content


def _name(row: list[Any]) -> Name:
    task, digest, url, shared, private, tag, application, pinned, created = row
    return Name(Task(task, _digest(digest), url, bool(shared)), bool(private), tag, application, bool(pinned), created)


def _text(digest: Digest | None) -> str | None:
    return None if digest is None else str(digest)


def _digest(text: str | None) -> Digest | None:
    return None if text is None else Digest.parse(text)


def _pack_proof(task_id: bytes, proof: wire.Signed) -> bytes:
    """Task id (32), key (32), signature (64), body: fixed lengths first, so nothing needs a frame."""
    return b"".join((task_id, proof.key, proof.signature, proof.body))


def _unpack_proof(packed: bytes) -> tuple[bytes, wire.Signed]:
    return packed[:32], wire.Signed(packed[128:], packed[32:64], packed[64:128])
