"""Key files: read only if nobody else can, made whole or not at all, never overwritten by accident."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swarm.errors import ConfigError


def read_private(path: Path, *, max_bytes: int, follow_links: bool = True) -> bytes:
    """The bytes of a file that holds a secret.

    Our own file may be open to nobody else; one that root owns may be readable by our group, since that is how a
    container platform hands a mounted secret to a service that is not root (PostgreSQL has the same rule for its key).

    Args:
        max_bytes: Protects from reading a device or a wrong file into memory.
        follow_links: `False` where nothing but ourselves should have put the file there; mounted secrets are links.

    Raises:
        FileNotFoundError: There is none; the caller decides what that means.
        ConfigError: Unreadable, not a regular file, too long, or open to others.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        _check_private(path, os.fstat(descriptor))
        data = _read(descriptor, max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    if len(data) > max_bytes:
        raise ConfigError(f"{path} is longer than {max_bytes} bytes; it is not what it should be")
    return data


def _check_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is not a regular file")
    if status.st_mode & (0o037 if status.st_uid == 0 else 0o077):
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"{path} holds a secret and is open to others (mode {mode:04o}); run: chmod 600 {path}")


def _read(descriptor: int, length: int) -> bytes:
    data = bytearray()
    while chunk := os.read(descriptor, length - len(data)):
        data += chunk
    return bytes(data)


def read_public(path: Path, *, max_bytes: int) -> bytes:
    """The bytes of a file without secrets.

    Raises:
        FileNotFoundError: There is none.
        ConfigError: Unreadable or too long.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise ConfigError(f"{path} is longer than {max_bytes} bytes; it is not what it should be")
    return data


@contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Hold the lock of a directory, waiting for it; gives its descriptor.  For one writer at a time, readers need none.

    Raises:
        ConfigError: There is no such directory, or its file system has no locks.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot open the directory {directory}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(f"cannot lock the directory {directory}: {error.strerror}") from error
        yield descriptor
    finally:
        os.close(descriptor)


def create(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a new file that is either complete, on disk and there, or not there at all.

    A kill between creating and writing must not leave an empty key behind that stops every later start, hence the
    temporary name; two processes that start at once must not both believe they made the key, hence the lock.

    Raises:
        FileExistsError: It was there already and is left alone.
        ConfigError: It cannot be written.
    """
    try:
        with locked(path.parent) as directory:
            if os.path.lexists(path):
                raise FileExistsError(path)
            _write_and_rename(path, data, mode)
            os.fsync(directory)
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def replace(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put `data` in the place of whatever is there; a reader sees the old file or the new one, never a part.

    Raises:
        ConfigError: It cannot be written; the old file is still there.
    """
    try:
        _write_and_rename(path, data, mode)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _write_and_rename(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
