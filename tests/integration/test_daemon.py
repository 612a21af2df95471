"""The daemon and its commands as processes on real sockets: start, serve, share, stop, and everything that can be wrong."""

import hashlib
import json
import os
import signal
import socket
import sqlite3
import stat
import time
import urllib.request

import pytest

from tests.integration.node import TIMEOUT, Daemon, Origin, notify_socket, spawn, swarm

SIZE = 3 * 1024 * 1024 + 17
CONTENT = hashlib.shake_128(b"swarm").digest(SIZE)
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture
def origin():
    with Origin({"/f": CONTENT, "/small": b"x", "/empty": b""}) as origin:
        yield origin


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """One daemon for all tests that only ask it something it refuses."""
    with Daemon(tmp_path_factory.mktemp("shared") / "a", SWARM_ORIGIN_STALL_TIMEOUT="300ms") as daemon:
        yield daemon


def one_line(ended, code):
    """What every failure is: its exit code, one line, nothing else."""
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith("swarm: ")
    assert ended.stderr.count("\n") == 1
    return ended.stderr


# --- the thin thread ---------------------------------------------------------------------------------------------------


def test_two_daemons_share_one_copy_and_every_byte_is_right(tmp_path, origin):
    with Daemon(tmp_path / "a", http="127.0.0.1:0") as first, Daemon(tmp_path / "b", "--join", first.control) as second:
        one = first.fetch(origin.url("/f"), tmp_path / "one")
        assert (one["digest"], one["bytes"], one["from_peers"]) == (DIGEST, SIZE, 0)
        before = origin.sent
        two = second.fetch(origin.url("/f"), tmp_path / "two")
        assert (two["digest"], two["from_origin"], two["from_peers"]) == (DIGEST, 0, SIZE)
        assert origin.sent == before
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == CONTENT

        again = second.fetch(origin.url("/f"), tmp_path / "again")
        assert (again["from_local"], again["from_origin"], again["from_peers"]) == (SIZE, 0, 0)
        asked = len(origin.requests)
        by_digest = second.fetch(origin.url("/f"), tmp_path / "digest", "--digest", DIGEST)
        assert by_digest["from_local"] == SIZE
        assert len(origin.requests) == asked  # not even a HEAD

        shown = json.loads(swarm("task", "show", two["task"], "--data-dir", second.data_dir, "--json").stdout)
        assert (shown["state"], shown["last_fetch"]["from_peers"], shown["url"]) == ("complete", SIZE, origin.url("/f"))
        [peer] = json.loads(swarm("peers", "--data-dir", second.data_dir, "--json").stdout)
        assert peer["node"] == first.status["node"]
        metrics = urllib.request.urlopen(f"http://{first.status['http']}/metrics", timeout=TIMEOUT).read().decode()
        assert f"swarm_sent_bytes_total {SIZE:.6e}".split("e")[0][:24] in metrics
        assert 'swarm_fetches_total{result="ok"} 1.0' in metrics


def test_the_log_has_one_line_for_each_download_with_its_numbers(tmp_path, origin):
    with Daemon(tmp_path / "a") as daemon:
        daemon.fetch(origin.url("/f"), tmp_path / "one", "--header", "Authorization: Bearer s3cr3t")
        lines = [line for line in daemon.lines() if line["level"] == "info"]
        assert [line["event"] for line in lines] == ["ready", "fetched"]
        assert lines[1]["bytes"] == lines[1]["from_origin"] == SIZE
    for path in [daemon.log, *(p for p in daemon.data_dir.rglob("*") if p.is_file())]:
        assert b"s3cr3t" not in path.read_bytes(), path


@pytest.mark.parametrize(("path", "content"), [("/small", b"x"), ("/empty", b"")])
def test_the_smallest_contents_are_exact(tmp_path, origin, path, content):
    with Daemon(tmp_path / "a") as first, Daemon(tmp_path / "b", "--join", first.control) as second:
        for daemon in (first, second):
            assert daemon.fetch(origin.url(path), tmp_path / daemon.data_dir.name.upper())["bytes"] == len(content)
    assert (tmp_path / "A").read_bytes() == (tmp_path / "B").read_bytes() == content


def test_a_range_brings_these_bytes_and_no_more_pieces_than_they_need(tmp_path, origin):
    with Daemon(tmp_path / "a") as daemon:
        said = daemon.fetch(origin.url("/f"), tmp_path / "part", "--range", "300000-300099")
        assert (said["bytes"], said["digest"]) == (100, None)
        assert (tmp_path / "part").read_bytes() == CONTENT[300_000:300_100]
        assert origin.sent < SIZE
        assert daemon.fetch(origin.url("/f"), tmp_path / "tail", "--range", f"{SIZE - 5}-")["bytes"] == 5
        assert (tmp_path / "tail").read_bytes() == CONTENT[-5:]
        beyond = daemon.fetch(origin.url("/f"), tmp_path / "beyond", "--range", f"{SIZE + 5}-")
        assert beyond["exit_code"] == 2
        assert not (tmp_path / "beyond").exists()
        assert daemon.fetch(origin.url("/f"), tmp_path / "all")["bytes"] == SIZE
    assert (tmp_path / "all").read_bytes() == CONTENT


def test_tasks_can_be_pinned_and_removed(tmp_path, origin):
    with Daemon(tmp_path / "a") as daemon:
        task = daemon.fetch(f"file://{tmp_path}/content", tmp_path / "none").get("task")
        assert task is None
        (tmp_path / "content").write_bytes(CONTENT)
        task = daemon.fetch(f"file://{tmp_path}/content", tmp_path / "one")["task"]
        data_dir = ("--data-dir", daemon.data_dir)
        assert swarm("task", "pin", task[:12], *data_dir).returncode == 0
        [row] = json.loads(swarm("task", "ls", "--json", *data_dir).stdout)
        assert (row["pinned"], row["private"]) == (True, True)
        assert swarm("task", "unpin", task, *data_dir).returncode == 0
        assert "no task" in one_line(swarm("task", "show", "0000000000", *data_dir), 1)


# --- without a daemon --------------------------------------------------------------------------------------------------


def test_a_fetch_without_a_daemon_runs_a_node_and_leaves_nothing_running(tmp_path, origin):
    ended = swarm("fetch", origin.url("/f"), "-o", tmp_path / "out", "--data-dir", tmp_path / "data", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["from_origin"] == SIZE
    assert (tmp_path / "out").read_bytes() == CONTENT
    assert not (tmp_path / "data" / "control.sock").exists()
    again = swarm("fetch", origin.url("/f"), "-o", tmp_path / "again", "--data-dir", tmp_path / "data", "--json")
    assert json.loads(again.stdout)["from_local"] == SIZE


def test_a_fetch_without_a_daemon_takes_from_the_node_it_joins(tmp_path, origin):
    with Daemon(tmp_path / "a") as daemon:
        daemon.fetch(origin.url("/f"), tmp_path / "one")
        before = origin.sent
        ended = swarm(
            "fetch", origin.url("/f"), "-o", tmp_path / "two", "--data-dir", tmp_path / "b", "--join", daemon.control, "--json",
            SWARM_NETWORK_OPEN="test",
        )  # fmt: skip
    assert json.loads(ended.stdout)["from_peers"] == SIZE
    assert origin.sent == before


def test_commands_started_at_once_without_a_daemon_share_one_node(tmp_path, origin):
    commands = [
        spawn("fetch", origin.url("/f"), "-o", tmp_path / f"out{i}", "--data-dir", tmp_path / "data", "--json")
        for i in range(4)
    ]
    for i, command in enumerate(commands):
        out, err = command.communicate(timeout=TIMEOUT)
        assert (command.returncode, err) == (0, "")
        assert json.loads(out)["bytes"] == SIZE
        assert (tmp_path / f"out{i}").read_bytes() == CONTENT
    assert origin.sent == SIZE


def test_a_command_takes_over_when_the_one_whose_node_it_used_is_interrupted(tmp_path, origin):
    origin.hold()
    first = spawn("fetch", origin.url("/f"), "-o", tmp_path / "one", "--data-dir", tmp_path / "data")
    assert origin.reached.wait(TIMEOUT)
    second = spawn("fetch", origin.url("/f"), "-o", tmp_path / "two", "--data-dir", tmp_path / "data", "--json")
    wait_until(lambda: commands_waiting(tmp_path / "data") == 2)
    first.send_signal(signal.SIGINT)
    assert first.wait(TIMEOUT) == 130
    assert first.stderr is not None
    assert "resumes" in first.stderr.read()
    origin.flowing.set()
    out, err = second.communicate(timeout=TIMEOUT)
    assert (second.returncode, err) == (0, "")
    assert json.loads(out)["bytes"] == SIZE
    assert (tmp_path / "two").read_bytes() == CONTENT
    assert not (tmp_path / "one").exists()
    close(first)


def commands_waiting(data_dir):
    """How many there are beside the one that asks."""
    return json.loads(swarm("status", "--json", "--data-dir", data_dir).stdout)["commands"] - 1


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline


def close(process):
    process.wait(TIMEOUT)
    for stream in (process.stdout, process.stderr):
        stream.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fetch_leaves_no_half_file_and_the_same_command_resumes(tmp_path, origin, number):
    origin.hold()
    origin.free_bytes = 2 * 1024 * 1024
    arguments = ("fetch", origin.url("/f"), "-o", tmp_path / "out", "--data-dir", tmp_path / "data", "--json")
    command = spawn(*arguments)
    assert origin.reached.wait(TIMEOUT)
    command.send_signal(number)
    out, err = command.communicate(timeout=TIMEOUT)
    assert command.returncode == 130
    assert json.loads(out)["error"] == "Interrupted"
    assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["data"]
    origin.flowing.set()
    said = json.loads(swarm(*arguments).stdout)
    assert said["bytes"] == SIZE
    assert said["from_local"] > 0
    assert said["from_local"] + said["from_origin"] == SIZE
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_an_interrupted_command_cancels_its_own_wait_only(tmp_path, origin):
    origin.hold()
    with Daemon(tmp_path / "a") as daemon:
        common = ("fetch", origin.url("/f"), "--data-dir", daemon.data_dir, "--json")
        commands = [spawn(*common, "-o", tmp_path / name) for name in ("one", "two")]
        assert origin.reached.wait(TIMEOUT)
        commands[0].send_signal(signal.SIGINT)
        assert commands[0].wait(TIMEOUT) == 130
        origin.flowing.set()
        out, _ = commands[1].communicate(timeout=TIMEOUT)
        assert json.loads(out)["bytes"] == SIZE
        assert daemon.process.poll() is None
        close(commands[0])
    assert (tmp_path / "two").read_bytes() == CONTENT


# --- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "code"), [(404, 4), (410, 4), (401, 7), (403, 7), (500, 8), (503, 8)])
def test_what_an_origin_refuses_is_said_with_its_exit_code(tmp_path, origin, status, code, daemon):
    origin.statuses["/bad"] = status
    said = daemon.fetch(origin.url("/bad"), tmp_path / "out")
    assert said["exit_code"] == code
    assert str(status) in said["message"]
    assert "\n" not in said["message"]
    assert not (tmp_path / "out").exists()


def test_wrong_content_is_refused_and_nothing_is_written(tmp_path, origin, daemon):
    wrong = "sha256:" + "0" * 64
    said = daemon.fetch(origin.url("/f"), tmp_path / "out", "--digest", wrong)
    assert (said["error"], said["exit_code"]) == ("DigestMismatch", 3)
    assert DIGEST in said["message"]
    assert daemon.fetch(origin.url("/f"), tmp_path / "good", "--digest", DIGEST)["bytes"] == SIZE
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("host", ["169.254.169.254", "[::ffff:169.254.169.254]", "2852039166", "0xa9.0xfe.0xa9.0xfe"])
def test_the_metadata_address_and_its_disguises_are_refused(tmp_path, host, daemon):
    said = daemon.fetch(f"http://{host}/latest/meta-data/", tmp_path / "out")
    assert said["exit_code"] == 7
    assert "egress.allow" in said["message"]


def test_an_unknown_host_and_a_port_nobody_listens_on_are_said(tmp_path, daemon):
    assert daemon.fetch("http://no-such-host.invalid/f", tmp_path / "out")["exit_code"] == 8
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        said = daemon.fetch(f"http://127.0.0.1:{free.getsockname()[1]}/f", tmp_path / "out")
    assert said["exit_code"] == 8


def test_an_origin_that_stalls_is_given_up(tmp_path, origin, daemon):
    origin.hold()
    origin.free_bytes = 0
    said = daemon.fetch(origin.url("/f"), tmp_path / "out")
    assert said["exit_code"] == 8


def test_a_new_version_at_the_origin_is_another_task(tmp_path, origin, daemon):
    old = daemon.fetch(origin.url("/f"), tmp_path / "old")
    origin.files["/f"], origin.etags["/f"] = b"new", '"2"'
    new = daemon.fetch(origin.url("/f"), tmp_path / "new")
    assert old["task"] != new["task"]
    assert (tmp_path / "new").read_bytes() == b"new"


def test_content_rotten_on_the_disk_is_fetched_again_and_never_handed_out(tmp_path, origin):
    with Daemon(tmp_path / "a") as daemon:
        daemon.fetch(origin.url("/f"), tmp_path / "one")
    [stored] = [path for path in (tmp_path / "a" / "tasks").rglob("*") if path.is_file()]
    with stored.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"rot")
    with Daemon(tmp_path / "a") as daemon:
        said = daemon.fetch(origin.url("/f"), tmp_path / "two")
        assert said["digest"] == DIGEST
        assert any("rotten" in line["event"] or "rotten" in str(line) for line in daemon.lines())
    assert (tmp_path / "two").read_bytes() == CONTENT


# --- starting ----------------------------------------------------------------------------------------------------------------


def daemon_fails(*arguments, **more):
    return swarm("daemon", *arguments, **more)


def test_a_second_daemon_on_the_store_is_refused(tmp_path):
    with Daemon(tmp_path / "a") as daemon:
        err = one_line(daemon_fails("--data-dir", daemon.data_dir, "--listen", "127.0.0.1:0", "--http", "off"), 1)
        assert str(daemon.process.pid) in err
        assert swarm("status", "--data-dir", daemon.data_dir).returncode == 0


def test_an_embedded_node_on_a_daemons_store_is_refused(tmp_path, origin):
    with Daemon(tmp_path / "a") as daemon:
        ended = swarm("fetch", origin.url("/f"), "-o", tmp_path / "out", "--embedded", "--data-dir", daemon.data_dir)
        assert str(daemon.process.pid) in one_line(ended, 1)


def test_ports_in_use_are_said(tmp_path):
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        common = ("--data-dir", tmp_path / "a")
        for listen, http in (
            (f"127.0.0.1:{tcp.getsockname()[1]}", "off"),
            (f"127.0.0.1:{udp.getsockname()[1]}", "off"),
            ("127.0.0.1:0", f"127.0.0.1:{tcp.getsockname()[1]}"),
        ):
            err = one_line(daemon_fails(*common, "--listen", listen, "--http", http), 2)
            assert "in use" in err
            assert (listen if http == "off" else http) in err


def test_a_store_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    with Daemon(tmp_path / "a"):
        pass
    with sqlite3.connect(tmp_path / "a" / "store.db") as database:
        tables = dict(database.execute("SELECT name, sql FROM sqlite_master WHERE type='table'").fetchall())
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version:
            database.execute(f"PRAGMA user_version = {version + 1000}")
        else:
            [name] = [name for name in tables if "version" in tables[name].lower()]
            database.execute(f"UPDATE {name} SET version = version + 1000")  # noqa: S608
    database.close()
    err = one_line(daemon_fails("--data-dir", tmp_path / "a", "--listen", "127.0.0.1:0", "--http", "off"), 1)
    assert "newer" in err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--listen", "0.0.0.0:7400"), 2, "--open-network"),
        (("--listen", "1:2:3"), 2, "brackets"),
        (("--listen", "192.0.2.1:7400", "--open-network", "x"), 2, "192.0.2.1"),
        (("--listen", "no-such-host.invalid:1", "--open-network", "x"), 2, "no-such-host"),
        (("--config", "/nowhere.toml"), 2, "/nowhere.toml"),
        (("--network", "/nowhere"), 2, "/nowhere"),
        (("--network", "/n", "--open-network", "x"), 2, "exclude"),
        (("--open-network", "bad name!"), 2, "network name"),
        (("--join", "a b"), 2, "--join"),
        (("--log-level", "loud"), 2, "loud"),
        (("--data-dir", "/proc/none"), 1, "/proc/none"),
    ],
)
def test_what_a_daemon_cannot_start_with_is_one_line(tmp_path, arguments, code, text):
    fixed = ("--data-dir", tmp_path / "a") if "--data-dir" not in arguments else ()
    ended = daemon_fails("--http", "off", *fixed, *arguments)
    assert ended.returncode in (1, 2) if code == 1 else ended.returncode == code
    assert text in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_data_directory_open_to_others_is_refused(tmp_path):
    (tmp_path / "a").mkdir(mode=0o777)
    (tmp_path / "a").chmod(0o777)
    err = one_line(daemon_fails("--data-dir", tmp_path / "a", "--listen", "127.0.0.1:0", "--http", "off"), 2)
    assert "chmod" in err


def test_everything_in_the_data_directory_is_its_owners_alone(tmp_path, origin):
    old = os.umask(0)
    try:
        with Daemon(tmp_path / "a") as daemon:
            daemon.fetch(origin.url("/f"), tmp_path / "one")
            for path in [daemon.data_dir, *daemon.data_dir.rglob("*")]:
                assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path
    finally:
        os.umask(old)


# --- ready, stop -------------------------------------------------------------------------------------------------------------


def test_systemd_is_told_ready_and_stopping(tmp_path):
    with notify_socket(tmp_path / "notify") as channel:
        with Daemon(tmp_path / "a", NOTIFY_SOCKET=str(tmp_path / "notify")) as daemon:
            assert channel.recv(100) == b"READY=1"
            assert daemon.stop() == 0
        assert channel.recv(100) == b"STOPPING=1"


def test_a_daemon_is_ready_within_a_second_and_small_when_idle(tmp_path):
    """The best of three: the machine may be busy, the daemon may not."""
    best = 9.0
    for name in "abc":
        began = time.monotonic()
        with Daemon(tmp_path / name, http="127.0.0.1:0") as daemon:
            best = min(best, time.monotonic() - began)
            with open(f"/proc/{daemon.process.pid}/status") as file:
                resident = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
            assert resident <= 60 * 1024
    assert best <= 1.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_told_to_stop_ends_with_zero_and_tidies_up(tmp_path, number):
    with Daemon(tmp_path / "a") as daemon:
        assert daemon.stop(number) == 0
        assert daemon.lines()[-1]["event"] == "stopped"
    assert not (tmp_path / "a" / "control.sock").exists()


def test_a_hangup_does_not_end_a_daemon(tmp_path):
    with Daemon(tmp_path / "a") as daemon:
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: daemon.lines()[-1].get("signal") == "SIGHUP")
        assert swarm("status", "--data-dir", daemon.data_dir).returncode == 0


def test_a_daemon_told_to_stop_lets_a_download_end(tmp_path, origin):
    origin.hold()
    with Daemon(tmp_path / "a") as daemon:
        command = spawn("fetch", origin.url("/f"), "-o", tmp_path / "out", "--data-dir", daemon.data_dir, "--json")
        assert origin.reached.wait(TIMEOUT)
        daemon.process.terminate()
        wait_until(lambda: daemon.lines()[-1]["event"] == "stopping")
        origin.flowing.set()
        out, _ = command.communicate(timeout=TIMEOUT)
        assert json.loads(out)["bytes"] == SIZE
        assert daemon.process.wait(TIMEOUT) == 0
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_a_download_that_does_not_end_in_time_is_cut_and_resumed_later(tmp_path, origin):
    origin.hold()
    origin.free_bytes = 2 * 1024 * 1024
    with Daemon(tmp_path / "a", SWARM_DRAIN="100ms") as daemon:
        command = spawn("fetch", origin.url("/f"), "-o", tmp_path / "out", "--data-dir", daemon.data_dir, "--json")
        assert origin.reached.wait(TIMEOUT)
        assert daemon.stop() == 0
        origin.flowing.set()
        out, _ = command.communicate(timeout=TIMEOUT)
    said = json.loads(out)
    if command.returncode == 0:  # told at once, the command went on alone
        assert said["from_local"] > 0
    else:
        assert (command.returncode, said["error"]) == (130, "Interrupted")
        said = json.loads(
            swarm("fetch", origin.url("/f"), "-o", tmp_path / "out", "--data-dir", tmp_path / "a", "--json").stdout
        )
        assert said["from_local"] > 0
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_a_second_signal_ends_a_daemon_at_once(tmp_path, origin):
    origin.hold()
    with Daemon(tmp_path / "a") as daemon:
        command = spawn("fetch", origin.url("/f"), "-o", tmp_path / "out", "--data-dir", daemon.data_dir, "--no-progress")
        assert origin.reached.wait(TIMEOUT)
        daemon.process.terminate()
        wait_until(lambda: daemon.lines()[-1]["event"] == "stopping")
        daemon.process.terminate()
        assert daemon.process.wait(5) == 128 + signal.SIGTERM
        command.kill()
        close(command)


def test_a_daemon_killed_at_once_starts_again_on_its_store(tmp_path, origin):
    with Daemon(tmp_path / "a") as daemon:
        daemon.fetch(origin.url("/f"), tmp_path / "one")
        daemon.process.kill()
        daemon.process.wait()
    with Daemon(tmp_path / "a") as daemon:
        said = daemon.fetch(origin.url("/f"), tmp_path / "two")
    assert said["from_local"] == SIZE
    assert (tmp_path / "two").read_bytes() == CONTENT
