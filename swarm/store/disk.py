"""The store on disk: one sparse file for each content, SQLite for the records.

``store.db`` says what is held; ``tasks/<aa>/<hex task id>.<random>`` has the bytes.  Everything is 0700 or 0600.
The event loop writes pieces (into the page cache) and reads piece tables; commits, syncs, deletions and hashing of
more than one piece happen in threads.
"""

from __future__ import annotations

import errno
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, TypeVarTuple, Unpack, cast

import structlog
import trio

from swarm.errors import StoreError
from swarm.store import directory, hashing
from swarm.store.body import Body, FileBody, storage_error
from swarm.store.content import Content
from swarm.store.records import SqliteRecords
from swarm.store.store import TaskStore
from swarm.task import MIB, Digest

if TYPE_CHECKING:
    import ctypes

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

SYNC_EVERY_BYTES: Final = 64 * MIB
"""Written back in the background after this much, so that little is left to sync when the content is complete."""

HASH_EVERY_BYTES: Final = 8 * MIB
"""The content hasher is woken for this much new prefix; waking a thread costs as much as hashing 100 KiB."""

SCRUB_BYTES_PER_S: Final = 8 * MIB
SCRUB_EVERY_SECONDS: Final = 7 * 86400.0
"""A content is read again this long after it was last found good."""

SCRUB_LOOK_SECONDS: Final = 600.0
HASHING_THREADS: Final = 2
"""At once, over all tasks; each keeps a core and a disk busy."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = structlog.get_logger(__name__)


def current_boot_id() -> str:
    """The kernel's; where there is none every start counts as a new boot, which costs hashing and nothing else."""
    try:
        return BOOT_ID.read_text("ascii").strip()
    except OSError:
        return os.urandom(16).hex()


class DiskStore(TaskStore):
    """A `Store` in a data directory.  `close` it (or use it in a `with` statement)."""

    def __init__(
        self,
        data_dir: Path,
        *,
        quota_bytes: int | None,
        high_watermark: float,
        low_watermark: float,
        min_free_bytes: int,
        boot_id: str | None = None,
        rng: random.Random | None = None,
        now: Callable[[], float] = time.time,
        scrub_bytes_per_s: int = SCRUB_BYTES_PER_S,
        scrub_every_s: float = SCRUB_EVERY_SECONDS,
    ) -> None:
        """Lock the directory and read the index; what must be hashed again is hashed when it is opened, not here.

        Args:
            quota_bytes: Most that all contents together may have, `None` for no limit but the disk.
            high_watermark: Part of the capacity above which the least recently used content is deleted ...
            low_watermark: ... down to this part.
            min_free_bytes: Of the file system, never used by us.
            boot_id: Of the machine; the kernel's unless given.
            scrub_bytes_per_s: Speed of the background check; 0 turns it off.
            scrub_every_s: How often each content is checked.

        Raises:
            ConfigError: The directory is not ours alone.
            StoreBusy, StoreTooNew, StoreError: As they say.
        """
        directory.prepare(data_dir)
        with ExitStack() as undo:
            self._lock = directory.DirectoryLock(data_dir)
            undo.callback(self._lock.release)
            self._rows = SqliteRecords(data_dir / "store.db", boot_id or current_boot_id())
            undo.callback(self._rows.close)
            contents = self._rows.load()
            _make_directory(data_dir / "tasks")
            undo.pop_all()
        super().__init__(
            records=self._rows,
            quota_bytes=quota_bytes,
            high_watermark=high_watermark,
            low_watermark=low_watermark,
            rng=rng,
            now=now,
        )
        for content in contents:
            self._insert(content)
        self.data_dir = data_dir
        self._tasks_dir = data_dir / "tasks"
        self._min_free = min_free_bytes
        self._scrub_rate = scrub_bytes_per_s
        self._scrub_every = scrub_every_s
        self._unallocated: dict[int, int] = {}
        self._limiter = trio.CapacityLimiter(HASHING_THREADS)
        self._hashing = hashing.Worker("swarm-store-hash")
        self._files = hashing.Worker("swarm-store-file")

    # --- bytes --------------------------------------------------------------------------------------------------

    def _free_bytes(self) -> int:
        try:
            found = os.statvfs(self.data_dir)
        except OSError as error:
            raise storage_error(error, f"cannot look at the disk of {self.data_dir}") from error
        self._unallocated = {key: left for key, left in self._unallocated.items() if left and key in self._contents}
        return found.f_bavail * found.f_frsize - self._min_free - sum(self._unallocated.values())

    async def _allocate(self, content: Content) -> None:
        length = content.geometry.length
        allocated = await self._blocking(_make_file, self._tasks_dir / content.file, length)
        if not allocated:
            self._unallocated[content.key] = length

    def _open_body(self, content: Content) -> Body | None:
        path = self._tasks_dir / content.file
        try:
            try:
                fd, writable = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), True
            except PermissionError:  # made read-only for a hard link; see `export.py`
                fd, writable = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), False
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error, f"cannot open {path}") from error
        if writable and os.fstat(fd).st_size != content.geometry.length and os.fstat(fd).st_nlink == 1:
            os.ftruncate(fd, content.geometry.length)  # a power loss forgot its size, or somebody cut it: hashing will tell
        return FileBody(fd, path, writable=writable)

    def _new_body(self, content: Content) -> Body:
        old = content.file
        content.file = self._file_for(bytes.fromhex(Path(old).name.split(".")[0]))
        try:
            _make_file(self._tasks_dir / content.file, content.geometry.length)
            body = cast(Body, self._open_body(content))
        except StoreError:
            content.file = old
            raise
        self._rows.content(content)
        self._discard(old)
        return body

    def _discard(self, file: str) -> None:
        self._files.put(lambda: _unlink(self._tasks_dir / file))

    async def _settle(self) -> None:
        await trio.to_thread.run_sync(self._files.wait, limiter=self._limiter)

    async def _blocking(self, function: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter)

    async def _flush(self) -> None:
        await trio.to_thread.run_sync(self._rows.writer.wait)

    def _written(self, content: Content, piece: int) -> None:
        size = content.geometry.size(piece)
        if content.key in self._unallocated:
            self._unallocated[content.key] = max(0, self._unallocated[content.key] - size)
        content.unsynced.append(piece)
        content.unsynced_bytes += size
        if content.unsynced_bytes >= SYNC_EVERY_BYTES:
            self._write_back(content)
        self._hash_prefix(content)

    def _write_back(self, content: Content) -> None:
        # A file description of its own: a write error is reported once to each, and completing must hear of it too.
        try:
            fd = content.opened.open_read_only()
        except StoreError:  # no descriptor left: later then, the piece is written
            return
        written, content.unsynced, content.unsynced_bytes = content.unsynced, [], 0
        epoch = content.epoch

        def sync() -> None:
            try:
                os.fdatasync(fd)
            except OSError as error:
                content.sync_failed = error.strerror or "input/output error"
                return
            finally:
                os.close(fd)
            with self._rows.writer.lock, suppress(StoreError):  # closed meanwhile: the next start hashes them if it must
                if content.epoch == epoch:  # else some of these are others now
                    self._rows.synced(content, written)

        self._files.put(sync)

    async def _sync(self, content: Content) -> None:
        body = content.opened
        try:
            await self._blocking(_sync_file, body.fd, self._tasks_dir, content.file)
            if content.sync_failed:
                raise OSError(errno.EIO, content.sync_failed)
        except OSError as error:
            raise storage_error(error, f"cannot sync {content.file} to disk") from error
        finally:
            content.sync_failed = ""
        content.unsynced, content.unsynced_bytes = [], 0

    # --- hashing ------------------------------------------------------------------------------------------------

    def _hash_prefix(self, content: Content) -> None:
        """Let the content hasher follow the verified prefix, in steps worth waking it for."""
        geometry, known = content.geometry, content.known
        stop = min(known.end * geometry.piece_length, geometry.length)
        if stop - content.hashed_until < HASH_EVERY_BYTES:
            return
        try:
            hasher = self._hasher(content, self._algorithm(content))
        except OSError:  # no descriptor left: `_hash_all` does it then
            return
        content.hashed_until = stop
        self._hashing.put(lambda: hasher.advance(stop))

    def _algorithm(self, content: Content) -> str:
        for name in content.names.values():
            if name.task.digest is not None:
                return name.task.digest.algorithm
        return "sha256"

    def _hasher(self, content: Content, algorithm: str) -> hashing.PrefixHasher:
        if content.hasher is None:
            content.hasher = hashing.PrefixHasher(content.opened.fd, algorithm)
        return content.hasher

    def _stop_hashing(self, content: Content) -> None:
        hasher, content.hasher = content.hasher, None
        content.hashed_until = 0
        if hasher is not None:
            hasher.stop()
            self._hashing.put(hasher.close)

    async def _hash_all(self, content: Content, algorithm: str) -> Digest:
        length = content.geometry.length
        own: hashing.PrefixHasher | None = None
        try:
            hasher = self._hasher(content, algorithm)
            if hasher.algorithm == algorithm:
                content.hashed_until = length
            else:
                hasher = own = hashing.PrefixHasher(content.opened.fd, algorithm)
            text = await self._blocking(hasher.hexdigest, length, trio.from_thread.check_cancelled)
        except OSError as error:
            raise storage_error(error, "cannot read from the store") from error
        finally:
            if own is not None:
                own.close()
        return Digest(algorithm, text)

    # --- scrub --------------------------------------------------------------------------------------------------

    async def _scrub(self) -> None:
        """Find bit rot before anybody asks for the piece, slowly; and what no row tells, files and rows without the other."""
        await self._sweep()
        await self._settle_suspects()
        while self._scrub_rate > 0:
            due = [c for c in self._contents.values() if c.complete and c.scrubbed + self._scrub_every <= self._now()]
            if due:
                await self._scrub_content(min(due, key=lambda c: c.scrubbed))
            else:
                await trio.sleep(SCRUB_LOOK_SECONDS * self._rng.uniform(0.5, 1.0))

    async def _sweep(self) -> None:
        """Delete files that no record names (a crash between the two), forget contents whose file is gone."""
        listed = await self._blocking(_list_files, self._tasks_dir)
        known = {content.file: content for content in self._contents.values()}
        orphans = listed - known.keys()
        if orphans:
            log.warning("store_orphans_deleted", files=len(orphans), example=min(orphans))
        for file in orphans:
            self._discard(file)
        for file in known.keys() - listed:
            content = known[file]
            unused = not content.references and content.gone is None and content.key in self._contents
            if unused and not (self._tasks_dir / file).exists():
                self._vanished(content)

    async def _settle_suspects(self) -> None:
        """After an unclean boot, hash what may not have reached the disk before somebody wants it."""
        for content in [c for c in self._contents.values() if not c.complete]:
            being_made = content.references > 0 and content.body is None
            if content.key not in self._contents or content.gone is not None or being_made or not self._attach(content):
                continue
            content.references += 1
            try:
                if (suspect := content.known.suspect).any():
                    await self._verify_pieces(content, suspect)
            finally:
                self._release_quietly(content)

    async def _scrub_content(self, content: Content) -> None:
        content.scrubbed = self._now()  # first: one that always fails must not keep the others from their turn
        path, geometry = self._tasks_dir / content.file, content.geometry
        known = content.pieces or self._rows.load_pieces(content)
        for piece in range(geometry.piece_count):
            await trio.sleep(geometry.size(piece) / self._scrub_rate)
            if content.key not in self._contents or not known.held[piece]:
                continue
            # Not through an open task: a content that is only being scrubbed is not in use and may be deleted.
            actual = await self._blocking(_digest_at, path, geometry.offset(piece), geometry.size(piece))
            self._scrubbed_bytes += geometry.size(piece)
            if actual != known.digest(piece):
                self._look_again(content, piece)
        if content.key in self._contents:
            self._rows.content(content)

    def _look_again(self, content: Content, piece: int) -> None:
        """A bad hash from a thread may be about a piece that was dropped or deleted meanwhile; this one is not."""
        if content.key not in self._contents or content.gone is not None or not self._attach(content):
            return
        content.references += 1
        try:
            known = content.known
            if known.held[piece]:
                known.checked[piece] = False
                self._intact(content, piece)
        finally:
            self._release_quietly(content)

    def _release_quietly(self, content: Content) -> None:
        """Checking is not using: LRU does not hear of it."""
        used, last_used = content.used, content.last_used
        self.release(content)
        content.used, content.last_used = used, last_used

    def _close_medium(self) -> None:
        self._hashing.close()
        self._files.close()
        self._rows.close()
        self._lock.release()


TMPFS_MAGIC: Final = 0x01021994


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise storage_error(error, f"cannot make {path}") from error


def _make_file(path: Path, length: int) -> bool:
    """A new file with room for `length` bytes; whether the room is really taken."""
    made = False
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        made = True
        try:
            os.ftruncate(fd, length)
            return _fallocate(fd, length)
        finally:
            os.close(fd)
    except OSError as error:
        if made:
            _unlink(path)
        raise storage_error(error, f"cannot reserve {length} bytes in the store") from error


def _fallocate(fd: int, length: int) -> bool:
    """Reserve the blocks; `False` where the file system cannot, or only by zeroing memory, which would all be
    done before the first byte is asked for.

    Not `os.posix_fallocate`: where the file system cannot, the C library writes to every block instead, which for
    a large file takes minutes.
    """
    import ctypes

    if length == 0:
        return True
    library = ctypes.CDLL(None, use_errno=True)
    call = getattr(library, "fallocate", None)
    if call is None or ctypes.sizeof(ctypes.c_long) < 8 or _is_memory(library, fd):
        return False
    while call(fd, 0, ctypes.c_long(0), ctypes.c_long(length)) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def _is_memory(library: ctypes.CDLL, fd: int) -> bool:
    """Whether the file is in a tmpfs: the type is the first field of what fstatfs(2) fills in."""
    import ctypes

    call = getattr(library, "fstatfs", None)
    filled = ctypes.create_string_buffer(512)
    return call is not None and call(fd, filled) == 0 and int.from_bytes(filled.raw[:4], sys.byteorder) == TMPFS_MAGIC


def _sync_file(fd: int, tasks_dir: Path, file: str) -> None:
    """The bytes, then the directory entries that lead to them."""
    os.fdatasync(fd)
    for path in ((tasks_dir / file).parent, tasks_dir):
        directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)


def _unlink(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()


def _list_files(tasks_dir: Path) -> set[str]:
    found: set[str] = set()
    for folder in os.scandir(tasks_dir):
        if folder.is_dir(follow_symlinks=False):
            found.update(f"{folder.name}/{entry.name}" for entry in os.scandir(folder.path))
    return found


def _digest_at(path: Path, offset: int, length: int) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return hashing.piece_digest(fd, offset, length)
    finally:
        os.close(fd)
