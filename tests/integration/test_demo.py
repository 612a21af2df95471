"""`swarm demo` as a person runs it, small."""

import json
import os
import signal

from tests.integration.node import TIMEOUT, spawn, swarm

OPTIONS = ("demo", "--nodes", "3", "--size", "6MiB", "--rate", "6MiB/s")


def test_the_demo_reads_the_origin_about_once_and_cleans_up(tmp_path):
    ended = swarm(*OPTIONS, "--directory", tmp_path, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    report = json.loads(ended.stdout)
    assert [row["node"] for row in report["nodes"]] == [1, 2, 3]
    assert all(row["from_peers"] + row["from_origin"] == report["bytes"] == 6 * 1024 * 1024 for row in report["nodes"])
    assert report["origin_copies"] < 1.5
    assert os.listdir(tmp_path) == []


def test_the_demo_says_what_it_does_without_a_terminal(tmp_path):
    ended = swarm(*OPTIONS, "--directory", tmp_path)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[0].split() == ["NODE", "SECONDS", "FROM", "PEERS", "FROM", "ORIGIN"]
    assert "every copy has the origin's SHA-256" in ended.stdout
    assert "3 daemons ready" in ended.stderr


def test_an_interrupted_demo_cleans_up(tmp_path):
    process = spawn(*OPTIONS, "--rate", "100KiB/s", "--directory", tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if "at once" in line:
            break
    children = _children(process.pid)
    assert len(children) == 3
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []
    assert not any(os.path.exists(f"/proc/{child}") for child in children)


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()
