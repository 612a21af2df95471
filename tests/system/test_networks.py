"""Address families, closed networks, clocks, and what must not be reached."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.cluster import SWARM, clean_environment, hosts_dir
from tests.system.origin import MIB
from tests.system.scene import scene

pytestmark = pytest.mark.system

LENGTH = 8 * MIB
# Copies: 1.00 to 1.03 on a machine that keeps up, a piece being 0.03; more where it stands still for as long as a lease.
# How near to one is the matter of test_copies.py.
SHARED = 1.2


def test_hosts_with_ipv6_only_share_one_copy() -> None:
    with scene(4, LENGTH, ipv4=False, ipv6=True, rate="50mbit") as s:
        s.cluster.start_all()
        s.assert_all_have_it(s.cluster.fetch_all(s.url, timeout=60))
        s.cluster.stop()
        assert s.copies() <= SHARED


def test_a_daemon_on_every_address_serves_both_families() -> None:
    """Host 1 listens on `[::]`; host 2 knows its IPv4 address, host 3 its IPv6 address."""
    with scene(3, LENGTH, ipv6=True) as s:
        s.cluster.start(1, listen="[::]:7400").wait_ready()
        s.cluster.start(2, join="10.77.0.1:7400").wait_ready()
        s.cluster.start(3, listen="[fd77::3]:7400", join="[fd77::1]:7400").wait_ready()
        by_digest = ("--digest", s.file.digest)
        s.assert_all_have_it([s.cluster.fetch_one(1, s.url, *by_digest, timeout=30)])
        others = s.cluster.fetch_all(s.url, *by_digest, "--no-origin", timeout=30, on=[2, 3])
        s.assert_all_have_it(others)
        assert [it.said["from_peers"] for it in others] == [LENGTH, LENGTH]


# --- closed networks ------------------------------------------------------------------------------------------------


@pytest.fixture
def authority() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="swarm-authority-", dir=hosts_dir()) as work:
        directory = Path(work) / "authority"
        network("create", str(directory))
        yield directory


def network(*arguments: str) -> dict[str, object]:
    argv = [SWARM, "network", *arguments, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, env=clean_environment())
    assert done.returncode == 0, done.stderr
    shown: dict[str, object] = json.loads(done.stdout)
    return shown


def issue(authority: Path, *hosts: int) -> dict[int, Path]:
    directories = {host: authority.parent / f"node{host}" for host in hosts}
    for directory in directories.values():
        network("issue", str(authority), "--out", str(directory))
    return directories


def test_members_of_a_closed_network_share_one_copy(authority: Path) -> None:
    with scene(4, LENGTH, rate="50mbit", network=issue(authority, 1, 2, 3, 4)) as s:
        s.cluster.start_all()
        s.assert_all_have_it(s.cluster.fetch_all(s.url, timeout=60))
        s.cluster.stop()
        assert s.copies() <= SHARED


def test_a_revoked_member_gets_nothing_from_the_others(authority: Path) -> None:
    members = issue(authority, 1, 2, 3)
    network("revoke", str(authority), str(members[3] / "node.crt"))
    for host in (1, 2):  # the revoked host does not install the list that names it
        shutil.copy(authority / "ca.crl", members[host] / "ca.crl")
    with scene(3, LENGTH, network=members) as s:
        s.cluster.start_all()
        by_digest = ("--digest", s.file.digest)
        s.assert_all_have_it([s.cluster.fetch_one(1, s.url, *by_digest, timeout=30)])
        s.assert_all_have_it([s.cluster.fetch_one(2, s.url, *by_digest, "--no-origin", timeout=30)])
        revoked = s.cluster.fetch_one(3, s.url, *by_digest, "--no-origin", timeout=60)
        assert revoked.code not in (0, 130), revoked
        assert "Traceback" not in revoked.end.err
        assert not revoked.path.exists()


def test_a_member_revoked_while_connected_is_dropped(authority: Path) -> None:
    members = issue(authority, 1, 2)
    with scene(2, LENGTH, network=members) as s:
        s.cluster.start_all()
        by_digest = ("--digest", s.file.digest)
        s.assert_all_have_it([s.cluster.fetch_one(1, s.url, *by_digest, timeout=30)])
        s.assert_all_have_it([s.cluster.fetch_one(2, s.url, *by_digest, "--no-origin", timeout=30)])
        assert peers(s.cluster.command(1, "peers", "--json")) != []
        network("revoke", str(authority), str(members[2] / "node.crt"))
        shutil.copy(authority / "ca.crl", members[1] / "ca.crl")
        deadline = time.monotonic() + 20
        while peers(s.cluster.command(1, "peers", "--json")):
            assert time.monotonic() < deadline, "the revoked member is still connected"
            time.sleep(0.2)


def test_a_member_of_another_network_gets_nothing(authority: Path) -> None:
    other = authority.parent / "other"
    network("create", str(other))
    members = issue(authority, 1)
    network("issue", str(other), "--out", str(other.parent / "stranger"))
    with scene(2, LENGTH, network={**members, 2: other.parent / "stranger"}) as s:
        s.cluster.start_all()
        by_digest = ("--digest", s.file.digest)
        s.assert_all_have_it([s.cluster.fetch_one(1, s.url, *by_digest, timeout=30)])
        stranger = s.cluster.fetch_one(2, s.url, *by_digest, "--no-origin", timeout=60)
        assert stranger.code not in (0, 130), stranger
        assert peers(s.cluster.command(1, "peers", "--json")) == []


def peers(shown: subprocess.CompletedProcess[str]) -> list[object]:
    assert shown.returncode == 0, shown.stderr
    said = json.loads(shown.stdout)
    found: list[object] = said["peers"] if isinstance(said, dict) else said
    return found


# --- clocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", ["+1h", "-1h"])
def test_a_clock_off_by_an_hour_warns_and_works(offset: str) -> None:
    with scene(3, LENGTH, rate="50mbit") as s:
        s.cluster.start(1).wait_ready()
        s.cluster.start(2, environment=faked(offset))
        s.cluster.start(3)
        for host in (2, 3):
            s.cluster.daemons[host].wait_ready()
        s.assert_all_have_it(s.cluster.fetch_all(s.url, timeout=60))
        s.cluster.stop()
        assert s.copies() <= SHARED
        told = [host for host, daemon in s.cluster.daemons.items() if "our clock differs" in daemon.log.read_text()]
        assert told == [2], "whose clock is wrong is told so, and nobody else"


def faked(offset: str) -> dict[str, str]:
    """The environment in which a daemon's wall clock is off; faketime's own wrapper would stay as its parent."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": offset,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # which is right on such a host
    }


# --- what must not be reached -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://2852039166/latest/meta-data/",
        "http://0xa9.0xfe.0xa9.0xfe/",
        "http://[::ffff:169.254.169.254]/",
    ],
)
def test_the_metadata_address_and_its_disguises_get_no_packet(url: str) -> None:
    with scene(1, MIB, ipv6=True) as s:
        s.cluster.start_all()
        s.hosts.count_packets_to(1, "169.254.0.0/16")
        refused = s.cluster.fetch_one(1, url, timeout=30)
        assert (refused.code, refused.said.get("error")) == (7, "NotPermitted"), refused
        assert len(refused.end.err.strip().splitlines()) == 1, refused.end.err
        assert s.hosts.packets_to(1) == 0


def test_an_origin_that_redirects_to_the_metadata_address_is_refused() -> None:
    with scene(1, MIB) as s:
        s.cluster.start_all()
        s.hosts.count_packets_to(1, "169.254.0.0/16")
        refused = s.cluster.fetch_one(1, s.origin.url("to-metadata"), timeout=30)
        assert (refused.code, refused.said.get("error")) == (7, "NotPermitted"), refused
        assert s.hosts.packets_to(1) == 0


@pytest.mark.parametrize(("name", "code"), [("nothing", 4), ("forbidden", 7), ("unauthorized", 7)])
def test_what_the_origin_refuses_has_its_exit_code(name: str, code: int) -> None:
    with scene(1, MIB) as s:
        s.cluster.start_all()
        refused = s.cluster.fetch_one(1, s.origin.url(name), timeout=30)
        assert refused.code == code, refused
        assert len(refused.end.err.strip().splitlines()) == 1, refused.end.err
        assert not refused.path.exists()
