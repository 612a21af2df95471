"""The node's HTTP face over a real socket: what it shows, and what a web page or a stranger gets."""

import json
import socket
from contextlib import AsyncExitStack, suppress

import pytest
import trio
from starlette.routing import Route

from swarm import http
from swarm.config import HttpSettings
from swarm.errors import ConfigError
from swarm.quantities import Endpoint
from tests.control.fakes import TASK, FakeNode

ANY_PORT = HttpSettings(listen=Endpoint("127.0.0.1", 0), hosts=("node.example",))


async def raw(port, request):
    """Send bytes, read until the other side closes or has answered whole."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(request)
        answer = b""
        while part := await stream.receive_some(65536):
            answer += part
        return answer


async def last_answer(stream):
    """Ask once more on this connection, and read until it is closed."""
    await stream.send_all(get("/healthz", host="localhost"))
    answer = b""
    while part := await stream.receive_some(65536):
        answer += part
    return answer[answer.rindex(b"HTTP/1.1") :]


def get(path, host="127.0.0.1:7403", extra="", method="GET"):
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{extra}\r\n".encode()


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def body_of(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.fixture
def node(tmp_path):
    return FakeNode(tmp_path)


def served(node, check, settings=ANY_PORT):
    """Run `check(port)` against a node that serves."""

    async def main():
        listener = http.listen(settings)
        assert listener is not None
        port = listener.getsockname()[1]
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(http.serve, node, listener, settings)
                await check(port)
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_every_view_is_there_and_reads_what_the_node_says(node):
    async def check(port):
        assert body_of(await raw(port, get("/v1/status"))) == {"state": "ready"}
        assert body_of(await raw(port, get("/v1/tasks"))) == {"tasks": [{"task": TASK.hex()}]}
        assert body_of(await raw(port, get(f"/v1/tasks/{TASK.hex()}"))) == {"task": TASK.hex()}
        assert body_of(await raw(port, get("/v1/peers"))) == {"peers": [{"node": "n"}]}
        missing = await raw(port, get("/v1/tasks/beef"))
        assert (status_of(missing), body_of(missing)["message"]) == (404, "no task beef")
        assert (await raw(port, get("/healthz"))).endswith(b"ok\n")

    served(node, check)


def test_the_description_names_every_route_and_no_other(node):
    async def check(port):
        described = body_of(await raw(port, get("/v1/openapi.json")))["paths"]
        routes = {route.path for route in http.application_for(node).routes if isinstance(route, Route)}
        assert set(described) == routes

    served(node, check)


def test_a_node_that_is_stopping_is_not_ready_but_healthy(node):
    async def check(port):
        assert status_of(await raw(port, get("/readyz"))) == 200
        node.is_ready = False
        assert status_of(await raw(port, get("/readyz"))) == 503
        assert status_of(await raw(port, get("/healthz"))) == 200

    served(node, check)


def test_metrics_are_in_the_text_format_with_every_declared_name(node):
    from prometheus_client.parser import text_string_to_metric_families

    from swarm.metrics import METRICS

    node.durations.observe(0.3)
    node.durations.observe(1e9)

    async def check(port):
        answer = await raw(port, get("/metrics"))
        assert b"content-type: text/plain; version=0.0.4" in answer.lower()
        families = {f.name: f for f in text_string_to_metric_families(answer.partition(b"\r\n\r\n")[2].decode())}
        assert set(families) == {metric.name.removesuffix("_total") for metric in METRICS}
        [sample] = families["swarm_origin_reads"].samples
        assert (sample.labels, sample.value) == ({"reason": "alone"}, 2.0)
        counts = {
            s.labels.get("le"): s.value for s in families["swarm_fetch_duration_seconds"].samples if s.name.endswith("_bucket")
        }
        assert (counts["0.25"], counts["0.5"], counts["3600.0"], counts["+Inf"]) == (0, 1, 1, 2)

    served(node, check)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:7403", "localhost:7403", "[::1]:7403", "node.example", "NODE.example.:80"]
)
def test_it_answers_under_addresses_and_its_own_names(node, host):
    async def check(port):
        assert status_of(await raw(port, get("/v1/status", host=host))) == 200

    served(node, check)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7403",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "a b",
        "evil.example@127.0.0.1",
        "[::1",
        "[node.example]",
    ],
)
def test_a_name_rebound_to_this_machine_by_a_web_page_is_refused(node, host):
    async def check(port):
        assert status_of(await raw(port, get("/v1/status", host=host))) in (400, 403)

    served(node, check)


def test_two_host_headers_are_refused(node):
    async def check(port):
        assert status_of(await raw(port, get("/v1/status", extra="Host: evil.example\r\n"))) in (400, 403)

    served(node, check)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:7403"])
def test_a_request_made_by_a_web_page_is_refused(node, origin):
    async def check(port):
        assert status_of(await raw(port, get("/v1/status", extra=f"Origin: {origin}\r\n"))) == 403

    served(node, check)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_nothing_can_be_changed_over_http(node, method):
    async def check(port):
        for path in ("/v1/tasks", f"/v1/tasks/{TASK.hex()}", "/metrics", "/v1/status"):
            answer = await raw(port, get(path, method=method, extra="Content-Length: 0\r\n"))
            assert status_of(answer) in (400, 404, 405)

    served(node, check)


def test_it_is_no_proxy(node):
    async def check(port):
        request = b"GET http://10.0.0.5/ HTTP/1.1\r\nHost: 10.0.0.5\r\nConnection: close\r\n\r\n"
        assert status_of(await raw(port, request)) in (400, 403, 404)

    served(node, check)


def test_connections_beyond_the_bound_are_closed_and_the_others_go_on(node, monkeypatch):
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 3)

    async def check(port):
        ask = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        async with AsyncExitStack() as stack:
            held = [await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port)) for _ in range(3)]
            for stream in held:
                await stream.send_all(ask)
                assert b"200" in await stream.receive_some(65536)
            assert await raw(port, b"") == b""
            assert status_of(await last_answer(held[0])) == 200

    served(node, check)


@pytest.mark.parametrize(
    "beginning",
    [b"", b"GET /healthz HTTP/1.1\r\nX-Slow", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nslow"],
    ids=["nothing", "half a head", "half a body"],
)
def test_a_slow_request_is_not_kept(node, monkeypatch, beginning):
    monkeypatch.setattr(http, "IDLE_SECONDS", 0.2)

    async def trickle(stream):
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                await trio.sleep(0.02)
                await stream.send_all(b"x")

    async def check(port):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as nursery:
            await stream.send_all(beginning)
            nursery.start_soon(trickle, stream)
            with trio.fail_after(3), suppress(trio.BrokenResourceError):
                while await stream.receive_some(65536):
                    pass
            nursery.cancel_scope.cancel()

    served(node, check)


def test_a_request_head_without_end_is_cut(node):
    async def check(port):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all((b"X-A: " + b"a" * 8192 + b"\r\n") * 4000)

    served(node, check)


def test_a_port_in_use_is_said_with_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = Endpoint("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"{endpoint} for HTTP: Address already in use; .*--http") as caught:
            http.listen(HttpSettings(listen=endpoint))
    assert caught.value.exit_code == 2


def test_an_address_that_is_not_ours_is_said():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:7403"):
        http.listen(HttpSettings(listen=Endpoint("192.0.2.1", 7403)))
    assert http.listen(HttpSettings(listen=None)) is None
