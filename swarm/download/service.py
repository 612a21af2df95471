"""The download service: drives one `Exchange` per task over links, origin and store.

It implements what the peer layer calls (`edges.PeerEvents`, `edges.UploadSource`) and what the control socket and the
mirror call (`fetch`).  The way of a fetch: identify the task, look in the store, announce and find members, exchange
pieces and read the origin where the rendezvous says so, check the content digest, complete.

Synchronous code decides and changes state, and leaves nothing half done between two awaits; actions of the exchanges are
carried out by one task per exchange, so that a burst of messages costs one decision.

This module is the spine; beside it `meeting` finds members, `requests` asks them, `serving` answers them, `origin_reads`
reads the origin, `unknown_length` finds out how long the content is, and `blame` finds out who lied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from random import Random
from typing import assert_never

import structlog
import trio

from swarm import pieces, proofs, wire
from swarm.download import exchange as ex
from swarm.download.active import Active, Parts, Totals, Traffic
from swarm.download.bans import Bans
from swarm.download.blame import Blame
from swarm.download.claims import WHOLE
from swarm.download.cutting import PieceCutter
from swarm.download.exchange import Exchange, Reading, Why
from swarm.download.meeting import Meeting
from swarm.download.members import Members
from swarm.download.origin_reads import OriginReads
from swarm.download.policy import Policy
from swarm.download.reading import Reader
from swarm.download.request import Fetched, FetchRequest, Progress, TaskActivity
from swarm.download.requests import PeerRequests
from swarm.download.serving import Serving
from swarm.download.unknown_length import Lobbies, Lobby, Spool
from swarm.edges import (
    Discovery,
    Membership,
    NodeId,
    Origin,
    OriginInfo,
    PeerLink,
    PeerNetwork,
    Provider,
    Served,
    Source,
    Started,
    State,
    Store,
    StoredTask,
)
from swarm.errors import (
    ContentChanged,
    IntegrityError,
    Interrupted,
    LocalProtocolError,
    NoSpace,
    NotAMember,
    NotPermitted,
    OriginError,
    OriginUnreachable,
    PeerError,
    RemoteProtocolError,
    StoreError,
    SwarmError,
)
from swarm.task import Digest, Geometry, Task, blob_task, url_task

log = structlog.get_logger(__name__)

IDLE_SECONDS = 60.0
"""A complete task nobody asked for so long is closed, so that it may be evicted."""

COMPANY_SECONDS = 600.0
"""The same while a neighbour still lacks pieces: it may be waiting for its turn elsewhere, but must not hold us for ever."""

MAX_SEEDED_AT_ONCE = 4096
"""Tasks served at once; each holds a descriptor."""

SPOOL_CHUNK_BYTES = 1024 * 1024

OTHER_NAMES_WITHIN = 1.0
"""Seconds until complete content is announced under its digest too: where many nodes end the same fetch at once, the
announcements of the first must not take the processor from the last."""

HOLDERS_MET = 4
"""Holders dialled before a read, one after another; the read itself finds more."""

LINGER_SECONDS = 2.0
"""A download whose last reader left waits so long for another: clients that resume, or read in parts, come back at once."""

GIVE_UP_AFTER = 15.0
"""Seconds; see `DownloadService`."""

OPEN_HEADERS = frozenset({"accept", "accept-encoding", "accept-language", "cache-control", "pragma", "user-agent"})
"""What everybody may send.  Any other header may open what is closed to others (`Authorization`, `Cookie`, `PRIVATE-TOKEN`,
`X-Registry-Auth`, ...) or change the content."""


class DownloadService:
    """See the module.  `attach` the peer network before `run`."""

    def __init__(
        self,
        membership: Membership,
        store: Store,
        discovery: Discovery,
        origin: Origin,
        *,
        policy: Policy | None = None,
        rng: Random | None = None,
        wall_clock: Callable[[], float] = time.time,
        on_finished: Callable[[Fetched], None] | None = None,
        spool_dir: str | None = None,
        give_up_after: float = GIVE_UP_AFTER,
    ) -> None:
        """Make a service.

        Args:
            spool_dir: Takes content of unknown length while it is read; the default is the system's.
            give_up_after: Seconds without any progress after which a download that cannot read its origin fails.
        """
        self._parts = Parts(
            membership, store, discovery, origin, policy or Policy(), rng or Random(), wall_clock, spool_dir,
            claim_seq=int(wall_clock() * 1000),
        )  # fmt: skip
        self._on_finished = on_finished
        self._give_up_after = give_up_after
        self._nursery: trio.Nursery | None = None
        self._active: dict[bytes, Active] = {}
        self._opening: dict[bytes, trio.Event] = {}
        self._draining = False
        bans = Bans()
        self._meeting = Meeting(self._parts, bans)
        self._reads = OriginReads(self._parts, self._fail)
        self._blame = Blame(self._parts, bans, self._reads)
        self._requests = PeerRequests(self._parts, self._blame, self._fail)
        self._lobbies = Lobbies(self._parts, self._meeting)
        self._serving = Serving(self._parts, self._active, self._open)
        store.on_evict(self._evicting)
        store.on_incomplete(self._incomplete)

    @property
    def totals(self) -> Totals:
        return self._parts.totals

    # --- life ------------------------------------------------------------------------------------------------

    def attach(self, network: PeerNetwork, *, all_linked: Callable[[], bool] = lambda: False) -> None:
        """`all_linked` says whether every node we know of is connected to us."""
        self._parts.network = network
        self._parts.all_linked = all_linked

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive the exchanges until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    self._nursery = None  # in here: nothing is to be started in a nursery that has closed
        finally:
            for active in list(self._active.values()):
                self._close(active)

    async def drain(self, seconds: float) -> None:
        """Take no new work and wait at most so long for running downloads; the rest is interrupted, resumable."""
        self._draining = True
        with trio.move_on_after(seconds):
            for active in list(self._active.values()):
                await active.done.wait()
        for active in list(self._active.values()):
            if not active.done.is_set():
                self._fail(active, Interrupted("the daemon is stopping; what was verified is kept, ask again to resume"))

    # --- fetching --------------------------------------------------------------------------------------------

    async def fetch(
        self,
        request: FetchRequest,
        progress: Callable[[Progress], None] | None = None,
        opened: Callable[[StoredTask | None], None] | None = None,
    ) -> tuple[Fetched, StoredTask]:
        """Have the content complete and verified in the store.

        Args:
            opened: Called with a handle of its own, which it closes, when content that is not complete yet begins to arrive;
                with `None` if that was in vain and other content may follow.

        Returns:
            The numbers, and the open task; the caller closes it.

        Raises:
            SwarmError: The subclass says whose fault it is; what was verified is kept.
        """
        if self._draining:
            raise Interrupted("the daemon is stopping")
        begun = trio.current_time()
        try:
            try:
                result = await self._fetch_once(request, progress, opened, begun)
            except ContentChanged:
                # One clean restart: the new version is another task, and nothing of the old one gets into it.
                if opened is not None:
                    opened(None)
                result = await self._fetch_once(request, progress, opened, begun)
        except SwarmError as error:
            self.totals.fetches[error.kind] += 1
            raise
        self.totals.fetches["ok"] += 1
        if self._on_finished is not None:
            self._on_finished(result[0])
        return result

    async def _fetch_once(
        self,
        request: FetchRequest,
        progress: Callable[[Progress], None] | None,
        opened: Callable[[StoredTask | None], None] | None,
        begun: float,
    ) -> tuple[Fetched, StoredTask]:
        if progress is not None:
            progress(Progress(b"", None, 0, 0, 0, 0, 0, "resolving"))
        if request.digest is not None:
            task, info = blob_task(request.digest, shared=self._may_share(request)), None
        else:
            task, info = await self._identify(request)
        stored = self._parts.store.open(task.id)
        if stored is not None and stored.complete:
            return self._local(stored, begun)
        if stored is not None:
            stored.close()
        active = await self._activate(task, info, request)
        active.waiters += 1
        try:
            if opened is not None and not active.done.is_set():
                opened(self._open_again(active))
            await self._wait(active, progress)
        finally:
            active.waiters -= 1
            if active.waiters == 0 and not active.done.is_set():
                if active.readers:
                    self._want_what_is_read(active)
                else:
                    self._fail(active, Interrupted("nobody waits for it any more"))
        if active.error is not None:
            raise active.error
        return self._fetched(active, begun), self._open_again(active)

    async def read(
        self, request: FetchRequest, span: Callable[[int], tuple[int, int]], *, strict: bool = False, prefix: bool = True
    ) -> Reader:
        """Read content whose digest is known while it arrives; all who read or fetch it share one download.

        Args:
            span: From the length to the bytes wanted, half-open.
            strict: Give out nothing before the digest matched.
            prefix: The reader has what comes before `span`: with the last piece it has all of it, so that piece is held back
                until the digest matched.  Otherwise only the pieces of `span` are fetched, and each goes out when verified.

        Returns:
            A reader, which the caller closes.

        Raises:
            SwarmError: As `fetch`, as far as it is known now; the rest comes from the reader.
        """
        if self._draining:
            raise Interrupted("the daemon is stopping")
        if request.digest is None:
            raise LocalProtocolError("only content whose digest is known can be read while it arrives")
        task = blob_task(request.digest, shared=self._may_share(request))
        stored = self._parts.store.open(task.id)
        if stored is not None and stored.complete:
            try:
                return Reader(stored, None, *span(stored.geometry.length), held_back=False)
            except BaseException:
                stored.close()
                raise
        if stored is not None:
            stored.close()
        info = OriginInfo(request.length) if request.length is not None else None
        active = await self._activate(task, info, request, reads=True)
        try:
            start, stop = span(active.geometry.length)
            whole = strict or (stop == active.geometry.length and (prefix or start == 0))
            reader = Reader(
                self._open_again(active), active, start, stop,
                held_back=whole, strict=strict, closed=partial(self._reader_left, active),
            )  # fmt: skip
        except BaseException:
            self._reader_left(active, None)
            raise
        active.readers[reader] = (0, active.geometry.length) if whole else (start, stop)
        self._want_what_is_read(active)
        return reader

    def is_here(self, digest: Digest) -> bool:
        """Whether the store has all of this content."""
        stored = self._parts.store.open(blob_task(digest).id)
        if stored is None:
            return False
        try:
            return stored.complete
        finally:
            stored.close()

    async def length_of(self, request: FetchRequest) -> int:
        """How long this content is, without reading it: it exists here, at its origin, or at a member.

        Raises:
            SwarmError: As `fetch`.
        """
        if request.digest is None or request.source is None:
            raise LocalProtocolError("a length is asked for by digest and origin")
        task_id = blob_task(request.digest).id
        stored = self._parts.store.open(task_id)
        if stored is not None:
            try:
                if stored.complete or task_id in self._active:
                    return stored.geometry.length
            finally:
                stored.close()
        try:
            info = await self._parts.origin.head(request.source)
        except OriginUnreachable:
            if request.length is None or not self._may_share(request) or not await self.meet_holders(request.digest):
                raise
            return request.length
        if info.length is None:
            raise OriginError("the origin does not say how long the content is")
        return info.length

    async def meet_holders(self, digest: Digest, *, private: bool = False) -> bool:
        """Connect to members that have this content, so that a read begins at once; whether one has all of it."""
        if private and self._parts.membership.is_open:
            return False
        task_id = blob_task(digest).id
        active = self._active.get(task_id)
        if active is not None and (active.exchange.held | active.exchange.held_anywhere()).all():
            return True
        found = await self._parts.discovery.find(task_id)
        holders = [provider for provider in found if provider.state in (State.COMPLETE, State.SEED)]
        for provider in holders[:HOLDERS_MET]:
            if await self._meeting.dial(provider) is not None:
                return True
        return False

    def _reader_left(self, active: Active, reader: Reader | None) -> None:
        active.readers.pop(reader, None)
        if active.closed or active.done.is_set():
            return
        if active.readers or active.waiters:
            self._want_what_is_read(active)
        elif self._nursery is not None:
            self._nursery.start_soon(self._linger, active)

    async def _linger(self, active: Active) -> None:
        await trio.sleep(LINGER_SECONDS)
        if not active.readers and not active.waiters and not active.done.is_set():
            self._fail(active, Interrupted("nobody reads it any more"))

    def _want_what_is_read(self, active: Active) -> None:
        """Everything, if somebody waits for everything; else the ranges being read, and what a fetch waits for."""
        if active.closed or active.stored.complete or not active.readers:
            return
        geometry, exchange = active.geometry, active.exchange
        ranges = set(active.readers.values())
        whole = (0, geometry.length) in ranges or (active.waiters > 0 and active.whole_content)
        wanted = pieces.full(geometry.piece_count) if whole else pieces.none(geometry.piece_count)
        if not whole:
            if active.waiters:
                wanted |= exchange.wanted
            for start, stop in ranges:
                covering = geometry.pieces_covering(start, stop)
                wanted[covering.start : covering.stop] = True
        if active.downloading and whole == active.whole_content and wanted == exchange.wanted:
            return
        active.whole_content = whole
        exchange.want(wanted, exchange.first)
        if not active.downloading and (whole or not exchange.complete):
            self._resume(active)
        active.touch()

    def _resume(self, active: Active) -> None:
        """A range was fetched, and more is wanted now."""
        active.done, active.finishing = trio.Event(), False
        active.last_byte = trio.current_time()
        if active.nursery is not None:
            active.nursery.start_soon(self._meeting.seek, active, [])

    def _may_share(self, request: FetchRequest) -> bool:
        """Content that needed credentials stays here, unless its requester says otherwise, and never enters an open network."""
        return not _is_secret(request) or (request.share and not self._parts.membership.is_open)

    async def _identify(self, request: FetchRequest) -> tuple[Task, OriginInfo]:
        if request.source is None:
            raise NotPermitted("a fetch needs a URL or a digest")
        if request.no_origin:
            raise NotPermitted("--no-origin needs --digest: which version of a URL is meant is only known from the origin")
        if request.immutable and request.length is not None:
            info = OriginInfo(request.length)  # the URL names the version, its requester the length: nothing to ask
        else:
            info = await self._parts.origin.head(request.source)
        shared = self._may_share(request) and bool(info.validator or request.immutable)
        # Nothing tells two versions apart without a validator: such content is a task of its own each time.
        validator = info.validator or ("" if request.immutable else f"once:{self._parts.rng.getrandbits(128):032x}")
        task = url_task(
            request.source.url, tag=request.tag, application=request.application, validator=validator, shared=shared
        )
        return task, info

    def _local(self, stored: StoredTask, begun: float) -> tuple[Fetched, StoredTask]:
        digest = stored.digest
        if digest is None:
            raise StoreError(f"task {stored.task.short} is complete but has no digest")
        length = stored.geometry.length
        self.totals.bytes_from_local += length
        return Fetched(stored.task.id, digest, length, trio.current_time() - begun, 0, 0, length, 0), stored

    def _fetched(self, active: Active, begun: float) -> Fetched:
        return Fetched(
            active.task.id,
            active.stored.digest if active.stored.complete else None,
            active.geometry.length,
            (active.finished or trio.current_time()) - begun,
            active.from_origin,
            active.from_peers,
            active.from_local,
            len(active.traffic),
            {str(why): count for why, count in active.exchange.why_origin.items()},
        )

    def _open_again(self, active: Active) -> StoredTask:
        stored = self._parts.store.open(active.task.id)
        if stored is None:
            raise StoreError(f"task {active.task.short} vanished from the store; fetch it again")
        return stored

    async def _wait(self, active: Active, progress: Callable[[Progress], None] | None) -> None:
        while not active.done.is_set():
            if progress is None:
                await active.done.wait()
                return
            progress(self._progress(active))
            with trio.move_on_after(0.2):
                await active.done.wait()
        if progress is not None and active.error is None:
            progress(self._progress(active))

    def _progress(self, active: Active) -> Progress:
        phase = "done" if active.done.is_set() else "checking" if active.finishing else "fetching"
        if phase == "fetching" and not active.exchange.settled:
            phase = "finding"
        done = active.from_local + active.from_origin + active.from_peers
        return Progress(
            active.task.id,
            active.geometry.length,
            min(done, active.geometry.length),
            active.from_peers,
            active.from_origin,
            active.from_local,
            len(active.exchange.neighbours),
            phase,
        )

    async def _activate(self, task: Task, info: OriginInfo | None, request: FetchRequest, *, reads: bool = False) -> Active:
        """The running download of this task, started if there is none: all who ask for it share it.

        `reads`: it is for a reader, which says itself what is wanted.
        """
        while True:
            active = self._active.get(task.id)
            if active is not None and not (active.done.is_set() and active.error is not None):
                if not active.done.is_set() or active.stored.complete or active.exchange.complete:
                    if not reads:
                        self._widen(active)
                    self._lend(active, info, request)
                    return active
                # A seeding exchange whose content rotted: start anew on what is left.
                self._close(active)
            opening = self._opening.get(task.id)
            if opening is None:
                break
            await opening.wait()
        opening = self._opening[task.id] = trio.Event()
        try:
            return await self._start(task, info, request, reads=reads)
        finally:
            del self._opening[task.id]
            opening.set()

    async def _start(self, task: Task, info: OriginInfo | None, request: FetchRequest, *, reads: bool) -> Active:
        if self._nursery is None:
            raise Interrupted("the daemon is stopping")
        source = None if request.no_origin else request.source
        found: list[Provider] = []
        lobby = Lobby()
        try:
            if info is None:
                info, lobby, found = await self._lobbies.find_geometry(task, source)
            geometry = lobby.geometry if info is None or info.length is None else Geometry.of(info.length)
            if geometry is not None:
                active = await self._open_new(task, geometry, source, info, request)
            elif source is None or info is None:
                raise LocalProtocolError("neither a geometry nor an origin")
            else:
                active, others = await self._read_unknown_length(task, source, info, request)
                others.guests |= lobby.guests
                lobby = others
            if info is None or info.length is None:
                active.told_by = lobby.tellers
        except BaseException:
            # It may have been announced already; nobody is to come for what we do not even want any more.
            self._lobbies.dismiss(task.id, lobby)
            if task.shared and self._nursery is not None:
                self._nursery.start_soon(self._parts.discovery.withdraw, task.id)
            raise
        if self._nursery is None:
            active.stored.close()
            raise Interrupted("the daemon is stopping")
        if request.byte_range is not None:
            self._narrow(active, request.byte_range)
        if reads:
            active.exchange.want(pieces.none(active.geometry.piece_count))  # until the reader says what it reads
            active.whole_content = False
        self._active[task.id] = active
        self._nursery.start_soon(self._run_active, active, found)
        for node_id in lobby.guests:
            link = self._parts.link(node_id)
            if link is not None:
                self._meeting.greet(active, link)
        return active

    async def _open_new(
        self, task: Task, geometry: Geometry, source: Source | None, info: OriginInfo | None, request: FetchRequest
    ) -> Active:
        stored = await self._create(task, geometry, request)
        active = self._make_active(task, stored, source, info)
        active.from_local = sum(geometry.size(piece) for piece in pieces.indices(stored.held))
        return active

    async def _create(self, task: Task, geometry: Geometry, request: FetchRequest) -> StoredTask:
        create = partial(
            self._parts.store.create, task, geometry,
            private=not task.shared or _is_secret(request), tag=request.tag, application=request.application,
        )  # fmt: skip
        try:
            return await create()
        except NoSpace:
            if not self._close_idle():
                raise
            return await create()

    def _close_idle(self) -> bool:
        """What is only kept open in case somebody asks is in use, and so not evicted: let it give way, if there is any."""
        idle = [active for active in self._active.values() if not active.downloading and not _has_company(active)]
        for active in idle:
            self._close(active)
        return bool(idle)

    def has_room(self, contents: Mapping[Digest, int]) -> bool:
        """Whether all of these, of so many bytes each, could be fetched now; what is being fetched has its room already."""
        store = self._parts.store
        wanted = sum(size for digest, size in contents.items() if not self._has_some(digest))
        return store.has_room(wanted) or (self._close_idle() and store.has_room(wanted))

    def _has_some(self, digest: Digest) -> bool:
        stored = self._parts.store.open(blob_task(digest).id)
        if stored is not None:
            stored.close()
        return stored is not None

    def release(self, task_id: bytes) -> None:
        """Stop serving a complete task, under any of its names, so that it is no longer in use; a running download goes on."""
        for name in {task_id, *self._parts.store.public_names(task_id)}:
            active = self._active.get(name)
            if active is not None and not active.downloading:
                self._close(active)

    async def _read_unknown_length(
        self, task: Task, source: Source, info: OriginInfo, request: FetchRequest
    ) -> tuple[Active, Lobby]:
        """Wait for a member that knows the length, or read all of it and find out; then it is a task like any other."""
        spool = Spool(self._parts.spool_dir)
        try:
            lobby = await self._lobbies.read(task, source, info, spool)
            geometry = lobby.geometry or Geometry.of(spool.length)
            active = await self._open_new(task, geometry, source, replace(info, length=geometry.length), request)
            if lobby.geometry is None:
                try:
                    await self._cut(active, spool)
                except BaseException:
                    active.stored.close()
                    raise
        finally:
            spool.close()
        return active, lobby

    async def _cut(self, active: Active, spool: Spool) -> None:
        """Cut what was read whole into pieces."""
        active.exchange.reading[WHOLE] = Reading(active.started, 0.0, Why.STREAM)
        cutter = PieceCutter(active.geometry, 0)
        spool.rewind()
        while chunk := spool.read(SPOOL_CHUNK_BYTES):
            for piece, data, digest in cutter.feed(chunk):
                self._reads.piece_read(active, piece, data, digest, 0.0)
            await trio.lowlevel.checkpoint()
        active.exchange.whole_read_done()

    def _narrow(self, active: Active, byte_range: tuple[int, int | None]) -> None:
        start, stop = byte_range
        covering = active.geometry.pieces_covering(start, active.geometry.length if stop is None else stop)
        active.exchange.want(pieces.of(active.geometry.piece_count, covering), covering)
        active.whole_content = len(covering) == active.geometry.piece_count

    def _widen(self, active: Active) -> None:
        """Somebody joins a running range fetch: from now on all of the content is wanted."""
        if not active.whole_content:
            active.whole_content = True
            active.exchange.want(pieces.full(active.geometry.piece_count), active.exchange.first)
            if not active.downloading:
                self._resume(active)
            active.touch()

    def _lend(self, active: Active, info: OriginInfo | None, request: FetchRequest) -> None:
        """A download that may not read the origin is joined by a requester who may."""
        if active.source is not None or request.source is None or request.no_origin or active.done.is_set():
            return
        if active.shared and not self._may_share(request):
            return  # what this requester's credentials open is not for everybody
        now = trio.current_time()
        active.source, active.info, active.last_byte = request.source, info or active.info, now
        active.exchange.allow_origin(partial(self._parts.sign_claim, active.task.id, active.geometry), now)
        for node_id in active.exchange.neighbours:
            link = self._parts.link(node_id)
            if link is not None:
                link.post(active.join_message(link.node_id, reply=False))
        active.touch()

    def _make_active(self, task: Task, stored: StoredTask, source: Source | None, info: OriginInfo | None) -> Active:
        now = trio.current_time()
        geometry, parts = stored.geometry, self._parts
        task_key = parts.membership.task_key(task.id)
        exchange = Exchange(
            me=parts.me,
            task_id=task.id,
            task_key=task_key,
            geometry=geometry,
            held=stored.held,
            rng=Random(parts.rng.getrandbits(64)),
            now=now,
            sign_claim=partial(parts.sign_claim, task.id, geometry) if source is not None else None,
            policy=parts.policy,
            ranges=info.ranges if info is not None else None,
            shared=task.shared,
        )
        members = Members(parts.me, task_key, parts.policy)
        active = Active(task, stored, exchange, members, source, info, now, task.shared)
        active.last_byte = now
        stored.on_lost(partial(self._pieces_lost, active))
        return active

    # --- driving an exchange --------------------------------------------------------------------------------------

    async def _run_active(self, active: Active, found: list[Provider] | None) -> None:
        """Everything that goes on for one task; `found` is `None` where we only serve it."""
        if active.closed:
            return  # whoever asked for it went away before this began
        try:
            async with trio.open_nursery() as nursery:
                active.nursery = nursery
                if found is not None:
                    nursery.start_soon(self._meeting.seek, active, found)
                await self._drive(active, nursery)
                nursery.cancel_scope.cancel()
        except Exception:
            # A bug of ours, perhaps woken by what a member sent: it costs this task, not the node and its other tasks.
            log.exception("task failed", task=active.task.id)
            self._fail(active, LocalProtocolError(f"internal error in task {active.task.short}; see the daemon's log"))
        still_in = self._active.get(active.task.id) is active
        leaves = still_in and (self._is_kept_apart(active.stored) or not active.stored.complete)
        self._close(active)
        if leaves:
            # Part of it, or what was shared once and may not be any more: nobody gets it from us.
            await self._parts.discovery.withdraw(active.task.id)

    async def _drive(self, active: Active, nursery: trio.Nursery) -> None:
        """Carry out what the exchange decides, until nobody needs the task any more."""
        exchange = active.exchange
        while True:
            now = trio.current_time()
            exchange.tick(now)
            for action in exchange.take_actions():
                self._act(active, action, nursery)
            if active.downloading:
                # How long it really is shows at the end of a read, where only members said it.
                if exchange.complete and not active.finishing and not (active.told_by and active.reads):
                    active.finishing = True
                    nursery.start_soon(self._finish, active)
                else:
                    self._give_up_if_hopeless(active, now)
            elif self._is_idle(active, now):
                return
            await active.pace.sleep_until(min(exchange.next_deadline(), now + IDLE_SECONDS))

    @staticmethod
    def _is_idle(active: Active, now: float) -> bool:
        patience = COMPANY_SECONDS if _has_company(active) else IDLE_SECONDS
        return now - max(active.finished, active.last_asked) >= patience

    def _give_up_if_hopeless(self, active: Active, now: float) -> None:
        """A download whose origin cannot be read and whose peers bring nothing ends in the origin's error."""
        if active.exchange.may_read_origin and active.origin_error is None:
            return
        if active.exchange.settled and now - active.last_byte >= self._give_up_after:
            self._fail(
                active,
                active.origin_error
                or OriginUnreachable("no member of the swarm has the missing pieces, and the origin may not be read"),
            )

    def _act(self, active: Active, action: ex.Action, nursery: trio.Nursery) -> None:
        match action:
            case ex.Send(node_id, message, urgent):
                link = self._parts.link(node_id)
                if link is not None:
                    link.post(message, urgent=urgent)
            case ex.Request(node_id, piece, spare):
                self._requests.ask(active, node_id, piece, spare)
            case ex.CancelRequest(node_id, piece):
                self._requests.cancel(active, node_id, piece)
            case ex.ReadOrigin(piece, _):
                scope = active.reads[piece] = trio.CancelScope()
                nursery.start_soon(self._reads.read, active, piece, scope)
            case ex.AbortOrigin(piece):
                aborted = active.reads.pop(piece, None)
                if aborted is not None:
                    aborted.cancel()
            case _:
                assert_never(action)

    # --- finishing -------------------------------------------------------------------------------------------------

    async def _finish(self, active: Active) -> None:
        """Every wanted piece is here: check the content digest, complete, seal and say so."""
        if not active.exchange.complete:
            active.finishing = False  # more is wanted since
            active.touch()
            return
        try:
            if active.whole_content and active.stored.held.all() and not await self._completed(active):
                active.finishing = False
                active.touch()
                return
        except StoreError as error:
            if active.exchange.complete:
                self._fail(active, error)
            else:
                active.finishing = False  # pieces of an earlier run had rotted, and are fetched again
                active.touch()
            return
        except SwarmError as error:
            self._fail(active, error)
            return
        active.finished = trio.current_time()
        repaired, active.repairing = active.repairing, False
        active.done.set()
        active.wake()
        if active.shared and active.stored.complete:
            if self._nursery is not None:
                within = OTHER_NAMES_WITHIN if active.exchange.neighbours else 0.0
                self._nursery.start_soon(self._announce_other_names, active.task.id, repaired, within)
            await self._parts.discovery.announce(active.task.id, State.COMPLETE)

    async def _announce_other_names(self, task_id: bytes, every: bool, within: float) -> None:
        """Announce complete content also as the task of its digest, by which it is found whatever URL others know.

        Args:
            every: Under all its names: it had been incomplete, and was withdrawn.
            within: Seconds over which nodes that end at the same time spread this.
        """
        await trio.sleep(self._parts.rng.uniform(0, within))
        store = self._parts.store
        names = store.public_names(task_id)
        for name in names if every else names[:1]:
            if name != task_id and not self._draining and store.public_names(name):  # not evicted meanwhile
                await self._parts.discovery.announce(name, State.COMPLETE)

    async def _completed(self, active: Active) -> bool:
        """Check the whole content and seal it; `False` if some of it was wrong and is to be fetched anew."""
        wanted = active.task.digest
        digest = await active.stored.content_digest(wanted.algorithm if wanted is not None else "sha256")
        if wanted is None:
            if not await self._blame.agreed(active, digest, self._requests.table):
                return False
        elif digest != wanted:
            await self._blame.find_liars(active, digest)
            return False
        await active.stored.complete_with(digest)
        self._seal(active, digest)
        return True

    def _seal(self, active: Active, digest: Digest) -> None:
        parts = self._parts
        table = proofs.table_of(active.stored.piece_digest(piece) for piece in range(active.geometry.piece_count))
        active.seal = proofs.seal(parts.membership, active.task.id, active.geometry, digest, table, parts.now())
        for node_id in active.exchange.neighbours:
            link = parts.link(node_id)
            if link is not None:
                link.post(wire.SealOffer(active.task.id, active.seal), urgent=False)

    def _fail(self, active: Active, error: SwarmError) -> None:
        """End the download; verified pieces stay in the store for the next attempt."""
        if active.closed or not active.downloading:
            return
        active.error = error
        if isinstance(error, ContentChanged):
            self._blame.tellers(active)
        active.done.set()
        # Another download of the same content may have repaired it, under another name.
        leaves = not (active.repairing and active.stored.complete and not active.stored.private)
        self._close(active)
        if active.shared and leaves and self._nursery is not None:
            self._nursery.start_soon(self._parts.discovery.withdraw, active.task.id)

    def _close(self, active: Active) -> None:
        """Leave the task: links stay, the store entry is no longer in use."""
        if active.closed:
            return
        active.closed = True
        if self._active.get(active.task.id) is active:
            del self._active[active.task.id]
        if active.nursery is not None:
            active.nursery.cancel_scope.cancel()
        for node_id in list(active.exchange.neighbours):
            link = self._parts.link(node_id)
            if link is not None:
                link.post(wire.Leave(active.task.id), urgent=False)
        self._requests.cancel_all(active)
        active.stored.close()
        if not active.done.is_set():
            active.error = active.error or Interrupted("the daemon is stopping")
            active.done.set()
        active.wake()

    def _pieces_lost(self, active: Active, lost: list[int]) -> None:
        """The store found rotten pieces: withdraw them, and fetch them again."""
        now = trio.current_time()
        active.exchange.piece_lost(lost, now)
        active.wake()
        active.touch()
        if active.downloading or active.exchange.complete:
            return
        active.repairing, active.finishing, active.last_byte = True, False, now
        if active.nursery is not None:
            active.nursery.start_soon(self._meeting.seek, active, [])

    async def _evicting(self, task_id: bytes) -> None:
        active = self._active.get(task_id)
        if active is not None:
            self._close(active)
        with suppress(PeerError):
            await self._parts.discovery.withdraw(task_id)

    def _incomplete(self, task_ids: list[bytes]) -> None:
        """Content lost pieces: it is announced only by the download that repairs it, if there is one."""
        if self._nursery is None:
            return
        for task_id in task_ids:
            active = self._active.get(task_id)
            if active is None or not active.downloading:
                self._nursery.start_soon(self._parts.discovery.withdraw, task_id)

    # --- edges.PeerEvents ----------------------------------------------------------------------------------------------

    def link_up(self, link: PeerLink) -> None:
        if self._meeting.is_banned(link.node_id):
            link.drop("banned")
            return
        for active in self._active.values():
            # Either it dialled us for this task, or the connection was replaced and both sides start anew.
            if not active.done.is_set() and active.members.knows(link.node_id):
                self._meeting.greet(active, link)

    def link_down(self, link: PeerLink, reason: str) -> None:
        now = trio.current_time()
        gone = link.node_id
        self._requests.link_down(gone)
        self._lobbies.link_down(gone)
        for active in self._active.values():
            active.greeted.discard(gone)
            active.private_for.discard(gone)
            active.answered(gone)
            active.seals.pop(gone, None)
            if gone in active.exchange.neighbours:
                active.exchange.peer_left(gone, now)
                self._meeting.lost(active)
                active.touch()

    def message_received(self, link: PeerLink, message: wire.TaskMessage) -> None:
        match message:
            case wire.Ask(task):
                self._asked(link, task)
                return
            case wire.Join():
                self._joined(link, message)
                return
        active = self._active.get(message.task)
        if active is None:
            match message:
                case wire.Claims():
                    self._lobbies.somebody_reads(message)
                case wire.Leave():
                    self._lobbies.left(link.node_id, message.task)
            return
        now = trio.current_time()
        node_id = link.node_id
        if node_id not in active.exchange.neighbours and not isinstance(message, wire.Leave | wire.Peers):
            # It did not join, or may not: a claim on content we fetch for ourselves alone, say, would only hold it up.
            return
        match message:
            case wire.Have(_, told):
                active.exchange.peer_has(node_id, told, now)
            case wire.Lost(_, told):
                active.exchange.peer_lost(node_id, told)
            case wire.SealOffer(_, seal):
                self._sealed(active, link, seal)
            case wire.Claims():
                self._claimed(active, link, message, now)
            case wire.Unclaim(_, told):
                active.exchange.unclaimed(node_id, told)
            case wire.Leave():
                active.answered(node_id)
                active.greeted.discard(node_id)
                active.private_for.discard(node_id)
                active.members.declined(node_id, now)
                active.seals.pop(node_id, None)
                active.exchange.peer_left(node_id, now)
                self._meeting.lost(active)
            case wire.Peers(_, records):
                self._meeting.introduced(active, records)
            case _:
                assert_never(message)
        active.touch_lightly()

    def _asked(self, link: PeerLink, task_id: bytes) -> None:
        active = self._open(task_id)
        if active is not None and active.shared:
            link.post(active.join_message(link.node_id, reply=False))
        elif not self._lobbies.asked(link.node_id, task_id):
            link.post(wire.Leave(task_id))

    def _joined(self, link: PeerLink, join: wire.Join) -> None:
        if self._meeting.is_banned(link.node_id):
            raise RemoteProtocolError("banned")
        self._lobbies.joined(link.node_id, join)
        active = self._open(join.task)
        if active is None or not active.shared:
            if join.reply:
                link.post(wire.Leave(join.task))
            return
        if (join.length, join.piece_length) != (active.geometry.length, active.geometry.piece_length):
            link.post(wire.Leave(join.task))
            active.answered(link.node_id)
            return
        active.last_asked = trio.current_time()
        newcomer = link.node_id not in active.exchange.neighbours
        greeted = link.node_id in active.greeted
        among_nearest = not active.members.outranked and active.members.is_near(link.node_id)
        if newcomer and not greeted and not among_nearest and not active.exchange.has_room(join):
            link.post(wire.Leave(join.task))
            self._meeting.introduce(active, link)
            return
        active.exchange.peer_joined(link.node_id, join, trio.current_time())
        active.greeted.add(link.node_id)
        (active.private_for.add if join.private else active.private_for.discard)(link.node_id)
        if join.seal is not None:
            self._sealed(active, link, join.seal)
        if join.reply:
            link.post(active.join_message(link.node_id, reply=False))
        if newcomer:
            self._meeting.introduce(active, link)
        active.answered(link.node_id)
        active.touch()

    def _claimed(self, active: Active, link: PeerLink, message: wire.Claims, now: float) -> None:
        """Check who made each claim before it counts for or against anybody.

        By its signature, but for those that come from their owner and stay here: the connection has shown who that is, and
        twenty hosts that check every claim spend a thirtieth of their time on it.
        """
        relays = bool(active.exchange.unreached(link.node_id, message.reached))
        fresh: dict[NodeId, list[wire.Signed]] = {}
        for signed in message.claims:
            if signed.key == link.public_key and not relays:
                body = wire.decode(signed.body, wire.ClaimBody)
            elif active.members.claim_seen(signed.signature):
                continue
            else:
                try:
                    body = self._parts.membership.verify("claim", signed, wire.ClaimBody)
                except NotAMember:
                    continue  # relayed from somebody we have not met; it counts when it comes again after we have
                except IntegrityError as error:
                    raise RemoteProtocolError("a claim with a bad signature") from error
                active.members.note_claim(signed.signature)
            geometry = active.geometry
            if (body.task, body.length, body.piece_length) != (active.task.id, geometry.length, geometry.piece_length):
                continue
            owner = active.members.id_of(signed.key)
            if active.exchange.claim_received(owner, body.piece, body.lease, body.seq, now):
                fresh.setdefault(owner, []).append(signed)
        for owner, claims in fresh.items():
            active.exchange.relay(link.node_id, owner, claims, message.reached)

    def _sealed(self, active: Active, link: PeerLink, seal: wire.Signed) -> None:
        try:
            body = proofs.check_seal(self._parts.membership, seal, active.task.id, active.geometry)
        except (IntegrityError, NotAMember) as error:
            raise RemoteProtocolError(f"a bad seal: {error}") from error
        if seal.key != link.public_key:
            raise RemoteProtocolError("a seal of somebody else was offered")
        known = active.task.digest
        sealed = Digest.parse(body.content_digest)
        if known is not None and sealed != known and sealed.algorithm == known.algorithm and active.is_blob:
            raise RemoteProtocolError("a seal over other content than the task names")
        active.seals[link.node_id] = seal.key, body
        active.exchange.peer_complete(link.node_id, trio.current_time())

    def piece_started(self, link: PeerLink, started: Started) -> bool:
        return self._requests.piece_started(link, started)

    def piece_received(self, link: PeerLink, request_id: int, digest: bytes, data: memoryview) -> None:
        self._requests.piece_received(link, request_id, digest, data)

    def piece_failed(self, link: PeerLink, request_id: int, status: int) -> None:
        self._requests.piece_failed(link, request_id, status)

    # --- edges.UploadSource ----------------------------------------------------------------------------------------------

    def serve(self, node_id: NodeId, request: wire.Request, *, encrypted: bool) -> Served | int:
        return self._serving.serve(node_id, request, encrypted=encrypted)

    def replication(self, task_id: bytes, piece: int) -> int:
        return self._serving.replication(task_id, piece)

    def held_by(self, task_id: bytes, node_id: NodeId) -> int:
        return self._serving.held_by(task_id, node_id)

    def uploaded(self, node_id: NodeId, request: wire.Request, sent: int) -> None:
        self._serving.uploaded(node_id, request, sent)

    def _open(self, task_id: bytes) -> Active | None:
        """The task we take part in, opened from the store if somebody asks for what we only keep."""
        return self._active.get(task_id) or self._seed(task_id)

    def _seed(self, task_id: bytes) -> Active | None:
        if self._nursery is None or self._draining or len(self._active) >= MAX_SEEDED_AT_ONCE or task_id in self._opening:
            return None
        stored = self._parts.store.open(task_id)
        if stored is None:
            return None
        if self._is_kept_apart(stored) or not stored.complete:
            stored.close()
            return None
        active = self._make_active(Task(task_id, digest=stored.digest), stored, None, None)
        active.done.set()
        active.finished = active.started
        if stored.digest is not None:
            self._seal(active, stored.digest)
        self._active[task_id] = active
        self._nursery.start_soon(self._run_active, active, None)
        return active

    def _is_kept_apart(self, stored: StoredTask) -> bool:
        """Private content stays in the closed network it was shared in, and goes to members that have it as private too."""
        return stored.private and (self._parts.membership.is_open or not stored.task.shared)

    # --- what goes on ----------------------------------------------------------------------------------------------------

    def activity(self) -> list[TaskActivity]:
        return [self._activity(active) for active in self._active.values()]

    @staticmethod
    def _activity(active: Active) -> TaskActivity:
        state = "complete" if active.stored.complete else "failed" if active.error is not None else "downloading"
        peers = []
        for node_id, neighbour in active.exchange.neighbours.items():
            traffic = active.traffic.get(node_id, Traffic())
            peers.append((node_id.hex(), neighbour.held.count(), traffic.received, traffic.sent))
        return TaskActivity(
            active.task.id,
            state,
            active.geometry.length,
            active.geometry.piece_count,
            active.stored.held.count(),
            tuple(peers),
            active.from_origin,
            active.from_peers,
            {str(why): count for why, count in active.exchange.why_origin.items()},
        )


def _is_secret(request: FetchRequest) -> bool:
    """Whether its requester gave credentials, or what only this machine has."""
    if request.source is None:
        return False
    url = request.source.url
    userinfo = "@" in url.split("://", 1)[-1].split("/", 1)[0]
    return (
        request.private
        or userinfo
        or url.startswith("file:")
        or any(name.lower() not in OPEN_HEADERS for name, _ in request.source.headers)
    )


def _has_company(active: Active) -> bool:
    """Whether a neighbour may still come for pieces."""
    return any(not neighbour.complete for neighbour in active.exchange.neighbours.values())
