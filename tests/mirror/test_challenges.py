"""Reading `WWW-Authenticate`."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import OriginError
from swarm.mirror.challenges import Challenge, choose, parse, realm_url

DISTRIBUTION = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/a:pull"'


def test_what_registries_send_is_read() -> None:
    assert parse(DISTRIBUTION) == [
        Challenge("bearer", "https://auth.docker.io/token", "registry.docker.io", "repository:library/a:pull")
    ]
    assert parse('Basic realm="Registry Realm"') == [Challenge("basic", "Registry Realm")]
    assert parse("basic") == [Challenge("basic")]
    assert parse('BEARER Realm = "https://a/" ,error="invalid_token"') == [
        Challenge("bearer", "https://a/", error="invalid_token")
    ]
    assert parse("Bearer realm=https://a/t,service=s") == [Challenge("bearer", "https://a/t", "s")]


def test_several_in_one_header_are_told_apart() -> None:
    found = parse('Basic realm="a, b", Bearer realm="https://a/",service="s", Negotiate abc')
    assert found == [Challenge("basic", "a, b"), Challenge("bearer", "https://a/", "s")]


def test_bearer_is_preferred_wherever_it_stands() -> None:
    assert choose(['Basic realm="a"', DISTRIBUTION]) == parse(DISTRIBUTION)[0]
    assert choose(["Bearer", 'Basic realm="a"']) == Challenge("basic", "a")
    assert choose(["Negotiate", "", "Digest nonce=5"]) is None


@pytest.mark.parametrize(
    "header",
    [
        'Bearer realm="https://a/",realm="https://evil/"',
        'Bearer realm="https://a/\\"x"',
        'Bearer realm="https://a/',
        'Bearer realm="https://a/\r\nX: y"',
        "Bearer " + "a=b," * 2000,
        '="x"',
    ],
)
def test_what_programs_would_read_differently_is_not_read(header: str) -> None:
    assert [challenge for challenge in parse(header) if challenge.realm] == []


def test_a_client_gets_what_was_understood_and_no_more() -> None:
    found = parse(DISTRIBUTION + ',error="insufficient_scope",x="y"')[0]
    assert found.to_client("library/b") == (
        'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",'
        'scope="repository:library/b:pull",error="insufficient_scope"'
    )
    assert (
        Challenge("bearer", "https://a/", error="boo").to_client("b") == 'Bearer realm="https://a/",scope="repository:b:pull"'
    )


def test_only_words_of_a_registry_pass_beside_our_own_scope() -> None:
    found = Challenge("bearer", "https://a/", "a b&c", "aws repository:x:push a:b registry:catalog:* ../x")
    assert found.plain() == Challenge("bearer", "https://a/", "a b&c", "aws")
    assert found.token_query("b") == "service=a%20b%26c&scope=repository:b:pull&scope=aws"


@pytest.mark.parametrize(
    "realm",
    [
        *("", "token", "/token", "ftp://a/", "file:///etc/passwd", "http://"),
        *("https://u:p@a/", "https://a/#x", "https://a:0/", "https://a b/"),
    ],
)
def test_a_realm_that_is_no_place_is_refused(realm: str) -> None:
    with pytest.raises(OriginError):
        realm_url(Challenge("bearer", realm), from_https=False)


def test_a_realm_without_end_is_refused() -> None:
    with pytest.raises(OriginError):
        realm_url(Challenge("bearer", "https://a/" + "x" * 2048), from_https=False)


def test_a_registry_behind_tls_cannot_send_for_tokens_in_clear() -> None:
    assert realm_url(Challenge("bearer", "http://a/t"), from_https=False)[0] == "http://a/t"
    with pytest.raises(OriginError, match="plain http"):
        realm_url(Challenge("bearer", "http://a/t"), from_https=True)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.sampled_from('Basicerarlm =",\\\t\0\r\né/:.0'), max_size=60))
def test_garbage_is_read_as_nothing_that_could_break_a_header(text: str) -> None:
    for challenge in parse(text):
        for value in (challenge.to_client("a/b"), challenge.token_query("a/b")):
            assert value.isprintable()
            assert value.isascii()
        assert challenge.to_client("a/b").count('"') % 2 == 0


_WORD = st.text(alphabet=st.sampled_from("abcXYZ019-._:/ "), max_size=20)


@settings(max_examples=100, deadline=None)
@given(st.builds(Challenge, st.just("bearer"), _WORD.map(lambda w: f"https://{w}"), _WORD))
def test_what_is_written_is_read_again(challenge: Challenge) -> None:
    (found,) = parse(challenge.to_client("a/b"))
    assert (found.realm, found.service, found.scope) == (challenge.realm, challenge.service, "repository:a/b:pull")
