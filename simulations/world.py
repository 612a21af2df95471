"""The modelled world: hosts with links, an origin, control messages with latency; the nodes in it run the real code.

What is modelled: bandwidth both ways, latency, handshakes, deaths noticed late.  What is real: discovery, announcements,
claims, exchange, upload order, proofs with real signatures.  What is absent: CPU, TCP, loss on streams, disks.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random

import msgspec
import trio
from blake3 import blake3

from simulations.events import TICK, Events
from simulations.pipes import Downlink, Flow, Uplink, blocks_of
from swarm import wire
from swarm.download.policy import Policy
from swarm.download.request import Fetched, FetchRequest
from swarm.download.service import DownloadService
from swarm.edges import Address, Body, Discovery, NodeId, OriginInfo, PeerLink, Served, Source, Started
from swarm.errors import NotAMember, PeerError, RemoteProtocolError, SwarmError
from swarm.identity import Identity, verify
from swarm.peer.upload import Channel, Transfer, Uploader
from swarm.store.memory import MemoryStore, digest_of_digests
from swarm.task import Digest, Geometry

MBIT = 1_000_000 / 8
URL = "http://origin.example/content"
PART_BYTES = 64 * 1024 * 1024
DEAD_SECONDS = 30.0
"""Silence after which neighbours give a node up (`swarm.peer.connection`)."""

STALL_SECONDS = 10.0
SLOW_SECONDS = 20.0
SLOW_RATE = 64 * 1024
"""Without a byte for so long, or below this rate over so long, a transfer is given up (`swarm.peer.limits`)."""

DIAL_SECONDS = 10.0
"""How long a dial waits for an answer."""

FRAME_OVERHEAD = 60
"""Bytes of WebSocket, TLS, TCP and IP a control frame costs beside its CBOR."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One scenario.  Rates are bytes a second, sizes bytes, times seconds."""

    nodes: int
    length: int
    origin_rate: float
    node_rate: float
    arrival: float = 0.05
    """All arrive within so long, at random."""
    apart: float = 0.0
    """Seconds from each arrival to the next, for nodes that come one by one."""
    seed: int = 1
    by_digest: bool = False
    """Nodes know the digest of what they fetch, so that what they end with was checked."""
    slow: dict[int, float] = field(default_factory=dict)
    """Node number -> factor its links are slower by."""


class Content:
    """One real content in memory, with the digests of its pieces."""

    def __init__(self, length: int, seed: int) -> None:
        rng = Random(seed)
        # In parts: `randbytes` overflows at 256 MiB.
        self.bytes = b"".join([rng.randbytes(min(PART_BYTES, length - at)) for at in range(0, length, PART_BYTES)])
        self.geometry = Geometry.of(length)
        self.digest = Digest("sha256", hashlib.sha256(self.bytes).hexdigest())
        self.digests = [blake3(self.piece(i)).digest() for i in range(self.geometry.piece_count)]

    def piece(self, number: int) -> memoryview:
        start = self.geometry.offset(number)
        return memoryview(self.bytes)[start : start + self.geometry.size(number)]

    def digest_of(self, digests: Sequence[bytes], algorithm: str) -> Digest:
        """What a store without bytes takes for the content digest: the right one if every piece is right."""
        return self.digest if list(digests) == self.digests else digest_of_digests(digests, algorithm)


class SimulatedMembership:
    """Everybody in the world is a member; signatures are real."""

    network_id = hashlib.sha256(b"simulation").digest()
    is_open = True

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._known: set[bytes] = {identity.public_key}
        self.node_id = identity.node_id
        self.public_key = identity.public_key
        self.certificate = identity.public_key

    def sign(self, kind: str, body: msgspec.Struct) -> wire.Signed:
        return self._identity.sign(kind, self.network_id, wire.encode(body))

    def verify(self, kind: str, signed_untrusted: wire.Signed, body: type[Body]) -> Body:
        if signed_untrusted.key not in self._known:
            raise NotAMember("not met yet")
        verify(kind, self.network_id, signed_untrusted)
        return wire.decode(signed_untrusted.body, body)

    def learn(self, certificate_untrusted: bytes) -> bytes:
        self._known.add(certificate_untrusted)
        return certificate_untrusted

    def certificate_of(self, public_key: bytes) -> bytes | None:
        return public_key if public_key in self._known else None

    def task_key(self, task_id: bytes) -> bytes:
        return hashlib.blake2b(task_id, digest_size=20, key=self.network_id).digest()

    def datagram_mac(self, data: bytes) -> tuple[int, bytes]:
        return 0, hashlib.blake2b(data, digest_size=16, key=self.network_id).digest()

    def check_datagram_mac(self, epoch: int, mac: bytes, data: bytes) -> bool:
        return epoch == 0 and mac == hashlib.blake2b(data, digest_size=16, key=self.network_id).digest()


@dataclass(eq=False, slots=True)
class Link:
    """One end of a connection between two nodes."""

    near: Node
    far: Node
    latency: float
    up: bool = True
    other: Link | None = None
    outbox: list[wire.TaskMessage] = field(default_factory=list)
    flows: dict[int, Flow] = field(default_factory=dict)

    @property
    def node_id(self) -> NodeId:
        return self.far.node_id

    @property
    def public_key(self) -> bytes:
        return self.far.identity.public_key

    @property
    def address(self) -> Address:
        return self.far.address

    @property
    def encrypted_pieces(self) -> bool:
        return False

    def post(self, message: wire.TaskMessage, *, urgent: bool = True) -> None:
        if not self.up or not self.near.alive:
            return
        self.outbox.append(message)
        if len(self.outbox) == 1:
            self.near.world.events.after(0.0 if urgent else 0.05, self._depart)

    def _depart(self) -> None:
        if self.near.resumes(self._depart):
            return
        posted, self.outbox = self.outbox, []
        frame = [said for message in posted for said in self.near.says(message)]
        self.near.world.count_frame(frame)
        self.near.world.events.after(self.latency, lambda: self._arrive(frame))

    def _arrive(self, frame: list[wire.TaskMessage]) -> None:
        other = self.other
        if other is None or not other.up or not other.near.alive or other.near.resumes(lambda: self._arrive(frame)):
            return
        try:
            for message in frame:
                other.near.service.message_received(other, message)
        except RemoteProtocolError as error:
            other.near.violations.append(str(error))
            self.near.world.disconnect(other, str(error))

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
        request = wire.Request(request_id, task_id, piece, offset, length, spare)
        self.near.world.events.after(self.latency, lambda: self.far.asked(self, request))

    def cancel(self, request_id: int) -> None:
        self.near.world.events.after(self.latency, lambda: self.far.cancelled(self, request_id))

    def drop(self, reason: str) -> None:
        self.near.world.events.after(0, lambda: self.near.world.disconnect(self, reason))

    def failed(self, request_id: int, status: int) -> None:
        """Tell the asker, on this its own end, after the way back."""
        self.near.world.events.after(self.latency, lambda: self._failed(request_id, status))

    def _failed(self, request_id: int, status: int) -> None:
        if self.up and self.near.alive and not self.near.resumes(lambda: self._failed(request_id, status)):
            self.near.service.piece_failed(self, request_id, status)


class Node:
    """A host: its links' rates, and the real service on it."""

    def __init__(self, world: World, number: int, seed: bytes, rate: float) -> None:
        self.world = world
        self.number = number
        self.identity = Identity(seed)
        self.node_id = self.identity.node_id
        self.address = Address(f"10.0.{number // 250}.{number % 250 + 1}", 7400)
        self.membership = SimulatedMembership(self.identity)
        self.content = world.content
        self.uplink = Uplink(world.events, rate)
        self.downlink = Downlink(world.events, rate)
        self.alive = True
        self.stopped_until = 0.0
        self.by_peer: dict[NodeId, Link] = {}
        self.when_killed: list[Callable[[], None]] = []
        self.violations: list[str] = []
        """What others did that made this node close the connection."""
        self.scope = trio.CancelScope()
        self.store = MemoryStore(keep_bytes=False, content_digest=world.content.digest_of)
        self.service: DownloadService
        self.uploader: Uploader
        self._wake_at = float("inf")

    # What a node that does not keep to the protocol may do otherwise.

    def request_to_make(self) -> FetchRequest:
        """What it fetches."""
        return FetchRequest(Source(URL), digest=self.content.digest if self.world.shape.by_digest else None)

    def says(self, message: wire.TaskMessage) -> Sequence[wire.TaskMessage]:
        """What it sends where the service would send `message`."""
        return (message,)

    def sends(self, served: Served) -> tuple[bytes, memoryview]:
        """BLAKE3 of the bytes it sends in answer to a request, and the bytes."""
        if isinstance(served.body, bytes):
            return blake3(served.body).digest(), memoryview(served.body)
        assert served.proof is not None
        body = wire.decode(served.proof.body, wire.ProofBody)
        return body.blake3, self.content.piece(body.piece)

    def build(self, discovery: Discovery) -> None:
        rng = Random(self.world.rng.getrandbits(64))
        self.service = DownloadService(
            self.membership, self.store, discovery, self.world.origin_for(self),
            policy=self.world.policy, rng=rng, wall_clock=lambda: 1_800_000_000 + trio.current_time(),
        )  # fmt: skip
        self.service.attach(self)
        self.uploader = Uploader(self.service, rng=Random(self.world.rng.getrandbits(64)))

    def resumes(self, later: Callable[[], None]) -> bool:
        """Whether the node is stopped just now; what would happen to it happens when it goes on."""
        if self.stopped_until <= trio.current_time():
            return False
        self.world.events.at(self.stopped_until, later)
        return True

    # edges.PeerNetwork

    async def connect(self, node_id: NodeId, addresses: Sequence[Address]) -> PeerLink:
        return await self.world.connect(self, node_id)

    def link(self, node_id: NodeId) -> PeerLink | None:
        return self.by_peer.get(node_id)

    def links(self) -> Sequence[PeerLink]:
        return list(self.by_peer.values())

    # serving

    def asked(self, asker: Link, request: wire.Request) -> None:
        if self.alive and asker.up and not self.resumes(lambda: self.asked(asker, request)):
            if self.uploader.enqueue(Channel(asker.near.node_id), request):
                self._pump()
            else:
                asker.failed(request.id, wire.BUSY)

    def cancelled(self, asker: Link, request_id: int) -> None:
        if self.resumes(lambda: self.cancelled(asker, request_id)):
            return
        if self.alive and self.uploader.cancel(Channel(asker.near.node_id), request_id):
            asker.failed(request_id, wire.CANCELLED)

    def _pump(self) -> None:
        if not self.alive:
            return  # a deadline nobody acts on would be due for ever
        if self.resumes(self._pump):
            return
        now = trio.current_time()
        while (transfer := self.uploader.next(now)) is not None:
            self._serve(transfer)
        deadline = self.uploader.next_deadline()
        if deadline < self._wake_at:
            self._wake_at = deadline
            # Later in any case: the tick of a deadline may be a rounding error before it, and nothing be due yet.
            self.world.events.at(max(deadline, now + TICK), self._woken)

    def _woken(self) -> None:
        self._wake_at = float("inf")
        self._pump()

    def _serve(self, transfer: Transfer) -> None:
        asker = self.world.by_id[transfer.node_id].by_peer.get(self.node_id)
        request = transfer.request
        served = self.service.serve(transfer.node_id, request, encrypted=False)
        if asker is None or isinstance(served, int):
            self.uploader.ended(transfer, complete=False)
            if asker is not None and isinstance(served, int):
                asker.failed(request.id, served)
            return
        receiver = asker

        def departed(size: int) -> None:
            self.uploader.progressed(transfer, trio.current_time(), size)

        def sent() -> None:
            self.uploader.ended(transfer, complete=True)
            self.service.uploaded(transfer.node_id, request, request.length)
            self._pump()

        def end() -> None:
            receiver.flows.pop(request.id, None)
            self.world.received(receiver, request, *self.sends(served))

        flow = Flow(
            blocks_of(request.length), receiver.near.downlink, receiver.latency, lambda _size: None, end, sent, departed
        )
        flow.begun = flow.moved = trio.current_time()
        receiver.flows[request.id] = flow
        self._watch(transfer, flow, receiver)
        self.world.events.after(receiver.latency, lambda: self.world.started(receiver, request, served))
        self.uplink.start(flow)

    def _watch(self, transfer: Transfer, flow: Flow, receiver: Link) -> None:
        """The receiver gives a transfer up that does not move."""
        number = transfer.request.id
        if receiver.flows.get(number) is not flow:
            return
        now = trio.current_time()
        age = now - flow.begun
        slow = age >= SLOW_SECONDS and flow.received < SLOW_RATE * age
        if now - flow.moved < STALL_SECONDS and not slow:
            due = min(flow.moved + STALL_SECONDS, now + SLOW_SECONDS)
            if age < SLOW_SECONDS:
                due = min(due, flow.begun + SLOW_SECONDS)
            self.world.events.at(max(due, now + TICK), lambda: self._watch(transfer, flow, receiver))
            return
        flow.cancelled = True
        del receiver.flows[number]
        self.uploader.ended(transfer, complete=False)
        receiver.failed(number, wire.BUSY)
        self._pump()

    def channel_down(self, node_id: NodeId) -> None:
        self.uploader.forget(Channel(node_id))
        self._pump()


class SimulatedOrigin:
    """The origin as one node reads it."""

    def __init__(self, world: World, node: Node) -> None:
        self._world = world
        self._node = node

    async def head(self, source: Source) -> OriginInfo:
        await trio.sleep(2 * self._world.latency())
        self._world.heads += 1
        return OriginInfo(self._world.shape.length, "etag:1", True, "1")

    @asynccontextmanager
    async def read(
        self, source: Source, start: int = 0, stop: int | None = None, *, expect: OriginInfo | None = None
    ) -> AsyncIterator[OriginReading]:
        world = self._world
        end = world.shape.length if stop is None else stop
        latency = world.latency()
        await trio.sleep(2 * latency)
        send, receive = trio.open_memory_channel[int](1 << 20)
        flow = Flow(blocks_of(end - start), self._node.downlink, latency, send.send_nowait, send.close)
        world.origin_uplink.start(flow)
        try:
            yield OriginReading(self._node.content, start, receive)
        finally:
            flow.cancelled = True
            send.close()
            receive.close()


@dataclass(slots=True)
class OriginReading:
    """Not an async generator: one that is left half-way must be closed by hand."""

    content: Content
    start: int
    blocks: trio.MemoryReceiveChannel[int]
    position: int = 0

    @property
    def length(self) -> int | None:
        return len(self.content.bytes)

    def chunks(self) -> OriginReading:
        self.position = self.start
        return self

    def __aiter__(self) -> OriginReading:
        return self

    async def __anext__(self) -> memoryview:
        try:
            size = await self.blocks.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        self.position += size
        return memoryview(self.content.bytes)[self.position - size : self.position]


@dataclass(slots=True)
class Outcome:
    """What a run showed.

    Attributes:
        seconds: Per node that finished, its own arrival to its own completion.
        by_node: The same by number of the node.
        copies: Bytes out of the origin over the length.
    """

    seconds: list[float]
    copies: float
    floor: float
    unfinished: int
    frames: int
    frame_bytes: int
    why: dict[str, int]
    errors: list[str]
    by_node: dict[int, float] = field(default_factory=dict)

    @property
    def last(self) -> float:
        return max(self.seconds)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class World:
    """Hosts, their connections and the origin."""

    def __init__(self, shape: Shape, *, policy: Policy | None = None, kinds: dict[int, type[Node]] | None = None) -> None:
        """`kinds`: number -> class of the nodes that behave otherwise."""
        kinds = kinds or {}
        self.shape = shape
        self.policy = policy or Policy()
        self.rng = Random(shape.seed)
        self.events = Events()
        self.content = Content(shape.length, shape.seed)
        self.origin_uplink = Uplink(self.events, shape.origin_rate)
        self.heads = 0
        self.frames = 0
        self.frame_bytes = 0
        self.nodes = [
            kinds.get(number, Node)(self, number, self.rng.randbytes(32), shape.node_rate / shape.slow.get(number, 1.0))
            for number in range(shape.nodes)
        ]
        self.by_id = {node.node_id: node for node in self.nodes}

    def latency(self) -> float:
        return self.rng.uniform(0.001, 0.02)

    def origin_for(self, node: Node) -> SimulatedOrigin:
        return SimulatedOrigin(self, node)

    def count_frame(self, frame: list[wire.TaskMessage]) -> None:
        self.frames += 1
        self.frame_bytes += FRAME_OVERHEAD + sum(40 + 150 * len(getattr(m, "claims", ())) for m in frame)

    async def connect(self, near: Node, node_id: NodeId) -> Link:
        far = self.by_id.get(node_id)
        latency = self.latency()
        await trio.sleep(3 * latency)
        if far is not None and far.stopped_until > trio.current_time():
            await trio.sleep(DIAL_SECONDS)
            raise PeerError("it does not answer")
        if far is None or not far.alive or not near.alive:
            raise PeerError("nobody there")
        existing = near.by_peer.get(node_id)
        if existing is not None:
            return existing
        here, there = Link(near, far, latency), Link(far, near, latency)
        here.other, there.other = there, here
        near.membership.learn(far.identity.public_key)
        far.membership.learn(near.identity.public_key)
        near.by_peer[far.node_id] = here
        far.by_peer[near.node_id] = there
        near.service.link_up(here)
        far.service.link_up(there)
        return here

    def disconnect(self, link: Link, reason: str) -> None:
        """Both ends go down; each node that is alive is told."""
        for end in (link, link.other):
            if end is None or not end.up:
                continue
            end.up = False
            if end.near.by_peer.get(end.far.node_id) is end:
                del end.near.by_peer[end.far.node_id]
            for flow in end.flows.values():
                flow.cancelled = True
            end.flows.clear()
            end.near.channel_down(end.far.node_id)
            self._link_down(end, reason)

    def _link_down(self, end: Link, reason: str) -> None:
        if end.near.alive and not end.near.resumes(lambda: self._link_down(end, reason)):
            end.near.service.link_down(end, reason)

    def kill(self, node: Node) -> None:
        """The host dies without a word; its neighbours notice after 0.3 to 2 seconds."""
        node.alive = False
        node.uplink.up = False
        node.scope.cancel()
        for killed in node.when_killed:
            killed()
        for link in list(node.by_peer.values()):
            if link.other is not None:
                end = link.other
                self.events.after(self.rng.uniform(0.3, 2.0), partial(self.disconnect, end, "died"))

    def stop(self, node: Node, seconds: float) -> None:
        """The process is stopped (SIGSTOP) for so long: nothing is lost, everything is late; timers are due at its end."""
        until = node.stopped_until = trio.current_time() + seconds
        node.uplink.hold(until)
        node.downlink.hold(until)
        if seconds > DEAD_SECONDS:
            for link in list(node.by_peer.values()):
                self.events.after(DEAD_SECONDS, partial(self.disconnect, link, "silent"))

    def started(self, receiver: Link, request: wire.Request, served: Served) -> None:
        if receiver.near.resumes(lambda: self.started(receiver, request, served)):
            return
        if receiver.up and receiver.near.alive:
            started = Started(request.id, request.length, served.proof, served.certificate)
            if not receiver.near.service.piece_started(receiver, started):
                self.disconnect(receiver, "refused")

    def received(self, receiver: Link, request: wire.Request, digest: bytes, data: memoryview) -> None:
        if receiver.near.resumes(lambda: self.received(receiver, request, digest, data)):
            return
        if receiver.up and receiver.near.alive:
            receiver.near.service.piece_received(receiver, request.id, digest, data)

    async def run(
        self,
        discovery_for: Callable[[Node, trio.Nursery], Discovery],
        *,
        seconds: float = 600.0,
        script: Callable[[World], None] | None = None,
        before: float = 0.0,
    ) -> Outcome:
        """Start everybody, let all fetch, and wait until the living are done or `seconds` have passed.

        Args:
            before: Seconds for the overlay to form before the first fetch.
            script: Schedules deaths and the like on `events`, called when the fetching starts.
        """
        done: dict[int, Fetched] = {}
        errors: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.events.run)
            for node in self.nodes:
                node.build(discovery_for(node, nursery))
                await nursery.start(self._live, node)
            await trio.sleep(before)
            if script is not None:
                script(self)
            with trio.move_on_after(seconds):
                async with trio.open_nursery() as fetches:
                    for node in self.nodes:
                        delay = node.number * self.shape.apart + self.rng.uniform(0, self.shape.arrival)
                        fetches.start_soon(self._fetch, node, delay, done, errors)
            nursery.cancel_scope.cancel()
        shape = self.shape
        floor = max(
            shape.length / shape.origin_rate,
            shape.length / shape.node_rate,
            shape.nodes * shape.length / (shape.origin_rate + shape.nodes * shape.node_rate),
        )
        why: dict[str, int] = {}
        for node in self.nodes:
            for reason, count in node.service.totals.why_origin.items():
                why[reason] = why.get(reason, 0) + count
        return Outcome(
            [fetched.seconds for fetched in done.values()],
            self.origin_uplink.sent / shape.length,
            floor,
            sum(node.alive for node in self.nodes) - sum(self.nodes[number].alive for number in done),
            self.frames,
            self.frame_bytes,
            why,
            errors,
            {number: fetched.seconds for number, fetched in done.items()},
        )

    async def _live(self, node: Node, *, task_status: trio.TaskStatus[None]) -> None:
        with node.scope:
            await node.service.run(task_status=task_status)

    async def _fetch(self, node: Node, delay: float, done: dict[int, Fetched], errors: list[str]) -> None:
        await trio.sleep(delay)
        if not node.alive:
            return
        try:
            fetched, stored = await node.service.fetch(node.request_to_make())
        except SwarmError as error:
            if node.alive:
                errors.append(f"{node.number}: {error}")
            return
        stored.close()
        done[node.number] = fetched
