"""Who may read what through the mirror (SECURITY: 1.11).

Content is found by its digest, wherever it came from; whether somebody may have it is asked of the registry they name, with
the credentials they show, for this repository and this digest, before a byte is served.

`public` asks nobody.  `verify` asks for everybody.  `never` does too, and keeps the content from other nodes.  `auto` asks
whether anybody at all may read it, and only if not, whether this client may.  Of a registry that is not listed only what
anybody may read is served.

While a registry does not answer, what may be private is refused; in `auto`, what it never asked credentials for is not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import structlog
import trio

from swarm.edges import StoredTask
from swarm.errors import NotFoundAtOrigin, OriginError, OriginUnreachable
from swarm.mirror.access import ANONYMOUS, Asker
from swarm.mirror.edges import Grant, MirrorDenied
from swarm.mirror.flights import Flights
from swarm.mirror.paths import ClientCredentials, Name
from swarm.mirror.rights import Rights
from swarm.task import Digest, blob_task

MAX_CLOSED: Final = 4096
"""Repositories known to ask for credentials; one more costs one question."""

CLOSED_SECONDS: Final = 300.0
"""How long it is not asked again whether anybody may read a repository that asked for credentials."""

MAX_PRIVATE: Final = 16_384
"""Digests remembered as private; beyond these only what the store says counts."""

Held = Callable[[Digest], bool | None]
"""Whether this node has content with this digest, and may not give it to everybody (`True`), may (`False`); or has none."""

log = structlog.get_logger(__name__)


class Opens(Protocol):
    """`Store`, as far as it is needed here."""

    def open(self, task_id: bytes) -> StoredTask | None: ...


class SaysWhoMay(Protocol):
    """`registry.Registries` and `hub.Hub`, as far as they are needed here."""

    @property
    def rights(self) -> Rights: ...
    def trusts(self, registry: str) -> bool: ...
    def mode(self, name: Name) -> str: ...
    def asker(self, name: Name, client: ClientCredentials | None) -> Asker: ...
    def denied(self, name: Name, asker: Asker, status: int = 401) -> MirrorDenied: ...
    def refusal(self, name: Name, asker: Asker, status: int, what: str) -> OriginError | MirrorDenied: ...
    async def may_read(self, name: Name, digest: Digest, asker: Asker, *, manifest: bool | None = None) -> None: ...


def held_in(store: Opens) -> Held:
    """What the store knows of a digest."""

    def held(digest: Digest) -> bool | None:
        stored = store.open(blob_task(digest).id)
        if stored is None:
            return None
        try:
            return stored.private
        finally:
            stored.close()

    return held


class Authorizer:
    """See `mirror.edges.Authorizer`.

    Args:
        held: Whether content is here, and private.
    """

    def __init__(self, registries: SaysWhoMay, held: Held) -> None:
        self._registries = registries
        self._rights = registries.rights
        self._held = held
        self._flights: Flights[tuple[Name, Digest, bytes], None] = Flights()
        self._closed: OrderedDict[Name, float] = OrderedDict()
        self._private: OrderedDict[Digest, None] = OrderedDict()

    async def check(
        self, name: Name, digest: Digest, client: ClientCredentials | None, *, manifest: bool | None = None
    ) -> Grant:
        """Ask, or remember, whether this client may read this content of this repository.

        Args:
            manifest: Whether it is one; `None` if that is not known, which may cost a second question.

        Raises:
            MirrorDenied: It may not, or nobody can say.
            MirrorError: 401, its credentials are malformed.
            NotFoundAtOrigin: The registry says that there is no such thing.
            OriginError, NotPermitted: The registry cannot be asked.
        """
        asker = self._registries.asker(name, client)
        mode = self._registries.mode(name)
        if not self._registries.trusts(name.registry):
            if await self._anybody_may(name, digest, asker, manifest):
                return Grant(private=mode == "never", shared=mode != "never")
            raise self._registries.denied(name, asker)
        if mode == "public":
            await self._check_public(name, digest, asker, manifest)
            return Grant(private=False)
        if mode in ("verify", "never"):
            await self._require(name, digest, asker, manifest)
            self.note_private(digest)
            return Grant(private=True, shared=mode == "verify")
        if await self._anybody_may(name, digest, asker, manifest):
            return Grant(private=False)
        if asker.is_anonymous:
            raise self._registries.denied(name, asker)
        await self._require(name, digest, asker, manifest)
        self.note_private(digest)
        return Grant(private=True)

    async def _check_public(self, name: Name, digest: Digest, asker: Asker, manifest: bool | None) -> None:
        """What is public in one registry by configuration may be private where this node has it from."""
        if self._is_private(digest):
            await self._require(name, digest, asker, manifest)

    async def _anybody_may(self, name: Name, digest: Digest, asker: Asker, manifest: bool | None) -> bool:
        """Whether the registry lets everybody read it.

        Raises:
            NotFoundAtOrigin: It is not there, or not to be opened by this registry.
            MirrorDenied: Nobody can say, and it may be private.
        """
        now = trio.current_time()
        if self.is_closed(name) and self._rights.known(name, digest, ANONYMOUS.tag, now) != 200:
            return False
        try:
            await self._ask(name, digest, ANONYMOUS, manifest)
        except MirrorDenied:
            self.note_closed(name)
            return False
        except NotFoundAtOrigin:
            if asker.is_anonymous:
                raise
            return False  # some registries hide what they would refuse
        except OriginUnreachable as error:
            return self._without_registry(name, digest, error)
        self._closed.pop(name, None)
        if not self._registries.trusts(name.registry) and self._is_private(digest):
            # Private content is opened by a registry that is listed; any other could say yes to everything.
            raise NotFoundAtOrigin(f"{name} is not listed in mirror.registries, so it cannot open what is private elsewhere")
        return True

    def _without_registry(self, name: Name, digest: Digest, error: OriginError) -> bool:
        """The registry does not answer.  What is only to be had in public may be had: members keep private content from a
        node that does not say it may have it."""
        if self._rights.was_allowed(name, digest, ANONYMOUS.tag, trio.current_time()):
            return True
        if name in self._closed:
            return False
        if self._is_private(digest):
            raise self._unknown(name, error)
        log.debug("registry not asked for rights", name=str(name), reason=str(error))
        return True

    async def _require(self, name: Name, digest: Digest, asker: Asker, manifest: bool | None) -> None:
        try:
            await self._ask(name, digest, asker, manifest)
        except OriginUnreachable as error:
            if not self._rights.was_allowed(name, digest, asker.tag, trio.current_time()):
                raise self._unknown(name, error) from error

    async def _ask(self, name: Name, digest: Digest, asker: Asker, manifest: bool | None) -> None:
        known = self._rights.known(name, digest, asker.tag, trio.current_time())
        if known == 200:
            return
        if known is not None:
            raise self._registries.refusal(name, asker, known, str(digest))
        ask: Callable[[], Awaitable[None]] = lambda: self._registries.may_read(name, digest, asker, manifest=manifest)  # noqa: E731
        await self._flights.share((name, digest, asker.tag), ask)

    def _is_private(self, digest: Digest) -> bool:
        """Whether this node has it as private, or is about to: what somebody was granted counts before it is in the store."""
        return digest in self._private or bool(self._held(digest))

    def note_private(self, digest: Digest) -> None:
        """Somebody is granted it as private."""
        self._private[digest] = None
        self._private.move_to_end(digest)
        while len(self._private) > MAX_PRIVATE:
            self._private.popitem(last=False)

    def is_closed(self, name: Name) -> bool:
        """Whether it asked for credentials lately."""
        now = trio.current_time()
        return now < self._closed.get(name, now)

    def note_closed(self, name: Name) -> None:
        """It asked for credentials just now."""
        self._closed[name] = trio.current_time() + CLOSED_SECONDS
        self._closed.move_to_end(name)
        while len(self._closed) > MAX_CLOSED:
            self._closed.popitem(last=False)

    @staticmethod
    def _unknown(name: Name, error: OriginError) -> MirrorDenied:
        """Fail closed.  503 sends the client to the registry itself, which may answer it."""
        return MirrorDenied(503, "DENIED", f"{name.registry} cannot say who may read {name.repository}: {error}")
