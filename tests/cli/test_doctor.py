"""`swarm doctor`: each thing that can be wrong is found, with what to do."""

import json
import os
import resource
import socket
import time

import pytest

from cli import doctor
from cli.doctor import FAILED, OK, WARNING, Finding, examine
from cli.main import run
from swarm.config import NetworkSettings, Settings, StoreSettings
from swarm.quantities import Endpoint
from tests.control.fakes import FakeNode, serving

STATUS = {
    **{"pid": 7, "state": "ready", "control": "127.0.0.1:7400", "pieces": "127.0.0.1:7401", "http": None, "join": []},
    **{"clock_skew_seconds": 0.0, "dht_contacts": 3, "peers": 1, "problems": [], "open": False, "network": "lab", "node": "ab"},
    "certificate_expires": time.time() + 86400 * 365,
}


class DoctorNode(FakeNode):
    said = STATUS

    def status(self):
        return self.said

    async def check_origin(self, url):
        return {"bytes": 5, "validator": "" if url.endswith("none") else "etag:x", "seconds": 0.1}


def found(findings, check):
    return [finding for finding in findings if finding.check == check]


def well(finding):
    return finding.state == OK and not finding.do


@pytest.fixture
def free_ports(monkeypatch, tmp_path):
    """A configuration of free ports, so that a daemon of this machine does not matter."""
    monkeypatch.setenv("SWARM_NETWORK_LISTEN", "127.0.0.1:0")
    monkeypatch.setenv("SWARM_HTTP_LISTEN", "127.0.0.1:0")
    monkeypatch.setenv("SWARM_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def test_a_healthy_machine_without_a_daemon_has_nothing_that_must_be_done(free_ports, capsys):
    assert run(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    checks = {check["check"] for check in answer["checks"]}
    assert checks >= {"configuration", "data directory", "disk", "daemon", "ports", "clock", "network"}
    assert not free_ports.exists()  # looking changes nothing


def test_a_healthy_daemon_has_nothing_that_must_be_done(tmp_path, capsys):
    with serving(DoctorNode(tmp_path), tmp_path):
        assert run(["doctor", "--data-dir", str(tmp_path), "--origin", "http://h/x"]) == 0
    out = capsys.readouterr().out
    assert "ok       daemon: runs (process 7, ready)" in out
    assert "ok       peers: 3 in the routing table, 1 connected" in out
    assert "ok       origin: answers in 0.1 s, 5 B, etag:x" in out
    assert "FAILED" not in out


def test_a_configuration_that_cannot_be_read_ends_the_examination(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("quota = 5\n")
    [finding] = examine(path, None, None, None, None)
    assert finding.state == FAILED
    assert "did you mean store.quota" in finding.message


def test_ports_in_use_are_named(tmp_path):
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        for port, transport in ((tcp.getsockname()[1], "TCP"), (udp.getsockname()[1], "UDP")):
            settings = Settings(network=NetworkSettings(listen=Endpoint("127.0.0.1", port)))
            findings = [finding for finding in doctor._ports(settings) if finding.state == FAILED]
            assert any(f"127.0.0.1:{port} ({transport}" in finding.message for finding in findings)
            assert all("ss -ln" in finding.do for finding in findings)


def test_an_address_that_is_not_ours_is_named():
    settings = Settings(network=NetworkSettings(listen=Endpoint("192.0.2.1", 7400), open="x"))
    assert all(finding.state == FAILED for finding in doctor._ports(settings) if "192.0.2.1" in finding.message)
    assert any("192.0.2.1" in finding.message for finding in doctor._ports(settings))


def test_a_full_disk_and_a_nearly_full_one_are_told_apart(tmp_path):
    def state(min_free):
        settings = Settings(data_dir=tmp_path, store=StoreSettings(min_free=min_free))
        return found(list(doctor._disk(settings)), "disk")[0].state

    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert state(0) == OK
    assert state(int(free * 0.75)) == WARNING
    assert state(free * 2) == FAILED


def test_a_data_directory_that_others_may_write_or_that_is_none_is_found(tmp_path):
    tmp_path.chmod(0o777)
    [finding] = found(list(doctor._disk(Settings(data_dir=tmp_path))), "data directory")
    assert (finding.state, finding.do) == (FAILED, f"run: chmod 700 {tmp_path}")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        [finding] = found(list(doctor._disk(Settings(data_dir=path))), "data directory")
        assert finding.state == FAILED


def test_a_data_directory_of_somebody_else_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    [finding] = found(list(doctor._disk(Settings(data_dir=tmp_path))), "data directory")
    assert finding.state == FAILED
    assert "belongs to user" in finding.message


@pytest.mark.parametrize(
    ("change", "check", "state", "text"),
    [
        ({"clock_skew_seconds": 3600.0}, "clock", WARNING, "1 h 0 min ahead of"),
        ({"clock_skew_seconds": -400.0}, "clock", WARNING, "6 min 40 s behind"),
        ({"problems": ["node.crt is out of date"]}, "network", WARNING, "out of date"),
        ({"certificate_expires": time.time() + 3600}, "network", WARNING, "ends in"),
        ({"certificate_expires": 0.0, "open": True}, "network", OK, "no protection"),
        ({"dht_contacts": 0, "peers": 0, "join": ["127.0.0.1:9"]}, "peers", FAILED, "none of 127.0.0.1:9 answers"),
        ({"dht_contacts": 0, "peers": 0}, "peers", WARNING, "knows no other"),
        ({"join": ["no-such-host.invalid:7400"]}, "peers", FAILED, "no address"),
    ],
)
def test_what_a_daemon_knows_is_wrong_is_said(tmp_path, change, check, state, text):
    node = DoctorNode(tmp_path)
    node.said = {**STATUS, **change}
    with serving(node, tmp_path):
        findings = found(list(examine(None, tmp_path, None, None, None)), check)
    assert findings[0].state == state
    assert text in findings[0].message
    assert state == OK or findings[0].do


def test_a_closed_network_is_read_as_the_daemon_would(free_ports, tmp_path):
    [finding] = doctor._membership(Settings(network=NetworkSettings(directory=tmp_path / "none")))
    assert (finding.state, finding.check) == (FAILED, "network")
    assert well(next(iter(doctor._membership(Settings(network=NetworkSettings(open="lab"))))))


def test_an_origin_is_asked_without_a_daemon_too(free_ports, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"12345")
    assert run(["doctor", "--origin", f"file://{tmp_path}/file"]) == 0
    assert "ok       origin: answers in" in capsys.readouterr().out
    assert run(["doctor", "--origin", f"file://{tmp_path}/none"]) == 1
    assert "FAILED   origin:" in capsys.readouterr().out


def test_an_origin_that_cannot_be_shared_is_said(tmp_path):
    with serving(DoctorNode(tmp_path), tmp_path):
        findings = list(examine(None, tmp_path, None, None, "http://h/none"))
    assert found(findings, "origin")[0].state == WARNING


def test_few_descriptors_are_said(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert next(iter(doctor._limits())).do == "run: ulimit -n 1024"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    assert next(iter(doctor._limits())).do == "run: ulimit -n 512"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    assert list(doctor._limits()) == []


def test_a_finding_that_is_not_well_says_what_to_do(capsys):
    doctor._print(Finding("disk", FAILED, "full\x1b[2J", "free some"))
    assert capsys.readouterr().out == "FAILED   disk: full\ufffd[2J\n         free some\n"
