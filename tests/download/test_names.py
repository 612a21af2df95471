"""Under which names complete content is announced, and when that is taken back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random

import trio

from simulations.clock import run
from simulations.register import Register
from simulations.world import MBIT, URL, Node, Shape, World
from swarm import wire
from swarm.download.request import Fetched, FetchRequest
from swarm.download.service import GIVE_UP_AFTER, IDLE_SECONDS, OTHER_NAMES_WITHIN
from swarm.edges import Source, State
from swarm.task import MIB, blob_task, url_task

URL_ID = url_task(URL, validator="etag:1").id


class Scene:
    """Nodes that find one another through announcements alone, and an origin with one content."""

    def __init__(self, number: int) -> None:
        self.world = World(Shape(number, MIB, 100 * MBIT, 100 * MBIT))
        self.register = Register(Random(1), missed=0.0)
        self.blob_id = blob_task(self.world.content.digest).id

    def announced(self, node: Node) -> dict[str, State]:
        """What a node announces, under which name."""
        names = {URL_ID: "url", self.blob_id: "digest"}
        records = self.register.records.items()
        return {names[task]: by_node[node.node_id].state for task, by_node in records if node.node_id in by_node}

    async def fetch(self, node: Node, request: FetchRequest | None = None) -> Fetched:
        fetched, stored = await node.service.fetch(request or FetchRequest(Source(URL)))
        stored.close()
        await trio.sleep(OTHER_NAMES_WITHIN + 1)
        return fetched

    def lose(self, node: Node) -> None:
        """A piece turns out rotten."""
        stored = node.store.open(self.blob_id)
        assert stored is not None
        stored.drop_pieces([1])
        stored.close()


@asynccontextmanager
async def scene(number: int = 2) -> AsyncIterator[Scene]:
    made = Scene(number)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.world.events.run)
        for node in made.world.nodes:
            node.build(made.register.for_node(node))
            await nursery.start(made.world._live, node)
        yield made
        nursery.cancel_scope.cancel()


def within(body: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(2 * 3600):
            await body()

    run(limited, 1)


BOTH = {"url": State.COMPLETE, "digest": State.COMPLETE}


def test_content_of_a_url_is_announced_under_its_digest_too_once_it_is_complete() -> None:
    async def main() -> None:
        async with scene() as s:
            await s.fetch(s.world.nodes[0])
            assert s.announced(s.world.nodes[0]) == BOTH

    within(main)


def test_who_knows_only_the_digest_gets_what_another_node_fetched_by_url() -> None:
    async def main() -> None:
        async with scene() as s:
            first, second = s.world.nodes
            await s.fetch(first)
            fetched = await s.fetch(second, FetchRequest(None, digest=s.world.content.digest))
            assert fetched.from_peers == MIB
            assert s.announced(second) == {"digest": State.COMPLETE}

    within(main)


def test_another_url_with_the_digest_is_not_read_from_its_origin() -> None:
    async def main() -> None:
        async with scene(3) as s:
            first, second, third = s.world.nodes
            await s.fetch(first)
            before = s.world.origin_uplink.sent
            elsewhere = Source("http://mirror.example/copy")
            for node in (second, third):
                fetched = await s.fetch(node, FetchRequest(elsewhere, digest=s.world.content.digest))
                assert (fetched.from_peers, fetched.from_origin) == (MIB, 0)
            assert s.world.origin_uplink.sent == before

    within(main)


def test_removed_content_is_withdrawn_under_both_names_though_others_asked_for_it_lately() -> None:
    async def main() -> None:
        async with scene() as s:
            node, other = s.world.nodes
            await s.fetch(node)
            (await s.world.connect(other, node.node_id)).post(wire.Ask(s.blob_id))
            await trio.sleep(1)
            assert len(node.service.activity()) == 2
            node.service.release(URL_ID)
            assert await node.store.remove(URL_ID)
            await trio.sleep(2 * OTHER_NAMES_WITHIN)
            assert s.announced(node) == {}

    within(main)


def test_content_removed_before_its_digest_was_announced_is_not_announced() -> None:
    async def main() -> None:
        async with scene() as s:
            node = s.world.nodes[0]
            _, stored = await node.service.fetch(FetchRequest(Source(URL)))
            stored.close()
            node.service.release(URL_ID)
            assert await node.store.remove(URL_ID)
            await trio.sleep(2 * OTHER_NAMES_WITHIN)
            assert s.announced(node) == {}

    within(main)


def test_rot_in_content_nobody_uses_is_withdrawn_under_both_names() -> None:
    async def main() -> None:
        async with scene() as s:
            node = s.world.nodes[0]
            await s.fetch(node)
            await trio.sleep(2 * IDLE_SECONDS)
            assert s.announced(node) == BOTH
            s.lose(node)
            await trio.sleep(1)
            assert s.announced(node) == {}

    within(main)


def test_content_under_repair_is_announced_by_its_repair_alone_and_then_under_both_names() -> None:
    async def main() -> None:
        async with scene() as s:
            first, second = s.world.nodes
            await s.fetch(first)
            await s.fetch(second)
            s.lose(second)
            await trio.sleep(0.001)
            assert set(s.announced(second)) == {"url"}
            await trio.sleep(10)
            assert s.announced(second) == BOTH

    within(main)


def test_repaired_content_is_announced_under_every_name_again() -> None:
    async def main() -> None:
        async with scene(3) as s:
            first, second, third = s.world.nodes
            await s.fetch(first)
            await s.fetch(second)
            await trio.sleep(2 * IDLE_SECONDS)
            await s.fetch(third, FetchRequest(None, digest=s.world.content.digest, no_origin=True))
            assert [activity.task_id for activity in second.service.activity()] == [s.blob_id]
            s.lose(second)
            await trio.sleep(0.001)
            assert set(s.announced(second)) == {"digest"}
            await trio.sleep(10)
            assert s.announced(second) == BOTH

    within(main)


def test_a_repair_that_fails_takes_nothing_back_where_another_one_succeeded() -> None:
    """Under the URL it can be read from the origin; under the digest nobody has it any more."""

    async def main() -> None:
        async with scene() as s:
            first, second = s.world.nodes
            await s.fetch(first)
            await s.fetch(second, FetchRequest(None, digest=s.world.content.digest))
            s.world.kill(second)
            await trio.sleep(5)
            assert {activity.task_id for activity in first.service.activity()} == {URL_ID, s.blob_id}
            s.lose(first)
            await trio.sleep(2 * GIVE_UP_AFTER)
            assert s.announced(first) == BOTH

    within(main)


def test_content_that_cannot_be_repaired_is_withdrawn_under_both_names() -> None:
    async def main() -> None:
        async with scene() as s:
            first, second = s.world.nodes
            await s.fetch(first)
            await s.fetch(second, FetchRequest(None, digest=s.world.content.digest))
            s.world.kill(first)
            await trio.sleep(5)
            s.lose(second)
            await trio.sleep(3 * GIVE_UP_AFTER)
            assert s.announced(second) == {}

    within(main)


def test_content_that_needed_credentials_is_announced_under_no_name() -> None:
    async def main() -> None:
        async with scene() as s:
            node = s.world.nodes[0]
            await s.fetch(node, FetchRequest(Source(URL, (("Authorization", "Bearer x"),))))
            assert s.announced(node) == {}

    within(main)


def test_content_shared_with_its_credentials_is_never_announced_under_its_digest() -> None:
    async def main() -> None:
        async with scene() as s:
            node = s.world.nodes[0]
            node.membership.is_open = False  # a closed network, where such content may be shared
            await s.fetch(node, FetchRequest(Source(URL, (("Authorization", "Bearer x"),)), share=True))
            assert s.announced(node) == {"url": State.COMPLETE}

    within(main)
