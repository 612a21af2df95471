"""Links made in quiet moments: with everybody in a small network, with enough in a large one, and not with ghosts."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import cast

import trio

from simulations.clock import run
from swarm.edges import Address, NodeId, PeerLink
from swarm.errors import PeerError
from swarm.neighbourhood import CONTENT, LOOK_AGAIN, MAX_FOUND, WANTED, Neighbourhood
from tests.dht.net import network

ME = (100).to_bytes(20, "big")


def node(number: int) -> NodeId:
    return number.to_bytes(20, "big")


def where(number: int) -> Address:
    return Address(f"10.1.{number >> 8}.{number & 255}", 7400)


class Links:
    """A peer network in which a dial succeeds at once, at both ends; `dead` do not answer."""

    def __init__(self, me: NodeId, everybody: dict[NodeId, Links] | None = None, *, dead: Sequence[NodeId] = ()) -> None:
        self.me = me
        self.everybody = everybody
        self.dead = set(dead)
        self.linked: dict[NodeId, PeerLink] = {}
        self.dialled: list[NodeId] = []
        if everybody is not None:
            everybody[me] = self

    async def connect(self, node_id: NodeId, addresses: Sequence[Address]) -> PeerLink:
        self.dialled.append(node_id)
        await trio.sleep(0.001)
        if node_id in self.dead:
            raise PeerError("nobody there")
        self.linked[node_id] = cast(PeerLink, node_id)
        if self.everybody is not None:
            self.everybody[node_id].linked[self.me] = cast(PeerLink, self.me)
        return self.linked[node_id]

    def link(self, node_id: NodeId) -> PeerLink | None:
        return self.linked.get(node_id)

    def links(self) -> Sequence[PeerLink]:
        return list(self.linked.values())


class Directory:
    """What the routing table has, and what searches name, one after the other; the last one again and again."""

    def __init__(self, table: Sequence[int] = (), searches: Sequence[Sequence[int]] = ((),)) -> None:
        self.table = list(table)
        self.searches = list(searches)
        self.asked: list[float] = []

    def known(self) -> list[tuple[NodeId, Address]]:
        return [(node(number), where(number)) for number in self.table]

    async def search(self) -> list[tuple[NodeId, Address]]:
        self.asked.append(trio.current_time())
        named = self.searches.pop(0) if len(self.searches) > 1 else self.searches[0]
        return [(node(number), where(number)) for number in named]


def make(directory: Directory, links: Links, *, wanted: int = WANTED) -> Neighbourhood:
    return Neighbourhood(ME, directory.known, directory.search, links, rng=Random(1), wanted=wanted)


def after(seconds: float, neighbourhood: Neighbourhood) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(neighbourhood.run)
            await trio.sleep(seconds)
            nursery.cancel_scope.cancel()

    run(main, 1)


def test_a_network_of_twenty_is_linked_completely_which_routing_tables_alone_do_not_achieve() -> None:
    async def nothing() -> list[tuple[NodeId, Address]]:
        return []

    def linked(*, searching: bool) -> list[int]:
        async def main() -> list[int]:
            async with network(3) as net:
                everybody: dict[NodeId, Links] = {}
                for each in await net.add(20):
                    me = each.membership.node_id
                    search = each.dht.sample if searching else nothing
                    net.nursery.start_soon(Neighbourhood(me, each.dht.known, search, Links(me, everybody), rng=net.rng).run)
                await trio.sleep(60.0)
                return [len(links.linked) for links in everybody.values()]

        return run(main, 1)

    assert linked(searching=True) == [19] * 20
    assert min(linked(searching=False)) < 19


def test_of_nodes_that_start_together_the_one_with_the_smaller_id_dials_first() -> None:
    links = Links(ME)
    neighbourhood = make(Directory([1, 2, 200, 201]), links)
    assert {id for id, _ in neighbourhood.lacking(own_turn=True)} == {node(200), node(201)}
    assert {id for id, _ in neighbourhood.lacking(own_turn=False)} == {node(1), node(2), node(200), node(201)}


def test_it_is_complete_only_with_links_to_all_it_has_heard_of() -> None:
    links = Links(ME)
    directory = Directory([1, 2], [[2, 3]])
    neighbourhood = make(directory, links)
    assert not neighbourhood.complete(), "nobody has been found, so nobody is known to be missing"
    after(10 * LOOK_AGAIN, neighbourhood)
    assert set(links.linked) == {node(1), node(2), node(3)}
    assert neighbourhood.complete()
    del links.linked[node(3)]
    assert not neighbourhood.complete()
    directory.table = []
    links.linked.clear()
    assert not make(Directory(), Links(ME)).complete()


def test_with_enough_links_nobody_is_looked_for() -> None:
    links = Links(ME)
    directory = Directory(range(1, 50), [range(50, 58)])
    neighbourhood = make(directory, links)
    after(10 * CONTENT, neighbourhood)
    assert len(links.linked) == WANTED == len(links.dialled)
    assert len(directory.asked) <= 2
    assert not neighbourhood.complete(), "the DHT knows more members of a task than we have links"


def test_where_nobody_is_left_to_be_found_searches_become_rare() -> None:
    directory = Directory([1, 2, 3], [[1, 2, 3]])
    after(20 * CONTENT, make(directory, Links(ME)))
    assert len(directory.asked) <= 8 + 20 * 2
    assert max(b - a for a, b in zip(directory.asked, directory.asked[1:], strict=False)) >= CONTENT


def test_made_up_nodes_are_forgotten_when_they_do_not_answer_and_are_bounded_before() -> None:
    """T4: whoever answers searches can name as many as it likes; none may hold up a fetch or fill memory."""
    ghosts = range(1000, 1000 + 8 * 200)
    searches = [ghosts[start : start + 8] for start in range(0, len(ghosts), 8)]
    links = Links(ME, dead=[node(number) for number in ghosts])
    neighbourhood = make(Directory([1], [*searches, [1]]), links)
    after(200 * LOOK_AGAIN, neighbourhood)
    assert len(links.dialled) <= len(ghosts) + 1 + 300
    assert neighbourhood.complete()
    many = make(Directory([1], [range(1000, 2000)]), Links(ME), wanted=1)
    after(2 * LOOK_AGAIN, many)
    assert len(many._found) == MAX_FOUND
