"""Whole images on somebody's word instead of a runtime's requests: `swarm image pull` and `swarm image ls`."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import trio

from swarm.download.request import Fetched, FetchRequest
from swarm.edges import StoredTask
from swarm.errors import ConfigError, NotFoundAtOrigin, OriginRefused, OriginUnreachable, SwarmError
from swarm.mirror.catalogue import Child, Contents
from swarm.mirror.edges import Authorizer, Grant, MirrorError, Registries
from swarm.mirror.paths import Name, parse_image
from swarm.mirror.resolve import MACHINES, Manifest, Resolver
from swarm.task import Digest

LAYERS_AT_ONCE: Final = 4
"""More only divides the same link; runtimes take three to six."""

ALL: Final = "all"


class Fetches(Protocol):
    """What is asked of the download service."""

    def is_here(self, digest: Digest) -> bool: ...
    async def fetch(self, request: FetchRequest, progress: None = None, opened: None = None) -> tuple[Fetched, StoredTask]: ...


class Images:
    """Pulls images into the store, and tells which are known."""

    def __init__(self, registries: Registries, authorizer: Authorizer, service: Fetches, resolver: Resolver) -> None:
        self._registries = registries
        self._authorizer = authorizer
        self._service = service
        self._resolver = resolver

    async def pull(self, image: str, wanted: str | None) -> dict[str, Any]:
        """Have all of an image, with this node's own credentials.

        Args:
            image: As people write it.
            wanted: `os/architecture` of an index's image, or `all`; default: this machine's.

        Returns:
            `{"image", "digest", "platforms", "bytes", "seconds", "from_origin", "from_peers", "from_local", "blobs": [...]}`.

        Raises:
            SwarmError: What cannot be named, reached, read or kept.
        """
        began = trio.current_time()
        with _translated(image):
            name, reference = parse_image(image)
            if not self._registries.allowed(name.registry):
                raise ConfigError(f"{name.registry} is not among the registries of this mirror; list it in mirror.registries")
            digest = await self._digest(name, reference)
            platforms, blobs = await self._blobs(name, digest, wanted)
            rows = await self._fetch_all(name, blobs)
        return {
            "image": f"{name}{'@' if ':' in reference else ':'}{reference}",
            "digest": str(digest),
            "platforms": platforms,
            "seconds": round(trio.current_time() - began, 3),
            **{key: sum(row[key] for row in rows) for key in ("bytes", "from_origin", "from_peers", "from_local")},
            "blobs": rows,
        }

    async def _digest(self, name: Name, reference: str) -> Digest:
        return Digest.parse(reference) if ":" in reference else (await self._resolver.resolve(name, reference, None)).digest

    async def _blobs(self, name: Name, digest: Digest, wanted: str | None) -> tuple[list[str], list[Child]]:
        """The platforms chosen, and their blobs, each once."""
        manifest = await self._manifest(name, digest)
        if not manifest.contents.manifests:
            return [], list(dict.fromkeys(child for child in manifest.contents.blobs if not child.elsewhere))
        chosen = _choose(manifest.contents, wanted)
        blobs: dict[Child, None] = {}
        for child in chosen:
            inner = await self._manifest(name, child.digest)
            blobs.update(dict.fromkeys(blob for blob in inner.contents.blobs if not blob.elsewhere))
        return [child.platform for child in chosen if child.platform], list(blobs)

    async def _manifest(self, name: Name, digest: Digest) -> Manifest:
        grant = await self._authorizer.check(name, digest, None, manifest=True)
        return await self._resolver.manifest(name, digest, grant, None)

    async def _fetch_all(self, name: Name, blobs: list[Child]) -> list[dict[str, Any]]:
        rows: dict[Digest, dict[str, Any]] = {}
        failures: list[SwarmError] = []
        limit = trio.CapacityLimiter(LAYERS_AT_ONCE)

        async def fetch(child: Child) -> None:
            async with limit:
                try:
                    rows[child.digest] = await self._fetch(name, child)
                except SwarmError as error:  # raised outside, or the nursery would wrap it in a group
                    failures.append(error)
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for child in {child.digest: child for child in blobs}.values():
                nursery.start_soon(fetch, child)
        if failures:
            raise failures[0]
        return list({child.digest: rows[child.digest] for child in blobs}.values())

    async def _fetch(self, name: Name, child: Child) -> dict[str, Any]:
        grant: Grant = await self._authorizer.check(name, child.digest, None, manifest=False)
        source = self._registries.blob_source(name, child.digest, None)
        request = FetchRequest(source, child.digest, share=grant.shared, private=grant.private, immutable=True)
        fetched, stored = await self._service.fetch(request)
        stored.close()
        return {
            "digest": str(child.digest),
            "media_type": child.media_type,
            "bytes": fetched.length,
            "seconds": round(fetched.seconds, 3),
            "from_origin": fetched.from_origin,
            "from_peers": fetched.from_peers,
            "from_local": fetched.from_local,
        }

    async def known(self) -> list[dict[str, Any]]:
        """Every tag asked for lately, the latest first, with what of its image is here."""
        rows = []
        for name, tag, known in self._resolver.catalogue.images():
            manifests = await self._here(known.info.digest)
            blobs = {child.digest: child for manifest in manifests for child in manifest.contents.blobs if not child.elsewhere}
            here = [child for child in blobs.values() if self._service.is_here(child.digest)]
            rows.append(
                {
                    "image": f"{name}:{tag}",
                    "digest": str(known.info.digest),
                    "asked": known.asked,
                    "blobs": len(blobs),
                    "blobs_here": len(here),
                    "bytes": sum(child.size for child in blobs.values()),
                    "bytes_here": sum(child.size for child in here),
                }
            )
        return rows

    async def _here(self, digest: Digest) -> list[Manifest]:
        """The manifest and, of an index, those of its manifests that are here."""
        top = await self._resolver.stored_manifest(digest)
        if top is None:
            return []
        inner = [await self._resolver.stored_manifest(child.digest) for child in top.contents.manifests]
        return [top, *(manifest for manifest in inner if manifest is not None)]


def _choose(contents: Contents, wanted: str | None) -> list[Child]:
    if wanted == ALL:
        return list(contents.manifests)
    machine = wanted or f"linux/{MACHINES.get(platform.machine(), platform.machine())}"
    chosen = [child for child in contents.manifests if child.platform == machine]
    if not chosen:
        there = ", ".join(sorted({child.platform for child in contents.manifests if child.platform})) or "none"
        raise ConfigError(f"the image is not made for {machine}; there is {there}: give --platform, or --platform all")
    return chosen[:1]


@contextmanager
def _translated(image: str) -> Iterator[None]:
    """Errors meant for HTTP clients in the words of the command line."""
    try:
        yield
    except MirrorError as error:
        advice = "; write REGISTRY/REPOSITORY:TAG or REGISTRY/REPOSITORY@DIGEST" if error.status == 400 else ""
        raise _FOR_PEOPLE.get(error.status, OriginUnreachable)(f"{image}: {error}{advice}") from error


_FOR_PEOPLE: Final[dict[int, Callable[[str], SwarmError]]] = {
    400: ConfigError,
    401: OriginRefused,
    403: OriginRefused,
    404: NotFoundAtOrigin,
}
