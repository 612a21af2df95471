"""Reading `http://` and `https://` origins: redirects, credentials, retries, versions.

Participants: the asker (a user, a mirror or proxy client, a job), who gives a URL and headers; the origin, believed only
about its own content; whoever it redirects to, who gets none of the asker's headers.

Goals: the bytes asked for, of one version, or an error that says why not; no secret anywhere but at the host it was given
for.  Non-goals: HTTP/2 (twice the CPU of HTTP/1.1), cookies, caches.
"""

from __future__ import annotations

import random
import re
from base64 import b64encode
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin

import structlog
import trio

from swarm.edges import OriginInfo, Source
from swarm.egress import EgressPolicy
from swarm.errors import (
    ConfigError,
    ContentChanged,
    LocalProtocolError,
    NotFoundAtOrigin,
    NotPermitted,
    OriginError,
    OriginRefused,
    OriginUnreachable,
)
from swarm.origin.answers import Answer, Ask, Headers, Plan, info_of, plan, retry_after, rule_for
from swarm.origin.body import HttpBody
from swarm.origin.connections import Connections, Exchange, Target
from swarm.origin.retry import AttemptFailed, Cause, Retries
from swarm.origin.settings import Metrics, OriginSettings
from swarm.task import MIN_PIECE_BYTES, canonical_url, split_url

MAX_REDIRECTS: Final = 5
MAX_REMEMBERED: Final = 256
"""Redirect chains kept; each is a URL or two."""

MAX_URL_CHARACTERS: Final = 16 * 1024
"""Presigned URLs have a few kilobytes; beyond this a redirect only fills memory."""

MAX_AUTHORIZATIONS: Final = 3
"""Requests until credentials are settled: without any, with a token kept from before, with a fresh one."""

MAX_HEADERS: Final = 64
MAX_HEADER_CHARACTERS: Final = 16 * 1024

USER_AGENT: Final = "swarm"

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_EXPIRED: Final = frozenset({400, 401, 403, 404, 410})
"""Answers of a remembered redirect target that may mean no more than that its signature ran out."""

_CONTENT: Final = frozenset({200, 206, 416})

_NO_HEAD: Final = frozenset({403, 405, 501})
"""Answers to HEAD alone: not implemented, or (a URL signed for GET) refused."""

_CARRIED: Final = frozenset({"accept", "accept-language", "user-agent"})
"""Headers that follow a redirect to another host.  A list of what may pass, not of what may not: X-Registry-Auth,
PRIVATE-TOKEN and whatever comes next are credentials too."""

_OURS: Final = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "keep-alive",
        "proxy-authorization",
        "range",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that decide how an answer is framed or which bytes it has; only this module may set them."""

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}", re.ASCII)
_HOST_NAME: Final = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,252}[a-z0-9_.-])?", re.ASCII)
_SAFE_IN_TARGET: Final = "".join(chr(c) for c in range(0x21, 0x7F))

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Hop:
    """One request of a redirect chain.

    Attributes:
        target: Where to, and what it may reach.
        path: Path and query.
        headers: The asker's, as far as they may go to this host.
    """

    target: Target
    path: bytes = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    url: str = field(repr=False)


class HttpOrigin:
    """`edges.Origin` for http and https.  `aclose` it."""

    def __init__(self, egress: EgressPolicy, settings: OriginSettings, metrics: Metrics, rng: random.Random) -> None:
        self._egress = egress
        self._settings = settings
        self._metrics = metrics
        self._rng = rng
        self._connections = Connections(egress, settings)
        self._remembered: OrderedDict[Source, tuple[Hop, float]] = OrderedDict()

    async def aclose(self) -> None:
        await self._connections.aclose()

    async def head(self, source: Source) -> OriginInfo:
        """Length and validator by HEAD; by the first byte where HEAD is refused, or says no length or nothing of ranges.

        Whether there are ranges is worth a request: several readers of a server without would fetch a whole copy each.

        Raises:
            OriginError, NotPermitted: As in `edges.Origin`.
        """
        answer = await self._answer(source, "HEAD", [], _NO_HEAD | {200})
        await answer.drain()
        if answer.status == 200:
            info = self._info(source, 200, answer.headers)
            known = info.length is not None and (info.ranges is not None or info.length <= MIN_PIECE_BYTES)
            if known or info.ranges is False:
                return info
        answer = await self._answer(source, "GET", Ask(0, 1, ranged=True).headers(), _CONTENT)
        await (answer.close() if answer.status == 200 else answer.drain())
        match answer.status:
            case 206:
                return self._info(source, 206, answer.headers)
            case 416:  # how most servers say that there is no first byte
                return replace(self._info(source, 200, {**answer.headers, "content-length": "0"}), ranges=None)
            case _:
                return replace(self._info(source, 200, answer.headers), ranges=False)

    @asynccontextmanager
    async def read(
        self, source: Source, start: int = 0, stop: int | None = None, *, expect: OriginInfo | None = None
    ) -> AsyncIterator[HttpBody]:
        """Bytes [start, stop) of the version `expect` describes; `body.start` is 0 where the origin ignored the range.

        Raises:
            ContentChanged: It has another version.
            OriginError, NotPermitted: As in `edges.Origin`.
        """
        if start < 0 or (stop is not None and stop <= start):
            raise LocalProtocolError(f"asked an origin for bytes {start} to {stop}")
        ask = Ask.of(start, stop, expect)
        answer, chosen = await self._open(source, ask, expect)
        try:
            yield HttpBody(answer, chosen, name_of(source))
        finally:
            await answer.close()

    async def ask(self, source: Source, method: str, *, accept: frozenset[int], max_bytes: int, form: bytes = b"") -> Answer:
        """See `OriginReader.ask`.

        Raises:
            OriginError, NotPermitted: As in `edges.Origin`.
        """
        retried = False
        while True:
            answer = await self._answer(source, method, [], accept, form)
            try:
                body = await self._small_body(source, answer, max_bytes) if answer.status < 300 and method != "HEAD" else b""
                elsewhere = not answer.target.is_host_of(self._first_hop(source).target)
                return Answer(answer.status, answer.headers, answer.challenges, body, elsewhere)
            except OriginUnreachable:
                if retried:
                    raise
                retried = True  # it broke in the middle of a few kilobytes: most often that is over
            finally:
                await answer.drain()

    async def _small_body(self, source: Source, answer: Exchange, max_bytes: int) -> bytes:
        name = name_of(source)
        with _named(name):
            chosen = plan(200, answer.headers, Ask(), None)
        found = bytearray()
        async for chunk in HttpBody(answer, chosen, name).chunks():
            found += chunk
            if len(found) > max_bytes:
                raise OriginError(f"{name} answers with more than {max_bytes} bytes")
        return bytes(found)

    async def _open(self, source: Source, ask: Ask, expect: OriginInfo | None) -> tuple[Exchange, Plan]:
        """An answer that carries what is asked for; the caller closes it."""
        while True:
            recalled = source in self._remembered
            answer = await self._answer(source, "GET", ask.headers(), _CONTENT)
            try:
                with _named(name_of(source)):
                    return answer, plan(answer.status, answer.headers, ask, expect)
            except ContentChanged:
                await answer.close()
                if not recalled:
                    raise
                # The chain may end elsewhere since (`latest` points to the next release): walk it before believing this.
                self._remembered.pop(source, None)
            except BaseException:
                await answer.close()
                raise

    def _info(self, source: Source, status: int, headers: Headers) -> OriginInfo:
        with _named(name_of(source)):
            return info_of(status, headers, rule_for(canonical_url(source.url), self._settings.validators))

    # --- one answer, with retries ---

    async def _answer(
        self, source: Source, method: str, asked: list[tuple[str, str]], accept: frozenset[int], form: bytes = b""
    ) -> Exchange:
        """An answer whose status is in `accept`; the caller closes it."""
        retries = Retries(self._settings.retries, self._settings.retry_seconds, self._rng, trio.current_time())
        while True:
            try:
                answer = await self._authorized(source, method, asked, form, accept & _REDIRECTS)
                if answer.status in accept:
                    return answer
                await answer.drain()
                raise _failure(name_of(source), answer)
            except AttemptFailed as failure:
                delay = retries.after(failure, trio.current_time())
                if delay is None:
                    if failure.health is not None:
                        failure.health.failed(trio.current_time())
                    raise OriginUnreachable(_given_up(failure, retries)) from failure
                self._metrics.origin_retried()
                log.debug("origin_retry", host=split_url(source.url).hostname, cause=failure.cause.value, delay=round(delay, 3))
                await trio.sleep(delay)

    async def _authorized(
        self, source: Source, method: str, asked: list[tuple[str, str]], form: bytes, ends: frozenset[int]
    ) -> Exchange:
        """One walk; where the source's own host asks for credentials, again with what those turn out to be."""
        authorization = source.authorization
        if authorization is None:
            return await self._walk(source, self._first_hop(source), method, asked, form, ends)
        for attempt in range(1, MAX_AUTHORIZATIONS + 1):
            given = await authorization.headers()
            first = self._first_hop(source, given)
            answer = await self._walk(source, first, method, asked, form, ends)
            # A storage host that a redirect leads to has no say in where credentials go.
            if answer.status != 401 or not answer.target.is_host_of(first.target) or attempt == MAX_AUTHORIZATIONS:
                break
            if not authorization.refused(given, answer.challenges):
                break
            await answer.drain()
        return answer

    async def _walk(
        self, source: Source, first: Hop, method: str, asked: list[tuple[str, str]], form: bytes, ends: frozenset[int]
    ) -> Exchange:
        """Follow redirects from the start, or from where the last walk ended; one of `ends` is an answer itself."""
        if form:
            return await self._exchange(first, method, asked, form)
        hop = self._recall(source) if method == "GET" else None
        if hop is not None:
            answer = await self._exchange(hop, method, asked)
            if answer.status not in _EXPIRED and answer.status not in _REDIRECTS:
                return answer
            await answer.drain()
            self._remembered.pop(source, None)
        hop = first
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._exchange(hop, method, asked)
            if answer.status not in _REDIRECTS or answer.status in ends:
                if hop is not first and method == "GET" and answer.status in (200, 206):
                    self._remember(source, hop)
                return answer
            try:
                hop = self._next_hop(source, hop, answer)
            finally:
                await answer.drain()
        raise OriginError(f"{name_of(source)} redirects more than {MAX_REDIRECTS} times")

    async def _exchange(self, hop: Hop, method: str, asked: list[tuple[str, str]], form: bytes = b"") -> Exchange:
        await self._wait_turn(hop.target, method)
        settings = self._settings
        answer = await self._connections.exchange(
            hop.target,
            method,
            hop.path,
            [*_with_defaults(hop), ("Accept-Encoding", "identity"), *asked, *_framing(form)],
            {"connect": settings.connect_timeout, "read": settings.stall_timeout, "write": settings.stall_timeout},
            form,
        )
        self._metrics.origin_answered(answer.status)
        log.debug("origin_answer", method=method, host=hop.target.authority, status=answer.status)
        if answer.status in _AGAIN:
            wait = retry_after(answer.headers)
            if wait is not None:
                answer.health.asked_to_wait(min(wait, settings.retry_seconds), trio.current_time())
        else:
            answer.health.answered()
        return answer

    async def _wait_turn(self, target: Target, method: str) -> None:
        """Honour what earlier requests learnt of this host.  HEAD always goes out: it finds out whether all is well again."""
        health = self._connections.health(target)
        if health is None:
            return
        now = trio.current_time()
        if method != "HEAD" and health.is_open(now):
            await trio.sleep(self._rng.uniform(0.5, 1.0))  # a caller that asks again at once must not spin
            raise OriginUnreachable(f"{target.authority} failed again and again; left alone for some seconds")
        if health.not_before > now:
            await trio.sleep(health.not_before - now)

    # --- hops ---

    def _first_hop(self, source: Source, given: tuple[tuple[str, str], ...] = ()) -> Hop:
        parts = split_url(source.url)
        headers = check_headers((*source.headers, *given))
        if parts.username is not None or parts.password is not None:
            if source.requester != "user":
                raise NotPermitted(f"refused a URL with credentials in it from a {source.requester}: give them as a header")
            if not any(name.lower() == "authorization" for name, _ in headers):
                headers += (("Authorization", _basic(parts)),)
        return self._hop(source, parts, headers, redirected=False, from_public=False)

    def _hop(
        self, source: Source, parts: SplitResult, headers: tuple[tuple[str, str], ...], *, redirected: bool, from_public: bool
    ) -> Hop:
        host, port = host_of(parts), parts.port or (443 if parts.scheme == "https" else 80)
        permit = self._egress.permit(source.requester, host, port, redirected=redirected, from_public=from_public)
        path = quote(parts.path or "/", safe=_SAFE_IN_TARGET)
        if parts.query:
            path += "?" + quote(parts.query, safe=_SAFE_IN_TARGET)
        target = Target(parts.scheme, host, port, permit)
        return Hop(target, path.encode("ascii"), headers, parts._replace(netloc=target.authority, fragment="").geturl())

    def _next_hop(self, source: Source, hop: Hop, answer: Exchange) -> Hop:
        """Where a redirect leads, with what it may take along.

        Raises:
            OriginError: Nowhere.
            NotPermitted: Where it must not.
        """
        name = name_of(source)
        location = _location(answer.headers.get("location", ""))
        if not location or len(location) > MAX_URL_CHARACTERS:
            raise OriginError(f"{name} answered {answer.status} without a usable Location")
        try:
            url = urljoin(hop.url, location)
            scheme = url.partition(":")[0].lower()
            if scheme not in ("http", "https"):
                raise NotPermitted(f"refused to follow a redirect of {name} to another scheme than http and https")
            parts = split_url(url)
            host = host_of(parts)
        except (ConfigError, ValueError) as error:
            raise OriginError(f"{name} answered {answer.status} with a Location that is not a URL") from error
        if hop.target.scheme == "https" and scheme == "http":
            raise NotPermitted(f"refused to follow a redirect of {name} from https to plain http at {host}")
        port = parts.port or (443 if scheme == "https" else 80)
        same = (scheme, host, port) == (hop.target.scheme, hop.target.host, hop.target.port)
        headers = hop.headers if same else tuple(pair for pair in hop.headers if pair[0].lower() in _CARRIED)
        return self._hop(source, parts, headers, redirected=True, from_public=answer.from_public)

    def _remember(self, source: Source, hop: Hop) -> None:
        self._remembered[source] = (hop, trio.current_time() + self._settings.redirect_memory)
        self._remembered.move_to_end(source)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def _recall(self, source: Source) -> Hop | None:
        hop, until = self._remembered.get(source, (None, 0.0))
        if hop is not None and trio.current_time() >= until:
            del self._remembered[source]
            return None
        return hop


def name_of(source: Source) -> str:
    """The URL for people: without userinfo, query or fragment, any of which may hold a secret."""
    return canonical_url(source.url).partition("?")[0]


def check_headers(headers: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The asker's headers, if they can be sent.

    Raises:
        ConfigError: Which one cannot, and why; never its value.
    """
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_CHARACTERS:
        raise ConfigError(f"too many headers: at most {MAX_HEADERS}, of {MAX_HEADER_CHARACTERS} characters together")
    for name, value in headers:
        if not _HEADER_NAME.fullmatch(name):
            raise ConfigError("a header name may hold letters, digits and -_.!#$%&'*+^`|~ only; give 'Name: value'")
        if name.lower() in _OURS:
            raise ConfigError(f"header {name} cannot be given: swarm sets it itself")
        if any((ord(c) < 0x20 and c != "\t") or ord(c) == 0x7F for c in value) or value != value.strip():
            raise ConfigError(f"the value of header {name} holds control characters or outer spaces")
    return headers


def host_of(parts: SplitResult) -> str:
    """The host of a URL as it is dialled: lower case, ASCII (IDNA), no brackets.

    Raises:
        ConfigError: Not a host name or an address.
    """
    host = parts.hostname or ""
    if "\\" in parts.netloc or ("[" in parts.netloc and ":" not in host):
        raise ConfigError("not a URL: programs would disagree about its host")
    if ":" in host:
        if re.fullmatch(r"[0-9a-f:.]{2,45}(%25?[\w.~-]{1,32})?", host, re.ASCII):
            return host.partition("%")[0]
        raise ConfigError("not a URL: its IPv6 address is malformed")
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii").lower()
        except UnicodeError as error:
            raise ConfigError("not a URL: its host is not a valid name") from error
    if not _HOST_NAME.fullmatch(host):
        raise ConfigError("not a URL: its host holds characters that no host name has")
    return host


def _with_defaults(hop: Hop) -> list[tuple[str, str]]:
    given = {name.lower() for name, _ in hop.headers}
    defaults = (("Host", hop.target.authority), ("User-Agent", USER_AGENT), ("Accept", "*/*"))
    return [*(pair for pair in defaults if pair[0].lower() not in given), *hop.headers]


def _framing(form: bytes) -> list[tuple[str, str]]:
    return [("Content-Type", "application/x-www-form-urlencoded"), ("Content-Length", str(len(form)))] if form else []


def _basic(parts: SplitResult) -> str:
    secret = unquote_to_bytes(parts.username or "") + b":" + unquote_to_bytes(parts.password or "")
    return "Basic " + b64encode(secret).decode("ascii")


def _location(raw: str) -> str:
    """A Location as text: bytes are UTF-8 in practice, and spaces that should have been encoded are."""
    try:
        text = raw.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        text = raw
    return text.strip().replace(" ", "%20")


def _failure(name: str, answer: Exchange) -> OriginError:
    """What an answer without content means to the asker.  Only its status is told: the rest is the server's to choose."""
    status = answer.status
    if status in _AGAIN:
        failure = AttemptFailed(f"{name} answered {status}", Cause.STATUS, retry_after(answer.headers))
        failure.health = answer.health
        return failure
    if status in (404, 410):
        return NotFoundAtOrigin(f"{name} does not exist: its origin answered {status}; check the URL")
    if status == 401:
        return OriginRefused(f"{name} asks for credentials (401): give them with --header 'Authorization: ...', or check them")
    if status in (403, 407):
        return OriginRefused(
            f"{name} is refused ({status}): the credentials are missing or not enough, or a signed URL ran out; check --header"
        )
    return OriginError(f"{name} answered {status}, which is no content")


def _given_up(failure: AttemptFailed, retries: Retries) -> str:
    tries = f" ({retries.failures} attempts)" if retries.failures > 1 else ""
    wait = f"; it asks to wait {failure.retry_after:.0f} s" if failure.retry_after else "; try again later"
    return f"{failure}{tries}{wait}"


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the origin's name before what a decision on its answer complains of."""
    try:
        yield
    except ContentChanged as error:
        raise ContentChanged(f"{name}: {error}; fetch it again, or say which version with --digest") from error
    except OriginError as error:
        raise OriginError(f"{name}: {error}") from error
