"""The mirror's view of a real docker-registry: open, behind passwords, and behind tokens."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Awaitable, Callable

import pytest
import trio

from swarm.config import MirrorSettings, RegistrySettings
from swarm.edges import Source
from swarm.egress import EgressPolicy
from swarm.errors import NotFoundAtOrigin, SwarmError
from swarm.mirror.authorize import Authorizer
from swarm.mirror.edges import Grant, MirrorDenied
from swarm.mirror.listed import egress_rule
from swarm.mirror.paths import ClientCredentials, Name
from swarm.mirror.registry import Registries
from swarm.origin.origin import OriginReader, OriginSettings
from swarm.task import Digest
from tests.system.images import Image, Layer
from tests.system.registry import Access, Registry

pytestmark = pytest.mark.system

KINDS: tuple[Access, ...] = ("open", "basic", "bearer")
LOCKED: tuple[Access, ...] = ("basic", "bearer")


def password(user: str, secret: str) -> ClientCredentials:
    return ClientCredentials("Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode())


ALICE, WRONG = password("alice", "secret"), password("alice", "guess")


class View:
    """A mirror's parts over one registry."""

    def __init__(self, registry: Registry, reader: OriginReader, settings: MirrorSettings) -> None:
        self.reader = reader
        self.registries = Registries(settings, reader)
        self.private: dict[Digest, bool] = {}
        self.authorizer = Authorizer(self.registries, self.private.get)
        self.name = Name(registry.name, "lib/app")

    async def take(self, source: Source, start: int = 0, stop: int | None = None) -> bytes:
        async with self.reader.read(source, start, stop) as body:
            data = b"".join([chunk async for chunk in body.chunks()])
            return data[start - body.start :]


def look(registry: Registry, act: Callable[[View], Awaitable[object]], **table: object) -> None:
    chosen = RegistrySettings(
        **{  # type: ignore[arg-type]  # a test says what
            "endpoint": registry.base,
            "token_hosts": (registry.token_host,) if registry.token_host else (),
            **table,
        }
    )
    settings = MirrorSettings(registry=((registry.name, chosen),))

    async def main() -> None:
        egress = EgressPolicy(rules={"mirror": egress_rule(settings)})
        with trio.fail_after(60):
            async with OriginReader(egress, OriginSettings(), rng=random.Random(1)) as reader:
                await act(View(registry, reader, settings))

    trio.run(main)


def pushed(registry: Registry) -> tuple[Image, Digest]:
    image = registry.images.image([Layer(300_000), Layer(2_000_000, seed=2)])
    registry.push(image, "lib/app", "v1")
    return image, Digest.parse(image.layers[1].digest)


@pytest.mark.parametrize("access", KINDS)
def test_manifests_and_blobs_are_read_from_each_form_of_registry(access: Access) -> None:
    with Registry(access=access) as registry:
        image, layer = pushed(registry)

        async def act(view: View) -> None:
            info = await view.registries.head_manifest(view.name, "v1", ALICE)
            same, body = await view.registries.get_manifest(view.name, image.digest, ALICE)
            assert info == same
            assert (str(info.digest), len(body)) == (image.digest, info.length)
            grant = await view.authorizer.check(view.name, layer, ALICE)
            assert grant == Grant(private=access != "open")
            source = view.registries.blob_source(view.name, layer, ALICE)
            assert (await view.reader.head(source)).length == image.layers[1].size
            whole = await view.take(source)
            assert hashlib.sha256(whole).hexdigest() == layer.hex
            assert await view.take(source, 1_000_000, 1_000_500) == whole[1_000_000:1_000_500]
            tags = await view.registries.pass_through(view.name, "tags/list", "n=1", ALICE)
            assert (tags.status, tags.body.strip()) == (200, b'{"name":"lib/app","tags":["v1"]}')
            with pytest.raises(NotFoundAtOrigin):
                await view.registries.head_manifest(view.name, "v2", ALICE)

        look(registry, act)
        if access == "bearer":
            granted = [it for it in registry.token_requests() if it.granted and it.user == "alice"]
            assert [it.scopes for it in granted] == [("repository:lib/app:pull",)]


@pytest.mark.parametrize("access", LOCKED)
def test_who_shows_no_right_is_told_what_to_show_and_gets_nothing(access: Access) -> None:
    with Registry(access=access) as registry:
        image, layer = pushed(registry)

        async def act(view: View) -> None:
            view.private[layer] = True
            await view.authorizer.check(view.name, layer, ALICE)
            registry.forget()
            for who in (None, WRONG, password("mallory", "secret"), ClientCredentials("Bearer made.up.token")):
                with pytest.raises(MirrorDenied) as caught:
                    await view.authorizer.check(view.name, layer, who)
                assert caught.value.status == 401
                assert caught.value.challenge.startswith("Bearer realm=" if access == "bearer" else "Basic realm=")
                with pytest.raises(SwarmError):
                    await view.take(view.registries.blob_source(view.name, layer, who))
                with pytest.raises(MirrorDenied):
                    await view.registries.get_manifest(view.name, image.digest, who)

        look(registry, act)
        assert {it.status for it in registry.reads(image.layers[1].digest)} <= {401}


def test_a_token_that_the_client_got_itself_is_passed_on() -> None:
    with Registry(access="bearer") as registry:
        image, layer = pushed(registry)

        async def act(view: View) -> None:
            await view.registries.head_manifest(view.name, "v1", ALICE)
            (header,) = {token.value for token in view.registries._broker._tokens._kept.values()}
            asked = len(registry.token_requests())
            mine = ClientCredentials(header)
            assert str((await view.registries.head_manifest(view.name, "v1", mine)).digest) == image.digest
            await view.registries.may_read(view.name, layer, view.registries.asker(view.name, mine))
            other = Name(view.name.registry, "lib/other")
            with pytest.raises(MirrorDenied):
                await view.registries.may_read(other, layer, view.registries.asker(other, mine))
            assert len(registry.token_requests()) == asked

        look(registry, act)


def test_a_token_that_runs_out_during_a_download_is_replaced() -> None:
    with Registry(access="bearer", token_seconds=2) as registry:
        _, layer = pushed(registry)

        async def act(view: View) -> None:
            await view.authorizer.check(view.name, layer, ALICE)
            source = view.registries.blob_source(view.name, layer, ALICE)
            began = trio.current_time()
            while trio.current_time() < began + 3.5:
                assert len(await view.take(source, 5, 1000)) == 995

        look(registry, act)
        assert len([it for it in registry.token_requests() if it.user == "alice"]) >= 3


@pytest.mark.parametrize("access", LOCKED)
def test_a_realm_that_is_not_listed_gets_no_password_of_ours(access: Access) -> None:
    """On loopback even another port is somebody else."""
    with Registry(access=access) as registry:
        _, layer = pushed(registry)

        async def act(view: View) -> None:
            if access == "bearer":
                with pytest.raises(SwarmError):
                    await view.authorizer.check(view.name, layer, ALICE)
            else:
                await view.authorizer.check(view.name, layer, ALICE)

        look(registry, act, token_hosts=())
        assert [it.user for it in registry.token_requests() if it.user] == []
