"""The contract of the store, for every medium: names, aliases, handles, room, and pieces that rot.

A *content* is bytes in pieces; a *name* is a task under which it was asked for.  Content that became complete is
also found under the `blob` task of its digest, and two contents with one digest become one.  `disk.py` and
`memory.py` say where bytes and records go; everything here is synchronous between two awaits and consistent there.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeVar, TypeVarTuple, Unpack, cast

import structlog
import trio

from swarm import pieces, wire
from swarm.edges import Entry, FileSlice, StoredTask
from swarm.errors import DigestMismatch, LocalProtocolError, NoSpace, NotPermitted, StoreError
from swarm.pieces import PieceSet
from swarm.store import eviction
from swarm.store.body import Body
from swarm.store.content import BLAKE3_BYTES, Content, Name, Pieces
from swarm.store.handle import OpenTask
from swarm.store.records import Records
from swarm.task import MIB, Digest, Geometry, Task, blob_task

MAX_WARM: Final = 64
"""Closed contents whose piece tables stay in memory: peers come and go, and each table costs a read."""

EVICT_SECONDS: Final = 5.0
"""How long un-announcing may hold up making room: a network that does not answer must not stop downloads."""

WATERMARK_SECONDS: Final = 60.0
"""Others fill the disk too, without telling us."""

SAVE_USE_SECONDS: Final = 60.0
"""How stale the recorded last use may be; LRU needs no more, and serving should not write."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Numbers since the start; sizes in bytes."""

    contents: int
    used_bytes: int
    capacity_bytes: int | None
    evicted: int
    evicted_bytes: int
    rotten_pieces: int
    scrubbed_bytes: int


class TaskStore(ABC):
    """The logic; a medium fills in the abstract methods."""

    def __init__(
        self,
        *,
        records: Records,
        quota_bytes: int | None,
        high_watermark: float,
        low_watermark: float,
        rng: random.Random | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._records = records
        self._quota = quota_bytes
        self._high = high_watermark
        self._low = low_watermark
        self._rng = rng or random.Random()
        self._now = now
        self._contents: dict[int, Content] = {}
        self._names: dict[bytes, Content] = {}
        self._blobs: dict[bytes, Content] = {}
        self._warm: OrderedDict[int, Content] = OrderedDict()
        self._used_bytes = 0
        self._use = itertools.count(1)
        self._next_key = 1
        self._creating = trio.Lock()
        self._evict_callbacks: list[Callable[[bytes], object]] = []
        self._incomplete_callbacks: list[Callable[[list[bytes]], None]] = []
        self._room_wanted = trio.Event()
        self._closed = False
        self._evicted = self._evicted_bytes = self._rotten = self._scrubbed_bytes = 0

    # --- the contract -------------------------------------------------------------------------------------------

    def open(self, task_id: bytes) -> StoredTask | None:
        content = self._find(task_id)
        if content is None or content.gone is not None or not self._attach(content):
            return None
        return self._handle(content, self._name_for(content, task_id))

    async def create(
        self, task: Task, geometry: Geometry, *, private: bool = False, tag: str = "", application: str = ""
    ) -> StoredTask:
        """As the contract says; content recorded under another geometry is replaced.

        Pieces that an earlier boot left unsynced are hashed before this returns, and held if they are right.
        """
        if geometry.piece_count > wire.MAX_PIECES:
            raise StoreError(f"content of {geometry.length} bytes has too many pieces")
        while True:
            async with self._creating:
                content = self._find(task.id)
                if content is None or (content.gone is None and (content.geometry != geometry or not self._attach(content))):
                    content = await self._make(task, geometry)
                if content.gone is None:
                    handle = self._adopt(content, task, private=private, tag=tag, application=application)
                    break
            await content.gone.wait()
        try:
            if handle._pieces.suspect.any():
                await self._verify_pieces(content, handle._pieces.suspect)
        except BaseException:
            handle.close()
            raise
        return handle

    def entries(self) -> list[Entry]:
        return [self._entry(content, name) for content in self._contents.values() for name in content.names.values()]

    def pin(self, task_id: bytes, pinned: bool) -> bool:
        content = self._find(task_id)
        if content is None:
            return False
        name = content.names.get(task_id)
        if name is None:
            name = self._name_for(content, task_id)
            self._add_name(content, name)
        name.pinned = pinned
        self._records.name(content, name)
        return True

    async def remove(self, task_id: bytes) -> bool:
        """Delete the content, unless it has other names: then only this name goes."""
        content = self._find(task_id)
        if content is None or content.gone is not None:
            return False
        if content.references:
            raise NotPermitted(f"task {task_id.hex()[:12]} is in use; stop what uses it and repeat")
        others = [other for other in content.names if other != task_id]
        if task_id in content.names and others:
            await self._tell_evicted([task_id])
            if self._names.get(task_id) is content:
                self._drop_name(content, task_id)
            return True
        return await self._delete(content)

    def public_names(self, task_id: bytes) -> list[bytes]:
        content = self._find(task_id)
        if content is None or content.gone is not None or not content.complete or content.digest is None:
            return []
        blob = [] if content.private else [blob_task(content.digest).id]
        return list(dict.fromkeys([*blob, *(name.task.id for name in content.names.values() if not name.private)]))

    def has_room(self, wanted: int) -> bool:
        missing = self._room().missing(wanted)
        return not missing or sum(it.size for it in self._candidates() if not it.protected) >= missing

    def on_evict(self, callback: Callable[[bytes], object]) -> None:
        self._evict_callbacks.append(callback)

    def on_incomplete(self, callback: Callable[[list[bytes]], None]) -> None:
        self._incomplete_callbacks.append(callback)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_below_watermark)
                nursery.start_soon(self._scrub)
                task_status.started()
        finally:
            with trio.CancelScope(shield=True):
                await self._flush()

    def statistics(self) -> Statistics:
        return Statistics(
            contents=len(self._contents),
            used_bytes=self._used_bytes,
            capacity_bytes=self._room().capacity,
            evicted=self._evicted,
            evicted_bytes=self._evicted_bytes,
            rotten_pieces=self._rotten,
            scrubbed_bytes=self._scrubbed_bytes,
        )

    def close(self) -> None:
        """Flush, and give up files and locks; open tasks are of no use afterwards.  May be called again."""
        if self._closed:
            return
        self._closed = True
        for content in self._contents.values():
            self._detach(content)
        self._close_medium()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what a medium provides ---------------------------------------------------------------------------------

    @abstractmethod
    def _free_bytes(self) -> int | None:
        """What the medium has left for us, or `None` if there is no end to it."""

    @abstractmethod
    async def _allocate(self, content: Content) -> None:
        """Make the bytes of a new content.

        Raises:
            NoSpace, StoreError: Nothing is left behind.
        """

    @abstractmethod
    def _open_body(self, content: Content) -> Body | None:
        """`None` if the bytes are gone."""

    @abstractmethod
    def _new_body(self, content: Content) -> Body:
        """An empty body in place of one that others have a link to.

        Raises:
            NoSpace, StoreError: The old one is still there.
        """

    @abstractmethod
    def _discard(self, file: str) -> None:
        """Delete the bytes soon."""

    @abstractmethod
    async def _blocking(self, function: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
        """Call what may take long."""

    @abstractmethod
    async def _settle(self) -> None:
        """Wait until everything discarded is gone."""

    @abstractmethod
    async def _flush(self) -> None:
        """Wait until everything recorded is committed."""

    @abstractmethod
    async def _sync(self, content: Content) -> None:
        """Sync its bytes.

        Raises:
            NoSpace, StoreError: They did not all reach the disk.
        """

    @abstractmethod
    def _close_medium(self) -> None: ...

    @abstractmethod
    async def _scrub(self) -> None: ...

    def _written(self, content: Content, piece: int) -> None:  # noqa: B027  (only a disk has to do something)
        """A piece was written and recorded."""

    # --- names ------------------------------------------------------------------------------------------------

    def _find(self, task_id: bytes) -> Content | None:
        """Complete content under this name or as this blob; else what there is."""
        named = self._names.get(task_id)
        blob = self._blobs.get(task_id)
        if named is None or (blob is not None and blob.complete and not named.complete and not named.references):
            return blob if blob is not None else named
        return named

    def _name_for(self, content: Content, task_id: bytes) -> Name:
        """The name, or one for the time being if this is the blob of content fetched under other names."""
        name = content.names.get(task_id)
        if name is None:
            # What is private under every name of its own is not shared under its digest either.
            task = Task(task_id, digest=content.digest, shared=not content.private)
            name = Name(task, content.private, "", "", False, content.created)
        return name

    def _add_name(self, content: Content, name: Name) -> None:
        old = self._names.get(name.task.id)
        self._names[name.task.id] = content
        content.names[name.task.id] = name
        if old is not None and old is not content:
            old.names.pop(name.task.id, None)
            self._drop_if_unnamed(old)
        self._records.name(content, name)

    def _drop_name(self, content: Content, task_id: bytes) -> None:
        content.names.pop(task_id, None)
        if self._names.get(task_id) is content:
            del self._names[task_id]
            self._records.no_name(task_id)
        self._drop_if_unnamed(content)

    def _drop_if_unnamed(self, content: Content) -> None:
        """Content replaced under its last name goes; while it is in use, when it is released."""
        if not content.names and not content.references and content.key in self._contents:
            self._forget(content)
            self._discard(content.file)

    def _adopt(self, content: Content, task: Task, *, private: bool, tag: str, application: str) -> OpenTask:
        """Open under the name of `task`, which is made or brought up to date."""
        known = self._names.get(task.id)
        name = known.names.get(task.id) if known is not None else None
        if name is None:
            name = Name(task, self._starts_private(content, task, private), tag, application, False, self._now())
        else:
            # Pieces may come with credentials from now on, so they must not leave as if they had not.
            name.private = name.private or (private and not content.complete)
            name.tag, name.application = tag or name.tag, application or name.application
            if task.digest is not None or task.shared != name.task.shared:
                name.task = replace(name.task, digest=task.digest or name.task.digest, shared=task.shared)
        self._add_name(content, name)
        return self._handle(content, name)

    def _starts_private(self, content: Content, task: Task, private: bool) -> bool:
        """Whether content that is there already is private under a new name.

        What came with credentials does not become public because somebody asks for it without: nobody would have
        checked that they may have it.  What was got in public once is public by its digest, whoever asks next.
        """
        public_blob = content.digest is not None and not content.private and not task.url
        return content.private or (private and not public_blob)

    def _entry(self, content: Content, name: Name) -> Entry:
        if content.held_count < 0:
            content.held_count = self._records.count_held(content)
        return Entry(
            task=name.task,
            geometry=content.geometry,
            held=content.held_count,
            complete=content.complete,
            digest=content.digest or name.task.digest,
            pinned=name.pinned,
            in_use=content.references > 0,
            bytes_on_disk=self._bytes_on_disk(content),
            created=name.created,
            last_used=content.last_used,
            private=name.private,
            tag=name.tag,
            application=name.application,
        )

    def _bytes_on_disk(self, content: Content) -> int:
        return content.geometry.length

    # --- contents in memory -----------------------------------------------------------------------------------

    def _insert(self, content: Content) -> None:
        for task_id in content.names:
            self._names[task_id] = content
        content.used = next(self._use)
        self._contents[content.key] = content
        self._used_bytes += content.geometry.length
        self._next_key = max(self._next_key, content.key + 1)
        if content.digest is not None:
            self._blobs.setdefault(blob_task(content.digest).id, content)

    def _forget(self, content: Content) -> None:
        """Out of every index and record; its bytes are another matter."""
        for task_id in list(content.names):
            if self._names.get(task_id) is content:
                del self._names[task_id]
                self._records.no_name(task_id)
        self._unindex(content)
        if self._contents.pop(content.key, None) is not None:
            self._used_bytes -= content.geometry.length
            self._records.deletion(content)
        self._warm.pop(content.key, None)
        if not content.references:
            self._detach(content)
            content.pieces = None

    def _unindex(self, content: Content) -> None:
        """No longer found as a blob; another content with this digest (in other pieces) takes its place."""
        if content.digest is None:
            return
        blob = blob_task(content.digest).id
        if self._blobs.get(blob) is content:
            del self._blobs[blob]
            for other in self._contents.values():
                if other is not content and other.digest == content.digest:
                    self._blobs[blob] = other

    def _attach(self, content: Content) -> bool:
        """Open the bytes and load the piece table; `False` if the bytes are gone, and the content with them."""
        self._warm.pop(content.key, None)
        if content.body is None:
            content.body = self._open_body(content)
            if content.body is None:
                log.warning("store_file_missing", content=content.file)
                self._vanished(content)
                return False
            if content.pieces is not None and content.body.seen != content.seen:
                content.pieces.checked.setall(0)  # changed while it was closed
        if content.pieces is None:
            content.pieces = self._records.load_pieces(content)
            content.held_count = content.pieces.held.count()
            if content.complete and not content.pieces.held.all():
                content.complete = False  # the record of a loss outlived that of the consequence
                self._records.content(content)
                self._tell_incomplete(self._ids(content))
        return True

    def _vanished(self, content: Content) -> None:
        """Its file was deleted behind our back."""
        ids = self._ids(content)
        self._forget(content)
        if content.complete:
            self._tell_incomplete(ids)

    def _detach(self, content: Content) -> None:
        if content.hasher is not None:
            self._stop_hashing(content)
        for body in content.replaced:
            body.close()
        content.replaced.clear()
        if content.body is not None:
            content.seen = content.body.seen
            content.body.close()
            content.body = None

    def _handle(self, content: Content, name: Name) -> OpenTask:
        handle = OpenTask(self, content, name)
        content.handles.append(handle)
        content.references += 1
        self._touch(content)
        return handle

    def _touch(self, content: Content) -> None:
        content.used = next(self._use)
        content.last_used = self._now()
        if abs(content.last_used - content.saved_use) >= SAVE_USE_SECONDS:
            content.saved_use = content.last_used
            self._records.content(content)

    def release(self, content: Content) -> None:
        content.references -= 1
        if content.references or self._closed:
            return
        self._touch(content)
        self._detach(content)
        if content.key not in self._contents:
            return
        self._drop_if_unnamed(content)
        self._drop_if_empty(content)
        if content.key in self._contents:
            self._warm[content.key] = content
            if len(self._warm) > MAX_WARM:
                _, coldest = self._warm.popitem(last=False)
                self._cool(coldest)

    def _drop_if_empty(self, content: Content) -> None:
        """A download that ended without a single good piece leaves nothing: room was reserved for all of it."""
        known = content.pieces
        if known is None or known.held.any() or known.suspect.any():
            return
        if content.key in self._contents and not content.complete and not content.pinned and content.gone is None:
            self._forget(content)
            self._discard(content.file)

    def _cool(self, content: Content) -> None:
        content.pieces = None

    # --- room -------------------------------------------------------------------------------------------------

    def _room(self) -> eviction.Room:
        return eviction.Room(self._used_bytes, self._quota, self._free_bytes())

    def _candidates(self) -> Iterable[eviction.Candidate]:
        for content in self._contents.values():
            protected = content.references > 0 or content.gone is not None or content.pinned
            yield eviction.Candidate(content.key, content.geometry.length, content.used, protected)

    async def _make(self, task: Task, geometry: Geometry) -> Content:
        """A new content with room for all of it, not yet under any name."""
        await self._make_room(geometry.length)
        now = self._now()
        content = Content(
            self._next_key, self._file_for(task.id), geometry, created=now, last_used=now, saved_use=now, scrubbed=now
        )
        # Counted from here on: who looks at the room while we wait sees it taken.
        self._insert(content)
        content.references += 1
        try:
            await self._allocate(content)
            self._records.content(content)
        except BaseException:
            self._forget(content)
            raise
        finally:
            content.references -= 1
        content.pieces = Pieces.none(geometry.piece_count)
        if not self._attach(content):
            raise StoreError("a file of the store vanished as it was made")
        if self._room().excess(self._high, self._low):
            self._room_wanted.set()
        return content

    def _file_for(self, task_id: bytes) -> str:
        """Below its first byte, so that no directory grows long; never a name that was used before.

        Only our own hexadecimal digits: nothing that came over the network ever names a file.
        """
        return f"{task_id[:1].hex()}/{task_id.hex()}.{os.urandom(4).hex()}"

    async def _make_room(self, wanted: int) -> None:
        # Each round deletes something or ends; others may take room while we wait.
        while missing := self._room().missing(wanted):
            victims = eviction.choose(self._candidates(), missing, all_or_nothing=True)
            if not victims:
                raise self._no_room(wanted, missing)
            for key in victims:
                await self._evict(key)
            await self._settle()

    def _no_room(self, wanted: int, missing: int) -> NoSpace:
        room = self._room()
        protected = sum(c.size for c in self._candidates() if c.protected)
        limit = "no limit" if room.capacity is None else f"{_size(room.capacity)} allowed"
        return NoSpace(
            f"no room for {_size(wanted)}: {_size(missing)} too little ({_size(room.used)} used, {limit}, "
            f"{_size(protected)} of it in use or pinned); free disk space, unpin or remove tasks, or raise the quota"
        )

    async def _evict(self, key: int) -> None:
        content = self._contents.get(key)
        if content is not None and await self._delete(content):
            self._evicted += 1
            self._evicted_bytes += content.geometry.length

    async def _delete(self, content: Content) -> bool:
        """Un-announce, then delete; `False` if it came into use or is being deleted already."""
        if content.references or content.gone is not None or content.key not in self._contents:
            return False
        content.gone = trio.Event()
        try:
            await self._tell_evicted(self._ids(content))
            self._forget(content)
            self._discard(content.file)
            return True
        finally:
            gone, content.gone = content.gone, None
            gone.set()

    def _ids(self, content: Content) -> list[bytes]:
        """Every id under which this content is found."""
        blob = [] if content.digest is None else [blob_task(content.digest).id]
        return list(dict.fromkeys([*content.names, *blob]))

    def _tell_incomplete(self, task_ids: list[bytes]) -> None:
        for callback in tuple(self._incomplete_callbacks):
            callback(task_ids)

    async def _tell_evicted(self, task_ids: list[bytes]) -> None:
        with trio.move_on_after(EVICT_SECONDS):
            for task_id in task_ids:
                for callback in tuple(self._evict_callbacks):
                    await cast(Awaitable[None], callback(task_id))

    async def _keep_below_watermark(self) -> None:
        while True:
            if excess := self._room().excess(self._high, self._low):
                for key in eviction.choose(self._candidates(), excess, all_or_nothing=False):
                    await self._evict(key)
                await self._settle()
            self._room_wanted = trio.Event()
            with trio.move_on_after(WATERMARK_SECONDS):
                await self._room_wanted.wait()

    # --- what handles do -----------------------------------------------------------------------------------------

    def write(self, handle: OpenTask, piece: int, data: memoryview, blake3: bytes, proof: wire.Signed | None) -> None:
        content = handle.content
        known, body = content.known, content.opened
        if self._closed:
            raise StoreError("the store is closed")
        if not 0 <= piece < content.geometry.piece_count or len(blake3) != BLAKE3_BYTES:
            raise LocalProtocolError(f"no piece {piece} in task {handle.task.short}")
        if known.held[piece]:
            return
        self._notice_changes(content)
        if not body.writable:
            # Somebody has a hard link to the file: their bytes are not ours to change.
            self.lose(content, list(pieces.indices(known.held)))
            content.replaced.append(body)
            content.body = body = self._new_body(content)
        self._check_size(content, piece, data)
        body.write(content.geometry.offset(piece), data)
        known.put(piece, blake3, checked=True)
        remembered = None if proof is None else (handle.task.id, proof)
        try:
            self._records.piece(content, piece, remembered)
        except StoreError:
            known.drop([piece])
            raise
        if proof is not None:
            known.remember_proof(piece, handle.task.id, proof)
        content.held_count += 1
        self._written(content, piece)

    def load_proof(self, content: Content, piece: int) -> tuple[bytes, wire.Signed] | None:
        return self._records.load_proof(content, piece)

    def _check_size(self, content: Content, piece: int, data: memoryview) -> None:
        if len(data) != content.geometry.size(piece):
            raise LocalProtocolError(f"piece {piece} has {content.geometry.size(piece)} bytes, not {len(data)}")

    def _notice_changes(self, content: Content) -> None:
        """If somebody else touched the file, nothing that was checked counts any more."""
        if content.opened.changed():
            content.known.checked.setall(0)
            content.epoch += 1
            self._restart_hashing(content)

    def _intact(self, content: Content, piece: int) -> bool:
        """Whether a held piece can be given out; hashes it unless that was done and the file is as it was then."""
        self._notice_changes(content)
        known = content.known
        if not known.checked[piece]:
            geometry = content.geometry
            actual = content.opened.digest(geometry.offset(piece), geometry.size(piece))
            if actual != known.digest(piece):
                self._found_rotten(content, [piece])
                return False
            known.checked[piece] = True
        return True

    def _found_rotten(self, content: Content, rotten: list[int]) -> None:
        self._rotten += len(rotten)
        log.warning("store_pieces_rotten", content=content.file, pieces=rotten[:10], count=len(rotten))
        self.lose(content, rotten)

    def slice(self, content: Content, piece: int, offset: int, length: int) -> FileSlice | None:
        known = content.known
        if not (0 <= piece < len(known.held) and known.held[piece]):
            return None
        if offset < 0 or length < 0 or offset + length > content.geometry.size(piece) or not self._intact(content, piece):
            return None
        content.references += 1
        return FileSlice(
            content.opened.fd, content.geometry.offset(piece) + offset, length, _Once(partial(self.release, content))
        )

    def read(self, content: Content, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > content.geometry.length:
            raise LocalProtocolError(f"no bytes [{offset}, {offset + length}) in content of {content.geometry.length}")
        known = content.known
        for piece in content.geometry.pieces_covering(offset, offset + length):
            if not known.held[piece] or not self._intact(content, piece):
                raise StoreError(f"piece {piece} is not held")
        return content.opened.read(offset, length)

    def lose(self, content: Content, lost: Iterable[int], *, dropped_by: OpenTask | None = None) -> None:
        """Take pieces out of what is held, and tell everybody but `dropped_by`."""
        known = content.known
        gone = sorted({p for p in lost if 0 <= p < len(known.held) and known.held[p]})
        if not gone:
            return
        known.drop(gone)
        content.held_count -= len(gone)
        content.epoch += 1
        content.unsynced = [p for p in content.unsynced if known.held[p]]
        self._records.loss(content, gone)
        was_complete, content.complete = content.complete, False
        if was_complete:
            self._records.content(content)
        if content.geometry.offset(gone[0]) < content.hashed_until:
            self._restart_hashing(content)
        for handle in tuple(content.handles):
            if handle is not dropped_by:
                handle.tell_lost(gone)
        if was_complete:
            # Last: by now whoever can repair it is at it.
            self._tell_incomplete(self._ids(content))

    async def verify(self, content: Content) -> list[int]:
        self._notice_changes(content)
        known = content.known
        return await self._verify_pieces(content, (known.held & ~known.checked) | known.suspect)

    async def _verify_pieces(self, content: Content, doubted: PieceSet) -> list[int]:
        """Hash pieces in a thread, drop the rotten ones and return them; suspects that are right become held."""
        known, geometry, body = content.known, content.geometry, content.opened
        numbers = list(pieces.indices(doubted))
        if not numbers:
            return []
        ranges = [(geometry.offset(p), geometry.size(p)) for p in numbers]
        content.references += 1
        try:
            epoch = content.epoch
            found = await self._blocking(_digests, body, ranges)
            self._notice_changes(content)
            if content.epoch != epoch:
                # Somebody wrote or dropped meanwhile; what was read is not worth arguing about.
                return [p for p in numbers if known.held[p] and not self._intact(content, p)]
            rotten = [p for p, digest in zip(numbers, found, strict=True) if digest != known.digest(p)]
            bad = set(rotten)
            regained = [p for p in numbers if known.suspect[p] and p not in bad]
            for piece in numbers:
                if piece not in bad and (known.held[piece] or known.suspect[piece]):
                    known.put(piece, known.digest(piece), checked=True)
            if regained:
                content.held_count += len(regained)
                # Read after the boot, so from the disk: they are synced.
                self._records.synced(content, regained)
            if rotten:
                self._drop_suspects(content, [p for p in rotten if known.suspect[p]])
                self._found_rotten(content, rotten)
            return rotten
        finally:
            self.release(content)

    def _drop_suspects(self, content: Content, wrong: list[int]) -> None:
        """They never counted as held, so nobody is told."""
        if wrong:
            content.known.drop(wrong)
            self._records.loss(content, wrong)

    # --- completion ---------------------------------------------------------------------------------------------

    async def content_digest(self, content: Content, algorithm: str) -> Digest:
        if not content.known.held.all():
            raise LocalProtocolError(f"{content.file} is not all there yet")
        if rotten := await self.verify(content):
            raise StoreError(f"{len(rotten)} pieces have changed on disk since they were verified; they are fetched again")
        content.references += 1
        try:
            epoch = content.epoch
            digest = await self._hash_all(content, algorithm)
            if content.epoch != epoch:
                raise StoreError("pieces were lost while the content was hashed; they are fetched again")
            return digest
        finally:
            self.release(content)

    @abstractmethod
    async def _hash_all(self, content: Content, algorithm: str) -> Digest: ...

    def _restart_hashing(self, content: Content) -> None:
        """What was hashed of the prefix is not what is there now."""
        if content.hasher is not None:
            self._stop_hashing(content)
        content.hashed_until = 0

    def _stop_hashing(self, content: Content) -> None:
        content.hasher = None

    async def complete(self, handle: OpenTask, digest: Digest) -> None:
        content = handle.content
        if not content.known.held.all():
            raise LocalProtocolError(f"task {handle.task.short} is not all there yet")
        if handle.task.digest is not None and handle.task.digest.algorithm == digest.algorithm and handle.task.digest != digest:
            raise DigestMismatch(f"content of task {handle.task.short} has digest {digest}, not {handle.task.digest}")
        if content.complete and content.digest == digest:
            await self._flush()
            return
        content.references += 1
        try:
            if not await self._merged(content, digest):
                await self._become_complete(content, digest)
        finally:
            self.release(content)

    async def _merged(self, content: Content, digest: Digest) -> bool:
        """If the same bytes are complete under another name, use those: one content is stored once."""
        twin = self._blobs.get(blob_task(digest).id)
        if twin is None or twin is content or not twin.complete or twin.geometry != content.geometry or twin.gone is not None:
            return False
        if not self._attach(twin):
            return False
        if twin.private and not self._all_private(content):
            twin.private = False
            if (blob := twin.names.get(blob_task(digest).id)) is not None:
                blob.private = False
                self._records.name(twin, blob)
        for handle in tuple(content.handles):
            content.handles.remove(handle)
            content.references -= 1
            handle._move(twin)
            twin.handles.append(handle)
            twin.references += 1
        for name in tuple(content.names.values()):
            self._add_name(twin, name)
        self._records.content(twin)
        await self._flush()
        return True

    async def _become_complete(self, content: Content, digest: Digest) -> None:
        epoch = content.epoch
        try:
            await self._sync(content)
        except StoreError:
            # After a failed sync the kernel forgets which pages were not written: none of them can be relied on.
            self.lose(content, list(pieces.indices(content.known.held)))
            raise
        if content.epoch != epoch:
            raise StoreError("pieces were lost while the content was synced; they are fetched again")
        if content.digest is not None and content.digest != digest:
            self._unindex(content)
        content.digest, content.complete, content.scrubbed = digest, True, self._now()
        content.private = self._all_private(content)
        self._records.content(content, durable=True)
        blob = blob_task(digest).id
        other = self._blobs.get(blob)
        if other is None or not other.complete:
            self._blobs[blob] = content
        stale = self._names.get(blob)
        if stale is not None and stale is not content and not stale.complete and not stale.references:
            # Somebody began to fetch the same blob under its digest and gave up.
            self._add_name(content, stale.names[blob])
        await self._flush()

    def _all_private(self, content: Content) -> bool:
        return all(name.private for name in content.names.values())


class _Once:
    """Calls once, however often it is called: a slice may be released by its end and by its connection's."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


def _digests(body: Body, ranges: list[tuple[int, int]]) -> list[bytes | None]:
    """In a thread; ends early if whoever waits for it is cancelled."""
    found = []
    for offset, length in ranges:
        with suppress(RuntimeError):  # not in a thread of trio's
            trio.from_thread.check_cancelled()
        found.append(body.digest(offset, length))
    return found


def _size(count: int) -> str:
    return f"{count / MIB:.1f} MiB" if count < 1024 * MIB else f"{count / (1024 * MIB):.2f} GiB"
