"""Announcing, finding, repeating and withdrawing, on a simulated network under a virtual clock."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import structlog.testing
import trio
import trio.lowlevel

from simulations.clock import run
from simulations.membership import SimulatedMembership
from swarm import announce
from swarm.announce import Announcer
from swarm.dht import records
from swarm.dht.records import LIFETIME, sign_provider
from swarm.dht.routing import Contact
from swarm.edges import Address, Entry, Provider, State
from swarm.errors import LocalProtocolError
from swarm.task import Digest, blob_task, url_task
from tests.dht.net import WALL, Net, SimNode, address, ids_of, network

TASK = bytes(range(32))
OTHER_TASK = bytes(32)
LAN = (0.0002, 0.002)


async def announce_all(nodes: list[SimNode], state: State = State.WANTS) -> dict[int, tuple[float, list[Provider]]]:
    """All at once; how long each took, and what it found."""
    results: dict[int, tuple[float, list[Provider]]] = {}

    async def one(node: SimNode) -> None:
        start = trio.current_time()
        found = await node.announcer.announce(TASK, state)
        results[node.number] = (trio.current_time() - start, found)

    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(one, node)
    return results


async def holders(net: Net, key: bytes) -> int:
    now = trio.current_time()
    return sum(bool(node.dht.engine.store.records(key, now)) for node in net.nodes)


# --- finding one another --------------------------------------------------------------------------------------------


def test_twenty_nodes_on_a_lan_that_announce_at_once_all_know_all_others_within_two_hundred_milliseconds() -> None:
    async def main() -> None:
        async with network(latency=LAN) as net:
            nodes = await net.add(20)
            await trio.sleep(5.0)
            results = await announce_all(nodes)
            for number, (seconds, found) in results.items():
                assert ids_of(found) == net.ids(nodes) - {nodes[number].membership.node_id}
                assert seconds < 0.2

    run(main, 1)


@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("apart", [0.0, 0.001, 0.01])
def test_of_two_newcomers_at_least_one_sees_the_other(seed: int, apart: float) -> None:
    async def main() -> None:
        async with network(seed, latency=(0.001, 0.040)) as net:
            nodes = await net.add(8)
            await trio.sleep(5.0)
            found: dict[int, set[bytes]] = {}

            async def one(node: SimNode, delay: float) -> None:
                await trio.sleep(delay)
                found[node.number] = ids_of(await node.announcer.announce(TASK, State.WANTS))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(one, nodes[3], 0.0)
                nursery.start_soon(one, nodes[6], apart)
            assert nodes[6].membership.node_id in found[3] or nodes[3].membership.node_id in found[6]

    run(main, seed)


def test_a_lone_node_announces_to_nobody_at_once() -> None:
    async def main() -> None:
        async with network() as net:
            (alone,) = await net.add(1)
            start = trio.current_time()
            assert await alone.announcer.announce(TASK, State.WANTS) == []
            assert await alone.announcer.find(TASK) == []
            assert trio.current_time() - start <= 0.001

    run(main, 1)


def test_an_announcement_made_before_the_node_has_joined_is_found_by_others() -> None:
    async def main() -> None:
        async with network() as net:
            first = await net.start(net.make(0))
            await first.announcer.announce(TASK, State.WANTS)
            newcomer = await net.start(net.make(1))
            found = await newcomer.announcer.announce(TASK, State.WANTS)
            await trio.sleep(2.0)
            assert ids_of(found) | ids_of(await newcomer.announcer.find(TASK)) == net.ids([first])
            assert ids_of(await first.announcer.find(TASK)) == net.ids([newcomer])

    run(main, 1)


def test_what_was_announced_alone_is_announced_again_when_the_network_appears() -> None:
    async def main() -> None:
        async with network() as net:
            early = await net.start(net.make(1))
            assert await early.announcer.announce(TASK, State.COMPLETE) == []
            await net.start(net.make(0))
            others = [await net.start(net.make(number)) for number in range(2, 12)]
            await trio.sleep(45.0)
            assert ids_of(await others[5].announcer.find(TASK)) == net.ids([early])
            assert await holders(net, early.membership.task_key(TASK)) >= 8

    run(main, 1)


def test_found_members_come_nearest_first_with_address_state_and_record() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(12)
            await trio.sleep(3.0)
            for node in nodes[:-1]:
                await node.announcer.announce(TASK, State.COMPLETE)
            found = await nodes[-1].announcer.find(TASK)
            point = int.from_bytes(nodes[0].membership.task_key(TASK), "big")
            distances = [int.from_bytes(each.node_id, "big") ^ point for each in found]
            assert distances == sorted(distances)
            by_id = {each.node_id: each for each in found}
            third = by_id[nodes[3].membership.node_id]
            assert third.control == (Address(address(3).host, 7400),)
            assert third.state is State.COMPLETE
            assert nodes[-1].announcer.read_record(third.record, TASK) == third

    run(main, 1)


def test_the_nearest_twenty_four_of_sixty_are_always_found() -> None:
    async def main() -> None:
        async with network(latency=LAN) as net:
            nodes = await net.add(30)
            await trio.sleep(8.0)
            key = nodes[0].membership.task_key(TASK)
            point = int.from_bytes(key, "big")
            await announce_all(nodes)
            everybody = [node.membership.node_id for node in nodes]
            for extra in range(30):
                stranger = SimulatedMembership.draw(random.Random(1000 + extra))
                everybody.append(stranger.node_id)
                raw = sign_provider(stranger, key, ["10.9.9.9"], 7400, State.WANTS, 1, int(WALL + trio.current_time()))
                for node in nodes:
                    record = node.dht.engine.verifier.provider(raw)
                    node.dht.engine.store.put(record, str(extra), 600, trio.current_time())
            nearest = sorted(everybody, key=lambda each: int.from_bytes(each, "big") ^ point)[: records.NEAREST]
            for node in nodes[:5]:
                found = ids_of(await node.announcer.find(TASK))
                assert set(nearest) - {node.membership.node_id} <= found

    run(main, 1)


def test_dead_contacts_do_not_delay_an_announcement() -> None:
    async def main() -> None:
        async with network(latency=LAN) as net:
            nodes = await net.add(20)
            await trio.sleep(5.0)
            await nodes[0].announcer.announce(TASK, State.COMPLETE)
            for node in nodes[12:]:
                net.kill(node)
            start = trio.current_time()
            found = await nodes[5].announcer.announce(TASK, State.WANTS)
            assert ids_of(found) >= net.ids(nodes[:1])
            assert trio.current_time() - start < 0.7

    run(main, 1)


def test_a_network_that_went_dark_costs_an_announcement_two_seconds_at_most() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(10)
            await trio.sleep(5.0)
            for node in nodes[1:]:
                net.kill(node)
            start = trio.current_time()
            assert await nodes[0].announcer.announce(TASK, State.WANTS) == []
            assert trio.current_time() - start <= announce.LONGEST_WAIT + 0.001

    run(main, 1)


def test_with_thirty_percent_of_the_nodes_dead_a_holder_is_still_found() -> None:
    async def main() -> None:
        async with network(3, latency=(0.001, 0.040)) as net:
            nodes = await net.add(40)
            await trio.sleep(8.0)
            for number in range(10):
                await nodes[number].announcer.announce(bytes([number]) * 32, State.COMPLETE)
            for node in nodes[28:]:
                net.kill(node)
            for number in range(10):
                found = await nodes[27 - number].announcer.find(bytes([number]) * 32)
                assert ids_of(found) == net.ids([nodes[number]])

    run(main, 3)


def test_nothing_is_announced_by_a_node_without_a_control_port() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(2)
            silent = net.make(2)
            silent.announcer = Announcer(silent.dht, silent.membership, control_port=0, rng=net.rng)
            await net.start(silent)
            await nodes[0].announcer.announce(TASK, State.COMPLETE)
            assert ids_of(await silent.announcer.announce(TASK, State.WANTS)) == net.ids(nodes[:1])
            assert silent.announcer.own_record(TASK) is None
            assert ids_of(await nodes[1].announcer.find(TASK)) == net.ids(nodes[:1])

    run(main, 1)


def test_announcing_without_running_is_our_own_mistake() -> None:
    async def main() -> None:
        async with network() as net:
            node = net.make(0)
            with pytest.raises(LocalProtocolError):
                await node.announcer.announce(TASK, State.WANTS)

    run(main, 1)


# --- what a store holds ---------------------------------------------------------------------------------------------


def kept(url: str = "", *, digest: str = "", held: int = 1, private: bool = False, shared: bool = True) -> Entry:
    known = Digest("sha256", digest * 64) if digest else None
    task = replace(url_task(url) if url else blob_task(Digest("sha256", digest * 64)), shared=shared)
    complete = bool(held and digest)
    return Entry(task, None, held, complete, known, False, False, 0, 0.0, 0.0, private)


def test_after_a_restart_complete_content_is_announced_under_its_names_and_its_digest() -> None:
    entries = [kept("http://a/1", digest="1"), kept("http://b/1", digest="1"), kept(digest="2"), kept("http://a/3")]
    names = announce.kept_names(entries, is_open=True)
    assert names == announce.kept_names(entries, is_open=False)
    blobs = {blob_task(Digest("sha256", each * 64)).id for each in "12"}
    assert names == dict.fromkeys({url_task("http://a/1").id, url_task("http://b/1").id, *blobs}, State.COMPLETE)


def test_after_a_restart_private_content_is_announced_to_members_alone_and_only_as_it_was_shared() -> None:
    entries = [
        kept(digest="1", private=True),
        kept("http://a/1", digest="1", private=True, shared=False),
        kept("http://a/2", digest="2", private=True),
    ]
    assert announce.kept_names(entries, is_open=True) == {}
    shared = {blob_task(Digest("sha256", "1" * 64)).id, url_task("http://a/2").id}
    assert announce.kept_names(entries, is_open=False) == dict.fromkeys(shared, State.COMPLETE)


# --- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "life"), [(State.WANTS, 600), (State.COMPLETE, 7200)])
def test_an_announcement_is_repeated_while_its_node_lives_and_expires_when_it_died(state: State, life: int) -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(4)
            await trio.sleep(3.0)
            await nodes[1].announcer.announce(TASK, state)
            await trio.sleep(2.3 * life)
            assert ids_of(await nodes[2].announcer.find(TASK)) == net.ids(nodes[1:2])
            net.kill(nodes[1])
            await trio.sleep(life + 1)
            assert await nodes[2].announcer.find(TASK) == []
            assert await holders(net, nodes[0].membership.task_key(TASK)) == 0

    run(main, 1)


def test_repetitions_go_to_the_holders_known_from_before_without_a_lookup() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(10)
            await trio.sleep(60.0)
            await nodes[1].announcer.announce(TASK, State.WANTS)
            asked = sum(node.dht.statistics().queries.get("FindProviders", 0) for node in nodes)
            announced = sum(node.dht.statistics().queries.get("Announce", 0) for node in nodes)
            await trio.sleep(announce.REPEAT[State.WANTS] * 1.2)
            assert nodes[1].announcer.statistics().repeated == 1
            assert sum(node.dht.statistics().queries.get("FindProviders", 0) for node in nodes) == asked
            again = sum(node.dht.statistics().queries.get("Announce", 0) for node in nodes) - announced
            assert 8 <= again <= 16

    run(main, 1)


def test_holders_that_died_are_replaced_at_the_next_repetition() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(24)
            await trio.sleep(8.0)
            await nodes[1].announcer.announce(TASK, State.WANTS)
            await trio.sleep(1.0)
            key = nodes[0].membership.task_key(TASK)
            now = trio.current_time()
            for node in nodes[2:]:
                if node.dht.engine.store.records(key, now):
                    net.kill(node)
            await trio.sleep(announce.REPEAT[State.WANTS] * 1.2)
            alive = [node for node in nodes if not node.scope.cancel_called]
            assert ids_of(await alive[-1].announcer.find(TASK)) == net.ids(nodes[1:2])

    run(main, 1)


def test_a_node_with_many_tasks_repeats_them_at_its_pace() -> None:
    async def main() -> None:
        async with network(latency=LAN) as net:
            nodes = await net.add(3)
            await trio.sleep(3.0)
            nodes[1].announcer.restore({number.to_bytes(32, "big"): State.COMPLETE for number in range(200)})
            before = net.datagrams.sent
            await trio.sleep(10.0)
            assert net.datagrams.sent - before < 10 * 120
            await trio.sleep(20.0)
            assert nodes[1].announcer.statistics().published >= 200
            assert ids_of(await nodes[2].announcer.find((199).to_bytes(32, "big"))) == net.ids(nodes[1:2])
            before = net.datagrams.sent
            await trio.sleep(3600.0)
            assert (net.datagrams.sent - before) / 3600 < 1.5

    run(main, 1)


def test_a_node_with_two_thousand_contents_of_urls_sends_under_ten_messages_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of them is announced, each under its two names, through two rounds of repetitions."""

    async def main() -> None:
        async with network(latency=LAN) as net:
            node = (await net.add(12))[1]
            await trio.sleep(600.0)
            before, since = node.dht.statistics().datagrams_out, trio.current_time()
            await trio.sleep(600.0)
            idle = (node.dht.statistics().datagrams_out - before) / (trio.current_time() - since)
            node.announcer.restore({number.to_bytes(32, "big"): State.COMPLETE for number in range(40)})
            await trio.sleep(600.0)
            before, since = node.dht.statistics().datagrams_out, trio.current_time()
            await trio.sleep(2 * announce.MOST_PATIENCE * 3600.0)
            rate = (node.dht.statistics().datagrams_out - before) / (trio.current_time() - since)
            assert node.announcer.statistics().repeated >= 2 * 40
            assert idle + 100 * (rate - idle) < 10

    monkeypatch.setattr(announce, "MANY", announce.MANY // 100)
    run(main, 1)


def test_many_names_are_repeated_well_before_their_records_expire() -> None:
    longest = announce.REPEAT[State.COMPLETE] * announce.MOST_PATIENCE * 1.1
    assert longest + 1200 <= LIFETIME[State.COMPLETE]


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_a_clock_an_hour_off_neither_hides_its_node_nor_hides_others_from_it(ahead: float) -> None:
    async def main() -> None:
        async with network() as net:
            nodes = [await net.start(net.make(number, ahead=ahead if number == 2 else 0.0)) for number in range(5)]
            await trio.sleep(3.0)
            await nodes[2].announcer.announce(TASK, State.COMPLETE)
            await nodes[1].announcer.announce(OTHER_TASK, State.COMPLETE)
            assert ids_of(await nodes[4].announcer.find(TASK)) == net.ids([nodes[2]])
            assert ids_of(await nodes[2].announcer.find(OTHER_TASK)) == net.ids([nodes[1]])
            assert nodes[2].dht.statistics().clock_skew == pytest.approx(ahead, abs=2)

    run(main, 1)


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_only_the_node_whose_clock_is_wrong_warns_and_what_it_had_signed_is_signed_anew(ahead: float) -> None:
    async def main() -> None:
        async with network() as net:
            first = await net.start(net.make(0))
            wrong = await net.start(net.make(1, ahead=ahead))
            await wrong.announcer.announce(TASK, State.COMPLETE)
            assert abs(issued(wrong) - WALL - ahead) < 10, "of two, its own clock is as good as any"
            others = [await net.start(net.make(number)) for number in range(2, 5)]
            await trio.sleep(5.0)
            assert abs(issued(wrong) - WALL) < 20
            for node in (first, *others):
                assert ids_of(await node.announcer.find(TASK)) == net.ids([wrong])

    def issued(node: SimNode) -> int:
        raw = node.announcer.own_record(TASK)
        assert raw is not None
        return node.dht.engine.verifier.provider(raw).body.issued

    with structlog.testing.capture_logs() as logs:
        run(main, 1)
    warnings = [entry for entry in logs if entry["log_level"] == "warning"]
    assert [abs(entry["seconds_ahead"] - ahead) <= 2 for entry in warnings] == [True]


def test_a_record_is_judged_by_its_writers_clock_too() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = [await net.start(net.make(number, ahead=3600.0 if number == 5 else 0.0)) for number in range(6)]
            await trio.sleep(3.0)
            for number, known in ((5, True), (4, False), (99, False)):
                ahead = signed(number, issued=3600.0 + trio.current_time())
                assert (nodes[0].announcer.read_record(ahead, TASK) is not None) is known, number

    run(main, 1)


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_two_nodes_whose_clocks_differ_by_an_hour_find_each_other(ahead: float) -> None:
    async def main() -> None:
        async with network() as net:
            nodes = [await net.start(net.make(number, ahead=ahead * number)) for number in range(2)]
            await trio.sleep(3.0)
            await nodes[0].announcer.announce(TASK, State.COMPLETE)
            await nodes[1].announcer.announce(TASK, State.COMPLETE)
            assert ids_of(await nodes[0].announcer.find(TASK)) == net.ids(nodes[1:])
            assert ids_of(await nodes[1].announcer.find(TASK)) == net.ids(nodes[:1])

    run(main, 1)


# --- states, seq, restarts ------------------------------------------------------------------------------------------


def test_a_later_state_replaces_the_earlier_everywhere() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(10)
            await trio.sleep(3.0)
            for state in (State.WANTS, State.PARTIAL, State.COMPLETE):
                await nodes[1].announcer.announce(TASK, state)
                (found,) = await nodes[7].announcer.find(TASK)
                assert found.state is state

    run(main, 1)


def test_a_seed_announces_what_is_complete_as_seeded() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(2)
            seed = net.make(2)
            seed.announcer = Announcer(seed.dht, seed.membership, control_port=7400, rng=net.rng, seed_role=True)
            await net.start(seed)
            await seed.announcer.announce(TASK, State.COMPLETE)
            (found,) = await nodes[1].announcer.find(TASK)
            assert found.state is State.SEED

    run(main, 1)


def test_a_restarted_node_is_believed_over_what_it_said_before(tmp_path: Path) -> None:
    """Even when its clock was set back in between: the sequence number is kept."""

    async def main() -> None:
        async with network() as net:
            nodes = await net.add(3)
            old = await net.start(net.make(3, state=tmp_path))
            await old.announcer.announce(TASK, State.WANTS)
            old.scope.cancel()
            await trio.sleep(1.0)
            again = await net.start(net.make(3, state=tmp_path, ahead=-100.0))
            await again.announcer.announce(TASK, State.COMPLETE)
            (found,) = await nodes[1].announcer.find(TASK)
            assert found.state is State.COMPLETE

    run(main, 1)


def test_a_restarted_node_that_lost_its_state_is_believed_over_what_it_said_before() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(3)
            old = await net.start(net.make(3))
            for state in (State.WANTS, State.PARTIAL, State.WANTS):
                await old.announcer.announce(TASK, state)
            old.scope.cancel()
            await trio.sleep(1.0)
            again = await net.start(net.make(3))
            await again.announcer.announce(TASK, State.COMPLETE)
            (found,) = await nodes[1].announcer.find(TASK)
            assert found.state is State.COMPLETE

    run(main, 1)


def test_sequence_numbers_never_repeat_across_crashes(tmp_path: Path) -> None:
    async def main() -> None:
        async with network() as net:
            seen: list[int] = []
            for _ in range(3):
                node = await net.start(net.make(0, state=tmp_path, ahead=-1000.0 * len(seen)))
                seen += [node.announcer._next_seq() for _ in range(announce.SEQ_BLOCK + 10)]
                net.kill(node)
                net.datagrams.revive(address(0).host)
            assert seen == sorted(set(seen))

    run(main, 1)


def test_a_record_for_peer_exchange_says_what_we_announce() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(2)
            await trio.sleep(1.0)
            assert nodes[0].announcer.own_record(TASK) is None
            await nodes[0].announcer.announce(TASK, State.PARTIAL)
            raw = nodes[0].announcer.own_record(TASK)
            assert raw is not None
            read = nodes[1].announcer.read_record(raw, TASK)
            assert read is not None
            assert (read.node_id, read.state) == (nodes[0].membership.node_id, State.PARTIAL)
            await trio.sleep(0.9 * LIFETIME[State.PARTIAL])
            fresh = nodes[0].announcer.own_record(TASK)
            assert fresh is not None
            assert nodes[1].announcer.read_record(fresh, TASK) is not None

    run(main, 1)


def test_advertised_addresses_replace_the_observed_ones() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(3)
            await trio.sleep(1.0)
            nodes[1].announcer.set_addresses(["203.0.113.5", "2001:db8::5"])
            await nodes[1].announcer.announce(TASK, State.COMPLETE)
            (found,) = await nodes[2].announcer.find(TASK)
            assert found.control == (Address("203.0.113.5", 7400), Address("2001:db8::5", 7400))
            nodes[1].announcer.set_addresses([])
            await trio.sleep(2.0)
            (found,) = await nodes[2].announcer.find(TASK)
            assert found.control == (Address(address(1).host, 7400),)

    run(main, 1)


# --- withdrawing ----------------------------------------------------------------------------------------------------


def test_a_withdrawn_task_is_gone_everywhere_and_stays_gone() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(6)
            await trio.sleep(3.0)
            await nodes[1].announcer.announce(TASK, State.WANTS)
            replayed = nodes[1].announcer.own_record(TASK)
            await nodes[1].announcer.withdraw(TASK)
            assert await nodes[2].announcer.find(TASK) == []
            assert replayed is not None
            for node in nodes[2:]:
                record = node.dht.engine.verifier.provider(replayed)
                assert node.dht.engine.store.put(record, "x", 500, trio.current_time()) is records.Outcome.OUTDATED
            await trio.sleep(600.0)
            assert await nodes[2].announcer.find(TASK) == []

    run(main, 1)


def test_a_task_withdrawn_while_it_is_announced_does_not_stay_behind() -> None:
    async def main() -> None:
        async with network(latency=(0.005, 0.040)) as net:
            nodes = await net.add(6)
            await trio.sleep(3.0)
            for delay in (0.0, 0.03, 0.06, 0.09, 0.12):
                with trio.move_on_after(delay):
                    await nodes[1].announcer.announce(TASK, State.WANTS)
                await nodes[1].announcer.withdraw(TASK)
                await trio.sleep(2.0)
                assert await holders(net, nodes[0].membership.task_key(TASK)) == 0

    run(main, 1)


def test_a_task_withdrawn_and_wanted_again_is_found_again() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(4)
            await trio.sleep(3.0)
            await nodes[1].announcer.announce(TASK, State.COMPLETE)
            await nodes[1].announcer.withdraw(TASK)
            await nodes[1].announcer.announce(TASK, State.WANTS)
            assert ids_of(await nodes[2].announcer.find(TASK)) == net.ids(nodes[1:2])

    run(main, 1)


def test_a_repetition_that_falls_due_after_everything_was_withdrawn_does_not_end_the_node() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(3)
            await trio.sleep(3.0)
            await nodes[1].announcer.announce(TASK, State.COMPLETE)
            await nodes[1].announcer.withdraw_all()
            await trio.sleep(2 * 3600.0)
            assert nodes[1].announcer.statistics().tasks == 0
            assert ids_of(await nodes[1].announcer.announce(TASK, State.WANTS)) == set()

    run(main, 1)


def test_shutdown_withdraws_every_task_with_one_message_to_each_holder() -> None:
    async def main() -> None:
        async with network(latency=LAN) as net:
            nodes = await net.add(6)
            await trio.sleep(5.0)
            tasks = [number.to_bytes(32, "big") for number in range(30)]
            for task in tasks:
                await nodes[1].announcer.announce(task, State.COMPLETE)
            await trio.sleep(1.0)
            start, sent = trio.current_time(), net.datagrams.sent
            await nodes[1].announcer.withdraw_all()
            assert trio.current_time() - start < 0.1
            assert net.datagrams.sent - sent <= 5 * 4
            assert sum(len(node.dht.engine.store) for node in nodes) == 0
            assert nodes[1].announcer.announced() == {}

    run(main, 1)


def test_a_shutdown_does_not_wait_for_dead_holders() -> None:
    async def main() -> None:
        async with network() as net:
            nodes = await net.add(6)
            await trio.sleep(3.0)
            await nodes[1].announcer.announce(TASK, State.COMPLETE)
            for node in (*nodes[:1], *nodes[2:]):
                net.kill(node)
            start = trio.current_time()
            await nodes[1].announcer.withdraw_all()
            assert trio.current_time() - start <= announce.WITHDRAW_ALL_LIMIT

    run(main, 1)


# --- attacks --------------------------------------------------------------------------------------------------------


async def reader(net: Net) -> SimNode:
    node = await net.start(net.make(0))
    await trio.lowlevel.checkpoint()
    return node


def signed(
    number: int,
    *,
    task: bytes = TASK,
    name: str = "simulation",
    hosts: tuple[str, ...] = ("9.9.9.9",),
    port: int = 7400,
    issued: float = 0.0,
) -> bytes:
    signer = SimulatedMembership.draw(random.Random(number), name)
    return sign_provider(signer, signer.task_key(task), hosts, port, State.COMPLETE, 1, int(WALL + issued))


def test_a_record_copied_to_another_task_or_network_is_not_read() -> None:
    async def main() -> None:
        async with network() as net:
            node = await reader(net)
            good = signed(1)
            assert node.announcer.read_record(good, TASK) is not None
            assert node.announcer.read_record(good, OTHER_TASK) is None
            assert node.announcer.read_record(signed(1, name="theirs"), TASK) is None

    run(main, 1)


def test_an_expired_or_future_record_is_not_read() -> None:
    async def main() -> None:
        async with network() as net:
            node = await reader(net)
            assert node.announcer.read_record(signed(1, issued=-7201), TASK) is None
            assert node.announcer.read_record(signed(1, issued=301), TASK) is None

    run(main, 1)


def test_our_own_record_sent_back_to_us_is_not_a_member() -> None:
    async def main() -> None:
        async with network() as net:
            node = await reader(net)
            assert node.announcer.read_record(signed(0), TASK) is None

    run(main, 1)


def test_garbage_is_not_a_record() -> None:
    async def main() -> None:
        async with network() as net:
            node = await reader(net)
            good = signed(1)
            for length in range(len(good)):
                assert node.announcer.read_record(good[:length], TASK) is None
            rng = random.Random(1)
            for _ in range(300):
                assert node.announcer.read_record(rng.randbytes(rng.randrange(400)), TASK) is None

    run(main, 1)


@pytest.mark.parametrize(
    ("host", "port"),
    [("127.0.0.1", 7400), ("::1", 7400), ("169.254.169.254", 7400), ("224.0.0.1", 7400), ("9.9.9.9", 22), ("fe80::1", 7400)],
)
def test_a_record_cannot_aim_our_dials_at_ourselves_or_at_other_services(host: str, port: int) -> None:
    async def main() -> None:
        async with network() as net:
            node = await reader(net)
            assert node.announcer.read_record(signed(1, hosts=(host,), port=port), TASK) is None
            both = node.announcer.read_record(signed(1, hosts=(host, "9.9.9.9"), port=max(port, 1024)), TASK)
            assert both is not None
            assert {each.host for each in both.control} == {"9.9.9.9"}

    run(main, 1)


def test_ten_thousand_strangers_announcements_leave_our_own_task_found() -> None:
    async def main() -> None:
        async with network(latency=LAN) as net:
            nodes = await net.add(4)
            await trio.sleep(3.0)
            await nodes[1].announcer.announce(TASK, State.COMPLETE)
            now = trio.current_time()
            body = nodes[0].dht.engine.verifier.provider(signed(7))
            for node in nodes:
                for number in range(10_000):
                    key = number.to_bytes(20, "big")
                    fake = records.ProviderRecord(
                        body.raw, number.to_bytes(32, "big"), key, records.ProviderBody(key, [bytes(4)], 7400, 0, 1, 0, 600)
                    )
                    node.dht.engine.store.put(fake, f"10.9.{number % 2}.1", 600, now)
                assert len(node.dht.engine.store) <= records.MAX_RECORDS
            assert ids_of(await nodes[2].announcer.find(TASK)) == net.ids(nodes[1:2])

    run(main, 1)


def test_with_a_fifth_of_the_nodes_lying_members_are_found_in_ninety_nine_of_a_hundred_searches() -> None:
    """The liars claim to store, forget, know no members, and name only one another."""

    async def main() -> None:
        async with network(latency=LAN) as net:
            nodes = await net.add(25)
            await trio.sleep(6.0)
            liars, honest = nodes[::5], [node for node in nodes if node.number % 5]
            their_ids = net.ids(liars)
            for liar in liars:
                table = liar.dht.engine.table
                gang = [contact for contact in table.contacts() if contact.id in their_ids]
                table.nearest = lambda target, count, gang=gang, **asker: gang[:count]  # type: ignore[method-assign]
                liar.dht.engine.store.put = lambda *record: records.Outcome.STORED  # type: ignore[method-assign]
            found = 0
            for provider in honest:
                await provider.announcer.announce(provider.membership.node_id + bytes(12), State.COMPLETE)
            for number in range(100):
                provider, seeker = honest[number % 20], honest[(number * 7 + number // 20) % 20]
                members = ids_of(await seeker.announcer.find(provider.membership.node_id + bytes(12)))
                found += provider is seeker or members == net.ids([provider])
            assert found >= 99

    run(main, 1)


def test_two_hundred_sybils_around_a_key_neither_hang_nor_break_a_search() -> None:
    """They may hide members: then the download falls back to other sources.  They must not cost more than time."""

    async def main() -> None:
        async with network(latency=LAN) as net:
            nodes = await net.add(12)
            await trio.sleep(5.0)
            await nodes[1].announcer.announce(TASK, State.COMPLETE)
            key = int.from_bytes(nodes[0].membership.task_key(TASK), "big")
            for node in nodes:
                for number in range(200):
                    sybil = Contact((key ^ number).to_bytes(20, "big"), Address("9.9.9.9", 2000 + number))
                    node.dht.engine.table.add(sybil)
            start = trio.current_time()
            found = await nodes[5].announcer.find(TASK)
            assert ids_of(found) == net.ids(nodes[1:2])
            assert trio.current_time() - start <= announce.LONGEST_WAIT + 0.001

    run(main, 1)
