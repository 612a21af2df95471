"""Which pieces are held, kept in SQLite: schema, migrations, and one thread that commits in batches.

What is promised, and how:
- A row is committed only after its piece was written to the file, so after a crash of the process, where the page
  cache lives on, a committed piece is there.
- After a crash of the machine it may not be.  Every piece row therefore carries the number of the boot in which it
  was written, until its bytes were synced, when that becomes 0 (`SYNCED`).  Rows of an earlier boot are suspects.
- The write-ahead log under ``synchronous=NORMAL`` may lose its last commits to a power loss, never its order.
- What must survive (a completed task) is committed with ``synchronous=FULL``.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import structlog

from swarm.errors import NoSpace, StoreError, StoreTooNew

Statement = tuple[str, tuple[Any, ...]]

SYNCED: Final = 0
APPLICATION_ID: Final = 0x7377726D
"""``swrm``: tells our data base from any other SQLite file."""

BATCH_ROWS: Final = 3
BATCH_SECONDS: Final = 0.25
"""A batch is committed when it has this many rows or is this old, so that a kill -9 costs a few pieces at most.  Each batch
wakes the thread twice, which takes the interpreter's lock from the event loop: a commit for each piece (10 ms) was 6 % of
what the daemons of a busy machine did."""

MAX_BATCH: Final = 4096
"""Rows in one transaction; keeps the log of one commit below 2 MiB when a backlog is worked off."""

MAX_PENDING: Final = 16384
"""Rows that may wait while the data base cannot be written (disk full); then writing pieces fails (4 MiB of memory)."""

RETRY_SECONDS: Final = 1.0

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE boot (number INTEGER PRIMARY KEY, id TEXT NOT NULL)",
        """CREATE TABLE content (
            key INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, length INTEGER NOT NULL, piece_length INTEGER NOT NULL,
            digest TEXT, complete INTEGER NOT NULL, private INTEGER NOT NULL,
            created REAL NOT NULL, last_used REAL NOT NULL, scrubbed REAL NOT NULL)""",
        """CREATE TABLE name (
            task BLOB PRIMARY KEY, content INTEGER NOT NULL, digest TEXT, url TEXT NOT NULL, shared INTEGER NOT NULL,
            private INTEGER NOT NULL, tag TEXT NOT NULL, application TEXT NOT NULL, pinned INTEGER NOT NULL,
            created REAL NOT NULL) WITHOUT ROWID""",
        """CREATE TABLE piece (
            content INTEGER NOT NULL, piece INTEGER NOT NULL, blake3 BLOB NOT NULL, boot INTEGER NOT NULL, proof BLOB,
            PRIMARY KEY (content, piece)) WITHOUT ROWID""",
    ),
)
"""Statements from each version to the next; the version of a data base is how many of these it has seen."""


def connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode; statements that belong together are put between BEGIN and COMMIT.

    Raises:
        StoreError: It cannot be opened.
    """
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    except sqlite3.Error as error:
        raise StoreError(f"cannot open {path}: {error}") from error
    return connection


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Check whose data base it is and bring it to the current version.

    Raises:
        StoreTooNew: A newer swarm wrote it.
        StoreError: It is damaged, or not ours.
    """
    try:
        connection.execute("PRAGMA cache_size = -512")  # KiB; rows are read once in a while, a cache buys nothing
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreTooNew(
                f"{path.parent} was written by a newer swarm (store version {version}, this one knows {len(MIGRATIONS)}); "
                "run that version, or give another directory with --data-dir"
            )
        if tables and application != APPLICATION_ID:
            raise StoreError(f"{path} is not a swarm store; give another directory with --data-dir")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID:d}")
        for number in range(version, len(MIGRATIONS)):
            connection.execute("BEGIN IMMEDIATE")
            for statement in MIGRATIONS[number]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number + 1:d}")
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise translated(
            error, f"cannot use {path}", "move store.db* and tasks/ out of the way to start an empty store"
        ) from error


def boot_number(connection: sqlite3.Connection, boot_id: str) -> int:
    """The number of this boot of the machine, above 0; a new one if the last was another boot."""
    row = connection.execute("SELECT number, id FROM boot ORDER BY number DESC LIMIT 1").fetchone()
    if row is not None and row[1] == boot_id:
        return int(row[0])
    number = 1 if row is None else int(row[0]) + 1
    connection.execute("INSERT INTO boot VALUES (?, ?)", (number, boot_id))
    return number


def translated(error: sqlite3.Error, what: str, advice: str = "") -> StoreError:
    """The same as one of our own errors."""
    code = getattr(error, "sqlite_errorcode", 0)
    if code & 0xFF == sqlite3.SQLITE_FULL:
        return NoSpace(f"{what}: the disk is full; free some space, nothing that was verified is lost")
    return StoreError(f"{what}: {error}" + (f"; {advice}" if advice else ""))


class Writer:
    """Commits statements in order, in its own thread, so that no commit ever holds up the event loop.

    A batch that fails is kept and tried again every second: with the disk full and then not full any more, nothing
    was forgotten.  `close` it.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Takes over the connection."""
        connection.execute("PRAGMA cache_size = -512")
        self._connection = connection
        self._queue: deque[Statement] = deque()
        self._changed = threading.Condition()
        self._added = 0
        self._committed = 0
        self._attempts = 0
        self._waiting = 0
        self._durable_until = 0
        self._error: sqlite3.Error | None = None
        self._synchronous = ""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="swarm-store-db", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Statements not committed yet."""
        return self._added - self._committed

    @property
    def committed(self) -> int:
        """Number of the last committed statement."""
        return self._committed

    @property
    def lock(self) -> threading.Condition:
        """Held while statements are added; whoever must decide and add in one step takes it around both."""
        return self._changed

    def put(self, *statements: Statement, durable: bool = False, refusable: bool = False) -> int:
        """Queue statements and return the number of the last, for `wait`.

        Args:
            durable: Sync the log with their commit.
            refusable: Refuse when too much is waiting already.

        Raises:
            StoreError, NoSpace: Closed, or refused; nothing was queued.
        """
        with self._changed:
            if self._closing:
                raise StoreError("the store is closed")
            if refusable and self._error is not None and len(self._queue) >= MAX_PENDING:
                raise translated(self._error, "cannot write the store's data base") from self._error
            self._queue.extend(statements)
            self._added += len(statements)
            if durable:
                self._durable_until = self._added
            if len(self._queue) == len(statements) or durable or len(self._queue) >= BATCH_ROWS:
                self._changed.notify_all()
            return self._added

    def wait(self, number: int | None = None) -> None:
        """Block until the statement of this number (default: all queued so far) is committed.

        Raises:
            StoreError, NoSpace: It could not be, just now; it stays queued.
        """
        with self._changed:
            number = self._added if number is None else number
            if self._committed >= number:
                return
            attempts = self._attempts
            self._waiting += 1
            self._changed.notify_all()
            try:
                while self._committed < number:
                    # One more attempt than the one that may be under way: that one may not have had our statement.
                    if self._error is not None and self._attempts > attempts + 1:
                        raise translated(self._error, "cannot write the store's data base") from self._error
                    if not self._thread.is_alive():
                        raise StoreError("the store is closed")
                    self._changed.wait(1.0)
            finally:
                self._waiting -= 1

    def close(self) -> None:
        """Commit what can be committed, end the thread and close the connection."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            statements, durable = batch
            error = self._commit(statements, durable)
            with self._changed:
                self._attempts += 1
                if error is None:
                    for _ in statements:
                        self._queue.popleft()
                    self._committed += len(statements)
                elif self._error is None:
                    structlog.get_logger(__name__).error("store_commit_failed", error=str(error), rows=len(statements))
                self._error = error
                self._changed.notify_all()
                if error is not None and self._closing:
                    return
                if error is not None:
                    self._changed.wait_for(lambda: self._waiting or self._closing, RETRY_SECONDS)

    def _next_batch(self) -> tuple[list[Statement], bool] | None:
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            if not self._queue:
                return None
            hurry = self._waiting or self._closing or self._durable_until > self._committed
            if not hurry and len(self._queue) < BATCH_ROWS:
                self._changed.wait(BATCH_SECONDS)
            return list(islice(self._queue, MAX_BATCH)), self._durable_until > self._committed

    def _commit(self, statements: Sequence[Statement], durable: bool) -> sqlite3.Error | None:
        execute = self._connection.execute
        synchronous = "FULL" if durable else "NORMAL"
        try:
            if synchronous != self._synchronous:
                execute(f"PRAGMA synchronous = {synchronous}")
                self._synchronous = synchronous
            execute("BEGIN IMMEDIATE")
            for sql, values in statements:
                execute(sql, values)
            execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                execute("ROLLBACK")
            return error
        return None
