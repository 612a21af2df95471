"""The mirror as the node sees it: built from its parts, run in one nursery, asked for its numbers and its images."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from swarm.config import MirrorSettings
from swarm.download.service import DownloadService
from swarm.errors import ConfigError
from swarm.metrics import Sample
from swarm.mirror.authorize import Authorizer, held_in
from swarm.mirror.catalogue import Catalogue
from swarm.mirror.hub import Hub
from swarm.mirror.hub_catalogue import HubCatalogue
from swarm.mirror.hub_files import HubFiles, held_files
from swarm.mirror.hub_routes import HubRoutes
from swarm.mirror.images import Images
from swarm.mirror.pulls import Pulls
from swarm.mirror.registry import Reader, Registries
from swarm.mirror.resolve import Resolver
from swarm.mirror.routes import Routes
from swarm.mirror.server import MirrorServer
from swarm.mirror.tally import Tally
from swarm.store.store import TaskStore

log = structlog.get_logger(__name__)

HOUSEKEEPING_SECONDS: Final = 2.0
SAVE_SECONDS: Final = 30.0


class Mirror:
    """See the module.  `run` it.

    Args:
        listener: Bound already; closed when `run` ends.
        directory: Where the catalogue is kept.

    Raises:
        ConfigError: Credentials that the settings name cannot be read.
    """

    def __init__(
        self,
        settings: MirrorSettings,
        listener: socket.socket,
        store: TaskStore,
        service: DownloadService,
        origin: Reader,
        directory: Path,
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._service = service
        self._registries = Registries(settings, origin)
        self._authorizer = Authorizer(self._registries, held_in(store))
        self._store = store
        self._hub = Hub(settings, origin) if settings.huggingface else None
        self._hub_catalogue = HubCatalogue(self._hub.host if self._hub is not None else "", directory / "mirror.hub")
        self.catalogue = Catalogue(directory / "mirror.state")
        self.tally = Tally()
        self._resolver: Resolver | None = None
        self._server: MirrorServer | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer clients until cancelled."""
        pulls = Pulls(lambda digest: self.resolver().blobs_of(digest))
        with self._listener:
            try:
                async with trio.open_nursery() as nursery:
                    resolver = Resolver(
                        self._registries, self._authorizer, self._service, self.catalogue, self._settings, self.tally,
                        nursery=nursery,
                    )  # fmt: skip
                    routes = Routes(
                        self._registries, self._authorizer, self._service, resolver, self._settings, self.tally,
                        hub=self._hub_routes(),
                    )  # fmt: skip
                    server = MirrorServer(routes, self._service, self._settings, self.tally, pulls)
                    self._resolver, self._server = resolver, server
                    nursery.start_soon(self._keep_house, pulls)
                    nursery.start_soon(server.run, self._listener)
                    task_status.started()
            finally:
                self._resolver = self._server = None
                pulls.expire(float("inf"))
                self.catalogue.save()
                self._hub_catalogue.save()

    def _hub_routes(self) -> HubRoutes | None:
        if self._hub is None:
            return None
        authorizer = Authorizer(self._hub, held_files(self._hub, self._hub_catalogue, self._store))
        files = HubFiles(self._hub, authorizer, self._service, self._store, self._hub_catalogue, self._settings, self.tally)
        return HubRoutes(self._hub.host, files, self._service, self._settings)

    async def drain(self) -> None:
        """Take no further request, and wait for the answers under way."""
        if self._server is not None:
            await self._server.drain()

    async def _keep_house(self, pulls: Pulls) -> None:
        saved = trio.current_time()
        while True:
            await trio.sleep(HOUSEKEEPING_SECONDS)
            now = trio.current_time()
            pulls.expire(now)
            if now - saved >= SAVE_SECONDS:
                saved = now
                self.catalogue.save()
                self._hub_catalogue.save()

    def resolver(self) -> Resolver:
        """The running resolver.

        Raises:
            ConfigError: The mirror is not running.
        """
        if self._resolver is None:
            raise ConfigError("the mirror is stopping")
        return self._resolver

    def samples(self) -> Iterator[Sample]:
        """See `metrics.METRICS`."""
        tally = self.tally
        for (registry, kind, status), count in tally.answers.items():
            yield "swarm_mirror_answers_total", {"registry": registry, "kind": kind, "status": str(status)}, count
        saved: dict[str, int] = {}
        for (registry, source), count in tally.sent.items():
            yield "swarm_mirror_sent_bytes_total", {"registry": registry, "source": source}, count
            saved[registry] = saved.get(registry, 0) + (count if source != "origin" else 0)
        for registry, count in saved.items():
            yield "swarm_mirror_saved_bytes_total", {"registry": registry}, count
        for registry, count in tally.stale.items():
            yield "swarm_mirror_stale_tags_total", {"registry": registry}, count
        for reason, count in tally.cut.items():
            yield "swarm_mirror_cut_bodies_total", {"reason": reason}, count
        yield "swarm_mirror_clients", {}, tally.clients

    async def pull(self, image: str, platform: str | None) -> dict[str, Any]:
        """See `images.Images.pull`."""
        return await self._images().pull(image, platform)

    async def images(self) -> list[dict[str, Any]]:
        """See `images.Images.known`."""
        return await self._images().known()

    def _images(self) -> Images:
        return Images(self._registries, self._authorizer, self._service, self.resolver())
