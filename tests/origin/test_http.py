"""HTTP origins on a web in memory: versions, ranges, redirects, credentials, retries, and servers that lie."""

from __future__ import annotations

import gc
import gzip
import itertools
import zlib
from collections.abc import Awaitable, Callable

import pytest
import trio

from swarm.edges import Address, OriginInfo, Source
from swarm.errors import (
    ContentChanged,
    LocalProtocolError,
    NotFoundAtOrigin,
    OriginError,
    OriginRefused,
    OriginUnreachable,
    SwarmError,
)
from swarm.origin.origin import OriginReader, OriginSettings
from tests.origin.web import CONTENT, DATE, ETAG, MODIFIED, Asked, Reply, Web, content_reply, replace, take

SOURCE = Source("http://files.example/model.bin")
V1 = OriginInfo(len(CONTENT), f"etag:{ETAG}", True, ETAG)


def fails(
    web: Web,
    kind: type[SwarmError],
    match: str | None = None,
    source: Source = SOURCE,
    act: str = "read",
    *,
    start: int = 0,
    stop: int | None = None,
    expect: OriginInfo | None = None,
) -> SwarmError:
    """What comes of reading (or asking for the head of) a source that cannot be read."""
    found: list[SwarmError] = []

    async def main(reader: OriginReader) -> None:
        with pytest.raises(kind, match=match) as caught:
            await (reader.head(source) if act == "head" else take(reader, source, start, stop, expect))
        found.append(caught.value)

    web(main)
    assert type(found[0]) is kind
    return found[0]


def site(handler: Callable[[Asked], Reply | Awaitable[Reply | None]] = content_reply) -> Web:
    web = Web()
    web.serve("files.example", handler)
    return web


# --- what an honest server gives -----------------------------------------------------------------------------------


def test_a_head_tells_length_validator_and_ranges() -> None:
    async def act(reader: OriginReader) -> None:
        assert await reader.head(SOURCE) == V1

    web = site()
    web(act)
    assert [asked.method for asked in web.asked] == ["HEAD"]
    assert web.asked[0].headers["accept-encoding"] == "identity"


def test_ranges_are_read_over_one_kept_connection() -> None:
    async def act(reader: OriginReader) -> None:
        info = await reader.head(SOURCE)
        got = [await take(reader, SOURCE, a, a + 100_000, info) for a in range(0, 700_000, 100_000)]
        assert b"".join(got) == CONTENT[:700_000]

    web = site()
    web(act)
    assert {asked.connection for asked in web.asked} == {1}
    assert {asked.headers.get("if-range") for asked in web.asked[1:]} == {ETAG}


def test_a_caller_that_stops_at_its_last_byte_leaves_the_connection_usable() -> None:
    async def act(reader: OriginReader) -> None:
        for stop in (200_000, 300_000, 200_000):  # the last chunk is a large or a small one
            async with reader.read(SOURCE, 0, stop, expect=V1) as body:
                size = 0
                async for chunk in body.chunks():
                    size += len(chunk)
                    if size == stop:
                        break

    web = site()
    web(act)
    assert {asked.connection for asked in web.asked} == {1}


def test_a_whole_read_asks_for_no_range() -> None:
    async def act(reader: OriginReader) -> None:
        assert await take(reader, SOURCE, expect=V1) == CONTENT
        assert await take(reader, SOURCE, 0, len(CONTENT), V1) == CONTENT

    web = site()
    web(act)
    assert all("range" not in asked.headers for asked in web.asked)


def test_chunks_are_neither_tiny_nor_huge() -> None:
    async def dribble(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(CONTENT))
        for at in range(0, len(CONTENT), 1400):
            await asked.stream.send_all(CONTENT[at : at + 1400])
            await trio.sleep(0.001)

    async def act(reader: OriginReader) -> None:
        async with reader.read(SOURCE) as body:
            sizes = [len(chunk) async for chunk in body.chunks()]
        assert sum(sizes) == len(CONTENT)
        assert min(sizes[:-1]) >= 64 * 1024
        assert max(sizes) <= 1024 * 1024

    web = site(dribble)
    web(act)


def test_on_a_slow_link_bytes_are_not_held_back_for_long() -> None:
    async def slow(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        for _ in range(100):
            await asked.stream.send_all(b"x" * 1000)
            await trio.sleep(0.1)

    async def act(reader: OriginReader) -> None:
        async with reader.read(SOURCE) as body:
            sizes = [len(chunk) async for chunk in body.chunks()]
        assert sum(sizes) == 100_000
        assert max(sizes) < 10_000

    web = site(slow)
    web(act)


def test_reading_backwards_or_nothing_is_our_own_bug() -> None:
    for start, stop in ((5, 5), (5, 4), (-1, 4)):
        fails(site(), LocalProtocolError, start=start, stop=stop)


# --- versions: two never mix -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("etag", ['"v2"', "", 'W/"v1"'])
def test_a_whole_answer_of_another_version_is_refused(etag: str) -> None:
    fails(site(lambda asked: content_reply(asked, etag=etag)), ContentChanged, expect=V1)


def test_a_range_of_another_version_is_refused_where_if_range_makes_it_whole() -> None:
    fails(site(lambda asked: content_reply(asked, etag='"v2"')), ContentChanged, start=5, stop=90, expect=V1)


def test_a_range_of_another_version_from_a_server_without_if_range_is_refused() -> None:
    def careless(asked: Asked) -> Reply:
        headers = {name: value for name, value in asked.headers.items() if name != "if-range"}
        return content_reply(replace(asked, headers=headers), etag='"v2"')

    fails(site(careless), ContentChanged, start=5, stop=90, expect=V1)


def test_a_changed_length_under_the_same_etag_is_refused() -> None:
    fails(site(lambda asked: content_reply(asked, CONTENT + b"x")), ContentChanged, start=5, stop=90, expect=V1)
    fails(site(lambda asked: content_reply(asked, CONTENT + b"x")), ContentChanged, expect=V1)
    fails(site(lambda asked: content_reply(asked, CONTENT[:50])), ContentChanged, start=60, stop=90, expect=V1)


def test_a_changed_modification_time_is_refused() -> None:
    plain = OriginInfo(len(CONTENT), f"lm:{MODIFIED}:{len(CONTENT)}", True, MODIFIED)

    def newer(asked: Asked) -> Reply:
        return content_reply(asked, etag="", last_modified="Wed, 01 Jan 2020 00:00:01 GMT")

    fails(site(newer), ContentChanged, expect=plain)
    fails(site(newer), ContentChanged, start=5, stop=90, expect=plain)

    async def act(reader: OriginReader) -> None:
        assert await reader.head(SOURCE) == plain
        assert await take(reader, SOURCE, 5, 90, plain) == CONTENT[5:90]

    site(lambda asked: content_reply(asked, etag=""))(act)


def test_an_answer_that_does_not_say_its_version_is_not_believed_to_be_the_same() -> None:
    plain = OriginInfo(len(CONTENT), f"lm:{MODIFIED}:{len(CONTENT)}", True, MODIFIED)
    silent = site(lambda asked: Reply(200, {}, CONTENT))
    fails(silent, ContentChanged, expect=plain)
    fails(silent, ContentChanged, expect=V1)

    def silent_range(asked: Asked) -> Reply:
        return Reply(206, {"content-range": f"bytes 5-89/{len(CONTENT)}"}, CONTENT[5:90])

    for expect in (plain, V1):
        fails(site(silent_range), ContentChanged, start=5, stop=90, expect=replace(expect, if_range=""))


def test_a_range_that_answers_if_range_need_not_repeat_the_version() -> None:
    async def act(reader: OriginReader) -> None:
        assert await take(reader, SOURCE, 5, 90, V1) == CONTENT[5:90]

    site(lambda asked: Reply(206, {"content-range": f"bytes 5-89/{len(CONTENT)}"}, CONTENT[5:90]))(act)


def test_a_date_that_is_not_a_second_old_is_no_if_range() -> None:
    async def act(reader: OriginReader) -> None:
        info = await reader.head(SOURCE)
        assert info.validator.startswith("lm:")
        assert info.if_range == ""

    site(lambda asked: content_reply(asked, etag="", last_modified=DATE))(act)


@pytest.mark.parametrize(
    ("rule", "validator"), [("etag", f"etag:{ETAG}"), ("last-modified", f"lm:{MODIFIED}:{len(CONTENT)}"), ("none", "")]
)
def test_a_rule_by_url_chooses_the_validator(rule: str, validator: str) -> None:
    async def act(reader: OriginReader) -> None:
        assert (await reader.head(SOURCE)).validator == validator

    rules = (("http://files.example/", rule), ("http://files", "none"), ("http://other", "none"))
    site()(act, OriginSettings(validators=rules))


# --- servers without HEAD, ranges, lengths ---------------------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 405, 501])
def test_where_head_is_refused_the_first_byte_tells(status: int) -> None:
    def no_head(asked: Asked) -> Reply:
        return Reply(status) if asked.method == "HEAD" else content_reply(asked)

    async def act(reader: OriginReader) -> None:
        assert await reader.head(SOURCE) == V1

    web = site(no_head)
    web(act)
    assert [(asked.method, asked.headers.get("range")) for asked in web.asked] == [("HEAD", None), ("GET", "bytes=0-0")]


def test_where_head_is_refused_and_content_is_empty_the_length_is_zero() -> None:
    def no_head(asked: Asked) -> Reply:
        return Reply(405) if asked.method == "HEAD" else content_reply(asked, b"")

    async def act(reader: OriginReader) -> None:
        assert (await reader.head(SOURCE)).length == 0

    site(no_head)(act)


def test_a_server_that_ignores_ranges_gives_the_whole_and_says_where_it_starts() -> None:
    def whole(asked: Asked) -> Reply:
        return Reply(200, {"etag": ETAG}, CONTENT)

    async def act(reader: OriginReader) -> None:
        for stop in (400_000, None):
            async with reader.read(SOURCE, 300_000, stop, expect=V1) as body:
                assert (body.start, body.length) == (0, len(CONTENT))
                assert b"".join([chunk async for chunk in body.chunks()]) == CONTENT[:stop]

    site(whole)(act)


def test_a_server_known_to_ignore_ranges_is_not_asked_for_one() -> None:
    async def act(reader: OriginReader) -> None:
        assert await take(reader, SOURCE, 5, 90, replace(V1, ranges=False)) == CONTENT[5:90]

    web = site()
    web(act)
    assert "range" not in web.asked[0].headers


def test_a_server_without_length_is_read_to_its_end() -> None:
    async def chunked(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        if asked.method == "GET":
            for at in range(0, len(CONTENT), 50_000):
                part = CONTENT[at : at + 50_000]
                await asked.stream.send_all(b"%x\r\n%b\r\n" % (len(part), part))
            await asked.stream.send_all(b"0\r\n\r\n")

    async def act(reader: OriginReader) -> None:
        info = await reader.head(SOURCE)
        assert info == OriginInfo(None, "", False, "")
        async with reader.read(SOURCE, expect=info) as body:
            assert body.length is None
            assert b"".join([chunk async for chunk in body.chunks()]) == CONTENT

    web = site(chunked)
    web(act)


def test_a_body_of_one_byte_chunks_lets_others_run() -> None:
    async def chunked(asked: Asked) -> None:
        await asked.stream.send_all(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n"
        )

    async def act(reader: OriginReader) -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            async with reader.read(SOURCE) as body:
                chunks = body.chunks()
                nursery.start_soon(other)
                assert sum([len(chunk) async for chunk in chunks]) == 20_000
            assert turns > 200
            nursery.cancel_scope.cancel()

    web = site(chunked)
    web(act)


# --- servers that lie about ranges -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        {"content-range": "bytes 0-84/700001"},
        {"content-range": "bytes 6-90/700001"},
        {"content-range": "bytes 5-90/700001"},
        {"content-range": "bytes 5-89/80"},
        {"content-range": "bytes 89-5/700001"},
        {"content-range": "bytes */700001"},
        {"content-range": "bytes 5-89"},
        {"content-range": "items 5-89/700001"},
        {"content-range": "bytes -5-89/700001"},
        {"content-range": "bytes 5-" + "9" * 30 + "/*"},
        {"content-range": "bytes \u0665-89/700001".encode().decode("latin-1")},
        {"content-range": ""},
        {"content-type": "multipart/byteranges; boundary=x"},
        {"content-encoding": "gzip"},
    ],
)
def test_a_range_that_is_not_the_one_asked_for_is_refused(lie: dict[str, str]) -> None:
    def liar(asked: Asked) -> Reply:
        return Reply(206, {"etag": ETAG, "content-range": "bytes 5-89/700001"} | lie, CONTENT[5:90])

    fails(site(liar), OriginError, "files.example", start=5, stop=90, expect=V1)


def test_more_than_the_range_asked_for_is_refused_even_if_it_is_consistent() -> None:
    def generous(asked: Asked) -> Reply:
        return Reply(206, {"etag": ETAG, "content-range": f"bytes 5-99/{len(CONTENT)}"}, CONTENT[5:100])

    fails(site(generous), OriginError, "not the range", start=5, stop=90, expect=V1)


def test_a_length_that_contradicts_the_range_is_refused_before_a_byte_is_taken() -> None:
    def liar(asked: Asked) -> Reply:
        return Reply(206, {"etag": ETAG, "content-range": f"bytes 5-89/{len(CONTENT)}"}, CONTENT[5:80])

    fails(site(liar), OriginError, "contradicts", start=5, stop=90, expect=V1)


def test_a_range_nobody_asked_for_is_refused() -> None:
    fails(site(lambda asked: Reply(206, {"content-range": "bytes 0-89/90"}, CONTENT[:90])), OriginError)


def test_a_range_longer_than_its_header_says_is_refused() -> None:
    async def liar(asked: Asked) -> None:
        await asked.stream.send_all(
            b"HTTP/1.1 206 OK\r\ncontent-range: bytes 5-89/700001\r\ntransfer-encoding: chunked\r\n\r\n64\r\n" + b"x" * 100
        )
        await asked.stream.send_all(b"\r\n0\r\n\r\n")

    web = site(liar)
    fails(web, OriginError, "more than", start=5, stop=90)


def test_a_range_shorter_than_its_header_says_is_not_taken_for_whole() -> None:
    async def liar(asked: Asked) -> None:
        await asked.stream.send_all(
            b"HTTP/1.1 206 OK\r\ncontent-range: bytes 5-89/700001\r\ntransfer-encoding: chunked\r\n\r\n32\r\n" + b"x" * 50
        )
        await asked.stream.send_all(b"\r\n0\r\n\r\n")

    web = site(liar)
    fails(web, OriginUnreachable, "50 bytes of 85", start=5, stop=90)


def test_a_server_that_gives_less_than_was_asked_is_read_on_by_the_caller() -> None:
    def stingy(asked: Asked) -> Reply:
        first = int(asked.headers["range"].removeprefix("bytes=").partition("-")[0])
        return content_reply(replace(asked, headers={**asked.headers, "range": f"bytes={first}-{min(first + 99, 249)}"}))

    async def act(reader: OriginReader) -> None:
        got = b""
        while len(got) < 250:
            async with reader.read(SOURCE, len(got), 250, expect=V1) as body:
                try:
                    async for chunk in body.chunks():
                        got += chunk
                except OriginUnreachable:
                    continue
        assert got == CONTENT[:250]

    site(stingy)(act)


def test_a_start_beyond_the_end_is_an_error_not_a_hang() -> None:
    fails(site(), OriginError, "no bytes from 800000 on", start=800_000)


def test_two_different_lengths_are_refused() -> None:
    async def smuggler(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd")

    web = site(smuggler)
    fails(web, OriginUnreachable, "not HTTP")


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "99999999999999999999", "\xb2"])
def test_a_length_that_is_none_is_refused(length: str) -> None:
    async def liar(asked: Asked) -> None:
        await asked.stream.send_all(f"HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n".encode("latin-1"))

    web = site(liar)
    with pytest.raises(OriginError):
        raise fails_any(web)


def fails_any(web: Web) -> SwarmError:
    found: list[SwarmError] = []

    async def main(reader: OriginReader) -> None:
        with pytest.raises(OriginError) as caught:
            await take(reader, SOURCE)
        found.append(caught.value)

    web(main)
    return found[0]


def test_headers_without_end_are_cut_off() -> None:
    async def endless(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\n")
        while True:
            await asked.stream.send_all(b"x: " + b"y" * 8000 + b"\r\n")

    web = site(endless)
    fails(web, OriginUnreachable, "not HTTP")


def test_a_body_longer_than_its_length_is_cut_at_its_length() -> None:
    async def liar(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabcdefgh")

    async def act(reader: OriginReader) -> None:
        assert await take(reader, SOURCE) == b"abcd"

    web = site(liar)
    web(act)


# --- connections that break -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [0, 1, 300_000, len(CONTENT) - 1])
def test_a_truncated_body_is_never_taken_for_whole_and_what_came_is_good(sent: int) -> None:
    async def short(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(CONTENT) + CONTENT[:sent])

    async def act(reader: OriginReader) -> None:
        got = b""
        async with reader.read(SOURCE) as body:
            chunks = body.chunks()
            while len(got) < sent:
                got += await anext(chunks)
            with pytest.raises(OriginUnreachable):
                await anext(chunks)
        assert got == CONTENT[:sent]

    web = site(short)
    web(act)


def test_a_body_that_ends_by_closing_is_checked_against_the_known_length() -> None:
    web = site(lambda asked: Reply(200, {"etag": ETAG}, CONTENT[:-1], framed=False))
    fails(web, OriginUnreachable, "700000 bytes of 700001", expect=V1)


def test_a_body_that_stalls_is_given_up_after_ten_seconds_with_what_came() -> None:
    async def stall(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n0123456789")
        await trio.sleep(60)

    async def act(reader: OriginReader) -> None:
        began = trio.current_time()
        async with reader.read(SOURCE) as body:
            chunks = body.chunks()
            assert await anext(chunks) == b"0123456789"
            with pytest.raises(OriginUnreachable, match="nothing came for 10 s"):
                await anext(chunks)
        assert trio.current_time() - began == pytest.approx(10, abs=0.1)

    web = site(stall)
    web(act)


def test_a_body_of_one_byte_every_nine_seconds_is_given_up_too() -> None:
    async def drip(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
        while True:
            await asked.stream.send_all(b"x")
            await trio.sleep(9)

    async def act(reader: OriginReader) -> None:
        async with reader.read(SOURCE) as body:
            with pytest.raises(OriginUnreachable, match="bytes per second"):
                async for _ in body.chunks():
                    pass
        assert trio.current_time() < 50

    web = site(drip)
    web(act)


def test_headers_of_one_byte_every_nine_seconds_are_given_up_after_fifteen() -> None:
    async def drip(asked: Asked) -> None:
        for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n":
            await asked.stream.send_all(bytes([byte]))
            await trio.sleep(9)

    async def act(reader: OriginReader) -> None:
        began = trio.current_time()
        with pytest.raises(OriginUnreachable, match="no answer within 15 s"):
            await take(reader, SOURCE)
        assert trio.current_time() - began < 50

    web = site(drip)
    web(act)


def test_an_endless_procession_of_informational_answers_is_given_up() -> None:
    async def endless(asked: Asked) -> None:
        while True:
            await asked.stream.send_all(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
            await trio.sleep(1)

    web = site(endless)
    fails(web, OriginUnreachable, "no answer within 15 s")


def test_a_slow_reader_is_not_mistaken_for_a_slow_origin() -> None:
    async def act(reader: OriginReader) -> None:
        got = b""
        async with reader.read(SOURCE) as body:
            async for chunk in body.chunks():
                got += chunk
                await trio.sleep(100)
        assert got == CONTENT

    site()(act)


def test_a_kept_connection_that_the_server_closed_is_replaced_without_delay() -> None:
    async def once(asked: Asked) -> Reply | None:
        if asked.connection in served:
            return None
        served.add(asked.connection)
        return content_reply(asked)

    served: set[int] = set()

    async def act(reader: OriginReader) -> None:
        began = trio.current_time()
        for start in (1, 2, 3):
            assert await take(reader, SOURCE, start, 90, V1) == CONTENT[start:90]
        assert trio.current_time() == began

    site(once)(act)


def test_leaving_a_body_half_way_leaves_nothing_behind() -> None:
    async def act(reader: OriginReader) -> None:
        for _ in range(3):
            async with reader.read(SOURCE) as body:
                async for _ in body.chunks():
                    break
            async with reader.read(SOURCE):
                pass
        gc.collect()  # an async generator left to the collector would warn here, and warnings are errors

    site()(act)


def test_cancelling_at_any_moment_leaves_nothing_behind() -> None:
    async def slow(asked: Asked) -> None:
        await trio.sleep(1)
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 200000\r\n")
        await trio.sleep(1)
        await asked.stream.send_all(b"\r\n" + b"x" * 100_000)
        await trio.sleep(1)
        await asked.stream.send_all(b"x" * 100_000)

    async def act(reader: OriginReader) -> None:
        for moment in (0.0, 0.5, 1.5, 2.5, 3.5):
            with trio.move_on_after(moment):
                await take(reader, SOURCE)
        gc.collect()
        assert len(await take(reader, SOURCE)) == 200_000

    web = site(slow)
    web(act, OriginSettings(connections_per_host=1))


def test_a_body_in_use_counts_against_the_hosts_connections() -> None:
    async def act(reader: OriginReader) -> None:
        async with reader.read(SOURCE), reader.read(SOURCE):
            with trio.move_on_after(100) as waited:
                await take(reader, SOURCE)
            assert waited.cancelled_caught
        assert await take(reader, SOURCE) == CONTENT

    web = site()
    web(act, OriginSettings(connections_per_host=2))
    assert len(web.dialled) == 3


# --- answers that are errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "match"),
    [
        (401, OriginRefused, "--header"),
        (403, OriginRefused, "--header"),
        (404, NotFoundAtOrigin, "check the URL"),
        (410, NotFoundAtOrigin, "410"),
        (204, OriginError, "204"),
        (304, OriginError, "304"),
        (400, OriginError, "400"),
        (418, OriginError, "418"),
        (505, OriginError, "505"),
    ],
)
@pytest.mark.parametrize("act", ["read", "head"])
def test_a_refusal_is_told_at_once_with_host_and_status(status: int, kind: type[SwarmError], match: str, act: str) -> None:
    web = site(lambda asked: Reply(status, {}, b"" if status in (204, 304) else b"secret reason"))
    error = fails(web, kind, match, act=act)
    assert "http://files.example/model.bin" in str(error)
    assert str(status) in str(error)
    assert "reason" not in str(error)
    assert len(web.asked) <= 2


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_passing_failure_is_tried_again(status: int, method: str) -> None:
    def flaky(asked: Asked) -> Reply:
        return Reply(status, {}, b"busy") if len(web.asked) < 4 else content_reply(asked)

    async def act(reader: OriginReader) -> None:
        if method == "HEAD":
            assert await reader.head(SOURCE) == V1
        else:
            assert await take(reader, SOURCE, expect=V1) == CONTENT
        assert 1 < trio.current_time() < 4

    web = site(flaky)
    web(act)
    assert len({asked.connection for asked in web.asked}) == 1


def test_a_lasting_failure_is_given_up_with_status_and_attempts() -> None:
    web = site(lambda asked: Reply(503))
    assert "answered 503 (5 attempts)" in str(fails(web, OriginUnreachable))
    assert len(web.asked) == 5


def test_two_nodes_do_not_come_back_at_the_same_moments() -> None:
    def moments(seed: int) -> list[float]:
        times: list[float] = []

        def busy(asked: Asked) -> Reply:
            times.append(trio.current_time())
            return Reply(503)

        async def act(reader: OriginReader) -> None:
            with pytest.raises(OriginUnreachable):
                await take(reader, SOURCE)

        site(busy)(act, seed=seed)
        return [round(b - a, 6) for a, b in itertools.pairwise(times)]

    assert moments(1) == moments(1)
    assert all(a != b for a, b in zip(moments(1), moments(2), strict=True))


@pytest.mark.parametrize("wait", ["7", "Thu, 02 Jan 2020 00:00:07 GMT"])
def test_retry_after_is_honoured(wait: str) -> None:
    def busy(asked: Asked) -> Reply:
        return Reply(429, {"retry-after": wait, "date": DATE}) if len(web.asked) == 1 else content_reply(asked)

    async def act(reader: OriginReader) -> None:
        began = trio.current_time()
        assert await take(reader, SOURCE) == CONTENT
        assert 7 <= trio.current_time() - began < 8.1

    web = site(busy)
    web(act)


def test_retry_after_counts_for_other_reads_of_the_host() -> None:
    def busy(asked: Asked) -> Reply:
        return Reply(429, {"retry-after": "7"}) if len(web.asked) == 1 else content_reply(asked)

    async def act(reader: OriginReader) -> None:
        async def other() -> None:
            await trio.sleep(1)
            began = trio.current_time()
            await take(reader, Source("http://files.example/other"))
            assert trio.current_time() - began >= 6

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, reader, SOURCE)
            nursery.start_soon(other)

    web = site(busy)
    web(act)


def test_a_retry_after_beyond_the_budget_fails_at_once_and_says_so() -> None:
    async def act(reader: OriginReader) -> None:
        began = trio.current_time()
        with pytest.raises(OriginUnreachable, match="asks to wait 86400 s"):
            await take(reader, SOURCE)
        assert trio.current_time() == began

    web = site(lambda asked: Reply(503, {"retry-after": "86400"}))
    web(act)
    assert len(web.asked) == 1


def test_the_budget_bounds_all_retries_together() -> None:
    async def act(reader: OriginReader) -> None:
        began = trio.current_time()
        with pytest.raises(OriginUnreachable):
            await take(reader, SOURCE)
        assert trio.current_time() - began <= 30

    web = site(lambda asked: Reply(503, {"retry-after": "9"}))
    web(act, OriginSettings(retries=1000))
    assert 2 <= len(web.asked) <= 4


def test_an_origin_that_is_down_is_left_alone_after_three_reads() -> None:
    async def act(reader: OriginReader) -> None:
        for _ in range(3):
            with pytest.raises(OriginUnreachable):
                await take(reader, SOURCE)
        asked = len(web.asked)
        began = trio.current_time()
        with pytest.raises(OriginUnreachable, match="left alone"):
            await take(reader, SOURCE)
        assert 0.5 <= trio.current_time() - began <= 1
        assert len(web.asked) == asked
        with pytest.raises(OriginUnreachable, match="503"):  # a HEAD goes out all the same
            await reader.head(SOURCE)
        up.append(True)
        await trio.sleep(61)
        assert await take(reader, SOURCE) == CONTENT

    up: list[bool] = []
    web = site(lambda asked: content_reply(asked) if up else Reply(503))
    web(act)


def test_a_refused_connection_is_tried_again_and_then_told() -> None:
    web = site()
    web.refuse.add(Address(web.names["files.example"][0], 80))
    assert "cannot connect: Connection refused (5 attempts)" in str(fails(web, OriginUnreachable))
    assert len(web.dialled) == 5


def test_an_unknown_host_is_told_at_once() -> None:
    web = site()
    fails(web, OriginUnreachable, "there is no host nowhere.example", source=Source("http://nowhere.example/"))
    assert web.dialled == []


def test_dns_that_does_not_answer_is_told_within_fifteen_seconds() -> None:
    async def act(reader: OriginReader) -> None:
        began = trio.current_time()
        with pytest.raises(OriginUnreachable):
            await take(reader, SOURCE)
        assert trio.current_time() - began <= 15

    async def silent(host: str, port: int) -> list[str]:
        await trio.sleep_forever()
        raise AssertionError

    async def servfail(host: str, port: int) -> list[str]:
        import socket

        await trio.sleep(1)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    for resolver in (silent, servfail):
        web = site()
        web.resolve = resolver  # type: ignore[method-assign]  # that is the test
        web(act)


# --- content codings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coding", "coded"),
    [
        ("gzip", gzip.compress(CONTENT)),
        ("x-gzip", gzip.compress(CONTENT[:5]) + gzip.compress(CONTENT[5:])),
        ("deflate", zlib.compress(CONTENT)),
        ("deflate", zlib.compress(CONTENT, wbits=-15)),
        ("identity", CONTENT),
    ],
)
def test_a_server_that_insists_on_compressing_is_decoded(coding: str, coded: bytes) -> None:
    async def act(reader: OriginReader) -> None:
        info = await reader.head(SOURCE)
        assert info.validator == f"etag:{ETAG}"
        if coding != "identity":
            assert (info.length, info.ranges) == (None, False)
        assert await take(reader, SOURCE, expect=info) == CONTENT
        assert await take(reader, SOURCE, 5, 500_000, expect=info) == CONTENT[5:500_000]

    site(lambda asked: Reply(200, {"content-encoding": coding, "etag": ETAG}, coded))(act)


def test_an_archive_labelled_as_compressed_stays_an_archive() -> None:
    archive = gzip.compress(CONTENT)

    async def act(reader: OriginReader) -> None:
        info = await reader.head(SOURCE)
        assert info.length == len(archive)
        assert await take(reader, SOURCE, expect=info) == archive

    site(lambda asked: content_reply(asked, archive, content_encoding="x-gzip", content_type="application/x-gzip"))(act)


def test_a_compressed_bomb_is_stopped_with_bounded_memory() -> None:
    coded = gzip.compress(bytes(16 << 20)) * 64
    biggest = total = 0

    async def act(reader: OriginReader) -> None:
        async def drink() -> None:
            nonlocal biggest, total
            async with reader.read(SOURCE) as body:
                async for chunk in body.chunks():
                    biggest, total = max(biggest, len(chunk)), total + len(chunk)

        with pytest.raises(OriginError, match="expands"):
            await drink()

    assert len(coded) < 1_100_000
    site(lambda asked: Reply(200, {"content-encoding": "gzip"}, coded))(act)
    assert biggest <= 1 << 20
    assert total <= 256 << 20


def test_a_compressed_body_that_ends_early_is_not_taken_for_whole() -> None:
    web = site(lambda asked: Reply(200, {"content-encoding": "gzip"}, gzip.compress(CONTENT)[:-9]))
    fails(web, OriginUnreachable, "early")


def test_a_body_that_is_not_compressed_as_it_says_is_refused() -> None:
    web = site(lambda asked: Reply(200, {"content-encoding": "gzip"}, b"not gzip at all"))
    fails(web, OriginError, "not compressed")


@pytest.mark.parametrize("act", ["head", "read"])
def test_a_coding_nobody_asked_for_and_nobody_can_undo_is_refused(act: str) -> None:
    fails(site(lambda asked: Reply(200, {"content-encoding": "br"}, b"x")), OriginError, "coding", act=act)
