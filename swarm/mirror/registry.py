"""Reading origin registries for clients of the mirror.

Participants: a client, perhaps with credentials for the registry; the registry, believed about its own names and checked
wherever a digest says what must come; its token server.

Goals: each request carries the right of whoever it is made for, and no other; what a registry says is bounded in size and
time; no part of an answer gets into ours unread.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, Protocol
from urllib.parse import urljoin, urlsplit

import structlog
import trio

from swarm.config import MirrorSettings
from swarm.edges import Origin, Source
from swarm.errors import ConfigError, NotFoundAtOrigin, NotPermitted, OriginError, OriginRefused, OriginUnreachable
from swarm.mirror.access import ANONYMOUS, NODE, Access, Asker, Broker
from swarm.mirror.credentials import OwnCredentials, of_client
from swarm.mirror.edges import ManifestInfo, MirrorDenied, Passed
from swarm.mirror.listed import Listed
from swarm.mirror.paths import ClientCredentials, Name
from swarm.mirror.rights import Rights
from swarm.mirror.tokens import Asks, TokenRefused
from swarm.origin.answers import Answer, Headers
from swarm.task import Digest

MAX_MANIFEST_BYTES: Final = 4_400_000
"""What registries take is at most 4 MiB, and containerd refuses what is larger than this."""

MAX_LIST_BYTES: Final = 4 * 1024 * 1024
"""A page of tags or referrers; a client that wants more asks for pages."""

ACCESS_GRACE: Final = 60.0
"""Seconds for which a right that ran out after it was checked still says how content is read."""

MANIFEST_TYPES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "*/*;q=0.1",
)
"""All kinds are asked for, whatever the client said: what is stored under a digest is one of them, and is passed on as such."""

_MEDIA_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}", re.ASCII)
_LENGTH: Final = re.compile(r"[0-9]{1,15}", re.ASCII)
_LINK: Final = re.compile(r'<([^<>\s]{1,2048})>\s*;\s*rel="?next"?', re.ASCII)
_LINK_QUERY: Final = re.compile(r"[A-Za-z0-9\-._~!$&'()*+,;=:@/?%]{0,1024}", re.ASCII)
_FILTERS: Final = re.compile(r"[A-Za-z0-9,_ -]{1,256}", re.ASCII)

_NO: Final = frozenset({401, 403, 404, 410})
_HEAD_ANSWERS: Final = _NO | {200, 405, 501}
_GET_ANSWERS: Final = _NO | {200}
_LIST_ANSWERS: Final = _NO | {200, 400}

SILENT_SECONDS: Final = 3.0
"""A registry that gave no answer is not waited for again so long: one pull asks several things, each with its own patience,
and the client waits for their sum."""

MAX_SILENT: Final = 256

log = structlog.get_logger(__name__)


class Reader(Asks, Origin, Protocol):
    """`OriginReader`, as far as it is needed here."""


class Registries:
    """See `mirror.edges.Registries`.

    Args:
        origin: Its egress policy has `listed.egress_rule` for the mirror.
        own: This node's credentials; by default what the settings name.

    Attributes:
        rights: What registries said about rights, shared with the authorizer.

    Raises:
        ConfigError: Credentials cannot be read.
    """

    def __init__(self, settings: MirrorSettings, origin: Reader, *, own: OwnCredentials | None = None) -> None:
        self._listed = Listed.read(settings)
        self._origin = origin
        self._own = own or OwnCredentials(settings)
        self._seconds = settings.registry_timeout
        self._rights_seconds = settings.rights_cache
        self._broker = Broker(
            self._listed, self._own, origin, client_seconds=settings.rights_cache / 2, seconds=settings.registry_timeout
        )
        self.rights = Rights(settings.rights_stale)
        self._silent_until: dict[str, float] = {}

    # --- what is allowed ------------------------------------------------------------------------------------------

    def allowed(self, registry: str) -> bool:
        """Whether the configuration lets the mirror read this registry; its address is checked when it is dialled."""
        return self._listed.is_allowed(registry)

    def trusts(self, registry: str) -> bool:
        """Whether its word opens what is private: it is listed, well known, or this node has credentials for it."""
        return self._listed.is_trusted(registry) or (self.allowed(registry) and self._own.has(registry))

    def mode(self, name: Name) -> str:
        """`auto`, `public`, `verify` or `never`."""
        return self._listed.rights(name)

    def asker(self, name: Name, client: ClientCredentials | None) -> Asker:
        """For whom the registry is asked: the client, if it showed something, else this node, else nobody in particular.

        Raises:
            MirrorError: 401, what the client showed is malformed.
        """
        credential = of_client(client)
        if not self.trusts(name.registry):
            return ANONYMOUS
        if credential is not None and self._listed.settings(name.registry).pass_credentials:
            return Asker.client(credential)
        return NODE if self._own.might_have(name.registry) else ANONYMOUS

    # --- manifests ------------------------------------------------------------------------------------------------

    async def head_manifest(self, name: Name, reference: str, client: ClientCredentials | None) -> ManifestInfo:
        """What a tag or digest is, by HEAD, or by GET where that does not tell.

        Raises:
            MirrorDenied: The client may not know.
            OriginError, NotPermitted: As `edges.Origin`.
        """
        asker = self.asker(name, client)
        answer = await self._ask(name, f"manifests/{reference}", asker, "HEAD", _HEAD_ANSWERS)
        if answer.status == 200:
            try:
                info = _info_of(answer.headers, reference)
            except _Untold:
                pass
            else:
                self._note(name, info.digest, asker)
                return info
        elif answer.status in _NO:
            raise self.refusal(name, asker, answer.status, f"manifest {reference}")
        return (await self._get_manifest(name, reference, asker))[0]

    async def get_manifest(self, name: Name, reference: str, client: ClientCredentials | None) -> tuple[ManifestInfo, bytes]:
        """The original bytes, checked against the digest that was asked for, or that the registry says the tag has.

        Raises:
            OriginError, MirrorDenied, NotPermitted: As `head_manifest`; `OriginError` also for wrong bytes.
        """
        return await self._get_manifest(name, reference, self.asker(name, client))

    async def _get_manifest(self, name: Name, reference: str, asker: Asker) -> tuple[ManifestInfo, bytes]:
        answer = await self._ask(name, f"manifests/{reference}", asker, "GET", _GET_ANSWERS, MAX_MANIFEST_BYTES)
        if answer.status != 200:
            raise self.refusal(name, asker, answer.status, f"manifest {reference}")
        said = _digest_of(answer.headers, reference)
        algorithm = said.algorithm if said is not None else "sha256"
        digest = Digest(algorithm, hashlib.new(algorithm, answer.body).hexdigest())
        if said is not None and said != digest:
            raise OriginError(f"{name.registry} sent a manifest that does not have the digest {said}")
        self._note(name, digest, asker)
        return ManifestInfo(digest, _media_type(answer.headers), len(answer.body)), answer.body

    # --- the rest -------------------------------------------------------------------------------------------------

    async def pass_through(self, name: Name, tail: str, query: str, client: ClientCredentials | None) -> Passed:
        """A list of tags or referrers.

        `Link` to the next page begins with `/v2/<repository>/`; it is left out where it leads anywhere else.

        Raises:
            OriginError, MirrorDenied, NotPermitted: As `head_manifest`.
        """
        asker = self.asker(name, client)
        path = f"{tail}?{query}" if query else tail
        answer = await self._ask(name, path, asker, "GET", _LIST_ANSWERS, MAX_LIST_BYTES, accept="*/*")
        if answer.status in (401, 403):
            raise self.refusal(name, asker, answer.status, tail)
        if answer.status != 200:
            return Passed(answer.status, (), b"")
        link = _next_page(
            answer.headers.get("link", ""), self._listed.endpoint(name.registry).url, f"/v2/{name.repository}/{tail}"
        )
        filters = answer.headers.get("oci-filters-applied", "")
        headers = [("Content-Type", _media_type(answer.headers))]
        headers += [("Link", link)] if link else []
        headers += [("OCI-Filters-Applied", filters)] if _FILTERS.fullmatch(filters) else []
        return Passed(200, tuple(headers), answer.body)

    def blob_source(self, name: Name, digest: Digest, client: ClientCredentials | None) -> Source:
        """Where a blob is.  Tokens are attached to each request when it is made; none goes along a redirect.

        Raises:
            NotPermitted: The registry is not allowed.
            MirrorError: As `asker`.
        """
        return Source(self._url(name, f"blobs/{digest}"), requester="mirror", authorization=self._access(name, digest, client))

    def manifest_source(self, name: Name, digest: Digest, client: ClientCredentials | None) -> Source:
        """Where a manifest is, as `blob_source`."""
        accept = (("Accept", ", ".join(MANIFEST_TYPES)),)
        return Source(self._url(name, f"manifests/{digest}"), accept, "mirror", self._access(name, digest, client))

    def _access(self, name: Name, digest: Digest, client: ClientCredentials | None) -> Access:
        """Credentials are used where they were found to be needed, and not before.

        What anybody may read is read as anybody: a token that ran out does not stand in the way.  What nobody could be asked
        about is, too: read with credentials after all, it would be private content that is treated as public.
        """
        asker, now = self.asker(name, client), trio.current_time()
        public = self.rights.was_allowed(name, digest, ANONYMOUS.tag, now, ACCESS_GRACE)
        checked = self.rights.was_allowed(name, digest, asker.tag, now, ACCESS_GRACE)
        uses = (public or checked) if asker.own else (checked and not public)
        return Access(self._broker, name, asker if uses or self.mode(name) == "public" else ANONYMOUS)

    async def may_read(self, name: Name, digest: Digest, asker: Asker, *, manifest: bool | None = None) -> None:
        """Ask the registry whether this asker may read this content of this repository.

        Args:
            manifest: Whether it is one; `None` if that is not known.

        Raises:
            MirrorDenied: It says no.
            NotFoundAtOrigin: It says that there is no such thing.
            OriginError, NotPermitted: It cannot be asked, or does not say.
        """
        kinds = {True: ("manifests",), False: ("blobs",), None: ("blobs", "manifests")}[manifest]
        try:
            for kind in kinds:
                status = await self._probe(name, kind, digest, asker)
                if status == 200:
                    self._note(name, digest, asker)
                    return
                if status in (401, 403):
                    break
            raise self.refusal(name, asker, status, str(digest))
        except (MirrorDenied, NotFoundAtOrigin) as error:
            status = error.status if isinstance(error, MirrorDenied) else 404
            self.rights.note(name, digest, asker.tag, status, trio.current_time(), self._lifetime(asker))
            raise

    async def _probe(self, name: Name, kind: str, digest: Digest, asker: Asker) -> int:
        path = f"{kind}/{digest}"
        answer = await self._ask(name, path, asker, "HEAD", _HEAD_ANSWERS)
        if answer.status == 403 and answer.redirected:
            answer = Answer(405, {})  # a URL signed for GET
        if answer.status in (405, 501):
            return await self._probe_by_reading(name, path, asker)
        if answer.status == 200:
            _digest_of(answer.headers, str(digest))  # raises for another one
            is_page = answer.headers.get("content-type", "").strip().lower().startswith("text/html")
            if is_page and "docker-content-digest" not in answer.headers:
                raise OriginError(f"{name.registry} answers with a web page; it is no registry, or wants people to log in")
        return answer.status

    async def _probe_by_reading(self, name: Name, path: str, asker: Asker) -> int:
        source = Source(self._url(name, path), requester="mirror", authorization=Access(self._broker, name, asker))
        try:
            with trio.fail_after(self._seconds):
                await self._origin.head(source)
            return 200
        except trio.TooSlowError as error:
            raise self._too_slow(name) from error
        except NotFoundAtOrigin:
            return 404
        except OriginRefused:
            return 403

    # --- asking ---------------------------------------------------------------------------------------------------

    async def _ask(
        self,
        name: Name,
        path: str,
        asker: Asker,
        method: str,
        statuses: frozenset[int],
        max_bytes: int = 0,
        *,
        accept: str = ", ".join(MANIFEST_TYPES),
    ) -> Answer:
        source = Source(self._url(name, path), (("Accept", accept),), "mirror", Access(self._broker, name, asker))
        if trio.current_time() < self._silent_until.get(name.registry, 0.0):
            raise self._too_slow(name)
        try:
            with trio.fail_after(self._seconds):
                answer = await self._origin.ask(source, method, accept=statuses, max_bytes=max_bytes)
        except trio.TooSlowError as error:
            self._note_silent(name.registry)
            raise self._too_slow(name) from error
        except TokenRefused as error:
            log.debug("registry refused", name=str(name), reason=str(error))
            return Answer(401, {})
        except NotPermitted as error:
            if self._listed.is_listed(name.registry):
                raise
            raise NotPermitted(f"{error}, or, if it is a registry of yours, {name.registry} in mirror.registries") from error
        if answer.status in (401, 403) and asker.own:
            log.info("registry refuses this node's credentials", name=str(name), status=answer.status)
        return answer

    def _url(self, name: Name, path: str) -> str:
        if not self.allowed(name.registry):
            raise NotPermitted(f"the mirror does not read {name.registry}: list it in mirror.registries to permit it")
        return f"{self._listed.endpoint(name.registry).url}/v2/{name.repository}/{path}"

    def _note_silent(self, registry: str) -> None:
        self._silent_until[registry] = trio.current_time() + SILENT_SECONDS
        while len(self._silent_until) > MAX_SILENT:
            del self._silent_until[next(iter(self._silent_until))]

    def _too_slow(self, name: Name) -> OriginUnreachable:
        return OriginUnreachable(f"{name.registry} gave no answer within {self._seconds:g} s")

    def refusal(self, name: Name, asker: Asker, status: int, what: str) -> OriginError | MirrorDenied:
        """What 401, 403 or 404 of a registry means to a client."""
        if status in (401, 403):
            return self.denied(name, asker, status)
        return NotFoundAtOrigin(f"{name} has no {what}")

    def denied(self, name: Name, asker: Asker, status: int = 401) -> MirrorDenied:
        """The answer to a client that may not, with the registry's challenge where the client can do something about it."""
        if status == 403:
            return MirrorDenied(403, "DENIED", f"{name.registry} does not let you read {name.repository}")
        found = self._broker.challenge(name.registry)
        passes = self.trusts(name.registry) and self._listed.settings(name.registry).pass_credentials and not asker.own
        challenge = found.to_client(name.repository) if found is not None and passes else ""
        return MirrorDenied(
            401, "UNAUTHORIZED", f"{name.registry} asks for credentials for {name.repository}", challenge=challenge
        )

    def _note(self, name: Name, digest: Digest, asker: Asker) -> None:
        self.rights.note(name, digest, asker.tag, 200, trio.current_time(), self._lifetime(asker))

    def _lifetime(self, asker: Asker) -> float:
        """A token that was got with a client's password adds its own age to that of the answer: half for each."""
        return self._rights_seconds / 2 if asker.credential is not None else self._rights_seconds


class _Untold(Exception):
    """HEAD left out what only the content tells."""


def _info_of(headers: Headers, reference: str) -> ManifestInfo:
    digest, length = _digest_of(headers, reference), headers.get("content-length", "")
    if digest is None or not _LENGTH.fullmatch(length) or not _MEDIA_TYPE.match(headers.get("content-type", "")):
        raise _Untold
    if int(length) > MAX_MANIFEST_BYTES:
        raise OriginError(f"a manifest of {length} bytes is larger than any client takes")
    return ManifestInfo(digest, _media_type(headers), int(length))


def _digest_of(headers: Headers, reference: str) -> Digest | None:
    """The digest of what the answer is about: the reference if it is one, else what the registry says.

    Raises:
        OriginError: The registry says another digest than was asked for.
    """
    asked = Digest.parse(reference) if ":" in reference else None
    text = headers.get("docker-content-digest", "").strip()
    try:
        said = Digest.parse(text) if text else None
    except ConfigError:
        said = None
    if asked is None or said is None or said.algorithm != asked.algorithm:
        return asked or said
    if said != asked:
        raise OriginError(f"the registry answers with {said} where {asked} was asked for")
    return asked


def _media_type(headers: Headers) -> str:
    """As stored, without parameters.

    Raises:
        OriginError: There is none.
    """
    text = headers.get("content-type", "").partition(";")[0].strip()
    if not _MEDIA_TYPE.fullmatch(text):
        raise OriginError("the registry does not say which media type it sends")
    return text


def _next_page(link_untrusted: str, base: str, path: str) -> str:
    """The `Link` of a list, made relative; empty where it leads to anything but the next page of this list."""
    match = _LINK.search(link_untrusted[:4096])
    if match is None:
        return ""
    try:
        parts = urlsplit(urljoin(base + path, match[1]))
        there = (parts.scheme, parts.hostname, parts.port, parts.path)
        here = urlsplit(base)
    except ValueError:
        return ""
    if there != (here.scheme, here.hostname, here.port, path) or not _LINK_QUERY.fullmatch(parts.query):
        return ""
    return f'<{path}?{parts.query}>; rel="next"'
