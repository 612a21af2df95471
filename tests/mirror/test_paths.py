"""What requests name: every way to say it, and everything else refused (SECURITY: T17, T18)."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.mirror.edges import MirrorError
from swarm.mirror.paths import DOCKER_HUB, ClientCredentials, Kind, Name, parse_image, parse_name, parse_target
from swarm.task import Digest

HEX = "a" * 64
DIGEST = f"sha256:{HEX}"


def target(text: str) -> tuple[Kind, Name | None, str]:
    found = parse_target(text.encode("latin-1"))
    return found.kind, found.name, found.reference


@pytest.mark.parametrize(
    ("text", "registry", "repository"),
    [
        ("/v2/lib/small/manifests/v1?ns=registry.example%3A5000", "registry.example:5000", "lib/small"),
        ("/v2/lib/small/manifests/v1?ns=docker.io", DOCKER_HUB, "lib/small"),
        ("/v2/registry.example/lib/small/manifests/v1", "registry.example", "lib/small"),
        ("/v2/registry.example:5000/lib/small/manifests/v1", "registry.example:5000", "lib/small"),
        ("/v2/localhost/lib/small/manifests/v1", "localhost", "lib/small"),
        ("/v2/library/alpine/manifests/v1", DOCKER_HUB, "library/alpine"),
        ("/v2/alpine/manifests/v1", DOCKER_HUB, "library/alpine"),
        ("/v2/alpine/manifests/v1?ns=registry-1.docker.io", DOCKER_HUB, "library/alpine"),
        ("/v2/quay.io/a/b/manifests/v1?ns=registry.example", "registry.example", "quay.io/a/b"),
        ("/v2/a/manifests/manifests/manifests/v1", DOCKER_HUB, "a/manifests/manifests"),
        ("/v2/a/blobs/manifests/v1", DOCKER_HUB, "a/blobs"),
        ("/v2/[2001:db8::1]:5000/a/manifests/v1", "[2001:db8::1]:5000", "a"),
    ],
)
def test_the_registry_is_in_the_query_the_path_or_docker_hub(text: str, registry: str, repository: str) -> None:
    assert target(text) == (Kind.MANIFEST, Name(registry, repository), "v1")


@pytest.mark.parametrize(
    ("text", "kind", "reference"),
    [
        ("/v2/", Kind.BASE, ""),
        ("/v2", Kind.BASE, ""),
        (f"/v2/a/b/manifests/{DIGEST}", Kind.MANIFEST, DIGEST),
        (f"/v2/a/b/manifests/sha256%3A{HEX}", Kind.MANIFEST, DIGEST),
        (f"/v2/a/b/blobs/{DIGEST}", Kind.BLOB, DIGEST),
        (f"/v2/a/b/blobs/sha512:{HEX}{HEX}", Kind.BLOB, f"sha512:{HEX}{HEX}"),
        ("/v2/a/b/tags/list", Kind.TAGS, ""),
        (f"/v2/a/b/referrers/{DIGEST}", Kind.REFERRERS, DIGEST),
    ],
)
def test_every_route_of_the_pull_side_is_read(text: str, kind: Kind, reference: str) -> None:
    found = target(text)
    assert (found[0], found[2]) == (kind, reference)


def test_the_query_of_a_list_goes_on_without_the_registry() -> None:
    found = parse_target(b"/v2/a/b/tags/list?n=10&ns=registry.example&last=v1")
    assert (found.query, found.namespace) == ("n=10&last=v1", "registry.example")


@pytest.mark.parametrize(
    "text",
    [
        "/v2/a/../b/manifests/v1",
        "/v2/a/%2e%2e/b/manifests/v1",
        "/v2/a/%2e%2e%2fb/manifests/v1",
        "/v2/a%2Fb/manifests/v1",
        "/v2/a//b/manifests/v1",
        "/v2/a/./b/manifests/v1",
        "/v2/a%00/manifests/v1",
        "/v2/a\\b/manifests/v1",
        "/v2/a%252e/manifests/v1",
        "/v2/A/manifests/v1",
        "/v2/a-/manifests/v1",
        "/v2/a__b_/manifests/v1",
        f"/v2/{'a' * 256}/manifests/v1",
        "/v2/a/manifests/.v1",
        f"/v2/a/manifests/{'v' * 129}",
        "/v2/a/manifests/v%0d%0aX: y",
        "/v2/a/manifests/sha256:abc",
        f"/v2/a/manifests/sha256:{HEX.upper()}",
        f"/v2/a/blobs/md5:{HEX[:32]}",
        f"/v2/a/blobs/../{DIGEST}",
        "/v2/a/blobs/v1",
        "/v2/a/manifests/v1?ns=registry.example&ns=other.example",
        "/v2/a/manifests/v1?ns=http://10.0.0.1",
        "/v2/a/manifests/v1?ns=user@registry.example",
        "/v2/a/manifests/v1?ns=registry.example:0",
        "/v2/a/manifests/v1?ns=registry.example:99999",
        "/v2/a/manifests/v1?ns=registry..example",
        "/v2/a/manifests/v1?ns=",
        "/v2/a/manifests/v1?ns=reg%0aistry",
        "/v2/a/tags/list?n=1%\x01",
    ],
)
def test_what_is_malformed_is_refused_with_400(text: str) -> None:
    with pytest.raises(MirrorError) as caught:
        parse_target(text.encode("latin-1"))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "text", ["/", "/v1/_ping", "/v2/a", "/v2/a/blobs/uploads/", "/v2/_catalog", "/v2/a/tags/list/x", "/metrics", "/hf/a"]
)
def test_other_routes_are_not_there(text: str) -> None:
    with pytest.raises(MirrorError) as caught:
        parse_target(text.encode())
    assert caught.value.status in (400, 404)


@pytest.mark.parametrize("text", ["http://10.0.0.5/", "https://registry.example/v2/", "registry.example:443", "*", "//x/v2/"])
def test_t17_a_url_or_an_authority_as_target_opens_no_proxy(text: str) -> None:
    with pytest.raises(MirrorError) as caught:
        parse_target(text.encode())
    assert caught.value.status in (400, 404)


@pytest.mark.parametrize(
    ("text", "name", "reference"),
    [
        ("alpine", Name(DOCKER_HUB, "library/alpine"), "latest"),
        ("alpine:3", Name(DOCKER_HUB, "library/alpine"), "3"),
        ("team/app", Name(DOCKER_HUB, "team/app"), "latest"),
        ("quay.io/team/app:v1", Name("quay.io", "team/app"), "v1"),
        ("localhost:5000/app", Name("localhost:5000", "app"), "latest"),
        (f"host:5000/a/b:v1@{DIGEST}", Name("host:5000", "a/b"), DIGEST),
    ],
)
def test_images_are_named_as_people_write_them(text: str, name: Name, reference: str) -> None:
    assert parse_image(text) == (name, reference)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    with contextlib.suppress(MirrorError):
        found = parse_target(b"/v2/" + raw)
        assert found.name is None or parse_name(found.name.registry, found.name.repository) == found.name


@settings(max_examples=50, deadline=None)
@given(
    st.from_regex(r"\A[a-z0-9]{1,9}([._-][a-z0-9]{1,5}){0,2}(/[a-z0-9]{1,9}){0,3}\Z"),
    st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,20}\Z"),
)
def test_a_valid_name_comes_back_as_it_was(repository: str, tag: str) -> None:
    found = parse_target(f"/v2/{repository}/manifests/{tag}?ns=registry.example".encode())
    assert (found.name, found.reference) == (Name("registry.example", repository), tag)


def test_t23_credentials_of_a_client_are_not_in_its_repr() -> None:
    assert "canary" not in repr(ClientCredentials("Basic canary"))


def test_digests_are_read_in_both_algorithms() -> None:
    found = parse_target(f"/v2/a/blobs/sha512:{HEX}{HEX}".encode())
    assert found.digest == Digest("sha512", HEX + HEX)
