"""A web in memory: names, addresses and servers that do whatever a test wants, on a virtual clock.

Servers are coroutines on a raw byte stream, so that hostile ones can send what no library would.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import trio
import trio.testing

from swarm.edges import Address, OriginInfo, Source
from swarm.egress import EgressPolicy, EgressSettings
from swarm.origin.origin import OriginReader, OriginSettings

CONTENT = hashlib.shake_256(b"content").digest(700_001)
ETAG = '"v1"'
MODIFIED = "Wed, 01 Jan 2020 00:00:00 GMT"
DATE = "Thu, 02 Jan 2020 00:00:00 GMT"


@dataclass(frozen=True)
class Asked:
    """A request as a server saw it."""

    host: str
    method: str
    target: str
    headers: Mapping[str, str]
    connection: int
    stream: trio.abc.Stream = field(repr=False)


@dataclass(frozen=True)
class Reply:
    """What a well-behaved server answers."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    framed: bool = True


Handler = Callable[[Asked], Reply | Awaitable[Reply | None]]
"""Returns a reply, or writes by itself through `asked.stream` and returns `None` to close."""


def content_reply(asked: Asked, content: bytes = CONTENT, **headers: str) -> Reply:
    """What nginx answers for a static file."""
    base = {"etag": ETAG, "last-modified": MODIFIED, "date": DATE, "accept-ranges": "bytes"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    base = {name: value for name, value in base.items() if value}
    wanted = asked.headers.get("range")
    if wanted and asked.headers.get("if-range", base.get("etag")) in (base.get("etag"), base.get("last-modified")):
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(len(content), int(last) + 1 if last else len(content))
        if start >= len(content):
            return Reply(416, base | {"content-range": f"bytes */{len(content)}"})
        return Reply(206, base | {"content-range": f"bytes {start}-{stop - 1}/{len(content)}"}, content[start:stop])
    return Reply(200, base, content)


class Web:
    """Names to addresses, and (host, port) to servers."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.handlers: dict[Address, tuple[str, Handler]] = {}
        self.asked: list[Asked] = []
        self.dialled: list[Address] = []
        self.refuse: set[Address] = set()
        self.tls: Callable[[trio.abc.Stream], Awaitable[trio.abc.Stream]] | None = None
        self.open = 0
        self._connections = 0
        self._nursery: trio.Nursery

    def serve(self, host: str, handler: Handler, *, address: str = "", port: int = 80) -> None:
        address = address or f"93.184.{len(self.names)}.1"
        self.names.setdefault(host, [address])
        self.handlers[Address(self.names[host][0], port)] = (host, handler)

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        import socket

        if host in self.names:
            return self.names[host]
        try:
            return [str(e[4][0]) for e in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)]
        except socket.gaierror as error:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from error

    async def connect(self, address: Address) -> trio.abc.Stream:
        self.dialled.append(address)
        await trio.lowlevel.checkpoint()
        if address not in self.handlers or address in self.refuse:
            raise ConnectionRefusedError(111, "refused")
        ours, theirs = trio.testing.memory_stream_pair()
        self._connections += 1
        self._nursery.start_soon(self._serve, theirs, *self.handlers[address], self._connections)
        return ours

    async def _serve(self, stream: trio.abc.Stream, host: str, handler: Handler, connection: int) -> None:
        self.open += 1
        try:
            if self.tls is not None:
                stream = await self.tls(stream)
            pending = b""
            while True:
                while b"\r\n\r\n" not in pending:
                    data = await stream.receive_some()
                    if not data:
                        return
                    pending += data
                head, _, pending = pending.partition(b"\r\n\r\n")
                asked = _parse(head, host, connection, stream)
                self.asked.append(asked)
                found = handler(asked)
                reply = found if isinstance(found, Reply) else await found
                if reply is None:
                    return
                await stream.send_all(encode(asked, reply))
                if not reply.framed:
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.open -= 1
            await trio.aclose_forcefully(stream)

    def __call__(
        self,
        act: Callable[[OriginReader], Awaitable[object]],
        settings: OriginSettings | None = None,
        allow: tuple[str, ...] = (),
        seed: int = 1,
    ) -> None:
        """Run `act` with a reader on this web."""

        async def main() -> None:
            with trio.fail_after(3600):
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    egress = EgressPolicy(EgressSettings(allow), resolver=self.resolve, connector=self.connect)
                    async with OriginReader(egress, settings, rng=random.Random(seed)) as reader:
                        await act(reader)
                    await trio.sleep(200)  # servers notice
                    assert self.open == 0, "a connection was left open"
                    nursery.cancel_scope.cancel()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def _parse(head: bytes, host: str, connection: int, stream: trio.abc.Stream) -> Asked:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Asked(host, method, target, headers, connection, stream)


def encode(asked: Asked, reply: Reply) -> bytes:
    length = {"content-length": str(len(reply.body))} if reply.framed else {}
    headers = length | dict(reply.headers)
    lines = [f"HTTP/1.1 {reply.status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (b"" if asked.method == "HEAD" else reply.body)


async def take(
    reader: OriginReader, source: Source, start: int = 0, stop: int | None = None, expect: OriginInfo | None = None
) -> bytes:
    """Bytes [start, stop), as a careful caller makes them of what comes."""
    async with reader.read(source, start, stop, expect=expect) as body:
        data = b"".join([chunk async for chunk in body.chunks()])
        return data[start - body.start :]


__all__ = ["CONTENT", "DATE", "ETAG", "MODIFIED", "Asked", "Reply", "Web", "content_reply", "encode", "replace", "take"]
