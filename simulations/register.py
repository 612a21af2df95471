"""An idealised DHT: one register that always answers, in 50 to 250 ms, and misses a share of the records."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import trio

from simulations.world import Node
from swarm.edges import Provider, State

RECORDS_TOLD = 64


@dataclass(slots=True)
class Register:
    """What all nodes announced."""

    rng: Random
    missed: float = 0.05
    records: dict[bytes, dict[bytes, Provider]] = field(default_factory=dict)

    def for_node(self, node: Node) -> IdealDiscovery:
        return IdealDiscovery(self, node)

    def members(self, task_id: bytes, asker: bytes) -> list[Provider]:
        known = [p for p in self.records.get(task_id, {}).values() if p.node_id != asker]
        key = int.from_bytes(task_id[:20], "big")
        known.sort(key=lambda provider: int.from_bytes(provider.node_id, "big") ^ key)
        near, rest = known[:16], known[16:]
        told = [*near, *self.rng.sample(rest, min(len(rest), RECORDS_TOLD - 16))]
        return [provider for provider in told if self.rng.random() >= self.missed]


@dataclass(slots=True)
class IdealDiscovery:
    """`edges.Discovery` over the register."""

    register: Register
    node: Node

    async def announce(self, task_id: bytes, state: State) -> list[Provider]:
        await trio.sleep(self.register.rng.uniform(0.025, 0.125))
        node = self.node
        record = Provider(node.node_id, node.identity.public_key, (node.address,), state, b"record:" + node.node_id)
        self.register.records.setdefault(task_id, {})[node.node_id] = record
        await trio.sleep(self.register.rng.uniform(0.025, 0.125))
        return self.register.members(task_id, node.node_id)

    async def find(self, task_id: bytes) -> list[Provider]:
        await trio.sleep(self.register.rng.uniform(0.05, 0.25))
        return self.register.members(task_id, self.node.node_id)

    async def withdraw(self, task_id: bytes) -> None:
        self.register.records.get(task_id, {}).pop(self.node.node_id, None)

    def own_record(self, task_id: bytes) -> bytes | None:
        known = self.register.records.get(task_id, {}).get(self.node.node_id)
        return known.record if known is not None else None

    def read_record(self, record_untrusted: bytes, task_id: bytes) -> Provider | None:
        return self.register.records.get(task_id, {}).get(record_untrusted.removeprefix(b"record:"))
