"""From what a client of the hub names to bytes: revisions to commits, files to digests, and contents through the swarm.

What a commit has is asked of the hub by every node, and believed from no other node.  What is in large file storage goes by
its SHA-256, as blobs of registries do.  What git has goes by the URL of its commit, is small, and is given out once it has
the id that the hub said.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, TypeVar

import structlog
import trio

from swarm.config import MirrorSettings
from swarm.download.reading import Reader
from swarm.download.request import Fetched, FetchRequest
from swarm.edges import Source, StoredTask
from swarm.errors import NotFoundAtOrigin, NotPermitted, OriginError, OriginUnreachable, SwarmError
from swarm.mirror.access import ANONYMOUS, Asker
from swarm.mirror.authorize import Authorizer, Held, Opens, held_in
from swarm.mirror.edges import Grant
from swarm.mirror.flights import Flights
from swarm.mirror.hub import ApiAnswer, FileInfo, Hub, HubDenied, HubMissing, Refusal
from swarm.mirror.hub_catalogue import HubCatalogue
from swarm.mirror.hub_paths import HubTarget, is_commit
from swarm.mirror.paths import ClientCredentials, Name
from swarm.mirror.resolve import Contained
from swarm.mirror.tally import Tally
from swarm.task import Digest, url_task

SWARM_SECONDS: Final = 4.0
"""A small file that the swarm has not brought by then is read by this node itself, within what clients wait for an answer."""

MAX_SMALL_BYTES: Final = 1024 * 1024
"""What may be read past the swarm, into memory."""

FORGET_SECONDS: Final = 5.0
MAX_FORGOTTEN: Final = 1024

API_AT_ONCE: Final = 8
"""Answers of the API being read: each may be megabytes, and clients choose how many they ask for."""

HASH_CHUNK_BYTES: Final = 1024 * 1024

PRIVATE_NOWHERE: Final = "what the hub shows to some only cannot be served while it does not answer"

log = structlog.get_logger(__name__)

V = TypeVar("V")


class Fetches(Contained, Protocol):
    """`DownloadService`, as far as it is needed here."""

    async def fetch(self, request: FetchRequest) -> tuple[Fetched, StoredTask]: ...
    def release(self, task_id: bytes) -> None: ...


class Removes(Protocol):
    """`Store`, as far as it is needed here."""

    async def remove(self, task_id: bytes) -> bool: ...


@dataclass(frozen=True, slots=True)
class Found:
    """A file that its asker may read.

    Attributes:
        source: Where the hub has it.
    """

    name: Name
    path: str
    info: FileInfo
    grant: Grant
    source: Source

    def request(self, digest: Digest | None) -> FetchRequest:
        return FetchRequest(
            self.source, digest, share=self.grant.shared, private=self.grant.private, length=self.info.size, immutable=True
        )


def held_files(hub: Hub, catalogue: HubCatalogue, store: Opens) -> Held:
    """What the store knows of an identity: of what is no digest, under every name that its content may lie."""
    by_digest = held_in(store)

    def held(identity: Digest) -> bool | None:
        place = hub.place_of(identity)
        if place is None or place.info.digest is not None:
            return by_digest(identity)
        known = catalogue.content(place.name, place.info.etag)
        if known is not None and (found := by_digest(known)) is not None:
            return found
        stored = store.open(url_task(hub.url(place.name, place.info, place.path)).id)
        if stored is None:
            return None
        try:
            return stored.private
        finally:
            stored.close()

    return held


class Arrived(Reader):
    """All of a file that has just been fetched, with where most of it came from."""

    def __init__(self, stored: StoredTask, start: int, stop: int, origin: str) -> None:
        super().__init__(stored, None, start, stop, held_back=False)
        self._from = origin

    def source(self, piece: int) -> str:
        return self._from


class HubFiles:
    """See the module.

    Args:
        wall_clock: Wall seconds, because revisions and answers are remembered over a restart.
    """

    def __init__(
        self,
        hub: Hub,
        authorizer: Authorizer,
        service: Fetches,
        store: Removes,
        catalogue: HubCatalogue,
        settings: MirrorSettings,
        tally: Tally,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._hub = hub
        self._authorizer = authorizer
        self._service = service
        self._store = store
        self._catalogue = catalogue
        self._fresh = settings.tag_cache
        self._stale = settings.tag_cache + settings.tag_stale
        self._tally = tally
        self._wall_clock = wall_clock
        self._api_limit = trio.CapacityLimiter(API_AT_ONCE)
        self._forgotten: OrderedDict[Name, float] = OrderedDict()
        self._files: Flights[tuple[Name, str, str, ClientCredentials | None], FileInfo] = Flights()
        self._answers: Flights[tuple[Name, str, ClientCredentials | None], ApiAnswer] = Flights()

    # --- which content --------------------------------------------------------------------------------------------

    async def find(self, name: Name, revision: str, path: str, client: ClientCredentials | None) -> Found:
        """What a file is at a revision, for a client that may read it.

        Raises:
            HubDenied, HubMissing: As the hub says.
            MirrorDenied: Nobody can say whether the client may.
            OriginError, NotPermitted: The hub cannot be asked, and nothing is remembered.
        """
        info = await self._info(name, revision, path, client)
        identity = self._hub.note_place(name, path, info)
        try:
            grant = await self._authorizer.check(name, identity, client)
        except (HubDenied, HubMissing) as error:
            if not isinstance(error, HubMissing) or error.hides:
                self._forget(name)
            raise
        asker = self._hub.asker(name, client)
        if not grant.private and not self._is_public(name, path, info, identity):
            grant = self._as_private(name, identity, asker)
        return Found(name, path, info, grant, self._hub.source(name, info, path, asker if grant.private else ANONYMOUS))

    def _is_public(self, name: Name, path: str, info: FileInfo, identity: Digest) -> bool:
        """Whether the hub ever showed it to everybody: what it could not be asked about is not taken for public here."""
        if self._hub.rights.was_allowed(name, identity, ANONYMOUS.tag, trio.current_time()):
            self._catalogue.note_file(name, path, info, public=True)
            return True
        known = self._catalogue.file(name, info.commit, path)
        return (known is not None and known.public) or self._hub.mode(name) == "public"

    def _as_private(self, name: Name, identity: Digest, asker: Asker) -> Grant:
        """For who was shown it with a token of his own, while the hub says nothing to everybody (it is down, or answers 429).

        Raises:
            HubDenied: 503, he was not.
        """
        if asker.is_anonymous or not self._hub.rights.was_allowed(name, identity, asker.tag, trio.current_time()):
            raise HubDenied(Refusal(503, "", PRIVATE_NOWHERE))
        self._authorizer.note_private(identity)
        return Grant(private=True)

    async def _info(self, name: Name, revision: str, path: str, client: ClientCredentials | None) -> FileInfo:
        known = self._known(name, revision, path, self._fresh)
        if known is not None:
            return known
        try:
            return await self._files.share((name, revision, path, client), partial(self._ask, name, revision, path, client))
        except OriginUnreachable as error:
            known = self._known(name, revision, path, self._stale)
            if known is None:
                raise
            self._note_stale(name, revision, error)
            return known

    def _known(self, name: Name, revision: str, path: str, seconds: float) -> FileInfo | None:
        commit = revision
        if not is_commit(revision):
            found = self._catalogue.revision(name, revision)
            if found is None or not 0 <= self._wall_clock() - found.asked < seconds:
                return None
            commit = found.commit
        known = self._catalogue.file(name, commit, path)
        return known.info if known is not None else None

    async def _ask(self, name: Name, revision: str, path: str, client: ClientCredentials | None) -> FileInfo:
        info, public = await self._asked(name, client, partial(self._hub.file, name, revision, path))
        self._catalogue.note_file(name, path, info, public=public)
        self._catalogue.note_revision(name, revision, info.commit, self._wall_clock(), public=public)
        return info

    async def _asked(
        self, name: Name, client: ClientCredentials | None, ask: Callable[[Asker], Awaitable[V]]
    ) -> tuple[V, bool]:
        """What the hub says, and whether it says so to everybody: that is asked first, as what is public needs no token."""
        asker = self._hub.asker(name, client)
        if not asker.is_anonymous and self._keeps(name) and not self._authorizer.is_closed(name):
            try:
                return await ask(ANONYMOUS), True
            except HubDenied:
                self._close(name)
            except HubMissing as error:
                if not error.hides:
                    raise
            except OriginUnreachable as error:
                log.debug("hub_not_asked_anonymously", name=str(name), reason=str(error))
        try:
            return await ask(asker), asker.is_anonymous
        except HubDenied:
            if asker.is_anonymous:
                self._close(name)
            raise

    def _keeps(self, name: Name) -> bool:
        """Whether one client's answer may serve another."""
        return self._hub.mode(name) in ("auto", "public")

    def _close(self, name: Name) -> None:
        if name.repository:
            self._authorizer.note_closed(name)
            self._forget(name)

    def _forget(self, name: Name) -> None:
        """What was public of a repository is not any more.  Goes through all that is known, so not at each refusal."""
        now = trio.current_time()
        if now < self._forgotten.get(name, float("-inf")) + FORGET_SECONDS:
            return
        self._forgotten[name] = now
        self._forgotten.move_to_end(name)
        while len(self._forgotten) > MAX_FORGOTTEN:
            self._forgotten.popitem(last=False)
        self._catalogue.close(name)

    def _note_stale(self, name: Name, what: str, error: OriginError) -> None:
        self._tally.stale[self._tally.label(name.registry)] += 1
        log.warning("mirror_hub_stale", name=str(name), reference=what, reason=str(error))

    # --- what the API says ----------------------------------------------------------------------------------------

    async def api(self, name: Name, target: HubTarget, body: bytes, client: ClientCredentials | None) -> ApiAnswer:
        """What an API route answers; what anybody may know is remembered as revisions are.

        Raises:
            HubDenied, HubMissing: As the hub says.
            OriginError, NotPermitted: It cannot be asked, and nothing is remembered.
        """
        if not name.repository:
            async with self._api_limit:
                return await self._hub.api(name, target, body, self._hub.asker(name, client))
        question = f"{target.route}?{target.query}\n{body.decode('latin-1')}"
        known = self._catalogue.answer(name, question) if self._keeps(name) else None
        age = self._wall_clock() - known.asked if known is not None else 0.0
        if known is not None and 0 <= age < self._fresh:
            return known.unpack()
        try:
            return await self._answers.share((name, question, client), partial(self._ask_api, name, target, body, client))
        except OriginUnreachable as error:
            if known is None or not 0 <= age < self._stale:
                raise
            self._note_stale(name, target.route, error)
            return known.unpack()

    async def _ask_api(self, name: Name, target: HubTarget, body: bytes, client: ClientCredentials | None) -> ApiAnswer:
        async with self._api_limit:
            answer, public = await self._asked(name, client, partial(self._hub.api, name, target, body))
        for path, info in answer.files:
            self._catalogue.note_file(name, path, info, public=public)
        if public and self._keeps(name):
            question = f"{target.route}?{target.query}\n{body.decode('latin-1')}"
            self._catalogue.note_answer(name, question, answer, self._wall_clock())
        return answer

    # --- contents -------------------------------------------------------------------------------------------------

    def digest(self, found: Found) -> Digest | None:
        """By which the content can be read; `None` for a file of git's that was not here yet."""
        return found.info.digest or self._catalogue.content(found.name, found.info.etag)

    async def small(self, found: Found) -> bytes | tuple[StoredTask, str]:
        """A file of git's, whole and checked.

        Returns:
            An open task, which the caller closes, and where it came from; or bytes, where the swarm did not bring it.

        Raises:
            OriginError, NotPermitted: Nobody has it, or the hub sends other content than it says.
        """
        size = found.info.size
        is_small = size is not None and size <= MAX_SMALL_BYTES
        with trio.move_on_after(SWARM_SECONDS if is_small else float("inf")):
            try:
                return await self._from_swarm(found)
            except NotFoundAtOrigin:
                raise
            except (OriginError, NotPermitted) as error:
                if not is_small or isinstance(error, OriginUnreachable):
                    raise
                log.info("mirror_file_not_from_swarm", name=str(found.name), path=found.path, reason=str(error))
        body = await self._hub.read(found.source, MAX_SMALL_BYTES)
        if found.info.is_git and not Sha1s(len(body)).update(body).include(found.info.etag):
            raise OriginError(f"{self._hub.host} sends another file than the one it has under {found.info.etag}")
        return body

    async def _from_swarm(self, found: Found) -> tuple[StoredTask, str]:
        fetched, stored = await self._service.fetch(found.request(None))
        try:
            await self._check(found, fetched, stored)
        except BaseException:
            stored.close()
            raise
        if fetched.digest is not None and found.info.is_git:
            self._catalogue.note_content(found.name, found.info.etag, fetched.digest)
        return stored, "origin" if fetched.from_origin else "peers" if fetched.from_peers else "store"

    async def _check(self, found: Found, fetched: Fetched, stored: StoredTask) -> None:
        """Members vouch for what has no digest; git's id says whether they told the truth.

        Raises:
            OriginError: They did not, or the hub did not.
        """
        if not found.info.is_git:
            return
        length = stored.geometry.length
        sums = Sha1s(length)
        for offset in range(0, length, HASH_CHUNK_BYTES):
            sums.update(stored.read(offset, min(HASH_CHUNK_BYTES, length - offset)))
            await trio.lowlevel.checkpoint()
        if sums.include(found.info.etag):
            return
        log.warning(
            "mirror_file_is_wrong",
            name=str(found.name),
            path=found.path,
            content=found.info.etag,
            from_peers=fetched.from_peers,
        )
        stored.close()
        await self._drop(fetched.task_id)
        raise OriginError(f"what came is not the file that {self._hub.host} has under {found.info.etag}")

    async def _drop(self, task_id: bytes) -> None:
        """So that it is fetched anew next time, and nobody gets it from here."""
        self._service.release(task_id)
        try:
            await self._store.remove(task_id)
        except SwarmError as error:
            log.info("mirror_wrong_file_kept", task=task_id, reason=str(error))


class Sha1s:
    """The two sums that hubs use as a small file's ETag: git's id, and (hubs that are caches of others) plain SHA-1.

    Args:
        length: Of the content that `update` is given, in parts.
    """

    def __init__(self, length: int) -> None:
        self._sums = [hashlib.sha1(start, usedforsecurity=False) for start in (b"blob %d\0" % length, b"")]

    def update(self, content: bytes) -> Sha1s:
        for each in self._sums:
            each.update(content)
        return self

    def include(self, etag: str) -> bool:
        return etag in [each.hexdigest() for each in self._sums]
