"""One sender, one receiver, over loopback, pieces verified and written: MiB/s and CPU-seconds per GiB of both ends, as JSON.

    python -m tests.benchmarks.transfer [--mib N] [--piece-mib N] [--encrypt] [--frames]

Two processes with real hubs, TLS and all; only the download service is simple: it asks for every piece in order, two at a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import trio

from swarm import wire
from swarm.edges import Address, FileSlice, NodeId, PeerLink, Served, Started
from swarm.identity import Identity
from swarm.network import open_network
from swarm.peer.hub import PeerHub
from swarm.peer.settings import PeerSettings

NETWORK = "benchmark"
TASK = bytes(32)
AHEAD = 3


class Sender:
    """Serves one file."""

    def __init__(self, path: str, piece: int) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.piece = piece

    def serve(self, node_id: NodeId, request: wire.Request, *, encrypted: bool) -> Served | int:
        return Served(FileSlice(self.fd, request.piece * self.piece + request.offset, request.length))

    def replication(self, task_id: bytes, piece: int) -> int:
        return 1

    def held_by(self, task_id: bytes, node_id: NodeId) -> int:
        return 0

    def uploaded(self, node_id: NodeId, request: wire.Request, sent: int) -> None:
        pass

    def link_up(self, link: PeerLink) -> None:
        pass

    def link_down(self, link: PeerLink, reason: str) -> None:
        pass

    def message_received(self, link: PeerLink, message: wire.TaskMessage) -> None:
        link.post(message)

    def piece_started(self, link: PeerLink, started: Started) -> bool:
        return True

    def piece_received(self, link: PeerLink, request_id: int, digest: bytes, data: memoryview) -> None:
        pass

    def piece_failed(self, link: PeerLink, request_id: int, status: int) -> None:
        pass


class Receiver(Sender):
    """Asks for all pieces in order and writes them."""

    def __init__(self, path: str, pieces: int, piece: int) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self.piece = piece
        self.pieces = pieces
        self.asked = self.done = self.echoes = 0
        self.finished = trio.Event()
        self.echoed = trio.Event()

    def ask(self, link: PeerLink) -> None:
        while self.asked < self.pieces and self.asked - self.done < AHEAD:
            link.request(self.asked, TASK, self.asked, 0, self.piece)
            self.asked += 1

    def piece_received(self, link: PeerLink, request_id: int, digest: bytes, data: memoryview) -> None:
        os.pwrite(self.fd, data, request_id * self.piece)
        self.done += 1
        if self.done == self.pieces:
            self.finished.set()
        self.ask(link)

    def message_received(self, link: PeerLink, message: wire.TaskMessage) -> None:
        self.echoed.set()

    def piece_failed(self, link: PeerLink, request_id: int, status: int) -> None:
        raise AssertionError(f"piece {request_id} failed with status {status}")


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _send(pipe: Connection, path: str, piece: int, encrypt: bool) -> None:
    async def main() -> None:
        service = Sender(path, piece)
        network = open_network(NETWORK, Identity.generate())
        hub = PeerHub(network, service, service, settings=PeerSettings(encrypt=encrypt), rng=random.Random(1))
        async with trio.open_nursery() as nursery:
            ports = await nursery.start(hub.run, [Address("127.0.0.1", 0)])
            pipe.send((network.node_id, ports.control))
            while (await trio.to_thread.run_sync(pipe.recv)) == "cpu":
                pipe.send((_cpu(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
            await hub.aclose()

    trio.run(main)


async def _receive(pipe: Connection, path: str, pieces: int, piece: int, encrypt: bool, frames: int) -> dict[str, Any]:
    node_id, port = pipe.recv()
    service = Receiver(path, pieces, piece)
    network = open_network(NETWORK, Identity.generate())
    hub = PeerHub(network, service, service, settings=PeerSettings(encrypt=encrypt), rng=random.Random(2))
    result: dict[str, Any] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(hub.run, [Address("127.0.0.1", 0)])
        link = await hub.connect(node_id, [Address("127.0.0.1", port)])
        if frames:
            result |= await _echo(pipe, link, service, frames)
        pipe.send("cpu")
        before = pipe.recv()[0]
        own, began = _cpu(), time.perf_counter()
        service.ask(link)
        await service.finished.wait()
        seconds, own = time.perf_counter() - began, _cpu() - own
        pipe.send("cpu")
        after, memory = pipe.recv()
        gib = pieces * piece / (1 << 30)
        result |= {
            "bytes": pieces * piece,
            "encrypted": encrypt,
            "mib_per_second": round(gib * 1024 / seconds, 1),
            "sender_cpu_seconds_per_gib": round((after - before) / gib, 3),
            "receiver_cpu_seconds_per_gib": round(own / gib, 3),
            "cpu_seconds_per_gib": round((after - before + own) / gib, 3),
            "sender_rss_mib": memory // 1024,
            "receiver_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        pipe.send("stop")
        await hub.aclose()
    return result


async def _echo(pipe: Connection, link: PeerLink, service: Receiver, frames: int) -> dict[str, Any]:
    """CPU of a control frame: ping-pong of one small message, one frame each."""
    pipe.send("cpu")
    before = pipe.recv()[0]
    own = _cpu()
    for number in range(frames):
        service.echoed = trio.Event()
        link.post(wire.Have(TASK, [number]))
        await service.echoed.wait()
    own = _cpu() - own
    pipe.send("cpu")
    other = pipe.recv()[0] - before
    # Each exchange is two frames, each sent once and received once.
    return {"control_frame_microseconds_both_ends": round((own + other) / frames / 2 * 1e6, 1)}


def run(mib: int = 1024, piece_mib: float = 4, encrypt: bool = False, frames: int = 0) -> dict[str, Any]:
    """The figures of one run; the files lie in the temporary directory, and are removed."""
    piece = int(piece_mib * 1024 * 1024)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as directory:
        source = os.path.join(directory, "source")
        block = os.urandom(1 << 20)
        with open(source, "wb") as file:
            for number in range(mib):
                file.write(number.to_bytes(8, "big") + block[8:])
        process = context.Process(target=_send, args=(theirs, source, piece, encrypt))
        process.start()
        try:
            target = os.path.join(directory, "target")
            result = trio.run(_receive, ours, target, mib * (1 << 20) // piece, piece, encrypt, frames)
            result["equal"] = _equal(source, target)
        finally:
            process.join(10)
            process.kill()
    return result


def _equal(one: str, other: str) -> bool:
    with open(one, "rb") as first, open(other, "rb") as second:
        while True:
            a, b = first.read(1 << 22), second.read(1 << 22)
            if a != b:
                return False
            if not a:
                return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--piece-mib", type=float, default=4)
    parser.add_argument("--encrypt", action="store_true")
    parser.add_argument("--frames", type=int, default=0, help="also measure this many exchanges of a control message")
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.mib, arguments.piece_mib, arguments.encrypt, arguments.frames)))


if __name__ == "__main__":
    main()
