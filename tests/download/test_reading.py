"""Content read while it arrives: order, what is held back, who is told when bytes were wrong, and when the work stops."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import trio

from swarm.download.reading import Reader
from swarm.download.request import FetchRequest
from swarm.edges import Source
from swarm.errors import Interrupted, OriginUnreachable, SwarmError
from tests.download.scene import URL, Content, Scene, play

Span = Callable[[int], tuple[int, int]]


def everything(length: int) -> tuple[int, int]:
    return 0, length


def request(content: Content, **more: object) -> FetchRequest:
    return FetchRequest(Source(URL), digest=content.digest, **more)  # type: ignore[arg-type]


async def rest_of(reader: Reader) -> bytes:
    """What comes, to the end."""
    got = bytearray()
    while reader.start < reader.stop:
        limit = await reader.wait()
        piece = reader.slice(limit)
        assert piece is not None
        got += reader._stored.read(piece.offset, piece.length)
        reader.advance(piece.length)
        piece.release()
    return bytes(got)


async def drain(reader: Reader) -> None:
    """To the end, without looking."""
    while reader.start < reader.stop:
        reader.advance(await reader.wait() - reader.start)


def test_a_reader_gets_the_content_in_order_while_it_arrives() -> None:
    content = Content(5)

    async def main(scene: Scene) -> None:
        reader = await scene.service.read(request(content), everything)
        assert await reader.wait() < content.geometry.length
        assert not reader.complete
        assert await rest_of(reader) == content.bytes
        assert reader.complete
        reader.close()

    play(main, content=content)


def test_the_last_piece_waits_for_the_digest_of_the_whole() -> None:
    content, wrong = Content(4), Content(4, seed=2)
    wrong.digest = content.digest

    async def main(scene: Scene) -> None:
        scene.origin.content = wrong
        reader = await scene.service.read(request(content), everything)
        with pytest.raises(SwarmError):
            await drain(reader)
        assert reader.start == content.geometry.offset(3)
        reader.close()

    play(main, content=content)


def test_nothing_is_given_out_before_the_digest_where_that_is_asked_for() -> None:
    content = Content(4)

    async def main(scene: Scene) -> None:
        reader = await scene.service.read(request(content), everything, strict=True)
        assert await reader.wait() == content.geometry.length
        assert reader.complete
        reader.close()

    play(main, content=content)


def test_bytes_given_out_that_turn_out_wrong_end_the_answer_short() -> None:
    """A member vouched for wrong bytes: the reader that got them must not be told that all is well."""
    content, other = Content(4), Content(4, seed=2)

    async def main(scene: Scene) -> None:
        liar = scene.peer().takes_part([0, 1]).serves(content.mixed(other, [0]))
        scene.origin.open = trio.Event()
        reader = await scene.service.read(request(content), everything)
        reader.advance(await reader.wait() - reader.start)
        assert liar.pieces_asked
        scene.origin.open.set()
        with pytest.raises(Interrupted, match="turned out wrong"):
            await drain(reader)
        reader.close()

    play(main, content=content)


def test_a_range_fetches_its_pieces_only() -> None:
    content = Content(6)
    start = content.geometry.offset(3)

    async def main(scene: Scene) -> None:
        reader = await scene.service.read(request(content), lambda _length: (start + 5, start + 10), prefix=False)
        assert await rest_of(reader) == content.bytes[start + 5 : start + 10]
        reader.close()
        await trio.sleep(5)
        assert set(scene.origin.pieces_read) == {3}

    play(main, content=content)


def test_a_second_range_goes_on_where_the_first_one_ended() -> None:
    content = Content(6)

    async def main(scene: Scene) -> None:
        for piece in (4, 1):
            start = content.geometry.offset(piece)
            reader = await scene.service.read(request(content), lambda _length, at=start: (at, at + 10), prefix=False)  # type: ignore[misc]
            with trio.fail_after(1):
                assert await rest_of(reader) == content.bytes[start : start + 10]
            reader.close()
        reader = await scene.service.read(request(content), everything)
        assert await rest_of(reader) == content.bytes
        reader.close()
        assert sorted(scene.origin.pieces_read) == list(range(6))

    play(main, content=content)


def test_a_fetch_after_a_range_has_everything() -> None:
    content = Content(6)

    async def main(scene: Scene) -> None:
        reader = await scene.service.read(request(content), lambda _length: (10, 20), prefix=False)
        await reader.wait()
        fetched, stored = await scene.service.fetch(request(content))
        assert (fetched.digest, stored.read(0, len(content.bytes))) == (content.digest, content.bytes)
        stored.close()
        reader.close()
        assert sorted(scene.origin.pieces_read) == list(range(6))

    play(main, content=content)


def test_the_last_bytes_of_a_range_need_no_digest() -> None:
    """What lazy loaders read first is the end."""
    content = Content(6)

    async def main(scene: Scene) -> None:
        reader = await scene.service.read(request(content), lambda length: (length - 47, length), prefix=False)
        assert await rest_of(reader) == content.bytes[-47:]
        assert set(scene.origin.pieces_read) == {5}
        reader.close()

    play(main, content=content)


def test_readers_and_a_fetch_share_one_download() -> None:
    content = Content(5)

    async def main(scene: Scene) -> None:
        readers = [await scene.service.read(request(content), everything) for _ in range(20)]
        got: list[bytes] = []

        async def take(reader: Reader) -> None:
            got.append(await rest_of(reader))
            reader.close()

        async with trio.open_nursery() as nursery:
            for reader in readers:
                nursery.start_soon(take, reader)
            fetched, stored = await scene.service.fetch(request(content))
            stored.close()
        assert got == [content.bytes] * 20
        assert fetched.digest == content.digest
        assert sorted(scene.origin.pieces_read) == list(range(5))

    play(main, content=content)


def test_what_a_reader_waits_for_is_asked_first() -> None:
    content = Content(40)

    async def main(scene: Scene) -> None:
        peer = scene.peer().takes_part(range(40))
        reader = await scene.service.read(FetchRequest(None, digest=content.digest, length=len(content.bytes)), everything)
        start = content.geometry.offset(30)
        second = await scene.service.read(
            FetchRequest(None, digest=content.digest), lambda _length: (start, start + 10), prefix=False
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.wait)
            nursery.start_soon(second.wait)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert {0, 30} & set(peer.pieces_asked[:2])
        peer.serves(content)
        reader.close()
        second.close()

    play(main, content=content)


def test_a_reader_that_goes_away_stops_work_nobody_else_needs() -> None:
    content = Content(40)

    async def main(scene: Scene) -> None:
        scene.origin.seconds_a_piece = 1.0
        reader = await scene.service.read(request(content), everything)
        await reader.wait()
        reader.close()
        await trio.sleep(5)
        read = len(scene.origin.reads)
        await trio.sleep(30)
        assert len(scene.origin.reads) == read < 40
        assert not scene.service.activity()

    play(main, content=content)


def test_a_reader_that_goes_away_leaves_the_others_theirs() -> None:
    content = Content(10)

    async def main(scene: Scene) -> None:
        first = await scene.service.read(request(content), everything)
        second = await scene.service.read(request(content), everything)
        await first.wait()
        first.close()
        assert await rest_of(second) == content.bytes
        second.close()

    play(main, content=content)


def test_a_fetch_that_is_cancelled_leaves_a_reader_its_range() -> None:
    content = Content(10)

    async def main(scene: Scene) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.service.fetch, request(content))
            await trio.sleep(0.3)
            start = content.geometry.offset(8)
            reader = await scene.service.read(request(content), lambda _length: (start, start + 1), prefix=False)
            nursery.cancel_scope.cancel()
        assert await rest_of(reader) == content.bytes[start : start + 1]
        reader.close()

    play(main, content=content)


def test_a_reader_is_told_when_the_origin_fails() -> None:
    content = Content(5)

    async def main(scene: Scene) -> None:
        scene.origin.error, scene.origin.stops_after = OriginUnreachable("gone"), 300_000
        reader = await scene.service.read(request(content, length=len(content.bytes)), everything)
        with trio.fail_after(60), pytest.raises(SwarmError):
            await drain(reader)
        reader.close()

    play(main, content=content)


def test_a_known_length_saves_asking_the_origin() -> None:
    content = Content(3)

    async def main(scene: Scene) -> None:
        reader = await scene.service.read(request(content, length=len(content.bytes)), everything)
        assert await rest_of(reader) == content.bytes
        assert scene.origin.heads == 0
        reader.close()

    play(main, content=content)


def test_a_range_that_is_not_there_leaves_no_work_behind() -> None:
    content = Content(3)

    def refuse(length: int) -> tuple[int, int]:
        raise Interrupted("no such range")

    async def main(scene: Scene) -> None:
        with pytest.raises(Interrupted, match="no such range"):
            await scene.service.read(request(content), refuse)
        await trio.sleep(100)
        assert not scene.service.activity()
        assert not scene.origin.reads

    play(main, content=content)


def test_empty_content_ends_at_once() -> None:
    content = Content(0)

    async def main(scene: Scene) -> None:
        reader = await scene.service.read(request(content, length=0), everything)
        assert await reader.wait() == 0
        await trio.sleep(1)
        assert reader.complete
        reader.close()

    play(main, content=content)


def test_private_content_stays_off_an_open_network() -> None:
    content = Content(3)

    async def main(scene: Scene) -> None:
        scene.membership.is_open = True
        reader = await scene.service.read(request(content, private=True, share=True), everything)
        assert await rest_of(reader) == content.bytes
        assert not scene.discovery.log
        reader.close()
        entry = next(entry for entry in scene.store.entries())
        assert entry.private

    play(main, content=content)


@pytest.mark.parametrize("seed", range(5))
def test_readers_that_come_and_go_at_random_all_get_what_they_asked_for(seed: int) -> None:
    content = Content(12)
    rng = Random(seed)

    async def main(scene: Scene) -> None:
        async def client() -> None:
            await trio.sleep(rng.random() * 2)
            start = rng.randrange(len(content.bytes))
            stop = rng.randrange(start, len(content.bytes)) + 1
            reader = await scene.service.read(
                request(content), lambda _length: (start, stop), prefix=rng.random() < 0.3, strict=rng.random() < 0.1
            )
            with trio.move_on_after(rng.choice((0.05, 1e9))):
                assert await rest_of(reader) == content.bytes[start:stop]
            reader.close()

        with trio.fail_after(300):
            async with trio.open_nursery() as nursery:
                for _ in range(30):
                    nursery.start_soon(client)
        assert len(scene.origin.reads) <= 12 + 4

    play(main, content=content)
