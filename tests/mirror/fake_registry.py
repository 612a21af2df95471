"""A registry and its token server on a web in memory, open, Basic or Bearer, and what asked them for what."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trio
import trio.testing

from swarm.config import MirrorSettings, RegistrySettings
from swarm.edges import Source
from swarm.egress import EgressPolicy, EgressSettings
from swarm.mirror.authorize import Authorizer
from swarm.mirror.credentials import OwnCredentials, RunHelper
from swarm.mirror.listed import egress_rule
from swarm.mirror.paths import ClientCredentials, Name
from swarm.mirror.registry import Registries
from swarm.origin.origin import OriginReader, OriginSettings
from swarm.task import Digest
from tests.origin.web import Asked, Reply, Web, content_reply

REGISTRY = "registry.example"
AUTH = "auth.example"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


def digest_of(body: bytes, algorithm: str = "sha256") -> Digest:
    return Digest(algorithm, hashlib.new(algorithm, body).hexdigest())


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def client(user: str, password: str) -> ClientCredentials:
    return ClientCredentials(basic(user, password))


@dataclass
class FakeRegistry:
    """Repositories, and who may read them.

    Attributes:
        kind: `open`, `basic` or `bearer`.
        readers: Users by repository; a repository without any is public.
        realm: Where a bearer registry sends for tokens.
        lies: Replies instead of the right one, by path.
    """

    kind: str = "open"
    host: str = REGISTRY
    realm: str = f"http://{AUTH}/token"
    service: str = "fake"
    passwords: dict[str, str] = field(default_factory=lambda: {"alice": "secret", "bob": "other"})
    blobs: dict[tuple[str, Digest], bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], bytes] = field(default_factory=dict)
    readers: dict[str, set[str]] = field(default_factory=dict)
    tokens: dict[str, tuple[str, str]] = field(default_factory=dict)
    token_seconds: object = 300
    lies: dict[str, Callable[[Asked], Reply | Awaitable[Reply | None]]] = field(default_factory=dict)
    token_reply: Callable[[Asked], Reply | Awaitable[Reply | None]] | None = None
    asked: list[Asked] = field(default_factory=list)
    token_asked: list[Asked] = field(default_factory=list)
    forms: list[dict[str, list[str]]] = field(default_factory=list)
    refresh_tokens: dict[str, str] = field(default_factory=dict)
    is_down: bool = False

    def push(self, repository: str, tag: str, *blobs: bytes, readers: set[str] | None = None) -> tuple[Digest, list[Digest]]:
        """A manifest that lists these blobs."""
        digests = [digest_of(blob) for blob in blobs]
        for blob, digest in zip(blobs, digests, strict=True):
            self.blobs[repository, digest] = blob
        body = json.dumps({"mediaType": MANIFEST_TYPE, "layers": [{"digest": str(d)} for d in digests]}).encode()
        digest = digest_of(body)
        self.manifests[repository, tag] = self.manifests[repository, str(digest)] = body
        if readers is not None:
            self.readers[repository] = readers
        return digest, digests

    def serve(self, asked: Asked) -> Reply | Awaitable[Reply | None]:
        if self.is_down:
            return _hang_up()
        self.asked.append(asked)
        path = urlsplit(asked.target).path
        if path in self.lies:
            return self.lies[path](asked)
        parts = path.removeprefix("/v2/").split("/")
        repository, kind, reference = "/".join(parts[:-2]), parts[-2], parts[-1]
        if not self._may(asked, repository):
            return Reply(401, {"www-authenticate": self._challenge(repository)})
        if kind == "manifests" and (repository, reference) in self.manifests:
            body = self.manifests[repository, reference]
            return Reply(200, {"content-type": MANIFEST_TYPE, "docker-content-digest": str(digest_of(body))}, body)
        if kind == "blobs" and (repository, Digest.parse(reference)) in self.blobs:
            return content_reply(asked, self.blobs[repository, Digest.parse(reference)], docker_content_digest=reference)
        if kind == "tags":
            return Reply(200, {"content-type": "application/json"}, b'{"tags":["v1"]}')
        return Reply(404)

    def _may(self, asked: Asked, repository: str) -> bool:
        header = asked.headers.get("authorization", "")
        readers = self.readers.get(repository)
        match self.kind:
            case "open":
                return True
            case "basic":
                return self._user(header) is not None and (readers is None or self._user(header) in readers)
            case _:
                user, granted = self.tokens.get(header, ("", ""))
                return granted == repository and (readers is None or user in readers)

    def _user(self, header: str) -> str | None:
        return next((user for user, password in self.passwords.items() if header == basic(user, password)), None)

    def _challenge(self, repository: str) -> str:
        if self.kind == "basic":
            return 'Basic realm="fake registry"'
        return f'Bearer realm="{self.realm}",service="{self.service}",scope="repository:{repository}:pull"'

    async def serve_tokens(self, asked: Asked) -> Reply | None:
        self.token_asked.append(asked)
        if self.token_reply is not None:
            found = self.token_reply(asked)
            return found if isinstance(found, Reply) else await found
        header, query = asked.headers.get("authorization", ""), parse_qs(urlsplit(asked.target).query)
        user: str | None = None
        if asked.method == "POST":
            query = parse_qs((await asked.stream.receive_some()).decode())
            self.forms.append(query)
            user = self.refresh_tokens.get(query["refresh_token"][0])
            if user is None:
                return Reply(401)
        elif header:
            user = self._user(header)
            if user is None:
                return Reply(401, {"www-authenticate": 'Basic realm="tokens"'})
        scope = query["scope"][0]
        token = f"t{len(self.tokens)}.{base64.urlsafe_b64encode(scope.encode()).decode().strip('=')}"
        self.tokens[f"Bearer {token}"] = (user or "", scope.removeprefix("repository:").removesuffix(":pull"))
        return Reply(200, {}, json.dumps({"token": token, "expires_in": self.token_seconds}).encode())

    def sent(self) -> list[str]:
        """The Authorization of each request to the registry."""
        return [asked.headers.get("authorization", "") for asked in self.asked]

    def paths(self) -> list[str]:
        return [f"{asked.method} {asked.target}" for asked in self.asked]


async def _hang_up() -> None:
    return None


def web_of(*registries: FakeRegistry, port: int = 80) -> Web:
    """A web with these registries; the token server of the first is at `AUTH`."""
    web = Web()
    for registry in registries:
        web.serve(registry.host, registry.serve, port=port)
    web.serve(AUTH, registries[0].serve_tokens, port=port)
    return web


def listed(host: str = REGISTRY, **settings: Any) -> tuple[str, RegistrySettings]:
    """The table of a registry on plain http, with its token server."""
    return host, RegistrySettings(**{"endpoint": f"http://{host}", "token_hosts": (AUTH,), **settings})


def settings_of(*tables: tuple[str, RegistrySettings], **settings: Any) -> MirrorSettings:
    """The mirror's settings, with the usual registry listed unless tables are given."""
    return MirrorSettings(registry=tables or (listed(),), **settings)


@dataclass
class Mirror:
    """What a test has in its hands."""

    registries: Registries
    authorizer: Authorizer
    reader: OriginReader
    private: dict[Digest, bool]

    async def blob(self, name: Name, digest: Digest, who: ClientCredentials | None = None) -> bytes:
        """The content, as the mirror would read it after asking for the right."""
        await self.authorizer.check(name, digest, who)
        return await self.take(self.registries.blob_source(name, digest, who))

    async def take(self, source: Source) -> bytes:
        async with self.reader.read(source) as body:
            return b"".join([chunk async for chunk in body.chunks()])


def run(
    web: Web,
    act: Callable[[Mirror], Awaitable[object]],
    settings: MirrorSettings | None = None,
    *,
    run_helper: RunHelper | None = None,
    allow: tuple[str, ...] = (),
    ca: str = "",
) -> None:
    """Run `act` with the mirror's parts on this web.

    Args:
        ca: Authority file of a web behind TLS.
    """
    chosen = settings if settings is not None else settings_of()

    async def main() -> None:
        with trio.fail_after(36000):
            async with trio.open_nursery() as nursery:
                web._nursery = nursery
                egress = EgressPolicy(
                    EgressSettings(allow), rules={"mirror": egress_rule(chosen)}, resolver=web.resolve, connector=web.connect
                )
                origin = OriginSettings(retry_seconds=3.0, retries=1, ca=(("*.example", ca),) if ca else ())
                async with OriginReader(egress, origin, rng=random.Random(1)) as reader:
                    own = OwnCredentials(chosen, run_helper=run_helper)
                    registries = Registries(chosen, reader, own=own)
                    private: dict[Digest, bool] = {}
                    await act(Mirror(registries, Authorizer(registries, private.get), reader, private))
                await trio.sleep(200)
                assert web.open == 0, "a connection was left open"
                nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
