"""The parts of `swarm demo`; the whole of it runs in tests/integration/test_demo.py."""

import http.client
import io
import json
import os
import sys
import time

import pytest

from cli import demo
from cli.demo_origin import DemoOrigin, Throttle
from cli.main import run
from swarm.errors import DaemonUnreachable, IntegrityError, NoSpace


@pytest.fixture
def origin(tmp_path):
    path = tmp_path / "content.bin"
    path.write_bytes(bytes(range(256)) * 4)
    with DemoOrigin(path, "abc", 1e9) as origin:
        yield origin


def get(url, method="GET", **headers):
    host = url.split("/")[2]
    connection = http.client.HTTPConnection(host, timeout=10)
    try:
        connection.request(method, url.partition(host)[2], headers={k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def test_the_origin_serves_the_whole_and_ranges_and_counts_what_it_sends(origin):
    status, headers, body = get(origin.url)
    assert (status, len(body), headers["ETag"], headers["Accept-Ranges"]) == (200, 1024, '"abc"', "bytes")
    status, headers, body = get(origin.url, Range="bytes=255-257")
    assert (status, body, headers["Content-Range"]) == (206, b"\xff\x00\x01", "bytes 255-257/1024")
    assert get(origin.url, Range="bytes=1020-")[2] == bytes(range(252, 256))
    assert (origin.sent, origin.reads) == (1024 + 3 + 4, 3)
    assert get(origin.url, method="HEAD")[2] == b""
    assert origin.reads == 3


def test_the_origin_ignores_a_range_of_another_version_and_refuses_one_beyond_the_end(origin):
    assert get(origin.url, Range="bytes=1-2", If_Range='"other"')[0] == 200
    assert get(origin.url, Range="bytes=1024-")[0] == 416


def test_the_throttle_lets_all_readers_together_have_the_rate_and_no_more():
    now = 0.0
    throttle = Throttle(100.0, lambda: now)
    waits = [throttle.wait_for(10) for _ in range(5)]
    assert waits == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    now = 10.0
    assert throttle.wait_for(10) == 0.0  # credit of a pause, a tenth of a second
    assert throttle.wait_for(10) == pytest.approx(0.1)


def test_random_bytes_are_written_with_their_digest(tmp_path):
    import hashlib

    digest = demo._write_random(tmp_path / "f", demo.WRITE_BYTES + 1)
    data = (tmp_path / "f").read_bytes()
    assert len(data) == demo.WRITE_BYTES + 1
    assert hashlib.sha256(data).hexdigest() == digest


def result(digest="d" * 64):
    names = {"from_peers": 1000, "from_origin": 24, "digest": f"sha256:{digest}", "why_origin": {}}
    return demo.Fetching(1, {"done": 512, "phase": "fetching"}, names, None, 2.0)


def test_the_report_says_what_was_saved(origin, capsys):
    origin.count(sent=2048)
    report = demo._report([result()] * 3, origin, "d" * 64, 512.0, 2.5)
    assert (report["origin_copies"], report["plain_copies"], report["plain_seconds"]) == (2.0, 3, 6.0)
    demo._print(report)
    out = capsys.readouterr().out
    assert "all 3 done in 2.5 s, the origin sent 2.0 KiB: 2.00 copies" in out
    assert "3 plain downloads need 6.0 s at 512 B/s" in out


def test_a_node_with_other_bytes_is_not_reported_as_a_success(origin):
    with pytest.raises(IntegrityError, match="node 1"):
        demo._report([result("e" * 64)], origin, "d" * 64, 512.0, 2.5)


def test_the_live_table_shows_every_node(origin):
    from rich.console import Console

    stream = io.StringIO()
    waiting = demo.Fetching(2)
    Console(file=stream, width=120).print(demo._table([result(), waiting], origin))
    assert "1000 B" in stream.getvalue()
    assert "starting" in stream.getvalue()


def test_progress_without_a_terminal_is_lines(origin, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    show = demo._lines([demo.Fetching(1, {"done": 512})], origin)
    show()
    now[0] = 2.0
    show()
    show()
    assert capsys.readouterr().err == "nodes have  50%; the origin sent 0 B\n"


@pytest.mark.parametrize("options", [["--size", "0"], ["--size", "x"], ["--rate", "0"], ["--nodes", "0"], ["--nodes", "1000"]])
def test_what_cannot_be_is_refused(options, capsys):
    assert run(["demo", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_too_little_room_is_said_before_anything_is_written(tmp_path, capsys):
    assert run(["demo", "--size", "1TiB", "--directory", str(tmp_path), "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["error"] == NoSpace.__name__
    assert os.listdir(tmp_path) == []


def test_a_daemon_that_does_not_start_is_said_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DaemonUnreachable, match="daemon 1 did not start: it said nothing"), demo._daemons(tmp_path, 2, print):
        pass
