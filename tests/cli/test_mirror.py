"""`swarm mirror`: the files it leaves, and that nothing is left after it."""

import json
import os
from pathlib import Path
from typing import Any

import click.testing
import pytest

from cli import mirror as module
from cli.main import run as run_swarm
from swarm.errors import ConfigError

MIRROR = "http://127.0.0.1:7402"


def run(*arguments: object) -> str:
    """What the command prints; raises what it raises."""
    result = click.testing.CliRunner().invoke(module.mirror, [str(it) for it in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def run_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json"))


def tree(directory: Path) -> dict[str, object]:
    """Everything below, with bytes and modes."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in directory.rglob("*")
    }


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """A machine's settings: one of each kind of file that may be there."""
    for name in ("containerd/certs.d/quay.io", "containers/registries.conf.d", "docker"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "containerd/certs.d/quay.io/hosts.toml").write_text('server = "https://quay.io"\n[host."https://a"]\n')
    (tmp_path / "containers/registries.conf").write_bytes(b'unqualified-search-registries = ["docker.io"]')
    (tmp_path / "docker/daemon.json").write_text('{\n    "debug": true\n}\n')
    (tmp_path / "docker/daemon.json").chmod(0o640)
    return tmp_path


def options(etc: Path) -> tuple[object, ...]:
    return (
        *("--containerd", etc / "containerd/certs.d"),
        *("--podman", etc / "containers/registries.conf"),
        *("--docker", etc / "docker/daemon.json"),
    )


def test_all_is_as_it_was_after_unconfigure(etc: Path) -> None:
    before = tree(etc)
    said = run_json("configure", *options(etc))
    assert [it["change"] for it in said["files"]] == ["created", "changed", "changed"]
    assert (etc / "docker/daemon.json").stat().st_mode & 0o777 == 0o640
    assert MIRROR in (etc / "docker/daemon.json").read_text()
    assert (etc / "docker/daemon.json.before-swarm").read_text() == '{\n    "debug": true\n}\n'
    run("unconfigure", *options(etc))
    assert tree(etc) == before


def test_a_second_configure_writes_nothing(etc: Path) -> None:
    run("configure", *options(etc))
    inodes = {path: path.stat().st_ino for path in etc.rglob("*")}
    assert run_json("configure", *options(etc))["files"] == []
    assert {path: path.stat().st_ino for path in etc.rglob("*")} == inodes
    assert "nothing to change" in run("configure", *options(etc))


def test_directories_that_were_made_go_again(etc: Path) -> None:
    (etc / "containerd/certs.d/quay.io/hosts.toml").unlink()
    (etc / "containerd/certs.d/quay.io").rmdir()
    (etc / "containerd/certs.d").rmdir()
    before = tree(etc)
    place = ("--containerd", etc / "containerd/certs.d")
    run("configure", *place, "--registry", "quay.io", "--registry", "http://registry.lan:5000")
    assert (etc / "containerd/certs.d/registry.lan:5000/hosts.toml").exists()
    run("configure", *place, "--registry", "quay.io")
    assert not (etc / "containerd/certs.d/registry.lan:5000").exists()
    run("unconfigure", *place)
    assert tree(etc) == before


def test_a_directory_of_ours_stays_when_somebody_uses_it(etc: Path) -> None:
    place = ("--containerd", etc / "containerd/certs.d")
    run("configure", *place, "--registry", "docker.io")
    (etc / "containerd/certs.d/docker.io/ca.crt").write_text("theirs")
    run("unconfigure", *place)
    assert [it.name for it in (etc / "containerd/certs.d/docker.io").iterdir()] == ["ca.crt"]


def test_a_dry_run_shows_the_lines_and_writes_nothing(etc: Path) -> None:
    before = tree(etc)
    said = run("configure", *options(etc), "--dry-run")
    assert f'+    "registry-mirrors": ["{MIRROR}"],' in said.splitlines()
    assert "--- /dev/null" in said
    assert "systemctl reload docker" in said
    assert tree(etc) == before


def test_what_is_refused_for_one_runtime_changes_none(etc: Path) -> None:
    (etc / "docker/daemon.json").write_text("{")
    before = tree(etc)
    with pytest.raises(ConfigError, match="not valid JSON"):
        run("configure", *options(etc))
    assert tree(etc) == before


def test_a_symbolic_link_is_not_followed(etc: Path) -> None:
    """Whoever made the link would put it back, or somebody else's file would be written."""
    (etc / "target.json").write_text("{}")
    (etc / "docker/daemon.json").unlink()
    (etc / "docker/daemon.json").symlink_to(etc / "target.json")
    with pytest.raises(ConfigError, match="symbolic link"):
        run("configure", "--docker", etc / "docker/daemon.json")
    assert (etc / "target.json").read_text() == "{}"


def test_an_edited_file_keeps_the_edit_and_the_copy(etc: Path) -> None:
    file = etc / "containers/registries.conf"
    before = file.read_bytes()
    run("configure", "--podman", file, "--registry", "quay.io")
    file.write_bytes(b"# edited\n" + file.read_bytes())
    said = run("unconfigure", "--podman", file)
    assert "edited since" in said
    assert file.read_bytes().rstrip() == b"# edited\n" + before
    assert file.with_name("registries.conf.before-swarm").read_bytes() == before
    assert not file.with_name("registries.conf.swarm-mirror.json").exists()


def test_a_record_that_points_elsewhere_is_refused(etc: Path) -> None:
    record = {"version": 1, "mirror": MIRROR, "files": {"../x": {"existed": False, "sha256": ""}}, "directories": []}
    (etc / "docker/daemon.json.swarm-mirror.json").write_text(json.dumps(record))
    before = tree(etc)
    with pytest.raises(ConfigError, match="not under"):
        run("unconfigure", "--docker", etc / "docker/daemon.json")
    assert tree(etc) == before


def test_unconfigure_of_what_was_never_configured_changes_nothing(etc: Path) -> None:
    before = tree(etc)
    assert "nothing to change" in run("unconfigure", *options(etc))
    assert tree(etc) == before


def test_a_write_that_fails_half_way_is_undone_by_unconfigure(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(etc)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "daemon.json")

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_file", fail)
        with pytest.raises(ConfigError, match="No space left"):
            run("configure", *options(etc))
    run("unconfigure", *options(etc))
    assert tree(etc) == before


def test_an_owner_keeps_the_file(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners: list[tuple[str, int, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, user, group: owners.append((Path(path).name, user, group)))
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    run("configure", "--docker", etc / "docker/daemon.json")
    assert owners == [("daemon.json", os.getuid(), os.getgid())]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configure"], "--containerd DIR"),
        (["configure", "--containerd", "/nowhere/certs.d"], "is containerd installed here"),
        (["configure", "--docker", "/nowhere/daemon.json"], "is docker installed here"),
        (["configure", "--docker", "daemon.json", "--mirror", "127.0.0.1:7402"], "HOST:PORT"),
        (["configure", "--podman", "x.conf", "--registry", "quay.io/team"], "without a path"),
    ],
)
def test_usage_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_swarm(["mirror", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_containerds_own_configuration_decides_the_advice(etc: Path) -> None:
    place = etc / "containerd/certs.d"
    assert "systemctl restart containerd" in run("configure", "--containerd", place, "--dry-run")
    config = f'[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "{place}"\n'
    (etc / "containerd/config.toml").write_text(config)
    assert "without a restart" in run("configure", "--containerd", place, "--dry-run")
