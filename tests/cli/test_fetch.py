"""`swarm fetch` against a node made of plain answers: what it asks, writes, prints and exits with."""

import json
import os
import re
import subprocess
import sys

import pytest

from cli import fetch as cli_fetch
from cli.main import run
from cli.progress import FetchProgress, Rate
from swarm.errors import (
    ContentChanged,
    DigestMismatch,
    NoSpace,
    NotFoundAtOrigin,
    NotPermitted,
    OriginRefused,
    OriginUnreachable,
    StoreError,
)
from tests.cli.test_main import HEAVY
from tests.control.fakes import DIGEST, TASK, FakeNode, serving

URL = "http://origin.example/file"


@pytest.fixture
def node(tmp_path, monkeypatch):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    monkeypatch.setenv("SWARM_DATA_DIR", str(data_dir))
    node = FakeNode(data_dir)
    with serving(node, data_dir):
        yield node


def fetched(capsys, *arguments):
    """Exit code, the object on standard output, and standard error."""
    code = run(["fetch", *arguments])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out.startswith("{") else captured.out, captured.err


def test_a_fetch_writes_the_file_and_ends_with_exactly_the_object_of_the_contract(tmp_path, node, capsys):
    target = tmp_path / "out"
    code, answer, err = fetched(capsys, URL, "-o", str(target), "--json")
    assert (code, err) == (0, "")
    assert target.read_bytes() == b"content"
    assert list(answer) == ["task", "digest", "bytes", "seconds", "from_origin", "from_peers", "from_local", "path"]
    assert answer == {
        "task": TASK.hex(),
        "digest": str(DIGEST),
        "bytes": 7,
        "seconds": 0.5,
        "from_origin": 1,
        "from_peers": 2,
        "from_local": 3,
        "path": str(target),
    }


def test_a_fetch_is_quiet_without_a_terminal(tmp_path, node, capsys):
    assert fetched(capsys, URL, "-o", str(tmp_path / "out")) == (0, "", "")


def test_every_option_reaches_the_node(tmp_path, node, capsys):
    options = [
        *("--digest", str(DIGEST), "--immutable", "--share", "--no-origin", "--tag", "t", "--application", "a"),
        *("--range", "2-5", "--header", "Authorization: Bearer a:b", "--header", "X-Empty:"),
    ]
    assert fetched(capsys, URL, "-o", str(tmp_path / "out"), *options)[0] == 0
    [request] = node.requests
    assert request.source is not None
    assert request.source.headers == (("Authorization", "Bearer a:b"), ("X-Empty", ""))
    assert (request.digest, request.immutable, request.share, request.no_origin) == (DIGEST, True, True, True)
    assert (request.tag, request.application, request.byte_range) == ("t", "a", (2, 6))


def test_a_digest_can_stand_for_a_url(tmp_path, node, capsys):
    assert fetched(capsys, str(DIGEST), "-o", str(tmp_path / "a"))[0] == 0
    assert fetched(capsys, str(DIGEST), "--digest", str(DIGEST), "-o", str(tmp_path / "b"))[0] == 0
    code, _, err = fetched(capsys, str(DIGEST), "--digest", "sha256:" + "0" * 64, "-o", str(tmp_path / "c"))
    assert (code, "two different digests" in err) == (2, True)
    assert [(request.source, request.digest) for request in node.requests] == [(None, DIGEST)] * 2


def test_standard_output_gets_the_bytes_and_nothing_else(node):
    ended = subprocess.run(
        [sys.executable, "-m", "cli.main", "fetch", URL, "-o", "-"], capture_output=True, timeout=20, check=True
    )
    assert (ended.stdout, ended.stderr) == (b"content", b"")


def test_json_and_content_cannot_share_standard_output(node, capsys):
    code, answer, err = fetched(capsys, URL, "-o", "-", "--json")
    assert (code, answer["exit_code"]) == (2, 2)
    assert "standard output" in err
    assert node.requests == []


def test_a_hard_link_shares_the_stores_bytes(tmp_path, node, capsys):
    target = tmp_path / "out"
    assert fetched(capsys, URL, "-o", str(target), "--hard-link")[0] == 0
    assert target.stat().st_ino == node.content[0].path.stat().st_ino
    assert target.stat().st_mode & 0o222 == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DigestMismatch, 3),
        (NotFoundAtOrigin, 4),
        (NoSpace, 5),
        (OriginRefused, 7),
        (NotPermitted, 7),
        (OriginUnreachable, 8),
        (ContentChanged, 1),
        (StoreError, 1),
    ],
)
def test_what_the_node_says_went_wrong_is_the_exit_code_and_leaves_no_file(tmp_path, node, capsys, error, code):
    node.error = error("what happened; what to do")
    got, answer, err = fetched(capsys, URL, "-o", str(tmp_path / "out"), "--json")
    assert got == code
    assert answer == {"error": error.__name__, "message": "what happened; what to do", "exit_code": code}
    assert err == "swarm: what happened; what to do\n"
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "no parent", "dangling"])
def test_a_target_that_cannot_be_written_is_said_before_anything_is_asked(tmp_path, node, capsys, kind):
    target = tmp_path / "out"
    match kind:
        case "file":
            target.write_text("mine")
        case "directory":
            target.mkdir()
        case "symlink":
            (tmp_path / "secret").write_text("mine")
            target.symlink_to(tmp_path / "secret")
        case "dangling":
            target.symlink_to(tmp_path / "nowhere")
        case _:
            target = tmp_path / "none" / "out"
    code, _, err = fetched(capsys, URL, "-o", str(target))
    assert code == 1
    assert str(target) in err or str(target.parent) in err
    assert err.count("\n") == 1
    assert node.requests == []
    assert not (tmp_path / "nowhere").exists()


def test_overwrite_replaces_a_file(tmp_path, node, capsys):
    target = tmp_path / "out"
    target.write_text("old, and longer than the new one")
    assert fetched(capsys, URL, "-o", str(target), "--overwrite")[0] == 0
    assert target.read_bytes() == b"content"


@pytest.mark.parametrize("text", ["5", "a-b", "5-2", "-5", "1-2-3", "٣-٤", "1 -2", "9" * 50 + "-"])
def test_a_range_that_is_none_is_refused(tmp_path, node, capsys, text):
    code, _, err = fetched(capsys, URL, "-o", str(tmp_path / "out"), f"--range={text}")
    assert (code, "FIRST-LAST" in err) == (2, True)


def test_an_open_range_has_no_end():
    assert cli_fetch._range("7-") == [7, None]
    assert cli_fetch._range("0-0") == [0, 1]


def test_a_header_that_is_refused_is_not_shown(tmp_path, node, capsys):
    for text in ("s3cr3t-token", "Authorization: s3cr3t\r\nX: y", ": s3cr3t"):
        code, answer, err = fetched(capsys, URL, "-o", str(tmp_path / "out"), "--header", text, "--json")
        assert code == 2
        assert "s3cr3t" not in err
        assert "s3cr3t" not in json.dumps(answer)


def test_a_url_that_cannot_be_is_refused_without_starting_a_node(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SWARM_DATA_DIR", str(tmp_path / "data"))
    for url in ("foo", "gopher://h/", "http://", "http://h:99999/", "http://h/ x"):
        code, _, err = fetched(capsys, url, "-o", str(tmp_path / "out"))
        assert code == 2
        assert err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_fetch_through_a_daemon_imports_nothing_heavy(tmp_path, node):
    program = (
        "import sys\nfrom cli.main import run\n"
        f"assert run(['fetch', {URL!r}, '-o', {str(tmp_path / 'out')!r}, '--json']) == 0\n"
        "print(' '.join(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    assert not set(ended.stdout.splitlines()[-1].split()) & HEAVY


NEWS = {
    "task": "t",
    "phase": "fetching",
    "bytes": 1000,
    "done": 400,
    "from_peers": 300,
    "from_origin": 100,
    "from_local": 0,
    "peers": 2,
}


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr("cli.progress.LINE_SECONDS", 0)
    with FetchProgress() as display:
        display(NEWS)
        display({**NEWS, "bytes": None, "peers": 1, "phase": "later version"})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("fetching: 400 B of 1000 B, ")
    assert first.endswith("2 peers, 300 B peers, 100 B origin")
    assert "later version: 400 B, " in second
    assert "1 peer," in second


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stderr", terminal)
    with FetchProgress() as display:
        display(NEWS)
        display({**NEWS, "done": 1000, "phase": "done"})
    assert "2 peers, 300 B peers, 100 B origin" in terminal.getvalue()
    assert "1,000/1,000 bytes" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())


def test_the_rate_is_that_of_the_last_seconds():
    rate = Rate()
    assert rate.update(0.0, 0) == 0
    assert rate.update(1.0, 100) == 100
    for second in range(2, 20):
        got = rate.update(float(second), 100)
    assert got == 0
