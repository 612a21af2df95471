"""Writing the output file: by the command, as its own user, from a read-only descriptor of the store's file.

Goals: the target appears whole or not at all, whatever interrupts us; nothing is ever written through a link
(SECURITY: T25); as few bytes as possible are moved (hard link where asked for, reflink, copy inside the kernel).
Everything happens below a descriptor of the target's directory, so swapping that directory or the target for a link
while we work leads nowhere else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.errors import Interrupted, NoSpace, StoreError, SwarmError, TargetError, TargetExists

STDOUT: Final = "-"
CHUNK_BYTES: Final = 1 << 20
KERNEL_CHUNK_BYTES: Final = 64 << 20
"""Per call of `copy_file_range`: it cannot be interrupted while it copies, and Ctrl-C should not wait long."""

FICLONE: Final = 0x40049409

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_COPY: Final = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF, errno.ENOTTY)
"""Answers of a kernel or file system that cannot do it this way; another way may do."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """How the bytes got there: ``hard link``, ``reflink``, ``copy_file_range``, ``sendfile``, ``copy`` or ``stream``."""

    method: str


def check_target(target: Path, *, overwrite: bool) -> None:
    """Say before a download what would fail after it.

    Raises:
        TargetError, TargetExists: As `export` would.
    """
    if str(target) == STDOUT:
        return
    directory, name = _open_directory(target)
    try:
        _check_free(directory, name, target, overwrite=overwrite)
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=directory, effective_ids=True):
            raise TargetError(f"cannot write in {target.parent}: permission denied; give another path with -o")
    finally:
        os.close(directory)


def export(fd: int, target: Path, *, overwrite: bool, expect_length: int, hard_link_from: Path | None = None) -> ExportResult:
    """Write what `fd` reads to `target` (``-``: standard output), whole or not at all.

    Args:
        fd: Complete content, seekable, open for reading; stays open.
        expect_length: Bytes it must have.
        hard_link_from: Link this file, the same that `fd` reads, instead of copying, where possible.  The link is
            read-only: whoever edits it edits the store, which notices and throws the content away.

    Raises:
        TargetExists: There is something already and `overwrite` is false.
        TargetError: It is no place for a file.
        NoSpace: Nothing was left behind.
        StoreError: `fd` does not have the expected length.
    """
    length = os.fstat(fd).st_size
    if length != expect_length:
        raise StoreError(f"the store gave {length} bytes where {expect_length} were expected; repeat the command")
    if str(target) == STDOUT:
        _stream(fd, sys.stdout.fileno(), length)
        return ExportResult("stream")
    directory, name = _open_directory(target)
    try:
        _check_free(directory, name, target, overwrite=overwrite)
        temporary = f".{name[:180]}.{os.urandom(6).hex()}.part"
        try:
            method = _fill(fd, directory, temporary, length, hard_link_from)
            _publish(directory, temporary, name, target, overwrite=overwrite)
        except OSError as error:
            raise _translated(error, target) from error
        finally:
            # Also after success: renaming one hard link over another of the same file leaves both.
            with suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
        return ExportResult(method)
    finally:
        os.close(directory)


def _open_directory(target: Path) -> tuple[int, str]:
    name = target.name
    if name in ("", ".", ".."):
        raise TargetError(f"{target} names no file; give the path of a file with -o")
    try:
        return os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), name
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise TargetError(f"there is no directory {target.parent}; make it first, or give another path with -o") from error
        raise TargetError(f"cannot write to {str(target)!r}: {getattr(error, 'strerror', None) or error}") from error


def _check_free(directory: int, name: str, target: Path, *, overwrite: bool) -> None:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot write to {str(target)!r}: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise TargetError(f"{target} is a directory; give the path of a file in it with -o")
    if stat.S_ISLNK(found.st_mode):
        raise TargetError(f"{target} is a symbolic link, which is not followed; give the path it leads to, or remove it")
    if not stat.S_ISREG(found.st_mode):
        raise TargetError(f"{target} is not a plain file; give another path with -o")
    if not overwrite:
        raise TargetExists(f"{target} exists; give --overwrite to replace it, or another path with -o")


def _fill(fd: int, directory: int, temporary: str, length: int, hard_link_from: Path | None) -> str:
    if hard_link_from is not None and _hard_link(fd, hard_link_from, directory, temporary):
        return "hard link"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    out = os.open(temporary, flags, 0o666, dir_fd=directory)
    try:
        method = _copy(fd, out, length)
        os.fsync(out)
    finally:
        os.close(out)
    return method


def _hard_link(fd: int, path: Path, directory: int, temporary: str) -> bool:
    """Link `path` if it is what `fd` reads; `False` where that is not possible (another file system, another owner)."""
    try:
        os.link(path, temporary, dst_dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    linked, opened = os.stat(temporary, dir_fd=directory, follow_symlinks=False), os.fstat(fd)
    if (linked.st_dev, linked.st_ino) != (opened.st_dev, opened.st_ino):
        os.unlink(temporary, dir_fd=directory)
        return False
    umask = os.umask(0o077)
    os.umask(umask)
    with suppress(OSError):  # not the owner: then its mode is not ours to change
        os.fchmod(fd, 0o444 & ~umask)
    return True


def _copy(fd: int, out: int, length: int) -> str:
    """The first way that works; holes stay holes."""
    try:
        fcntl.ioctl(out, FICLONE, fd)
        return "reflink"
    except OSError as error:
        if error.errno not in _CANNOT_COPY:
            raise
    os.ftruncate(out, length)
    methods = ["copy_file_range", "sendfile", "copy"]
    for start, stop in _data_ranges(fd, length):
        while start < stop:
            try:
                count = _COPY[methods[0]](fd, out, start, stop - start)
            except OSError as error:
                if error.errno not in _CANNOT_COPY or len(methods) == 1:
                    raise
                del methods[0]
                continue
            if count == 0 and len(methods) > 1:  # some file systems say so instead of refusing
                del methods[0]
            elif count == 0:
                raise StoreError("the store's file became shorter while it was copied; repeat the command")
            start += count
    return methods[0]


def _copy_file_range(fd: int, out: int, offset: int, count: int) -> int:
    return os.copy_file_range(fd, out, min(count, KERNEL_CHUNK_BYTES), offset, offset)


def _sendfile(fd: int, out: int, offset: int, count: int) -> int:
    os.lseek(out, offset, os.SEEK_SET)
    return os.sendfile(out, fd, offset, min(count, KERNEL_CHUNK_BYTES))


def _read_write(fd: int, out: int, offset: int, count: int) -> int:
    data = os.pread(fd, min(count, CHUNK_BYTES), offset)
    return os.pwrite(out, data, offset)


_COPY: Final = {"copy_file_range": _copy_file_range, "sendfile": _sendfile, "copy": _read_write}


def _data_ranges(fd: int, length: int) -> list[tuple[int, int]]:
    """Where there is data, as half-open ranges; all of it where the file system does not say."""
    ranges = []
    position = 0
    while position < length:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            position = min(length, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                break
            return [(0, length)]
        ranges.append((start, position))
    return ranges


def _publish(directory: int, temporary: str, name: str, target: Path, *, overwrite: bool) -> None:
    """Give the finished file its name, and make that last."""
    if overwrite:
        # Replaces whatever has the name by now; a link put there meanwhile is replaced, not followed.
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    else:
        _rename_without_replacing(directory, temporary, name, target)
    os.fsync(directory)


def _rename_without_replacing(directory: int, temporary: str, name: str, target: Path) -> None:
    try:
        os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    except FileExistsError as error:
        raise TargetExists(f"{target} exists; give --overwrite to replace it, or another path with -o") from error
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without hard links: the best it can do is to look and then rename.
        _check_free(directory, name, target, overwrite=False)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


def _stream(fd: int, out: int, length: int) -> None:
    offset = 0
    try:
        while offset < length:
            data = memoryview(os.pread(fd, min(length - offset, CHUNK_BYTES), offset))
            if not data:
                raise StoreError("the store's file became shorter while it was copied; repeat the command")
            offset += len(data)
            while data:
                data = data[os.write(out, data) :]
    except BrokenPipeError as error:
        raise Interrupted("whoever read standard output went away; what was fetched is kept") from error
    except OSError as error:
        raise _translated(error, Path(STDOUT)) from error


def _translated(error: OSError, target: Path) -> SwarmError:
    where = "standard output" if str(target) == STDOUT else str(target)
    if error.errno in _FULL:
        return NoSpace(f"no space left for {where}; free some and repeat the command, nothing is downloaded again")
    if error.errno == errno.EISDIR:
        return TargetError(f"{target} is a directory; give the path of a file in it with -o")
    return TargetError(f"cannot write {where}: {error.strerror}; give another path with -o")
