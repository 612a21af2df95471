"""Which registries are read, and what is believed of them."""

from __future__ import annotations

import pytest

from swarm.config import MirrorSettings, RegistrySettings
from swarm.egress import Reach
from swarm.mirror.listed import Endpoint, Listed, egress_rule
from swarm.mirror.paths import Name


def listed(*registries: str, **tables: RegistrySettings) -> Listed:
    named = tuple((name.replace("__", ".").replace("_", ":"), table) for name, table in tables.items())
    return Listed.read(MirrorSettings(registries=registries or ("*",), registry=named))


def test_by_default_any_registry_is_read_and_only_well_known_ones_are_believed() -> None:
    found = listed()
    for name in ("docker.io", "ghcr.io", "eu.gcr.io", "123456789012.dkr.ecr.eu-west-1.amazonaws.com", "team.azurecr.io"):
        assert found.is_allowed(name)
        assert found.is_trusted(name)
        assert not found.is_listed(name)
    for name in ("registry.example", "ghcr.io.evil.example", "evil-ghcr.io", "ghcr.io:444", "ec2-1.amazonaws.com", "xgcr.io"):
        assert found.is_allowed(name)
        assert not found.is_trusted(name)


def test_a_list_without_a_star_is_all_there_is() -> None:
    found = listed("docker.io", "*.corp.example", r__example_5000=RegistrySettings())
    allowed = ["docker.io", "a.corp.example", "b.a.corp.example:5000", "r.example:5000"]
    assert all(found.is_allowed(name) and found.is_trusted(name) for name in allowed)
    assert not any(
        found.is_allowed(name) for name in ["ghcr.io", "corp.example", "evilcorp.example", "r.example", "r.example:5001"]
    )


def test_names_of_docker_hub_are_one() -> None:
    found = listed("index.docker.io")
    assert found.is_listed("docker.io")
    assert found.endpoint("docker.io") == Endpoint("https", "registry-1.docker.io", 443)
    assert found.may_have_credentials("docker.io", "https", ("auth.docker.io", 443))
    assert not found.may_have_credentials("docker.io", "http", ("auth.docker.io", 80))
    assert not found.may_have_credentials("ghcr.io", "https", ("auth.docker.io", 443))


@pytest.mark.parametrize(
    ("name", "endpoint", "url"),
    [
        ("r.example", "", "https://r.example"),
        ("r.example:5000", "", "https://r.example:5000"),
        ("r.example", "http://10.0.0.5:5000", "http://10.0.0.5:5000"),
        ("r.example", "http://[fd00::5]/", "http://[fd00::5]"),
        ("[fd00::5]:5000", "", "https://[fd00::5]:5000"),
    ],
)
def test_an_endpoint_is_https_unless_it_says_otherwise(name: str, endpoint: str, url: str) -> None:
    found = Listed.read(MirrorSettings(registry=((name, RegistrySettings(endpoint=endpoint)),)))
    assert found.endpoint(name).url == url


def test_rights_are_of_the_longest_pattern_that_fits() -> None:
    found = Listed.read(
        MirrorSettings(
            rights="verify",
            registry=(
                ("r.example", RegistrySettings(rights="public", repositories=(("team/*", "never"), ("team/open", "auto")))),
                ("*.example", RegistrySettings(rights="never")),
            ),
        )
    )
    for registry, repository, rights in [
        ("r.example", "a", "public"),
        ("r.example", "team/a/b", "never"),
        ("r.example", "team/open", "auto"),
        ("r.example", "team/open2", "never"),
        ("other.example", "a", "never"),
        ("docker.io", "library/a", "verify"),
    ]:
        assert found.rights(Name(registry, repository)) == rights


def test_credentials_go_to_the_registry_and_the_hosts_named_for_it() -> None:
    table = RegistrySettings(endpoint="https://r.example:5000", token_hosts=("auth.example", "auth.example:8443"))
    found = Listed.read(MirrorSettings(registry=(("r.example", table), ("*.corp.example", RegistrySettings()))))
    given = [("r.example", 5000), ("auth.example", 443), ("auth.example", 8443)]
    assert all(found.may_have_credentials("r.example", "https", place) for place in given)
    assert not any(found.may_have_credentials("r.example", "http", place) for place in given)
    for place in [
        ("r.example", 443),
        ("r.example", 5001),
        ("sub.r.example", 5000),
        ("auth.example", 80),
        ("x.auth.example", 443),
    ]:
        assert not found.may_have_credentials("r.example", "https", place)
    assert not found.may_have_credentials("other.example", "https", ("auth.example", 443))


def test_the_mirror_reaches_private_addresses_only_where_they_are_listed() -> None:
    table = RegistrySettings(endpoint="http://r.internal:5000", token_hosts=("auth.internal",))
    rule = egress_rule(MirrorSettings(registries=("*", "*.corp.internal"), registry=(("r.example", table),)))
    for host, port in [("r.internal", 5000), ("auth.internal", 443), ("auth.internal", 80), ("a.corp.internal", 5000)]:
        assert rule(host, port, False) is Reach.LOCAL
    for host, port in [
        ("r.internal", 5001),
        ("r.example", 443),
        ("auth.internal", 22),
        ("corp.internal", 443),
        ("10.0.0.5", 80),
    ]:
        assert rule(host, port, False) is Reach.PUBLIC
