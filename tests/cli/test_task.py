"""`swarm task`, `peers`, `status` against a node made of plain answers, and finding a task by what people call it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.main import run
from swarm.control.views import NoSuchTask, activity_view, find_entry, task_view
from swarm.download.request import Fetched, TaskActivity
from swarm.edges import Entry
from swarm.errors import ConfigError
from swarm.task import Digest, Geometry, blob_task, url_task
from tests.control.fakes import FakeNode, serving

DIGEST = Digest("sha256", "cd" * 32)
BLOB = Entry(blob_task(DIGEST), Geometry.of(3_000_000), 12, True, DIGEST, True, True, 3_000_000, 1.0, 2.0)
OLD = Entry(url_task("http://h/f", validator="a"), None, 3, False, None, False, False, 10, 1.0, 3.0, tag="t", application="a")
NEW = Entry(url_task("http://h/f", validator="b"), None, 0, False, None, False, False, 0, 1.0, 4.0, private=True)
ENTRIES = [BLOB, OLD, NEW]
ACTIVITY = TaskActivity(BLOB.task.id, "complete", 3_000_000, 12, 12, (("ab" * 20, 5, 100, 200),), 1000, 2000, {"rendezvous": 4})
LAST = Fetched(BLOB.task.id, DIGEST, 3_000_000, 1.25, 1000, 2000, 0, 1, {"rendezvous": 4})


class StoreNode(FakeNode):
    def tasks(self):
        return [task_view(entry) for entry in ENTRIES]

    def task(self, name):
        entry = find_entry(ENTRIES, name)
        return task_view(entry, ACTIVITY, LAST) if entry is BLOB else task_view(entry)

    def peers(self):
        return [{"node": "ab" * 20, "address": "[::1]:7400", "encrypted": False, "received": 1024, "sent": 0}]

    def status(self):
        return {
            **{"state": "ready", "version": "1", "node": "ab" * 20, "network": "lab", "open": True, "uptime_seconds": 61},
            **{"control": "127.0.0.1:7400", "pieces": "127.0.0.1:7401", "http": None, "addresses": [], "peers": 1},
            **{"dht_contacts": 2, "data_dir": "/d", "from_peers": 0, "from_origin": 0, "sent": 0, "problems": ["a problem"]},
            "store": {"complete": 1, "partial": 2, "bytes": 5, "quota_bytes": 10 * 1024**3, "free_bytes": 7},
        }


@pytest.fixture
def node(tmp_path, monkeypatch):
    monkeypatch.setenv("SWARM_DATA_DIR", str(tmp_path))
    node = StoreNode(tmp_path)
    with serving(node, tmp_path):
        yield node


def printed(capsys, *arguments):
    code = run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_tasks_are_listed_the_latest_used_first(node, capsys):
    code, out, _ = printed(capsys, "task", "ls")
    rows = out.splitlines()
    assert code == 0
    assert [row.split()[0] for row in rows] == ["TASK", NEW.task.short, OLD.task.short, BLOB.task.short]
    assert "complete pinned" in rows[3]
    assert "2.9 MiB" in rows[3]
    assert "12/12" in rows[3]
    assert "partial private" in rows[1]


def test_the_list_for_programs_is_what_the_node_says(node, capsys):
    code, out, _ = printed(capsys, "task", "ls", "--json")
    assert code == 0
    assert {row["task"] for row in json.loads(out)} == {entry.task.id.hex() for entry in ENTRIES}


def test_a_task_is_shown_with_its_peers_and_why_the_origin_was_read(node, capsys):
    code, out, _ = printed(capsys, "task", "show", BLOB.task.short)
    assert code == 0
    assert "rendezvous (4)" in out
    assert "12 of 12, 256.0 KiB each" in out
    assert "abababababab      5     100 B  200 B" in out
    code, out, _ = printed(capsys, "task", "show", str(DIGEST), "--json")
    assert json.loads(out)["activity"] == activity_view(ACTIVITY)
    assert json.loads(out)["last_fetch"]["why_origin"] == {"rendezvous": 4}


def test_a_task_of_unknown_length_is_shown(node, capsys):
    assert "tag" in printed(capsys, "task", "show", OLD.task.id.hex())[1]


def test_changes_say_what_was_done(node, capsys):
    assert printed(capsys, "task", "pin", "abcdef")[1] == "pinned abcdef\n"
    assert json.loads(printed(capsys, "task", "unpin", "abcdef", "--json")[1]) == {"task": "abcdef", "pinned": False}
    assert printed(capsys, "task", "rm", "abcdef")[::2] == (1, "swarm: in use\n")


def test_peers_and_status_are_shown(node, capsys):
    assert f"{'ab' * 20}  [::1]:7400   1.0 KiB   0 B" in printed(capsys, "peers")[1]
    assert json.loads(printed(capsys, "peers", "--json")[1])[0]["received"] == 1024
    code, out, _ = printed(capsys, "status")
    assert code == 0
    for text in ("lab (open: no protection)", "1 min 1 s", "http          off", "10.0 GiB", "problem       a problem"):
        assert text in out
    assert json.loads(printed(capsys, "status", "--json")[1])["state"] == "ready"


def test_without_a_daemon_every_command_says_so(tmp_path, capsys):
    for command in (["task", "ls"], ["task", "show", "abcd"], ["peers"], ["status"]):
        code, _, err = printed(capsys, *command, "--data-dir", str(tmp_path / "none"))
        assert code == 6
        assert "start `swarm daemon`" in err


@pytest.mark.parametrize(
    "name", [BLOB.task.id.hex(), BLOB.task.id.hex()[:4], BLOB.task.id.hex()[:20].upper(), str(DIGEST), f" {DIGEST} "]
)
def test_a_task_goes_by_its_id_the_beginning_of_it_and_its_digest(name):
    assert find_entry(ENTRIES, name) is BLOB


def test_a_task_goes_by_its_url_unless_there_are_several_versions():
    assert find_entry([BLOB, OLD], "http://h/f") is OLD
    with pytest.raises(ConfigError, match="2 tasks go by"):
        find_entry(ENTRIES, "http://h/f")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ab", ConfigError), ("", ConfigError), ("None", NoSuchTask), ("0000000000", NoSuchTask), ("http://other/", NoSuchTask)],
)
def test_what_names_no_task_is_said(name, kind):
    with pytest.raises(kind):
        find_entry(ENTRIES, name)


def test_a_beginning_that_fits_several_is_refused():
    twin = Entry(type(BLOB.task)(BLOB.task.id[:5] + bytes(27)), None, 0, False, None, False, False, 0, 0, 0)
    with pytest.raises(ConfigError, match="give more digits"):
        find_entry([BLOB, twin], BLOB.task.id.hex()[:10])


@given(st.text(max_size=70))
@settings(max_examples=100, deadline=None)
def test_any_name_finds_a_task_or_is_refused_in_words(name):
    try:
        find_entry(ENTRIES, name)
    except (NoSuchTask, ConfigError) as error:
        said = str(error)
    else:
        said = "found"
    assert said
