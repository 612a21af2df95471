"""Nodes that join, split, heal and die, on a simulated network."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from simulations.clock import run
from simulations.datagrams import DatagramNetwork
from simulations.membership import SimulatedMembership
from swarm.dht import state
from swarm.dht.addresses import pack
from swarm.dht.node import MAX_MEMBERS, DhtNode, Search, _missing, _Page, split_host_port
from swarm.dht.records import NEAREST, sign_provider
from swarm.dht.routing import Contact
from swarm.dht.rpc import K
from swarm.edges import Address, DatagramTransport, State
from swarm.errors import ConfigError
from tests.dht.net import WALL, address, network


def test_twenty_nodes_that_join_one_find_one_another_within_seconds() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(20)
            await trio.sleep(3.0)
            assert min(node.dht.contacts for node in nodes) >= 10
            for number, node in enumerate(nodes):
                wanted = nodes[(number * 7 + 3) % 20]
                found = await node.dht.find_nodes(wanted.membership.node_id)
                assert wanted is node or found[0].id == wanted.membership.node_id
            assert nodes[3].dht.hosts == (address(3).host,)

    run(main, 1)


def test_nodes_that_start_before_the_one_they_join_find_it_when_it_comes() -> None:
    async def main() -> None:
        async with network() as net:
            early = [await net.start(net.make(number)) for number in (1, 2, 3)]
            await trio.sleep(20.0)
            assert all(node.dht.contacts == 0 for node in early)
            await net.start(net.make(0))
            await trio.sleep(60.0)
            assert all(node.dht.contacts == 3 for node in early)

    run(main, 1)


def test_a_node_that_is_told_to_join_itself_does_not_wait_for_anybody() -> None:
    async def main() -> None:
        async with network() as net:
            alone = await net.start(net.make(0, join=[str(address(0))]))
            start = trio.current_time()
            await alone.dht.wait_joined()
            assert trio.current_time() - start < 0.1
            assert alone.dht.contacts == 0

    run(main, 1)


def test_a_lone_node_finds_nothing_at_once() -> None:
    async def main() -> None:
        async with network() as net:
            (alone,) = await net.add(1)
            start = trio.current_time()
            search = Search(bytes(20))
            await alone.dht.collect(search)
            assert search.members == {}
            assert trio.current_time() - start < 0.001

    run(main, 1)


def test_a_join_name_stands_for_all_its_addresses_and_is_looked_up_again() -> None:
    async def main() -> None:
        async with network() as net:
            answers = [[address(90)], [address(91), address(92)]]
            asked: list[tuple[str, int]] = []

            async def resolve(host: str, port: int) -> list[Address]:
                asked.append((host, port))
                if len(asked) == 1:
                    raise OSError("no such name yet")
                return answers[min(len(asked) - 2, 1)]

            newcomer = await net.start(net.make(5, join=["swarm.example:7400"], resolve=resolve))
            await trio.sleep(10.0)
            assert newcomer.dht.contacts == 0
            await net.start(net.make(91, join=[]))
            await net.start(net.make(92, join=[]))
            await trio.sleep(60.0)
            assert newcomer.dht.contacts == 2
            assert len(asked) > 2
            assert set(asked) == {("swarm.example", 7400)}

    run(main, 1)


def test_a_name_that_takes_for_ever_to_resolve_holds_up_no_other() -> None:
    async def main() -> None:
        async with network() as net:

            async def resolve(host: str, port: int) -> list[Address]:
                if host == "slow.example":
                    await trio.sleep_forever()
                return [Address(host, port)]

            await net.add(1)
            newcomer = await net.start(net.make(5, join=["slow.example:7400", str(address(0))], resolve=resolve))
            start = trio.current_time()
            await newcomer.dht.wait_joined()
            assert newcomer.dht.contacts == 1
            assert trio.current_time() - start < 0.5

    run(main, 1)


def test_a_name_server_that_hangs_once_is_asked_again() -> None:
    async def main() -> None:
        async with network() as net:
            asked = 0

            async def resolve(host: str, port: int) -> list[Address]:
                nonlocal asked
                asked += 1
                if asked == 1:
                    await trio.sleep_forever()
                return [address(0)]

            await net.add(1)
            newcomer = await net.start(net.make(5, join=["swarm.example:7400"], resolve=resolve))
            await trio.sleep(60.0)
            assert newcomer.dht.contacts == 1

    run(main, 1)


def test_a_lookup_among_sixty_nodes_finds_the_nearest() -> None:
    async def main() -> None:
        async with network(latency=(0.001, 0.040)) as net:
            nodes = await net.add(60)
            await trio.sleep(15.0)
            asker = nodes[44]
            before = net.datagrams.sent
            for number in range(10):
                target = random.Random(number).randbytes(20)
                point = int.from_bytes(target, "big")
                others = [node for node in nodes if node is not asker]
                others.sort(key=lambda node: int.from_bytes(node.membership.node_id, "big") ^ point)
                found = [contact.id for contact in await asker.dht.find_nodes(target)]
                assert found == [node.membership.node_id for node in others[:K]]
            assert (net.datagrams.sent - before) / 10 < 80

    run(main, 1)


def test_no_node_is_blind_to_a_region_where_others_live() -> None:
    """Else lookups that pass through it end there, and whole regions are never found."""

    async def main() -> None:
        async with network(latency=(0.001, 0.040)) as net:
            nodes = await net.add(60)
            await trio.sleep(8.0)
            for node in nodes:
                own = int.from_bytes(node.membership.node_id, "big")

                def region(node_id: bytes, own: int = own) -> int:
                    return (int.from_bytes(node_id, "big") ^ own).bit_length()

                inhabited = {region(other.membership.node_id) for other in nodes if other is not node}
                assert {region(contact.id) for contact in node.dht.engine.table.contacts()} == inhabited

    run(main, 1)


def test_dead_contacts_do_not_hold_up_a_lookup_and_leave_the_table() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(40)
            await trio.sleep(10.0)
            for node in nodes[20:]:
                net.kill(node)
            asker = nodes[3]
            start = trio.current_time()
            found = await asker.dht.find_nodes(b"\x42" * 20)
            assert {contact.id for contact in found} <= net.ids(nodes[:20])
            assert len(found) == K
            assert trio.current_time() - start <= 2.5  # two waves of dead strangers, a second each
            for number in range(10):
                await asker.dht.find_nodes(bytes([number * 25]) * 20)
            assert not net.ids(nodes[20:]) & {contact.id for contact in asker.dht.engine.table.contacts()}

    run(main, 1)


def test_a_partition_heals_within_two_minutes() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(20)
            await trio.sleep(30.0)
            net.datagrams.split({address(number).host: 1 for number in range(10, 20)})
            for number in range(60):
                await nodes[number % 20].dht.find_nodes(bytes([number * 4]) * 20)
                await trio.sleep(1.0)
            assert any(node.dht.contacts < 19 for node in nodes)
            net.datagrams.split({})
            await trio.sleep(120.0)
            for node in nodes:
                found = await node.dht.find_nodes(nodes[-1].membership.node_id)
                assert node is nodes[-1] or found[0].id == nodes[-1].membership.node_id

    run(main, 1)


def test_lookups_succeed_under_loss_and_delay() -> None:
    async def main() -> None:
        async with network(latency=(0.050, 0.150), loss=0.05) as net:
            nodes = await net.add(30)
            await trio.sleep(15.0)
            right = 0
            for number in range(100):
                target = nodes[number % 30].membership.node_id
                found = await nodes[(number * 7 + 1) % 30].dht.find_nodes(target)
                right += bool(found) and (found[0].id == target or number % 30 == (number * 7 + 1) % 30)
            assert right >= 99

    run(main, 1)


def test_contacts_survive_a_restart_without_the_node_that_was_joined_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(4, state=tmp_path)
            await trio.sleep(5.0)
            nodes[3].scope.cancel()
            net.kill(nodes[0])
            await trio.sleep(0.1)
            again = await net.start(net.make(3, state=tmp_path))
            await again.dht.wait_joined()
            assert again.dht.contacts == 2

    run(main, 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        b"\x80",
        b'{"contacts": []}',
        bytes.fromhex("a26776657273696f6e0168636f6e74616374738143010203"),
    ],
    ids=["empty", "garbage", "an array", "json", "half an address"],
)
def test_a_state_file_that_makes_no_sense_only_costs_the_contacts(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dht"
    path.write_bytes(content)
    transport = DatagramNetwork(random.Random(1)).endpoint(address(1))
    node = DhtNode(transport, SimulatedMembership.draw(random.Random(1)), rng=random.Random(1), state_path=path)
    assert node._saved == []


def test_a_state_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "state"
    assert state.save(path, {"seq": 1})
    assert state.save(path, {"seq": 2})
    assert state.load(path) == {"version": 1, "seq": 2}
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


def test_a_disk_that_refuses_the_state_does_not_stop_the_node(tmp_path: Path) -> None:
    assert not state.save(tmp_path / "missing" / "state", {"seq": 1})


def test_the_state_of_another_version_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state.save(path, {"version": 2, "seq": 7})
    assert state.load(path) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("node1:7400", ("node1", 7400)), ("10.0.0.1:1", ("10.0.0.1", 1)), ("[fd00::1]:7400", ("fd00::1", 7400))],
)
def test_join_entries_are_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert split_host_port(text) == expected


@pytest.mark.parametrize("text", ["", "node1", ":7400", "node1:", "node1:0", "node1:65536", "node1:http", "fd00::1:7400"])
def test_other_join_entries_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"7400|brackets"):
        split_host_port(text)


class Listening:
    """A transport that notes where datagrams go."""

    def __init__(self, transport: DatagramTransport) -> None:
        self.inner = transport
        self.destinations: set[Address] = set()

    @property
    def local_address(self) -> Address:
        return self.inner.local_address

    async def send(self, data: bytes, address: Address) -> None:
        self.destinations.add(address)
        await self.inner.send(data, address)

    async def receive(self) -> tuple[bytes, Address]:
        return await self.inner.receive()


def test_a_liar_cannot_aim_our_datagrams_at_ourselves_or_at_other_services() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(2)
            await trio.sleep(1.0)
            victims = [
                Address("127.0.0.1", 7400),
                Address("8.8.8.8", 53),
                Address("169.254.169.254", 8080),
                Address("::1", 7400),
            ]
            bait = [*victims, Address("8.8.4.4", 7400)]
            named = [(bytes([number]) * 20, pack(each)) for number, each in enumerate(bait)]
            nodes[0].dht.engine._contacts_for = lambda target, room, address: (named, room)  # type: ignore[method-assign]
            transport = nodes[1].dht._transport = Listening(nodes[1].dht._transport)
            await nodes[1].dht.find_nodes(bytes(20))
            assert transport.destinations == {address(0), Address("8.8.4.4", 7400)}

    run(main, 1)


def test_members_a_liar_makes_up_are_not_taken_for_members() -> None:
    """Records of another key, expired ones, forged ones, and more good ones than anybody needs."""

    async def main() -> None:
        async with network() as net:
            nodes = await net.add(2)
            await trio.sleep(1.0)
            key, now = bytes(20), int(WALL + trio.current_time())

            def made(number: int, key: bytes = key, issued: int = now) -> bytes:
                signer = SimulatedMembership.draw(random.Random(100 + number))
                return sign_provider(signer, key, ["9.9.9.9"], 7400, State.WANTS, 1, issued)

            lies = [made(0, key=b"x" * 20), made(1, issued=now - 700), made(2, issued=now + 400), made(3)[:-1] + b"x"]
            lies[3] = lies[3] if lies[3] != made(3) else made(3)[:-1] + b"y"
            nodes[0].dht.engine.store.page = lambda *asked, **without: (lies, 0, 4)  # type: ignore[method-assign]
            search = Search(key)
            await nodes[1].dht.collect(search)
            assert search.members == {}
            many = [made(number) for number in range(MAX_MEMBERS + 20)]
            nodes[1].dht._take_records(search, many, len(many))
            assert len(search.members) == MAX_MEMBERS

    run(main, 1)


def test_pages_of_a_storer_that_knows_far_fewer_do_not_count_as_read() -> None:
    near, far = Contact(b"n" * 20, address(1)), Contact(b"f" * 20, address(2))
    search = Search(bytes(20), count=20)
    search.pages = [_Page(far.id, 0, NEAREST, 3), _Page(near.id, 6, 12, 20)]
    assert _missing(search, [near, far]) == [(0, 6), (12, 18), (18, 20)]
    search.pages.append(_Page(near.id, 0, 6, 20))
    search.pages.append(_Page(far.id, 12, NEAREST, 19))
    assert _missing(search, [near, far]) == []
    assert _missing(search, [near]) == [(12, 18), (18, 20)]
    assert _missing(Search(bytes(20)), [near]) == []


def test_a_silent_network_sends_next_to_nothing() -> None:
    async def main() -> None:
        async with network() as net:
            await net.add(12)
            await trio.sleep(120.0)
            before = net.datagrams.sent
            await trio.sleep(3600.0)  # a virtual hour
            per_node_and_minute = (net.datagrams.sent - before) / 12 / 60
            assert per_node_and_minute < 15

    run(main, 1)


@pytest.mark.parametrize("steps", range(1, 40, 3))
def test_a_node_cancelled_at_any_moment_leaves_nothing_running(steps: int) -> None:
    async def main() -> None:
        async with network() as net:
            await net.add(3)
            node = net.make(3)

            async def announce() -> None:
                await node.announcer.announce(bytes(32), 0)  # type: ignore[arg-type]  # State.WANTS

            async with trio.open_nursery() as nursery:
                await nursery.start(node.dht.run)
                await nursery.start(node.announcer.run)
                nursery.start_soon(announce)
                await trio.sleep(steps * 0.003)
                nursery.cancel_scope.cancel()

    run(main, steps)


def test_the_same_seed_gives_the_same_network() -> None:
    async def main() -> tuple[int, int]:
        async with network(7, loss=0.1) as net:
            nodes = await net.add(15)
            await trio.sleep(30.0)
            return net.datagrams.sent, sum(node.dht.contacts for node in nodes)

    assert run(main, 7) == run(main, 7)
