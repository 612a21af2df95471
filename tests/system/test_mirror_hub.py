"""The real Hugging Face client downloads repositories through the mirror, and the hub is read about once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from swarm.task import piece_length_for
from tests.mirror.fake_hub import is_large
from tests.system.cluster import hosts_dir
from tests.system.hub import Hubbed, assert_same, hubbed
from tests.system.mirrored import members
from tests.system.processes import start_together, wait

pytestmark = pytest.mark.system

MIB = 1 << 20
MODEL = "team/model"


def model(size: int = 12 * MIB) -> dict[str, bytes]:
    """A repository as there are many: some small files, two large ones of which one is small."""
    return {
        ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": b"# A model\n" * 50,
        "config.json": json.dumps({"layers": list(range(300))}).encode(),
        "tokenizer/vocab \u00e9.txt": "\n".join(map(str, range(60_000))).encode(),
        "__init__.py": b"",
        "model-00001.safetensors": Random(1).randbytes(size),
        "adapter.bin": Random(2).randbytes(300_000),
    }


def snapshot(repository: str = MODEL, **more: object) -> str:
    given = "".join(f", {name}={value!r}" for name, value in more.items())
    return f"print(hf.snapshot_download({repository!r}{given}))"


def caught(call: str) -> str:
    """The name of the error that a call of the client raises."""
    return f"try:\n    {call}\n    print('no error')\nexcept Exception as error:\n    print(type(error).__name__)"


@pytest.fixture
def network() -> Iterator[dict[int, Path]]:
    with tempfile.TemporaryDirectory(prefix="swarm-network-", dir=hosts_dir()) as directory:
        yield members(Path(directory), 1, 2, 3, 4)


def started(h: Hubbed) -> None:
    h.hub.start()
    h.cluster.start_all()
    h.cluster.settle()


def test_four_hosts_that_download_a_repository_at_once_read_about_one_copy() -> None:
    files = model(40 * MIB)
    with hubbed(4, rate="200mbit") as h:
        commit = h.hub.push(MODEL, files)
        started(h)
        for directory in h.run_all({host: snapshot() for host in h.hosts.each()}).values():
            assert Path(directory).name == commit
            assert_same(Path(directory), files)
        log = "".join(h.log(host) for host in h.hosts.each())
        h.cluster.stop()
        total = sum(map(len, files.values()))
        small = {path: body for path, body in files.items() if body and not is_large(path)}
        print(f"copies: {h.hub.copies(files):.3f}; of small files: {h.hub.copies(small):.3f}")
        assert h.hub.copies(small) <= 1.5
        assert h.hub.copies(files) <= 1.05 + piece_length_for(40 * MIB) / total
        # The clients asked the mirror for everything, and none of them fell back on Xet.
        assert {it.agent for it in h.hub.log()} == {"swarm"}
        assert not [it for it in h.hub.log() if "xet" in it.path]
        assert log.count('"pulled"') == 4 * (len(files) - 1)  # nobody asks for the bytes of an empty file


def test_branches_tags_commits_datasets_and_the_command_line_work_as_with_the_hub(tmp_path: Path) -> None:
    with hubbed(1) as h:
        old, new = model(MIB), {**model(2 * MIB), "config.json": b"{}"}
        first = h.hub.push(MODEL, old, "v1", "refs/pr/1")
        second = h.hub.push(MODEL, new)
        rows = {"data/rows.parquet": Random(5).randbytes(700_000), "README.md": b"rows"}
        h.hub.push("datasets/team/rows", rows)
        started(h)
        for revision, commit, files in (
            ("v1", first, old),
            ("refs/pr/1", first, old),
            (first, first, old),
            ("main", second, new),
            (second[:40], second, new),
        ):
            said = h.run(1, f"print(hf.hf_hub_download({MODEL!r}, 'config.json', revision={revision!r}))")
            assert Path(said).parent.name == commit
            assert Path(said).read_bytes() == files["config.json"]
        assert_same(Path(h.run(1, snapshot("team/rows", repo_type="dataset"))), rows)
        said = h.run(1, f"print(json.dumps(sorted(hf.HfApi().list_repo_files({MODEL!r}, revision='v1'))))")
        assert json.loads(said) == sorted(old)
        done = h.hf(1, "download", MODEL, "--revision", "v1", "--local-dir", str(tmp_path / "copy"))
        assert done.returncode == 0, done.stderr
        assert_same(tmp_path / "copy", {**old, **_left_by_the_client(tmp_path / "copy")})
        assert {it.agent for it in h.hub.log()} == {"swarm"}


def _left_by_the_client(directory: Path) -> dict[str, bytes]:
    """What it notes beside the files."""
    noted = (directory / ".cache").rglob("*")
    return {str(path.relative_to(directory)): path.read_bytes() for path in noted if path.is_file()}


def test_ranges_through_the_clients_file_system_read_what_they_need() -> None:
    files = model(24 * MIB)
    with hubbed(1) as h:
        h.hub.push(MODEL, files, "v1")
        started(h)
        name = "model-00001.safetensors"
        script = f"""
fs = hf.HfFileSystem()
found = sorted(it["name"] for it in fs.ls({MODEL!r}))
import hashlib
with fs.open({MODEL + "@v1/" + name!r}, block_size=65536) as file:
    file.seek(9_000_000); middle = file.read(1000)
    file.seek(-8, 2); end = file.read()
    file.seek(0); head = file.read(8)
print(json.dumps([len(found), middle.hex(), end.hex(), head.hex(), fs.read_text({MODEL + "/config.json"!r})]))
"""
        count, middle, end, head, config = json.loads(h.run(1, script))
        content = files[name]
        assert count == 7
        assert (bytes.fromhex(middle), bytes.fromhex(end)) == (content[9_000_000:9_001_000], content[-8:])
        assert (bytes.fromhex(head), config.encode()) == (content[:8], files["config.json"])
        h.cluster.stop()
        assert h.hub.sent(name, content) <= 8 * piece_length_for(len(content))


def test_a_host_that_looked_at_the_repository_gets_it_from_the_swarm_when_the_hub_is_gone() -> None:
    files = model()
    with hubbed(2) as h:
        commit = h.hub.push(MODEL, files)
        started(h)
        h.run(1, snapshot())
        h.run(2, f"hf.snapshot_download({MODEL!r}, dry_run=True)")
        h.forget_client(2)
        h.hub.stop()
        h.hub.forget()
        assert_same(Path(h.run(2, snapshot(revision=commit))), files)
        h.forget_client(2)
        assert_same(Path(h.run(2, snapshot())), files)  # `main` stands for the commit it last was
        # Over a restart, too; by now from its own disk.
        h.cluster.stop()
        h.cluster.start(2).wait_ready()
        h.forget_client(2)
        assert_same(Path(h.run(2, snapshot(revision=commit))), files)


def test_urls_that_run_out_while_it_is_read_are_asked_for_anew() -> None:
    files = {"model.safetensors": Random(3).randbytes(24 * MIB)}
    with hubbed(2, rate="40mbit", signed_seconds=1.0) as h:
        h.hub.push(MODEL, files)
        started(h)
        for directory in h.run_all({1: snapshot(), 2: snapshot()}).values():
            assert_same(Path(directory), files)
        h.cluster.stop()
        assert [it for it in h.hub.log() if it.face == "storage" and it.status == 403]
        assert h.hub.copies(files) <= 1.1


def test_members_share_private_files_and_each_client_shows_its_token(network: dict[int, Path]) -> None:
    files = model()
    with hubbed(2, network={host: network[host] for host in (1, 2)}) as h:
        h.hub.push(MODEL, files, readers={"alice", "bob"})
        started(h)
        one, two = h.prepared(1, snapshot(), "alice"), h.prepared(2, snapshot(), "bob")
        start_together([one, two])
        for it in wait([one, two], 90):
            assert it.code == 0, it.err
            assert_same(Path(it.out.strip()), files)
        h.forget_client(1)
        assert h.run(1, caught(snapshot())) == "RepositoryNotFoundError"
        assert h.run(1, caught(snapshot()), "mallory") == "RepositoryNotFoundError"
        h.cluster.stop()
        assert h.hub.copies(files) <= 1.1
        assert {it.agent for it in h.hub.log()} == {"swarm"}


def test_in_an_open_network_private_files_stay_where_they_were_read() -> None:
    files = model(MIB)
    with hubbed(2) as h:
        h.hub.push(MODEL, files, readers={"alice"})
        started(h)
        for directory in h.run_all({1: snapshot(), 2: snapshot()}, "alice").values():
            assert_same(Path(directory), files)
        h.cluster.stop()
        assert 1.9 <= h.hub.copies(files) <= 2.1


def test_the_client_raises_its_own_errors() -> None:
    files = model(MIB)
    with hubbed(1) as h:
        h.hub.push(MODEL, files)
        h.hub.push("team/gated", files, readers={"alice"}, gated=True)
        started(h)
        download = "hf.hf_hub_download({!r}, {!r}{})".format
        for call, token, name in (
            (download(MODEL, "nothing.bin", ""), "", "RemoteEntryNotFoundError"),
            (download(MODEL, "config.json", ", revision='no'"), "", "RevisionNotFoundError"),
            (download("team/none", "config.json", ""), "", "RepositoryNotFoundError"),
            (download("team/gated", "config.json", ""), "", "GatedRepoError"),
            (download("team/gated", "config.json", ""), "mallory", "GatedRepoError"),
            (f"hf.HfApi().upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id={MODEL!r})", "alice", "HfHubHTTPError"),
        ):
            assert h.run(1, caught(call), token) == name, call
        assert_same(Path(h.run(1, snapshot("team/gated"), "alice")), files)
        assert h.run(1, "print(hf.whoami()['name'])", "alice") == "alice"
