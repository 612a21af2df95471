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
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.errors import Interrupted, NoSpace, StoreError, SwarmError, TargetError, TargetExists

STDOUT: Final = "-"
CHUNK_BYTES: Final = 1 << 20
KERNEL_CHUNK_BYTES: Final = 64 << 20
"""Per call of `copy_file_range`: it cannot be interrupted while it copies, and Ctrl-C should not wait long."""

FICLONE: Final = 0x40049409

_CANNOT_UNNAMED: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS)
"""Answers of a kernel or file system without `O_TMPFILE`."""

_CANNOT_LINK: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Answers of a file system without hard links."""

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

    Args and errors: as of `Export.finish`.
    """
    with Export(target, overwrite=overwrite) as writing:
        return writing.finish(fd, expect_length=expect_length, hard_link_from=hard_link_from)


class Export:
    """The output file in the making.  Content that is still arriving may be copied meanwhile: `arriving`, then `verified` as it
    comes; when the last byte is there, only the last pieces are still to be copied.

    Use as a context manager: without `finish`, nothing is left behind.
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        self._target = target
        self._overwrite = overwrite
        self._early: _EarlyCopy | None = None

    def __enter__(self) -> Export:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()

    def _forget(self) -> None:
        if self._early is not None:
            self._early.close()
            self._early = None

    def arriving(self, fd: int, name: str, length: int, piece_length: int) -> None:
        """Content called `name` is arriving in what `fd` reads, piece by piece; called anew, it starts over.

        Takes over the descriptor.

        Raises:
            TargetError, NoSpace: There is no place for it.
        """
        self._forget()
        if str(self._target) == STDOUT or length == 0:
            os.close(fd)
            return
        with ExitStack() as undo:
            undo.callback(os.close, fd)
            out = _Output(_open_directory(self._target)[0], self._target)
            undo.callback(out.close)
            try:
                self._early = _EarlyCopy(fd, out, name, length, piece_length)
            except OSError as error:
                raise _translated(error, self._target) from error
            undo.pop_all()

    def verified(self, first: int, stop: int) -> None:
        """Pieces `first` to `stop`, not included, can be read.

        Raises:
            TargetError, NoSpace: They cannot be written.
        """
        if self._early is None:
            return
        try:
            self._early.copy(first, stop)
        except OSError as error:
            raise _translated(error, self._target) from error

    def lost(self) -> None:
        """Some of what was called verified was wrong (rare): nothing copied so far counts.

        Raises:
            TargetError: It cannot be taken back.
        """
        if self._early is None:
            return
        try:
            self._early.start_over()
        except OSError as error:
            raise _translated(error, self._target) from error

    def finish(self, fd: int, *, expect_length: int, name: str = "", hard_link_from: Path | None = None) -> ExportResult:
        """Complete the file and give it its name, whole or not at all.

        Args:
            fd: Complete content, seekable, open for reading; stays open.
            expect_length: Bytes it must have.
            name: What it is called; what arrived under another name is not part of it.
            hard_link_from: Link this file, the same that `fd` reads, instead of copying, where possible.  The link is
                read-only: whoever edits it edits the store, which notices and throws the content away.

        Raises:
            TargetExists: There is something already and overwriting was not asked for.
            TargetError: It is no place for a file.
            NoSpace: Nothing was left behind.
            StoreError: `fd` does not have the expected length.
        """
        length = os.fstat(fd).st_size
        if length != expect_length:
            raise StoreError(f"the store gave {length} bytes where {expect_length} were expected; repeat the command")
        if str(self._target) == STDOUT:
            _stream(fd, sys.stdout.fileno(), length)
            return ExportResult("stream")
        if hard_link_from is None and self._early is not None and (self._early.name, self._early.length) == (name, length):
            return self._finish_early(self._early, fd)
        self._forget()
        directory, target = _open_directory(self._target)
        try:
            _check_free(directory, target, self._target, overwrite=self._overwrite)
            if hard_link_from is not None and self._hard_link(fd, hard_link_from, directory, target):
                return ExportResult("hard link")
            with closing(_Output(os.dup(directory), self._target)) as out:
                try:
                    method = _copy(fd, out.fd, length)
                    out.publish(target, overwrite=self._overwrite)
                except OSError as error:
                    raise _translated(error, self._target) from error
            return ExportResult(method)
        finally:
            os.close(directory)

    def _finish_early(self, early: _EarlyCopy, fd: int) -> ExportResult:
        name = self._target.name
        _check_free(early.out.directory, name, self._target, overwrite=self._overwrite)
        try:
            method = early.complete(fd)
            early.out.publish(name, overwrite=self._overwrite)
        except OSError as error:
            raise _translated(error, self._target) from error
        return ExportResult(method)

    def _hard_link(self, fd: int, path: Path, directory: int, name: str) -> bool:
        temporary = _temporary_name(name)
        try:
            if not _hard_link(fd, path, directory, temporary):
                return False
            _publish(directory, temporary, name, self._target, overwrite=self._overwrite)
        except OSError as error:
            raise _translated(error, self._target) from error
        finally:
            # Also after success: renaming one hard link over another of the same file leaves both.
            with suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
        return True


class _EarlyCopy:
    """What was copied of content that is still arriving."""

    def __init__(self, fd: int, out: _Output, name: str, length: int, piece_length: int) -> None:
        """Takes over `fd` and `out` if it succeeds.

        Raises:
            OSError: There is no room for so large a file.
        """
        self.name = name
        self.length = length
        self.out = out
        self._fd = fd
        self._piece_length = piece_length
        self._copied = bytearray(-(-length // piece_length))
        self._clones = _clone(fd, out.fd)
        self.method = "reflink"
        if not self._clones:
            os.ftruncate(out.fd, length)

    def copy(self, first: int, stop: int) -> None:
        if self._clones:
            return  # in the end it costs nothing
        first, stop = max(0, first), min(stop, len(self._copied))
        self._copy_range(self._fd, first, stop)
        self._copied[first:stop] = b"\1" * (stop - first)

    def _copy_range(self, fd: int, first: int, stop: int) -> None:
        begin, end = first * self._piece_length, min(stop * self._piece_length, self.length)
        self.method = _copy_data(fd, self.out.fd, begin, end)

    def start_over(self) -> None:
        self._copied = bytearray(len(self._copied))
        if not self._clones:
            # Copying keeps holes: what was wrong must not show through them.
            os.ftruncate(self.out.fd, 0)
            os.ftruncate(self.out.fd, self.length)

    def complete(self, fd: int) -> str:
        """Copy what is missing out of `fd`; the way it was done."""
        if self._clones:
            if _clone(fd, self.out.fd):
                return "reflink"
            os.ftruncate(self.out.fd, self.length)
        first = self._copied.find(0)
        while first >= 0:
            stop = self._copied.find(1, first)
            stop = len(self._copied) if stop < 0 else stop
            self._copy_range(fd, first, stop)
            first = self._copied.find(0, stop)
        return self.method

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.out.close()


class _Output:
    """A new file below `directory`, without a name where the file system can do that, so that not even SIGKILL leaves it."""

    def __init__(self, directory: int, target: Path) -> None:
        """Takes over `directory`, even where it fails.

        Raises:
            TargetError, NoSpace: No file can be made there.
        """
        self.directory = directory
        self._target = target
        self._temporary = ""
        try:
            self.fd = self._open()
        except OSError as error:
            os.close(directory)
            raise _translated(error, target) from error

    def _open(self) -> int:
        if os.path.exists("/proc/self/fd"):  # without it the file could not get a name later
            try:
                return os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o666, dir_fd=self.directory)
            except OSError as error:
                if error.errno not in _CANNOT_UNNAMED:
                    raise
        return self._open_named()

    def _open_named(self) -> int:
        temporary = _temporary_name(self._target.name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o666, dir_fd=self.directory)
        self._temporary = temporary
        return fd

    def publish(self, name: str, *, overwrite: bool) -> None:
        """Sync the file and give it its name, and make that last."""
        os.fsync(self.fd)
        if not self._temporary and self._name_it(name, overwrite=overwrite):
            os.fsync(self.directory)
        else:
            _publish(self.directory, self._temporary, name, self._target, overwrite=overwrite)

    def _name_it(self, name: str, *, overwrite: bool) -> bool:
        """Whether the file now is `name`; else it has a temporary name at least."""
        # A file without a name cannot take the place of another one at once.
        wanted = _temporary_name(name) if overwrite else name
        try:
            os.link(f"/proc/self/fd/{self.fd}", wanted, dst_dir_fd=self.directory, follow_symlinks=True)
        except FileExistsError as error:
            if overwrite:
                raise
            raise TargetExists(_exists(self._target)) from error
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            unnamed, self.fd = self.fd, self._open_named()
            try:
                _copy(unnamed, self.fd, os.fstat(unnamed).st_size)
                os.fsync(self.fd)
            finally:
                os.close(unnamed)
            return False
        if overwrite:
            self._temporary = wanted
        return not overwrite

    def close(self) -> None:
        """Without `publish`: as if it had never been."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        if self._temporary:
            with suppress(OSError):
                os.unlink(self._temporary, dir_fd=self.directory)
        os.close(self.directory)


def _temporary_name(name: str) -> str:
    return f".{name[:180]}.{os.urandom(6).hex()}.part"


def _exists(target: Path) -> str:
    return f"{target} exists; give --overwrite to replace it, or another path with -o"


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
        raise TargetExists(_exists(target))


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


def _clone(fd: int, out: int) -> bool:
    """Let `out` share the blocks of `fd`, where the file system can."""
    try:
        fcntl.ioctl(out, FICLONE, fd)
        return True
    except OSError as error:
        if error.errno not in _CANNOT_COPY:
            raise
        return False


def _copy(fd: int, out: int, length: int) -> str:
    """The first way that works; holes stay holes."""
    if _clone(fd, out):
        return "reflink"
    os.ftruncate(out, length)
    return _copy_data(fd, out, 0, length)


def _copy_data(fd: int, out: int, begin: int, end: int) -> str:
    """Copy what there is between `begin` and `end`; the first way that works."""
    methods = ["copy_file_range", "sendfile", "copy"]
    for start, stop in _data_ranges(fd, begin, end):
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


def _data_ranges(fd: int, begin: int, end: int) -> list[tuple[int, int]]:
    """Where there is data between `begin` and `end`, as half-open ranges; all of it where the file system does not say."""
    ranges = []
    position = begin
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            if start >= end:
                break
            position = min(end, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                break
            return [(begin, end)]
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
        raise TargetExists(_exists(target)) from error
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
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
