"""Clients that are slow, gone, many or hostile; registries and disks that fail; and that bytes are verified or not sent."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
from pathlib import Path

import pytest
import structlog
import trio

from swarm.errors import NotPermitted, OriginUnreachable
from swarm.mirror import routes as routes_module
from swarm.mirror import server as server_module
from swarm.mirror.paths import ClientCredentials
from tests.mirror.desk import NAME, NS, Desk, digest_of, play, random_bytes, runs

BIG = random_bytes(2_000_000, seed=7)
PIECE = 256 * 1024


# --- connections ------------------------------------------------------------------------------------------------------


@runs()
async def test_one_connection_carries_many_requests(desk: Desk) -> None:
    digest = desk.registry.blob(BIG)
    client = await desk.connect()
    async with client.stream:
        for _ in range(3):
            assert (await client.get(desk.blob(digest))).body == BIG
            assert (await client.get("/v2/")).status == 200
            assert (await client.get(desk.blob(digest), method="HEAD")).status == 200
            assert (await client.get("/v2/nothing")).status == 404


@runs()
async def test_requests_may_follow_before_the_answer(desk: Desk) -> None:
    digest = desk.registry.blob(BIG)
    client = await desk.connect()
    async with client.stream:
        request = f"GET {desk.blob(digest)} HTTP/1.1\r\nHost: localhost\r\n"
        got = await client.raw(f"{request}\r\n{request}Connection: close\r\n\r\n".encode())
    assert got.count(b"HTTP/1.1 200") == 2
    assert got.count(BIG) == 2


@runs()
async def test_a_client_that_offers_another_protocol_is_answered_in_this_one(desk: Desk) -> None:
    """As curl --http2 does; also one that waits to be told to go on."""
    client = await desk.connect()
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
    async with client.stream:
        first = b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\n" + offer + b"\r\n"
        second = b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n"
        last = b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        got = await client.raw(first + second + last)
    assert got.count(b"HTTP/1.1 200") == 3


@runs()
async def test_an_old_client_gets_its_answer_and_the_end(desk: Desk) -> None:
    client = await desk.connect()
    async with client.stream:
        got = await client.raw(b"GET /v2/ HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 200")
    assert got.endswith(b"\r\n\r\n{}")


@runs()
async def test_t18_a_refused_request_ends_the_connection_and_what_follows_is_not_read(desk: Desk) -> None:
    client = await desk.connect()
    async with client.stream:
        smuggled = b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
        head = b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        got = await client.raw(head + b"0\r\n\r\n" + smuggled)
    assert got.startswith(b"HTTP/1.1 400")
    assert got.count(b"HTTP/1.1") == 1
    assert json.loads(got.partition(b"\r\n\r\n")[2])["errors"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "a b", "localhost@evil"])
def test_t17_a_name_that_is_not_ours_is_refused(host: str) -> None:
    async def script(desk: Desk) -> None:
        client = await desk.connect()
        async with client.stream:
            got = await client.raw(f"GET {desk.manifest('v1')} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert got[9:12] in (b"403", b"400")
        assert not desk.registry.asked

    play(script)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7402", "[::1]:7402", "10.1.2.3", "mirror.internal:80"])
def test_addresses_and_configured_names_are_ours(host: str) -> None:
    async def script(desk: Desk) -> None:
        assert (await desk.get("/v2/", host=host)).status == 200

    play(script, hosts=("mirror.internal",))


@runs()
async def test_t17_a_web_page_cannot_ask(desk: Desk) -> None:
    reply = await desk.get(desk.manifest("v1"), ("Origin", "http://evil.example"))
    assert reply.status == 403
    assert not desk.registry.asked


@pytest.mark.parametrize(
    ("line", "status"),
    [("GET http://10.0.0.5/ HTTP/1.1", b"400"), ("CONNECT 10.0.0.5:443 HTTP/1.1", b"405"), ("OPTIONS * HTTP/1.1", b"405")],
)
def test_t17_it_is_no_open_proxy(line: str, status: bytes) -> None:
    async def script(desk: Desk) -> None:
        client = await desk.connect()
        async with client.stream:
            got = await client.raw(f"{line}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert got[9:12] == status
        assert not desk.registry.asked

    play(script)


@runs()
async def test_t17_an_unlisted_registry_is_not_asked_anything(desk: Desk) -> None:
    for path in ("/v2/a/manifests/v1?ns=10.0.0.5", "/v2/evil.example/a/manifests/v1", "/v2/a/manifests/v1"):
        assert (await desk.get(path)).status == 403
    assert not desk.registry.asked


def test_a_client_beyond_the_limit_is_told_to_go_elsewhere_and_leaves_the_others_theirs() -> None:
    async def script(desk: Desk) -> None:
        digest = desk.registry.blob(BIG)
        first, second = await desk.connect(), await desk.connect()
        async with first.stream, second.stream:
            assert (await first.get("/v2/")).status == (await second.get("/v2/")).status == 200
            assert (await desk.get("/v2/")).status == 503
            assert (await first.get(desk.blob(digest))).body == BIG

    play(script, clients=2)


def test_a_client_that_drips_its_request_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.2)

    async def script(desk: Desk) -> None:
        client = await desk.connect()
        async with client.stream, trio.open_nursery() as nursery:

            async def drip() -> None:
                for byte in b"GET /v2/ HTTP/1.1\r\n" * 100:
                    await client.stream.send_all(bytes([byte]))
                    await trio.sleep(0.01)

            nursery.start_soon(drip)
            got = await client.stream.receive_some()
            nursery.cancel_scope.cancel()
        assert got.startswith(b"HTTP/1.1 408")

    play(script)


@runs()
async def test_clients_that_reset_their_connections_leave_no_errors_in_the_log(desk: Desk) -> None:
    with structlog.testing.capture_logs() as lines:
        for data in (b"", b"GET /v2/ HT", f"GET {desk.manifest('v1')} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) * 5:
            client = await desk.connect()
            client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await client.stream.send_all(data)
            await trio.aclose_forcefully(client.stream)
        await trio.sleep(0.1)
    assert not [line for line in lines if line["log_level"] in ("error", "warning")]


def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "IDLE_SECONDS", 0.1)

    async def script(desk: Desk) -> None:
        client = await desk.connect()
        async with client.stream:
            assert (await client.get("/v2/")).status == 200
            assert await client.raw(b"") == b""

    play(script)


# --- verified bytes, in order, while they arrive ----------------------------------------------------------------------


@runs()
async def test_bytes_go_out_while_the_blob_arrives(desk: Desk) -> None:
    digest = desk.registry.blob(BIG)
    desk.registry.open, desk.registry.holds_after = trio.Event(), 5 * PIECE
    client = await desk.connect()
    async with client.stream:
        await client.ask(desk.blob(digest))
        await client.event()
        got = bytearray()
        while len(got) < PIECE:
            got += (await client.event()).data
        assert not desk.service.is_here(digest)
        desk.registry.open.set()
        while len(got) < len(BIG):
            got += (await client.event()).data
    assert got == BIG


@runs()
async def test_the_last_piece_is_held_back_until_the_digest_matched(desk: Desk) -> None:
    """An origin (or a member) that lies about a blob: the client sees a short body, never a whole wrong one."""
    digest = desk.registry.blob(BIG)
    desk.registry.lies[digest] = random_bytes(len(BIG), seed=8)
    reply = await desk.get(desk.blob(digest))
    assert reply.cut or reply.status >= 500
    assert len(reply.body) < len(BIG) - PIECE // 2
    assert not desk.service.is_here(digest)


@runs()
async def test_a_small_blob_that_lies_is_an_error_and_no_byte(desk: Desk) -> None:
    digest = desk.registry.blob(b"right")
    desk.registry.lies[digest] = b"wrong"
    reply = await desk.get(desk.blob(digest))
    assert reply.status in (502, 504)
    assert b"wrong" not in reply.body


def test_in_digest_mode_no_byte_goes_out_before_the_digest_matched() -> None:
    async def script(desk: Desk) -> None:
        lying, right = desk.registry.blob(BIG), desk.registry.blob(BIG[::-1])
        desk.registry.lies[lying] = random_bytes(len(BIG), seed=8)
        assert (await desk.get(desk.blob(lying))).status in (502, 504)
        assert (await desk.get(desk.blob(right))).body == BIG[::-1]

    play(script, stream="digest")


@runs()
async def test_a_wrong_length_in_a_manifest_costs_a_try_not_the_blob(desk: Desk) -> None:
    registry = desk.registry
    digest = registry.blob(BIG)
    registry.manifest({"config": {**registry.descriptor(digest), "size": 10}, "layers": []}, tag="lying")
    assert (await desk.get(desk.manifest("lying"))).status == 200
    assert desk.catalogue.size(digest) == 10
    reply = await desk.get(desk.blob(digest))
    assert reply.status in (200, 502, 504)
    assert reply.status != 200 or reply.body == BIG
    assert (await desk.get(desk.blob(digest))).body == BIG


@runs()
async def test_r27_many_clients_of_one_blob_read_the_registry_once(desk: Desk) -> None:
    digest = desk.registry.blob(BIG)
    good = 0

    async def client() -> None:
        nonlocal good
        reply = await desk.get(desk.blob(digest))
        good += reply.body == BIG

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(client)
    assert good == 50
    assert desk.registry.sent[digest] == len(BIG)
    assert desk.tally.sent["registry.example", "origin"] >= len(BIG)


@runs()
async def test_ranges_and_whole_reads_share_one_download(desk: Desk) -> None:
    digest = desk.registry.blob(BIG)

    async def part(start: int, stop: int) -> None:
        reply = await desk.get(desk.blob(digest), ("Range", f"bytes={start}-{stop - 1}"))
        assert reply.body == BIG[start:stop]

    async def rest(start: int) -> None:
        reply = await desk.get(desk.blob(digest), ("Range", f"bytes={start}-"))
        assert reply.body == BIG[start:]

    async with trio.open_nursery() as nursery:
        for start in range(0, len(BIG), 300_000):
            nursery.start_soon(part, start, start + 1000)
            nursery.start_soon(rest, start)
    assert desk.registry.sent[digest] == len(BIG)


@pytest.mark.parametrize("came", [0, 5 * PIECE])
def test_r28_a_client_that_goes_away_leaves_nothing_and_its_work_stops(came: int) -> None:
    """Before its answer begins, and in the middle of it; noticed at once, not when a time is over."""

    async def script(desk: Desk) -> None:
        digest = desk.registry.blob(BIG)
        desk.registry.open, desk.registry.holds_after = trio.Event(), came
        for _ in range(20):
            client = await desk.connect()
            await client.ask(desk.blob(digest))
            if came:
                await client.event()
                await client.event()
            while not desk.registry.count("READ"):  # noqa: ASYNC110 - nobody has an event for it
                await trio.sleep(0.01)
            await trio.aclose_forcefully(client.stream)
        with trio.fail_after(10):
            while desk.tally.clients or desk.service.activity():  # noqa: ASYNC110 - nobody has an event for it
                await trio.sleep(0.02)

    play(script, seconds=40, answer_timeout=60.0, body_timeout=60.0)


@runs()
async def test_r28_a_client_that_goes_away_leaves_the_others_theirs(desk: Desk) -> None:
    digest = desk.registry.blob(BIG)
    desk.registry.open = trio.Event()
    leaves = await desk.connect()
    await leaves.ask(desk.blob(digest))
    async with trio.open_nursery() as nursery:

        async def stays() -> None:
            assert (await desk.get(desk.blob(digest))).body == BIG

        nursery.start_soon(stays)
        await trio.sleep(0.05)
        await trio.aclose_forcefully(leaves.stream)
        desk.registry.open.set()


@runs()
async def test_r30_a_reader_of_content_that_is_removed_gets_all_of_it(desk: Desk) -> None:
    """What is being read is in use; nothing evicts it."""
    content = random_bytes(20_000_000)
    digest = desk.registry.blob(content)
    await desk.get(desk.blob(digest))
    client = await desk.connect()
    async with client.stream:
        await client.ask(desk.blob(digest))
        await client.event()
        task = desk.store.entries()[0].task.id
        desk.service.release(task)
        with pytest.raises(NotPermitted):
            await desk.store.remove(task)
        got = bytearray()
        while len(got) < len(content):
            got += (await client.event()).data
    assert got == content


@runs()
async def test_stored_bytes_that_rotted_are_fetched_again_and_never_sent(desk: Desk) -> None:
    import os

    digest = desk.registry.blob(BIG)
    await desk.get(desk.blob(digest))
    for descriptor in desk.store._bodies.values():
        os.pwrite(descriptor, b"rot", 3 * PIECE + 5)
    for content in desk.store._contents.values():
        if content.pieces is not None:
            content.pieces.checked.setall(0)  # as after a restart
    reply = await desk.get(desk.blob(digest))
    assert reply.body == BIG
    assert desk.registry.sent[digest] == len(BIG) + PIECE


# --- failing fast -----------------------------------------------------------------------------------------------------


@runs(answer_timeout=0.5)
async def test_a_registry_that_never_answers_costs_a_status_within_the_time_set(desk: Desk) -> None:
    digest = desk.registry.blob(BIG)
    desk.registry.image(b"x")
    desk.registry.pause = 60
    for path in (desk.blob(digest), desk.manifest("v1"), f"/v2/{NAME.repository}/tags/list{NS}"):
        with trio.fail_after(2):
            assert (await desk.get(path)).status == 504


@runs(body_timeout=0.5)
async def test_a_body_that_stands_still_is_cut_short(desk: Desk) -> None:
    digest = desk.registry.blob(BIG)
    desk.registry.open, desk.registry.holds_after = trio.Event(), 5 * PIECE
    with trio.fail_after(5):
        reply = await desk.get(desk.blob(digest))
    assert reply.cut
    assert BIG.startswith(reply.body)
    assert desk.tally.cut["stalled"] == 1
    desk.registry.open.set()
    rest = await desk.get(desk.blob(digest), ("Range", f"bytes={len(reply.body)}-"))
    assert reply.body + rest.body == BIG, "as containerd goes on"


@pytest.mark.parametrize(
    ("error", "status"),
    [(OriginUnreachable("no route"), 502), (NotPermitted("private address"), 403)],
)
def test_what_fails_becomes_a_status_with_its_cause(error: Exception, status: int) -> None:
    async def script(desk: Desk) -> None:
        digest = desk.registry.blob(BIG)
        desk.registry.image(b"x")
        desk.registry.error = error  # type: ignore[assignment]
        for path in (desk.blob(digest), desk.manifest("v1")):
            reply = await desk.get(path)
            assert reply.status == status
            assert reply.errors[0]["message"] == str(error)

    play(script)


@runs()
async def test_a_disk_that_is_full_fails_one_pull_and_not_the_next(desk: Desk) -> None:
    big, small = desk.registry.blob(BIG), desk.registry.blob(b"small")
    desk.store._quota = 1_000_000
    assert (await desk.get(desk.blob(big))).status == 507
    assert (await desk.get(desk.blob(small))).body == b"small"


@runs()
async def test_a_bug_met_by_one_client_costs_the_others_nothing(desk: Desk) -> None:
    digest = desk.registry.blob(BIG)
    desk.registry.error = ZeroDivisionError()  # type: ignore[assignment]
    assert (await desk.get(desk.blob(digest))).status == 500
    desk.registry.error = None
    assert (await desk.get(desk.blob(digest))).body == BIG


def test_no_answer_is_429() -> None:
    """podman waits on it for half a minute instead of asking the registry."""
    sources = [Path(module.__file__ or "").read_text() for module in (routes_module, server_module)]
    assert not any("429" in source.replace("none is 429", "") for source in sources)


# --- rights -----------------------------------------------------------------------------------------------------------


@runs()
async def test_t19_no_byte_of_private_content_goes_to_who_may_not_read_it(desk: Desk) -> None:
    registry = desk.registry
    registry.private = True
    registry.denied = {None, "Basic wrong"}
    digest = registry.image(BIG)
    layer = digest_of(BIG)
    paths = (desk.manifest("v1"), desk.manifest(digest), desk.blob(layer))
    for path in paths:
        assert (await desk.get(path, ("Authorization", "Basic right"))).status == 200
    for path in paths:
        for headers in ((), (("Authorization", "Basic wrong"),)):
            for method in ("GET", "HEAD"):
                for more in ((), (("Range", "bytes=0-9"),), (("If-None-Match", f'"{layer}"'),)):
                    reply = await desk.get(path, *headers, *more, method=method)
                    assert reply.status == 401
                    assert reply.headers["www-authenticate"] == 'Basic realm="x"'
                    assert "docker-content-digest" not in reply.headers
                    assert BIG[:20] not in reply.body
    sent = dict(registry.sent)
    for path in paths:
        assert (await desk.get(path, ("Authorization", "Basic right"))).status == 200
    assert registry.sent == sent, "who may read it again reads it from here"


@runs()
async def test_t19_private_content_is_marked_in_the_store(desk: Desk) -> None:
    desk.registry.private = True
    digest = desk.registry.blob(BIG)
    await desk.get(desk.blob(digest))
    assert [entry.private for entry in desk.store.entries()] == [True]


def test_t23_a_secret_that_a_client_shows_is_in_no_log_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(desk: Desk) -> None:
        digest = desk.registry.blob(BIG)
        desk.registry.denied = {"Basic Y2FuYXJ5"}
        for path in (desk.blob(digest), desk.manifest("v1"), f"{desk.blob(digest)}&X-Amz-Signature=Y2FuYXJ5"):
            reply = await desk.get(path, ("Authorization", "Basic Y2FuYXJ5"), ("Cookie", "Y2FuYXJ5"))
            assert b"Y2FuYXJ5" not in reply.body

    structlog.reset_defaults()
    play(script)
    assert "mirror_answer" in (said := "".join(capsys.readouterr()))
    assert "Y2FuYXJ5" not in said
    assert "Y2FuYXJ5" not in repr(ClientCredentials("Basic Y2FuYXJ5"))


def test_t28_every_route_asks_for_the_right_before_it_answers() -> None:
    """Whoever adds a route to content without asking finds this test in the way."""

    async def script(desk: Desk) -> None:
        digest = desk.registry.image(BIG)
        desk.registry.denied = {None}
        for path in (desk.manifest("v1"), desk.manifest(digest), desk.blob(digest_of(BIG))):
            for method in ("GET", "HEAD"):
                assert (await desk.get(path, method=method)).status == 401
        assert desk.registry.sent == {}

    play(script)


# --- what is counted and said -----------------------------------------------------------------------------------------


@runs()
async def test_one_line_says_what_a_pull_was_and_where_it_came_from(desk: Desk) -> None:
    digest = desk.registry.image(BIG, BIG[::-1])
    with structlog.testing.capture_logs() as lines:
        client = await desk.connect()
        async with client.stream:
            manifest = await client.get(desk.manifest("v1"))
            document = json.loads(manifest.body)
            for child in (document["config"], *document["layers"]):
                assert hashlib.sha256((await client.get(desk.blob(child["digest"]))).body).hexdigest() == child["digest"][7:]
    pulled = [line for line in lines if line["event"] == "pulled"]
    assert len(pulled) == 1
    assert (pulled[0]["image"], pulled[0]["digest"]) == (f"{NAME}:v1", str(digest))
    assert (pulled[0]["blobs"], pulled[0]["not_asked"], pulled[0]["failed"]) == (3, 0, 0)
    assert pulled[0]["bytes"] == pulled[0]["from_origin"] == sum(len(b) for b in desk.registry.blobs.values())
    assert len(desk.pulls) == 0


@runs()
async def test_a_pull_that_goes_quiet_is_reported_too(desk: Desk) -> None:
    desk.registry.image(BIG)
    await desk.get(desk.manifest("v1"))
    with structlog.testing.capture_logs() as lines:
        desk.pulls.expire(trio.current_time() + 60)
    assert [line["not_asked"] for line in lines if line["event"] == "pulled"] == [2]


@runs()
async def test_bytes_are_counted_by_registry_and_source(desk: Desk) -> None:
    digest = desk.registry.blob(BIG)
    for _ in range(2):
        await desk.get(desk.blob(digest))
    assert desk.tally.sent == {("registry.example", "origin"): len(BIG), ("registry.example", "store"): len(BIG)}
    assert sum(desk.tally.first_byte.counts) == 2
    assert desk.tally.answers["registry.example", "blob", 200] == 2


@runs()
async def test_clients_cannot_make_rows_of_counters(desk: Desk) -> None:
    for number in range(100):
        await desk.get(f"/v2/a/manifests/v1?ns=r{number}.example")
    assert {registry for registry, _, _ in desk.tally.answers} == {"others"}


@runs()
async def test_a_client_that_waits_to_be_asked_shows_its_credentials_at_the_base(desk: Desk) -> None:
    """podman, CRI-O and skopeo answer a challenge here or none; containerd and Docker must not be held up by one."""
    asks = ("Docker-Distribution-Api-Version", "registry/2.0")
    asked = await desk.get("/v2/", asks)
    assert (asked.status, asked.headers["www-authenticate"]) == (401, 'Basic realm="registry"')
    assert (await desk.get("/v2/", asks, ("Authorization", "Basic Og=="))).status == 200
    plain = await desk.get("/v2/")
    assert (plain.status, plain.headers.get("www-authenticate")) == (200, None)
