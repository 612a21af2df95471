"""`swarm network`: what it prints, what it leaves on disk, what it refuses."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cli.network import network as command
from swarm import certificates, network
from swarm.errors import ConfigError, NotAMember, SwarmError
from swarm.identity import Identity


def run(*arguments: object) -> str:
    """What the command prints; raises what it raises."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def run_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json"))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    run("create", tmp_path / "authority", "--name", "farm")
    return tmp_path / "authority"


def issue(authority: Path, name: str, *options: object) -> Path:
    out = authority.parent / name
    run("issue", authority, "--out", out, *options)
    return out


def test_a_network_is_made_and_its_secrets_are_private(tmp_path):
    made = run_json("create", tmp_path / "deep" / "authority", "--name", "farm")
    directory = tmp_path / "deep" / "authority"
    assert (made["name"], made["directory"]) == ("farm", str(directory))
    assert len(made["network"]) == 64
    modes = {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert modes == {"ca.key": 0o600, "group.secret": 0o600, "ca.crt": 0o644}
    assert directory.stat().st_mode & 0o777 == 0o700


def test_two_networks_share_nothing(tmp_path):
    assert run_json("create", tmp_path / "a")["network"] != run_json("create", tmp_path / "b")["network"]
    assert (tmp_path / "a" / "group.secret").read_bytes() != (tmp_path / "b" / "group.secret").read_bytes()


def test_create_never_overwrites(authority):
    before = contents(authority)
    with pytest.raises(ConfigError, match="already holds a network"):
        run("create", authority)
    (authority / "ca.crt").unlink()
    (authority / "group.secret").unlink()
    with pytest.raises(ConfigError, match=r"ca\.key"):
        run("create", authority)
    assert (authority / "ca.key").read_bytes() == before["ca.key"]


def test_an_issued_node_is_a_member(authority):
    made = run_json("issue", authority, "--out", authority.parent / "n", "--role", "seed", "--role", "scheduler")
    member = network.load(authority.parent / "n")
    assert made["issued"][0]["node"] == member.node_id.hex()
    assert made["issued"][0]["roles"] == ["scheduler", "seed"]
    assert member.roles == {"seed", "scheduler"}
    modes = {path.name: path.stat().st_mode & 0o777 for path in (authority.parent / "n").iterdir()}
    assert modes == {"node.key": 0o600, "group.secret": 0o600, "ca.crt": 0o644, "node.crt": 0o644}


def test_many_nodes_are_issued_at_once(authority):
    made = run_json("issue", authority, "--out", authority.parent / "nodes", "--count", "12")
    assert sorted(path.name for path in (authority.parent / "nodes").iterdir()) == [f"{i:02}" for i in range(1, 13)]
    assert len({one["node"] for one in made["issued"]}) == 12


def test_issuing_again_renews_and_keeps_the_key(authority):
    node = issue(authority, "n")
    key, certificate = (node / "node.key").read_bytes(), (node / "node.crt").read_bytes()
    issue(authority, "n")
    assert (node / "node.key").read_bytes() == key
    assert (node / "node.crt").read_bytes() != certificate
    network.load(node)


def test_a_node_of_another_network_is_not_overwritten(authority, tmp_path):
    run("create", tmp_path / "other")
    node = issue(authority, "n")
    before = contents(node)
    with pytest.raises(ConfigError, match="another network"):
        run("issue", tmp_path / "other", "--out", node)
    assert contents(node) == before


def test_the_authoritys_own_directory_is_not_made_a_node(authority):
    with pytest.raises(ConfigError, match="directory of its own"):
        run("issue", authority, "--out", authority.parent / "x" / ".." / authority.name)


def test_a_node_cannot_issue(authority):
    with pytest.raises(ConfigError, match=r"no ca\.key"):
        run("issue", issue(authority, "n"), "--out", authority.parent / "m")


def test_a_key_that_never_leaves_its_node(authority, tmp_path):
    asked = run_json("request", "--out", tmp_path / "node")
    run("issue", authority, "--out", tmp_path / "answer", "--request", asked["request"])
    assert not (tmp_path / "answer" / "node.key").exists()
    for path in (tmp_path / "answer").iterdir():
        path.rename(tmp_path / "node" / path.name)
    assert network.load(tmp_path / "node").node_id.hex() == asked["node"]


def test_a_request_is_for_one_node(authority, tmp_path):
    run("request", "--out", tmp_path / "node")
    with pytest.raises(ConfigError, match="do not go together"):
        run("issue", authority, "--out", tmp_path / "a", "--request", tmp_path / "node" / "node.csr", "--count", "2")
    with pytest.raises(ConfigError, match="there is no"):
        run("issue", authority, "--out", tmp_path / "a", "--request", tmp_path / "missing")


def test_a_request_with_a_changed_key_is_refused(authority, tmp_path):
    path = tmp_path / "node.csr"
    path.write_bytes(b"-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n")
    with pytest.raises(ConfigError, match="malformed"):
        run("issue", authority, "--out", tmp_path / "a", "--request", path)


def test_a_node_is_revoked_by_id_with_every_certificate_it_had(authority):
    node = issue(authority, "n")
    first = network.load(node)
    issue(authority, "n")
    second, other = network.load(node), network.load(issue(authority, "m"))
    made = run_json("revoke", authority, first.node_id.hex())
    assert (len(made["revoked"]), made["total"], made["number"]) == (2, 2, 1)
    checked = network.load(issue(authority, "o"))
    assert checked.learn(other.certificate)
    for member in (first, second):
        with pytest.raises(NotAMember, match="revoked"):
            checked.learn(member.certificate)


def test_a_node_is_revoked_by_its_certificate_file(authority):
    node = issue(authority, "n")
    assert run_json("revoke", authority, node / "node.crt")["total"] == 1
    (node / "ca.crl").write_bytes((authority / "ca.crl").read_bytes())
    with pytest.raises(NotAMember, match="is revoked"):
        network.load(node)


def test_a_revoked_node_does_not_come_back_with_an_older_certificate(authority):
    node = issue(authority, "n")
    older = network.load(node)
    issue(authority, "n")
    assert len(run_json("revoke", authority, node / "node.crt")["revoked"]) == 2
    with pytest.raises(NotAMember, match="revoked"):
        network.load(issue(authority, "m")).learn(older.certificate)


def test_a_certificate_issued_elsewhere_by_the_authority_is_revoked_by_its_file(authority):
    node = issue(authority, "n")
    for path in (authority / "issued").iterdir():
        path.unlink()
    assert run_json("revoke", authority, node / "node.crt")["total"] == 1


def test_revoking_adds_to_the_list_and_never_forgets(authority):
    a, b = issue(authority, "a"), issue(authority, "b")
    run("revoke", authority, a / "node.crt")
    run("revoke", authority, b / "node.crt")
    assert run_json("revoke", authority, a / "node.crt") | {"next_update": None} == {
        "revoked": [],
        "total": 2,
        "number": 3,
        "next_update": None,
    }
    assert "2 in all" in run("revoke", authority)


def test_revoking_with_a_damaged_list_does_not_start_a_new_one(authority):
    run("revoke", authority, issue(authority, "a") / "node.crt")
    (authority / "ca.crl").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"ca\.crl"):
        run("revoke", authority, issue(authority, "b") / "node.crt")
    assert (authority / "ca.crl").read_bytes() == b"damaged"


def test_what_cannot_be_revoked_is_said_and_nothing_is_written(authority, tmp_path):
    run("create", tmp_path / "other")
    foreign = tmp_path / "foreign"
    run("issue", tmp_path / "other", "--out", foreign)
    for what, error, match in (
        ("nobody", ConfigError, "neither a node id"),
        (Identity.generate().node_id.hex(), ConfigError, "no certificate was issued"),
        (foreign / "node.crt", NotAMember, "not from this network"),
        (authority, ConfigError, "Is a directory"),
    ):
        with pytest.raises(error, match=match):
            run("revoke", authority, what)
    assert not (authority / "ca.crl").exists()


def test_a_node_id_cannot_reach_files_outside(authority):
    # Node ids are looked for with a pattern; only 40 hexadecimal digits are taken for one.
    with pytest.raises(ConfigError, match="neither a node id"):
        run("revoke", authority, "*")


def test_the_secret_is_changed_in_two_steps(authority):
    assert run_json("rotate-secret", authority) == {"epochs": [1, 2], "in_use": 1, "done": False}
    assert run_json("rotate-secret", authority) == {"epochs": [2, 1], "in_use": 2, "done": True}
    assert "Secret 3 waits" in run("rotate-secret", authority)
    assert "Secret 3 is in use" in run("rotate-secret", authority)
    assert (authority / "group.secret").stat().st_mode & 0o777 == 0o600


def test_show_tells_everything_and_no_secret(authority):
    node = issue(authority, "n", "--role", "seed")
    run("revoke", authority, node / "node.crt")
    shown = run_json("show", authority)
    assert shown["name"] == "farm"
    assert shown["holds_authority_key"]
    assert shown["secret_epochs"] == [1]
    assert shown["revocation_list"]["revoked"] == 1
    assert [(one["state"], one["roles"]) for one in shown["issued"]] == [("revoked", ["seed"])]
    own = run_json("show", node)["node"]
    assert own["state"] == "valid"  # this directory has no list
    assert own["node"] == shown["issued"][0]["node"]
    secrets = [(authority / "group.secret").read_text().split()[-1], (authority / "ca.key").read_text().splitlines()[1]]
    for text in (run("show", authority), run("show", authority, "--json"), run("show", node)):
        assert "farm" in text or own["node"] in text
        assert not any(secret in text for secret in secrets)


def test_show_says_what_is_wrong(authority, tmp_path):
    node, other = issue(authority, "n"), issue(authority, "m")
    (node / "node.crt").write_bytes((other / "node.crt").read_bytes())
    assert "another key" in run_json("show", node)["problem"]
    run("create", tmp_path / "other")
    (node / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    assert "not from this network's authority" in run("show", node)


def test_a_directory_that_is_no_network_is_said(tmp_path):
    for arguments in (
        ("show", tmp_path),
        ("issue", tmp_path, "--out", tmp_path / "n"),
        ("revoke", tmp_path),
        ("rotate-secret", tmp_path),
    ):
        with pytest.raises(ConfigError) as caught:
            run(*arguments)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((SwarmError, click.UsageError)):
        run("create", tmp_path / "file")
    with pytest.raises(SwarmError):
        run("create", tmp_path / "file" / "below")


@pytest.mark.parametrize("options", [("--days", "0"), ("--days", "x"), ("--name", "")])
def test_a_bad_option_is_a_usage_error(tmp_path, options):
    with pytest.raises((ConfigError, click.UsageError)):
        run("create", tmp_path / "a", *options)
    assert not (tmp_path / "a" / "ca.key").exists()


def test_a_bad_role_leaves_no_certificate(authority):
    with pytest.raises(ConfigError, match="not a role"):
        issue(authority, "n", "--role", "Seed!")
    assert not (authority.parent / "n" / "node.crt").exists()


def test_two_revocations_at_once_are_both_kept(authority):
    paths = [issue(authority, f"n{i}") / "node.crt" for i in range(4)]
    script = "import sys; from cli.network import network; network(sys.argv[1:], standalone_mode=False)"
    running = [subprocess.Popen([sys.executable, "-c", script, "revoke", str(authority), str(path)]) for path in paths]
    assert [process.wait(30) for process in running] == [0] * 4
    assert run_json("show", authority)["revocation_list"]["revoked"] == 4


def test_the_command_loads_nothing_heavy_before_it_runs():
    script = "import sys, cli.network; print([m for m in ('cryptography', 'trio', 'ssl', 'nacl') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=30).stdout == b"[]\n"


@pytest.mark.parametrize("name", sorted(command.commands))
def test_each_command_has_an_example(name):
    assert f"swarm network {name}" in run(name, "--help")


def test_an_authority_key_of_another_network_is_said(authority):
    (authority / "ca.key").write_bytes(certificates.render_key(Identity.generate()))
    with pytest.raises(ConfigError, match=r"ca\.key is not the key of ca\.crt"):
        issue(authority, "n")
    assert not (authority.parent / "n" / "node.crt").exists()


@pytest.mark.parametrize("page", ["network.md", "cert-manager.md"])
def test_the_how_to_works_as_written(page, tmp_path, monkeypatch):
    """Each line that begins with `$ swarm network`, in the order of the page."""
    text = (Path(__file__).parents[2] / "docs" / "how-to" / page).read_text()
    lines = [line for line in text.splitlines() if line.startswith("$ swarm network ")]
    assert lines
    monkeypatch.chdir(tmp_path)
    for line in lines:
        run(*shlex.split(line)[3:])
