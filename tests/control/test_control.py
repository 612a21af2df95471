"""The control socket, both sides over a real socket: requests, descriptors, and clients and nodes that misbehave."""

import json
import os
import socket
import stat
import threading
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.control import api, client, protocol
from swarm.control.client import ControlConnection, ask
from swarm.errors import (
    ConfigError,
    DaemonUnreachable,
    LocalProtocolError,
    NotFoundAtOrigin,
    NotPermitted,
    OriginRefused,
    SwarmError,
)
from tests.control.fakes import DIGEST, TASK, FakeNode, serving

URL = "http://origin.example/file"


@pytest.fixture
def node(tmp_path):
    return FakeNode(tmp_path)


def raw(directory):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(directory / "control.sock"))
    return connection


def answer_of(connection):
    """Everything until the other side closes, as objects."""
    data = b""
    while part := connection.recv(65536):
        data += part
    return [json.loads(line) for line in data.splitlines()]


# --- requests ------------------------------------------------------------------------------------------------------


def test_a_fetch_brings_the_numbers_and_a_descriptor_of_the_content(tmp_path, node):
    with serving(node, tmp_path):
        answer = ask(tmp_path, "fetch", {"url": URL})
        assert os.read(answer.fd, 100) == b"content"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(answer.fd, b"x")  # read-only
        answer.close()
        answer.close()
    assert answer.result["task"] == TASK.hex()
    assert answer.result["digest"] == str(DIGEST)
    assert {k: answer.result[k] for k in ("bytes", "seconds", "from_origin", "from_peers", "from_local")} == {
        "bytes": 7,
        "seconds": 0.5,
        "from_origin": 1,
        "from_peers": 2,
        "from_local": 3,
    }
    assert [c.closed for c in node.content] == [1]


def test_what_the_command_asks_for_is_what_the_node_fetches(tmp_path, node):
    wanted = {
        "url": URL,
        "digest": str(DIGEST),
        "headers": [["Authorization", "Bearer x"]],
        "immutable": True,
        "share": True,
        "no_origin": True,
        "tag": "t",
        "application": "a",
        "range": [5, None],
    }
    with serving(node, tmp_path):
        ask(tmp_path, "fetch", wanted).close()
    [request] = node.requests
    assert request.source is not None
    assert (request.source.url, request.source.headers, request.source.requester) == (
        URL,
        (("Authorization", "Bearer x"),),
        "user",
    )
    assert (request.digest, request.immutable, request.share, request.no_origin) == (DIGEST, True, True, True)
    assert (request.tag, request.application, request.byte_range) == ("t", "a", (5, None))
    assert "Bearer" not in repr(request)


def test_a_digest_alone_is_fetched_from_the_swarm(tmp_path, node):
    with serving(node, tmp_path):
        ask(tmp_path, "fetch", {"url": None, "digest": str(DIGEST)}).close()
    assert node.requests[0].source is None


def test_progress_comes_while_the_fetch_runs_and_no_more_often_than_a_person_can_see(tmp_path, node):
    node.snapshots = 40  # in 0.4 s
    seen: list[dict[str, object]] = []
    with serving(node, tmp_path):
        ask(tmp_path, "fetch", {"url": URL, "progress": True}, seen.append).close()
    assert 1 <= len(seen) <= 4
    assert seen[0] == {
        "task": TASK.hex(),
        "phase": "fetching",
        "bytes": 40,
        "done": seen[0]["done"],
        "from_peers": seen[0]["done"],
        "from_origin": 0,
        "from_local": 0,
        "peers": 2,
    }


def test_other_requests_are_answered(tmp_path, node):
    with serving(node, tmp_path):
        assert ask(tmp_path, "status").result == {"state": "ready"}
        assert ask(tmp_path, "tasks").result == {"tasks": [{"task": TASK.hex()}]}
        assert ask(tmp_path, "task", {"name": TASK.hex()}).result == {"task": TASK.hex()}
        assert ask(tmp_path, "peers").result == {"peers": [{"node": "n"}]}
        assert ask(tmp_path, "pin", {"name": "x"}).result == {"task": "x", "pinned": True}
        assert ask(tmp_path, "unpin", {"name": "x"}).result == {"task": "x", "pinned": False}


def test_an_error_arrives_as_what_it_was(tmp_path, node):
    node.error = OriginRefused("401 from origin.example; give credentials")
    with serving(node, tmp_path):
        with pytest.raises(OriginRefused, match="401 from origin") as caught:
            ask(tmp_path, "fetch", {"url": URL})
        assert caught.value.exit_code == 7
        with pytest.raises(NotFoundAtOrigin):
            ask(tmp_path, "task", {"name": "x"})
        with pytest.raises(SwarmError, match="in use"):
            ask(tmp_path, "rm", {"name": "x"})


def test_an_error_of_a_newer_node_keeps_its_name_and_exit_code():
    error = protocol.error_from({"error": "FutureError", "message": "m", "exit_code": 9})
    assert (error.kind, error.exit_code, str(error)) == ("FutureError", 9, "m")
    assert protocol.error_message(error) == {"error": "FutureError", "message": "m", "exit_code": 9}
    assert protocol.error_from({"error": "SystemExit", "message": "m", "exit_code": 999}).exit_code == 1
    assert protocol.error_from({"error": "annotations", "message": "m"}).kind == "annotations"


def test_a_bug_met_by_one_command_does_not_end_the_node(tmp_path, node):
    with serving(node, tmp_path):
        with pytest.raises(SwarmError, match="its log says why"):
            ask(tmp_path, "check-origin", {"url": URL})
        node.error = RuntimeError("another bug")
        with pytest.raises(SwarmError, match="its log says why"):
            ask(tmp_path, "fetch", {"url": URL})
        assert ask(tmp_path, "status").result == {"state": "ready"}


def test_many_commands_at_once_are_all_answered(tmp_path, node):
    got = []

    def one():
        answer = ask(tmp_path, "fetch", {"url": URL})
        got.append(os.read(answer.fd, 10))
        answer.close()

    with serving(node, tmp_path):
        threads = [threading.Thread(target=one) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert got == [b"content"] * 20


# --- what may not be asked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "kind", "text"),
    [
        ({"op": "fly"}, ConfigError, "does not know the request 'fly'"),
        ({}, ConfigError, "does not know the request None"),
        ({"op": "task"}, LocalProtocolError, "lacks name"),
        ({"op": "fetch"}, LocalProtocolError, "needs a URL or a digest"),
        ({"op": "fetch", "url": 5}, LocalProtocolError, "lacks url"),
        ({"op": "fetch", "url": "gopher://x"}, ConfigError, "http://"),
        ({"op": "fetch", "url": URL, "digest": "sha256:xyz"}, ConfigError, "not a digest"),
        ({"op": "fetch", "url": URL, "headers": [["A", "b"]] * 65}, ConfigError, "at most 64 headers"),
        ({"op": "fetch", "url": URL, "headers": "A: b"}, ConfigError, "headers"),
        ({"op": "fetch", "url": URL, "headers": [["A"]]}, LocalProtocolError, "pairs"),
        ({"op": "fetch", "url": URL, "headers": [["A b", "c"]]}, ConfigError, "not a header name"),
        ({"op": "fetch", "url": URL, "headers": [["", "c"]]}, ConfigError, "not a header name"),
        ({"op": "fetch", "url": URL, "range": [5, 5]}, ConfigError, "not a range"),
        ({"op": "fetch", "url": URL, "range": [-1, 5]}, ConfigError, "not a range"),
        ({"op": "fetch", "url": URL, "range": "0-5"}, ConfigError, "not a range"),
    ],
)
def test_a_request_that_cannot_be_is_refused_in_words(tmp_path, node, request_, kind, text):
    with serving(node, tmp_path), raw(tmp_path) as connection:
        connection.sendall(json.dumps(request_).encode() + b"\n")
        [said] = answer_of(connection)
    assert said["error"] == kind.__name__
    assert text in said["message"]
    assert node.requests == []


@pytest.mark.parametrize("value", ["x\r\nX-Injected: 1", "x\nGET / HTTP/1.1", "x\0y", "\rx"])
def test_a_header_value_cannot_smuggle_a_second_header(value):
    with pytest.raises(ConfigError, match="line break"):
        api.fetch_request({"url": URL, "headers": [["X-A", value]]})


def test_a_request_that_is_not_json_is_refused(tmp_path, node):
    with serving(node, tmp_path), raw(tmp_path) as connection:
        connection.sendall(b"GET / HTTP/1.1\n")
        [said] = answer_of(connection)
    assert said["error"] == "LocalProtocolError"


def test_a_request_without_end_does_not_fill_memory(tmp_path, node):
    with serving(node, tmp_path), raw(tmp_path) as connection:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall(b"x" * 64 * 1024 * 1024)
        assert ask(tmp_path, "status").result == {"state": "ready"}


def test_a_client_that_says_nothing_is_let_go(tmp_path, node, monkeypatch):
    monkeypatch.setattr(api, "REQUEST_SECONDS", 0.05)
    with serving(node, tmp_path), raw(tmp_path) as connection:
        assert answer_of(connection) == []


def test_two_requests_on_one_connection_are_refused(tmp_path, node):
    with serving(node, tmp_path), raw(tmp_path) as connection:
        connection.sendall(b'{"op":"status"}\n{"op":"status"}\n')
        [said] = answer_of(connection)
    assert said["error"] == "LocalProtocolError"


def test_connections_beyond_the_bound_are_turned_away_and_those_within_are_served(tmp_path, node, monkeypatch):
    monkeypatch.setattr(api, "MAX_CONNECTIONS", 2)
    with serving(node, tmp_path), raw(tmp_path) as first, raw(tmp_path), raw(tmp_path) as third:
        assert answer_of(third) == []
        with pytest.raises(DaemonUnreachable):
            ask(tmp_path, "status")
        first.sendall(b'{"op":"status"}\n')
        assert answer_of(first) == [{"result": {"state": "ready"}}]


# --- going away -----------------------------------------------------------------------------------------------------


def test_a_client_that_goes_away_cancels_its_own_wait_only(tmp_path, node):
    node.hang = True
    with serving(node, tmp_path) as server:
        connection = raw(tmp_path)
        connection.sendall(b'{"op":"fetch","url":"http://h/"}\n')
        assert node.started.wait(10)
        assert server.active == 1
        connection.close()
        assert node.cancelled.wait(10)
        node.hang = False
        ask(tmp_path, "fetch", {"url": URL}).close()


def test_a_client_that_goes_away_before_the_result_leaks_no_descriptor(tmp_path, node):
    node.snapshots = 5
    with serving(node, tmp_path) as server:
        ask(tmp_path, "fetch", {"url": URL}).close()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            node.started.clear()
            connection = raw(tmp_path)
            connection.sendall(b'{"op":"fetch","url":"http://h/"}\n')
            assert node.started.wait(10)
            connection.close()
        for _ in range(1000):  # each answer lets the server go on with those that went away
            ask(tmp_path, "status", {}).close()
            if not server.active:
                break
        assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert all(content.closed == 1 for content in node.content)


def test_a_node_that_goes_away_is_said_so_and_to_come_back(tmp_path, node):
    node.hang = True
    errors = []

    def one():
        with pytest.raises(client.DaemonWentAway) as caught:
            ask(tmp_path, "fetch", {"url": URL})
        errors.append(caught.value)

    with serving(node, tmp_path):
        thread = threading.Thread(target=one)
        thread.start()
        assert node.started.wait(10)
    thread.join(10)
    assert "resume" in str(errors[0])
    assert errors[0].exit_code == 6


def test_no_node_is_said_so_with_what_to_do(tmp_path):
    with pytest.raises(DaemonUnreachable, match="start `swarm daemon`") as caught:
        ControlConnection(tmp_path)
    assert caught.value.exit_code == 6


def test_a_socket_of_somebody_else_is_said_so(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refused)
    with pytest.raises(NotPermitted, match="as the user who runs the daemon"):
        ControlConnection(tmp_path)


def test_a_broken_node_cannot_fill_the_commands_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "MAX_REPLY_BYTES", 100_000)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()

        def flood():
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                while True:
                    connection.sendall(b"x" * 65536)

        thread = threading.Thread(target=flood)
        thread.start()
        with pytest.raises(DaemonUnreachable, match="does not end"):
            ask(tmp_path, "status")
        thread.join(10)


def test_an_answer_in_single_bytes_is_read(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()

        def trickle():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                for byte in b'{"progress":{"a":1}}\n{"result":{"b":2}}\n':
                    connection.sendall(bytes([byte]))

        thread = threading.Thread(target=trickle)
        thread.start()
        seen: list[dict[str, object]] = []
        assert ask(tmp_path, "status", None, seen.append).result == {"b": 2}
        assert seen == [{"a": 1}]
        thread.join(10)


# --- the socket file ---------------------------------------------------------------------------------------------------


def test_only_its_owner_can_open_the_socket(tmp_path, node):
    with serving(node, tmp_path):
        mode = (tmp_path / "control.sock").stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
        assert stat.S_ISSOCK(mode)


def test_the_socket_is_gone_when_the_node_is(tmp_path, node):
    with serving(node, tmp_path):
        pass
    assert [name for name in os.listdir(tmp_path) if "sock" in name] == []


def test_a_socket_left_behind_by_a_killed_node_is_replaced(tmp_path, node):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "control.sock"))
    with pytest.raises(DaemonUnreachable):
        ask(tmp_path, "status")
    with serving(node, tmp_path):
        assert ask(tmp_path, "status").result == {"state": "ready"}


def test_a_data_directory_deeper_than_a_socket_address_can_say_works(tmp_path, node):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with serving(node, deep):
        assert ask(deep, "status").result == {"state": "ready"}
    with pytest.raises(DaemonUnreachable):
        ask(deep, "status")


# --- lines ---------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=5))
@settings(max_examples=100, deadline=None)
def test_a_line_reads_what_it_writes_and_holds_one_line_break(message):
    line = protocol.encode_line(message)
    assert line.count(b"\n") == 1
    assert protocol.decode_line(line) == message


@given(st.binary(max_size=200) | st.just(b"[" * 100_000))
@settings(max_examples=100, deadline=None)
def test_garbage_is_refused_in_words(data):
    with suppress(LocalProtocolError):
        assert isinstance(protocol.decode_line(data), dict)
