"""One content under many names, through real daemons: who knows the digest finds what others fetched by URL."""

import hashlib
import json
import time
import urllib.request

import pytest

from tests.integration.node import TIMEOUT, Daemon, Origin, swarm

SIZE = 1024 * 1024 + 5
CONTENT = hashlib.shake_128(b"names").digest(SIZE)
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture
def origin():
    with Origin({"/f": CONTENT, "/elsewhere": CONTENT}) as origin:
        yield origin


def names(daemon):
    """How many names this daemon announces."""
    metrics = urllib.request.urlopen(f"http://{daemon.status['http']}/metrics", timeout=TIMEOUT).read().decode()
    [line] = [line for line in metrics.splitlines() if line.startswith("swarm_announcements ")]
    return int(float(line.split()[1]))


def until_it_has(daemon, number):
    deadline = time.monotonic() + TIMEOUT
    while names(daemon) != number:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def newcomer(directory, known, *what):
    """A fetch by a node that has no link to anybody when it asks, so that only announcements tell whom to link to."""
    target = directory / "copy"
    options = ("-o", target, "--data-dir", directory / "data", "--join", known.control, "--json")
    ended = swarm("fetch", *what, *options, SWARM_NETWORK_OPEN="test")
    assert ended.returncode == 0, ended.stderr
    assert target.read_bytes() == CONTENT
    return json.loads(ended.stdout)


def test_who_knows_only_the_digest_finds_what_another_host_fetched_by_url(tmp_path, origin):
    with (
        Daemon(tmp_path / "known", http="off") as known,
        Daemon(tmp_path / "holder", "--join", known.control, http="127.0.0.1:0") as holder,
    ):
        assert holder.fetch(origin.url("/f"), tmp_path / "first")["from_origin"] == SIZE
        until_it_has(holder, 2)
        before = origin.sent
        for number, what in enumerate([(DIGEST,), (origin.url("/elsewhere"), "--digest", DIGEST)]):
            directory = tmp_path / str(number)
            directory.mkdir()
            said = newcomer(directory, known, *what)
            assert (said["from_peers"], said["from_origin"]) == (SIZE, 0)
        assert origin.sent == before


def test_both_names_outlive_a_restart_and_go_with_the_content(tmp_path, origin):
    with Daemon(tmp_path / "a", http="127.0.0.1:0") as daemon:
        task = daemon.fetch(origin.url("/f"), tmp_path / "out")["task"]
        until_it_has(daemon, 2)
    with Daemon(tmp_path / "a", http="127.0.0.1:0") as daemon:
        assert names(daemon) == 2
        assert swarm("task", "rm", task, "--data-dir", daemon.data_dir).returncode == 0
        assert names(daemon) == 0
        assert daemon.fetch(origin.url("/f"), tmp_path / "again")["from_origin"] == SIZE
        until_it_has(daemon, 2)


def test_private_content_has_no_name_before_and_after_a_restart(tmp_path, origin):
    with Daemon(tmp_path / "a", http="127.0.0.1:0") as daemon:
        daemon.fetch(origin.url("/f"), tmp_path / "out", "--header", "Authorization: Bearer x")
        assert names(daemon) == 0
    with Daemon(tmp_path / "a", http="127.0.0.1:0") as daemon:
        assert names(daemon) == 0
