"""The mirror on real loopback sockets over a real download service in memory; registries and rights do what a test says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import h11
import trio

from simulations.membership import SimulatedMembership
from swarm.config import MirrorSettings
from swarm.download.policy import Policy
from swarm.download.service import DownloadService
from swarm.edges import OriginInfo, Source
from swarm.errors import NotFoundAtOrigin, OriginUnreachable, SwarmError
from swarm.mirror.catalogue import Catalogue
from swarm.mirror.edges import Grant, ManifestInfo, MirrorDenied, Passed
from swarm.mirror.paths import ClientCredentials, Name
from swarm.mirror.pulls import Pulls
from swarm.mirror.resolve import Resolver
from swarm.mirror.routes import Routes
from swarm.mirror.server import MirrorServer, listen
from swarm.mirror.tally import Tally
from swarm.quantities import Endpoint
from swarm.store.memory import MemoryStore
from swarm.task import Digest
from tests.download.scene import ScriptedDiscovery

REGISTRY = "registry.example"
NAME = Name(REGISTRY, "lib/small")
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
NS = f"?ns={REGISTRY}"


def digest_of(content: bytes, algorithm: str = "sha256") -> Digest:
    return Digest(algorithm, hashlib.new(algorithm, content).hexdigest())


def random_bytes(size: int, seed: int = 1) -> bytes:
    return Random(seed).randbytes(size)


@dataclass
class Registry:
    """`mirror.edges.Registries`, `Authorizer`, and `edges.Origin` of the same contents.

    Attributes:
        error: Raised for every question, if set.
        denied: Credentials (or `None`) that may read nothing.
        open: Bodies wait while it is not set, after `holds_after` bytes in all.
        lies: Bytes sent instead of a blob's own.
    """

    blobs: dict[Digest, bytes] = field(default_factory=dict)
    manifests: dict[Digest, tuple[bytes, str]] = field(default_factory=dict)
    tags: dict[tuple[Name, str], Digest] = field(default_factory=dict)
    error: SwarmError | None = None
    denied: set[str | None] = field(default_factory=set)
    private: bool = False
    shared: bool = True
    open: trio.Event = field(default_factory=trio.Event)
    lies: dict[Digest, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    sent: dict[Digest, int] = field(default_factory=dict)
    holds_after: int = 0
    stops_after: int | None = None
    pause: float = 0.0

    def __post_init__(self) -> None:
        self.open.set()

    # what a test puts in

    def blob(self, content: bytes, algorithm: str = "sha256") -> Digest:
        digest = digest_of(content, algorithm)
        self.blobs[digest] = content
        return digest

    def manifest(self, document: dict[str, Any], media_type: str = MANIFEST, tag: str = "") -> Digest:
        body = json.dumps(document).encode()
        digest = digest_of(body)
        self.manifests[digest] = body, media_type
        if tag:
            self.tags[NAME, tag] = digest
        return digest

    def image(self, *layers: bytes, tag: str = "v1") -> Digest:
        config = self.blob(b'{"config": %d}' % len(layers))
        described = [self.descriptor(self.blob(layer)) for layer in layers]
        return self.manifest({"schemaVersion": 2, "config": self.descriptor(config), "layers": described}, tag=tag)

    def descriptor(self, digest: Digest, **more: object) -> dict[str, object]:
        content, media_type = self.blobs.get(digest, b""), "application/vnd.oci.image.layer.v1.tar"
        if digest in self.manifests:
            content, media_type = self.manifests[digest]
        return {"digest": str(digest), "size": len(content), "mediaType": media_type, **more}

    def count(self, what: str) -> int:
        """Questions that begin so."""
        return sum(line.startswith(what) for line in self.asked)

    # Registries

    async def _ask(self, line: str) -> None:
        self.asked.append(line)
        await trio.sleep(self.pause)
        if self.error is not None:
            raise self.error

    def allowed(self, registry: str) -> bool:
        return registry == REGISTRY

    async def head_manifest(self, name: Name, reference: str, client: ClientCredentials | None) -> ManifestInfo:
        return (await self._manifest("head", name, reference))[0]

    async def get_manifest(self, name: Name, reference: str, client: ClientCredentials | None) -> tuple[ManifestInfo, bytes]:
        return await self._manifest("get", name, reference)

    async def _manifest(self, how: str, name: Name, reference: str) -> tuple[ManifestInfo, bytes]:
        await self._ask(f"{how} {reference}")
        digest = Digest.parse(reference) if ":" in reference else self.tags.get((name, reference))
        if digest is None or digest not in self.manifests:
            raise NotFoundAtOrigin("no such manifest")
        body, media_type = self.manifests[digest]
        return ManifestInfo(digest, media_type, len(body)), body

    async def pass_through(self, name: Name, tail: str, query: str, client: ClientCredentials | None) -> Passed:
        await self._ask(f"list {tail}?{query}")
        return Passed(200, (("Content-Type", "application/json"), ("Link", "</v2/x>; rel=next")), b'{"tags": ["v1"]}')

    def blob_source(self, name: Name, digest: Digest, client: ClientCredentials | None) -> Source:
        return Source(f"http://{name.registry}/v2/{name.repository}/blobs/{digest}", requester="mirror")

    def manifest_source(self, name: Name, digest: Digest, client: ClientCredentials | None) -> Source:
        return Source(f"http://{name.registry}/v2/{name.repository}/manifests/{digest}", requester="mirror")

    # Authorizer

    async def check(
        self, name: Name, digest: Digest, client: ClientCredentials | None, *, manifest: bool | None = None
    ) -> Grant:
        await trio.lowlevel.checkpoint()
        self.asked.append(f"may {digest}")
        if (client.header if client is not None else None) in self.denied:
            raise MirrorDenied(401, "UNAUTHORIZED", "authentication required", challenge='Basic realm="x"')
        return Grant(self.private, self.shared)

    # Origin

    def _content(self, source: Source) -> tuple[Digest, bytes]:
        digest = Digest.parse(source.url.rpartition("/")[2])
        content = self.manifests[digest][0] if digest in self.manifests else self.blobs.get(digest)
        if content is None:
            raise NotFoundAtOrigin("no such content")
        return digest, self.lies.get(digest, content)

    async def head(self, source: Source) -> OriginInfo:
        await self._ask(f"HEAD {source.url}")
        return OriginInfo(len(self._content(source)[1]), ranges=True)

    @asynccontextmanager
    async def read(
        self, source: Source, start: int = 0, stop: int | None = None, *, expect: OriginInfo | None = None
    ) -> AsyncIterator[Body]:
        await self._ask(f"READ {source.url}")
        digest, content = self._content(source)
        yield Body(self, digest, content, start, len(content) if stop is None else stop)


@dataclass
class Body:
    """An open read of the origin, in chunks of 64 KiB."""

    registry: Registry
    digest: Digest
    content: bytes
    start: int
    stop: int

    @property
    def length(self) -> int | None:
        return len(self.content)

    def chunks(self) -> Body:
        self.position = self.start
        return self

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        registry = self.registry
        if self.position >= self.stop:
            raise StopAsyncIteration
        if sum(registry.sent.values()) >= registry.holds_after:
            await registry.open.wait()
        await trio.lowlevel.checkpoint()
        if registry.stops_after is not None and sum(registry.sent.values()) >= registry.stops_after:
            raise registry.error or OriginUnreachable("it broke off")
        chunk = self.content[self.position : min(self.stop, self.position + 64 * 1024)]
        self.position += len(chunk)
        registry.sent[self.digest] = registry.sent.get(self.digest, 0) + len(chunk)
        return chunk


@dataclass
class Reply:
    """What a client got; `cut` if the body ended before its length."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut: bool = False

    @property
    def errors(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.body)["errors"]
        return found


class Client:
    """One connection to the mirror."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._http = h11.Connection(h11.CLIENT)

    async def get(self, path: str, *headers: tuple[str, str], method: str = "GET", host: str = "localhost") -> Reply:
        await self.ask(path, *headers, method=method, host=host)
        return await self.reply()

    async def ask(self, path: str, *headers: tuple[str, str], method: str = "GET", host: str = "localhost") -> None:
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        request = h11.Request(method=method, target=path, headers=[("Host", host), *headers])
        await self.stream.send_all((self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b""))

    async def post(self, path: str, body: bytes, *headers: tuple[str, str]) -> Reply:
        framed = [("Host", "localhost"), ("Content-Length", str(len(body))), *headers]
        events = [h11.Request(method="POST", target=path, headers=framed), h11.Data(data=body), h11.EndOfMessage()]
        await self.stream.send_all(b"".join(self._http.send(event) or b"" for event in events))
        return await self.reply()

    async def reply(self) -> Reply:
        head = await self.event()
        assert isinstance(head, h11.Response), head
        found = Reply(head.status_code, {n.decode(): v.decode() for n, v in head.headers}, b"")
        body = bytearray()
        while True:
            try:
                event = await self.event()
            except h11.RemoteProtocolError:
                found.cut = True
                break
            if not isinstance(event, h11.Data):
                break
            body += event.data
        found.body = bytes(body)
        return found

    async def event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            try:
                data = await self.stream.receive_some(65536)
            except trio.BrokenResourceError:
                data = b""
            self._http.receive_data(data)
        return event

    async def raw(self, data: bytes) -> bytes:
        """Send bytes; everything until the server closes."""
        await self.stream.send_all(data)
        got = bytearray()
        try:
            while part := await self.stream.receive_some(65536):
                got += part
        except trio.BrokenResourceError:
            pass
        return bytes(got)


class Desk:
    """The mirror under test.

    Attributes:
        wall: Wall seconds, for the age of tags.
    """

    def __init__(self, registry: Registry, settings: MirrorSettings, store: MemoryStore) -> None:
        self.registry = registry
        self.settings = settings
        self.store = store
        self.tally = Tally()
        self.wall = 1_800_000_000.0
        self.discovery = ScriptedDiscovery()
        self.catalogue = Catalogue()
        membership = SimulatedMembership.draw(Random("mirror"))
        membership.is_open = False
        self.membership = membership
        policy = replace(Policy(), settle=0.001, settle_bound=0.01)
        self.service = DownloadService(membership, store, self.discovery, registry, policy=policy, rng=Random(5))
        self.port = 0

    async def connect(self) -> Client:
        return Client(await trio.open_tcp_stream("127.0.0.1", self.port))

    async def get(self, path: str, *headers: tuple[str, str], method: str = "GET", host: str = "localhost") -> Reply:
        """One request on a connection of its own."""
        client = await self.connect()
        async with client.stream:
            return await client.get(path, *headers, method=method, host=host)

    def blob(self, digest: Digest) -> str:
        return f"/v2/{NAME.repository}/blobs/{digest}{NS}"

    def manifest(self, reference: object) -> str:
        return f"/v2/{NAME.repository}/manifests/{reference}{NS}"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        face = listen(self.settings)
        assert face is not None
        with face:
            self.port = face.getsockname()[1]
            async with trio.open_nursery() as nursery:
                await nursery.start(self.service.run)
                self.resolver = Resolver(
                    self.registry, self.registry, self.service, self.catalogue, self.settings, self.tally,
                    nursery=nursery, wall_clock=lambda: self.wall,
                )  # fmt: skip
                self.pulls = Pulls(self.resolver.blobs_of)
                routes = Routes(self.registry, self.registry, self.service, self.resolver, self.settings, self.tally)
                server = MirrorServer(routes, self.service, self.settings, self.tally, self.pulls)
                nursery.start_soon(server.run, face)
                task_status.started()


def play(script: Callable[[Desk], Awaitable[None]], seconds: float = 20, **settings: Any) -> None:
    """Run a script against a mirror; at the end no client is connected and nothing is in use."""

    async def main() -> None:
        with trio.fail_after(seconds), MemoryStore() as store:
            listen_at = Endpoint("127.0.0.1", 0)
            desk = Desk(Registry(), MirrorSettings(**{"listen": listen_at, "answer_timeout": 2.0, **settings}), store)
            async with trio.open_nursery() as nursery:
                await nursery.start(desk.run)
                await script(desk)
                while desk.tally.clients:  # noqa: ASYNC110 - the server has no event for it
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            assert not [entry for entry in store.entries() if entry.in_use]

    trio.run(main)


def runs(**settings: Any) -> Callable[[Callable[[Desk], Awaitable[None]]], Callable[[], None]]:
    """Make a test of a script."""

    def decorate(script: Callable[[Desk], Awaitable[None]]) -> Callable[[], None]:
        def test() -> None:
            play(script, **settings)

        test.__name__ = script.__name__
        test.__doc__ = script.__doc__
        return test

    return decorate
