"""What a request is answered with: the pull side of the OCI distribution specification, over store, swarm and registries."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, assert_never

import structlog
import trio

from swarm.config import MirrorSettings
from swarm.download.reading import Reader
from swarm.download.request import FetchRequest
from swarm.errors import (
    IntegrityError,
    Interrupted,
    NoSpace,
    NotFoundAtOrigin,
    NotPermitted,
    OriginError,
    OriginRefused,
    OriginUnreachable,
    StoreError,
    SwarmError,
)
from swarm.mirror.edges import Authorizer, Grant, ManifestInfo, MirrorError, Registries
from swarm.mirror.hub_paths import PREFIX
from swarm.mirror.paths import ClientCredentials, Kind, Name, Target, parse_target
from swarm.mirror.ranges import NoSuchRange, Span, choose_span, is_fresh, may_resume
from swarm.mirror.requests import Request
from swarm.mirror.resolve import Contained, Resolver
from swarm.mirror.tally import Tally
from swarm.task import MAX_CONTENT_BYTES, Digest

log = structlog.get_logger(__name__)

MAX_CREDENTIALS_CHARS: Final = 16 * 1024
"""Tokens of large companies have a few kilobytes."""

_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?")
_UNKNOWN: Final = {Kind.MANIFEST: "MANIFEST_UNKNOWN", Kind.BLOB: "BLOB_UNKNOWN"}

COMMON: Final = (("Docker-Distribution-Api-Version", "registry/2.0"), ("X-Content-Type-Options", "nosniff"))


@dataclass(slots=True)
class Blob:
    """A body that is read while it arrives.  Whoever sends it closes the reader.

    Attributes:
        reopen: From a position on, where stored bytes turned out rotten.
    """

    reader: Reader
    reopen: Callable[[], FetchRequest]


@dataclass(slots=True)
class Answer:
    """An answer.  `length` is what `Content-Length` says: for HEAD there is no body, and `None` says nothing.

    Attributes:
        target: What was asked for, where that was understood.
    """

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes | Blob = b""
    length: int | None = 0
    target: Target | None = None

    @property
    def registry(self) -> str:
        return self.target.name.registry if self.target is not None and self.target.name is not None else ""

    @property
    def kind(self) -> str:
        return self.target.kind.value if self.target is not None else "none"


class Face(Protocol):
    """Answers requests of its own kind (`hub_routes.HubRoutes`); errors are answers too."""

    async def answer(self, request: Request) -> Answer: ...


class Routes:
    """Answers one request after another; knows no connection.

    Args:
        hub: Answers what begins with `hub_paths.PREFIX`.
    """

    def __init__(
        self,
        registries: Registries,
        authorizer: Authorizer,
        service: Contained,
        resolver: Resolver,
        settings: MirrorSettings,
        tally: Tally,
        hub: Face | None = None,
    ) -> None:
        self._hub = hub
        self._registries = registries
        self._authorizer = authorizer
        self._service = service
        self._resolver = resolver
        self._settings = settings
        self._tally = tally
        self._hosts = names_of(settings)

    async def answer(self, request: Request) -> Answer:
        """The answer, within the time that the configuration allows; errors are answers too."""
        if self._hub is not None and request.target.startswith(PREFIX):
            return self._counted(request, await self._hub.answer(request), common=COMMON[1:])
        target: Target | None = None
        try:
            check_is_meant(request, self._hosts)
            target = parse_target(request.target)
            with trio.move_on_after(self._settings.answer_timeout):
                answer = await self._route(request, target)
                answer.target = target
                return self._counted(request, answer)
            log.warning("mirror_too_slow", **_what(target))
            if target.digest is not None:
                self._resolver.catalogue.doubt_size(target.digest)  # nobody takes part in a task of a wrong length
            error: SwarmError = MirrorError(504, "UNAVAILABLE", "neither the swarm nor the registry answered in time")
        except SwarmError as caught:
            error = caught
        except Exception:  # the one per request: a bug met by one client must not cost the others theirs
            log.exception("mirror_request_failed", **_what(target))
            error = MirrorError(500, "UNKNOWN", "the mirror failed to answer; its log says why")
        failed = failure(error, target)
        failed.target = target
        if failed.status >= 500:
            log.warning("mirror_failed", status=failed.status, reason=str(error), **_what(target))
        return self._counted(request, failed)

    def _counted(self, request: Request, answer: Answer, common: tuple[tuple[str, str], ...] = COMMON) -> Answer:
        # A name only gets a row of its own once it stood for something: anybody can ask for anything.
        label = self._tally.label(answer.registry, new=answer.status < 400) if answer.registry else ""
        self._tally.answers[label, answer.kind, answer.status] += 1
        answer.headers += common
        if request.method == "HEAD":
            answer.body = b""
        if answer.target is not None and answer.target.namespace:
            answer.headers.append(("OCI-Namespace", answer.target.namespace))
        return answer

    async def _route(self, request: Request, target: Target) -> Answer:
        name = target.name
        if name is None:
            return _base(request)
        if not self._registries.allowed(name.registry):
            raise MirrorError(
                403, "DENIED", f"{name.registry} is not among the registries of this mirror; see mirror.registries"
            )
        client = credentials_of(request)
        match target.kind:
            case Kind.MANIFEST:
                return await self._manifest(request, target, name, client)
            case Kind.BLOB:
                if target.digest is None:
                    raise MirrorError(400, "DIGEST_INVALID", "a blob goes by its digest")
                return await self._blob(request, name, target.digest, client)
            case Kind.TAGS | Kind.REFERRERS:
                return await self._pass_through(request, target, name, client)
            case Kind.BASE:
                return _base(request)
            case Kind.FILE | Kind.API:
                raise MirrorError(404, "UNSUPPORTED", "no such route")
            case _:
                assert_never(target.kind)

    # --- manifests ---

    async def _manifest(self, request: Request, target: Target, name: Name, client: ClientCredentials | None) -> Answer:
        info: ManifestInfo | None = None
        digest = target.digest
        if digest is None:
            info = await self._resolver.resolve(name, target.reference, client)
            digest = info.digest
        grant = await self._authorizer.check(name, digest, client, manifest=True)
        if request.method == "HEAD" and info is not None and self._resolver.is_alive(name.registry):
            self._resolver.read_ahead(name, info, client)
            media_type, length, body = info.media_type, info.length, b""
        else:
            manifest = await self._resolver.manifest(name, digest, grant, client)
            media_type, length, body = manifest.media_type, len(manifest.body), manifest.body
        if not accepts(request.header("accept"), media_type):
            raise MirrorError(
                404, "MANIFEST_UNKNOWN", f"the manifest is of type {media_type}, which the client does not accept"
            )
        headers = [("Content-Type", media_type), *_identity(digest)]
        if is_fresh(request.header("if-none-match"), etag(digest)):
            return Answer(304, headers)
        return Answer(200, headers, body, length)

    # --- blobs ---

    async def _blob(self, request: Request, name: Name, digest: Digest, client: ClientCredentials | None) -> Answer:
        grant = await self._authorizer.check(name, digest, client, manifest=False)
        headers = [("Content-Type", "application/octet-stream"), ("Accept-Ranges", "bytes"), *_identity(digest)]
        wanted = self._wanted(name, digest, grant, client)
        if is_fresh(request.header("if-none-match"), etag(digest)):
            return Answer(304, headers)
        if request.method == "HEAD":
            return Answer(200, headers, length=await self._service.length_of(wanted()))
        opens = partial(self._open, wanted, digest)
        return await body_of(request, etag(digest), headers, opens, wanted)

    async def _open(
        self, wanted: Callable[[], FetchRequest], digest: Digest, span: Callable[[int], tuple[int, int]], prefix: bool
    ) -> Reader:
        """A reader whose first bytes are there; a wrong length in a manifest costs another try, not the blob."""
        relied = wanted().length is not None
        while True:
            try:
                reader = await self._service.read(wanted(), span, strict=self._settings.stream == "digest", prefix=prefix)
                try:
                    await reader.wait()
                    return reader
                except BaseException:
                    reader.close()
                    raise
            except (OriginError, IntegrityError) as error:
                if not relied or isinstance(error, OriginUnreachable | NotFoundAtOrigin):
                    raise
                relied = False
                self._resolver.catalogue.doubt_size(digest)

    def _wanted(self, name: Name, digest: Digest, grant: Grant, client: ClientCredentials | None) -> Callable[[], FetchRequest]:
        source = self._registries.blob_source(name, digest, client)

        def wanted() -> FetchRequest:
            length = self._resolver.catalogue.size(digest)
            return FetchRequest(source, digest, share=grant.shared, private=grant.private, length=length, immutable=True)

        return wanted

    # --- lists ---

    async def _pass_through(self, request: Request, target: Target, name: Name, client: ClientCredentials | None) -> Answer:
        tail = "tags/list" if target.kind is Kind.TAGS else f"referrers/{target.reference}"
        passed = await self._registries.pass_through(name, tail, target.query, client)
        return Answer(passed.status, list(passed.headers), passed.body, len(passed.body))


def names_of(settings: MirrorSettings) -> frozenset[str]:
    """Host names under which the mirror answers, beside addresses."""
    return frozenset(host.lower() for host in (*settings.hosts, "localhost"))


def check_is_meant(request: Request, hosts: frozenset[str], *, methods: tuple[str, ...] = ("GET", "HEAD")) -> None:
    """Refuse what is no business of a mirror: changes, and what a web page could make a browser send (SECURITY: T17).

    Raises:
        MirrorError: 403 or 405.
    """
    if request.method not in methods:
        raise MirrorError(405, "UNSUPPORTED", "this mirror is read-only: push to the registry itself")
    host = request.header("host")
    if host is None or not _is_ours(host, hosts):
        raise MirrorError(403, "DENIED", "this mirror does not answer under that name; see mirror.hosts")
    if request.header("origin") is not None:
        raise MirrorError(403, "DENIED", "requests from web pages are refused")


def _is_ours(host_untrusted: str, hosts: frozenset[str]) -> bool:
    """A literal address cannot be rebound; a name must be one of ours."""
    match = _HOST.fullmatch(host_untrusted)
    if match is None:
        return False
    try:
        ipaddress.ip_address(match[1] or match[2])
    except ValueError:
        return match[2] is not None and match[2].lower().rstrip(".") in hosts
    return True


Opens = Callable[[Callable[[int], tuple[int, int]], bool], Awaitable[Reader]]
"""From a function of the length that says which bytes are wanted, and whether the client has what is before them, to a reader
whose first bytes are there."""


async def body_of(
    request: Request, tag: str, headers: list[tuple[str, str]], opens: Opens, reopen: Callable[[], FetchRequest]
) -> Answer:
    """The answer to a GET of content: all of it, or the range that is asked for.

    Raises:
        MirrorError: 416, none of it is there.
        SwarmError: As `opens`.
    """
    spans: list[tuple[Span, int]] = []
    ranged = request.header("range") if may_resume(request.header("if-range"), tag) else None

    def span(length: int) -> tuple[int, int]:
        spans.append((span_of(ranged, length), length))
        return spans[-1][0].start, spans[-1][0].stop

    reader = await opens(span, ranged is None or not _is_bounded(ranged))
    chosen, length = spans[-1]
    return Answer(206 if chosen.partial else 200, [*headers, *range_of(chosen, length)], Blob(reader, reopen), chosen.size)


def span_of(range_untrusted: str | None, length: int) -> Span:
    """As `choose_span`.

    Raises:
        MirrorError: 416.
    """
    try:
        return choose_span(range_untrusted, length)
    except NoSuchRange:
        refused = MirrorError(416, "UNSUPPORTED", "the content does not have these bytes")
        refused.headers = (("Content-Range", f"bytes */{length}"),)
        raise refused from None


def range_of(span: Span, length: int) -> list[tuple[str, str]]:
    """The header that names the bytes of an answer of a part."""
    return [("Content-Range", f"bytes {span.start}-{span.stop - 1}/{length}")] if span.partial else []


def failure(error: SwarmError, target: Target | None) -> Answer:
    """An error as the specification wants it.  Every status sends a client that has one to its own registry; none is 429."""
    headers: list[tuple[str, str]] = []
    match error:
        case MirrorError():
            status, code = error.status, error.code
            headers += error.headers
            if error.challenge:
                headers.append(("WWW-Authenticate", error.challenge))
        case NotFoundAtOrigin():
            status, code = 404, _UNKNOWN.get(target.kind, "NAME_UNKNOWN") if target is not None else "NAME_UNKNOWN"
        case OriginRefused() | NotPermitted():
            status, code = 403, "DENIED"
        case OriginError() | IntegrityError():
            status, code = 502, "UNAVAILABLE"
        case NoSpace():
            status, code = 507, "UNAVAILABLE"
        case StoreError() | Interrupted():
            status, code = 503, "UNAVAILABLE"
        case _:
            status, code = 500, "UNKNOWN"
    if status == 405:
        headers.append(("Allow", "GET, HEAD"))
    body = json.dumps({"errors": [{"code": code, "message": str(error), "detail": {}}]}).encode()
    return Answer(status, [("Content-Type", "application/json"), *headers], body, len(body))


def etag(digest: Digest) -> str:
    return f'"{digest}"'


def accepts(accept_untrusted: str | None, media_type: str) -> bool:
    """Whether the client takes this type.  What is stored is what is served: nothing is converted."""
    if accept_untrusted is None:
        return True
    main = media_type.partition("/")[0]
    offered = {item.partition(";")[0].strip().lower() for item in accept_untrusted.split(",")}
    return bool(offered & {media_type.lower(), "*/*", f"{main}/*"}) or offered == {""}


def _identity(digest: Digest) -> list[tuple[str, str]]:
    return [("Docker-Content-Digest", str(digest)), ("ETag", etag(digest))]


def _base(request: Request) -> Answer:
    """That this is a registry.

    podman, skopeo and CRI-O, which alone send the header asked for here, show their credentials for the whole pull only to
    who asks for them now, before anybody knows which registry is meant.  Without any they send an empty name and password.
    """
    headers = [("Content-Type", "application/json")]
    if request.header("docker-distribution-api-version") is None or request.header("authorization") is not None:
        return Answer(200, headers, b"{}", 2)
    return Answer(401, [*headers, ("WWW-Authenticate", 'Basic realm="registry"')], b"{}", 2)


def _is_bounded(range_untrusted: str) -> bool:
    """A range with an end, or from the end: its reader wants these bytes, not the rest (lazy loading)."""
    try:
        return not choose_span(range_untrusted, MAX_CONTENT_BYTES).prefix
    except NoSuchRange:
        return True


def credentials_of(request: Request) -> ClientCredentials | None:
    header = request.header("authorization")
    if header is None:
        return None
    if len(header) > MAX_CREDENTIALS_CHARS:
        raise MirrorError(431, "UNAUTHORIZED", "the Authorization header is too long")
    return ClientCredentials(header)


def _what(target: Target | None) -> dict[str, str]:
    if target is None or target.name is None:
        return {}
    return {"image": str(target.name), "reference": target.reference}
