"""The hosts themselves: what they promise to the other system tests."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.system import hosts as hosts_module
from tests.system.hosts import Hosts, HostsError, namespaces
from tests.system.origin import MIB, NginxOrigin
from tests.system.processes import Prepared, last_done, spread, start_together, wait

pytestmark = pytest.mark.system


def test_hosts_reach_one_another_and_nothing_else() -> None:
    with Hosts(2, ipv6=True) as hosts, NginxOrigin(hosts) as origin:
        file = origin.add("file", 1000)
        assert hosts.run(1, "curl", "-s", "-o", "/dev/null", "-w", "%{size_download}", origin.url("file")) == "1000"
        assert origin.copies(file) == 1
        with pytest.raises(HostsError, match="curl"):
            hosts.run(1, "curl", "-s", "-m", "0.5", "http://192.0.2.1/")
        interfaces = hosts.run(1, "ip", "-br", "link").split("\n")
        assert {line.split("@")[0].split()[0] for line in interfaces if line} == {"lo", "eth0"}


def test_a_limited_link_takes_as_long_as_its_rate_says(tmp_path: Path) -> None:
    with Hosts(1) as hosts, NginxOrigin(hosts) as origin:
        file = origin.add("file", 4 * MIB)
        hosts.limit(0, egress="40mbit")
        began = time.monotonic()
        hosts.run(1, "curl", "-s", "-o", str(tmp_path / "copy"), origin.url(file.name))
        # 0.84 s of bits, 4 % of headers, less the burst of 256 KiB.
        assert 0.75 <= time.monotonic() - began <= 1.3


def test_a_partition_holds_until_it_is_healed() -> None:
    with Hosts(1) as hosts, NginxOrigin(hosts) as origin:
        origin.add("file", 10)
        fetch = ("curl", "-s", "-m", "0.5", "-o", "/dev/null", origin.url("file"))
        hosts.split([0], [1])
        with pytest.raises(HostsError):
            hosts.run(1, *fetch)
        hosts.unsplit(0, 1)
        hosts.run(1, *fetch)


def test_hosts_of_a_killed_run_are_removed_by_the_next() -> None:
    script = "from tests.system.hosts import Hosts\nwith Hosts(1) as h: print(h.namespace(1), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        assert name in namespaces()
        with Hosts(0):
            assert name in namespaces(), "its process lives"
        other.kill()
        other.wait(10)
    with Hosts(0):
        assert name not in namespaces()


def test_nothing_is_left_of_hosts_whose_test_failed() -> None:
    processes: list[subprocess.Popen[bytes]] = []
    hosts = Hosts(1)
    with pytest.raises(KeyError):
        _fail_in(hosts, processes)
    assert [it.wait(5) != 0 for it in processes] == [True]
    assert [name for name in namespaces() if name.startswith(hosts._prefix)] == []


def _fail_in(hosts: Hosts, processes: list[subprocess.Popen[bytes]]) -> None:
    with hosts:
        processes.append(hosts.popen(1, ["sleep", "60"]))
        raise KeyError


def test_a_pid_that_was_used_again_does_not_keep_stale_hosts_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name holds the start time: the same pid of a later process is somebody else."""
    hosts = Hosts(0)
    hosts.__enter__()
    try:
        own = hosts_module._start_time
        monkeypatch.setattr(hosts_module, "_start_time", lambda pid: (own(pid) or 0) + 1)
        assert hosts.namespace(0) in hosts_module.remove_stale()
    finally:
        monkeypatch.undo()
        hosts.down()


def test_commands_of_a_start_begin_together(tmp_path: Path) -> None:
    commands = [Prepared(["sh", "-c", "sleep 0.2; echo $0", str(n)], tmp_path, f"c{n}") for n in range(20)]
    try:
        start_together(commands)
        ends = wait(commands, 20)
    finally:
        for it in commands:
            it.close()
    assert [end.out.strip() for end in ends] == [str(n) for n in range(20)]
    # 2 ms on a quiet machine, 35 ms on one with five times as much to do as it can; benchmarks hold it against 50 ms.
    assert spread(ends) < 0.1
    assert last_done(ends) >= 0.2
