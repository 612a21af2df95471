"""The bytes of one content: a file (on disk or in memory), or nothing at all under simulation."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final, Protocol

from swarm.errors import NoSpace, StoreError
from swarm.store import hashing

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def storage_error(error: OSError, what: str) -> StoreError:
    """A failed system call as one of our own errors."""
    if error.errno in FULL:
        return NoSpace(f"{what}: {error.strerror}; free some space and repeat, nothing that was verified is lost")
    return StoreError(f"{what}: {error.strerror}")


class Body(Protocol):
    """Where the bytes of one open content are.  All offsets and lengths in bytes."""

    fd: int
    path: Path | None
    writable: bool
    """Whether writing here changes nobody else's file: `False` once somebody has a hard link to it."""

    @property
    def seen(self) -> tuple[int, ...]:
        """What it looked like at the last `changed` or `write`; equal if nobody wrote since."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Write it all.

        Raises:
            NoSpace, StoreError: Part of it may have been written.
        """
        ...

    def digest(self, offset: int, length: int) -> bytes | None:
        """BLAKE3 of a range; `None` if it cannot be read."""
        ...

    def changed(self) -> bool:
        """Whether somebody else wrote, since this was last asked or `write` was called."""
        ...

    def read(self, offset: int, length: int) -> bytes: ...

    def open_read_only(self) -> int: ...

    def close(self) -> None: ...


class FileBody:
    """A file of the length of its content; not yet written parts read as zeros."""

    def __init__(self, fd: int, path: Path | None, *, writable: bool = True) -> None:
        """Takes over the descriptor."""
        self.fd = fd
        self.path = path
        self._may_write = writable
        self.seen = self._look()

    def _look(self) -> tuple[int, ...]:
        found = os.fstat(self.fd)
        self.writable = self._may_write and found.st_nlink <= 1
        return found.st_ctime_ns, found.st_size, found.st_ino

    def changed(self) -> bool:
        before, self.seen = self.seen, self._look()
        return before != self.seen

    def write(self, offset: int, data: memoryview) -> None:
        try:
            while data:
                count = os.pwrite(self.fd, data, offset)
                data = data[count:]
                offset += count
        except OSError as error:
            raise storage_error(error, f"cannot write {len(data)} bytes to the store") from error
        finally:
            self.seen = self._look()

    def digest(self, offset: int, length: int) -> bytes | None:
        return hashing.piece_digest(self.fd, offset, length)

    def read(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self.fd, length, offset)
            while len(data) < length and (more := os.pread(self.fd, length - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise storage_error(error, "cannot read from the store") from error
        if len(data) < length:
            raise StoreError("a file of the store is shorter than its content")
        return data

    def open_read_only(self) -> int:
        """A description of its own: neither our offset nor our right to write goes with it."""
        try:
            return os.open(f"/proc/self/fd/{self.fd}" if self.path is None else self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise storage_error(error, "cannot open a file of the store") from error

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class NoBody:
    """Simulation: pieces have digests and no bytes."""

    fd: int = -1
    path: Path | None = None
    writable: bool = True
    seen: tuple[int, ...] = ()

    def write(self, offset: int, data: memoryview) -> None:
        pass

    def digest(self, offset: int, length: int) -> bytes | None:
        return None

    def changed(self) -> bool:
        return False

    def read(self, offset: int, length: int) -> bytes:
        raise StoreError("a simulated store keeps no bytes")

    def open_read_only(self) -> int:
        raise StoreError("a simulated store keeps no bytes")

    def close(self) -> None:
        pass
