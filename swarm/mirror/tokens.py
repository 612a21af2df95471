"""Bearer tokens: asked for where a registry says, kept until shortly before they run out.

A token is kept for one credential, registry, repository and realm, so that what one client's password opened is never used
for another's request, and a token for one repository never for another.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar
from urllib.parse import urlencode

import structlog
import trio

from swarm.edges import Source
from swarm.errors import NotPermitted, OriginError, OriginRefused, OriginUnreachable
from swarm.mirror.challenges import Challenge, realm_url
from swarm.mirror.credentials import MAX_HEADER_CHARACTERS, Basic, Credential, Refresh
from swarm.mirror.flights import Flights
from swarm.mirror.listed import Listed
from swarm.mirror.paths import Name
from swarm.origin.answers import Answer

MAX_TOKENS: Final = 1024
"""Kept at most: a client chooses repository names, and each could have its own, of up to 12 KiB."""

MAX_ANSWER_BYTES: Final = 64 * 1024

DEFAULT_SECONDS: Final = 60.0
MAX_SECONDS: Final = 3600.0
"""A token without `expires_in` is good for 60 s (the specification's word); no token is believed to be good for a day."""

SPARE_SECONDS: Final = 10.0
"""Not used any more so long before it runs out: it has to last for the request that it begins."""

REFUSED_SECONDS: Final = 10.0
"""A token server that refused is not asked the same again for so long: many lock accounts after some wrong passwords."""

FRESH_SECONDS: Final = 2.0
"""A token younger than this is refused because it opens nothing, not because it ran out."""

MAX_WARNED: Final = 64

_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)
_ANSWERS: Final = frozenset({200, 400, 401, 403, 404, 405})

log = structlog.get_logger(__name__)

V = TypeVar("V")


class Asks(Protocol):
    """`OriginReader`, as far as it is needed here."""

    async def ask(
        self, source: Source, method: str = "GET", *, accept: frozenset[int], max_bytes: int = 0, form: bytes = b""
    ) -> Answer: ...


class TokenRefused(OriginRefused):
    """The token server gives no token to this asker."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a token is for.  Equal ones may share it.

    Attributes:
        tag: Of the credential, which is not part of what is kept.
        max_age: A token is not used for longer than this, whatever its server says: the right behind it may be taken away.
    """

    name: Name
    challenge: Challenge
    tag: bytes = field(repr=False)
    max_age: float = MAX_SECONDS


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    since: float
    until: float


class Tokens:
    """Tokens by what they are for.

    Args:
        seconds: Longest wait for a token server.
    """

    def __init__(self, listed: Listed, origin: Asks, seconds: float) -> None:
        self._listed = listed
        self._origin = origin
        self._seconds = seconds
        self._kept: OrderedDict[Wanted, _Token] = OrderedDict()
        self._refused: OrderedDict[Wanted, float] = OrderedDict()
        self._flights: Flights[Wanted, str] = Flights()
        self._warned: set[tuple[str, str]] = set()

    async def get(self, wanted: Wanted, credential: Credential | None) -> str:
        """The value of an `Authorization` header.

        Raises:
            TokenRefused: The token server says no.
            OriginError, NotPermitted: It cannot be asked.
        """
        now = trio.current_time()
        kept = self._kept.get(wanted)
        if kept is not None and now < kept.until:
            self._kept.move_to_end(wanted)
            return kept.value
        if now < self._refused.get(wanted, now):
            raise TokenRefused(f"the token server of {wanted.name.registry} refused just now")
        return await self._flights.share(wanted, lambda: self._fetch(wanted, credential))

    def drop(self, value: str) -> bool:
        """The registry refused this token.  Whether another one may do."""
        for wanted, kept in self._kept.items():
            if kept.value == value:
                if trio.current_time() - kept.since < FRESH_SECONDS:
                    return False
                del self._kept[wanted]
                return True
        return True  # it ran out, or somebody else has noticed already

    async def _fetch(self, wanted: Wanted, credential: Credential | None) -> str:
        began = trio.current_time()
        try:
            with trio.fail_after(self._seconds):
                answer = await self._ask(wanted, credential)
        except trio.TooSlowError as error:
            raise OriginUnreachable(
                f"the token server of {wanted.name.registry} gave no token within {self._seconds:g} s"
            ) from error
        if answer.status != 200:
            _put(self._refused, wanted, began + REFUSED_SECONDS)
            raise TokenRefused(f"the token server of {wanted.name.registry} gives no token ({answer.status})")
        token, seconds = _read(answer.body, wanted.name.registry)
        until = began + min(max(seconds - SPARE_SECONDS, seconds / 2), wanted.max_age)
        _put(self._kept, wanted, _Token(f"Bearer {token}", began, until))
        return f"Bearer {token}"

    async def _ask(self, wanted: Wanted, credential: Credential | None) -> Answer:
        endpoint = self._listed.endpoint(wanted.name.registry)
        url, parts = realm_url(wanted.challenge, from_https=endpoint.scheme == "https")
        place = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        registry = wanted.name.registry
        if not self._listed.is_own_token_host(registry, parts.scheme, place):
            raise NotPermitted(
                f"refused to ask {place[0]} for tokens of {registry}: that place was listed for another registry"
            )
        if credential is not None and not self._listed.may_have_credentials(registry, parts.scheme, place):
            self._warn(registry, place[0])
            credential = None
        query = wanted.challenge.token_query(wanted.name.repository)
        if isinstance(credential, Refresh):
            form = [("grant_type", "refresh_token"), ("client_id", "swarm"), ("refresh_token", credential.token)]
            body = f"{urlencode(form)}&{query}".encode("ascii")
            return await self._origin.ask(
                Source(url, requester="mirror"), "POST", accept=_ANSWERS, max_bytes=MAX_ANSWER_BYTES, form=body
            )
        headers = (("Authorization", credential.header),) if isinstance(credential, Basic) else ()
        source = Source(f"{url}{'&' if parts.query else '?'}{query}", headers, requester="mirror")
        return await self._origin.ask(source, accept=_ANSWERS, max_bytes=MAX_ANSWER_BYTES)

    def _warn(self, registry: str, host: str) -> None:
        """Once for each pair: a registry could name ever new hosts."""
        if (registry, host) not in self._warned and len(self._warned) < MAX_WARNED:
            self._warned.add((registry, host))
            log.warning(
                "credentials withheld from a token server; list it in token_hosts of the registry", name=registry, host=host
            )


def _read(body: bytes, registry: str) -> tuple[str, float]:
    """The token and how long it is good for.

    Raises:
        OriginError: There is none, or one that cannot be sent.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise OriginError(f"the token server of {registry} answered with something else than JSON") from None
    token = found.get("token") or found.get("access_token") if isinstance(found, dict) else None
    if not isinstance(token, str) or len(token) > MAX_HEADER_CHARACTERS or not _TOKEN.fullmatch(token):
        raise OriginError(f"the token server of {registry} answered without a usable token")
    seconds = found.get("expires_in")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < 1e9:
        seconds = DEFAULT_SECONDS
    return token, float(seconds)


def _put(cache: OrderedDict[Wanted, V], key: Wanted, value: V) -> None:
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > MAX_TOKENS:
        cache.popitem(last=False)
