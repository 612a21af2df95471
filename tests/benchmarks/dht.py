"""The DHT in virtual networks: latency and messages of a lookup and an announcement, as JSON.

    python -m tests.benchmarks.dht [--nodes N]... [--seed S] [--operations N]

Latency is virtual (1-40 ms one way), so it says what the protocol does, not how fast this machine is; what the
machine took stands beside it.  With `--loopback`, twenty nodes announce at once over real sockets in this process.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from contextlib import ExitStack
from typing import Any

import trio

from simulations.clock import run as run_virtually
from simulations.datagrams import DatagramNetwork
from simulations.membership import SimulatedMembership
from swarm.announce import Announcer
from swarm.dht.node import DhtNode
from swarm.dht.transport import UdpTransport
from swarm.edges import Address, State

WALL = 1_800_000_000.0
LATENCY = (0.001, 0.040)
SETTLE = 12.0


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def milliseconds(values: list[float]) -> dict[str, float]:
    return {"p50_ms": round(1e3 * quantile(values, 0.5), 1), "p99_ms": round(1e3 * quantile(values, 0.99), 1)}


async def virtual(nodes: int, seed: int, operations: int) -> dict[str, Any]:
    """Build a network of `nodes`, then look up and announce one after another."""
    rng = random.Random(seed)
    network = DatagramNetwork(rng, latency=LATENCY)
    started = time.process_time()
    announcers: list[Announcer] = []
    dhts: list[DhtNode] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(network.run)
        for number in range(nodes):
            membership = SimulatedMembership.draw(rng)
            where = Address(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 7400)
            dht = DhtNode(
                network.endpoint(where),
                membership,
                rng=rng,
                join=["10.0.0.0:7400"] if number else [],
                wall=lambda: WALL + trio.current_time(),
                randbytes=rng.randbytes,
            )
            announcer = Announcer(dht, membership, control_port=7400, rng=rng)
            await nursery.start(dht.run)
            await nursery.start(announcer.run)
            dhts.append(dht)
            announcers.append(announcer)
            await trio.sleep(0.005)
        await trio.sleep(SETTLE)
        joining = network.sent / nodes

        async def measure(what: str) -> dict[str, float]:
            latencies, sent, found = [], network.sent, 0
            for number in range(operations):
                who = rng.randrange(nodes)
                task = number.to_bytes(32, "big")
                start = trio.current_time()
                match what:
                    case "lookup":
                        await dhts[who].find_nodes(rng.randbytes(20))
                    case "announce":
                        await announcers[who].announce(task, State.COMPLETE)
                    case "find":
                        found += len(await announcers[who].find(task)) > 0 or task in announcers[who].announced()
                latencies.append(trio.current_time() - start)
                await trio.sleep(2.0)  # what goes on behind the answer belongs to the operation
            result = {**milliseconds(latencies), "datagrams": round((network.sent - sent) / operations, 1)}
            return result if what != "find" else {**result, "found_share": found / operations}

        result: dict[str, Any] = {
            "nodes": nodes,
            "seed": seed,
            "datagrams_to_join": round(joining, 1),
            "contacts_mean": round(sum(dht.contacts for dht in dhts) / nodes, 1),
            "lookup": await measure("lookup"),
            "announce": await measure("announce"),
            "find": await measure("find"),
        }
        sent, since = network.sent, trio.current_time()
        await trio.sleep(600.0)
        result["idle_datagrams_per_node_and_second"] = round((network.sent - sent) / nodes / (trio.current_time() - since), 3)
        nursery.cancel_scope.cancel()
    result["cpu_seconds"] = round(time.process_time() - started, 1)
    result["rss_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return result


async def loopback(nodes: int, seed: int) -> dict[str, Any]:
    """Real sockets: everybody announces the same task at once."""
    rng = random.Random(seed)
    with ExitStack() as sockets:
        async with trio.open_nursery() as nursery:
            join: list[str] = []
            announcers: list[Announcer] = []
            for _ in range(nodes):
                transport = sockets.enter_context(UdpTransport.open(Address("127.0.0.1", 0)))
                membership = SimulatedMembership.draw(rng)
                dht = DhtNode(transport, membership, rng=rng, join=join)
                announcer = Announcer(dht, membership, control_port=transport.local_address.port, rng=rng)
                await nursery.start(dht.run)
                await nursery.start(announcer.run)
                await dht.wait_joined()
                announcers.append(announcer)
                join = join or [str(transport.local_address)]
            await trio.sleep(2.0)
            seconds: list[float] = []
            missing = 0

            async def announce(announcer: Announcer) -> None:
                nonlocal missing
                start = time.perf_counter()
                members = await announcer.announce(bytes(32), State.WANTS)
                seconds.append(time.perf_counter() - start)
                missing += nodes - 1 - len(members)

            cpu = time.process_time()
            async with trio.open_nursery() as announcing:
                for announcer in announcers:
                    announcing.start_soon(announce, announcer)
            cpu = time.process_time() - cpu
            nursery.cancel_scope.cancel()
    return {"nodes": nodes, **milliseconds(seconds), "members_missed": missing, "cpu_ms_per_node": round(1e3 * cpu / nodes, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, action="append", help="size of a virtual network; may be repeated")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--operations", type=int, default=100)
    parser.add_argument("--loopback", type=int, default=20, help="nodes on real sockets; 0 for none")
    options = parser.parse_args()
    printed: dict[str, Any] = {"virtual": {}}
    if options.loopback:
        printed["loopback"] = trio.run(loopback, options.loopback, options.seed)
    for nodes in options.nodes or [50, 200, 1000]:
        printed["virtual"][str(nodes)] = run_virtually(
            lambda nodes=nodes: virtual(nodes, options.seed, options.operations),  # type: ignore[misc]  # bound in the loop
            options.seed,
        )
    print(json.dumps(printed, indent=1))


if __name__ == "__main__":
    main()
