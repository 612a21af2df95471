"""One real download service; its peers, origin, discovery and clock do what a test says."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

import structlog
import trio
from blake3 import blake3

from simulations.clock import run
from simulations.membership import SimulatedMembership
from swarm import pieces, proofs, wire
from swarm.download.policy import Policy
from swarm.download.request import Fetched, FetchRequest, Progress
from swarm.download.service import DownloadService
from swarm.edges import Address, NodeId, OriginInfo, PeerLink, Provider, Source, Started, State
from swarm.errors import ContentChanged, OriginUnreachable, PeerError, RemoteProtocolError, SwarmError
from swarm.store.memory import MemoryStore
from swarm.task import MIN_PIECE_BYTES, Digest, Geometry, Task, blob_task, url_task

URL = "http://origin.example/file"
WALL = 1_800_000_000
POLICY = Policy(queued_at_few=1, queued_overdue=1)  # one request at a time, so that a script can answer one after the other

Told = TypeVar("Told", bound=wire.TaskMessage)


class Content:
    """Some bytes, cut into pieces."""

    def __init__(self, count: int, seed: int = 1) -> None:
        """`count` pieces, the last one short."""
        self.bytes = Random(seed).randbytes(max(0, count * MIN_PIECE_BYTES - 7))
        self.geometry = Geometry.of(len(self.bytes))
        self.digest = Digest("sha256", hashlib.sha256(self.bytes).hexdigest())

    def piece(self, number: int) -> bytes:
        start = self.geometry.offset(number)
        return self.bytes[start : start + self.geometry.size(number)]

    def table(self) -> bytes:
        return b"".join(blake3(self.piece(number)).digest() for number in range(self.geometry.piece_count))

    def mixed(self, other: Content, numbers: Sequence[int]) -> Content:
        """This content with these pieces of another one."""
        mixed = Content(0)
        mixed.geometry = self.geometry
        mixed.bytes = b"".join(
            (other if number in numbers else self).piece(number) for number in range(self.geometry.piece_count)
        )
        mixed.digest = Digest("sha256", hashlib.sha256(mixed.bytes).hexdigest())
        return mixed


@dataclass(frozen=True, slots=True)
class Asked:
    """A request the service made of a peer."""

    request_id: int
    piece: int
    private: bool
    spare: bool


class Peer:
    """A member at the other end of a link: `edges.PeerLink` for the service, and what it says for the test.

    Attributes:
        sends: Called for each request, soon after it came; by default requests wait.
        posted: What the service told it.
        violation: Why the service closed the link, if it broke the protocol.
        dropped: Why the service dropped it.
    """

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene = scene
        self.membership = SimulatedMembership.draw(Random(f"peer {seed}"))
        self.address = Address(f"10.1.0.{seed % 250 + 1}", 7400)
        self.encrypted_pieces = False
        self.posted: list[wire.TaskMessage] = []
        self.waiting: dict[int, Asked] = {}
        self.asked: list[Asked] = []
        self.sends: Callable[[Asked], object] = lambda _asked: None
        self.violation = ""
        self.dropped = ""
        self.up = False
        self._part: Callable[[], object] = lambda: None

    # edges.PeerLink

    @property
    def node_id(self) -> NodeId:
        return self.membership.node_id

    @property
    def public_key(self) -> bytes:
        return self.membership.public_key

    def post(self, message: wire.TaskMessage, *, urgent: bool = True) -> None:
        if not self.up:
            return
        self.posted.append(message)
        if isinstance(message, wire.Ask) or (isinstance(message, wire.Join) and message.reply):
            self.scene.soon(self._part)

    def request(
        self,
        request_id: int,
        task_id: bytes,
        piece: int,
        offset: int,
        length: int,
        *,
        private: bool = False,
        spare: bool = False,
    ) -> None:
        asked = Asked(request_id, piece, private, spare)
        self.asked.append(asked)
        self.waiting[request_id] = asked
        self.scene.soon(lambda: self.sends(asked))

    def cancel(self, request_id: int) -> None:
        self.scene.soon(lambda: self.refuse(request_id, wire.CANCELLED))

    def drop(self, reason: str) -> None:
        self.dropped = reason
        self.scene.soon(lambda: self.hang_up(reason))

    # what it does

    def takes_part(self, held: Sequence[int] | None = None, *, seal: wire.Signed | None = None, reads: bool = True) -> Peer:
        """Say so whenever asked; see `join`."""
        self._part = lambda: self.join(held, seal=seal, reads=reads)
        return self

    def answers(self, message: wire.TaskMessage) -> Peer:
        """Say this whenever asked whether it takes part."""
        self._part = lambda: self.say(message)
        return self

    def hang_up(self, reason: str = "gone") -> None:
        if self.up:
            self.up = False
            self.waiting.clear()
            del self.scene.by_id[self.node_id]
            self.scene.service.link_down(self, reason)

    def say(self, *messages: wire.TaskMessage) -> Peer:
        """Send messages; a violation costs it the link, as in the peer layer."""
        for message in messages:
            if not self.up:
                break
            try:
                self.scene.service.message_received(self, wire.decode(wire.encode(message), type(message)))
            except RemoteProtocolError as error:
                self.violation = str(error)
                self.hang_up(self.violation)
        return self

    def join(
        self, held: Sequence[int] | None = None, *, seal: wire.Signed | None = None, reply: bool = False, reads: bool = True
    ) -> Peer:
        """Say that it takes part and holds these pieces, or everything."""
        task, geometry = self.scene.task, self.scene.content.geometry
        bitmap = b"" if held is None else pieces.to_wire(pieces.of(geometry.piece_count, held))
        return self.say(
            wire.Join(
                task.id, geometry.length, geometry.piece_length, held=bitmap, complete=held is None, seal=seal, reply=reply,
                reads=reads,
            )
        )  # fmt: skip

    def claim(self, piece: int, *, lease: float = 3.0, seq: int = 1, **other: Any) -> wire.Signed:
        """A claim it signed; `other` fields of the body instead of the right ones."""
        geometry = self.scene.content.geometry
        fields = {"task": self.scene.task.id, "length": geometry.length, "piece_length": geometry.piece_length, **other}
        return self.membership.sign("claim", wire.ClaimBody(piece=piece, lease=lease, seq=seq, **fields))

    def claims(self, *signed: wire.Signed) -> Peer:
        return self.say(wire.Claims(self.scene.task.id, list(signed)))

    def prove(self, piece: int, data: bytes, **other: Any) -> wire.Signed:
        """A proof it signed."""
        geometry = self.scene.content.geometry
        fields = {"task": self.scene.task.id, "length": geometry.length, "piece_length": geometry.piece_length, **other}
        body = wire.ProofBody(blake3=blake3(data).digest(), issued=WALL, **{"piece": piece, **fields})
        return self.membership.sign("proof", body)

    def seal(self, content: Content, *, digest: Digest | None = None, table: bytes | None = None) -> wire.Signed:
        return proofs.seal(
            self.membership, self.scene.task.id, content.geometry, digest or content.digest, table or content.table(), WALL
        )

    def serves(self, content: Content, signer: Peer | None = None) -> Peer:
        """Answer every request with this content, proven by `signer`."""
        self.sends = lambda asked: self.answer(asked, content, signer)
        return self

    def refuses(self, status: int) -> Peer:
        self.sends = lambda asked: self.refuse(asked.request_id, status)
        return self

    def answer(self, asked: Asked, content: Content, signer: Peer | None = None) -> bool:
        """Send a piece (or the table) of this content; returns whether the service took the header."""
        if asked.piece == wire.SEAL_TABLE:
            return self.deliver(asked, content.table(), None)
        signer = signer or self
        data = content.piece(asked.piece)
        return self.deliver(asked, data, signer.prove(asked.piece, data), signer.public_key)

    def deliver(self, asked: Asked, data: bytes, proof: wire.Signed | None, certificate: bytes = b"") -> bool:
        """Header and bytes; a refused header costs it the link, as in the peer layer."""
        if asked.request_id not in self.waiting or not self.up:
            return False
        service = self.scene.service
        if not service.piece_started(self, Started(asked.request_id, len(data), proof, certificate)):
            self.hang_up("refused")
            return False
        del self.waiting[asked.request_id]
        service.piece_received(self, asked.request_id, blake3(data).digest(), memoryview(data))
        return True

    def refuse(self, request_id: int, status: int) -> None:
        if self.waiting.pop(request_id, None) is not None:
            self.scene.service.piece_failed(self, request_id, status)

    def told(self, kind: type[Told]) -> list[Told]:
        return [message for message in self.posted if isinstance(message, kind)]

    @property
    def pieces_asked(self) -> list[int]:
        return [asked.piece for asked in self.asked]


class ScriptedOrigin:
    """`edges.Origin` of one content, with every way it can fail.

    Attributes:
        reads: What was asked, as (start, stop).
        error: Raised by every call from now on.
        stops_after: Bytes after which it raises `error` in the middle of an answer.
        serves_ranges: Without, every read gets the content from its start, as far as it was asked for.
        breaks_at: Bytes after which one answer breaks off.
        tells_length: Without, the length is only known at the end.
        seconds_a_piece: How long 256 KiB take.
        open: Nothing is answered while this event is not set.
    """

    def __init__(self, content: Content) -> None:
        self.content = content
        self.validator = "etag:1"
        self.heads = 0
        self.reads: list[tuple[int, int | None]] = []
        self.sent = 0
        self.error: SwarmError | None = None
        self.head_error: SwarmError | None = None
        self.stops_after: int | None = None
        self.breaks_at: int | None = None
        self.serves_ranges = True
        self.knows_ranges = True
        self.tells_length = True
        self.seconds_a_piece = 0.1
        self.open = trio.Event()
        self.open.set()

    @property
    def pieces_read(self) -> list[int]:
        return [start // self.content.geometry.piece_length for start, _ in self.reads]

    async def head(self, source: Source) -> OriginInfo:
        self.heads += 1
        await trio.sleep(0.01)
        if (error := self.head_error or self.error) is not None:
            raise error
        return OriginInfo(
            len(self.content.bytes) if self.tells_length else None,
            self.validator,
            (self.serves_ranges if self.knows_ranges else None) if self.tells_length else False,
            "1",
        )

    @asynccontextmanager
    async def read(
        self, source: Source, start: int = 0, stop: int | None = None, *, expect: OriginInfo | None = None
    ) -> AsyncIterator[ScriptedBody]:
        self.reads.append((start, stop))
        await self.open.wait()
        await trio.sleep(0.01)
        if expect is not None and expect.validator not in ("", self.validator):
            raise ContentChanged("it has another version now")
        if self.error is not None and self.stops_after is None:
            raise self.error
        if not self.serves_ranges:
            start = 0
        yield ScriptedBody(self, start, len(self.content.bytes) if stop is None else stop, self.content)


@dataclass(slots=True)
class ScriptedBody:
    """Not an async generator, as in `swarm.origin.body`: who has enough may leave it half-way."""

    origin: ScriptedOrigin
    start: int
    stop: int
    content: Content
    position: int = 0

    @property
    def length(self) -> int | None:
        return len(self.content.bytes)

    def chunks(self) -> ScriptedBody:
        self.position = self.start
        return self

    def __aiter__(self) -> ScriptedBody:
        return self

    async def __anext__(self) -> bytes:
        if self.position >= self.stop:
            raise StopAsyncIteration
        origin = self.origin
        await origin.open.wait()
        size = min(64 * 1024, self.stop - self.position)
        await trio.sleep(size / MIN_PIECE_BYTES * origin.seconds_a_piece)
        if origin.stops_after is not None and origin.sent + size > origin.stops_after:
            raise origin.error or OriginUnreachable("it broke off")
        if origin.breaks_at is not None and origin.sent + size > origin.breaks_at:
            origin.breaks_at = None
            raise OriginUnreachable("it broke off")
        origin.sent += size
        self.position += size
        return self.content.bytes[self.position - size : self.position]


@dataclass(slots=True)
class ScriptedDiscovery:
    """`edges.Discovery`: finds the providers the test put there."""

    announced: dict[bytes, State] = field(default_factory=dict)
    log: list[tuple[str, bytes]] = field(default_factory=list)
    members: list[Provider] = field(default_factory=list)
    valid: dict[bytes, Provider] = field(default_factory=dict)

    async def announce(self, task_id: bytes, state: State) -> list[Provider]:
        self.log.append((state.name.lower(), task_id))
        self.announced[task_id] = state
        await trio.sleep(0.01)
        return list(self.members)

    async def find(self, task_id: bytes) -> list[Provider]:
        await trio.sleep(0.01)
        return list(self.members)

    async def withdraw(self, task_id: bytes) -> None:
        self.log.append(("withdraw", task_id))
        self.announced.pop(task_id, None)
        await trio.lowlevel.checkpoint()

    def own_record(self, task_id: bytes) -> bytes | None:
        return None

    def read_record(self, record_untrusted: bytes, task_id: bytes) -> Provider | None:
        return self.valid.get(record_untrusted)


@dataclass(slots=True)
class Fetch:
    """A fetch under way."""

    done: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    fetched: Fetched | None = None
    bytes: bytes | None = None
    error: SwarmError | None = None
    progress: list[Progress] = field(default_factory=list)

    async def outcome(self) -> Fetched:
        """Wait for the end.

        Raises:
            SwarmError: What the fetch raised.
        """
        await self.done.wait()
        if self.error is not None:
            raise self.error
        assert self.fetched is not None
        return self.fetched


class Scene:
    """The service, and everything around it.

    Attributes:
        task: The task that peers speak of: the blob of `content`, until `as_url`.
        dialled: Whom the service tried to connect to.
        reachable: Who answers when dialled.
    """

    def __init__(
        self,
        content: Content,
        nursery: trio.Nursery,
        store: MemoryStore,
        *,
        is_open: bool,
        policy: Policy,
        origin: ScriptedOrigin,
    ) -> None:
        self.content = content
        self.task: Task = blob_task(content.digest)
        self.nursery = nursery
        self.membership = SimulatedMembership.draw(Random("we ourselves"))
        self.membership.is_open = is_open
        self.store = store
        self.discovery = ScriptedDiscovery()
        self.origin = origin
        self.by_id: dict[NodeId, Peer] = {}
        self.reachable: dict[NodeId, Peer] = {}
        self.dialled: list[NodeId] = []
        self.service = DownloadService(
            self.membership, store, self.discovery, origin,
            policy=policy, rng=Random(5), wall_clock=lambda: WALL + trio.current_time(),
        )  # fmt: skip
        self.service.attach(self)
        self._token = trio.lowlevel.current_trio_token()
        self._peers = 0

    def soon(self, function: Callable[[], object]) -> None:
        self._token.run_sync_soon(function)

    # edges.PeerNetwork

    async def connect(self, node_id: NodeId, addresses: Sequence[Address]) -> PeerLink:
        self.dialled.append(node_id)
        await trio.sleep(0.01)
        peer = self.reachable.get(node_id)
        if peer is None:
            raise PeerError("nobody there")
        return self.link_with(peer)

    def link(self, node_id: NodeId) -> PeerLink | None:
        return self.by_id.get(node_id)

    def links(self) -> Sequence[PeerLink]:
        return list(self.by_id.values())

    # what a test sets up

    def as_url(self) -> Task:
        """From here on peers speak of the content as that of the URL, whose digest nobody knows."""
        self.task = url_task(URL, validator=self.origin.validator)
        return self.task

    def peer(self, *, linked: bool = True) -> Peer:
        """A new member."""
        self._peers += 1
        peer = Peer(self, self._peers)
        self.reachable[peer.node_id] = peer
        if linked:
            self.link_with(peer)
        return peer

    def link_with(self, peer: Peer) -> Peer:
        if not peer.up:
            peer.up = True
            self.membership.learn(peer.public_key)
            self.by_id[peer.node_id] = peer
            self.service.link_up(peer)
        return peer

    def provider(self, peer: Peer, state: State = State.WANTS) -> Provider:
        record = b"record:" + peer.node_id
        return Provider(peer.node_id, peer.public_key, (peer.address,), state, record)

    def request(self, **fields: object) -> FetchRequest:
        """For the content by digest, from the origin where nothing else is said."""
        if self.task.digest is not None:
            fields = {"digest": self.task.digest, **fields}
        return FetchRequest(**{"source": Source(URL), **fields})  # type: ignore[arg-type]

    def fetch(self, request: FetchRequest | None = None) -> Fetch:
        """Start a fetch."""
        fetch = Fetch()
        self.nursery.start_soon(self._fetch, request or self.request(), fetch)
        return fetch

    async def _fetch(self, request: FetchRequest, fetch: Fetch) -> None:
        with fetch.scope:
            try:
                fetch.fetched, stored = await self.service.fetch(request, fetch.progress.append)
                with_range = request.byte_range is not None
                fetch.bytes = None if with_range else stored.read(0, stored.geometry.length)
                stored.close()
            except SwarmError as error:
                fetch.error = error
        fetch.done.set()

    def held(self) -> list[int]:
        """Pieces of the task in the store."""
        stored = self.store.open(self.task.id)
        if stored is None:
            return []
        try:
            return list(pieces.indices(stored.held))
        finally:
            stored.close()


def play(
    script: Callable[[Scene], Awaitable[None]],
    *,
    count: int = 8,
    is_open: bool = False,
    policy: Policy = POLICY,
    store: Callable[[], MemoryStore] = MemoryStore,
    content: Content | None = None,
) -> None:
    """Run a script under a virtual clock.  Content of `count` pieces; at the end nothing of it is left in use."""
    content = content or Content(count)

    async def main() -> None:
        with trio.fail_after(3600):
            with store() as kept:
                origin = ScriptedOrigin(content)
                async with trio.open_nursery() as nursery:
                    scene = Scene(content, nursery, kept, is_open=is_open, policy=policy, origin=origin)
                    await nursery.start(scene.service.run)
                    await script(scene)
                    nursery.cancel_scope.cancel()
                assert not [entry for entry in kept.entries() if entry.in_use]
            assert not scene.store._bodies

    # Rendering what is logged would be most of a test.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        run(main, 1)
    finally:
        structlog.reset_defaults()


def runs(**options: object) -> Callable[[Callable[[Scene], Awaitable[None]]], Callable[[], None]]:
    """Make a test of a script."""

    def decorate(script: Callable[[Scene], Awaitable[None]]) -> Callable[[], None]:
        def test() -> None:
            play(script, **options)  # type: ignore[arg-type]

        test.__name__ = script.__name__
        test.__doc__ = script.__doc__
        return test

    return decorate
