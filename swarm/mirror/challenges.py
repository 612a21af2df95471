"""`WWW-Authenticate`: what a registry asks for.  No I/O; everything here is a stranger's text until it was read.

A registry chooses where tokens come from.  Whoever follows that choice with credentials in hand gives them to whomever the
registry names (CVE-2020-15157, CVE-2026-33540), so which hosts may get any is decided in `listed.py`, not here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, quote

from swarm.errors import ConfigError, OriginError
from swarm.task import split_url

MAX_CHALLENGE_CHARACTERS: Final = 4096
MAX_REALM_CHARACTERS: Final = 2048

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}", re.ASCII)
_VALUE: Final = re.compile(r'[ \t]*=[ \t]*(?:"([\x20\x21\x23-\x5b\x5d-\x7e]*)"|([!#$%&\'*+.^_`|~0-9A-Za-z:/-]+))', re.ASCII)
"""Quoted text without escapes: no realm, service or scope has a quote or a backslash in it, and none of them gets into a
header or a URL this way."""

_GAP: Final = re.compile(r"[ \t,]*")
_OPAQUE_SCOPE: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_ERRORS: Final = frozenset({"invalid_request", "invalid_token", "insufficient_scope"})


@dataclass(frozen=True, slots=True)
class Challenge:
    """What is asked for.

    Attributes:
        scheme: `basic` or `bearer`.
        realm: Of a bearer challenge, where tokens come from.
        scope: What the registry would have us ask for; see `scope_for`.
    """

    scheme: str
    realm: str = ""
    service: str = ""
    scope: str = ""
    error: str = ""

    def plain(self) -> Challenge:
        """What of it holds for every request to the registry."""
        words = [word for word in self.scope.split(" ") if _OPAQUE_SCOPE.fullmatch(word)]
        return Challenge(self.scheme, self.realm, self.service, " ".join(words[:4]))

    def to_client(self, repository: str) -> str:
        """The challenge as a client of the mirror gets it, written anew."""
        if self.scheme == "basic":
            return f'Basic realm="{self.realm}"'
        error = self.error if self.error in _ERRORS else ""
        pairs = [("realm", self.realm), ("service", self.service), ("scope", self._scope(repository)), ("error", error)]
        return "Bearer " + ",".join(f'{name}="{value}"' for name, value in pairs if value)

    def token_query(self, repository: str) -> str:
        """What is asked of the realm: to pull from this repository, whatever the registry would have us ask for.

        A scope it names for something else (another repository, `push`) would be a token we have no use for, and with
        credentials one that does more than they were given for.
        """
        scopes = self._scope(repository).split(" ")
        pairs = [("service", self.service), *(("scope", scope) for scope in scopes)]
        return "&".join(f"{name}={quote(value, safe=':/,')}" for name, value in pairs if value)

    def _scope(self, repository: str) -> str:
        ours = f"repository:{repository}:pull"
        # Some registries have a word of their own (`aws`) without which there is no token.
        return " ".join([ours, *(word for word in self.scope.split(" ") if _OPAQUE_SCOPE.fullmatch(word))][:5])


def choose(headers_untrusted: Sequence[str]) -> Challenge | None:
    """The challenge to answer: a bearer one if there is any, else a basic one."""
    found = [challenge for header in headers_untrusted for challenge in parse(header)]
    for scheme in ("bearer", "basic"):
        for challenge in found:
            if challenge.scheme == scheme and (scheme == "basic" or challenge.realm):
                return challenge
    return None


def parse(header_untrusted: str) -> list[Challenge]:
    """Every Basic and Bearer challenge of one header, up to where it stops making sense (RFC 9110, 11.6.1)."""
    if len(header_untrusted) > MAX_CHALLENGE_CHARACTERS:
        return []
    found: list[tuple[str, dict[str, str]]] = []
    at = _skip(header_untrusted, 0)
    while at < len(header_untrusted):
        word = _TOKEN.match(header_untrusted, at)
        if word is None:
            break
        value = _VALUE.match(header_untrusted, word.end()) if found else None
        if value is None:
            found.append((word[0].lower(), {}))
            at = _skip(header_untrusted, word.end())
            continue
        name = word[0].lower()
        if name in found[-1][1]:
            break  # programs would disagree about which of the two counts
        found[-1][1][name] = value[1] if value[1] is not None else value[2]
        at = _skip(header_untrusted, value.end())
    else:
        return [_challenge(scheme, given) for scheme, given in found if scheme in ("basic", "bearer")]
    return [_challenge(scheme, given) for scheme, given in found[:-1] if scheme in ("basic", "bearer")]


def realm_url(challenge: Challenge, *, from_https: bool) -> tuple[str, SplitResult]:
    """Where to ask for a token.

    Args:
        from_https: The registry was reached over TLS; its tokens must be, too.

    Raises:
        OriginError: Not a place to ask.
    """
    try:
        parts = split_url(challenge.realm)
    except ConfigError as error:
        raise OriginError("its token server (realm) is not a URL") from error
    if len(challenge.realm) > MAX_REALM_CHARACTERS or parts.scheme not in ("http", "https"):
        raise OriginError("its token server (realm) is not an http or https URL")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise OriginError("its token server (realm) has credentials or a fragment in its URL")
    if from_https and parts.scheme != "https":
        raise OriginError("its token server (realm) is plain http, though the registry is https")
    return challenge.realm, parts


def _challenge(scheme: str, given: dict[str, str]) -> Challenge:
    return Challenge(scheme, given.get("realm", ""), given.get("service", ""), given.get("scope", ""), given.get("error", ""))


def _skip(text: str, at: int) -> int:
    gap = _GAP.match(text, at)
    return gap.end() if gap is not None else at
