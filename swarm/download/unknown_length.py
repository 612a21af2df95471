"""Tasks whose length is not known yet: from the origin, from members, or by reading all of it.

A *lobby* is open while a task waits for its geometry; members are asked for theirs, and who asks us is told when we know.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from swarm import wire
from swarm.download.active import GREETED_LINKS, Parts
from swarm.download.claims import WHOLE, score
from swarm.download.meeting import Meeting
from swarm.edges import NodeId, OriginInfo, PeerLink, Provider, Source, State
from swarm.errors import IntegrityError, NoSpace, NotAMember, NotPermitted, OriginError, OriginUnreachable, RemoteProtocolError
from swarm.identity import node_id_of
from swarm.task import MIN_PIECE_BYTES, Geometry, Task

INFINITY = float("inf")

MAX_LOBBY = 256
"""Members remembered as waiting with us; the others find us when we are announced."""

CLAIM_WHOLE_EVERY = 1.0
"""Seconds between claims of the one who reads content of unknown length."""

QUIET_SECONDS = 2 * CLAIM_WHOLE_EVERY
"""Without a claim for so long nobody reads."""

READER_PATIENCE = 300.0
MAX_READERS = 3
"""Seconds for which claims of one reader are waited for, and readers waited for one after another: nobody can tell a long read
from a promise without end."""

VOTE_SECONDS = 0.25
"""After the first answer, for others to say the same or something else."""

GEOMETRY_PATIENCE = 15.0
"""Seconds to wait for a member that knows the geometry where the origin does not say it."""


@dataclass(slots=True)
class Lobby:
    """Waiting for somebody who knows the geometry of a task whose length is not known here."""

    heard: trio.Event = field(default_factory=trio.Event)
    told: dict[Geometry, dict[NodeId, None]] = field(default_factory=dict)
    """What members say the geometry is, and who; each has one vote."""
    guests: dict[NodeId, None] = field(default_factory=dict)
    """Who asked us meanwhile, or was asked: they are told when the geometry is known."""
    awaiting: set[NodeId] = field(default_factory=set)
    """Who was asked, and has neither answered nor gone."""
    hopeless: bool = False
    """We cannot find out by ourselves, so nobody is to wait for us."""
    looked: bool = False
    """Every member we know of was asked."""
    changed: trio.Event = field(default_factory=trio.Event)
    quiet_since: float = -INFINITY
    """When a claim of a reader was heard last, or we began to read."""
    readers: dict[bytes, tuple[float, int]] = field(default_factory=dict)
    """Whose claims of the whole were heard: since when, and the last number."""
    claim: wire.Signed | None = None
    """Ours, while we read."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Of our read."""

    @property
    def geometry(self) -> Geometry | None:
        """What most say; the first one of those that as many say."""
        return max(self.told, key=lambda geometry: len(self.told[geometry]), default=None)

    @property
    def tellers(self) -> tuple[NodeId, ...]:
        """Who said so."""
        return tuple(self.told.get(self.geometry, ())) if self.geometry is not None else ()

    def tell(self, node_id: NodeId, geometry: Geometry) -> None:
        """A member says what the geometry is."""
        if sum(map(len, self.told.values())) < MAX_LOBBY and not any(node_id in voters for voters in self.told.values()):
            self.told.setdefault(geometry, {})[node_id] = None
        self.heard.set()
        self.gone(node_id)

    def meet(self, node_id: NodeId) -> None:
        if len(self.guests) < MAX_LOBBY:
            self.guests[node_id] = None

    def gone(self, node_id: NodeId) -> None:
        """It does not know either, or went away."""
        self.awaiting.discard(node_id)
        self.changed.set()

    def somebody_reads(self, key: bytes, seq: int, now: float) -> bool:
        """A claim of the whole, whose signature was checked.  Returns whether it counts; one heard before does not."""
        known = self.readers.get(key)
        if known is None and len(self.readers) >= MAX_READERS:
            return False
        since, last = known or (now, -1)
        if seq <= last:
            return False
        self.readers[key] = since, seq
        if now - since > READER_PATIENCE:
            return False
        self.quiet_since = now
        return True

    async def wait_for_members(self) -> None:
        """Until the geometry is known, or nobody is left who might tell it.

        Some time for others after the first: one liar is not to have the last word too.
        """
        while not self.told and (self.awaiting or not self.looked):
            await self._change()
        with trio.move_on_after(VOTE_SECONDS):
            while self.awaiting or not self.looked:
                await self._change()

    async def _change(self) -> None:
        self.changed = trio.Event()
        await self.changed.wait()


class Lobbies:
    """The open lobbies, by task id."""

    def __init__(self, parts: Parts, meeting: Meeting) -> None:
        self._parts = parts
        self._meeting = meeting
        self._lobbies: dict[bytes, Lobby] = {}

    def __len__(self) -> int:
        return len(self._lobbies)

    async def find_geometry(self, task: Task, source: Source | None) -> tuple[OriginInfo | None, Lobby, list[Provider]]:
        """Ask the origin and the members for the length of a blob at the same time; the origin's word counts.

        Raises:
            OriginError, NotPermitted: The origin failed and no member knows the task.
        """
        lobby = self._lobbies[task.id] = Lobby(hopeless=source is None)
        found: list[Provider] = []
        info: OriginInfo | None = None
        failure: OriginError | NotPermitted | None = None
        try:
            async with trio.open_nursery() as nursery:
                if task.shared:
                    nursery.start_soon(self._ask_members, task.id, lobby, found)
                if source is not None:
                    try:
                        info = await self._parts.origin.head(source)
                    except (OriginError, NotPermitted) as error:
                        failure = error
                        lobby.hopeless = True
                        self.dismiss(task.id, lobby)
                if info is None and task.shared:
                    with trio.move_on_after(GEOMETRY_PATIENCE):
                        await lobby.wait_for_members()
                nursery.cancel_scope.cancel()
        finally:
            del self._lobbies[task.id]
        if info is None and lobby.geometry is None:
            self.dismiss(task.id, lobby)
            raise failure or OriginUnreachable(
                f"no member of the swarm has {task.digest}, and there is no origin to read; give its URL, or wait for a holder"
            )
        return info, lobby, found

    def dismiss(self, task_id: bytes, lobby: Lobby) -> None:
        """Tell who waits for us not to."""
        for node_id in lobby.guests:
            link = self._parts.link(node_id)
            if link is not None:
                link.post(wire.Leave(task_id))

    async def read(self, task: Task, source: Source, info: OriginInfo, spool: Spool) -> Lobby:
        """Content of unknown length: one member reads it whole, then it is a task like any other; the rest wait for its `Join`.

        Who reads is decided by rendezvous over the members that want it; the next in order takes over when it has heard
        no claim of a reader for a while.

        Returns:
            The lobby, closed: with a geometry if a member told it; without, all of the content is in `spool`.

        Raises:
            OriginError, NotPermitted, NoSpace: It could not be read.
        """
        lobby = self._lobbies[task.id] = Lobby()
        try:
            rank = await self._rank(task, lobby) if task.shared else 0
            while True:
                await self._wait_for_a_reader(lobby, rank)
                if lobby.geometry is not None:
                    return lobby
                if await self._read_all(task, source, info, spool, lobby):
                    lobby.told.clear()  # what somebody told meanwhile counts less than what we read
                    return lobby
                rank = max(1, rank)
        except BaseException:
            self.dismiss(task.id, lobby)
            raise
        finally:
            del self._lobbies[task.id]

    async def _read_all(self, task: Task, source: Source, info: OriginInfo, spool: Spool, lobby: Lobby) -> bool:
        """`False`: somebody who goes before us had begun at the same moment, and goes on."""
        failure: OriginError | NotPermitted | NoSpace | None = None
        whole = False
        spool.clear()
        async with trio.open_nursery() as nursery:
            lobby.scope = nursery.cancel_scope
            lobby.quiet_since = trio.current_time()
            nursery.start_soon(self._claim_whole, task, lobby)
            try:
                async with self._parts.origin.read(source, 0, None, expect=info) as body:
                    async for chunk in body.chunks():
                        spool.write(chunk)
                whole = True
            except (OriginError, NotPermitted, NoSpace) as error:
                failure = error  # raised outside, or the nursery would wrap it in a group
            nursery.cancel_scope.cancel()
        lobby.claim = None
        if failure is not None:
            raise failure
        return whole

    async def _rank(self, task: Task, lobby: Lobby) -> int:
        """Ask the members we find; how many of them go before us."""
        found: list[Provider] = []
        async with trio.open_nursery() as nursery:
            await self._ask_members(task.id, lobby, found)
            with trio.move_on_after(self._parts.policy.settle):
                await lobby.heard.wait()
            nursery.cancel_scope.cancel()
        lobby.quiet_since = max(lobby.quiet_since, trio.current_time() - QUIET_SECONDS)
        me = self._parts.me
        rivals = [me, *(provider.node_id for provider in found if provider.node_id != me)]
        return sorted(rivals, key=lambda node_id: score(node_id, task.id, WHOLE), reverse=True).index(me)

    async def _wait_for_a_reader(self, lobby: Lobby, rank: int) -> None:
        """Return when the geometry is known, or when it is our turn to read: nobody has claimed it for a while."""
        begun = trio.current_time()
        stagger = rank * self._parts.policy.progress_lease_small
        while lobby.geometry is None:
            left = max(begun, lobby.quiet_since + QUIET_SECONDS) + stagger - trio.current_time()
            if left <= 0:
                return
            with trio.move_on_after(left):
                await lobby.heard.wait()

    async def _ask_members(self, task_id: bytes, lobby: Lobby, found: list[Provider]) -> None:
        for link in self._parts.links()[:GREETED_LINKS]:
            self._ask(task_id, lobby, link)
        found.extend(await self._parts.discovery.announce(task_id, State.WANTS))
        async with trio.open_nursery() as dials:
            for provider in found[: self._parts.policy.neighbours]:
                dials.start_soon(self._dial_and_ask, task_id, lobby, provider)
        lobby.looked = True
        lobby.changed.set()

    async def _dial_and_ask(self, task_id: bytes, lobby: Lobby, provider: Provider) -> None:
        link = await self._meeting.dial(provider)
        if link is not None:
            self._ask(task_id, lobby, link)

    @staticmethod
    def _ask(task_id: bytes, lobby: Lobby, link: PeerLink) -> None:
        lobby.meet(link.node_id)
        lobby.awaiting.add(link.node_id)
        link.post(wire.Ask(task_id))

    async def _claim_whole(self, task: Task, lobby: Lobby) -> None:
        """Keep those who wait from reading too."""
        nothing = Geometry(0, MIN_PIECE_BYTES)
        while True:
            claim = lobby.claim = self._parts.sign_claim(task.id, nothing, WHOLE, 2 * CLAIM_WHOLE_EVERY)
            for node_id in lobby.guests:
                link = self._parts.link(node_id)
                if link is not None:
                    link.post(wire.Claims(task.id, [claim]))
            await trio.sleep(CLAIM_WHOLE_EVERY)

    # --- what members say -----------------------------------------------------------------------------------------

    def asked(self, node_id: NodeId, task_id: bytes) -> bool:
        """A member asks for a task whose geometry we may not know ourselves.  Returns whether it is to wait for our word."""
        lobby = self._lobbies.get(task_id)
        if lobby is None:
            return False
        lobby.meet(node_id)
        link = self._parts.link(node_id)
        if lobby.claim is not None and link is not None:
            # At once: who comes first in order would begin to read too before it hears the next one.
            link.post(wire.Claims(task_id, [lobby.claim]))
        return not lobby.hopeless

    def left(self, node_id: NodeId, task_id: bytes) -> None:
        """A member does not know this task."""
        lobby = self._lobbies.get(task_id)
        if lobby is not None:
            lobby.gone(node_id)

    def link_down(self, node_id: NodeId) -> None:
        for lobby in self._lobbies.values():
            lobby.gone(node_id)

    def joined(self, node_id: NodeId, join: wire.Join) -> None:
        """A member told the geometry of a task.

        Raises:
            RemoteProtocolError: Nobody derives such a geometry.
        """
        lobby = self._lobbies.get(join.task)
        if lobby is not None:
            lobby.tell(node_id, _checked_geometry(join))

    def somebody_reads(self, message: wire.Claims) -> None:
        """A member claims the whole of a task we wait for."""
        lobby = self._lobbies.get(message.task)
        if lobby is None:
            return
        for signed in message.claims:
            with suppress(IntegrityError, NotAMember):
                body = self._parts.membership.verify("claim", signed, wire.ClaimBody)
                if body.task == message.task and body.piece == WHOLE:
                    self._heard_reader(lobby, message.task, signed.key, body.seq)

    def _heard_reader(self, lobby: Lobby, task_id: bytes, key: bytes, seq: int) -> None:
        now = trio.current_time()
        begun = lobby.quiet_since  # of our own read, if we read
        if lobby.somebody_reads(key, seq, now) and lobby.claim is not None:
            lobby.quiet_since = begun
            first = score(node_id_of(key), task_id, WHOLE) > score(self._parts.me, task_id, WHOLE)
            if first and now - begun < QUIET_SECONDS:
                lobby.quiet_since = now
                lobby.scope.cancel()


def _checked_geometry(join: wire.Join) -> Geometry:
    geometry = Geometry.of(join.length)
    if geometry.piece_length != join.piece_length:
        raise RemoteProtocolError("a join with a piece length nobody derives")
    return geometry


class Spool:
    """Content of unknown length on its way, in a nameless file."""

    def __init__(self, directory: str | None) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (closed by `close`)
        self.length = 0

    def write(self, chunk: bytes | memoryview) -> None:
        """Append.

        Raises:
            NoSpace: The disk is full.
        """
        try:
            self._file.write(chunk)
            self._file.flush()
        except OSError as error:
            raise NoSpace(f"cannot keep content of unknown length: {error.strerror}; free disk space") from error
        self.length += len(chunk)

    def clear(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.length = 0

    def rewind(self) -> None:
        self._file.seek(0)

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def close(self) -> None:
        self._file.close()
