"""Who asks a registry, and what each of their requests carries.

Nothing is sent before the registry asked for it, but a token a client got for this very registry.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from swarm.mirror.challenges import Challenge, choose
from swarm.mirror.credentials import Basic, Bearer, Credential, OwnCredentials, tag_of
from swarm.mirror.listed import Listed
from swarm.mirror.paths import Name
from swarm.mirror.tokens import MAX_SECONDS, Asks, Tokens, Wanted

MAX_CHALLENGES: Final = 1024
"""Registries whose way of asking is remembered; a client can name any number of them."""

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Asker:
    """For whom a registry is asked.

    Attributes:
        tag: Tells askers apart; says nothing about their credentials.  Empty for nobody in particular.
        credential: A client's own.
        own: With this node's credentials.
    """

    tag: bytes = field(default=b"", repr=False)
    credential: Basic | Bearer | None = field(default=None, repr=False)
    own: bool = False

    @classmethod
    def client(cls, credential: Basic | Bearer) -> Asker:
        return cls(tag_of(credential), credential)

    @property
    def is_anonymous(self) -> bool:
        return self.credential is None and not self.own


ANONYMOUS: Final = Asker()
NODE: Final = Asker(b"own", own=True)


class Broker:
    """Knows how each registry wants to be asked.

    Args:
        client_seconds: Longest use of a token got with a client's password, which may have been taken back meanwhile.
        seconds: Longest wait for a token server.
    """

    def __init__(self, listed: Listed, own: OwnCredentials, origin: Asks, *, client_seconds: float, seconds: float) -> None:
        self._own = own
        self._tokens = Tokens(listed, origin, seconds)
        self._client_seconds = client_seconds
        self._challenges: OrderedDict[str, Challenge] = OrderedDict()

    def challenge(self, registry: str) -> Challenge | None:
        """What this registry asked for last."""
        return self._challenges.get(registry)

    async def headers(self, name: Name, asker: Asker) -> Headers:
        """What the next request carries.

        Raises:
            TokenRefused: The token server says no.
            OriginError, NotPermitted: It, or this node's credentials, cannot be asked.
        """
        challenge = self._challenges.get(name.registry)
        if isinstance(asker.credential, Bearer):
            return _authorization(asker.credential)
        if challenge is None:
            return ()
        credential: Credential | None = await self._own.find(name) if asker.own else asker.credential
        if isinstance(credential, Bearer):
            return _authorization(credential)
        if challenge.scheme == "basic":
            return _authorization(credential) if isinstance(credential, Basic) else ()
        max_age = self._client_seconds if asker.credential is not None else MAX_SECONDS
        wanted = Wanted(name, challenge, tag_of(credential), max_age)
        return (("Authorization", await self._tokens.get(wanted, credential)),)

    def refused(self, name: Name, asker: Asker, headers: Headers, challenges: tuple[str, ...]) -> bool:
        """See `edges.Authorization.refused`."""
        found = choose(challenges)
        if found is None:
            return False
        found = found.plain()
        changed = self._challenges.get(name.registry) not in (None, found)
        self._remember(name.registry, found)
        if isinstance(asker.credential, Bearer):
            return False
        sent = dict(headers).get("Authorization", "")
        if not sent:
            has_any = asker.credential is not None or (asker.own and self._own.might_have(name.registry))
            return found.scheme == "bearer" or has_any
        if found.scheme == "basic":
            return changed or (asker.own and self._own.forget(name.registry))
        return self._tokens.drop(sent)

    def _remember(self, registry: str, challenge: Challenge) -> None:
        self._challenges[registry] = challenge
        self._challenges.move_to_end(registry)
        while len(self._challenges) > MAX_CHALLENGES:
            self._challenges.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Access:
    """An `edges.Authorization`: one asker's requests to one repository."""

    broker: Broker = field(repr=False)
    name: Name
    asker: Asker

    async def headers(self) -> Headers:
        return await self.broker.headers(self.name, self.asker)

    def refused(self, headers: Headers, challenges: tuple[str, ...]) -> bool:
        return self.broker.refused(self.name, self.asker, headers, challenges)


def _authorization(credential: Basic | Bearer) -> Headers:
    return (("Authorization", credential.header),)
