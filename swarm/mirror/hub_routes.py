"""What clients of a Hugging Face hub are answered below `/hf`: files through the swarm, and what the API says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

import structlog
import trio

from swarm.config import MirrorSettings
from swarm.download.reading import Reader
from swarm.errors import SwarmError
from swarm.mirror.edges import MirrorError
from swarm.mirror.hub import HubDenied, HubMissing
from swarm.mirror.hub_files import Arrived, Fetches, Found, HubFiles
from swarm.mirror.hub_paths import HubTarget, parse_hub_target, takes_body
from swarm.mirror.paths import ClientCredentials, Name, Target
from swarm.mirror.ranges import is_fresh, may_resume
from swarm.mirror.requests import Request
from swarm.mirror.routes import Answer, body_of, check_is_meant, credentials_of, failure, names_of, range_of, span_of
from swarm.task import Digest

MAX_TOLD_BYTES: Final = 50_000_000_000
"""Clients refuse to read a larger file by plain HTTP where HEAD tells them its size, and read it where that says nothing."""

log = structlog.get_logger(__name__)


class HubRoutes:
    """See the module; a `routes.Face`.

    Args:
        host: Of the hub, its name among registries.
    """

    def __init__(self, host: str, files: HubFiles, service: Fetches, settings: MirrorSettings) -> None:
        self._host = host
        self._files = files
        self._service = service
        self._settings = settings
        self._hosts = names_of(settings)

    async def answer(self, request: Request) -> Answer:
        """The answer, within the time that the configuration allows; errors are answers too."""
        target: Target | None = None
        try:
            methods = ("GET", "HEAD", "POST") if takes_body(request.method, request.target) else ("GET", "HEAD")
            check_is_meant(request, self._hosts, methods=methods)
            asked = parse_hub_target(request.target)
            name = Name(self._host, asked.repository)
            target = Target(asked.kind, name, f"{asked.revision}:{asked.path}" if asked.path else asked.word)
            with trio.move_on_after(self._settings.answer_timeout):
                answer = await self._route(request, name, asked)
                answer.target = target
                return answer
            error: SwarmError = MirrorError(504, "", "neither the swarm nor the hub answered in time")
        except SwarmError as caught:
            error = caught
        except Exception:  # the one per request: a bug met by one client must not cost the others theirs
            log.exception("mirror_request_failed", **_what(target))
            error = MirrorError(500, "", "the mirror failed to answer; its log says why")
        failed = hub_failure(error)
        failed.target = target
        if failed.status >= 500:
            log.warning("mirror_failed", status=failed.status, reason=str(error), **_what(target))
        return failed

    async def _route(self, request: Request, name: Name, asked: HubTarget) -> Answer:
        client = credentials_of(request)
        if asked.path:
            return await self._file(request, name, asked, client)
        return await self._api(request, name, asked, client)

    # --- API ------------------------------------------------------------------------------------------------------

    async def _api(self, request: Request, name: Name, asked: HubTarget, client: ClientCredentials | None) -> Answer:
        if (asked.word == "paths-info") != (request.method == "POST"):
            raise MirrorError(405, "", "this route is asked by POST" if asked.word == "paths-info" else "asked by GET")
        found = await self._files.api(name, asked, request.body, client)
        headers = [("Content-Type", found.content_type)]
        if found.commit:
            headers.append(("X-Repo-Commit", found.commit))
        if found.next_page:
            # The hub's own link would lead the client past the mirror.
            headers.append(("Link", f'<http://{request.header("host")}/hf{found.next_page}>; rel="next"'))
        return Answer(200, headers, found.body, len(found.body))

    # --- files ----------------------------------------------------------------------------------------------------

    async def _file(self, request: Request, name: Name, asked: HubTarget, client: ClientCredentials | None) -> Answer:
        found = await self._files.find(name, asked.revision, asked.path, client)
        tag = f'"{found.info.etag}"'
        # None of the hub's Xet headers: with them, clients would read from Xet storage instead.
        headers = [
            ("Content-Type", "application/octet-stream"),
            ("Accept-Ranges", "bytes"),
            ("ETag", tag),
            ("X-Repo-Commit", found.info.commit),
        ]
        if is_fresh(request.header("if-none-match"), tag):
            return Answer(304, headers)
        if request.method == "HEAD":
            size = found.info.size
            return Answer(200, headers, length=size if size is None or size <= MAX_TOLD_BYTES else None)
        digest = self._files.digest(found)
        if digest is not None:
            return await self._by_digest(request, found, digest, tag, headers)
        return await self._small(request, found, tag, headers)

    async def _by_digest(
        self, request: Request, found: Found, digest: Digest, tag: str, headers: list[tuple[str, str]]
    ) -> Answer:
        wanted = found.request(digest)

        async def opens(span: Callable[[int], tuple[int, int]], prefix: bool) -> Reader:
            reader = await self._service.read(wanted, span, strict=self._settings.stream == "digest", prefix=prefix)
            try:
                await reader.wait()
                return reader
            except BaseException:
                reader.close()
                raise

        return await body_of(request, tag, headers, opens, lambda: wanted)

    async def _small(self, request: Request, found: Found, tag: str, headers: list[tuple[str, str]]) -> Answer:
        content = await self._files.small(found)
        if isinstance(content, bytes):
            span = span_of(request.header("range") if may_resume(request.header("if-range"), tag) else None, len(content))
            part = content[span.start : span.stop]
            return Answer(206 if span.partial else 200, [*headers, *range_of(span, len(content))], part, len(part))
        stored, origin = content

        async def opens(span: Callable[[int], tuple[int, int]], prefix: bool) -> Reader:
            await trio.lowlevel.checkpoint()
            return Arrived(stored, *span(stored.geometry.length), origin)

        again = found.request(stored.digest)
        try:
            return await body_of(request, tag, headers, opens, lambda: again)
        except BaseException:
            stored.close()
            raise


def hub_failure(error: SwarmError) -> Answer:
    """An error as clients of a hub read it: two headers, and a word in JSON."""
    answer = failure(error, None)
    message, code, headers = str(error), "", list(answer.headers)
    if isinstance(error, HubDenied | HubMissing):
        answer.status, code = error.refusal.status, error.refusal.code
        if error.refusal.commit:
            headers.append(("X-Repo-Commit", error.refusal.commit))
    shown = "".join(c if " " <= c <= "~" else "?" for c in message)[:1024]
    headers += [("X-Error-Message", shown), *([("X-Error-Code", code)] if code else [])]
    body = json.dumps({"error": message}).encode()
    return Answer(answer.status, headers, body, len(body))


def _what(target: Target | None) -> dict[str, str]:
    if target is None or target.name is None:
        return {}
    return {"name": str(target.name), "reference": target.reference}
