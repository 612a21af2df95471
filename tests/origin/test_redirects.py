"""Where an origin may send us, and what goes along: nothing that was given for somebody else."""

from __future__ import annotations

import base64
import logging
import traceback
from collections.abc import Callable

import pytest
import structlog
import trio

from swarm.edges import OriginInfo, Source
from swarm.errors import ConfigError, ContentChanged, NotFoundAtOrigin, NotPermitted, OriginError, OriginRefused, SwarmError
from swarm.origin.origin import OriginReader, OriginSettings
from tests.origin.test_http import SOURCE, V1, fails, site
from tests.origin.web import CONTENT, ETAG, Asked, Reply, Web, content_reply, take

INWARDS = [
    "127.0.0.1",
    "127.1",
    "0x7f000001",
    "2130706433",
    "0177.0.0.1",
    "[::1]",
    "[::ffff:7f00:1]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:7f00:1::]",
    "[fec0::1]",
    "[fe80::1%25eth0]",
    "[fd00:ec2::254]",
    "10.0.0.1",
    "100.64.0.1",
    "192.168.0.1",
    "0.0.0.0",  # noqa: S104 - never bound
    "169.254.169.254",
    "2852039166",
    "100.100.100.200",
    "metadata.google.internal",
]

CANARY = "c4n4ry-do-not-tell"
SECRET_HEADERS = (
    ("Authorization", f"Bearer {CANARY}"),
    ("Cookie", f"session={CANARY}"),
    ("X-Registry-Auth", CANARY),
    ("PRIVATE-TOKEN", CANARY),
    ("X-Amz-Security-Token", CANARY),
    ("Proxy-Authenticate", CANARY),
    ("Referer", f"http://files.example/{CANARY}"),
)


def to(location: str, status: int = 302) -> Callable[[Asked], Reply]:
    return lambda asked: Reply(status, {"location": location}, b"moved")


def reads(web: Web, source: Source = SOURCE, allow: tuple[str, ...] = ()) -> None:
    async def act(reader: OriginReader) -> None:
        assert await take(reader, source) == CONTENT

    web(act, allow=allow)


# --- where to ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", INWARDS)
def test_a_public_server_that_redirects_inwards_is_refused_with_nothing_dialled(host: str) -> None:
    for requester in ("user", "job"):
        web = site(to(f"http://{host}/latest/meta-data/"))
        fails(web, NotPermitted, r"egress\.allow", source=Source(SOURCE.url, requester=requester))
        assert len(web.dialled) == 1


def test_a_private_server_may_redirect_a_user_to_a_private_one_but_not_to_metadata() -> None:
    web = Web()
    web.serve("a.corp", to("http://b.corp/x"), address="10.0.0.1")
    web.serve("b.corp", content_reply, address="10.0.0.2")
    reads(web, Source("http://a.corp/x"))
    web.serve("a.corp", to("http://169.254.169.254/"), address="10.0.0.1")
    fails(web, NotPermitted, source=Source("http://a.corp/x"))


@pytest.mark.parametrize("location", ["file:///etc/passwd", "gopher://x/", "ftp://x/y", "data:,x", "javascript:1", "unix:/x"])
def test_a_redirect_to_another_scheme_is_refused(location: str) -> None:
    fails(site(to(location)), NotPermitted, "scheme")


@pytest.mark.parametrize(
    "location",
    ["", "http://", "http://[::1", "http://x:99999/", "http://a b/", "http://evil.example\\@x/", "http://\x01/", "http://x:0/",
     "http://" + "a" * 20_000, "//", "http://%31%32/", "http://a..\u00ad.b/"],
)  # fmt: skip
def test_a_redirect_to_nothing_useful_is_an_error_that_names_the_origin(location: str) -> None:
    error = fails(site(lambda asked: Reply(302, {"location": location.encode().decode("latin-1")})), OriginError)
    assert "files.example" in str(error)


def test_a_location_of_any_length_is_not_followed() -> None:
    fails(site(to("/" + "a" * 20_000)), OriginError, "usable Location")


def test_a_redirect_without_location_is_an_error() -> None:
    fails(site(lambda asked: Reply(302)), OriginError, "302")


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/other", "/other"),
        ("other?x=1#part", "/dir/other?x=1"),
        ("?x=%2F", "/dir/model.bin?x=%2F"),
        ("//files.example/y", "/y"),
        ("/with space/ü", "/with%20space/%C3%BC"),
        ("http://FILES.example:80", "/"),
    ],
)
def test_a_location_is_read_as_browsers_read_it(location: str, target: str) -> None:
    def handler(asked: Asked) -> Reply:
        if asked.target != "/dir/model.bin":
            return content_reply(asked)
        return Reply(301, {"location": location.encode().decode("latin-1")})

    web = site(handler)
    reads(web, Source("http://files.example/dir/model.bin"))
    assert web.asked[-1].target == target


def test_five_redirects_are_followed_and_six_are_not() -> None:
    def chain(asked: Asked) -> Reply:
        left = int(asked.target.removeprefix("/"))
        return content_reply(asked) if left == 0 else Reply(307, {"location": f"/{left - 1}"})

    reads(site(chain), Source("http://files.example/5"))
    fails(site(chain), OriginError, "more than 5 times", source=Source("http://files.example/6"))


def test_a_redirect_chain_stays_on_one_connection_per_host() -> None:
    def chain(asked: Asked) -> Reply:
        return content_reply(asked) if asked.target == "/end" else Reply(302, {"location": "/end"}, b"<html>moved</html>")

    web = Web()
    web.serve("files.corp", chain, address="10.0.0.1")
    reads(web, Source("http://files.corp/x"))
    assert len(web.dialled) == 1


# --- what goes along ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("url", ["http://files.example/model.bin", f"http://user:{CANARY}@files.example/model.bin"])
def test_another_host_gets_no_credential_of_the_asker(status: int, url: str) -> None:
    web = site(to("http://evil.example/collect", status))
    web.serve("evil.example", content_reply)
    headers = (*SECRET_HEADERS, ("Accept", "application/x"), ("User-Agent", "mine"))
    reads(web, Source(url, headers))
    first, second = web.asked
    for name, value in SECRET_HEADERS:
        assert first.headers[name.lower()] == value
        assert name.lower() not in second.headers
    assert second.headers == {
        "host": "evil.example",
        "accept": "application/x",
        "user-agent": "mine",
        "accept-encoding": "identity",
    }
    assert CANARY not in str(second.headers)


@pytest.mark.parametrize(
    "location", ["http://files.example:8080/x", "http://www.files.example/x", "http://files.example.evil/x"]
)
def test_another_port_or_name_is_another_host(location: str) -> None:
    web = site(to(location))
    web.serve("files.example", content_reply, port=8080)
    web.serve("www.files.example", content_reply)
    web.serve("files.example.evil", content_reply)
    reads(web, Source(SOURCE.url, SECRET_HEADERS))
    assert "authorization" in web.asked[0].headers
    assert CANARY not in str(web.asked[1].headers)


def test_the_same_host_keeps_the_credentials() -> None:
    web = site(lambda asked: content_reply(asked) if asked.target == "/x" else Reply(302, {"location": "/x"}))
    reads(web, Source(f"http://user:{CANARY}@files.example/model.bin", (("X-Token", "1"),)))
    assert [a.headers["x-token"] for a in web.asked] == ["1", "1"]
    assert len({a.headers["authorization"] for a in web.asked}) == 1


def test_credentials_do_not_come_back_when_the_chain_does() -> None:
    web = site(lambda asked: content_reply(asked) if asked.target == "/back" else Reply(302, {"location": "http://b.example/"}))
    web.serve("b.example", to("http://files.example/back"))
    reads(web, Source(SOURCE.url, SECRET_HEADERS))
    assert CANARY not in str(web.asked[2].headers)


def test_a_location_cannot_make_us_send_credentials_of_its_own() -> None:
    web = site(to("http://admin:admin@b.example/"))
    web.serve("b.example", content_reply)
    reads(web)
    assert "authorization" not in web.asked[1].headers


def test_userinfo_becomes_basic_credentials_and_leaves_the_url() -> None:
    web = site()
    reads(web, Source("http://us%40er:p%3Ass@files.example/model.bin?q=1"))
    assert web.asked[0].headers["authorization"] == "Basic " + base64.b64encode(b"us@er:p:ss").decode()
    assert web.asked[0].headers["host"] == "files.example"
    assert web.asked[0].target == "/model.bin?q=1"


def test_a_header_wins_over_userinfo() -> None:
    web = site()
    reads(web, Source("http://user:x@files.example/model.bin", (("authorization", "Bearer 1"),)))
    assert web.asked[0].headers["authorization"] == "Bearer 1"


def test_a_job_may_not_put_credentials_into_a_url() -> None:
    fails(site(), NotPermitted, "credentials", source=Source("http://u:p@files.example/", requester="job"))


def test_the_host_header_names_a_port_that_is_not_the_default() -> None:
    web = Web()
    web.serve("files.example", content_reply, port=8080)
    reads(web, Source("http://files.example:8080/x"))
    assert web.asked[0].headers["host"] == "files.example:8080"


def test_a_given_host_header_is_sent_once_and_not_along() -> None:
    web = site(to("http://b.example/"))
    web.serve("b.example", content_reply)
    reads(web, Source(SOURCE.url, (("Host", "virtual.example"),)))
    assert [a.headers["host"] for a in web.asked] == ["virtual.example", "b.example"]


@pytest.mark.parametrize(
    "header",
    [("Range", "bytes=0-1"), ("transfer-encoding", "chunked"), ("Content-Length", "5"), ("If-None-Match", "x"),
     ("Connection", "close"), ("Accept-Encoding", "gzip"), ("a b", "x"), ("", "x"), ("a\r\nb", "x"), ("x:", "y"),
     ("X", "a\r\nEvil: 1"), ("X", "a\nb"), ("X", "a\0"), ("X", " padded"), ("X-\xfc", "x")],
)  # fmt: skip
def test_a_header_that_would_change_the_request_is_refused_without_telling_its_value(header: tuple[str, str]) -> None:
    source = Source(SOURCE.url, (header, ("Authorization", CANARY)))
    web = site()
    error = fails(web, ConfigError, source=source)
    assert web.dialled == []
    assert CANARY not in str(error)
    assert "Evil" not in str(error)


def test_too_many_headers_are_refused() -> None:
    fails(site(), ConfigError, source=Source(SOURCE.url, tuple((f"x-{i}", "y") for i in range(65))))
    fails(site(), ConfigError, source=Source(SOURCE.url, (("x", "y" * 20_000),)))


@pytest.mark.parametrize("url", ["http://a_b.example/", "http://xn--bcher-kva.example/", "http://B\xfccher.example/"])
def test_odd_but_valid_host_names_are_dialled(url: str) -> None:
    web = Web()
    web.serve("a_b.example", content_reply)
    web.serve("xn--bcher-kva.example", content_reply)
    reads(web, Source(url))


@pytest.mark.parametrize(
    "url", ["http://a%2eb/", "http://a,b/", "http://a'b/", "http://a\\@b/", "http://[v1.x]/", "http://-a/"]
)
def test_host_names_that_parsers_disagree_about_are_refused(url: str) -> None:
    web = Web()
    fails(web, ConfigError, source=Source(url))
    assert web.dialled == []


def test_digits_in_disguise_are_checked_as_what_they_become() -> None:
    web = Web()
    fails(web, NotPermitted, source=Source("http://\u2460\u2461\u2466.0.0.1/", requester="job"))
    assert web.dialled == []


# --- connections are not a way around the policy ------------------------------------------------------------------


def test_a_job_cannot_ride_on_a_connection_a_user_opened_to_a_private_address() -> None:
    async def act(reader: OriginReader) -> None:
        assert await take(reader, Source("http://10.0.0.1/x")) == CONTENT
        with pytest.raises(NotPermitted):
            await take(reader, Source("http://10.0.0.1/x", requester="job"))
        assert await take(reader, Source("http://10.0.0.1/x")) == CONTENT

    web = Web()
    web.serve("10.0.0.1", content_reply, address="10.0.0.1")
    web(act)
    assert len(web.dialled) == 1
    assert len(web.asked) == 2


def test_a_redirect_from_a_public_server_cannot_ride_on_a_users_connection_either() -> None:
    async def act(reader: OriginReader) -> None:
        assert await take(reader, Source("http://10.0.0.1/x")) == CONTENT
        with pytest.raises(NotPermitted):
            await take(reader, SOURCE)

    web = site(to("http://10.0.0.1/x"))
    web.serve("10.0.0.1", content_reply, address="10.0.0.1")
    web(act)
    assert len(web.asked) == 2


def test_dns_rebinding_between_two_requests_is_refused() -> None:
    async def act(reader: OriginReader) -> None:
        source = Source(SOURCE.url, requester="job")
        assert await take(reader, source) == CONTENT
        web.names["files.example"] = ["127.0.0.1"]
        await trio.sleep(100)  # the kept connection is gone
        with pytest.raises(NotPermitted):
            await take(reader, source)

    web = site(lambda asked: Reply(200, {"connection": "close"}, CONTENT))
    web(act)
    assert len(web.dialled) == 1


def test_a_name_that_changes_between_check_and_dial_is_dialled_where_it_was_checked() -> None:
    async def rebinding(host: str, port: int) -> list[str]:
        looked_up.append(host)
        return ["93.184.0.1"] if len(looked_up) == 1 else ["127.0.0.1"]

    looked_up: list[str] = []
    web = Web()
    web.serve("files.example", content_reply, address="93.184.0.1")
    web.serve("inside", lambda asked: Reply(500), address="127.0.0.1")
    web.resolve = rebinding  # type: ignore[method-assign]  # that is the test
    reads(web, Source(SOURCE.url, requester="job"))
    assert [address.host for address in web.dialled] == ["93.184.0.1"]


# --- remembered chains --------------------------------------------------------------------------------------------


def bucket(signature: list[str]) -> Web:
    """A registry that redirects to a signed URL which may run out."""
    web = site(lambda asked: Reply(307, {"location": f"http://bucket.example/blob?sig={signature[0]}"}))
    web.serve(
        "bucket.example", lambda asked: content_reply(asked) if asked.target == f"/blob?sig={signature[0]}" else Reply(403)
    )
    return web


def hosts(web: Web) -> list[str]:
    return [asked.host.partition(".")[0] for asked in web.asked]


def test_a_chain_is_walked_once_a_minute() -> None:
    async def act(reader: OriginReader) -> None:
        for start in (1, 2, 3):
            assert await take(reader, SOURCE, start, 90, V1) == CONTENT[start:90]
        await trio.sleep(61)
        assert await take(reader, SOURCE, 4, 90, V1) == CONTENT[4:90]

    web = bucket(["1"])
    web(act)
    assert hosts(web) == ["files", "bucket", "bucket", "bucket", "files", "bucket"]


def test_a_signed_url_that_ran_out_is_fetched_anew() -> None:
    async def act(reader: OriginReader) -> None:
        assert await take(reader, SOURCE, 1, 90, V1) == CONTENT[1:90]
        signature[0] = "2"
        assert await take(reader, SOURCE, 2, 90, V1) == CONTENT[2:90]

    signature = ["1"]
    web = bucket(signature)
    web(act)
    assert hosts(web) == ["files", "bucket", "bucket", "files", "bucket"]


def test_a_target_that_keeps_refusing_is_told_as_refused() -> None:
    web = site(to("http://bucket.example/"))
    web.serve("bucket.example", lambda asked: Reply(403))
    fails(web, OriginRefused)
    assert len(web.asked) == 2


def test_a_chain_that_ends_elsewhere_since_is_walked_before_content_counts_as_changed() -> None:
    async def act(reader: OriginReader) -> None:
        assert await take(reader, SOURCE, 1, 90, V1) == CONTENT[1:90]
        latest[0] = "v2"
        assert await take(reader, SOURCE, 1, 90, v2) == CONTENT[::-1][1:90]
        with pytest.raises(ContentChanged):
            await take(reader, SOURCE, 1, 90, V1)

    v2 = OriginInfo(len(CONTENT), 'etag:"v2"', True, '"v2"')
    latest = ["v1"]
    web = site(lambda asked: Reply(302, {"location": f"/{latest[0]}"}) if asked.target == "/model.bin" else release(asked))

    def release(asked: Asked) -> Reply:
        return content_reply(asked, CONTENT if asked.target == "/v1" else CONTENT[::-1], etag=f'"{asked.target[1:]}"')

    web(act)


def test_what_was_learnt_with_one_credential_is_not_used_for_another() -> None:
    async def act(reader: OriginReader) -> None:
        for token in ("a", "b"):
            await take(reader, Source(SOURCE.url, (("Authorization", token),)), 1, 90, V1)
        await take(reader, Source(SOURCE.url, requester="job"), 1, 90, V1)

    web = bucket(["1"])
    web(act)
    assert hosts(web) == ["files", "bucket"] * 3


def test_a_head_walks_the_chain_itself_and_teaches_no_get() -> None:
    async def act(reader: OriginReader) -> None:
        assert (await reader.head(SOURCE)).validator == f"etag:{ETAG}"
        await take(reader, SOURCE, 1, 90, V1)
        await reader.head(SOURCE)

    web = bucket(["1"])
    web(act)
    assert hosts(web) == ["files", "bucket"] * 3


def test_remembered_chains_are_few() -> None:
    async def act(reader: OriginReader) -> None:
        for i in range(300):
            await take(reader, Source(f"{SOURCE.url}?{i}"), 1, 9)
        assert len(reader._http._remembered) <= 256  # type: ignore[union-attr]  # it is there by now

    bucket(["1"])(act)


def test_a_server_that_redirects_to_ever_new_hosts_does_not_collect_connections() -> None:
    async def act(reader: OriginReader) -> None:
        for _ in range(200):
            with pytest.raises(NotFoundAtOrigin):
                await take(reader, SOURCE)
        assert web.open <= 70
        assert len(reader._http._connections._hosts) <= 65  # type: ignore[union-attr]  # it is there by now

    count = 0

    def ever_new(asked: Asked) -> Reply:
        nonlocal count
        count += 1
        web.serve(f"h{count}.example", lambda asked: Reply(404))
        web.names[f"h{count}.example"] = [f"94.0.{count // 250}.{count % 250}"]
        web.serve(f"h{count}.example", lambda asked: Reply(404))
        return Reply(302, {"location": f"http://h{count}.example/"})

    web = site(ever_new)
    web(act)


# --- secrets -------------------------------------------------------------------------------------------------------


def everything_said(caplog: pytest.LogCaptureFixture, logs: list[dict[str, object]], error: BaseException | None) -> str:
    said = [caplog.text, repr([vars(record) for record in caplog.records]), repr(logs)]
    while error is not None:
        said += [repr(error), str(error), *traceback.format_exception(error)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(said)


@pytest.mark.parametrize("answer", ["ok", 401, 403, 404, 500, "moved", "loop", "garbage", "cut", "echo", "lookup", "range"])
def test_a_secret_is_in_no_log_and_no_error(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(asked: Asked) -> Reply | None:
        match answer:
            case int():
                return Reply(answer, {"set-cookie": CANARY, "retry-after": "1", "www-authenticate": CANARY}, CANARY.encode())
            case "ok":
                return content_reply(asked)
            case "moved":
                return Reply(302, {"location": f"http://b.example/?X-Amz-Signature={CANARY}&token={CANARY}"})
            case "loop":
                return Reply(302, {"location": f"http://u:{CANARY}@files.example/model.bin?token={CANARY}#{CANARY}"})
            case "garbage":
                await asked.stream.send_all(f"HTTP/1.1 {CANARY}\r\n{CANARY}\r\n\r\n".encode())
            case "echo":
                await asked.stream.send_all(f"HTTP/1.1 200 OK\r\nbad header {CANARY}\r\n\r\n".encode())
            case "cut":
                await asked.stream.send_all(f"HTTP/1.1 200 OK\r\ncontent-length: 99\r\nx: {CANARY}\r\n\r\n{CANARY}".encode())
            case "range":
                return Reply(206, {"content-range": CANARY, "content-type": CANARY, "etag": CANARY}, CANARY.encode())
        return None

    error: SwarmError | None = None

    async def act(reader: OriginReader) -> None:
        nonlocal error
        for read in (reader.head(source), take(reader, source, 1, 90, V1), take(reader, source)):
            try:
                await read
            except SwarmError as failure:
                error = failure

    host = "nowhere.example" if answer == "lookup" else "files.example"
    source = Source(f"http://user:{CANARY}@{host}/model.bin?X-Amz-Signature={CANARY}&token={CANARY}#{CANARY}", SECRET_HEADERS)
    caplog.set_level(logging.DEBUG)
    web = site(handler)
    web.serve("b.example", lambda asked: Reply(403, {}, CANARY.encode()))
    with structlog.testing.capture_logs() as logs:
        web(act)
    assert (error is None) == (answer == "ok")
    said = everything_said(caplog, [dict(entry) for entry in logs], error)
    assert answer == "lookup" or "files.example" in said
    assert CANARY not in said


def test_the_log_of_the_http_library_stays_quiet_even_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    reads(site())
    assert [record for record in caplog.records if record.name.startswith("httpcore")] == []


def test_a_hop_does_not_show_what_it_carries() -> None:
    from swarm.egress import Permit, Reach
    from swarm.origin.connections import Target
    from swarm.origin.http import Hop

    hop = Hop(Target("http", "h", 80, Permit("user", Reach.LOCAL)), CANARY.encode(), (("a", CANARY),), CANARY)
    assert CANARY not in repr(hop)
    assert CANARY not in repr(Source(f"http://u:{CANARY}@h/", (("a", CANARY),)))
    assert CANARY not in repr(OriginSettings(proxy=f"http://u:{CANARY}@p"))
