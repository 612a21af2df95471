"""Origins over real sockets: real servers, broken connections, and refusals that send nothing."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from swarm.edges import OriginInfo, Source
from swarm.egress import EgressPolicy
from swarm.errors import ContentChanged, NotFoundAtOrigin, NotPermitted, OriginUnreachable
from swarm.origin.origin import OriginReader, OriginSettings
from tests.origin.test_tls import authority_file, server_context
from tests.origin.web import CONTENT, Asked, Handler, Reply, Web, content_reply, encode, take


class Served(Web):
    """The web in memory, on a real listener."""

    accepted = 0
    port = 0

    @contextlib.asynccontextmanager
    async def listening(self, handler: Handler, host: str = "127.0.0.1") -> AsyncIterator[Served]:
        async def accept(stream: trio.SocketStream) -> None:
            self.accepted += 1
            await self._serve(stream, host, handler, self.accepted)

        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(functools.partial(trio.serve_tcp, accept, 0, host=host))
            self.port = listeners[0].socket.getsockname()[1]
            yield self
            nursery.cancel_scope.cancel()


def run(act: Callable[[], Awaitable[object]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            await act()

    trio.run(main)


def test_ranges_come_over_one_real_connection() -> None:
    async def act() -> None:
        async with Served().listening(content_reply) as web, OriginReader(EgressPolicy()) as reader:
            source = Source(f"http://127.0.0.1:{web.port}/model.bin")
            info = await reader.head(source)
            parts = [
                await take(reader, source, a, min(a + 200_000, len(CONTENT)), info) for a in range(0, len(CONTENT), 200_000)
            ]
            assert b"".join(parts) == CONTENT
            assert web.accepted == 1

    run(act)


def test_many_readers_share_few_connections() -> None:
    async def act() -> None:
        async with (
            Served().listening(content_reply) as web,
            OriginReader(EgressPolicy(), OriginSettings(connections_per_host=4)) as reader,
        ):
            source = Source(f"http://127.0.0.1:{web.port}/model.bin")
            found: dict[int, bytes] = {}

            async def one(start: int) -> None:
                found[start] = await take(reader, source, start, start + 10_000)

            async with trio.open_nursery() as nursery:
                for start in range(0, 400_000, 10_000):
                    nursery.start_soon(one, start)
            assert b"".join(found[start] for start in sorted(found)) == CONTENT[:400_000]
            assert web.accepted <= 4

    run(act)


def test_resets_in_the_middle_are_survived_by_reading_on() -> None:
    async def flaky(asked: Asked) -> None:
        await asked.stream.send_all(encode(asked, content_reply(asked))[:150_000])
        await trio.testing.wait_all_tasks_blocked(0.001)  # a reset throws away what the other side has not read yet
        assert isinstance(asked.stream, trio.SocketStream)
        asked.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def act() -> None:
        async with Served().listening(flaky) as web, OriginReader(EgressPolicy()) as reader:
            source = Source(f"http://127.0.0.1:{web.port}/model.bin")
            expect = OriginInfo(len(CONTENT), 'etag:"v1"', True, '"v1"')
            got = b""
            while len(got) < len(CONTENT):
                before = len(got)
                with contextlib.suppress(OriginUnreachable):
                    async with reader.read(source, len(got), expect=expect) as body:
                        assert body.start == len(got)
                        async for chunk in body.chunks():
                            got += chunk
                assert len(got) > before
            assert got == CONTENT
            assert web.accepted > 3

    run(act)


def test_a_connection_the_server_closed_while_idle_is_replaced() -> None:
    async def act() -> None:
        async with (
            Served().listening(lambda asked: Reply(200, {"connection": "close"}, CONTENT, framed=True)) as web,
            OriginReader(EgressPolicy()) as reader,
        ):
            source = Source(f"http://127.0.0.1:{web.port}/x")
            for _ in range(3):
                assert await take(reader, source) == CONTENT
            assert web.accepted == 3

    run(act)


DISGUISES = [
    "127.0.0.1",
    "127.1",
    "0x7f000001",
    "2130706433",
    "0177.0.0.1",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "localhost",
]


@pytest.mark.parametrize("host", DISGUISES)
def test_a_job_opens_no_real_connection_to_loopback_however_it_is_spelled(host: str) -> None:
    async def act() -> None:
        async with Served().listening(content_reply) as web, OriginReader(EgressPolicy()) as reader:
            with pytest.raises(NotPermitted):
                await reader.head(Source(f"http://{host}:{web.port}/", requester="job"))
            assert await take(reader, Source(f"http://{host}:{web.port}/")) == CONTENT
            assert web.accepted == 1

    run(act)


def test_nothing_listens_is_told_soon() -> None:
    async def act() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        async with OriginReader(EgressPolicy(), OriginSettings(retries=1)) as reader:
            with pytest.raises(OriginUnreachable, match="Connection refused"):
                await reader.head(Source(f"http://127.0.0.1:{port}/"))

    run(act)


def test_tls_over_real_sockets_brings_large_chunks(tmp_path: Path) -> None:
    context = server_context(tmp_path, "localhost")

    async def act() -> None:
        web = Served()

        async def wrap(stream: trio.abc.Stream) -> trio.abc.Stream:
            return trio.SSLStream(stream, context, server_side=True, https_compatible=True)

        web.tls = wrap
        settings = OriginSettings(ca=(("localhost", authority_file(tmp_path)),))
        async with web.listening(content_reply), OriginReader(EgressPolicy(), settings) as reader:
            source = Source(f"https://localhost:{web.port}/model.bin")
            async with reader.read(source) as body:
                chunks = [chunk async for chunk in body.chunks()]
            assert b"".join(chunks) == CONTENT
            assert min(map(len, chunks[:-1])) >= 64 * 1024
            assert await take(reader, source, 7, 99) == CONTENT[7:99]
            assert web.accepted == 1

    run(act)


# --- the standard library's server: HTTP/1.0, no ranges, a thread per connection -----------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "model.bin").write_bytes(CONTENT)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(10)
    server.server_close()


def test_a_server_without_ranges_or_etags_is_read_from_the_start(plain_server: str, tmp_path: Path) -> None:
    def change() -> None:
        (tmp_path / "model.bin").write_bytes(CONTENT[::-1])
        os.utime(tmp_path / "model.bin", (1, 1))  # Last-Modified has whole seconds

    async def act() -> None:
        async with OriginReader(EgressPolicy()) as reader:
            source = Source(f"{plain_server}/model.bin")
            info = await reader.head(source)
            assert info.length == len(CONTENT)
            assert info.validator.startswith("lm:")
            async with reader.read(source, 300_000, 400_000, expect=info) as body:
                assert body.start == 0
                assert b"".join([chunk async for chunk in body.chunks()]) == CONTENT[:400_000]
            with pytest.raises(NotFoundAtOrigin):
                await reader.head(Source(f"{plain_server}/other"))
            change()
            with pytest.raises(ContentChanged):
                await take(reader, source, 5, 90, info)

    run(act)


def test_an_idle_daemon_does_not_load_the_http_stack() -> None:
    code = "import sys, swarm.origin.origin; print(sorted({'httpcore', 'httpx', 'h11', 'anyio', 'certifi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
