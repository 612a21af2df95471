"""What is written into the settings of container runtimes, and that it comes out again."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ConfigError
from swarm.mirror.paths import in_path, parse_target
from swarm.mirror.setup import (
    Found,
    Plan,
    Record,
    Registry,
    Runtime,
    Wanted,
    advice,
    daemon_json,
    hosts_toml,
    plan_configure,
    plan_unconfigure,
    registries_conf,
)

MIRROR = "http://127.0.0.1:7402"
LAN = Registry("registry.lan:5000", plain=True)
HUB = Registry("docker.io")
FILE = {Runtime.CONTAINERD: "_default/hosts.toml", Runtime.PODMAN: "50-swarm.conf", Runtime.DOCKER: "daemon.json"}


def wanted(*registries: str, mirror: str = MIRROR) -> Wanted:
    return Wanted.parse(mirror, registries)


def after(found: Found, plan: Plan) -> Found:
    """The settings once the plan was carried out."""
    files = dict(found.files)
    for change in plan.changes:
        assert files.get(change.path) == change.before
        files.pop(change.path, None)
        if change.after is not None:
            files[change.path] = change.after
    record = plan.record
    directories = (found.directories | (record.directories if record else set())) - plan.directories
    originals = {path: it for path, it in plan.originals.items() if it is not None}
    return Found(files, record and Record.decode(record.encode()), originals, frozenset(directories), found.certificates)


def configured(runtime: Runtime, found: Found, *registries: str, mirror: str = MIRROR) -> Found:
    return after(found, plan_configure(runtime, FILE[runtime], wanted(*registries, mirror=mirror), found))


def unconfigured(runtime: Runtime, found: Found) -> Found:
    return after(found, plan_unconfigure(runtime, found))


# --- containerd -----------------------------------------------------------------------------------------------------


def test_a_registry_keeps_itself_as_the_server_to_fall_back_to() -> None:
    said = tomllib.loads(hosts_toml(None, LAN, MIRROR).decode())
    assert said == {"server": "http://registry.lan:5000", "host": {MIRROR: {"capabilities": ["pull", "resolve"]}}}


def test_docker_hub_falls_back_to_the_host_that_serves_it() -> None:
    assert tomllib.loads(hosts_toml(None, HUB, MIRROR).decode())["server"] == "https://registry-1.docker.io"


def test_the_default_names_no_server_for_containerd_takes_the_registry_asked_for() -> None:
    assert "server" not in tomllib.loads(hosts_toml(None, None, MIRROR).decode())


def test_the_mirror_goes_before_the_hosts_that_are_there() -> None:
    before = (
        b'server = "https://a.example" # ours\r\n\n[host."https://old"]\n  ca = "/x"\n[host."https://old".header]\n  a = "b"\n'
    )
    text = hosts_toml(before, HUB, MIRROR).decode()
    said = tomllib.loads(text)
    assert list(said["host"]) == [MIRROR, "https://old"]
    assert said["host"]["https://old"] == {"ca": "/x", "header": {"a": "b"}}
    assert said["server"] == "https://a.example"
    assert "# ours" in text


def test_a_file_with_only_a_server_gets_a_host() -> None:
    said = tomllib.loads(hosts_toml(b'server = "https://a.example"', HUB, MIRROR).decode())
    assert (said["server"], list(said["host"])) == ("https://a.example", [MIRROR])


def test_a_host_table_within_a_string_is_not_taken_for_one() -> None:
    before = b'text = """\n[host."http://no"]\n"""\nserver = "https://a.example"\n'
    with pytest.raises(ConfigError, match="no place"):
        hosts_toml(before, HUB, MIRROR)


@pytest.mark.parametrize(
    "before",
    [
        b"server = ",
        b"\xff",
        b"host = 1\n",
        b'host = {"https://a" = {}}\n',
        b'host."https://a".ca = "x"\n[z]\n',
        f'[host."https://a"]\n[host."{MIRROR}"]\n'.encode(),
    ],
)
def test_a_hosts_file_that_is_not_understood_is_refused(before: bytes) -> None:
    with pytest.raises(ConfigError):
        hosts_toml(before, HUB, MIRROR)


def test_a_directory_with_certificates_only_is_refused_for_hosts_toml_would_hide_them() -> None:
    found = Found({}, certificates=frozenset({"docker.io"}))
    with pytest.raises(ConfigError, match="certificates"):
        plan_configure(Runtime.CONTAINERD, "", wanted("docker.io"), found)


def test_the_directory_that_containerd_prefers_is_the_one_that_is_written() -> None:
    found = Found({"registry.lan_5000_/hosts.toml": b'[host."https://a"]\n'}, directories=frozenset({"", "registry.lan_5000_"}))
    plan = plan_configure(Runtime.CONTAINERD, "", wanted("http://registry.lan:5000"), found)
    assert [it.path for it in plan.changes] == ["registry.lan_5000_/hosts.toml"]


def test_the_default_says_which_registries_it_does_not_reach() -> None:
    found = Found({"quay.io/hosts.toml": b'[host."https://a"]\n'}, directories=frozenset({"", "quay.io"}))
    plan = plan_configure(Runtime.CONTAINERD, "", wanted(), found)
    assert [it.path for it in plan.changes] == ["_default/hosts.toml"]
    assert "quay.io" in plan.notes[0]


def test_other_registries_take_the_place_of_the_earlier_ones() -> None:
    first = configured(Runtime.CONTAINERD, Found({}), "docker.io", "quay.io")
    second = configured(Runtime.CONTAINERD, first, "quay.io", "http://registry.lan:5000")
    assert set(second.files) == {"quay.io/hosts.toml", "registry.lan:5000/hosts.toml"}
    assert second.directories == {"", "quay.io", "registry.lan:5000"}
    assert unconfigured(Runtime.CONTAINERD, second) == Found({})


# --- podman ---------------------------------------------------------------------------------------------------------


def test_the_path_of_podmans_mirror_names_the_registry_to_the_mirror() -> None:
    said = tomllib.loads(registries_conf(None, wanted("quay.io", "http://registry.lan:5000")).decode())
    assert said["registry"] == [
        {"prefix": "quay.io", "location": "quay.io", "mirror": [{"location": "127.0.0.1:7402/quay.io", "insecure": True}]},
        {
            "prefix": "registry.lan:5000",
            "location": "registry.lan:5000",
            "insecure": True,
            "mirror": [{"location": "127.0.0.1:7402/registry.lan__5000", "insecure": True}],
        },
    ]


@pytest.mark.parametrize(
    "registry", ["quay.io", "registry.lan:5000", "localhost:5000", "localhost", "docker.io", "a-b.c:65535"]
)
def test_the_mirror_reads_the_registry_that_the_path_names(registry: str) -> None:
    target = parse_target(f"/v2/{in_path(registry)}/lib/it/manifests/v1".encode())
    assert target.name is not None
    assert (target.name.registry, target.name.repository) == (registry, "lib/it")


def test_an_address_that_no_path_can_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="name"):
        registries_conf(None, wanted("[fd77::1]:5000"))


def test_a_mirror_with_tls_is_not_called_insecure() -> None:
    said = tomllib.loads(registries_conf(None, wanted("quay.io", mirror="https://mirror.lan")).decode())
    assert said["registry"][0]["mirror"] == [{"location": "mirror.lan/quay.io"}]


def test_what_is_in_registries_conf_stays() -> None:
    before = b'unqualified-search-registries = ["docker.io"]\n[[registry]]\nlocation = "a.example"\n# end'
    text = registries_conf(before, wanted("quay.io"))
    assert text.startswith(before)
    said = tomllib.loads(text.decode())
    assert [it["location"] for it in said["registry"]] == ["a.example", "quay.io"]


@pytest.mark.parametrize(
    "before",
    [
        b"[registries.search]\nregistries = ['docker.io']\n",
        b'[[registry]]\nlocation = "docker.io"\n',
        b'[[registry]]\nprefix = "docker.io"\nlocation = "x.example"\n',
        b"registry = []\n",
        b"registry = [{location = 'x'}]\n",
        b"registry = 3\n",
        b"= 1\n",
        b"\xfe",
    ],
)
def test_a_registries_conf_that_ours_would_break_is_refused(before: bytes) -> None:
    with pytest.raises(ConfigError):
        registries_conf(before, wanted("docker.io"))


# --- Docker ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (None, b'{\n  "registry-mirrors": ["http://127.0.0.1:7402"]\n}\n'),
        (b" \n", b'{\n  "registry-mirrors": ["http://127.0.0.1:7402"]\n}\n'),
        (b"{}", b'{\n  "registry-mirrors": ["http://127.0.0.1:7402"]\n}'),
        (b'{"n": 1.0e5}', b'{"registry-mirrors": ["http://127.0.0.1:7402"],"n": 1.0e5}'),
        (b'{\n\t"n": 1\n}', b'{\n\t"registry-mirrors": ["http://127.0.0.1:7402"],\n\t"n": 1\n}'),
        (
            b'{"a": {"registry-mirrors": 1}, "registry-mirrors" : [ "https://x" ] }',
            b'{"a": {"registry-mirrors": 1}, "registry-mirrors" : ["http://127.0.0.1:7402",  "https://x" ] }',
        ),
        (b'{"registry-mirrors": []}', b'{"registry-mirrors": ["http://127.0.0.1:7402"]}'),
        (b'{"registry-mirrors": ["http://127.0.0.1:7402/"]}', b'{"registry-mirrors": ["http://127.0.0.1:7402/"]}'),
    ],
)
def test_docker_asks_the_mirror_first_and_no_other_byte_changes(before: bytes | None, expected: bytes) -> None:
    assert daemon_json(before, MIRROR) == expected


@pytest.mark.parametrize(
    "before",
    [
        b"[]",
        b"{",
        b'{"registry-mirrors": "x"}',
        b'{"registry-mirrors": [1]}',
        b'{"a": 1, "a": 2}',
        b'\xef\xbb\xbf{"a": 1}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_daemon_json_that_is_not_understood_is_refused(before: bytes) -> None:
    with pytest.raises(ConfigError):
        daemon_json(before, MIRROR)


def test_docker_mirrors_docker_hub_only() -> None:
    with pytest.raises(ConfigError, match="Docker Hub only"):
        plan_configure(Runtime.DOCKER, "daemon.json", wanted("quay.io"), Found({}))
    assert plan_configure(Runtime.DOCKER, "daemon.json", wanted("docker.io"), Found({})).changes


# --- there and back -------------------------------------------------------------------------------------------------

_names = st.text("abcxyz-_", min_size=1, max_size=8)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_daemon_jsons = st.builds(
    lambda said, mirrors, indent, end: (json.dumps({**said, **mirrors}, indent=indent) + end).encode(),
    st.dictionaries(_names, _json, max_size=4),
    st.just({})
    | st.fixed_dictionaries({"registry-mirrors": st.lists(st.sampled_from(["https://a", "https://b/"]), max_size=3)}),
    st.sampled_from([None, 1, 2, "\t"]),
    st.sampled_from(["", "\n", " \r\n"]),
)
_lines = st.sampled_from(["# a comment", "", "  ", "# >>> other", "z = [1,\n 2]", 'y = """\nmore\n"""'])
_toml_heads = st.lists(_lines, max_size=4, unique=True)


def _hosts(head: list[str], hosts: list[str], end: str) -> bytes:
    return ("\n".join([*head, 'server = "https://s"', *(f'[host."{it}"]\n  ca = "/{it}"' for it in hosts)]) + end).encode()


def _conf(head: list[str], registries: list[str], end: str) -> bytes:
    return ("\n".join([*head, *(f'[[registry]]\nlocation = "{it}.example"' for it in registries)]) + end).encode()


_endings = st.sampled_from(["", "\n", "\r\n", "\n\n# end"])
_settings = st.one_of(
    st.tuples(st.just(Runtime.DOCKER), st.none() | st.just(b"") | _daemon_jsons),
    st.tuples(
        st.just(Runtime.CONTAINERD),
        st.none() | st.builds(_hosts, _toml_heads, st.lists(_names, max_size=3, unique=True), _endings),
    ),
    st.tuples(
        st.just(Runtime.PODMAN),
        st.none() | st.just(b"") | st.builds(_conf, _toml_heads, st.lists(_names, max_size=3, unique=True), _endings),
    ),
)


def _found(runtime: Runtime, content: bytes | None) -> Found:
    path = FILE[runtime]
    directories = frozenset({"", path.rpartition("/")[0]} if content is not None else {""})
    return Found({} if content is None else {path: content}, directories=directories)


@given(_settings)
def test_unconfigure_restores_byte_for_byte(settings: tuple[Runtime, bytes | None]) -> None:
    runtime, content = settings
    before = _found(runtime, content)
    once = configured(runtime, before)
    assert once.files != before.files
    assert unconfigured(runtime, once) == before


@given(_settings)
def test_configure_again_changes_nothing(settings: tuple[Runtime, bytes | None]) -> None:
    runtime, content = settings
    once = configured(runtime, _found(runtime, content))
    plan = plan_configure(runtime, FILE[runtime], wanted(), once)
    assert plan.changes == ()
    assert plan.record == once.record
    assert after(once, plan) == once


@given(_settings)
def test_another_mirror_takes_the_place_of_the_first(settings: tuple[Runtime, bytes | None]) -> None:
    runtime, content = settings
    before = _found(runtime, content)
    moved = configured(runtime, configured(runtime, before), mirror="http://127.0.0.1:9999")
    assert moved.files == configured(runtime, before, mirror="http://127.0.0.1:9999").files
    assert unconfigured(runtime, moved) == before


def _meaning(runtime: Runtime, content: bytes | None) -> dict[str, Any]:
    if not (content or b"").strip():
        return {}
    said: dict[str, Any] = json.loads(content or b"") if runtime is Runtime.DOCKER else tomllib.loads((content or b"").decode())
    return {key: value for key, value in said.items() if value != []}


@given(_settings)
def test_of_an_edited_file_only_the_mirror_is_taken_out(settings: tuple[Runtime, bytes | None]) -> None:
    runtime, content = settings
    path = FILE[runtime]
    once = configured(runtime, _found(runtime, content))
    if runtime is Runtime.DOCKER:
        edited = once.files[path].rstrip().removesuffix(b"}") + b', "edited": 1}'
        expected = {**_meaning(runtime, content), "edited": 1}
    else:
        edited = b"edited = 1\n" + once.files[path]
        expected = {"edited": 1, **_meaning(runtime, content)}
    touched = Found({path: edited}, once.record, once.originals, once.directories)
    plan = plan_unconfigure(runtime, touched)
    assert _meaning(runtime, after(touched, plan).files[path]) == expected
    assert "edited since" in plan.notes[0]


@pytest.mark.parametrize("runtime", [Runtime.CONTAINERD, Runtime.PODMAN])
def test_an_edit_that_cut_into_our_lines_is_refused(runtime: Runtime) -> None:
    once = configured(runtime, Found({}))
    path = FILE[runtime]
    half = once.files[path].rpartition(b"# <<<")[0]
    for edited in (half, once.files[path] * 2):
        with pytest.raises(ConfigError, match="cannot be told"):
            plan_unconfigure(runtime, Found({path: edited}, once.record, once.originals, once.directories))


def test_a_file_that_was_empty_is_kept_when_it_is_empty_again() -> None:
    once = configured(Runtime.PODMAN, _found(Runtime.PODMAN, b""))
    path = FILE[Runtime.PODMAN]
    edited = Found({path: once.files[path] + b"\n"}, once.record, once.originals, once.directories)
    assert unconfigured(Runtime.PODMAN, edited).files == {path: b"\n"}


def test_a_file_that_somebody_removed_stays_removed() -> None:
    once = configured(Runtime.PODMAN, _found(Runtime.PODMAN, b"# mine\n"))
    gone = Found({}, once.record, once.originals, once.directories)
    plan = plan_unconfigure(Runtime.PODMAN, gone)
    assert plan.changes == ()
    assert "stays so" in plan.notes[0]


def test_what_an_interrupted_configure_did_not_reach_is_left_as_it_is() -> None:
    """Copies and record are written first: a file may still hold what it held."""
    before = _found(Runtime.PODMAN, b"# mine\n")
    once = configured(Runtime.PODMAN, before)
    stopped = Found(before.files, once.record, once.originals, once.directories)
    assert plan_unconfigure(Runtime.PODMAN, stopped).changes == ()
    assert configured(Runtime.PODMAN, stopped) == once


def test_nothing_is_overwritten_where_the_kept_bytes_are_gone() -> None:
    once = configured(Runtime.PODMAN, _found(Runtime.PODMAN, b"# mine\n"))
    with pytest.raises(ConfigError, match="gone"):
        plan_unconfigure(Runtime.PODMAN, Found(once.files, once.record, {}, once.directories))


# --- records --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x"])
def test_a_record_cannot_send_unconfigure_elsewhere(path: str) -> None:
    encoded = json.dumps({"version": 1, "mirror": MIRROR, "files": {path: {"existed": True, "sha256": "x"}}, "directories": []})
    with pytest.raises(ConfigError, match="not under"):
        Record.decode(encoded.encode())
    with pytest.raises(ConfigError, match="not under"):
        Record.decode(json.dumps({"version": 1, "mirror": MIRROR, "files": {}, "directories": [path]}).encode())


@given(st.binary(max_size=60) | _json.map(lambda it: json.dumps(it).encode()))
def test_garbage_is_no_record(garbage: bytes) -> None:
    with pytest.raises(ConfigError):
        Record.decode(garbage)


# --- what people type -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "quay.io/team", "ftp://quay.io", "*.example.com", "a b", 'x"\n[y]', "http://", "quay.io:0", "a_b"]
)
def test_what_is_no_registry_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a registry"):
        Registry.parse(text)


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1:7402", "", "http://", "http://a/b", "http://a?x", "ftp://a", 'http://a"b', "http://u@a", "http://[", "//a"],
)
def test_what_is_no_mirror_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Wanted.parse(text, ())


def test_names_that_clients_spell_differently_are_one() -> None:
    assert wanted("Quay.io", "https://quay.io", "registry-1.docker.io", "docker.io").registries == (
        Registry("quay.io"),
        Registry("docker.io"),
    )
    assert Wanted.parse("http://Localhost:7402/", ()).mirror == "http://localhost:7402"


# --- advice ---------------------------------------------------------------------------------------------------------

_CRI_1 = '[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "{}"\n'
_CRI_2 = "[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '{}'\n"


@pytest.mark.parametrize("config", [_CRI_1, _CRI_2])
def test_containerd_need_not_be_restarted_when_it_looks_there_already(config: str) -> None:
    for paths in ("/etc/containerd/certs.d", "/etc/containerd/certs.d/:/etc/docker/certs.d"):
        said = advice(Runtime.CONTAINERD, "/etc/containerd/certs.d", config.format(paths).encode())
        assert "without a restart" in said


@pytest.mark.parametrize("config", [None, b"", b"plugins = 1", b"\xff", b"version = 2", _CRI_1.format("/other").encode()])
def test_containerd_must_be_told_where_to_look(config: bytes | None) -> None:
    said = advice(Runtime.CONTAINERD, "/etc/containerd/certs.d", config)
    assert 'config_path = "/etc/containerd/certs.d"' in said
    assert "systemctl restart containerd" in said


def test_mirrors_of_the_old_kind_must_go() -> None:
    config = b'[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]\nendpoint = ["https://a"]\n'
    assert "registry.mirrors" in advice(Runtime.CONTAINERD, "/x", config)


def test_each_runtime_says_how_it_takes_notice() -> None:
    assert "reload crio" in advice(Runtime.PODMAN, "/x")
    assert "reload docker" in advice(Runtime.DOCKER, "/x")
