"""Nodes with a real hub on loopback, and services that write down what they are told."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from swarm import wire
from swarm.edges import Address, FileSlice, NodeId, PeerLink, Served, Started
from swarm.identity import Identity
from swarm.network import Network, open_network
from swarm.peer.hub import PeerHub
from swarm.peer.link import Link
from swarm.peer.settings import PeerSettings

TASK = b"t" * 32


@dataclass
class Service:
    """Serves `content`, and remembers every event in order."""

    content: bytes = b""
    log: list[tuple[str, NodeId]] = field(default_factory=list)
    ups: list[PeerLink] = field(default_factory=list)
    downs: list[tuple[PeerLink, str]] = field(default_factory=list)
    messages: list[tuple[NodeId, wire.TaskMessage]] = field(default_factory=list)
    pieces: dict[int, bytes] = field(default_factory=dict)
    failures: list[tuple[int, int]] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    served_encrypted: list[bool] = field(default_factory=list)
    open_slices: int = 0
    accept: bool = True
    on_up: Callable[[PeerLink], None] = lambda link: None
    on_message: Callable[[PeerLink, wire.TaskMessage], None] = lambda link, message: None
    proof: wire.Signed | None = None

    def __post_init__(self) -> None:
        self.fd = os.memfd_create("content")
        os.write(self.fd, self.content)

    def link_up(self, link: PeerLink) -> None:
        self.log.append(("up", link.node_id))
        self.ups.append(link)
        self.on_up(link)

    def link_down(self, link: PeerLink, reason: str) -> None:
        self.log.append(("down", link.node_id))
        self.downs.append((link, reason))

    def message_received(self, link: PeerLink, message: wire.TaskMessage) -> None:
        self.messages.append((link.node_id, message))
        self.on_message(link, message)

    def piece_started(self, link: PeerLink, started: Started) -> bool:
        self.started.append(started)
        return self.accept

    def piece_received(self, link: PeerLink, request_id: int, digest: bytes, data: memoryview) -> None:
        self.pieces[request_id] = bytes(data)

    def piece_failed(self, link: PeerLink, request_id: int, status: int) -> None:
        self.failures.append((request_id, status))

    def serve(self, node_id: NodeId, request: wire.Request, *, encrypted: bool) -> Served | int:
        self.served_encrypted.append(encrypted)
        if request.task != TASK:
            return wire.NOT_HELD
        self.open_slices += 1
        return Served(
            FileSlice(self.fd, request.offset, request.length, self._release), self.proof, b"c" if self.proof else b""
        )

    def _release(self) -> None:
        self.open_slices -= 1

    def replication(self, task_id: bytes, piece: int) -> int:
        return 0

    def held_by(self, task_id: bytes, node_id: NodeId) -> int:
        return 0

    def uploaded(self, node_id: NodeId, request: wire.Request, sent: int) -> None:
        pass


@dataclass
class Node:
    network: Network
    service: Service
    hub: PeerHub

    @property
    def id(self) -> NodeId:
        return self.network.node_id

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.hub.ports.control)

    async def connect(self, other: Node) -> Link:
        link = await self.hub.connect(other.id, [other.address])
        assert isinstance(link, Link)
        return link


def make_node(
    content: bytes = b"", *, network: Network | None = None, identity: Identity | None = None, **options: Any
) -> Node:
    network = network or open_network("integration", identity or Identity.generate())
    service = Service(content)
    settings = options.pop("settings", PeerSettings())
    return Node(network, service, PeerHub(network, service, service, settings=settings, rng=random.Random(1), **options))


def ordered_identities(count: int) -> list[Identity]:
    """New identities, smallest node id first."""
    return sorted((Identity.generate() for _ in range(count)), key=lambda identity: identity.node_id)


@asynccontextmanager
async def running(*nodes: Node, listen: str = "127.0.0.1") -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.hub.run, [Address(listen, 0)])
        yield
        nursery.cancel_scope.cancel()
    for node in nodes:
        service = node.service
        assert service.open_slices == 0
        assert len(service.ups) == len(service.downs), "a link that came up did not go down"
        assert node.hub.links() == []
        os.close(service.fd)


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that needs real input; bounded by the `fail_after` around the test."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
        await trio.sleep(0.005)
