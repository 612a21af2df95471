"""file:// origins: regular files, for the local user, of one version."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio

from swarm.edges import Source
from swarm.egress import EgressPolicy
from swarm.errors import (
    ConfigError,
    ContentChanged,
    LocalProtocolError,
    NotFoundAtOrigin,
    NotPermitted,
    OriginError,
    OriginRefused,
    SwarmError,
)
from swarm.origin.origin import OriginReader
from tests.origin.web import take

CONTENT = os.urandom(3_000_001)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file.bin"
    path.write_bytes(CONTENT)
    return path


def run(act: Callable[[OriginReader], Awaitable[object]]) -> None:
    async def main() -> None:
        with trio.fail_after(20):
            async with OriginReader(EgressPolicy()) as reader:
                await act(reader)

    trio.run(main)


def fails(source: Source, kind: type[SwarmError], match: str) -> None:
    async def act(reader: OriginReader) -> None:
        with pytest.raises(kind, match=match):
            await reader.head(source)
        with pytest.raises(kind, match=match):
            await take(reader, source)

    run(act)


def test_a_file_is_read_whole_and_in_ranges(file: Path) -> None:
    async def act(reader: OriginReader) -> None:
        source = Source(file.as_uri())
        info = await reader.head(source)
        assert (info.length, info.ranges) == (len(CONTENT), True)
        assert info.validator
        assert await take(reader, source, expect=info) == CONTENT
        assert await take(reader, source, 5, 2_500_000, info) == CONTENT[5:2_500_000]
        assert await take(reader, source, 2_999_999, 9_000_000, info) == CONTENT[2_999_999:]
        async with reader.read(source, expect=info) as body:
            assert max([len(chunk) async for chunk in body.chunks()]) <= 1 << 20

    run(act)


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    async def act(reader: OriginReader) -> None:
        (tmp_path / "empty").touch()
        source = Source((tmp_path / "empty").as_uri())
        assert (await reader.head(source)).length == 0
        assert await take(reader, source) == b""

    run(act)


@pytest.mark.parametrize("requester", ["mirror", "proxy", "job", "peer", ""])
def test_nobody_but_the_local_user_may_name_a_file(file: Path, requester: str) -> None:
    fails(Source(file.as_uri(), requester=requester), NotPermitted, "local user")


def test_a_symbolic_link_is_followed(file: Path, tmp_path: Path) -> None:
    async def act(reader: OriginReader) -> None:
        (tmp_path / "current").symlink_to(file)
        assert await take(reader, Source((tmp_path / "current").as_uri())) == CONTENT

    run(act)


def test_what_is_no_regular_file_is_refused_and_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("/dev/tty")):
        fails(Source(path.as_uri()), OriginError, "not a regular file")


def test_a_missing_file_is_not_found(file: Path) -> None:
    fails(Source(file.as_uri() + "x"), NotFoundAtOrigin, "there is no file")
    fails(Source(file.as_uri() + "/x"), NotFoundAtOrigin, "there is no file")


def test_a_file_without_permission_says_whose_it_must_be(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # the tests may run as root, to whom nothing is refused
    fails(Source(file.as_uri()), OriginRefused, "daemon's user")


@pytest.mark.parametrize("url", ["file://host/x", "file:x", "file:///a%00b", "file://"])
def test_a_file_url_that_names_no_local_path_is_refused(url: str) -> None:
    fails(Source(url), ConfigError, "file:///path")


def test_a_file_that_changed_since_is_not_mixed(file: Path) -> None:
    async def act(reader: OriginReader) -> None:
        source = Source(file.as_uri())
        info = await reader.head(source)
        for change in (lambda: file.write_bytes(CONTENT[::-1]), lambda: file.write_bytes(CONTENT + b"x")):
            change()
            with pytest.raises(ContentChanged):
                await take(reader, source, 5, 90, info)

    run(act)


def test_a_file_replaced_by_one_of_the_same_time_and_size_is_another(file: Path) -> None:
    def swap() -> None:
        status = file.stat()
        other = file.with_name("other")
        other.write_bytes(CONTENT[::-1])
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.rename(file)

    async def act(reader: OriginReader) -> None:
        source = Source(file.as_uri())
        info = await reader.head(source)
        swap()
        with pytest.raises(ContentChanged):
            await take(reader, source, expect=info)

    run(act)


def test_a_file_that_changes_while_it_is_read_is_noticed(file: Path) -> None:
    async def collect(chunks: AsyncIterator[bytes | memoryview]) -> list[bytes | memoryview]:
        return [chunk async for chunk in chunks]

    def restore() -> None:
        file.write_bytes(CONTENT)

    async def act(reader: OriginReader) -> None:
        source = Source(file.as_uri())
        for change in (lambda: os.truncate(file, 2_000_000), lambda: file.write_bytes(CONTENT[::-1])):
            async with reader.read(source) as body:
                chunks = body.chunks()
                await anext(chunks)
                change()
                with pytest.raises(ContentChanged):
                    await collect(chunks)
            restore()

    run(act)


def test_no_descriptor_is_left_open(file: Path) -> None:
    async def act(reader: OriginReader) -> None:
        source = Source(file.as_uri())
        info = await reader.head(source)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            assert await reader.head(source) == info
            async with reader.read(source, expect=info) as body:
                await anext(body.chunks())
            with pytest.raises(OriginError):
                await reader.head(Source(file.parent.as_uri()))
        assert len(os.listdir("/proc/self/fd")) == before

    run(act)


def test_reading_nothing_is_our_own_bug(file: Path) -> None:
    async def act(reader: OriginReader) -> None:
        with pytest.raises(LocalProtocolError):
            await take(reader, Source(file.as_uri()), 5, 5)

    run(act)


def test_http_is_not_imported_for_a_file(file: Path) -> None:
    async def act(reader: OriginReader) -> None:
        await take(reader, Source(file.as_uri()))
        assert reader._http is None

    run(act)
