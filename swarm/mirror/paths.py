"""What a request to the mirror names: a registry, a repository, and a manifest, blob or list in it.

Three ways to say which registry, in this order: the query parameter `ns` (containerd), a first path component that looks
like a host (podman and CRI-O, whose configuration can only add a path), and neither, which means Docker Hub (Docker).
Everything here is text from a stranger until `parse_target` returned it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Final
from urllib.parse import unquote_to_bytes

from swarm.errors import ConfigError
from swarm.mirror.edges import MirrorError
from swarm.task import Digest

DOCKER_HUB: Final = "docker.io"
"""As clients call it; the host that answers is `registry-1.docker.io`, which only `registry.py` needs to know."""

MAX_TARGET_BYTES: Final = 8 * 1024
"""A request line; `referrers` and `tags/list` have queries, nothing else is longer than a few hundred bytes."""

MAX_REPOSITORY_CHARS: Final = 255
"""The longest name that registries take, host excluded."""

MAX_HOST_CHARS: Final = 253

_REPOSITORY: Final = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG: Final = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_HOST: Final = re.compile(
    r"(?P<host>\[[0-9a-f:.]{2,45}\]|[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*)(?::(?P<port>[0-9]{1,5}))?"
)
_PORT_IN_PATH: Final = re.compile(r"__([0-9]{1,5})\Z")
_QUERY: Final = re.compile(r"[A-Za-z0-9\-._~!$&'()*+,;=:@/?%\[\]]*")
_HUB_NAMES: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"})


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """A repository of a registry.

    Attributes:
        registry: `host` or `host:port`, lower case; Docker Hub is `docker.io`.
        repository: Checked against the specification's grammar; Docker Hub's own images begin with `library/`.
    """

    registry: str
    repository: str

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}"


@dataclass(frozen=True, slots=True)
class ClientCredentials:
    """The `Authorization` header a client sent; it goes to the registry it asked for, never into a log, a file or to a peer."""

    header: str = field(repr=False)


class Kind(Enum):
    """What is asked for."""

    BASE = "base"
    MANIFEST = "manifest"
    BLOB = "blob"
    TAGS = "tags"
    REFERRERS = "referrers"
    FILE = "file"
    """Of the hub, as `API`; see `hub_paths`."""
    API = "api"


@dataclass(frozen=True, slots=True)
class Target:
    """A checked request target.

    Attributes:
        name: `None` for `/v2/` only.
        reference: Tag or digest of a manifest, digest of a blob or a referrers list; empty otherwise.
        digest: The reference, where it is one.
        query: What remains of the query without `ns`, passed on for lists.
        namespace: The `ns` parameter as it came, to be answered in `OCI-Namespace`; empty without one.
    """

    kind: Kind
    name: Name | None = None
    reference: str = ""
    digest: Digest | None = None
    query: str = ""
    namespace: str = ""


def parse_target(target_untrusted: bytes) -> Target:
    """Read the target of a request line.

    Raises:
        MirrorError: 400 for what is malformed, 404 for what is no route of ours.
    """
    if len(target_untrusted) > MAX_TARGET_BYTES:
        raise MirrorError(414, "UNSUPPORTED", "the request target is too long")
    if not target_untrusted.startswith(b"/"):
        raise MirrorError(400, "UNSUPPORTED", "this is a mirror, not a proxy: give a path, not a URL")
    path_bytes, _, query_bytes = target_untrusted.partition(b"?")
    path, query = _decode_path(path_bytes), _decode_query(query_bytes)
    namespace, rest = _take_namespace(query)
    if path in ("/v2", "/v2/"):
        return Target(Kind.BASE, query=rest, namespace=namespace)
    if not path.startswith("/v2/"):
        raise MirrorError(404, "UNSUPPORTED", "no such route")
    return _route(path.removeprefix("/v2/"), namespace, rest)


def parse_reference(text: str) -> Digest | None:
    """The digest, or `None` for a valid tag.

    Raises:
        MirrorError: 400, neither.
    """
    if ":" in text:
        return parse_digest(text)
    if _TAG.fullmatch(text) is None:
        raise MirrorError(400, "MANIFEST_INVALID", "not a valid tag")
    return None


def parse_digest(text: str) -> Digest:
    """A digest of a kind this mirror can check.

    Raises:
        MirrorError: 400.
    """
    try:
        return Digest.parse(text)
    except ConfigError as error:
        raise MirrorError(400, "DIGEST_INVALID", "not a sha256 or sha512 digest in lower case") from error


def parse_registry(text: str) -> str:
    """A registry's host and port, in lower case, with Docker Hub's many names as one.

    Raises:
        MirrorError: 400, not a host.
    """
    host = text.lower()
    match = _HOST.fullmatch(host) if len(host) <= MAX_HOST_CHARS + 6 else None
    if match is None or (match["port"] is not None and not 0 < int(match["port"]) < 65536):
        raise MirrorError(400, "NAME_INVALID", "not the host of a registry")
    return DOCKER_HUB if host in _HUB_NAMES else host


def parse_name(registry: str, repository: str) -> Name:
    """A repository by its parts.

    Raises:
        MirrorError: 400, one of them is malformed.
    """
    host = parse_registry(registry)
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    if len(repository) > MAX_REPOSITORY_CHARS or _REPOSITORY.fullmatch(repository) is None:
        raise MirrorError(400, "NAME_INVALID", "not a valid repository name")
    return Name(host, repository)


def parse_image(text: str) -> tuple[Name, str]:
    """An image as people write it: `alpine`, `quay.io/team/app:v1`, `host:5000/app@sha256:...`.

    Returns:
        The repository, and the digest or tag (`latest` where none is given).

    Raises:
        MirrorError: 400, not a valid name, tag or digest.
    """
    rest, _, digest = text.partition("@")
    head, slash, tail = rest.partition("/")
    registry, path = (head, tail) if slash and is_host(head) else (DOCKER_HUB, rest)
    path, _, tag = path.partition(":")
    reference = digest or tag or "latest"
    parse_reference(reference)
    return parse_name(registry, path), reference


def is_host(component: str) -> bool:
    """Whether the first component of a name is a registry: it has a dot or a port, or is `localhost` (Docker's own rule)."""
    return "." in component or ":" in component or component == "localhost"


def in_path(registry: str) -> str:
    """A registry as the first component of a path: these clients refuse a colon there, so a port goes behind two underscores.

    No host has underscores, and no name on Docker Hub begins like that.

    Raises:
        ConfigError: It is an IPv6 address, which no path can name.
    """
    if "[" in registry:
        raise ConfigError(f"{registry} cannot be said in the path of an image: give the registry a name")
    return registry.replace(":", "__")


def _route(path: str, namespace: str, query: str) -> Target:
    for kind, marker in ((Kind.MANIFEST, "/manifests/"), (Kind.BLOB, "/blobs/"), (Kind.REFERRERS, "/referrers/")):
        # From the right: a repository may have a component of this name, a reference has no slash.
        repository, found, reference = path.rpartition(marker)
        if not found or "/" in reference:
            continue
        name = _name(repository, namespace)
        digest = parse_reference(reference) if kind is Kind.MANIFEST else parse_digest(reference)
        return Target(kind, name, reference, digest, query, namespace)
    repository, found, rest = path.rpartition("/tags/list")
    if found and not rest:
        return Target(Kind.TAGS, _name(repository, namespace), query=query, namespace=namespace)
    raise MirrorError(404, "UNSUPPORTED", "no such route; uploads and deletions go to the registry itself")


def _name(path: str, namespace: str) -> Name:
    if namespace:
        return parse_name(namespace, path)
    first, slash, rest = path.partition("/")
    first = _PORT_IN_PATH.sub(r":\1", first)
    if slash and is_host(first):
        return parse_name(first, rest)
    return parse_name(DOCKER_HUB, path)


def _decode_path(raw: bytes) -> str:
    """The path as text; an encoded slash, dot segment or control character has no business in it (SECURITY: T18)."""
    lowered = raw.lower()
    if b"%2f" in lowered or b"%00" in lowered or b"%25" in lowered:
        raise MirrorError(400, "NAME_INVALID", "encoded slashes, percent signs and zeros are not part of any name")
    path = _ascii(unquote_to_bytes(raw))
    if any(part in (".", "..") for part in path.split("/")) or "//" in path or "\\" in path or "%" in path:
        raise MirrorError(400, "NAME_INVALID", "empty and dot segments are not part of any name")
    return path


def _decode_query(raw: bytes) -> str:
    query = _ascii(raw)
    if _QUERY.fullmatch(query) is None:
        raise MirrorError(400, "UNSUPPORTED", "the query has characters that must be percent-encoded")
    return query


def _take_namespace(query: str) -> tuple[str, str]:
    """The `ns` parameter, decoded, and the rest of the query."""
    pairs = [pair for pair in query.split("&") if pair]
    found = [pair.partition("=")[2] for pair in pairs if pair.partition("=")[0] == "ns"]
    rest = "&".join(pair for pair in pairs if pair.partition("=")[0] != "ns")
    if len(found) > 1:
        raise MirrorError(400, "NAME_INVALID", "more than one ns parameter")
    namespace = _ascii(unquote_to_bytes(found[0])) if found else ""
    if found:
        parse_registry(namespace)
    return namespace, rest


def _ascii(raw: bytes) -> str:
    if any(byte <= 0x20 or byte >= 0x7F for byte in raw):
        raise MirrorError(400, "NAME_INVALID", "white space, control or non-ASCII characters in the request target")
    return raw.decode("ascii")
