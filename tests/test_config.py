"""Settings: where they come from, what they refuse, and that the reference says what the code does."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import config, places
from swarm.config import Settings, load
from swarm.errors import ConfigError
from swarm.quantities import (
    GIB,
    KIB,
    MIB,
    Endpoint,
    human_duration,
    human_size,
    parse_duration,
    parse_endpoint,
    parse_fraction,
    parse_rate,
    parse_size,
)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "swarm.toml"
    path.write_text(text)
    return path


def read(tmp_path: Path, text: str, environment: dict[str, str] | None = None, **flags: object) -> Settings:
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return load(file=written(tmp_path, text), environment=environment or {}, flags=named)


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path):
    got = read(tmp_path, 'data_dir = "/data"\n[store]\nquota = "10GiB"\n[origin.ca]\n"r.internal" = "/ca.pem"\n')
    assert got.data_dir == Path("/data")
    assert got.store.quota == 10 * GIB
    assert got.origin.ca == (("r.internal", "/ca.pem"),)
    assert got.store.min_free == Settings().store.min_free


def test_flags_win_over_the_environment_and_the_environment_over_the_file(tmp_path):
    text = '[log]\nlevel = "error"\nformat = "json"\n[store]\nquota = 1\n'
    got = read(tmp_path, text, {"SWARM_LOG_LEVEL": "warning", "SWARM_LOG_FORMAT": "text"}, log__level="debug", log__format=None)
    assert (got.log.level, got.log.format, got.store.quota) == ("debug", "text", 1)


def test_the_environment_names_the_file(tmp_path):
    path = written(tmp_path, "drain = 5\n")
    assert load(environment={"SWARM_CONFIG": str(path)}).drain == 5.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[peers]\nupload_rat = 1\n", "unknown setting peers.upload_rat; did you mean peers.upload_rate?"),
        ("upload_rate = 1\n", "did you mean peers.upload_rate?"),
        ("[stor]\nquota = 1\n", "unknown setting stor; did you mean store?"),
        ("store = 1\n", "store is a section; write [store]"),
        ("[store]\nquota = 'lots'\n", "store.quota = 'lots': expected a size"),
        ("[store]\nquota = -1\n", "store.quota = -1: must be at least 0"),
        ("[store]\nhigh_watermark = 1.5\n", "must be at most 1"),
        ("[store]\nhigh_watermark = 0.5\nlow_watermark = 0.6\n", "eviction could never stop"),
        ("drain = '30 parsecs'\n", "drain = '30 parsecs': expected a duration"),
        ("drain = '2h'\n", "must be at most 3600s"),
        ("seed = 'maybe'\n", "expected true or false"),
        ("seed = 1\n", "expected true or false"),
        ("data_dir = 7\n", "expected text in quotes"),
        ("data_dir = ''\n", "data_dir is empty"),
        ("[log]\nlevel = 'loud'\n", "must be one of debug, info, warning, error"),
        ("[network]\nlisten = '0.0.0.0:99999'\nopen = 'x'\n", "the port must be between"),
        ("[network]\nlisten = '::1:7400'\n", "write IPv6 in brackets"),
        ("[network]\njoin = 7\n", "expected a list"),
        ("[network]\ndirectory = '/n'\nopen = 'x'\n", "exclude each other"),
        ("[origin]\nca = 'x'\n", "expected name=value pairs"),
        ("[origin]\nca = ['x']\n", "expected a table of texts"),
        ("[egress]\nports = [70000]\n", "must be at most 65535"),
        ("= 1\n", "not valid TOML"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file_and_what_to_do(tmp_path, text, expected):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    if "exclude" not in expected and "eviction" not in expected:
        assert str(tmp_path / "swarm.toml") in str(caught.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"cannot read the configuration /nowhere/swarm\.toml: No such file"):
        load(file=Path("/nowhere/swarm.toml"), environment={})


def test_a_configuration_that_is_a_disk_image_does_not_fill_memory(tmp_path):
    path = tmp_path / "big"
    with path.open("wb") as stream:
        stream.truncate(64 * GIB)
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load(file=path, environment={})


def test_an_unknown_variable_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown setting SWARM_STORE_QOTA; did you mean SWARM_STORE_QUOTA"):
        load(environment={"SWARM_STORE_QOTA": "1"})


def test_variables_kubernetes_sets_for_a_service_named_swarm_are_not_settings():
    links = {
        "SWARM_SERVICE_HOST": "10.0.0.1",
        "SWARM_SERVICE_PORT": "7400",
        "SWARM_SERVICE_PORT_CONTROL": "7400",
        "SWARM_PORT": "tcp://10.0.0.1:7400",
        "SWARM_PORT_7400_TCP_ADDR": "10.0.0.1",
        "SWARM_NODES_PORT_7400_UDP": "udp://10.0.0.1:7400",
    }
    assert load(environment=links) == load(environment={})


def test_a_wrong_flag_is_named_as_a_flag():
    with pytest.raises(ConfigError, match=r"--listen: network\.listen = 'x:y'"):
        load(environment={}, flags={"network.listen": "x:y"})


def test_lists_in_a_variable_are_separated_by_commas():
    got = load(environment={"SWARM_NETWORK_JOIN": "a.example, [::1]:7500,b:1", "SWARM_EGRESS_ALLOW": ""})
    assert got.network.join == (Endpoint("a.example", 7400), Endpoint("::1", 7500), Endpoint("b", 1))
    assert got.egress.allow == ()


@pytest.mark.parametrize(
    "address", ["0.0.0.0:7400", "[::]:7400", "192.0.2.1:7400", "localhost.example:7400", "127.evil.example:7400"]
)
def test_listening_beyond_loopback_without_a_network_is_refused(address):
    with pytest.raises(ConfigError, match="--open-network"):
        load(environment={}, flags={"network.listen": address})
    assert load(environment={}, flags={"network.listen": address, "network.open": "lab"}).network.open == "lab"


@pytest.mark.parametrize("address", ["127.0.0.1:7400", "127.9.9.9:0", "[::1]:7400", "localhost:7400"])
def test_listening_on_loopback_needs_no_network(address):
    assert str(load(environment={}, flags={"network.listen": address}).network.listen) == address


@pytest.mark.parametrize("name", ["", "bbr", "cubic", "dctcp"])
def test_congestion_controls_are_named(name):
    assert load(environment={"SWARM_PEERS_CONGESTION_CONTROL": name}).peers.congestion_control == name


@pytest.mark.parametrize("name", ["BBR", "cubic reno", "a" * 16, "cubic;"])
def test_what_is_no_congestion_control_is_refused_with_where_to_look(name):
    with pytest.raises(ConfigError, match=r"peers\.congestion_control .*tcp_available_congestion_control"):
        load(environment={"SWARM_PEERS_CONGESTION_CONTROL": name})


def test_a_face_can_be_switched_off():
    assert load(environment={"SWARM_HTTP_LISTEN": "off"}).http.listen is None


def test_the_data_directory_of_the_command_is_that_of_the_daemon(tmp_path):
    path = written(tmp_path, f'data_dir = "{tmp_path}/d"\n')
    assert places.locate_data_dir(None, {"SWARM_CONFIG": str(path)}) == tmp_path / "d"
    assert places.locate_data_dir(None, {"SWARM_CONFIG": str(path), "SWARM_DATA_DIR": "/e"}) == Path("/e")
    assert places.locate_data_dir(Path("/f"), {"SWARM_DATA_DIR": "/e"}) == Path("/f")
    state = {"XDG_STATE_HOME": "/s", "SWARM_CONFIG": str(written(tmp_path, ""))}
    assert places.locate_data_dir(None, state) == places.default_data_dir(state)


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("1k", KIB), ("1.5MiB", 3 * MIB // 2), ("10 GB", 10**10), ("2tib", 2048 * GIB), ("7B", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "rate"), [("1MiB/s", MIB), ("100Mbit/s", 12_500_000), ("8bit", 1), ("5k", 5 * KIB)])
def test_rates(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("2h", 7200), ("1.5m", 90), ("3", 3), (4, 4)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "-1", "1e9", "nan", "1 2", "1XB", "٣", "1.5.2", None, True, [1], float("nan"), float("inf")]
)
def test_what_is_no_quantity_is_refused(text):
    for parse in (parse_size, parse_duration, parse_rate, parse_fraction):
        with pytest.raises(ConfigError):
            parse(text)


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_is_read_or_refused_in_words(text):
    for parse in (parse_size, parse_duration, parse_rate, parse_fraction, lambda value: parse_endpoint(value, default_port=1)):
        with suppress(ConfigError):
            parse(text)


@given(st.integers(0, 65535), st.sampled_from(["a.example", "10.0.0.1", "::1", "fe80::1%eth0"]))
@settings(max_examples=50, deadline=None)
def test_an_endpoint_reads_what_it_writes(port, host):
    endpoint = Endpoint(host, port)
    assert parse_endpoint(str(endpoint), allow_zero=True) == endpoint


def test_numbers_for_people():
    assert [human_size(n) for n in (0, 1023, 1536, 5 * GIB)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [human_duration(n) for n in (0.04, 59, 61, 3700, 200_000)] == [
        "0.0 s",
        "59.0 s",
        "1 min 1 s",
        "1 h 1 min",
        "2 d 7 h",
    ]


def test_a_registry_has_a_table_of_its_own(tmp_path):
    got = read(
        tmp_path,
        '[mirror]\nregistries = ["docker.io", "*.corp.example"]\n[mirror.registry."Registry.example:5000"]\n'
        'endpoint = "http://10.0.0.5:5000"\nrights = "verify"\ntoken_hosts = ["auth.example"]\n'
        'repositories = { "team/*" = "never" }\nusername = "node"\npassword_file = "/run/secret"\n',
    )
    assert got.mirror.registries == ("docker.io", "*.corp.example")
    [(name, registry)] = got.mirror.registry
    assert name == "registry.example:5000"
    assert registry == config.RegistrySettings(
        endpoint="http://10.0.0.5:5000",
        rights="verify",
        token_hosts=("auth.example",),
        repositories=(("team/*", "never"),),
        username="node",
        password_file=Path("/run/secret"),
    )


def test_a_container_can_be_given_registries_in_its_environment():
    text = '{ "r:5000" = { endpoint = "http://r:5000" }, "docker.io" = { rights = "public" } }'
    got = load(environment={"SWARM_MIRROR_REGISTRY": text, "SWARM_CONFIG": "/dev/null"})
    assert [(name, registry.endpoint, registry.rights) for name, registry in got.mirror.registry] == [
        ("r:5000", "http://r:5000", ""),
        ("docker.io", "", "public"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[mirror]\nregistries = ["https://docker.io"]', "names no registry"),
        ('[mirror]\nhuggingface = "hub.example"', "expected http"),
        ('[mirror]\nhuggingface = "https://user@hub.example"', "expected http"),
        ('[mirror]\nhuggingface = "https://hub.example/../x"', "expected http"),
        ("[mirror]\nregistry = 5", "expected tables"),
        ("[mirror.registry]\nr = 5", "expected a table of settings"),
        ("[mirror.registry.r]\nright = 'verify'", "did you mean rights"),
        ("[mirror.registry.r]\nrights = 'all'", "must be one of"),
        ("[mirror.registry.'r/team']\nrights = 'verify'", "names no registry"),
        ("[mirror.registry.r]\nendpoint = 'http://user@r'", "expected http://host:port"),
        ("[mirror.registry.r]\nendpoint = 'http://r/v2'", "no path"),
        ("[mirror.registry.'*.r']\nendpoint = 'http://r'", "a table of its own"),
        ("[mirror.registry.r]\nusername = 'u'", "go together"),
        ("[mirror.registry.r]\ncredential_helper = '../../bin/sh'", "end of a program's name"),
        ("[mirror.registry.r]\nrepositories = { a = 'sometimes' }", "must be auto, public, verify or never"),
        ("[mirror.registry.r]\ntoken_hosts = ['http://a/']", "names no registry"),
        ("[mirror]\nrights_cache = 301", "at most"),
    ],
)
def test_a_registry_that_makes_no_sense_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tmp_path, text)


def test_the_reference_is_what_the_code_says():
    page = Path(__file__).parent.parent / "docs/reference/configuration.md"
    assert page.read_text() == config.reference(), "run: python -m swarm.config > docs/reference/configuration.md"


def test_every_setting_has_a_sentence_a_default_that_passes_its_own_check_and_one_variable():
    names = [name for name, *_ in config.declared()]
    assert len({config.variable_name(name) for name in names}) == len(names)
    for name, kind, meta, default in config.declared():
        assert re.search(r"[.;]", meta.text), name
        if isinstance(default, (int, float, str)) and default != "":
            assert config._read(default, kind, meta, name) == default
