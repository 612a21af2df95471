"""A thousand clients in one process, for `tests.benchmarks.mirror`: what they cost must not hide what the mirror costs.

    python -m tests.benchmarks.pulling ADDRESS PORT PATH CLIENTS [--requests N]

Without ``--requests`` every client downloads the path once, all at the same time; one in a hundred keeps what it gets and
checks its digest, the others count bytes.  With it, they ask for the path again and again over connections that are kept,
N times in all.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Final

CHECKED: Final = 100  # one client in so many keeps its bytes
_CHUNK: Final = 1 << 20


@dataclass(slots=True)
class Client:
    """One connection and what came over it."""

    socket: socket.socket
    head: bytearray = field(default_factory=bytearray)
    status: int = 0
    left: int = -1
    first: float = 0.0
    digest: hashlib._Hash | None = None

    def take(self, buffer: bytearray, now: float) -> bool:
        """Take in what is there; returns whether that was the end."""
        if self.left < 0:
            return self._take_head(now)
        wanted = min(self.left, len(buffer))
        if self.digest is None:
            # Dropped by the kernel: a thousand clients would otherwise copy a hundred gigabytes.
            count = self.socket.recv_into(buffer, wanted, socket.MSG_TRUNC)
        else:
            count = self.socket.recv_into(buffer, wanted)
            self.digest.update(memoryview(buffer)[:count])
        self.left -= count
        return count == 0 or self.left == 0

    def _take_head(self, now: float) -> bool:
        received = self.socket.recv(4096)
        self.head += received
        head, found, body = bytes(self.head).partition(b"\r\n\r\n")
        if not found:
            return not received
        self.status = int(head.split(b" ", 2)[1])
        lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        self.left = int(lines[b"content-length"]) - len(body)
        self.first = now
        if self.digest is not None:
            self.digest.update(body)
        return self.left == 0


def download(address: str, port: int, request: bytes, clients: int, timeout: float) -> dict[str, object]:
    """All at once; returns counts of failures, the digests that the checked ones got, and times."""
    waiting = selectors.DefaultSelector()
    buffer = bytearray(_CHUNK)
    everybody = []
    began = time.monotonic()
    for number in range(clients):
        client = Client(socket.create_connection((address, port), timeout=timeout))
        client.digest = None if number % CHECKED else hashlib.sha256()
        client.socket.sendall(request)
        client.socket.setblocking(False)
        waiting.register(client.socket, selectors.EVENT_READ, client)
        everybody.append(client)
    connected = time.monotonic() - began
    running = clients
    while running and time.monotonic() - began < timeout:
        for key, _ in waiting.select(1):
            client = key.data
            try:
                ended = client.take(buffer, time.monotonic() - began)
            except BlockingIOError:
                continue
            except OSError:
                ended = True
            if ended:
                waiting.unregister(client.socket)
                client.socket.close()
                running -= 1
    failed = [it.status for it in everybody if it.status != 200 or it.left != 0]
    return {
        "seconds": time.monotonic() - began,
        "connected_s": connected,
        "last_first_byte_s": max((it.first for it in everybody), default=0.0),
        "errors": len(failed),
        "statuses": sorted(set(failed)),
        "digests": sorted({it.digest.hexdigest() for it in everybody if it.digest is not None and it.left == 0}),
    }


def repeat(address: str, port: int, request: bytes, clients: int, requests: int) -> dict[str, object]:
    """Requests over kept connections, each client waiting for its answer; returns the rate."""
    sockets = [socket.create_connection((address, port), timeout=30) for _ in range(clients)]
    errors = 0
    began = time.monotonic()
    for _ in range(max(1, requests // clients)):
        for it in sockets:
            it.sendall(request)
        for it in sockets:
            errors += not _whole_answer(it)
    seconds = time.monotonic() - began
    for it in sockets:
        it.close()
    done = max(1, requests // clients) * clients
    return {"seconds": seconds, "requests": done, "per_s": done / seconds, "errors": errors}


def _whole_answer(connection: socket.socket) -> bool:
    received = connection.recv(65536)
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    length = int(lines[b"content-length"])
    while len(body) < length:
        body += connection.recv(65536)
    return head.split(b" ", 2)[1] == b"200"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pulling")
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("clients", type=int)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--timeout", type=float, default=300)
    given = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    request = f"GET {given.path} HTTP/1.1\r\nHost: {given.address}:{given.port}\r\nAccept: */*\r\n\r\n".encode()
    if given.requests is None:
        found = download(given.address, given.port, request, given.clients, given.timeout)
    else:
        found = repeat(given.address, given.port, request, given.clients, given.requests)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
