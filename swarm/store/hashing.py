"""Hashing what is on disk: single pieces, and the content digest that follows the verified prefix."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog
from blake3 import blake3

READ_BYTES: Final = 1 << 20
"""Per read: large enough that the interpreter lock changes hands rarely, small enough for the allocator to keep: buffers of 4
MiB come fresh each time, with page faults (`one-to-one`: 2.3 instead of 2.1 CPU-s/GiB)."""


def piece_digest(fd: int, offset: int, length: int) -> bytes | None:
    """BLAKE3 of part of a file; `None` if it cannot be read or ends early (a bad sector is a rotten piece, no more)."""
    hasher = blake3()
    buffer = memoryview(bytearray(min(length, READ_BYTES)))
    while length > 0:
        try:
            count = os.preadv(fd, [buffer[: min(length, READ_BYTES)]], offset)
        except OSError:
            return None
        if count == 0:
            return None
        hasher.update(buffer[:count])
        offset += count
        length -= count
    return hasher.digest()


class Worker:
    """One thread that runs jobs in order, started at the first; `close` it.

    Not trio's threads: jobs are given by synchronous code, outlive whoever gave them, and must run one after another.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._closing = False

    def put(self, job: Callable[[], None]) -> None:
        """Queue a job; dropped after `close`."""
        with self._changed:
            if self._closing:
                return
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self) -> None:
        """Block until every job queued so far has run."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs and not self._busy)

    def close(self) -> None:
        """Run what is queued, then end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                try:
                    job()
                except OSError as error:
                    # A job that must tell somebody of its failure does so itself; the thread serves the other contents.
                    structlog.get_logger(__name__).error("store_job_failed", worker=self._name, error=str(error))
        finally:  # also after a bug of ours: nobody may wait for a thread that is gone
            with self._changed:
                self._closing, self._busy = True, False
                self._jobs.clear()
                self._changed.notify_all()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._jobs or self._closing)
            if not self._jobs:
                return None
            self._busy = True
            return self._jobs.popleft()


class PrefixHasher:
    """The content digest of a growing prefix of one file, so that little is left to hash when the last piece is in.

    It reads back what was written, from the page cache: a copy costs a tenth of the SHA-256, and hashing happens in
    a thread, on another core.  Its prefix never shrinks; when a piece in it is dropped, a new hasher takes its place.
    """

    def __init__(self, fd: int, algorithm: str) -> None:
        """Duplicates the descriptor; `close` closes that."""
        self.algorithm = algorithm
        self._fd = os.dup(fd)
        self._hash = hashlib.new(algorithm)
        self._position = 0
        self._busy = threading.Lock()
        self._stopped = False

    def advance(self, stop: int, between: Callable[[], None] = lambda: None) -> None:
        """Hash up to offset `stop`; blocking.  `between` is called now and then and may raise to give up.

        Raises:
            OSError: Reading failed, or the file is shorter.  Position and hash agree, so it can be tried again.
        """
        with self._busy:
            if self._stopped or self._position >= stop:
                return
            buffer = memoryview(bytearray(min(stop - self._position, READ_BYTES)))
            while self._position < stop and not self._stopped:
                between()
                count = os.preadv(self._fd, [buffer[: min(stop - self._position, READ_BYTES)]], self._position)
                if count == 0:
                    raise OSError(errno.EIO, "the file is shorter than its content")
                self._hash.update(buffer[:count])
                self._position += count

    def hexdigest(self, stop: int, between: Callable[[], None] = lambda: None) -> str:
        """Digest of bytes [0, stop); blocking.  `stop` must be the end: it is an error to have advanced further."""
        self.advance(stop, between)
        return self._hash.hexdigest()

    def stop(self) -> None:
        """Make `advance` return soon; callable from any thread."""
        self._stopped = True

    def close(self) -> None:
        """Close the descriptor; blocks while `advance` runs."""
        self._stopped = True
        with self._busy:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
