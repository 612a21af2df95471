"""Where credentials come from: clients, files, a Docker configuration, helper programs."""

from __future__ import annotations

import base64
import json
import os
import stat
from pathlib import Path

import pytest
import trio
import trio.testing

from swarm.config import MirrorSettings, RegistrySettings
from swarm.errors import ConfigError, OriginRefused
from swarm.mirror import credentials
from swarm.mirror.credentials import Basic, Bearer, OwnCredentials, Refresh, ask_helper, of_client, tag_of
from swarm.mirror.edges import MirrorError
from swarm.mirror.paths import ClientCredentials, Name

APP = Name("registry.example", "team/app")
SECRET = "canary-secret"


def secret_file(directory: Path, text: str, name: str = "secret") -> Path:
    path = directory / name
    path.write_text(text)
    path.chmod(0o600)
    return path


def docker_config(directory: Path, content: object) -> MirrorSettings:
    path = secret_file(directory, content if isinstance(content, str) else json.dumps(content), "config.json")
    return MirrorSettings(docker_config=path)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def find(own: OwnCredentials, name: Name = APP) -> object:
    async def main() -> object:
        return await own.find(name)

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# --- clients ------------------------------------------------------------------------------------------------------


def test_a_clients_credentials_are_taken_as_they_are() -> None:
    assert of_client(ClientCredentials("Basic " + encoded("alice:a:b"))) == Basic("Basic " + encoded("alice:a:b"))
    assert of_client(ClientCredentials("bearer  abc.def-_~+/==")) == Bearer("Bearer abc.def-_~+/==")
    assert of_client(None) is None
    assert of_client(ClientCredentials("Basic Og==")) is None


@pytest.mark.parametrize(
    "header", ["", "Basic", "Basic ?", "Basic YWxpY2U=", "Digest x", "Bearer", "Bearer a,b", "Bearer \x00"]
)
def test_what_is_neither_is_refused_without_telling_it(header: str) -> None:
    with pytest.raises(MirrorError) as caught:
        of_client(ClientCredentials(header))
    assert not header.partition(" ")[2] or header.partition(" ")[2] not in str(caught.value).split()


def test_tags_tell_credentials_apart_and_nothing_else() -> None:
    found = [None, Basic("x"), Basic("y"), Bearer("x"), Refresh("x")]
    assert len({tag_of(credential) for credential in found}) == len(found)
    assert tag_of(Basic("x")) == tag_of(Basic("x"))
    assert all(tag_of(credential) != b"x" for credential in found)


def test_tags_of_one_process_mean_nothing_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tag_of(Basic("x"))
    monkeypatch.setattr(credentials, "PROCESS_KEY", os.urandom(32))
    assert tag_of(Basic("x")) != before


def test_no_credential_shows_in_a_repr() -> None:
    for credential in (Basic.of("alice", SECRET), Bearer(SECRET), Refresh(SECRET), ClientCredentials(SECRET)):
        assert SECRET not in repr(credential)
        assert encoded(f"alice:{SECRET}") not in repr(credential)


# --- files --------------------------------------------------------------------------------------------------------


def test_a_password_file_is_read_again_when_it_is_needed(tmp_path: Path) -> None:
    path = secret_file(tmp_path, "first\n")
    table = RegistrySettings(username="robot", password_file=path)
    own = OwnCredentials(MirrorSettings(registry=(("registry.example", table),)))
    assert find(own) == Basic.of("robot", "first")
    path.write_text("second")
    assert find(own) == Basic.of("robot", "second")
    assert find(own, Name("other.example", "a")) is None


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o666])
def test_a_password_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path, SECRET)
    path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(path, 1, 1)
    table = RegistrySettings(username="robot", password_file=path)
    with pytest.raises(ConfigError, match="open to others"):
        OwnCredentials(MirrorSettings(registry=(("registry.example", table),)))
    with pytest.raises(ConfigError, match="open to others"):
        OwnCredentials(MirrorSettings(docker_config=path))


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="docker_config"):
        OwnCredentials(MirrorSettings(docker_config=tmp_path / "none"))
    table = RegistrySettings(username="robot", password_file=tmp_path / "none")
    with pytest.raises(ConfigError, match="there is no file"):
        OwnCredentials(MirrorSettings(registry=(("registry.example", table),)))


def test_a_password_that_went_away_is_told_when_it_is_needed(tmp_path: Path) -> None:
    path = secret_file(tmp_path, "first")
    table = RegistrySettings(username="robot", password_file=path)
    own = OwnCredentials(MirrorSettings(registry=(("registry.example", table),)))
    path.unlink()
    with pytest.raises(OriginRefused, match="cannot be read"):
        find(own)


def test_a_docker_configuration_is_read(tmp_path: Path) -> None:
    own = OwnCredentials(
        docker_config(
            tmp_path,
            {
                "auths": {
                    "https://index.docker.io/v1/": {"auth": encoded("hub:pw")},
                    "registry.example": {"auth": encoded("all:pw")},
                    "registry.example/team": {"auth": encoded("team:pw\0")},
                    "https://plain.example/v2/": {"username": "u", "password": "p:q"},
                    "identity.example": {"auth": encoded("00000000:"), "identitytoken": "refresh"},
                    "token.example:5000": {"registrytoken": "abc"},
                    "empty.example": {},
                    "odd.example": "text",
                    "broken.example": {"auth": "!"},
                }
            },
        )
    )
    for registry, repository, expected in [
        ("docker.io", "library/a", Basic.of("hub", "pw")),
        ("registry.example", "other/app", Basic.of("all", "pw")),
        ("registry.example", "team/app", Basic.of("team", "pw")),
        ("registry.example", "teammate/app", Basic.of("all", "pw")),
        ("plain.example", "a", Basic.of("u", "p:q")),
        ("identity.example", "a", Refresh("refresh")),
        ("token.example:5000", "a", Bearer("Bearer abc")),
        ("token.example", "a", None),
        ("empty.example", "a", None),
        ("odd.example", "a", None),
        ("broken.example", "a", None),
        ("sub.registry.example", "a", None),
    ]:
        assert find(own, Name(registry, repository)) == expected, registry
        assert own.has(registry) == (expected is not None), registry


def test_a_docker_configuration_is_read_again_when_it_changed(tmp_path: Path) -> None:
    settings = docker_config(tmp_path, {"auths": {}})
    own = OwnCredentials(settings)
    assert not own.has("registry.example")
    docker_config(tmp_path, {"auths": {"registry.example": {"auth": encoded("a:b")}}})
    assert find(own) == Basic.of("a", "b")


def test_credentials_that_were_taken_away_are_not_used_any_more(tmp_path: Path) -> None:
    settings = docker_config(tmp_path, {"auths": {"registry.example": {"auth": encoded("a:b")}}})
    own = OwnCredentials(settings)
    assert own.has("registry.example")
    (tmp_path / "config.json").unlink()
    assert not own.has("registry.example")
    assert find(own) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '{"auths": []}',
        '{"auths": {"a": 1}, "credHelpers": 5}',
        '{"credsStore": {}}',
        "[" * 100_000,
        SECRET,
        '{"credHelpers": {"a": "../../tmp/evil"}}',
        '{"credsStore": "a b; rm -rf /"}',
        '{"credHelpers": {"a": 5}}',
    ],
    ids=lambda text: text[:20],
)
def test_a_file_that_is_no_docker_configuration_is_refused_without_quoting_it(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OwnCredentials(docker_config(tmp_path, content))
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


# --- helpers ------------------------------------------------------------------------------------------------------


def helper(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    path = directory / "docker-credential-fake"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return path


def ask(name: str = "fake", server: str = "registry.example") -> object:
    async def main() -> object:
        with trio.fail_after(30):
            return await ask_helper(name, server)

    return trio.run(main)


def test_a_helper_is_asked_on_its_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    helper(tmp_path, monkeypatch, f'[ "$*" = get ] && cat > {seen} && echo \'{{"Username": "u", "Secret": "s"}}\'')
    assert ask(server="https://index.docker.io/v1/") == Basic.of("u", "s")
    assert seen.read_text() == "https://index.docker.io/v1/"


def test_a_helper_may_know_an_identity_token_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(tmp_path, monkeypatch, """echo '{"Username": "<token>", "Secret": "s"}'""")
    assert ask() == Refresh("s")
    helper(tmp_path, monkeypatch, "echo credentials not found in native keychain; exit 1")
    assert ask() is None
    helper(tmp_path, monkeypatch, """echo '{"Username": "", "Secret": ""}'""")
    assert ask() is None


@pytest.mark.parametrize(
    "script",
    [
        f"echo {SECRET}; exit 1",
        f"echo {SECRET}",
        "echo '[]'",
        "echo '{}'",
        """echo '{"Username": 1, "Secret": 2}'""",
        "exit 3",
        f"echo {SECRET} >&2; exit 2",
        f"yes {SECRET}",
    ],
)
def test_a_helper_that_fails_is_told_of_without_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], script: str
) -> None:
    helper(tmp_path, monkeypatch, script)
    with pytest.raises(OriginRefused) as caught:
        ask()
    assert SECRET not in str(caught.value)
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", ["none-such", "../fake", "a b", "", "fake;true", "/bin/sh"])
def test_a_helper_that_is_not_there_or_no_name_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    helper(tmp_path, monkeypatch, "echo '{}'")
    with pytest.raises(OriginRefused, match="not installed"):
        ask(name)


def test_a_helper_is_not_looked_for_outside_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(tmp_path, monkeypatch, """echo '{"Username": "u", "Secret": "s"}'""").rename(tmp_path / "evil")
    (tmp_path / "docker-credential-x").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OriginRefused, match="not installed"):
        ask("x/../evil")


def test_a_helper_that_talks_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(tmp_path, monkeypatch, "yes")
    with pytest.raises(OriginRefused, match="more than"):
        ask()


def test_a_server_is_no_argument_and_no_shell_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(tmp_path, monkeypatch, """read -r server; echo "{\\"Username\\": \\"$#\\", \\"Secret\\": \\"$server\\"}\"""")
    assert ask(server="$(reboot);`x`") == Basic.of("1", "$(reboot);`x`")


def test_a_helper_that_hangs_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    helper(tmp_path, monkeypatch, f"sleep 1000 & echo $! > {started}; wait")
    monkeypatch.setattr(credentials, "HELPER_SECONDS", 0.5)
    with pytest.raises(OriginRefused, match="did not answer"):
        ask()
    child = int(started.read_text())

    async def gone() -> None:
        try:
            descriptor = os.pidfd_open(child)
        except ProcessLookupError:
            return
        try:
            with trio.fail_after(10):
                await trio.lowlevel.wait_readable(descriptor)
        finally:
            os.close(descriptor)

    trio.run(gone)


def test_a_helper_is_asked_once_for_many_and_then_remembered(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    async def run_helper(name: str, server: str) -> Basic:
        asked.append((name, server))
        await trio.sleep(1)
        return Basic.of("u", str(len(asked)))

    settings = docker_config(tmp_path, {"credHelpers": {"registry.example": "ecr-login"}, "credsStore": "pass"})
    own = OwnCredentials(settings, run_helper=run_helper)

    async def main() -> None:
        found: list[object] = []

        async def once(name: Name) -> None:
            found.append(await own.find(name))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(once, APP)
        assert found == [Basic.of("u", "1")] * 10
        assert not own.forget("registry.example"), "what it said just now is what it says"
        await trio.sleep(3)
        assert own.forget("registry.example")
        assert await own.find(APP) == Basic.of("u", "2")
        await trio.sleep(301)
        assert await own.find(APP) == Basic.of("u", "3")
        await own.find(Name("docker.io", "library/a"))

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert asked == [("ecr-login", "registry.example")] * 3 + [("pass", "https://index.docker.io/v1/")]


def test_a_store_for_everything_is_not_asked_about_registries_nobody_listed(tmp_path: Path) -> None:
    async def run_helper(name: str, server: str) -> Basic:
        raise AssertionError("asked")

    own = OwnCredentials(docker_config(tmp_path, {"credsStore": "pass"}), run_helper=run_helper)
    assert not own.might_have("evil.example")
    assert find(own, Name("evil.example", "a")) is None
    assert own.might_have("docker.io")
