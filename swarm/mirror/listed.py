"""Which registries the mirror reads, where they answer, and what it believes of them.  No I/O.

A registry that nobody listed may only say what it has itself.  It cannot open what is private elsewhere: whoever runs a
registry can answer "yes, your client may read that" to any digest, and content is found by digest alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from swarm.config import MirrorSettings, RegistrySettings
from swarm.egress import Reach, Rule
from swarm.mirror.paths import DOCKER_HUB, Name, parse_registry

HUB: Final = "https://huggingface.co"
"""The hub that has a public address unless a setting says so; any other was named on purpose."""

WELL_KNOWN: Final = re.compile(
    "|".join(
        (
            r"docker\.io",
            r"ghcr\.io",
            r"quay\.io",
            r"([a-z]+\.)?gcr\.io",
            r"[a-z0-9-]+\.pkg\.dev",
            r"registry\.k8s\.io",
            r"mcr\.microsoft\.com",
            r"[a-z0-9]+\.azurecr\.io",
            r"public\.ecr\.aws",
            r"[0-9]{12}\.dkr\.ecr(-fips)?\.[a-z0-9-]+\.amazonaws\.com(\.cn)?",
            r"registry\.gitlab\.com",
            r"nvcr\.io",
            r"registry\.(access\.)?redhat\.(io|com)",
        )
    )
)
"""Public registries that serve many owners and let none of them answer for it: as good as listed."""

ENDPOINTS: Final = {DOCKER_HUB: "https://registry-1.docker.io"}

TOKEN_HOSTS: Final = {DOCKER_HUB: ("auth.docker.io",), "registry.gitlab.com": ("gitlab.com",)}
"""Token servers that are not where the registry is; of all others only the configuration knows whose they are."""

Place = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a registry answers."""

    scheme: str
    host: str
    port: int

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        standard = self.port == (443 if self.scheme == "https" else 80)
        return f"{self.scheme}://{host}" if standard else f"{self.scheme}://{host}:{self.port}"

    @property
    def place(self) -> Place:
        return self.host, self.port


@dataclass(frozen=True, slots=True)
class Listed:
    """Section `[mirror]`, read."""

    names: frozenset[str]
    suffixes: tuple[str, ...]
    any_public: bool
    tables: dict[str, RegistrySettings] = field(hash=False)
    default_rights: str
    places: frozenset[Place] = frozenset()

    @classmethod
    def read(cls, settings: MirrorSettings) -> Listed:
        tables = {_canonical(name): table for name, table in settings.registry}
        entries = {_canonical(name) for name in settings.registries if name != "*"} | tables.keys()
        found = cls(
            frozenset(name for name in entries if not name.startswith("*.")),
            tuple(sorted(name[1:] for name in entries if name.startswith("*."))),
            "*" in settings.registries,
            tables,
            settings.rights,
        )
        places = {found.endpoint(name).place for name in found.names}
        if settings.huggingface and settings.huggingface.rstrip("/") != HUB:
            places.add(endpoint_of(settings.huggingface).place)
        hosts = [host for table in tables.values() for host in table.token_hosts]
        return replace(found, places=frozenset(places | {_place(host, s) for host in hosts for s in ("http", "https")}))

    def is_listed(self, registry: str) -> bool:
        """Whether an entry names it: it may have a private address."""
        return registry in self.names or _host(registry).endswith(self.suffixes)

    def is_allowed(self, registry: str) -> bool:
        """Whether the mirror reads it at all.

        An unlisted name for a place that is listed is refused: it would be reached as the listed one, and treated as neither.
        """
        return self.is_listed(registry) or (self.any_public and not self.is_local(*self.endpoint(registry).place))

    def is_local(self, host: str, port: int) -> bool:
        """Whether the configuration names this place, so that it may have a private address."""
        return (host, port) in self.places or bool(self.suffixes and host.endswith(self.suffixes))

    def is_trusted(self, registry: str) -> bool:
        """Whether it is believed about who may read what is private."""
        return self.is_listed(registry) or is_well_known(registry)

    def settings(self, registry: str) -> RegistrySettings:
        """What is set for it: in its own table, else in that of the longest `*.domain` that fits."""
        if registry in self.tables:
            return self.tables[registry]
        fitting = [name for name in self.tables if name.startswith("*.") and _host(registry).endswith(name[1:])]
        return self.tables[max(fitting, key=len)] if fitting else RegistrySettings()

    def endpoint(self, registry: str) -> Endpoint:
        """Where it answers: https and its own name, unless something else is said."""
        return endpoint_of(self.settings(registry).endpoint or ENDPOINTS.get(registry) or f"https://{registry}")

    def rights(self, name: Name) -> str:
        """`auto`, `public`, `verify` or `never`: of the longest repository pattern that fits, the registry, or in general."""
        table = self.settings(name.registry)
        fitting = [(len(pattern), rights) for pattern, rights in table.repositories if _fits(pattern, name.repository)]
        return max(fitting)[1] if fitting else table.rights or self.default_rights

    def is_own_token_host(self, registry: str, scheme: str, place: Place) -> bool:
        """Whether tokens for this registry may be asked for there at all.

        The realm of one registry must not make this node call the hosts that were listed for another.
        """
        return not self.is_local(*place) or self.may_have_credentials(registry, scheme, place)

    def may_have_credentials(self, registry: str, scheme: str, place: Place) -> bool:
        """Whether a token server may be given credentials for this registry.

        The registry itself, or a host that the configuration (or the table above) names for it.  The same host on another
        port is another service, and on loopback often somebody else's.
        """
        endpoint = self.endpoint(registry)
        if (scheme, place) == (endpoint.scheme, endpoint.place):
            return True
        hosts = (*self.settings(registry).token_hosts, *TOKEN_HOSTS.get(registry, ()))
        return place in {_place(host, scheme) for host in hosts} and (scheme == "https" or endpoint.scheme == "http")


@lru_cache(maxsize=1024)
def is_well_known(registry: str) -> bool:
    return WELL_KNOWN.fullmatch(registry) is not None


def egress_rule(settings: MirrorSettings) -> Rule:
    """How far requests for clients of the mirror reach: private addresses where a registry or its token server is listed.

    Where those redirect to (storage) is public, or listed in `egress.allow`.
    """
    listed = Listed.read(settings)
    return lambda host, port, redirected: Reach.LOCAL if listed.is_local(host, port) else Reach.PUBLIC


@lru_cache(maxsize=1024)
def endpoint_of(url: str) -> Endpoint:
    """Where a URL leads.

    Raises:
        ValueError: It is none.
    """
    parts = urlsplit(url)
    return Endpoint(parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))


def _canonical(name: str) -> str:
    return name.lower() if name.startswith("*.") else parse_registry(name)


def _host(registry: str) -> str:
    return re.sub(r":[0-9]+$", "", registry)


def _place(text: str, scheme: str) -> Place:
    parts = urlsplit(f"{scheme}://{text}")
    return parts.hostname or "", parts.port or (443 if scheme == "https" else 80)


def _fits(pattern: str, repository: str) -> bool:
    return repository.startswith(pattern[:-1]) if pattern.endswith("*") else repository == pattern
