"""The mirror's hub face on real loopback sockets, over a real download service and origin layer; the hub is in memory."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import trio

from simulations.membership import SimulatedMembership
from swarm.config import MirrorSettings
from swarm.download.policy import Policy
from swarm.download.service import DownloadService
from swarm.egress import EgressPolicy, EgressSettings
from swarm.mirror.authorize import Authorizer
from swarm.mirror.catalogue import Catalogue
from swarm.mirror.hub import Hub
from swarm.mirror.hub_catalogue import HubCatalogue
from swarm.mirror.hub_files import HubFiles, held_files
from swarm.mirror.hub_routes import HubRoutes
from swarm.mirror.listed import egress_rule
from swarm.mirror.pulls import Pulls
from swarm.mirror.registry import Registries
from swarm.mirror.resolve import Resolver
from swarm.mirror.routes import Routes
from swarm.mirror.server import MirrorServer, listen
from swarm.mirror.tally import Tally
from swarm.origin.origin import OriginReader, OriginSettings
from swarm.quantities import Endpoint
from swarm.store.memory import MemoryStore
from tests.download.scene import ScriptedDiscovery
from tests.mirror.desk import Client, Reply
from tests.mirror.fake_hub import FakeHub, HubReply
from tests.origin import web
from tests.origin.web import Asked, Web

HUB = "hub.example"
STORAGE = "cdn.example"


class HubDesk:
    """The mirror under test.

    Attributes:
        wall: Wall seconds, for the age of revisions and signatures.
        is_down: The hub and its storage hang up.
        instead: Replies to some paths of the hub that no hub gives.
    """

    def __init__(self, settings: MirrorSettings, store: MemoryStore, state: Path | None, is_open: bool) -> None:
        self.hub = FakeHub()
        self.settings = settings
        self.store = store
        self.wall = 1_800_000_000.0
        self.is_down = False
        self.instead: dict[str, HubReply | Callable[[Asked], Awaitable[None]]] = {}
        self.tally = Tally()
        self.discovery = ScriptedDiscovery()
        self.web = Web()
        self.web.serve(HUB, self._serve)
        self.web.serve(STORAGE, self._serve_storage)
        self.membership = SimulatedMembership.draw(Random("hub"))
        self.membership.is_open = is_open
        self.state = state
        self.port = 0

    async def _serve(self, asked: Asked) -> web.Reply | None:
        body = b""
        length = int(asked.headers.get("content-length", "0"))
        while len(body) < length:
            body += await asked.stream.receive_some()
        if self.is_down:
            return None
        found = self.instead.get(asked.target.partition("?")[0])
        if found is not None and not isinstance(found, HubReply):
            await found(asked)
            return None
        return _reply(asked, found or self.hub.serve(asked.method, asked.target, asked.headers, body, self.wall))

    async def _serve_storage(self, asked: Asked) -> web.Reply | None:
        await trio.lowlevel.checkpoint()
        if self.is_down:
            return None
        return _reply(asked, self.hub.storage(asked.method, asked.target, asked.headers, self.wall))

    async def connect(self) -> Client:
        return Client(await trio.open_tcp_stream("127.0.0.1", self.port))

    async def get(self, path: str, token: str = "", method: str = "GET", **headers: str) -> Reply:
        """One request below `/hf`, on a connection of its own."""
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        given = [*named, *([("Authorization", f"Bearer {token}")] if token else [])]
        client = await self.connect()
        async with client.stream:
            return await client.get(f"/hf{path}", *given, method=method)

    async def head(self, path: str, token: str = "") -> Reply:
        return await self.get(path, token, "HEAD")

    async def post(self, path: str, body: bytes, kind: str = "application/x-www-form-urlencoded", token: str = "") -> Reply:
        """A request with a body."""
        client = await self.connect()
        given = [("Content-Type", kind), *([("Authorization", f"Bearer {token}")] if token else [])]
        async with client.stream:
            return await client.post(f"/hf{path}", body, *given)

    def forget_rights(self) -> None:
        """As after a restart: what is on the disk stays."""
        for table in (self.authorizer._closed, self.authorizer._private, self.asks.rights._kept, self.asks._refusals):
            table.clear()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        egress = EgressPolicy(
            EgressSettings(),
            rules={"mirror": egress_rule(self.settings)},
            resolver=self.web.resolve,
            connector=self.web.connect,
        )
        face = listen(self.settings)
        assert face is not None
        with face:
            self.port = face.getsockname()[1]
            async with (
                OriginReader(egress, OriginSettings(retries=0), rng=random.Random(1)) as origin,
                trio.open_nursery() as nursery,
            ):
                self.web._nursery = nursery
                policy = replace(Policy(), settle=0.001, settle_bound=0.01)
                service = DownloadService(self.membership, self.store, self.discovery, origin, policy=policy, rng=Random(5))
                self.service = service
                await nursery.start(service.run)
                self.asks = Hub(self.settings, origin)
                self.catalogue = HubCatalogue(HUB, self.state)
                self.authorizer = Authorizer(self.asks, held_files(self.asks, self.catalogue, self.store))
                self.files = HubFiles(
                    self.asks, self.authorizer, service, self.store, self.catalogue, self.settings, self.tally,
                    wall_clock=lambda: self.wall,
                )  # fmt: skip
                registries = Registries(self.settings, origin)
                resolver = Resolver(
                    registries, self.authorizer, service, Catalogue(), self.settings, self.tally, nursery=nursery
                )
                hub = HubRoutes(HUB, self.files, service, self.settings)
                self.routes = routes = Routes(registries, self.authorizer, service, resolver, self.settings, self.tally, hub)
                pulls = Pulls(resolver.blobs_of)
                nursery.start_soon(MirrorServer(routes, service, self.settings, self.tally, pulls).run, face)
                task_status.started()


def _reply(asked: Asked, found: HubReply) -> web.Reply:
    headers: Mapping[str, str] = {"content-length": str(len(found.body)), **found.headers}
    return web.Reply(found.status, headers, found.body)


def play(
    script: Callable[[HubDesk], Awaitable[None]],
    *,
    seconds: float = 20,
    state: Path | None = None,
    store: MemoryStore | None = None,
    is_open: bool = False,
    **settings: Any,
) -> None:
    """Run a script against a mirror; at the end no client is connected and nothing is in use."""

    async def main() -> None:
        with trio.fail_after(seconds), store or MemoryStore() as kept:
            chosen = {"listen": Endpoint("127.0.0.1", 0), "answer_timeout": 2.0, "registry_timeout": 1.0, **settings}
            desk = HubDesk(MirrorSettings(**{"huggingface": f"http://{HUB}", **chosen}), kept, state, is_open)
            async with trio.open_nursery() as nursery:
                await nursery.start(desk.run)
                await script(desk)
                while desk.tally.clients:  # noqa: ASYNC110 - the server has no event for it
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            assert not [entry for entry in kept.entries() if entry.in_use]
            desk.catalogue.save()

    trio.run(main)


def runs(**settings: Any) -> Callable[[Callable[[HubDesk], Awaitable[None]]], Callable[[], None]]:
    """Make a test of a script."""

    def decorate(script: Callable[[HubDesk], Awaitable[None]]) -> Callable[[], None]:
        def test() -> None:
            play(script, **settings)

        test.__name__ = script.__name__
        test.__doc__ = script.__doc__
        return test

    return decorate
