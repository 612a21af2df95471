"""Reading `file://` origins, for the local user only.

The user could open the file just as well: whoever may open the control socket administers this node.  Symbolic links are
therefore followed; anything but a regular file is refused, as a pipe or a device has no length and no second reading.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import unquote_to_bytes

import trio

from swarm.edges import OriginInfo, Source
from swarm.errors import (
    ConfigError,
    ContentChanged,
    LocalProtocolError,
    NotFoundAtOrigin,
    NotPermitted,
    OriginError,
    OriginRefused,
    OriginUnreachable,
)
from swarm.task import split_url

CHUNK_BYTES: Final = 1024 * 1024


class FileOrigin:
    """`edges.Origin` for files."""

    async def head(self, source: Source) -> OriginInfo:
        """Length, and a validator of modification time, size and inode.

        Raises:
            OriginError, NotPermitted: As in `edges.Origin`.
        """
        path = path_of(source)
        fd = await trio.to_thread.run_sync(_open, path)
        try:
            return _info(os.fstat(fd))
        finally:
            os.close(fd)

    @asynccontextmanager
    async def read(
        self, source: Source, start: int = 0, stop: int | None = None, *, expect: OriginInfo | None = None
    ) -> AsyncIterator[FileBody]:
        """Bytes [start, stop) of the file.

        Raises:
            ContentChanged: Its time, size or inode is not what `expect` says; also at the end of the body.
            OriginError, NotPermitted: As in `edges.Origin`.
        """
        if start < 0 or (stop is not None and stop <= start):
            raise LocalProtocolError(f"asked an origin for bytes {start} to {stop}")
        path = path_of(source)
        fd = await trio.to_thread.run_sync(_open, path)
        try:
            info = _info(os.fstat(fd))
            if expect is not None and not _is_same(info, expect):
                raise ContentChanged(f"{_shown(path)} changed since it was first looked at")
            yield FileBody(fd, path, start, stop, info)
        finally:
            os.close(fd)


class FileBody:
    """An `edges.OriginBody`; the descriptor belongs to `FileOrigin.read`."""

    def __init__(self, fd: int, path: bytes, start: int, stop: int | None, info: OriginInfo) -> None:
        self._fd = fd
        self._path = path
        self._info = info
        self._at = start
        self._stop = _length(info) if stop is None else min(stop, _length(info))
        self.start = start

    @property
    def length(self) -> int | None:
        return self._info.length

    def chunks(self) -> AsyncIterator[bytes]:
        """The bytes, a mebibyte at a time.

        Raises:
            OriginUnreachable: The disk failed.
            ContentChanged: The file changed while it was read.
        """
        return self

    def __aiter__(self) -> FileBody:
        return self

    async def __anext__(self) -> bytes:
        if self._at >= self._stop:
            self._check_unchanged()
            raise StopAsyncIteration
        try:
            data = await trio.to_thread.run_sync(os.pread, self._fd, min(CHUNK_BYTES, self._stop - self._at), self._at)
        except OSError as error:
            raise OriginUnreachable(f"cannot read {_shown(self._path)}: {error.strerror}") from error
        if not data:
            raise ContentChanged(f"{_shown(self._path)} became shorter while it was read")
        self._at += len(data)
        return data

    def _check_unchanged(self) -> None:
        if _info(os.fstat(self._fd)) != self._info:
            raise ContentChanged(f"{_shown(self._path)} changed while it was read")


def path_of(source: Source) -> bytes:
    """The path a file URL names.

    Raises:
        NotPermitted: Somebody else than the local user asks.
        ConfigError: It names another host, or no absolute path.
    """
    if source.requester != "user":
        raise NotPermitted(f"refused a file:// URL from a {source.requester}: only the local user may name files")
    parts = split_url(source.url)
    if parts.netloc not in ("", "localhost"):
        raise ConfigError("a file URL names no other host: give file:///path")
    path = unquote_to_bytes(parts.path)
    if not path.startswith(b"/") or b"\0" in path:
        raise ConfigError("a file URL needs an absolute path: give file:///path")
    return path


def _open(path: bytes) -> int:
    """A read-only descriptor of a regular file."""
    try:
        # Not blocking, or a pipe that nobody writes would hold a thread for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise _open_failure(path, error) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OriginError(f"{_shown(path)} is not a regular file; only those can be fetched")
    return fd


def _open_failure(path: bytes, error: OSError) -> OriginError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFoundAtOrigin(f"there is no file {_shown(path)}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return OriginRefused(f"no permission to read {_shown(path)}: the daemon's user must be able to")
    if error.errno == errno.ENXIO:
        return OriginError(f"{_shown(path)} is not a regular file; only those can be fetched")
    return OriginUnreachable(f"cannot open {_shown(path)}: {error.strerror}")


def _info(found: os.stat_result) -> OriginInfo:
    validator = f"file:{found.st_mtime_ns}:{found.st_size}:{found.st_ino}"
    return OriginInfo(found.st_size, validator, ranges=True)


def _is_same(info: OriginInfo, expect: OriginInfo) -> bool:
    return info.length == expect.length and (not expect.validator or info.validator == expect.validator)


def _length(info: OriginInfo) -> int:
    return info.length or 0


def _shown(path: bytes) -> str:
    return ascii(os.fsdecode(path))[1:-1]
