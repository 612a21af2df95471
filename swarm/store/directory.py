"""The data directory: ours alone, and used by one daemon at a time."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from swarm.errors import ConfigError, StoreBusy, StoreError


def prepare(path: Path) -> None:
    """Make the data directory with mode 0700, or check that the one that exists is safe to use.

    Whoever may write in it could swap content after it was checked, or plant links that lead our writes elsewhere
    (SECURITY: T26), so such a directory is refused rather than repaired: what is in it cannot be trusted any more.

    Raises:
        ConfigError: It cannot be made, is no directory, belongs to somebody else, or others may write in it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.stat(path)
    except FileExistsError as error:
        raise ConfigError(f"the data directory {path} is not a directory; give another with --data-dir") from error
    except OSError as error:
        raise ConfigError(f"cannot use the data directory {path}: {error.strerror}; give another with --data-dir") from error
    _check_owner(path, found)
    if found.st_mode & 0o022:
        raise ConfigError(
            f"others may write in the data directory {path} (mode {stat.S_IMODE(found.st_mode):04o}); "
            f"empty it and run: chmod 700 {path}, or give another with --data-dir"
        )
    for name in ("lock", "store.db", "store.db-wal", "store.db-shm", "tasks"):
        _check_entry(path / name, directory=name == "tasks")


def _check_entry(path: Path, *, directory: bool) -> None:
    """A directory that was open to others once may still hold what they left in it."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot look at {path}: {error.strerror}; give another with --data-dir") from error
    _check_owner(path, found)
    if not (stat.S_ISDIR(found.st_mode) if directory else stat.S_ISREG(found.st_mode)):
        raise ConfigError(f"{path} is not a plain {'directory' if directory else 'file'}; move it away")


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} belongs to user {found.st_uid}, not to us (user {os.geteuid()}); "
            "run as its owner or give another directory with --data-dir"
        )


class DirectoryLock:
    """Exclusive use of a data directory, given up by `release` or by the end of the process, however it ends."""

    def __init__(self, directory: Path) -> None:
        """Take the lock.

        Raises:
            StoreBusy: Another process has it; the message names its pid.
            StoreError: The lock file cannot be written.
        """
        path = directory / "lock"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"cannot open {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._fd, 20).decode("ascii", "replace").strip()
            os.close(self._fd)
            if not isinstance(error, BlockingIOError):
                raise StoreError(f"cannot lock {path}: {error.strerror}") from error
            raise StoreBusy(
                f"another swarm process (pid {owner or 'unknown'}) uses {directory}; "
                f"stop it, or give another directory with --data-dir"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode("ascii"), 0)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
