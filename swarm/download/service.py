"""The download service: drives one `Exchange` per task over links, origin and store.

It implements what the peer layer calls (`edges.PeerEvents`, `edges.UploadSource`) and what the control socket and the
mirror call (`fetch`).  The way of a fetch: identify the task, look in the store, announce and find members, exchange
pieces and read the origin where the rendezvous says so, check the content digest, complete.

Synchronous code decides and changes state, and leaves nothing half done between two awaits; actions of the exchanges are
carried out by one task per exchange, so that a burst of messages costs one decision.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import assert_never

import structlog
import trio

from swarm import pieces, proofs, wire
from swarm.download import exchange as ex
from swarm.download.claims import WHOLE, score
from swarm.download.cutting import PieceCutter
from swarm.download.exchange import Exchange, Reading, Why
from swarm.download.members import Members
from swarm.download.policy import Policy
from swarm.download.request import Fetched, FetchRequest, Progress, TaskActivity
from swarm.edges import (
    Discovery,
    Membership,
    NodeId,
    Origin,
    OriginBody,
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
    DigestMismatch,
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
from swarm.task import MIN_PIECE_BYTES, Digest, Geometry, Task, blob_task, url_task

log = structlog.get_logger(__name__)

IDLE_SECONDS = 60.0
"""A complete task nobody joined for so long is closed, so that it may be evicted."""

GREETED_LINKS = 32
"""Links of earlier tasks that are asked about a new one before the DHT answers."""

FIND_AGAIN = (1.0, 3.0, 10.0, 30.0)
"""Seconds between searches for more members while a download runs; the last repeats."""

DIAL_PATIENCE = 0.15
"""Of two nodes that find each other at the same moment the one with the larger id waits this long for the other's dial."""

ORIGIN_PAUSE = 1.0
"""After a failed origin read; the reader has already retried."""

ORIGIN_ATTEMPTS = 4
"""Reads of one piece that broke in the middle and went on from there."""

BAN_SECONDS = 60.0
MAX_BAN_SECONDS = 3600.0
MAX_BANS = 4096
"""Bans double from a minute to an hour; the oldest are forgotten first."""

MAX_SEEDED_AT_ONCE = 4096
"""Tasks served at once; each holds a descriptor."""

MAX_LOBBY = 256
CLAIM_WHOLE_EVERY = 1.0
SPOOL_CHUNK_BYTES = 1024 * 1024

GIVE_UP_AFTER = 15.0
"""Seconds without any progress after which a download that cannot read its origin fails."""


@dataclass(slots=True)
class Pending:
    """A request to a peer."""

    active: Active
    piece: int
    expected: bytes | None = None
    proof: wire.Signed | None = None
    started: float = 0.0
    cancelled: bool = False
    answered: trio.Event | None = None
    table: bytes | None = None


@dataclass(slots=True)
class Traffic:
    received: int = 0
    sent: int = 0


@dataclass(eq=False, slots=True)
class Active:
    """One task this node takes part in: the exchange and what drives it."""

    task: Task
    stored: StoredTask
    exchange: Exchange
    members: Members
    source: Source | None
    info: OriginInfo | None
    started: float
    shared: bool
    wake: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)
    joined: trio.Event = field(default_factory=trio.Event)
    error: SwarmError | None = None
    finished: float = 0.0
    waiters: int = 0
    from_origin: int = 0
    from_peers: int = 0
    from_local: int = 0
    traffic: dict[NodeId, Traffic] = field(default_factory=dict)
    signers: dict[int, bytes] = field(default_factory=dict)
    awaiting: set[NodeId] = field(default_factory=set)
    greeted: set[NodeId] = field(default_factory=set)
    reads: dict[int, trio.CancelScope] = field(default_factory=dict)
    seals: dict[NodeId, wire.SealBody] = field(default_factory=dict)
    banned: set[bytes] = field(default_factory=set)
    request_ids: dict[tuple[NodeId, int], int] = field(default_factory=dict)
    seal: wire.Signed | None = None
    nursery: trio.Nursery | None = None
    finishing: bool = False
    strict: bool = False
    origin_error: OriginError | NotPermitted | None = None
    last_byte: float = 0.0
    whole_content: bool = True

    @property
    def geometry(self) -> Geometry:
        return self.stored.geometry

    def touch(self) -> None:
        self.wake.set()


@dataclass(slots=True)
class Lobby:
    """Waiting for somebody who knows the geometry of a task whose length is not known here."""

    heard: trio.Event = field(default_factory=trio.Event)
    geometry: Geometry | None = None
    asked: set[NodeId] = field(default_factory=set)
    """Who asked us meanwhile, or was asked: they are told when the geometry is known."""
    quiet_since: float = 0.0


@dataclass(slots=True)
class Totals:
    """Counters since start, read by the metrics."""

    bytes_from_peers: int = 0
    bytes_from_origin: int = 0
    bytes_to_peers: int = 0
    pieces_from_peers: int = 0
    pieces_from_origin: int = 0
    pieces_to_peers: int = 0
    pieces_bad: int = 0
    pieces_wasted: int = 0
    why_origin: Counter[str] = field(default_factory=Counter)
    fetches: Counter[str] = field(default_factory=Counter)
    bytes_from_local: int = 0
    lies: int = 0
    bans: int = 0


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
    ) -> None:
        """`spool_dir` takes content of unknown length while it is read; the default is the system's."""
        self._membership = membership
        self._store = store
        self._discovery = discovery
        self._origin = origin
        self._policy = policy or Policy()
        self._rng = rng or Random()
        self._wall_clock = wall_clock
        self._on_finished = on_finished
        self._spool_dir = spool_dir
        self._network: PeerNetwork | None = None
        self._nursery: trio.Nursery | None = None
        self._active: dict[bytes, Active] = {}
        self._opening: dict[bytes, trio.Event] = {}
        self._lobbies: dict[bytes, Lobby] = {}
        self._pending: dict[tuple[NodeId, int], Pending] = {}
        self._request_id = 0
        self._claim_seq = int(wall_clock() * 1000)
        self._bans: dict[NodeId, tuple[float, float]] = {}
        self._draining = False
        self.totals = Totals()
        store.on_evict(self._evicting)

    # --- life ------------------------------------------------------------------------------------------------

    def attach(self, network: PeerNetwork) -> None:
        self._network = network

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive the exchanges until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for active in list(self._active.values()):
                self._close(active)

    async def announce_stored(self, *, per_second: float = 5.0) -> None:
        """Announce what the store holds complete, slowly: a restart of a node with thousands of tasks is no storm."""
        for entry in self._store.entries():
            if entry.complete and not entry.private:
                await self._discovery.announce(entry.task.id, State.COMPLETE)
                await trio.sleep(1 / per_second)

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
        self, request: FetchRequest, progress: Callable[[Progress], None] | None = None
    ) -> tuple[Fetched, StoredTask]:
        """Have the content complete and verified in the store.

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
                result = await self._fetch_once(request, progress, begun)
            except ContentChanged:
                # One clean restart: the new version is another task, and nothing of the old one gets into it.
                result = await self._fetch_once(request, progress, begun)
        except SwarmError as error:
            self.totals.fetches[error.kind] += 1
            raise
        self.totals.fetches["ok"] += 1
        if self._on_finished is not None:
            self._on_finished(result[0])
        return result

    async def _fetch_once(
        self, request: FetchRequest, progress: Callable[[Progress], None] | None, begun: float
    ) -> tuple[Fetched, StoredTask]:
        if progress is not None:
            progress(Progress(b"", None, 0, 0, 0, 0, 0, "resolving"))
        if request.digest is not None:
            task, info = blob_task(request.digest, shared=self._may_share(request)), None
        else:
            task, info = await self._identify(request)
        stored = self._store.open(task.id)
        if stored is not None and stored.complete:
            return self._local(stored, begun)
        if stored is not None:
            stored.close()
        active = await self._activate(task, info, request)
        active.waiters += 1
        try:
            await self._wait(active, progress)
        finally:
            active.waiters -= 1
            if active.waiters == 0 and not active.done.is_set():
                self._fail(active, Interrupted("nobody waits for it any more"))
        if active.error is not None:
            raise active.error
        return self._fetched(active, begun), self._open_again(active)

    def _may_share(self, request: FetchRequest) -> bool:
        """Content fetched with credentials stays here, unless its requester says otherwise."""
        if request.share or request.source is None:
            return True
        url = request.source.url
        secret = any(name.lower() in ("authorization", "cookie", "proxy-authorization") for name, _ in request.source.headers)
        userinfo = "@" in url.split("://", 1)[-1].split("/", 1)[0]
        return not (secret or userinfo or url.startswith("file:"))

    async def _identify(self, request: FetchRequest) -> tuple[Task, OriginInfo]:
        if request.source is None:
            raise NotPermitted("a fetch needs a URL or a digest")
        if request.no_origin:
            raise NotPermitted("--no-origin needs --digest: which version of a URL is meant is only known from the origin")
        info = await self._origin.head(request.source)
        shared = self._may_share(request) and bool(info.validator or request.immutable)
        # Nothing tells two versions apart without a validator: such content is a task of its own each time.
        validator = info.validator or ("" if request.immutable else f"once:{self._rng.getrandbits(128):032x}")
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
        stored = self._store.open(active.task.id)
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

    async def _activate(self, task: Task, info: OriginInfo | None, request: FetchRequest) -> Active:
        """The running download of this task, started if there is none: all who ask for it share it."""
        while True:
            active = self._active.get(task.id)
            if active is not None and not (active.done.is_set() and active.error is not None):
                if not active.done.is_set() or active.stored.complete:
                    self._widen(active)
                    return active
                # A seeding exchange whose content rotted: start anew on what is left.
                self._close(active)
            opening = self._opening.get(task.id)
            if opening is None:
                break
            await opening.wait()
        opening = self._opening[task.id] = trio.Event()
        try:
            return await self._start(task, info, request)
        finally:
            del self._opening[task.id]
            opening.set()

    async def _start(self, task: Task, info: OriginInfo | None, request: FetchRequest) -> Active:
        nursery = self._nursery
        if nursery is None:
            raise Interrupted("the daemon is stopping")
        source = None if request.no_origin else request.source
        found: list[Provider] = []
        geometry: Geometry | None = None
        if info is None:
            info, geometry, found = await self._find_geometry(task, source)
        if info is not None and info.length is not None:
            geometry = Geometry.of(info.length)
        if geometry is None:
            if source is None or info is None:
                raise LocalProtocolError("neither a geometry nor an origin")
            return await self._read_unknown_length(task, source, info, request)
        stored = await self._store.create(
            task, geometry, private=not task.shared, tag=request.tag, application=request.application
        )
        active = self._make_active(task, stored, source, info)
        active.from_local = sum(geometry.size(piece) for piece in pieces.indices(stored.held))
        if request.byte_range is not None:
            self._narrow(active, request.byte_range)
        self._active[task.id] = active
        nursery.start_soon(self._run_active, active, found)
        return active

    def _narrow(self, active: Active, byte_range: tuple[int, int | None]) -> None:
        start, stop = byte_range
        covering = active.geometry.pieces_covering(start, active.geometry.length if stop is None else stop)
        active.exchange.want(pieces.of(active.geometry.piece_count, covering), covering)
        active.whole_content = len(covering) == active.geometry.piece_count

    @staticmethod
    def _widen(active: Active) -> None:
        """Somebody joins a running range fetch: from now on all of the content is wanted."""
        if not active.whole_content and not active.done.is_set() and not active.finishing:
            active.whole_content = True
            active.exchange.want(pieces.full(active.geometry.piece_count))
            active.touch()

    def _make_active(self, task: Task, stored: StoredTask, source: Source | None, info: OriginInfo | None) -> Active:
        now = trio.current_time()
        geometry = stored.geometry
        exchange = Exchange(
            me=self._membership.node_id,
            task_id=task.id,
            task_key=self._membership.task_key(task.id),
            geometry=geometry,
            held=stored.held,
            rng=Random(self._rng.getrandbits(64)),
            now=now,
            sign_claim=partial(self._sign_claim, task.id, geometry) if source is not None else None,
            policy=self._policy,
            ranges=info.ranges if info is not None else None,
            shared=task.shared,
        )
        members = Members(self._membership.node_id, self._membership.task_key(task.id), self._policy)
        active = Active(task, stored, exchange, members, source, info, now, task.shared)
        active.last_byte = now
        stored.on_lost(partial(self._pieces_lost, active))
        return active

    def _sign_claim(self, task_id: bytes, geometry: Geometry, piece: int, lease: float) -> wire.Signed:
        self._claim_seq += 1
        body = wire.ClaimBody(task_id, geometry.length, geometry.piece_length, piece, lease, self._claim_seq)
        return self._membership.sign("claim", body)

    async def _find_geometry(
        self, task: Task, source: Source | None
    ) -> tuple[OriginInfo | None, Geometry | None, list[Provider]]:
        """Ask the origin and the members for the length of a blob at the same time; the origin's word counts.

        Raises:
            OriginError: The origin failed and no member knows the task.
        """
        lobby = self._lobbies.setdefault(task.id, Lobby())
        found: list[Provider] = []
        info: OriginInfo | None = None
        failure: OriginError | NotPermitted | None = None

        async def look() -> None:
            for link in self._links()[:GREETED_LINKS]:
                link.post(wire.Ask(task.id))
            found.extend(await self._discovery.announce(task.id, State.WANTS))
            async with trio.open_nursery() as dials:
                for provider in found[: self._policy.neighbours]:
                    dials.start_soon(self._ask, task.id, provider)

        try:
            async with trio.open_nursery() as nursery:
                if task.shared:
                    nursery.start_soon(look)
                if source is not None:
                    try:
                        info = await self._origin.head(source)
                    except (OriginError, NotPermitted) as error:
                        failure = error
                if info is None:
                    with trio.move_on_after(GIVE_UP_AFTER if task.shared else 0):
                        await lobby.heard.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._lobbies.pop(task.id, None)
        if info is None and lobby.geometry is None:
            await self._discovery.withdraw(task.id)
            raise failure or OriginUnreachable(
                f"no member of the swarm has {task.digest}, and there is no origin to read; give its URL, or wait for a holder"
            )
        return info, lobby.geometry, found

    async def _ask(self, task_id: bytes, provider: Provider) -> None:
        link = await self._dial(provider)
        if link is not None:
            link.post(wire.Ask(task_id))

    # --- finding members ----------------------------------------------------------------------------------------

    async def _seek(self, active: Active, found: list[Provider]) -> None:
        """Announce, connect, settle; then look for more members from time to time until the download is over."""
        if not active.shared:
            active.exchange.settle(trio.current_time())
            active.touch()
            return
        for link in self._links()[:GREETED_LINKS]:
            self._greet(active, link)
        found = [*found, *await self._discovery.announce(active.task.id, State.WANTS)]
        announced = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._connect_to, active, found)
            with trio.move_on_after(self._policy.settle_bound):
                await trio.sleep_until(announced + self._policy.settle)
                await self._first_answers(active)
            active.exchange.settle(trio.current_time())
            active.touch()
        intervals = iter(FIND_AGAIN)
        interval = FIND_AGAIN[0]
        while not active.done.is_set():
            interval = next(intervals, interval)
            with trio.move_on_after(interval):
                await active.done.wait()
            if not active.done.is_set() and len(active.exchange.neighbours) < self._policy.mesh:
                await self._connect_to(active, await self._discovery.find(active.task.id))

    async def _first_answers(self, active: Active) -> None:
        """Until everybody who was dialled or greeted has answered or failed."""
        while active.awaiting or active.members.dialling:
            active.joined = trio.Event()
            await active.joined.wait()

    async def _connect_to(self, active: Active, found: Iterable[Provider]) -> None:
        active.members.learn(found)
        async with trio.open_nursery() as nursery:
            for provider in active.members.to_dial(set(active.exchange.neighbours) | active.greeted):
                nursery.start_soon(self._join_with, active, provider)

    async def _join_with(self, active: Active, provider: Provider) -> None:
        active.members.dialling.add(provider.node_id)
        try:
            link = await self._dial(provider)
        finally:
            active.members.dialling.discard(provider.node_id)
        if link is None:
            active.members.failed(provider.node_id)
        else:
            self._greet(active, link)
        active.joined.set()

    async def _dial(self, provider: Provider) -> PeerLink | None:
        network = self._network
        if network is None or provider.node_id == self._membership.node_id or self._is_banned(provider.node_id):
            return None
        link = network.link(provider.node_id)
        if link is None and provider.state is State.WANTS and provider.node_id < self._membership.node_id:
            # It is likely to be dialling us at this very moment; two set-ups cost twice the CPU of one.
            await trio.sleep(DIAL_PATIENCE)
            link = network.link(provider.node_id)
        if link is not None:
            return link
        try:
            return await network.connect(provider.node_id, provider.control)
        except PeerError as error:
            log.debug("peer_unreachable", peer=provider.node_id.hex(), reason=str(error))
            return None

    def _links(self) -> list[PeerLink]:
        return list(self._network.links()) if self._network is not None else []

    def _greet(self, active: Active, link: PeerLink) -> None:
        if link.node_id in active.greeted or not active.shared:
            return
        active.greeted.add(link.node_id)
        active.awaiting.add(link.node_id)
        link.post(self._join_message(active, reply=True))

    def _join_message(self, active: Active, *, reply: bool) -> wire.Join:
        return active.exchange.join_message(
            reply=reply, complete=active.stored.complete, seal=active.seal, private=active.stored.private
        )

    # --- driving an exchange --------------------------------------------------------------------------------------

    async def _run_active(self, active: Active, found: list[Provider] | None) -> None:
        """Everything that goes on for one task; `found` is `None` where we only serve it."""
        async with trio.open_nursery() as nursery:
            active.nursery = nursery
            if found is not None:
                nursery.start_soon(self._seek, active, found)
            await self._drive(active, nursery)
            nursery.cancel_scope.cancel()
        self._close(active)

    async def _drive(self, active: Active, nursery: trio.Nursery) -> None:
        """Carry out what the exchange decides, until nobody needs the task any more."""
        exchange = active.exchange
        idle_since = trio.current_time()
        while True:
            now = trio.current_time()
            exchange.tick(now)
            for action in exchange.take_actions():
                self._act(active, action, nursery)
            if not active.done.is_set():
                if exchange.complete and not active.finishing:
                    active.finishing = True
                    nursery.start_soon(self._finish, active)
                else:
                    self._give_up_if_hopeless(active, now)
            if exchange.neighbours or not active.done.is_set():
                idle_since = now
            elif now - idle_since >= IDLE_SECONDS:
                return
            await self._sleep(active, min(exchange.next_deadline(), now + IDLE_SECONDS))

    @staticmethod
    async def _sleep(active: Active, until: float) -> None:
        with trio.move_on_at(until):
            await active.wake.wait()
        active.wake = trio.Event()

    def _give_up_if_hopeless(self, active: Active, now: float) -> None:
        """A download whose origin cannot be read and whose peers bring nothing ends in the origin's error."""
        if active.exchange.may_read_origin and active.origin_error is None:
            return
        if active.exchange.settled and now - active.last_byte >= GIVE_UP_AFTER:
            self._fail(
                active,
                active.origin_error
                or OriginUnreachable("no member of the swarm has the missing pieces, and the origin may not be read"),
            )

    def _act(self, active: Active, action: ex.Action, nursery: trio.Nursery) -> None:
        match action:
            case ex.Send(node_id, message, urgent):
                link = self._link(node_id)
                if link is not None:
                    link.post(message, urgent=urgent)
            case ex.Request(node_id, piece, spare):
                self._request(active, node_id, piece, spare)
            case ex.CancelRequest(node_id, piece):
                self._cancel(active, node_id, piece)
            case ex.ReadOrigin(piece, why):
                scope = active.reads[piece] = trio.CancelScope()
                reader = self._read_whole if piece == WHOLE else self._read_piece
                nursery.start_soon(self._read, active, piece, why, scope, reader)
            case ex.AbortOrigin(piece):
                aborted = active.reads.pop(piece, None)
                if aborted is not None:
                    aborted.cancel()
            case _:
                assert_never(action)

    def _link(self, node_id: NodeId) -> PeerLink | None:
        return self._network.link(node_id) if self._network is not None else None

    def _request(self, active: Active, node_id: NodeId, piece: int, spare: bool) -> None:
        link = self._link(node_id)
        if link is None:
            active.exchange.peer_left(node_id, trio.current_time())
            return
        self._request_id = (self._request_id + 1) & 0xFFFFFFFF
        self._pending[node_id, self._request_id] = Pending(active, piece)
        active.request_ids[node_id, piece] = self._request_id
        link.request(
            self._request_id,
            active.task.id,
            piece,
            0,
            active.geometry.size(piece),
            private=active.stored.private,
            spare=spare,
        )

    def _cancel(self, active: Active, node_id: NodeId, piece: int) -> None:
        request_id = active.request_ids.pop((node_id, piece), None)
        link = self._link(node_id)
        if request_id is None or link is None:
            return
        pending = self._pending.get((node_id, request_id))
        if pending is not None:
            pending.cancelled = True
            link.cancel(request_id)

    # --- reading the origin -----------------------------------------------------------------------------------------

    async def _read(
        self,
        active: Active,
        piece: int,
        why: Why,
        scope: trio.CancelScope,
        reader: Callable[[Active, int], Awaitable[None]],
    ) -> None:
        """One origin read with every way it can end."""
        now = trio.current_time
        try:
            with scope:
                await reader(active, piece)
                active.origin_error = None
        except (ContentChanged, StoreError) as error:
            self._fail(active, error)
        except (OriginError, NotPermitted) as error:
            active.origin_error = error
            log.info("origin_read_failed", task=active.task.short, piece=piece, reason=str(error))
            active.exchange.origin_failed(piece, now(), pause=ORIGIN_PAUSE)
            if not active.exchange.neighbours:
                self._fail(active, error)
        finally:
            if active.reads.get(piece) is scope:
                del active.reads[piece]
            if piece == WHOLE:
                active.exchange.whole_read_done()
            active.touch()

    async def _read_piece(self, active: Active, piece: int) -> None:
        """Read one piece by range, going on where a broken read stopped."""
        geometry = active.geometry
        start, size = geometry.offset(piece), geometry.size(piece)
        cutter = PieceCutter(geometry, start)
        begun = trio.current_time()
        source = active.source
        if source is None:
            raise OriginUnreachable("there is no origin to read")
        for attempt in range(ORIGIN_ATTEMPTS):
            try:
                async with self._origin.read(source, cutter.position, start + size, expect=active.info) as body:
                    if body.start != cutter.position:
                        await self._without_ranges(active, piece, body)
                        return
                    async for chunk in body.chunks():
                        for done, data, digest in cutter.feed(chunk):
                            self._piece_read(active, done, data, digest, trio.current_time() - begun)
                        reading = active.exchange.reading.get(piece)
                        if reading is not None:
                            reading.done = (cutter.position - start) / size
                if active.exchange.held[piece]:
                    return
            except OriginUnreachable:
                if attempt + 1 == ORIGIN_ATTEMPTS:
                    raise
        raise OriginUnreachable(f"the origin sent {cutter.position - start} of {size} bytes of a piece")

    async def _without_ranges(self, active: Active, piece: int, body: OriginBody) -> None:
        """The origin sends everything although one piece was asked for: alone we take it, else one of us is to read."""
        active.exchange.origin_has_no_ranges(piece)
        if not active.exchange.neighbours:
            await self._take_all(active, body.chunks(), PieceCutter(active.geometry, body.start))

    async def _read_whole(self, active: Active, _piece: int) -> None:
        """Read everything from the first missing piece on, in one request."""
        geometry = active.geometry
        source = active.source
        if source is None:
            raise OriginUnreachable("there is no origin to read")
        first = next(pieces.indices(active.exchange.missing()), 0)
        start = geometry.offset(first) if active.info is not None and active.info.ranges else 0
        async with self._origin.read(source, start, None, expect=active.info) as body:
            await self._take_all(active, body.chunks(), PieceCutter(geometry, body.start))
        if not active.exchange.complete:
            raise OriginUnreachable("the origin sent less than it announced")

    async def _take_all(self, active: Active, chunks: AsyncIterator[bytes], cutter: PieceCutter) -> None:
        begun = trio.current_time()
        async for chunk in chunks:
            for done, data, digest in cutter.feed(chunk):
                self._piece_read(active, done, data, digest, trio.current_time() - begun)
                begun = trio.current_time()

    def _piece_read(self, active: Active, piece: int, data: memoryview, digest: bytes, took: float) -> None:
        """A whole piece came from the origin: prove it, write it, tell."""
        size = len(data)
        active.from_origin += size
        self.totals.bytes_from_origin += size
        self.totals.pieces_from_origin += 1
        reading = active.exchange.reading.get(piece) or active.exchange.reading.get(WHOLE)
        if reading is not None:
            self.totals.why_origin[str(reading.why)] += 1
        if not active.exchange.held[piece]:
            proof = proofs.prove(self._membership, active.task.id, active.geometry, piece, digest, int(self._wall_clock()))
            active.stored.write_piece(piece, data, digest, proof)
        active.signers[piece] = self._membership.public_key
        now = active.last_byte = trio.current_time()
        active.exchange.piece_verified(piece, None, now, took=took)
        active.touch()

    async def _read_unknown_length(self, task: Task, source: Source, info: OriginInfo, request: FetchRequest) -> Active:
        """Content of unknown length: one member reads it whole, then it is a task like any other; the rest wait for its `Join`.

        Who reads is decided by rendezvous over the members that want it; the next in order takes over when it has heard
        no claim of a reader for a while.
        """
        lobby = self._lobbies.setdefault(task.id, Lobby())
        try:
            if task.shared:
                await self._wait_for_a_reader(task, lobby)
            if lobby.geometry is not None:
                geometry = lobby.geometry
                stored = await self._store.create(task, geometry, tag=request.tag, application=request.application)
                active = self._make_active(task, stored, source, replace(info, length=geometry.length))
            else:
                active = await self._spool(task, source, info, request, lobby)
        finally:
            self._lobbies.pop(task.id, None)
        self._active[task.id] = active
        if self._nursery is None:
            raise Interrupted("the daemon is stopping")
        for node_id in lobby.asked:
            link = self._link(node_id)
            if link is not None:
                link.post(self._join_message(active, reply=True))
        self._nursery.start_soon(self._run_active, active, [])
        return active

    async def _wait_for_a_reader(self, task: Task, lobby: Lobby) -> None:
        """Return when the geometry is known, or when it is our turn to read."""
        found = await self._discovery.announce(task.id, State.WANTS)
        for link in self._links()[:GREETED_LINKS]:
            link.post(wire.Ask(task.id))
        async with trio.open_nursery() as dials:
            for provider in found[: self._policy.neighbours]:
                dials.start_soon(self._ask, task.id, provider)
            with trio.move_on_after(self._policy.settle):
                await lobby.heard.wait()
        me = self._membership.node_id
        rivals = [me, *(provider.node_id for provider in found if provider.node_id != me)]
        rank = sorted(rivals, key=lambda node_id: score(node_id, task.id, WHOLE), reverse=True).index(me)
        patience = rank * self._policy.progress_lease_small
        lobby.quiet_since = trio.current_time()
        while lobby.geometry is None and (left := lobby.quiet_since + patience - trio.current_time()) > 0:
            with trio.move_on_after(left):
                await lobby.heard.wait()

    async def _spool(self, task: Task, source: Source, info: OriginInfo, request: FetchRequest, lobby: Lobby) -> Active:
        """Read all of it to a nameless file, claiming it again and again; then cut it into pieces."""
        length = 0
        with tempfile.TemporaryFile(dir=self._spool_dir) as spool:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._claim_whole, task, lobby)
                async with self._origin.read(source, 0, None, expect=info) as body:
                    async for chunk in body.chunks():
                        try:
                            spool.write(chunk)
                        except OSError as error:
                            raise NoSpace(f"cannot keep content of unknown length: {error.strerror}") from error
                        length += len(chunk)
                nursery.cancel_scope.cancel()
            geometry = Geometry.of(length)
            stored = await self._store.create(
                task, geometry, private=not task.shared, tag=request.tag, application=request.application
            )
            active = self._make_active(task, stored, source, replace(info, length=geometry.length))
            active.exchange.reading[WHOLE] = Reading(active.started, 0.0, Why.STREAM)
            cutter = PieceCutter(geometry, 0)
            spool.seek(0)
            while chunk := spool.read(SPOOL_CHUNK_BYTES):
                for piece, data, digest in cutter.feed(chunk):
                    self._piece_read(active, piece, data, digest, 0.0)
                await trio.lowlevel.checkpoint()
            active.exchange.whole_read_done()
            return active

    async def _claim_whole(self, task: Task, lobby: Lobby) -> None:
        """Keep those who wait from reading too."""
        nothing = Geometry(0, MIN_PIECE_BYTES)
        while True:
            claim = self._sign_claim(task.id, nothing, WHOLE, 2 * CLAIM_WHOLE_EVERY)
            for node_id in lobby.asked:
                link = self._link(node_id)
                if link is not None:
                    link.post(wire.Claims(task.id, [claim]))
            await trio.sleep(CLAIM_WHOLE_EVERY)

    # --- finishing -------------------------------------------------------------------------------------------------

    async def _finish(self, active: Active) -> None:
        """Every wanted piece is here: check the content digest, complete, seal and say so."""
        try:
            if active.whole_content and active.stored.held.all():
                algorithm = active.task.digest.algorithm if active.task.digest is not None else "sha256"
                digest = await active.stored.content_digest(algorithm)
                if active.task.digest is not None and digest != active.task.digest:
                    await self._find_liars(active, digest)
                    active.finishing = False
                    active.touch()
                    return
                if active.task.digest is None and not await self._agreed(active, digest):
                    active.finishing = False
                    active.touch()
                    return
                await active.stored.complete_with(digest)
                self._seal(active, digest)
            active.finished = trio.current_time()
            active.done.set()
            if active.shared and active.stored.complete:
                await self._discovery.announce(active.task.id, State.COMPLETE)
        except SwarmError as error:
            self._fail(active, error)

    def _seal(self, active: Active, digest: Digest) -> None:
        table = proofs.table_of(active.stored.piece_digest(piece) for piece in range(active.geometry.piece_count))
        active.seal = proofs.seal(self._membership, active.task.id, active.geometry, digest, table, int(self._wall_clock()))
        for node_id in active.exchange.neighbours:
            link = self._link(node_id)
            if link is not None:
                link.post(wire.SealOffer(active.task.id, active.seal), urgent=False)

    async def _agreed(self, active: Active, digest: Digest) -> bool:
        """Whether nobody honest says the content is another one; the origin settles each difference.

        Without a known digest members are trusted with what they sign, so a statement that differs from ours is looked
        into: the first piece in which the sealer's table differs is read from the origin, and whoever is wrong is banned.
        """
        for node_id, body in list(active.seals.items()):
            theirs = Digest.parse(body.content_digest)
            if theirs == digest or theirs.algorithm != digest.algorithm or active.source is None:
                continue
            table = await self._fetch_table(active, node_id, body)
            if table is None:
                continue
            ours = [active.stored.piece_digest(piece) for piece in range(active.geometry.piece_count)]
            different = [piece for piece, own in enumerate(ours) if own != table[piece]]
            if not different:
                self._ban_signer(active, active.members.key_of(node_id))  # Its own table does not add up to its digest.
                continue
            truth = await self._origin_digest(active, different[0])
            if truth != table[different[0]]:
                self._ban_signer(active, active.members.key_of(node_id))
            if truth != ours[different[0]]:
                signer = active.signers.get(different[0])
                wrong = [piece for piece in different if active.signers.get(piece) == signer]
                if signer is not None and signer != self._membership.public_key:
                    self._ban_signer(active, signer)
                self._drop(active, wrong)
                return False
        return True

    async def _fetch_table(self, active: Active, node_id: NodeId, body: wire.SealBody) -> list[bytes] | None:
        """The sealer's table of piece digests, checked against its seal; `None` if it does not come."""
        link = self._link(node_id)
        if link is None:
            return None
        self._request_id = (self._request_id + 1) & 0xFFFFFFFF
        pending = Pending(active, wire.SEAL_TABLE, expected=body.root)
        pending.answered = trio.Event()
        self._pending[node_id, self._request_id] = pending
        size = active.geometry.piece_count * proofs.DIGEST_BYTES
        link.request(self._request_id, active.task.id, wire.SEAL_TABLE, 0, size, private=active.stored.private)
        with trio.move_on_after(GIVE_UP_AFTER):
            await pending.answered.wait()
        if pending.table is None:
            return None
        return proofs.split_table(pending.table, body.root, active.geometry.piece_count)

    def _drop(self, active: Active, wrong: list[int]) -> None:
        """Forget pieces that turned out wrong, and want them again."""
        active.stored.drop_pieces(wrong)
        for piece in wrong:
            active.signers.pop(piece, None)
        active.exchange.piece_lost(wrong, trio.current_time())

    async def _find_liars(self, active: Active, digest: Digest) -> None:
        """The content digest does not match: read one piece per signer from the origin, drop what liars vouched for.

        Raises:
            DigestMismatch: Nobody else vouched for anything: the origin itself has other content.
        """
        self.totals.lies += 1
        mine = self._membership.public_key
        by_signer: dict[bytes, list[int]] = {}
        for piece in range(active.geometry.piece_count):
            proof = active.stored.proof(piece)
            signer = active.signers.get(piece) or (proof.key if proof is not None else b"")
            if signer != mine:
                by_signer.setdefault(signer, []).append(piece)
        mismatch = DigestMismatch(
            f"the content is {digest}, not {active.task.digest}: the origin has other content than was asked for"
        )
        if not by_signer or active.source is None:
            active.stored.drop_pieces(range(active.geometry.piece_count))
            raise mismatch
        wrong: list[int] = []
        if not active.strict:
            for signer, vouched in by_signer.items():
                sample = self._rng.choice(vouched)
                if await self._origin_digest(active, sample) != active.stored.piece_digest(sample):
                    self._ban_signer(active, signer)
                    wrong += vouched
        if not wrong:
            # The samples were good: somebody lied about single pieces.  From here on only the origin is believed.
            active.strict = True
            wrong = [piece for vouched in by_signer.values() for piece in vouched]
        log.warning("content_digest_mismatch", task=active.task.short, dropped=len(wrong))
        self._drop(active, wrong)
        if active.strict:
            active.exchange.dispute(wrong)

    async def _origin_digest(self, active: Active, piece: int) -> bytes:
        geometry = active.geometry
        start = geometry.offset(piece)
        source = active.source
        if source is None:
            raise OriginUnreachable("there is no origin to read")
        cutter = PieceCutter(geometry, start)
        async with self._origin.read(source, start, start + geometry.size(piece), expect=active.info) as body:
            if body.start != start:
                cutter = PieceCutter(geometry, body.start)
            async for chunk in body.chunks():
                for done, data, digest in cutter.feed(chunk):
                    self.totals.bytes_from_origin += len(data)
                    active.from_origin += len(data)
                    active.exchange.why_origin[Why.DISPUTE] += 1
                    self.totals.why_origin[str(Why.DISPUTE)] += 1
                    if done == piece:
                        return digest
        raise OriginUnreachable("the origin sent less than a piece")

    def _fail(self, active: Active, error: SwarmError) -> None:
        """End the download; verified pieces stay in the store for the next attempt."""
        if active.done.is_set():
            return
        active.error = error
        active.done.set()
        self._close(active)
        if active.shared and self._nursery is not None:
            self._nursery.start_soon(self._discovery.withdraw, active.task.id)

    def _close(self, active: Active) -> None:
        """Leave the task: links stay, the store entry is no longer in use."""
        if self._active.get(active.task.id) is active:
            del self._active[active.task.id]
        if active.nursery is not None:
            active.nursery.cancel_scope.cancel()
        for node_id in list(active.exchange.neighbours):
            link = self._link(node_id)
            if link is not None:
                link.post(wire.Leave(active.task.id), urgent=False)
        for (node_id, piece), _request_id in list(active.request_ids.items()):
            self._cancel(active, node_id, piece)
        active.stored.close()
        if not active.done.is_set():
            active.error = active.error or Interrupted("the daemon is stopping")
            active.done.set()

    # --- edges.PeerEvents ----------------------------------------------------------------------------------------------

    def link_up(self, link: PeerLink) -> None:
        if self._is_banned(link.node_id):
            link.drop("banned")
            return
        for active in self._active.values():
            # Either it dialled us for this task, or the connection was replaced and both sides start anew.
            if not active.done.is_set() and active.members.knows(link.node_id):
                self._greet(active, link)

    def link_down(self, link: PeerLink, reason: str) -> None:
        now = trio.current_time()
        gone = link.node_id
        for key in [key for key in self._pending if key[0] == gone]:
            pending = self._pending.pop(key)
            if pending.answered is not None:
                pending.answered.set()
            pending.active.request_ids.pop((gone, pending.piece), None)
        for active in self._active.values():
            active.greeted.discard(gone)
            self._answered(active, gone)
            if gone in active.exchange.neighbours:
                active.exchange.peer_left(gone, now)
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
            lobby = self._lobbies.get(message.task)
            if lobby is not None and isinstance(message, wire.Claims):
                self._somebody_reads(lobby, message)
            return
        now = trio.current_time()
        node_id = link.node_id
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
                self._answered(active, node_id)
                active.exchange.peer_left(node_id, now)
            case wire.Peers(_, records):
                self._introduced(active, records)
            case _:
                assert_never(message)
        active.touch()

    def _answered(self, active: Active, node_id: NodeId) -> None:
        active.awaiting.discard(node_id)
        active.joined.set()

    def _somebody_reads(self, lobby: Lobby, message: wire.Claims) -> None:
        for signed in message.claims:
            with suppress(IntegrityError, NotAMember):
                body = self._membership.verify("claim", signed, wire.ClaimBody)
                if body.task == message.task and body.piece == WHOLE:
                    lobby.quiet_since = trio.current_time()

    def _asked(self, link: PeerLink, task_id: bytes) -> None:
        lobby = self._lobbies.get(task_id)
        if lobby is not None and len(lobby.asked) < MAX_LOBBY:
            lobby.asked.add(link.node_id)
        active = self._active.get(task_id) or self._seed(task_id)
        if active is None or not active.shared:
            link.post(wire.Leave(task_id))
        else:
            link.post(self._join_message(active, reply=False))

    def _joined(self, link: PeerLink, join: wire.Join) -> None:
        lobby = self._lobbies.get(join.task)
        if lobby is not None and lobby.geometry is None:
            lobby.geometry = self._checked_geometry(join)
            lobby.heard.set()
        active = self._active.get(join.task) or self._seed(join.task)
        if active is None or not active.shared:
            if join.reply:
                link.post(wire.Leave(join.task))
            return
        if (join.length, join.piece_length) != (active.geometry.length, active.geometry.piece_length):
            link.post(wire.Leave(join.task))
            self._answered(active, link.node_id)
            return
        newcomer = link.node_id not in active.exchange.neighbours
        active.exchange.peer_joined(link.node_id, join, trio.current_time())
        active.greeted.add(link.node_id)
        if join.seal is not None:
            self._sealed(active, link, join.seal)
        if join.reply:
            link.post(self._join_message(active, reply=False))
        if newcomer:
            known = active.members.records(link.node_id, self._rng)
            if known:
                link.post(wire.Peers(join.task, known), urgent=False)
        self._answered(active, link.node_id)
        active.touch()

    @staticmethod
    def _checked_geometry(join: wire.Join) -> Geometry:
        geometry = Geometry.of(join.length)
        if geometry.piece_length != join.piece_length:
            raise RemoteProtocolError("a join with a piece length nobody derives")
        return geometry

    def _introduced(self, active: Active, records: list[bytes]) -> None:
        found = [
            provider for record in records if (provider := self._discovery.read_record(record, active.task.id)) is not None
        ]
        if found and not active.done.is_set() and active.nursery is not None:
            active.nursery.start_soon(self._connect_to, active, found)

    def _claimed(self, active: Active, link: PeerLink, message: wire.Claims, now: float) -> None:
        """Check each claim's signature before it counts for or against anybody."""
        fresh: dict[NodeId, list[wire.Signed]] = {}
        for signed in message.claims:
            if active.members.claim_seen(signed.signature):
                continue
            try:
                body = self._membership.verify("claim", signed, wire.ClaimBody)
            except NotAMember:
                # Relayed from somebody we have not met; it counts when it comes again after we have.
                active.members.forget_claim(signed.signature)
                continue
            except IntegrityError as error:
                raise RemoteProtocolError("a claim with a bad signature") from error
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
            body = proofs.check_seal(self._membership, seal, active.task.id, active.geometry)
        except (IntegrityError, NotAMember) as error:
            raise RemoteProtocolError(f"a bad seal: {error}") from error
        if seal.key != link.public_key:
            raise RemoteProtocolError("a seal of somebody else was offered")
        active.seals[link.node_id] = body
        active.members.remember_key(link.node_id, link.public_key)
        active.exchange.peer_complete(link.node_id, trio.current_time())

    def piece_started(self, link: PeerLink, started: Started) -> bool:
        pending = self._pending.get((link.node_id, started.request_id))
        if pending is None:
            return False
        active = pending.active
        if pending.piece == wire.SEAL_TABLE:
            return started.length == active.geometry.piece_count * proofs.DIGEST_BYTES
        if started.length != active.geometry.size(pending.piece) or started.proof is None:
            self._blame(active, link, "a piece without a proof, or of the wrong length")
            return False
        try:
            if started.certificate:
                self._membership.learn(started.certificate)
            if started.proof.key in active.banned:
                raise IntegrityError("vouched for by a member that lied")
            pending.expected = proofs.check_proof(
                self._membership, started.proof, active.task.id, active.geometry, pending.piece
            )
        except NotAMember:
            # The signer was revoked or ran out, and the sender may not know yet: its bytes are passed over, without blame.
            return True
        except (IntegrityError, RemoteProtocolError) as error:
            self._blame(active, link, str(error))
            return False
        pending.proof = started.proof
        now = pending.started = trio.current_time()
        if not pending.cancelled:
            active.exchange.piece_started(link.node_id, pending.piece, now)
            active.touch()
        return True

    def piece_received(self, link: PeerLink, request_id: int, digest: bytes, data: memoryview) -> None:
        pending = self._pending.pop((link.node_id, request_id), None)
        if pending is None:
            return
        active = pending.active
        if pending.answered is not None:
            if digest == pending.expected:
                pending.table = bytes(data)
            pending.answered.set()
            return
        size = active.geometry.size(pending.piece)
        traffic = active.traffic.setdefault(link.node_id, Traffic())
        traffic.received += size
        active.request_ids.pop((link.node_id, pending.piece), None)
        if pending.expected is None:
            active.exchange.piece_failed(link.node_id, pending.piece, trio.current_time(), status=wire.NOT_HELD)
            active.touch()
            return
        if digest != pending.expected:
            self._blame(active, link, "bytes that do not match the proof sent with them")
            link.drop("bytes do not match their proof")
            return
        now = trio.current_time()
        if active.done.is_set() or active.exchange.held[pending.piece]:
            self.totals.pieces_wasted += 1
            active.exchange.piece_failed(link.node_id, pending.piece, now, status=wire.CANCELLED, gone=True)
            active.touch()
            return
        try:
            active.stored.write_piece(pending.piece, data, digest, pending.proof)
        except StoreError as error:
            self._fail(active, error)
            return
        if pending.proof is not None:
            active.signers[pending.piece] = pending.proof.key
        active.from_peers += size
        active.last_byte = now
        self.totals.bytes_from_peers += size
        self.totals.pieces_from_peers += 1
        active.exchange.piece_verified(pending.piece, link.node_id, now, took=now - pending.started)
        active.touch()

    def piece_failed(self, link: PeerLink, request_id: int, status: int) -> None:
        pending = self._pending.pop((link.node_id, request_id), None)
        if pending is None:
            return
        active = pending.active
        active.request_ids.pop((link.node_id, pending.piece), None)
        active.exchange.piece_failed(link.node_id, pending.piece, trio.current_time(), status=status, gone=pending.cancelled)
        active.touch()

    # --- edges.UploadSource ----------------------------------------------------------------------------------------------

    def serve(self, node_id: NodeId, request: wire.Request, *, encrypted: bool) -> Served | int:
        active = self._active.get(request.task) or self._seed(request.task)
        if active is None:
            return wire.NOT_HELD
        stored = active.stored
        if not active.shared or (stored.private and (not encrypted or self._membership.is_open)):
            return wire.REFUSED
        if request.piece == wire.SEAL_TABLE:
            return self._serve_table(stored, request)
        if request.piece >= stored.geometry.piece_count or request.offset or not stored.held[request.piece]:
            return wire.NOT_HELD
        if request.length != stored.geometry.size(request.piece):
            return wire.REFUSED
        proof, certificate = self._voucher(active, request.piece)
        if proof is None:
            return wire.NOT_HELD
        body = stored.slice(request.piece, 0, request.length)
        if body is None:
            return wire.NOT_HELD
        return Served(body, proof, certificate)

    @staticmethod
    def _serve_table(stored: StoredTask, request: wire.Request) -> Served | int:
        if not stored.complete:
            return wire.NOT_HELD
        table = proofs.table_of(stored.piece_digest(piece) for piece in range(stored.geometry.piece_count))
        stop = request.offset + request.length
        return Served(table[request.offset : stop]) if stop <= len(table) else wire.REFUSED

    def _voucher(self, active: Active, piece: int) -> tuple[wire.Signed | None, bytes]:
        """Who vouches for this piece: its first reader while a valid member, else we, once we verified all of it."""
        proof = active.stored.proof(piece)
        if proof is not None:
            certificate = self._membership.certificate_of(proof.key)
            if certificate is not None:
                return proof, certificate
        digest = active.stored.piece_digest(piece)
        if not active.stored.complete or digest is None:
            return None, b""
        own = proofs.prove(self._membership, active.task.id, active.geometry, piece, digest, int(self._wall_clock()))
        return own, self._membership.certificate

    def replication(self, task_id: bytes, piece: int) -> int:
        active = self._active.get(task_id)
        return active.exchange.replication(piece) if active is not None and 0 <= piece < len(active.exchange.counts) else 0

    def held_by(self, task_id: bytes, node_id: NodeId) -> int:
        active = self._active.get(task_id)
        return active.exchange.held_by(node_id) if active is not None else 0

    def uploaded(self, node_id: NodeId, request: wire.Request, sent: int) -> None:
        self.totals.bytes_to_peers += sent
        active = self._active.get(request.task)
        if active is None or request.piece < 0:
            return
        active.traffic.setdefault(node_id, Traffic()).sent += sent
        if sent == active.geometry.size(request.piece):
            self.totals.pieces_to_peers += 1
            active.exchange.piece_uploaded(node_id, request.piece, trio.current_time())
            active.touch()

    def _seed(self, task_id: bytes) -> Active | None:
        """Open a task of the store because somebody asks for it."""
        if self._nursery is None or self._draining or len(self._active) >= MAX_SEEDED_AT_ONCE or task_id in self._opening:
            return None
        stored = self._store.open(task_id)
        if stored is None:
            return None
        if stored.private or not stored.complete:
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

    # --- blame -----------------------------------------------------------------------------------------------------------

    def _blame(self, active: Active, link: PeerLink, reason: str) -> None:
        """This link's node sent what it cannot answer for."""
        self.totals.pieces_bad += 1
        log.info("peer_blamed", task=active.task.short, peer=link.node_id.hex(), reason=reason)
        self._ban(link.node_id)
        active.exchange.peer_left(link.node_id, trio.current_time())
        active.touch()

    def _ban_signer(self, active: Active, signer: bytes) -> None:
        active.banned.add(signer)
        liar = active.members.id_of(signer)
        self._ban(liar)
        link = self._link(liar)
        if link is not None:
            link.drop("it vouched for wrong bytes")
        active.exchange.peer_left(liar, trio.current_time())

    def _ban(self, node_id: NodeId) -> None:
        """Keep away from a node for a growing time."""
        now = trio.current_time()
        _, last = self._bans.pop(node_id, (0.0, BAN_SECONDS / 2))
        seconds = min(2 * last, MAX_BAN_SECONDS)
        while len(self._bans) >= MAX_BANS:
            del self._bans[next(iter(self._bans))]
        self._bans[node_id] = (now + seconds, seconds)
        self.totals.bans += 1

    def _is_banned(self, node_id: NodeId) -> bool:
        until, _ = self._bans.get(node_id, (0.0, 0.0))
        return until > trio.current_time()

    def _pieces_lost(self, active: Active, lost: list[int]) -> None:
        """The store found rotten pieces."""
        active.exchange.piece_lost(lost, trio.current_time())
        active.touch()

    async def _evicting(self, task_id: bytes) -> None:
        active = self._active.get(task_id)
        if active is not None:
            self._close(active)
        with suppress(PeerError):
            await self._discovery.withdraw(task_id)

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
