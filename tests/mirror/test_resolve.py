"""Tags, manifests and whether what they list can be delivered, under a virtual clock and over a real download service."""

from __future__ import annotations

import platform
from collections.abc import Awaitable, Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import structlog
import trio
import trio.testing

from simulations.membership import SimulatedMembership
from swarm.config import MirrorSettings
from swarm.download.policy import Policy
from swarm.download.service import DownloadService
from swarm.edges import Address, PeerLink, Provider, State
from swarm.errors import OriginUnreachable, PeerError, SwarmError
from swarm.mirror import resolve as module
from swarm.mirror.catalogue import Catalogue
from swarm.mirror.edges import Grant, MirrorError
from swarm.mirror.paths import ClientCredentials, Name
from swarm.mirror.resolve import Manifest, Resolver
from swarm.mirror.tally import Tally
from swarm.store.memory import MemoryStore
from swarm.task import Digest, blob_task
from tests.download.scene import ScriptedDiscovery
from tests.mirror.desk import INDEX, NAME, Registry, digest_of

OPEN = Grant(private=False)
DOWN = OriginUnreachable("the registry does not answer")


class Holders(ScriptedDiscovery):
    """Finds one member, for the tasks it holds."""

    held: frozenset[bytes] | set[bytes] = frozenset()

    async def find(self, task_id: bytes) -> list[Provider]:
        await trio.sleep(0.01)
        holder = Provider(b"h" * 20, b"k" * 32, (Address("10.0.0.9", 7400),), State.COMPLETE)
        return [holder] if task_id in self.held else []


class Bench:
    """A resolver and what is around it."""

    def __init__(self, store: MemoryStore, nursery: trio.Nursery, **settings: Any) -> None:
        self.registry = Registry()
        self.discovery = Holders()
        self.catalogue = Catalogue()
        self.tally = Tally()
        self.dialled: list[bytes] = []
        self.reachable = True
        self.store = store
        policy = replace(Policy(), settle=0.001, settle_bound=0.01)
        self.membership = SimulatedMembership.draw(Random(1))
        self.service = DownloadService(self.membership, store, self.discovery, self.registry, policy=policy, rng=Random(5))
        self.service.attach(self)
        self.resolver = Resolver(
            self.registry, self.registry, self.service, self.catalogue, MirrorSettings(**settings), self.tally,
            nursery=nursery, wall_clock=lambda: 1_800_000_000 + trio.current_time(),
        )  # fmt: skip

    # edges.PeerNetwork: members that can be dialled, and then say nothing

    async def connect(self, node_id: bytes, addresses: object) -> PeerLink:
        self.dialled.append(node_id)
        if not self.reachable:
            raise PeerError("nobody there")
        return Quiet()  # type: ignore[return-value]

    def link(self, node_id: bytes) -> PeerLink | None:
        return None

    def links(self) -> list[PeerLink]:
        return []

    def hold(self, *digests: Digest) -> None:
        """Somewhere in the swarm is a member that has these."""
        self.discovery.held = {blob_task(digest).id for digest in digests}

    async def pull(self, digest: Digest) -> Manifest:
        return await self.resolver.manifest(NAME, digest, OPEN, None)

    async def here(self, digest: Digest) -> None:
        """Have this blob in the store."""
        from swarm.download.request import FetchRequest

        source = self.registry.blob_source(NAME, digest, None)
        _, stored = await self.service.fetch(FetchRequest(source, digest))
        stored.close()


class Quiet:
    """A link on which nothing comes."""

    node_id = b"h" * 20

    def post(self, *_: object, **__: object) -> None:
        """Nobody listens."""


def play(script: Callable[[Bench], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        with trio.fail_after(10_000), MemoryStore() as store:
            async with trio.open_nursery() as nursery:
                bench = Bench(store, nursery, **settings)
                await nursery.start(bench.service.run)
                await script(bench)
                nursery.cancel_scope.cancel()
            assert not [entry for entry in store.entries() if entry.in_use]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def runs(**settings: Any) -> Callable[[Callable[[Bench], Awaitable[None]]], Callable[[], None]]:
    def decorate(script: Callable[[Bench], Awaitable[None]]) -> Callable[[], None]:
        def test() -> None:
            play(script, **settings)

        test.__name__ = script.__name__
        test.__doc__ = script.__doc__
        return test

    return decorate


# --- tags -------------------------------------------------------------------------------------------------------------


@runs(tag_cache=10.0)
async def test_a_tag_is_asked_again_when_its_time_is_over(bench: Bench) -> None:
    first = bench.registry.image(b"one")
    assert (await bench.resolver.resolve(NAME, "v1", None)).digest == first
    second = bench.registry.image(b"two")
    await trio.sleep(9)
    assert (await bench.resolver.resolve(NAME, "v1", None)).digest == first
    await trio.sleep(2)
    assert (await bench.resolver.resolve(NAME, "v1", None)).digest == second
    assert bench.registry.count("head v1") == 2


@runs(tag_cache=0.0)
async def test_r29_many_who_ask_at_once_cost_one_question(bench: Bench) -> None:
    digest = bench.registry.image(b"one")
    bench.registry.pause = 1.0
    found: list[Digest] = []

    async def ask() -> None:
        found.append((await bench.resolver.resolve(NAME, "v1", None)).digest)

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(ask)
    assert found == [digest] * 100
    assert bench.registry.count("head v1") == 1


@runs()
async def test_r29_who_asks_for_others_may_leave(bench: Bench) -> None:
    bench.registry.image(b"one")
    bench.registry.pause = 1.0
    with trio.move_on_after(0.5) as leaves:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.resolver.resolve, NAME, "v1", None)
    assert leaves.cancelled_caught
    async with trio.open_nursery() as nursery:
        leader = trio.CancelScope()

        async def lead() -> None:
            with leader:
                await bench.resolver.resolve(NAME, "v1", None)

        nursery.start_soon(lead)
        await trio.sleep(0.1)
        nursery.start_soon(bench.resolver.resolve, NAME, "v1", None)
        await trio.sleep(0.1)
        leader.cancel()
    assert bench.registry.count("head v1") == 3


@runs(tag_cache=10.0, tag_stale=1000.0)
async def test_a_tag_stands_for_its_last_digest_while_the_registry_does_not_answer(bench: Bench) -> None:
    digest = bench.registry.image(b"one")
    await bench.resolver.resolve(NAME, "v1", None)
    bench.registry.error = DOWN
    await trio.sleep(20)
    with structlog.testing.capture_logs() as lines:
        assert (await bench.resolver.resolve(NAME, "v1", None)).digest == digest
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == ["mirror_tag_stale"]
    assert bench.tally.stale.total() == 1
    asked = bench.registry.count("head")
    assert (await bench.resolver.resolve(NAME, "v1", None)).digest == digest
    assert bench.registry.count("head") == asked, "a registry that is down is not waited for each time"
    await trio.sleep(6)
    bench.registry.error = None
    second = bench.registry.image(b"two")
    assert (await bench.resolver.resolve(NAME, "v1", None)).digest == second


@runs(tag_cache=10.0, tag_stale=1000.0)
async def test_a_tag_too_old_is_not_believed(bench: Bench) -> None:
    bench.registry.image(b"one")
    await bench.resolver.resolve(NAME, "v1", None)
    bench.registry.error = DOWN
    await trio.sleep(1011)
    with pytest.raises(OriginUnreachable):
        await bench.resolver.resolve(NAME, "v1", None)


@runs(tag_cache=0.0, tag_stale=0.0)
async def test_staleness_can_be_forbidden(bench: Bench) -> None:
    bench.registry.image(b"one")
    await bench.resolver.resolve(NAME, "v1", None)
    bench.registry.error = DOWN
    await trio.sleep(1)
    with pytest.raises(OriginUnreachable):
        await bench.resolver.resolve(NAME, "v1", None)


@runs(tag_cache=0.0)
async def test_a_tag_that_was_deleted_is_gone_and_stays_gone_when_the_registry_fails(bench: Bench) -> None:
    bench.registry.image(b"one")
    await bench.resolver.resolve(NAME, "v1", None)
    bench.registry.tags.clear()
    with pytest.raises(MirrorError) as caught:
        await bench.resolver.resolve(NAME, "v1", None)
    assert caught.value.status == 404
    bench.registry.error = DOWN
    with pytest.raises(OriginUnreachable):
        await bench.resolver.resolve(NAME, "v1", None)


@runs(tag_cache=0.0)
async def test_what_one_client_is_refused_another_still_gets(bench: Bench) -> None:
    """Answers to one credential are not shared with another while they are being asked for."""
    bench.registry.image(b"one")
    alice, bob = ClientCredentials("Basic alice"), ClientCredentials("Basic bob")
    head = bench.registry.head_manifest

    async def refuse(name: Name, reference: str, client: ClientCredentials | None) -> Any:
        info = await head(name, reference, client)
        if client == bob:
            raise MirrorError(401, "UNAUTHORIZED", "no")
        return info

    bench.registry.head_manifest = refuse  # type: ignore[method-assign]
    bench.registry.pause = 1.0
    outcome: dict[str, object] = {}

    async def ask(who: str, client: ClientCredentials) -> None:
        try:
            outcome[who] = (await bench.resolver.resolve(NAME, "v1", client)).digest
        except SwarmError as error:
            outcome[who] = error

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "bob", bob)
        nursery.start_soon(ask, "alice", alice)
    assert isinstance(outcome["alice"], Digest)
    assert isinstance(outcome["bob"], MirrorError)


# --- manifests --------------------------------------------------------------------------------------------------------


@runs()
async def test_a_manifest_is_read_once_and_kept(bench: Bench) -> None:
    digest = bench.registry.image(b"layer")

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(bench.pull, digest)
    manifest = await bench.pull(digest)
    assert manifest.body == bench.registry.manifests[digest][0]
    assert bench.registry.count("READ") == 1
    assert bench.registry.count("get") == 0


@runs()
async def test_a_manifest_that_the_swarm_does_not_bring_is_read_from_the_registry(bench: Bench) -> None:
    """A member promises it and never sends it: this node does not wait for that."""
    digest = bench.registry.image(b"layer")
    bench.registry.open = trio.Event()
    began = trio.current_time()
    assert (await bench.pull(digest)).digest == digest
    assert trio.current_time() - began < 3
    assert bench.registry.count("get") == 1


@runs()
async def test_wrong_bytes_for_a_manifest_are_never_given_out(bench: Bench) -> None:
    digest = bench.registry.image(b"layer")
    bench.registry.lies[digest] = b"{}"
    manifest = await bench.pull(digest)  # the direct way is checked by the client of the registry
    assert manifest.body == bench.registry.manifests[digest][0]
    assert not bench.service.is_here(digest)


@runs()
async def test_a_manifest_of_many_megabytes_is_not_read(bench: Bench) -> None:
    digest = bench.registry.manifest({"layers": [], "x": "y" * (5 * 1024 * 1024)})
    with pytest.raises(MirrorError) as caught:
        await bench.pull(digest)
    assert caught.value.status == 502


@runs()
async def test_a_digest_that_is_here_needs_no_registry(bench: Bench) -> None:
    digest = bench.registry.image(b"layer")
    await bench.pull(digest)
    for blob in bench.registry.blobs:
        await bench.here(blob)
    bench.registry.error = DOWN
    bench.resolver._kept.clear()
    await trio.sleep(100)
    asked = len(bench.registry.asked)
    assert (await bench.pull(digest)).media_type == "application/vnd.oci.image.manifest.v1+json"
    assert len(bench.registry.asked) == asked


def test_manifests_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 1000)

    async def script(bench: Bench) -> None:
        for number in range(10):
            await bench.pull(bench.registry.manifest({"config": {}, "number": number, "x": "y" * 300}))
        assert sum(len(kept.body) for kept in bench.resolver._kept.values()) <= 1000

    play(script)


# --- 200 only for what can be delivered -------------------------------------------------------------------------------


@runs()
async def test_a_manifest_whose_blobs_nobody_has_is_not_given_out_while_the_registry_is_down(bench: Bench) -> None:
    digest = bench.registry.image(b"layer")
    await bench.pull(digest)
    bench.registry.error = DOWN
    await trio.sleep(60)
    with pytest.raises(MirrorError) as caught:
        await bench.pull(digest)
    assert caught.value.status == 503


@runs()
async def test_a_manifest_whose_blobs_members_have_is_given_out_while_the_registry_is_down(bench: Bench) -> None:
    digest = bench.registry.image(b"layer", b"second")
    await bench.pull(digest)
    bench.registry.error = DOWN
    bench.hold(*bench.registry.blobs)
    await trio.sleep(60)
    assert (await bench.pull(digest)).digest == digest
    assert bench.dialled


@runs()
async def test_members_that_have_all_but_one_blob_are_not_enough(bench: Bench) -> None:
    digest = bench.registry.image(b"layer", b"second")
    await bench.pull(digest)
    bench.registry.error = DOWN
    bench.hold(*list(bench.registry.blobs)[1:])
    await trio.sleep(60)
    with pytest.raises(MirrorError):
        await bench.pull(digest)


@runs()
async def test_members_that_cannot_be_reached_are_not_enough(bench: Bench) -> None:
    digest = bench.registry.image(b"layer")
    await bench.pull(digest)
    bench.registry.error, bench.reachable = DOWN, False
    bench.hold(*bench.registry.blobs)
    await trio.sleep(60)
    with pytest.raises(MirrorError):
        await bench.pull(digest)


@runs()
async def test_an_index_is_given_out_while_the_registry_is_down_if_one_of_its_images_is_here(bench: Bench) -> None:
    registry = bench.registry
    image = registry.image(b"layer")
    index = registry.manifest({"manifests": [registry.descriptor(image)]}, INDEX)
    registry.denied = {None}  # nothing is read ahead
    await bench.pull(index)
    registry.error = DOWN
    await trio.sleep(60)
    with pytest.raises(MirrorError):
        await bench.pull(index)
    registry.error = None
    await bench.pull(image)
    registry.error = DOWN
    await trio.sleep(60)
    assert (await bench.pull(index)).digest == index


@runs()
async def test_a_manifest_whose_blobs_do_not_fit_on_the_disk_is_not_given_out(bench: Bench) -> None:
    """podman would fail at the blob that does not fit, instead of asking its registry."""
    old = bench.registry.blob(b"old" * 200_000)
    await bench.here(old)
    bench.store._quota = 1_000_000
    small = bench.registry.image(b"new" * 100_000)
    assert (await bench.pull(small)).digest == small, "what is old may go"
    large = bench.registry.image(b"large" * 300_000)
    with pytest.raises(MirrorError) as caught:
        await bench.pull(large)
    assert caught.value.status == 507
    assert bench.service.is_here(old), "and nothing went for nothing"


@runs()
async def test_room_that_a_running_download_has_is_not_wanted_twice(bench: Bench) -> None:
    layer = b"layer" * 160_000
    digest = bench.registry.image(layer)
    await bench.pull(digest)
    bench.store._quota = 1_000_000
    bench.registry.open = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.here, digest_of(layer))
        await trio.sleep(1)
        assert (await bench.pull(digest)).digest == digest
        bench.registry.open.set()


@runs()
async def test_a_tag_and_its_manifest_cost_one_question_and_one_read(bench: Bench) -> None:
    digest = bench.registry.image(b"layer")
    await bench.resolver.resolve(NAME, "v1", None)
    await bench.pull(digest)
    assert [line.partition(" ")[0] for line in bench.registry.asked if "may" not in line] == ["head", "READ"]


# --- ahead of the client ----------------------------------------------------------------------------------------------


@runs()
async def test_holders_of_all_blobs_are_met_when_the_manifest_is_given_out(bench: Bench) -> None:
    digest = bench.registry.image(b"layer", b"second", b"third")
    bench.hold(*bench.registry.blobs)
    await bench.pull(digest)
    await trio.sleep(1)
    assert len(bench.dialled) == len(bench.registry.blobs)
    await bench.pull(digest)
    await trio.sleep(1)
    assert len(bench.dialled) == len(bench.registry.blobs), "once in a while is enough"


@runs()
async def test_rights_to_all_blobs_are_asked_for_when_the_manifest_is_given_out(bench: Bench) -> None:
    digest = bench.registry.image(b"layer", b"second")
    await bench.pull(digest)
    await trio.sleep(1)
    assert {f"may {blob}" for blob in bench.registry.blobs} <= set(bench.registry.asked)


@runs()
async def test_the_image_of_this_machine_is_read_ahead_of_the_client(bench: Bench) -> None:
    registry = bench.registry
    image, other = registry.image(b"layer"), registry.image(b"other")
    machine = module.MACHINES.get(platform.machine(), platform.machine())
    entries = [
        registry.descriptor(other, platform={"os": "linux", "architecture": "s390x"}),
        registry.descriptor(image, platform={"os": "linux", "architecture": machine}),
    ]
    await bench.pull(registry.manifest({"manifests": entries}, INDEX))
    await trio.sleep(1)
    assert bench.service.is_here(image)
    assert not bench.service.is_here(other)


@runs()
async def test_no_blob_is_read_before_somebody_asks_for_it(bench: Bench) -> None:
    """A runtime that has a layer already does not ask for it, and it must not cost the registry a copy."""
    digest = bench.registry.image(b"layer" * 1000)
    await bench.pull(digest)
    await trio.sleep(30)
    assert digest_of(b"layer" * 1000) not in bench.registry.sent


@runs()
async def test_a_bug_in_a_look_up_ahead_costs_the_client_nothing(bench: Bench) -> None:
    digest = bench.registry.image(b"layer")

    async def break_(digest: Digest, *, private: bool = False) -> bool:
        raise ZeroDivisionError

    bench.service.meet_holders = break_  # type: ignore[method-assign]
    with structlog.testing.capture_logs() as lines:
        assert (await bench.pull(digest)).digest == digest
        await trio.sleep(1)
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["mirror_look_up_failed"]
    assert (await bench.pull(digest)).digest == digest


@runs()
async def test_nobody_is_asked_for_content_that_is_to_stay_on_this_node(bench: Bench) -> None:
    digest = bench.registry.image(b"layer")
    bench.membership.is_open = False
    bench.registry.private, bench.registry.shared = True, False
    bench.hold(*bench.registry.blobs)
    assert (await bench.resolver.manifest(NAME, digest, Grant(True, False), None)).digest == digest
    await trio.sleep(1)
    assert not bench.dialled
    assert not bench.discovery.log
    bench.registry.error = DOWN
    await trio.sleep(60)
    with pytest.raises(MirrorError):
        await bench.resolver.manifest(NAME, digest, Grant(True, False), None)
    assert not bench.dialled


@runs()
async def test_in_an_open_network_nobody_is_asked_for_private_content(bench: Bench) -> None:
    digest = bench.registry.image(b"layer")
    bench.registry.private = True
    bench.hold(*bench.registry.blobs)
    await bench.resolver.manifest(NAME, digest, Grant(True), None)
    await trio.sleep(1)
    assert not bench.dialled
    assert not bench.discovery.log
