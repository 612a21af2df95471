"""From what a client names to what it gets: tags to digests, digests to manifests, and whether all of it can be delivered.

A client that was given a manifest goes on with this mirror (podman for the whole pull), so a manifest is only given out when
its blobs can be had: they are in the store, the registry answers, or members have them.
"""

from __future__ import annotations

import platform
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import structlog
import trio

from swarm.config import MirrorSettings
from swarm.download.reading import Reader
from swarm.download.request import FetchRequest
from swarm.errors import IntegrityError, NotFoundAtOrigin, NotPermitted, OriginError, OriginUnreachable, StoreError, SwarmError
from swarm.mirror.catalogue import MAX_MANIFEST_BYTES, Catalogue, Child, Contents, read_manifest
from swarm.mirror.edges import Authorizer, Grant, ManifestInfo, MirrorError, Registries
from swarm.mirror.flights import Flights
from swarm.mirror.paths import ClientCredentials, Name
from swarm.mirror.tally import Tally
from swarm.task import Digest

log = structlog.get_logger(__name__)

KEPT_BYTES: Final = 16 * 1024 * 1024
"""Manifests kept in memory: some thousand of them, and thousands of answers a second."""

ALIVE_SECONDS: Final = 30.0
"""A registry that answered so lately is trusted to deliver blobs."""

DOWN_SECONDS: Final = 5.0
"""A registry that did not answer is not waited for again so long, where something stale will do."""

SWARM_SECONDS: Final = 2.5
"""A manifest is a few kilobytes: when the swarm has not brought it by then, this node reads it itself."""

PREPARED_SECONDS: Final = 30.0
MAX_PREPARED: Final = 4096
PREPARING_AT_ONCE: Final = 8
"""Look-ups for one manifest at a time: an index may list thousands."""

MAX_PREPARING: Final = 64
"""Manifests whose children are being looked up."""

MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


class Contained(Protocol):
    """What the mirror asks of the download service."""

    def is_here(self, digest: Digest) -> bool: ...
    def has_room(self, contents: Mapping[Digest, int]) -> bool: ...
    async def length_of(self, request: FetchRequest) -> int: ...
    async def meet_holders(self, digest: Digest, *, private: bool = False) -> bool: ...
    async def read(
        self, request: FetchRequest, span: Callable[[int], tuple[int, int]], *, strict: bool = False, prefix: bool = True
    ) -> Reader: ...


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest, original bytes."""

    digest: Digest
    media_type: str
    body: bytes
    contents: Contents
    blobs: frozenset[Digest]


class Resolver:
    """See the module.  Background look-ups run in `nursery`.

    Args:
        wall_clock: Wall seconds, because tags are remembered over a restart.
    """

    def __init__(
        self,
        registries: Registries,
        authorizer: Authorizer,
        service: Contained,
        catalogue: Catalogue,
        settings: MirrorSettings,
        tally: Tally,
        *,
        nursery: trio.Nursery,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._registries = registries
        self._authorizer = authorizer
        self._service = service
        self.catalogue = catalogue
        self._settings = settings
        self._tally = tally
        self._nursery = nursery
        self._wall_clock = wall_clock
        self._tags: Flights[tuple[Name, str, ClientCredentials | None], ManifestInfo] = Flights()
        self._bodies: Flights[Digest, Manifest] = Flights()
        self._kept: OrderedDict[Digest, Manifest] = OrderedDict()
        self._kept_bytes = 0
        self._alive: dict[str, float] = {}
        self._down: dict[str, float] = {}
        self._prepared: OrderedDict[Digest, float] = OrderedDict()
        self._preparing = 0

    # --- tags ---

    async def resolve(self, name: Name, tag: str, client: ClientCredentials | None) -> ManifestInfo:
        """What a tag stands for now; or lately, while its registry does not answer.

        Raises:
            MirrorError: 404, there is no such tag.
            OriginError, NotPermitted: The registry cannot say, and nothing is remembered.
        """
        known = self.catalogue.tag(name, tag)
        age = self._wall_clock() - known.asked if known is not None else 0.0
        if known is not None and 0 <= age < self._settings.tag_cache:
            return known.info
        usable = known is not None and 0 <= age < self._settings.tag_cache + self._settings.tag_stale
        if known is not None and usable and self._down.get(name.registry, -DOWN_SECONDS) + DOWN_SECONDS > trio.current_time():
            self._tally.stale[self._tally.label(name.registry)] += 1
            return known.info
        try:
            return await self._tags.share((name, tag, client), partial(self._ask, name, tag, client))
        except OriginUnreachable as error:
            self._note_down(name.registry)
            if known is None or not usable:
                raise
            self._tally.stale[self._tally.label(name.registry)] += 1
            log.warning("mirror_tag_stale", image=f"{name}:{tag}", digest=str(known.info.digest), reason=str(error))
            return known.info

    async def _ask(self, name: Name, tag: str, client: ClientCredentials | None) -> ManifestInfo:
        try:
            info = await self._registries.head_manifest(name, tag, client)
        except NotFoundAtOrigin as error:
            self.catalogue.forget_tag(name, tag)
            raise MirrorError(404, "MANIFEST_UNKNOWN", "the registry has no such manifest") from error
        self._note_alive(name.registry)
        self.catalogue.note_tag(name, tag, info, self._wall_clock())
        self.catalogue.note_children(Contents(info.media_type, (Child(info.digest, info.length, info.media_type),)))
        return info

    def is_alive(self, registry: str) -> bool:
        """Whether the registry answered lately."""
        return self._alive.get(registry, -ALIVE_SECONDS) + ALIVE_SECONDS > trio.current_time()

    def read_ahead(self, name: Name, info: ManifestInfo, client: ClientCredentials | None) -> None:
        """A client that asked what a tag stands for asks for that next."""
        if info.digest not in self._kept and self._preparing < MAX_PREPARING:
            child = Child(info.digest, info.length, info.media_type)
            self._aside(partial(self._read_ahead, name, child, client))

    def _note_alive(self, registry: str) -> None:
        self._alive[registry] = trio.current_time()
        self._down.pop(registry, None)
        _bound(self._alive)

    def _note_down(self, registry: str) -> None:
        self._down[registry] = trio.current_time()
        self._alive.pop(registry, None)
        _bound(self._down)

    # --- manifests ---

    async def manifest(self, name: Name, digest: Digest, grant: Grant, client: ClientCredentials | None) -> Manifest:
        """The manifest, whose blobs can be delivered.

        Raises:
            MirrorError: 404 where nobody has it, 502 for one that nobody should read, 503 where its blobs cannot be had.
            OriginError, NotPermitted: It cannot be read.
        """
        manifest = await self._body(name, digest, grant, client)
        self._require_room(manifest)
        await self._require_deliverable(name, manifest, grant, client)
        self._prepare(name, manifest, client)
        return manifest

    async def _body(self, name: Name, digest: Digest, grant: Grant, client: ClientCredentials | None) -> Manifest:
        kept = self._kept.get(digest)
        if kept is not None:
            self._kept.move_to_end(digest)
            return kept
        return await self._bodies.share(digest, partial(self._obtain, name, digest, grant, client))

    async def _obtain(self, name: Name, digest: Digest, grant: Grant, client: ClientCredentials | None) -> Manifest:
        body: bytes | None = None
        with trio.move_on_after(SWARM_SECONDS):
            body = await self._from_swarm(name, digest, grant, client)
        if body is None:
            info, body = await self._registries.get_manifest(name, str(digest), client)
            self._note_alive(name.registry)
            self.catalogue.note_type(digest, info.media_type)
        manifest = self._read(digest, body)
        self._keep(manifest)
        return manifest

    async def stored_manifest(self, digest: Digest) -> Manifest | None:
        """The manifest, if it is here; nobody is asked for it."""
        kept = self._kept.get(digest)
        if kept is not None or not self._service.is_here(digest):
            return kept
        reader = await self._service.read(FetchRequest(None, digest), _everything)
        try:
            body = reader.read() if reader.complete and reader.stop <= MAX_MANIFEST_BYTES else b""
        except StoreError:
            return None
        finally:
            reader.close()
        return self._read(digest, body)

    def _read(self, digest: Digest, body: bytes) -> Manifest:
        contents = read_manifest(body, self.catalogue.media_type(digest))
        self.catalogue.note_type(digest, contents.media_type)
        self.catalogue.note_children(contents)
        blobs = frozenset(child.digest for child in contents.blobs if not child.elsewhere)
        return Manifest(digest, contents.media_type, body, contents, blobs)

    async def _from_swarm(self, name: Name, digest: Digest, grant: Grant, client: ClientCredentials | None) -> bytes | None:
        """From the store, members or the registry, whoever's turn it is; `None` if that did not work out."""
        source = self._registries.manifest_source(name, digest, client)
        request = FetchRequest(
            source, digest, share=grant.shared, private=grant.private, length=self.catalogue.size(digest), immutable=True
        )
        try:
            reader = await self._service.read(request, _everything, strict=True)
        except NotFoundAtOrigin as error:
            raise MirrorError(404, "MANIFEST_UNKNOWN", "the registry has no such manifest") from error
        except (OriginError, NotPermitted):
            return None
        try:
            if reader.stop > MAX_MANIFEST_BYTES:
                raise MirrorError(502, "MANIFEST_INVALID", f"a manifest of {reader.stop} bytes is not read")
            await reader.wait()
            if reader.stop and reader.source(0) == "origin":
                self._note_alive(name.registry)
            return reader.read()
        except (OriginError, NotPermitted, IntegrityError) as error:
            self.catalogue.doubt_size(digest)
            log.info("mirror_manifest_not_from_swarm", image=str(name), digest=str(digest), reason=str(error))
            return None
        finally:
            reader.close()

    def _keep(self, manifest: Manifest) -> None:
        old = self._kept.pop(manifest.digest, None)
        self._kept_bytes += len(manifest.body) - (len(old.body) if old is not None else 0)
        self._kept[manifest.digest] = manifest
        while self._kept_bytes > KEPT_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped.body)

    def blobs_of(self, digest: Digest) -> frozenset[Digest]:
        """Blobs of a manifest given out lately; of an index, none."""
        kept = self._kept.get(digest)
        return kept.blobs if kept is not None else frozenset()

    # --- whether all of it can be delivered ---

    def _require_room(self, manifest: Manifest) -> None:
        """podman would come for the blobs, and not ask its registry when they do not fit."""
        if not manifest.contents.manifests:
            missing = {child.digest: child.size for child in self._missing(manifest.contents)}
            if missing and not self._service.has_room(missing):
                size = sum(missing.values())
                raise MirrorError(507, "UNAVAILABLE", f"no room for the {size} bytes of the blobs that are not here yet")

    async def _require_deliverable(
        self, name: Name, manifest: Manifest, grant: Grant, client: ClientCredentials | None
    ) -> None:
        missing = self._missing(manifest.contents)
        if not missing or self.is_alive(name.registry):
            return
        found = False

        async def ask(question: Callable[[], Awaitable[bool]]) -> None:
            nonlocal found
            if await question():
                found = True
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, partial(self._registry_answers, name, manifest.digest, client))
            nursery.start_soon(ask, partial(self._members_have, missing, grant))
        if not found:
            raise MirrorError(503, "UNAVAILABLE", "the registry does not answer, and not all blobs are in the swarm")

    def _missing(self, contents: Contents) -> list[Child]:
        """Of a manifest the blobs that are not here; of an index all of its manifests, unless this node could serve one."""
        if contents.manifests:
            here = [child for child in contents.manifests if child.digest in self._kept or self._service.is_here(child.digest)]
            return [] if here else _for_this_machine(contents.manifests)
        return [child for child in contents.blobs if not child.elsewhere and not self._service.is_here(child.digest)]

    async def _registry_answers(self, name: Name, digest: Digest, client: ClientCredentials | None) -> bool:
        try:
            await self._registries.head_manifest(name, str(digest), client)
        except (OriginError, NotPermitted, MirrorError):
            return False
        self._note_alive(name.registry)
        return True

    async def _members_have(self, missing: list[Child], grant: Grant) -> bool:
        """Whether members can be reached that have all of these, each of them any."""
        if not grant.shared:
            return False
        limit = trio.CapacityLimiter(PREPARING_AT_ONCE)
        lacking = False

        async def meet(child: Child) -> None:
            nonlocal lacking
            async with limit:
                if not await self._service.meet_holders(child.digest, private=grant.private):
                    lacking = True
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for child in missing:
                nursery.start_soon(meet, child)
        return not lacking

    # --- ahead of the client ---

    def _prepare(self, name: Name, manifest: Manifest, client: ClientCredentials | None) -> None:
        """Look up what the client will ask for next, all at once instead of one by one."""
        contents, now = manifest.contents, trio.current_time()
        if self._preparing >= MAX_PREPARING or self._prepared.get(manifest.digest, -PREPARED_SECONDS) + PREPARED_SECONDS > now:
            return
        self._prepared[manifest.digest] = now
        if len(self._prepared) > MAX_PREPARED:
            self._prepared.popitem(last=False)
        if contents.manifests:
            ahead = [c for c in _for_this_machine(contents.manifests)[:1] if c.digest not in self._kept]
            for child in ahead:
                self._aside(partial(self._read_ahead, name, child, client))
        else:
            missing = self._missing(contents)
            if missing:
                self._aside(partial(self._prepare_children, name, missing, client))

    def _aside(self, look_up: Callable[[], Awaitable[None]]) -> None:
        """Do it beside the answer, for a bounded time; a bug met here costs this look-up, not the mirror."""

        async def guarded() -> None:
            self._preparing += 1
            try:
                with trio.move_on_after(PREPARED_SECONDS):
                    await look_up()
            except Exception:
                log.exception("mirror_look_up_failed")
            finally:
                self._preparing -= 1

        self._nursery.start_soon(guarded)

    async def _prepare_children(self, name: Name, missing: list[Child], client: ClientCredentials | None) -> None:
        """Find out whether the client may read them, and who has them, so that neither waits until it asks."""
        limit = trio.CapacityLimiter(PREPARING_AT_ONCE)

        async def ask(child: Child) -> None:
            async with limit:
                try:
                    grant = await self._authorizer.check(name, child.digest, client, manifest=False)
                except SwarmError as error:
                    log.debug("mirror_not_granted_ahead", image=str(name), digest=str(child.digest), reason=str(error))
                    return
                if grant.shared:
                    await self._service.meet_holders(child.digest, private=grant.private)

        async with trio.open_nursery() as nursery:
            for child in missing:
                nursery.start_soon(ask, child)

    async def _read_ahead(self, name: Name, child: Child, client: ClientCredentials | None) -> None:
        """The manifest of this machine's platform: the client of a mirror on loopback asks for it next."""
        try:
            grant = await self._authorizer.check(name, child.digest, client, manifest=True)
            manifest = await self._body(name, child.digest, grant, client)
            self._prepare(name, manifest, client)
        except SwarmError as error:
            log.debug("mirror_read_ahead_failed", image=str(name), digest=str(child.digest), reason=str(error))


def _for_this_machine(children: tuple[Child, ...]) -> list[Child]:
    """Entries of an index for this machine's platform; all if there is none."""
    wanted = f"linux/{MACHINES.get(platform.machine(), platform.machine())}"
    fitting = [child for child in children if child.platform == wanted]
    return fitting[:1] or list(children)


def _everything(length: int) -> tuple[int, int]:
    return 0, length


def _bound(table: dict[str, float], limit: int = 1024) -> None:
    """Registries are named by clients."""
    while len(table) > limit:
        del table[next(iter(table))]
