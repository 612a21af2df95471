"""What bad input gets: one line that says what and what to do, its exit code, no traceback, and nothing is lost."""

import hashlib
import json
import os
import socket
import subprocess
import sys

import pytest

from tests.integration.node import SWARM, TIMEOUT, Daemon, Origin, environment, swarm

SIZE = 600_000
CONTENT = hashlib.shake_128(b"bad input").digest(SIZE)
MINE = b"what was there before"

UNPRIVILEGED = """
import ctypes, os, sys
for capability in (1, 2):  # DAC_OVERRIDE, DAC_READ_SEARCH: root is bound by permissions like everybody
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class EtagOfEachMoment(dict[str, int]):
    """Another version with every answer."""

    def get(self, path, default=None):
        self[path] = number = self.setdefault(path, 0) + 1
        return f'"{number}"'


@pytest.fixture(scope="module")
def origin():
    with Origin({"/f": CONTENT, "/changing": CONTENT, "/kept": b"kept"}) as origin:
        origin.statuses = {"/missing": 404, "/closed": 401, "/forbidden": 403, "/broken": 500, "/busy": 503}
        yield origin


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, origin):
    with Daemon(
        tmp_path_factory.mktemp("bad") / "a", SWARM_ORIGIN_STALL_TIMEOUT="300ms", SWARM_STORE_QUOTA="1536KiB"
    ) as daemon:
        daemon.fetch(origin.url("/kept"), daemon.data_dir.parent / "kept")
        yield daemon


def is_one_line(ended, code, *says):
    assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
    assert ended.stderr.startswith("swarm: ")
    assert ended.stderr.count("\n") == 1
    for text in says:
        assert text in ended.stderr


def refused(daemon, tmp_path, url, code, *says, options=(), out=None):
    """A fetch ends so, and leaves everything as it was."""
    before = sorted(tmp_path.rglob("*"))
    target = out or tmp_path / "out"
    is_one_line(swarm("fetch", url, "-o", target, "--data-dir", daemon.data_dir, *options), code, *says)
    assert sorted(tmp_path.rglob("*")) == before
    rows = json.loads(swarm("task", "ls", "--json", "--data-dir", daemon.data_dir).stdout)
    assert [(row["state"], row["bytes"]) for row in rows] == [("complete", 4)]
    assert not [line for line in daemon.lines() if "exception" in line]


@pytest.mark.parametrize(
    ("path", "code", "says"),
    [
        ("/missing", 4, ("404", "check the URL")),
        ("/closed", 7, ("401", "--header")),
        ("/forbidden", 7, ("403", "--header")),
        ("/broken", 8, ("500", "try again later")),
        ("/busy", 8, ("503", "try again later")),
    ],
)
def test_what_an_origin_refuses(daemon, tmp_path, origin, path, code, says):
    refused(daemon, tmp_path, origin.url(path), code, *says)


def test_a_wrong_digest(daemon, tmp_path, origin):
    options = ("--digest", "sha256:" + "0" * 64)
    actual = hashlib.sha256(CONTENT).hexdigest()
    refused(daemon, tmp_path, origin.url("/f"), 3, actual, "check --digest", options=options)


def test_content_that_changes_all_the_time(daemon, tmp_path, origin, monkeypatch):
    monkeypatch.setattr(origin, "etags", EtagOfEachMoment())
    refused(daemon, tmp_path, origin.url("/changing"), 1, "another version", "--digest")


def test_an_origin_that_stands_still(daemon, tmp_path, origin, monkeypatch):
    monkeypatch.setattr(origin, "free_bytes", 0)
    monkeypatch.setattr(origin, "sent", 0)
    origin.hold()
    refused(daemon, tmp_path, origin.url("/f"), 8, "nothing came", "try again later")
    origin.flowing.set()


def test_an_unknown_host_and_a_port_nobody_listens_on(daemon, tmp_path):
    refused(daemon, tmp_path, "http://no-such-host.invalid/f", 8, "no-such-host.invalid", "check the URL")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refused(daemon, tmp_path, f"http://127.0.0.1:{free.getsockname()[1]}/f", 8, "cannot connect", "try again later")


@pytest.mark.parametrize("host", ["169.254.169.254", "2852039166", "[::ffff:169.254.169.254]"])
def test_a_refused_address(daemon, tmp_path, host):
    refused(daemon, tmp_path, f"http://{host}/latest/meta-data/", 7, "169.254.169.254", "egress.allow")


def test_a_digest_that_nobody_has(daemon, tmp_path):
    refused(daemon, tmp_path, "sha256:" + "1" * 64, 8, "no member of the swarm has", "give its URL")


def test_content_that_has_no_room_in_the_store(daemon, tmp_path, origin, monkeypatch):
    monkeypatch.setitem(origin.files, "/large", bytes(2 << 20))
    refused(daemon, tmp_path, origin.url("/large"), 5, "no room for 2.0 MiB", "raise the quota")


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize(("kind", "says"), [("a directory", "the path of a file in it"), ("a symbolic link", "not followed")])
def test_a_target_that_is_no_file(daemon, tmp_path, origin, kind, says, options):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.write_bytes(MINE)
    if kind == "a directory":
        target.mkdir()
    else:
        target.symlink_to(elsewhere)
    refused(daemon, tmp_path, origin.url("/f"), 1, kind, says, options=options, out=target)
    assert elsewhere.read_bytes() == MINE


def test_a_target_that_exists(daemon, tmp_path, origin):
    target = tmp_path / "target"
    target.write_bytes(MINE)
    refused(daemon, tmp_path, origin.url("/f"), 1, "exists", "--overwrite", out=target)
    assert target.read_bytes() == MINE


def unprivileged(*arguments):
    command = [sys.executable, "-c", UNPRIVILEGED, *SWARM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment())


def test_what_there_is_no_permission_for(daemon, tmp_path, origin):
    closed, secret = tmp_path / "closed", tmp_path / "secret"
    closed.mkdir(mode=0o500)
    secret.touch(mode=0o000)
    data_dir = ("--data-dir", tmp_path / "data")
    to_closed = unprivileged("fetch", origin.url("/kept"), "-o", closed / "out", "--data-dir", daemon.data_dir)
    is_one_line(to_closed, 1, str(closed), "permission denied", "another path")
    is_one_line(unprivileged("fetch", f"file://{secret}", "-o", tmp_path / "out", *data_dir), 7, str(secret), "no permission")
    made_in_closed = unprivileged("fetch", origin.url("/kept"), "-o", tmp_path / "out", "--data-dir", closed / "data")
    is_one_line(made_in_closed, 2, str(closed / "data"), "--data-dir")
    is_one_line(unprivileged("daemon", "--config", secret, *data_dir), 2, str(secret), "not readable")
    assert os.listdir(closed) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"drian = '3s'", "did you mean drain"),
        (b"drain = [1]", "expected a duration"),
        (b"[peer]\nencrypt = true", "did you mean peers"),
        (b"drain = ", "not valid TOML"),
        (b"\xff\xfe\0", "not valid TOML"),
    ],
)
def test_a_configuration_that_cannot_be_used(tmp_path, text, says):
    path = tmp_path / "swarm.toml"
    path.write_bytes(text)
    is_one_line(swarm("daemon", "--config", path, "--data-dir", tmp_path / "data"), 2, str(path), says)
    assert not (tmp_path / "data").exists()


@pytest.fixture
def members(tmp_path):
    """An authority and one node of it."""
    authority, node = tmp_path / "authority", tmp_path / "node"
    assert swarm("network", "create", authority).returncode == 0
    assert swarm("network", "issue", authority, "--out", node).returncode == 0
    return authority, node


def test_a_node_that_is_no_member_of_its_network(tmp_path, members):
    authority, node = members
    fixed = ("--network", node, "--data-dir", tmp_path / "data", "--listen", "127.0.0.1:0", "--http", "off")
    assert swarm("network", "revoke", authority, node / "node.crt").returncode == 0
    (node / "ca.crl").write_bytes((authority / "ca.crl").read_bytes())
    is_one_line(swarm("daemon", *fixed), 7, "not a member", "revoked", "swarm network issue")
    (node / "ca.crl").unlink()
    assert swarm("network", "create", tmp_path / "other").returncode == 0
    (node / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    is_one_line(swarm("daemon", *fixed), 7, "not a member", "authority", "swarm network issue")
