"""An outgoing HTTP proxy: used where set, and no way around the egress policy."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import trio

from swarm.edges import Address, Source
from swarm.errors import ConfigError, NotPermitted, OriginUnreachable
from swarm.origin.origin import OriginReader, OriginSettings
from tests.origin.test_tls import authority_file, server_context
from tests.origin.web import CONTENT, Asked, Reply, Web, content_reply, replace, take

PROXY = Address("10.9.9.9", 3128)
SETTINGS = OriginSettings(proxy="http://us%40er:s3cret@proxy.corp:3128", proxy_except=("direct.example", "*.inside.example"))
SOURCE = Source("http://files.example/model.bin")


def proxied() -> Web:
    def forward(asked: Asked) -> Reply:
        return content_reply(replace(asked, target=asked.target))

    web = Web()
    web.serve("files.example", content_reply)
    web.serve("proxy.corp", forward, address=PROXY.host, port=PROXY.port)
    return web


def test_plain_http_goes_through_the_proxy_with_its_own_credentials() -> None:
    async def act(reader: OriginReader) -> None:
        assert await take(reader, Source(SOURCE.url, (("Authorization", "Bearer 1"),))) == CONTENT

    web = proxied()
    web(act, SETTINGS)
    assert web.dialled == [PROXY]
    (asked,) = web.asked
    assert asked.target == "http://files.example/model.bin"
    assert asked.headers["host"] == "files.example"
    assert asked.headers["authorization"] == "Bearer 1"
    assert asked.headers["proxy-authorization"] == "Basic " + base64.b64encode(b"us@er:s3cret").decode()


@pytest.mark.parametrize("host", ["direct.example", "a.inside.example"])
def test_excepted_hosts_are_reached_directly_and_see_no_proxy_credentials(host: str) -> None:
    async def act(reader: OriginReader) -> None:
        assert await take(reader, Source(f"http://{host}/x")) == CONTENT

    web = proxied()
    web.serve(host, content_reply)
    web(act, SETTINGS)
    assert PROXY not in web.dialled
    assert "proxy-authorization" not in web.asked[0].headers


def test_https_goes_through_a_tunnel_that_sees_no_request(tmp_path: Path) -> None:
    context = server_context(tmp_path, "files.example")
    tunnelled: list[bytes] = []

    async def tunnel(asked: Asked) -> None:
        assert asked.method == "CONNECT"
        assert asked.target == "files.example:443"
        assert "authorization" not in asked.headers
        await asked.stream.send_all(b"HTTP/1.1 200 Established\r\n\r\n")
        tls = trio.SSLStream(asked.stream, context, server_side=True, https_compatible=True)
        request = await tls.receive_some()
        tunnelled.append(bytes(request))
        await tls.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
        await tls.receive_some()

    async def act(reader: OriginReader) -> None:
        assert await take(reader, Source("https://files.example/x", (("Authorization", "Bearer 1"),))) == b"hello"

    web = Web()
    web.names["files.example"] = ["93.184.0.1"]
    web.serve("proxy.corp", tunnel, address=PROXY.host, port=PROXY.port)
    web(act, OriginSettings(proxy=SETTINGS.proxy, ca=(("files.example", authority_file(tmp_path)),)))
    assert web.dialled == [PROXY]
    assert b"proxy-authorization" not in tunnelled[0].lower()
    assert b"Bearer 1" in tunnelled[0]


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "http://metadata.google.internal/", "http://[fd00:ec2::254]/"])
def test_a_proxy_is_no_way_to_metadata(url: str) -> None:
    async def act(reader: OriginReader) -> None:
        for requester in ("user", "job"):
            with pytest.raises(NotPermitted):
                await take(reader, Source(url, requester=requester))

    web = proxied()
    web(act, SETTINGS)
    assert web.dialled == []


def test_a_proxy_is_no_way_for_a_job_to_private_addresses_also_on_a_kept_connection() -> None:
    async def act(reader: OriginReader) -> None:
        source = Source(SOURCE.url, requester="job")
        assert await take(reader, source) == CONTENT
        web.names["files.example"] = ["10.0.0.1"]
        with pytest.raises(NotPermitted):
            await take(reader, source)

    web = proxied()
    web(act, SETTINGS)
    assert len(web.asked) == 1


def test_a_name_only_the_proxy_knows_is_left_to_it_for_a_user_but_not_for_a_job() -> None:
    async def act(reader: OriginReader) -> None:
        url = "http://only-the-proxy-knows.example/x"
        assert await take(reader, Source(url)) == CONTENT
        with pytest.raises(NotPermitted, match=r"egress\.allow"):
            await take(reader, Source(url, requester="job"))

    web = proxied()
    web(act, SETTINGS)
    listed = proxied()

    async def allowed(reader: OriginReader) -> None:
        assert await take(reader, Source("http://only-the-proxy-knows.example/x", requester="job")) == CONTENT

    listed(allowed, SETTINGS, allow=("only-the-proxy-knows.example",))


def test_dns_that_is_silent_behind_a_proxy_costs_three_seconds() -> None:
    async def act(reader: OriginReader) -> None:
        began = trio.current_time()
        assert await take(reader, SOURCE) == CONTENT
        assert trio.current_time() - began == pytest.approx(3)

    async def silent(host: str, port: int) -> list[str]:
        if host != "proxy.corp":
            await trio.sleep_forever()
        return [PROXY.host]

    web = proxied()
    web.resolve = silent  # type: ignore[method-assign]  # that is the test
    web(act, SETTINGS)


def test_a_redirect_through_a_proxy_from_a_public_host_inwards_is_refused() -> None:
    async def act(reader: OriginReader) -> None:
        with pytest.raises(NotPermitted):
            await take(reader, SOURCE)

    web = proxied()
    web.serve("proxy.corp", lambda asked: Reply(302, {"location": "http://10.0.0.1/"}), address=PROXY.host, port=PROXY.port)
    web(act, SETTINGS)
    assert len(web.asked) == 1


def test_a_proxy_that_refuses_is_told_as_such_without_its_credentials() -> None:
    async def act(reader: OriginReader) -> None:
        with pytest.raises(OriginUnreachable, match=r"origin\.proxy") as caught:
            await take(reader, Source("https://files.example/x"))
        assert "s3cret" not in repr(caught.value)

    web = proxied()
    web.serve("proxy.corp", lambda asked: Reply(502), address=PROXY.host, port=PROXY.port)
    web(act, SETTINGS)


@pytest.mark.parametrize("url", ["socks5://x:1", "http://", "ftp://x"])
def test_a_proxy_that_is_none_is_a_configuration_error(url: str) -> None:
    async def act(reader: OriginReader) -> None:
        with pytest.raises(ConfigError, match=r"origin\.proxy"):
            await take(reader, SOURCE)

    proxied()(act, OriginSettings(proxy=url))


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(reader: OriginReader) -> None:
        assert await take(reader, SOURCE) == CONTENT

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://proxy.corp:3128")
    web = proxied()
    web(act)
    assert PROXY not in web.dialled
