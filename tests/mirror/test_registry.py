"""Origin registries: manifests, tokens, and registries that lie, on a web in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from swarm.edges import Address
from swarm.errors import (
    NotFoundAtOrigin,
    NotPermitted,
    OriginError,
    OriginRefused,
    OriginUnreachable,
)
from swarm.mirror.credentials import Basic
from swarm.mirror.edges import MirrorDenied, MirrorError
from swarm.mirror.paths import ClientCredentials, Name
from swarm.task import Digest
from tests.mirror.fake_registry import (
    AUTH,
    MANIFEST_TYPE,
    REGISTRY,
    FakeRegistry,
    Mirror,
    basic,
    client,
    digest_of,
    listed,
    run,
    settings_of,
    web_of,
)
from tests.origin.test_tls import authority_file, server_context
from tests.origin.web import Asked, Reply, Web, content_reply

APP = Name(REGISTRY, "team/app")
OTHER = Name(REGISTRY, "team/other")
LAYER = b"layer" * 1000
ALICE, BOB, MALLORY = client("alice", "secret"), client("bob", "other"), client("alice", "guess")
ONLY_ALICE = {"alice"}


def registry(kind: str = "open", readers: set[str] | None = None) -> tuple[FakeRegistry, Digest, Digest]:
    """A registry with one image: its manifest, its layer."""
    fake = FakeRegistry(kind)
    manifest, [layer] = fake.push("team/app", "v1", LAYER, readers=readers)
    return fake, manifest, layer


# --- manifests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["open", "basic", "bearer"])
def test_a_manifest_comes_from_each_kind_of_registry(kind: str) -> None:
    fake, digest, layer = registry(kind, ONLY_ALICE)

    async def main(mirror: Mirror) -> None:
        info = await mirror.registries.head_manifest(APP, "v1", ALICE)
        got, body = await mirror.registries.get_manifest(APP, str(digest), ALICE)
        assert info == got
        assert (info.digest, info.media_type, info.length) == (digest, MANIFEST_TYPE, len(body))
        assert body == fake.manifests["team/app", "v1"]
        assert await mirror.blob(APP, layer, ALICE) == LAYER

    run(web_of(fake), main)


@pytest.mark.parametrize("missing", ["docker-content-digest", "content-type", "content-length"])
def test_what_a_head_leaves_out_is_read(missing: str) -> None:
    fake, digest, _ = registry()
    body = fake.manifests["team/app", "v1"]

    def reply(asked: Asked) -> Reply:
        headers = {"content-type": MANIFEST_TYPE, "docker-content-digest": str(digest), "content-length": str(len(body))}
        if asked.method == "HEAD":
            del headers[missing]
        return Reply(200, headers, body, framed=False)

    fake.lies["/v2/team/app/manifests/v1"] = reply

    async def main(mirror: Mirror) -> None:
        info = await mirror.registries.head_manifest(APP, "v1", None)
        assert (info.digest, info.media_type, info.length) == (digest, MANIFEST_TYPE, len(body))

    run(web_of(fake), main)
    assert [asked.method for asked in fake.asked] == ["HEAD", "GET"]


def test_a_registry_that_refuses_head_is_read() -> None:
    fake, digest, _ = registry()
    body = fake.manifests["team/app", "v1"]
    fake.lies["/v2/team/app/manifests/v1"] = lambda asked: (
        Reply(405) if asked.method == "HEAD" else Reply(200, {"content-type": MANIFEST_TYPE}, body)
    )

    async def main(mirror: Mirror) -> None:
        assert (await mirror.registries.head_manifest(APP, "v1", None)).digest == digest

    run(web_of(fake), main)


def test_a_digest_of_another_algorithm_is_checked_too() -> None:
    fake, _, _ = registry()
    body = fake.manifests["team/app", "v1"]
    digest = digest_of(body, "sha512")
    fake.lies[f"/v2/team/app/manifests/{digest}"] = lambda asked: Reply(200, {"content-type": MANIFEST_TYPE}, body)

    async def main(mirror: Mirror) -> None:
        assert (await mirror.registries.get_manifest(APP, str(digest), None))[0].digest == digest

    run(web_of(fake), main)


def test_what_is_not_there_is_not_found() -> None:
    fake, _, layer = registry()

    async def main(mirror: Mirror) -> None:
        with pytest.raises(NotFoundAtOrigin):
            await mirror.registries.head_manifest(APP, "v2", None)
        with pytest.raises(NotFoundAtOrigin):
            await mirror.registries.get_manifest(APP, "v2", None)
        with pytest.raises(NotFoundAtOrigin):
            await mirror.authorizer.check(OTHER, layer, None)

    run(web_of(fake), main)


def test_every_kind_of_manifest_is_asked_for() -> None:
    fake, _, _ = registry()

    async def main(mirror: Mirror) -> None:
        await mirror.registries.head_manifest(APP, "v1", None)

    run(web_of(fake), main)
    accept = fake.asked[0].headers["accept"]
    assert all(kind in accept for kind in ("oci.image.index", "manifest.list.v2", "oci.image.manifest"))


# --- registries that lie ------------------------------------------------------------------------------------------


def lying(reply: Reply, reference: str = "v1") -> FakeRegistry:
    fake, _, _ = registry()
    fake.lies[f"/v2/team/app/manifests/{reference}"] = lambda asked: reply
    return fake


def refused(fake: FakeRegistry, kind: type[Exception], match: str, reference: str = "v1", act: str = "get") -> None:
    async def main(mirror: Mirror) -> None:
        ask = mirror.registries.get_manifest if act == "get" else mirror.registries.head_manifest
        with pytest.raises(kind, match=match):
            await ask(APP, reference, None)

    run(web_of(fake), main)


WRONG = digest_of(b"something else")


def test_a_registry_that_lies_about_the_digest_of_a_tag_is_caught() -> None:
    refused(
        lying(Reply(200, {"content-type": MANIFEST_TYPE, "docker-content-digest": str(WRONG)}, b"{}")), OriginError, "digest"
    )


def test_a_registry_that_sends_other_bytes_than_the_digest_is_caught() -> None:
    fake = lying(Reply(200, {"content-type": MANIFEST_TYPE}, b"{}"), str(WRONG))
    refused(fake, OriginError, "digest", str(WRONG))


@pytest.mark.parametrize("act", ["get", "head"])
def test_a_registry_that_answers_about_another_digest_is_caught(act: str) -> None:
    headers = {"content-type": MANIFEST_TYPE, "docker-content-digest": str(digest_of(b"{}")), "content-length": "2"}
    refused(lying(Reply(200, headers, b"{}"), str(WRONG)), OriginError, "answers with", str(WRONG), act)


@pytest.mark.parametrize("length", ["99999999999", "4400001"])
def test_a_manifest_larger_than_any_is_refused_before_it_is_read(length: str) -> None:
    headers = {"content-type": MANIFEST_TYPE, "docker-content-digest": str(WRONG), "content-length": length}
    refused(lying(Reply(200, headers, b"", framed=False)), OriginError, "larger than", act="head")


def test_a_manifest_without_end_is_cut_off() -> None:
    async def endless(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
        while True:
            await asked.stream.send_all(b"x" * 65536)

    fake, _, _ = registry()
    fake.lies["/v2/team/app/manifests/v1"] = endless
    refused(fake, OriginError, "more than 4400000 bytes")


def test_a_manifest_shorter_than_its_length_is_no_manifest() -> None:
    async def short(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{}")

    fake, _, _ = registry()
    fake.lies["/v2/team/app/manifests/v1"] = short
    refused(fake, OriginUnreachable, "ended too early")


@pytest.mark.parametrize("kind", ["", "text", "a/b\x00", "text/html, x/y", "a/" + "b" * 200])
def test_a_media_type_that_could_not_be_passed_on_is_refused(kind: str) -> None:
    refused(lying(Reply(200, {"content-type": kind}, b"{}")), OriginError, "media type|not HTTP")


def test_a_registry_that_never_answers_costs_a_few_seconds() -> None:
    async def silent(asked: Asked) -> None:
        await trio.sleep(100)

    fake, _, layer = registry()
    fake.lies["/v2/team/app/manifests/v1"] = silent
    fake.lies[f"/v2/team/app/blobs/{layer}"] = silent

    async def main(mirror: Mirror) -> None:
        began = trio.current_time()
        with pytest.raises(OriginUnreachable, match="within 5 s"):
            await mirror.registries.head_manifest(APP, "v1", None)
        assert trio.current_time() - began == pytest.approx(5.0)

    run(web_of(fake), main)


# --- which registries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["10.0.0.5", "127.0.0.1", "169.254.169.254", "100.100.100.200", "fd00:ec2::254", "::1", "0.0.0.1"]
)
def test_a_registry_nobody_listed_on_an_address_that_is_not_public_is_not_dialled(address: str) -> None:
    web = Web()
    web.names["inside.example"] = [address]
    name = Name("inside.example", "team/app")

    async def main(mirror: Mirror) -> None:
        assert mirror.registries.allowed(name.registry)
        for registry in (name, Name(f"[{address}]" if ":" in address else address, "team/app")):
            with pytest.raises(NotPermitted, match=r"in mirror\.registries"):
                await mirror.registries.head_manifest(registry, "v1", None)

    run(web, main, settings_of())
    assert web.dialled == []


def test_a_listed_registry_may_have_a_private_address_but_not_that_of_metadata() -> None:
    fake, _, _ = registry()
    web = web_of(fake)
    web.names["inside.example"] = ["10.0.0.5"]
    web.handlers[Address("10.0.0.5", 80)] = ("inside.example", fake.serve)
    web.names["metadata.example"] = ["169.254.169.254"]

    async def main(mirror: Mirror) -> None:
        await mirror.registries.head_manifest(Name("inside.example", "team/app"), "v1", None)
        with pytest.raises(NotPermitted):
            await mirror.registries.head_manifest(Name("metadata.example", "team/app"), "v1", None)

    run(web, main, settings_of(listed("inside.example"), listed("metadata.example")))
    assert {address.host for address in web.dialled} == {"10.0.0.5"}


def test_a_registry_that_is_not_allowed_is_not_asked() -> None:
    web = web_of(registry()[0])

    async def main(mirror: Mirror) -> None:
        for name in (Name("evil.example", "a"), Name("evil-registry.example", "a"), Name(f"{REGISTRY}:444", "a")):
            assert not mirror.registries.allowed(name.registry)
            with pytest.raises(NotPermitted, match=r"mirror\.registries"):
                await mirror.registries.head_manifest(name, "v1", None)
            with pytest.raises(NotPermitted):
                mirror.registries.blob_source(name, WRONG, None)

    run(web, main, settings_of(registries=(REGISTRY,)))
    assert web.dialled == []


def test_a_listed_place_under_another_name_is_not_reached_as_an_unlisted_registry() -> None:
    """SSRF: the token server is listed, so it could be reached at its private address; it is no registry for that."""
    web = web_of(registry()[0])

    async def main(mirror: Mirror) -> None:
        for registry in (AUTH, f"{AUTH}:80", f"{AUTH}:443", f"{REGISTRY}:80"):
            assert not mirror.registries.allowed(registry)

    run(web, main)


def test_docker_hub_answers_at_its_own_host_over_https(tmp_path: Path) -> None:
    web = Web()
    context = server_context(tmp_path, "registry-1.docker.io")
    web.serve("registry-1.docker.io", lambda asked: Reply(404), port=443)

    async def wrap(stream: trio.abc.Stream) -> trio.abc.Stream:
        return trio.SSLStream(stream, context, server_side=True, https_compatible=True)

    web.tls = wrap

    async def main(mirror: Mirror) -> None:
        source = mirror.registries.blob_source(Name("docker.io", "library/alpine"), WRONG, None)
        assert source.url == f"https://registry-1.docker.io/v2/library/alpine/blobs/{WRONG}"
        with pytest.raises(OriginUnreachable, match="certificate"):
            await mirror.registries.head_manifest(Name("docker.io", "library/alpine"), "v1", None)

    run(web, main)


# --- tokens -------------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_once_and_used_for_manifest_and_blobs() -> None:
    fake, digest, layer = registry("bearer")

    async def main(mirror: Mirror) -> None:
        await mirror.registries.head_manifest(APP, "v1", None)
        await mirror.registries.get_manifest(APP, str(digest), None)
        assert await mirror.blob(APP, layer) == LAYER
        source = mirror.registries.blob_source(APP, layer, None)
        async with mirror.reader.read(source, 5, 15) as body:
            assert b"".join([c async for c in body.chunks()])[5 - body.start :] == LAYER[5:15]

    run(web_of(fake), main)
    assert len(fake.token_asked) == 1
    assert fake.sent().count("") == 1


def test_many_at_once_share_one_token() -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)

    async def main(mirror: Mirror) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(mirror.registries.head_manifest, APP, "v1", ALICE)

    run(web_of(fake), main)
    assert len(fake.token_asked) == 1


def test_a_token_is_replaced_shortly_before_it_runs_out() -> None:
    fake, _, _ = registry("bearer")
    fake.token_seconds = 100

    async def main(mirror: Mirror) -> None:
        for wait, tokens in ((0, 1), (85, 1), (6, 2)):
            await trio.sleep(wait)
            await mirror.registries.head_manifest(APP, "v1", None)
            assert len(fake.token_asked) == tokens

    run(web_of(fake), main)
    assert fake.sent().count("") == 1


@pytest.mark.parametrize(("said", "kept"), [(None, 45), (0, 45), (-5, 45), (True, 45), ("300", 45), (1e300, 45), (10**6, 3000)])
def test_a_token_is_not_kept_for_as_long_as_its_server_pleases(said: object, kept: float) -> None:
    fake, _, _ = registry("bearer")
    fake.token_seconds = said

    async def main(mirror: Mirror) -> None:
        await mirror.registries.head_manifest(APP, "v1", None)
        await trio.sleep(kept)
        await mirror.registries.head_manifest(APP, "v1", None)
        assert len(fake.token_asked) == 1
        await trio.sleep(1000)
        await mirror.registries.head_manifest(APP, "v1", None)
        assert len(fake.token_asked) == 2

    run(web_of(fake), main)


def test_a_token_that_the_registry_forgot_is_replaced_in_the_middle_of_a_blob() -> None:
    fake, _, layer = registry("bearer")

    async def main(mirror: Mirror) -> None:
        await mirror.authorizer.check(APP, layer, None)
        source = mirror.registries.blob_source(APP, layer, None)
        await mirror.take(source)
        await trio.sleep(30)
        fake.tokens.clear()
        assert await mirror.take(source) == LAYER

    run(web_of(fake), main)


def test_a_client_may_bring_the_token_itself() -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)
    fake.tokens["Bearer of-alice"] = ("alice", "team/app")

    async def main(mirror: Mirror) -> None:
        await mirror.registries.head_manifest(APP, "v1", ClientCredentials("Bearer of-alice"))
        with pytest.raises(MirrorDenied):
            await mirror.registries.head_manifest(OTHER, "v1", ClientCredentials("Bearer of-alice"))

    run(web_of(fake), main)
    assert fake.sent() == ["Bearer of-alice"] * 2
    assert fake.token_asked == []


def test_a_registry_with_a_scope_of_its_own_gets_asked_for_that_too() -> None:
    fake, _, _ = registry("bearer")
    fake.lies["/v2/team/app/manifests/v1"] = lambda asked: (
        Reply(404)
        if "authorization" in asked.headers
        else Reply(401, {"www-authenticate": f'Bearer realm="http://{AUTH}/token",service="s",scope="aws"'})
    )

    async def main(mirror: Mirror) -> None:
        with pytest.raises(NotFoundAtOrigin):
            await mirror.registries.head_manifest(APP, "v1", None)

    run(web_of(fake), main)
    assert fake.token_asked[0].target == "/token?service=s&scope=repository:team/app:pull&scope=aws"


def test_the_realm_keeps_its_own_query() -> None:
    fake, _, _ = registry("bearer")
    fake.realm = f"http://{AUTH}/token?account=robot"

    async def main(mirror: Mirror) -> None:
        await mirror.registries.head_manifest(APP, "v1", None)

    run(web_of(fake), main)
    assert fake.token_asked[0].target == "/token?account=robot&service=fake&scope=repository:team/app:pull"


# --- attacks on tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["repository:team/other:pull", "repository:team/app:pull,push,delete", "registry:catalog:*"])
def test_a_token_for_another_scope_is_never_asked_for(scope: str) -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)
    fake.lies["/v2/team/app/manifests/v1"] = lambda asked: Reply(
        401, {"www-authenticate": f'Bearer realm="http://{AUTH}/token",service="s",scope="{scope}"'}
    )

    async def main(mirror: Mirror) -> None:
        with pytest.raises(MirrorDenied):
            await mirror.registries.head_manifest(APP, "v1", ALICE)

    run(web_of(fake), main)
    assert {asked.target for asked in fake.token_asked} == {"/token?service=s&scope=repository:team/app:pull"}


def test_a_token_for_one_repository_is_not_used_for_another() -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)
    fake.push("team/other", "v1", b"other", readers=ONLY_ALICE)

    async def main(mirror: Mirror) -> None:
        await mirror.registries.head_manifest(APP, "v1", ALICE)
        await mirror.registries.head_manifest(OTHER, "v1", ALICE)

    run(web_of(fake), main)
    assert len(fake.token_asked) == 2
    assert len(set(fake.sent()) - {""}) == 2


def test_a_token_of_one_client_is_not_used_for_another() -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)

    async def main(mirror: Mirror) -> None:
        await mirror.registries.head_manifest(APP, "v1", ALICE)
        for who in (BOB, MALLORY, None):
            with pytest.raises(MirrorDenied):
                await mirror.registries.head_manifest(APP, "v1", who)

    run(web_of(fake), main)


def test_a_clients_password_does_not_live_on_in_a_token() -> None:
    """T20: the token would be good for an hour; the right behind it is asked for again after a minute."""
    fake, _, _ = registry("bearer", ONLY_ALICE)
    fake.token_seconds = 3600

    async def main(mirror: Mirror) -> None:
        await mirror.registries.head_manifest(APP, "v1", ALICE)
        fake.passwords["alice"] = "changed"
        await trio.sleep(61)
        with pytest.raises(MirrorDenied):
            await mirror.registries.head_manifest(APP, "v1", ALICE)

    run(web_of(fake), main)


@pytest.mark.parametrize(
    "realm",
    [
        "http://evil.example/token",
        f"http://{AUTH}:8080/token",
        f"http://{REGISTRY}:8080/token",
        f"http://{AUTH}.evil.example/token",
        f"http://evil.example/{AUTH}/token",
        f"http://evil.example?{AUTH}",
    ],
)
def test_a_realm_elsewhere_gets_no_credentials(realm: str) -> None:
    """T24 (CVE-2020-15157, CVE-2026-33540): the registry chooses the realm, but not who gets the password."""
    fake, _, _ = registry("bearer", ONLY_ALICE)
    fake.realm = realm
    web = web_of(fake)
    for host in ("evil.example", f"{AUTH}.evil.example"):
        web.serve(host, fake.serve_tokens)
    for host in (AUTH, REGISTRY):
        web.serve(host, fake.serve_tokens, port=8080)

    async def main(mirror: Mirror) -> None:
        with pytest.raises(MirrorDenied):
            await mirror.registries.head_manifest(APP, "v1", ALICE)

    run(web, main)
    assert fake.token_asked
    assert all("authorization" not in asked.headers and "secret" not in asked.target for asked in fake.token_asked)


def test_a_realm_elsewhere_gets_none_of_this_nodes_credentials_either(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("secret")
    password.chmod(0o600)
    fake, _, _ = registry("bearer", ONLY_ALICE)
    fake.realm = "http://evil.example/token"
    fake.refresh_tokens["identity"] = "alice"
    web = web_of(fake)
    web.serve("evil.example", fake.serve_tokens)

    async def main(mirror: Mirror) -> None:
        with pytest.raises(MirrorDenied) as caught:
            await mirror.registries.head_manifest(APP, "v1", None)
        assert caught.value.challenge == ""

    run(web, main, settings_of(listed(username="alice", password_file=password)))
    assert [asked.headers.get("authorization") for asked in fake.token_asked] == [None]


def test_a_helper_slower_than_a_client_waits_for_is_heard_by_the_next_one() -> None:
    fake, _, _ = registry("basic", ONLY_ALICE)
    runs: list[str] = []

    async def slow(helper: str, server: str) -> Basic:
        runs.append(server)
        await trio.sleep(5.5)
        return Basic.of("alice", "secret")

    async def main(mirror: Mirror) -> None:
        with pytest.raises(OriginUnreachable):
            await mirror.registries.head_manifest(APP, "v1", None)
        await trio.sleep(4)  # for as long a registry that gave no answer is not asked
        await mirror.registries.head_manifest(APP, "v1", None)

    run(web_of(fake), main, settings_of(listed(credential_helper="slow")), run_helper=slow)
    assert runs == [REGISTRY]


def test_an_identity_token_is_posted_to_no_realm_but_its_own(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"auths": {REGISTRY: {"identitytoken": "identity"}}}))
    config.chmod(0o600)
    for realm, posts in ((f"http://{AUTH}/token", 1), ("http://evil.example/token", 0)):
        fake, _, _ = registry("bearer", ONLY_ALICE)
        fake.realm, fake.refresh_tokens = realm, {"identity": "alice"}
        web = web_of(fake)
        web.serve("evil.example", fake.serve_tokens)

        async def main(mirror: Mirror, posts: int = posts) -> None:
            if posts:
                await mirror.registries.head_manifest(APP, "v1", None)
            else:
                with pytest.raises(MirrorDenied):
                    await mirror.registries.head_manifest(APP, "v1", None)

        run(web, main, settings_of(listed(), docker_config=config))
        assert [asked.method for asked in fake.token_asked] == (["POST"] if posts else ["GET"])
        assert [form["grant_type"] for form in fake.forms] == [["refresh_token"]] * posts


@pytest.mark.parametrize(
    "location", ["http://evil.example/steal", f"http://{REGISTRY}:8080/", f"http://{REGISTRY}@evil.example/", "//evil.example/"]
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_no_credentials_along(status: int, location: str) -> None:
    """T24: the storage host of a blob gets neither token nor password, whoever chose it."""
    for kind in ("basic", "bearer"):
        fake, _, layer = registry(kind, ONLY_ALICE)
        seen: list[Asked] = []

        def steal(asked: Asked, seen: list[Asked] = seen) -> Reply:
            seen.append(asked)
            return content_reply(asked, LAYER)

        def redirect(asked: Asked, fake: FakeRegistry = fake) -> Reply:
            if not fake._may(asked, "team/app"):
                return Reply(401, {"www-authenticate": fake._challenge("team/app")})
            return Reply(status, {"location": location})

        fake.lies[f"/v2/team/app/blobs/{layer}"] = redirect
        web = web_of(fake)
        web.serve("evil.example", steal)
        web.serve(REGISTRY, steal, port=8080)

        async def main(mirror: Mirror, layer: Digest = layer) -> None:
            assert await mirror.blob(APP, layer, ALICE) == LAYER

        run(web, main)
        assert seen
        assert all(not {"authorization", "cookie"} & asked.headers.keys() for asked in seen)


def test_a_token_server_that_redirects_takes_no_credentials_along() -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)
    fake.token_reply = lambda asked: Reply(307, {"location": "http://evil.example/token"})
    seen: list[Asked] = []

    def steal(asked: Asked) -> Reply:
        seen.append(asked)
        return Reply(200, {}, b'{"token": "evil"}')

    web = web_of(fake)
    web.serve("evil.example", steal)

    async def main(mirror: Mirror) -> None:
        with pytest.raises(MirrorDenied):
            await mirror.registries.head_manifest(APP, "v1", ALICE)

    run(web, main)
    assert [asked.headers.get("authorization") for asked in seen] == [None]


@pytest.mark.parametrize(
    "realm",
    [
        "http://127.0.0.1:9200/",
        "http://169.254.169.254/latest/meta-data/",
        "http://metadata.google.internal/",
        "http://10.0.0.7/",
        "http://inside.example/",
        "http://[::1]/",
        "http://0x7f000001/",
        "http://2130706433/",
    ],
)
def test_a_realm_cannot_make_this_node_call_what_is_inside(realm: str) -> None:
    """T14, SSRF through the realm."""
    fake, _, _ = registry("bearer")
    fake.realm = realm
    web = web_of(fake)
    web.names["inside.example"] = ["10.0.0.7"]

    async def main(mirror: Mirror) -> None:
        with pytest.raises(NotPermitted):
            await mirror.registries.head_manifest(APP, "v1", None)

    run(web, main)
    assert {address.host for address in web.dialled} == {web.names[REGISTRY][0]}


def test_the_realm_of_one_registry_cannot_reach_what_was_listed_for_another() -> None:
    """SSRF: the token server of another registry may be at a private address, because that registry was listed."""
    fake, _, _ = registry("bearer")
    fake.realm = "http://inside.example/api/delete?everything=yes"
    web = web_of(fake)
    web.names["inside.example"] = ["10.0.0.7"]

    async def main(mirror: Mirror) -> None:
        with pytest.raises(NotPermitted, match="listed for another registry"):
            await mirror.registries.head_manifest(APP, "v1", None)

    run(web, main, settings_of(listed(), listed("other.example", token_hosts=("inside.example",))))
    assert {address.host for address in web.dialled} == {web.names[REGISTRY][0]}


@pytest.mark.parametrize(
    "location", ["http://169.254.169.254/", "http://127.0.0.1:7403/", "http://10.0.0.7/", "file:///etc/passwd", "http://[::1]/"]
)
def test_a_blob_cannot_be_redirected_inwards(location: str) -> None:
    """T15."""
    fake, _, layer = registry()
    fake.lies[f"/v2/team/app/blobs/{layer}"] = lambda asked: Reply(307, {"location": location})
    web = web_of(fake)

    async def main(mirror: Mirror) -> None:
        with pytest.raises((NotPermitted, OriginError)):
            await mirror.take(mirror.registries.blob_source(APP, layer, None))
        with pytest.raises((NotPermitted, OriginError)):
            await mirror.authorizer.check(APP, layer, None)

    run(web, main)
    assert {address.host for address in web.dialled} == {web.names[REGISTRY][0]}


def test_a_token_over_plain_http_is_refused_where_the_registry_is_https(tmp_path: Path) -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)
    web = web_of(fake, port=443)
    web.serve(AUTH, fake.serve_tokens)
    context = server_context(tmp_path, REGISTRY)

    async def wrap(stream: trio.abc.Stream) -> trio.abc.Stream:
        return trio.SSLStream(stream, context, server_side=True, https_compatible=True)

    web.tls = wrap

    async def main(mirror: Mirror) -> None:
        with pytest.raises(OriginError, match="plain http"):
            await mirror.registries.head_manifest(APP, "v1", ALICE)

    run(web, main, settings_of(listed(endpoint="")), ca=authority_file(tmp_path))
    assert fake.token_asked == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"token"',
        b"{}",
        b'{"token": 5}',
        b'{"token": ""}',
        b'{"token": "a b"}',
        b'{"token": "a\\r\\nX-Evil: 1"}',
        b'{"token": "a\\u0000"}',
        b'{"token": "' + b"a" * 20_000 + b'"}',
        b"[" * 60_000,
        b'{"token": "t", "x": "' + b"a" * 70_000 + b'"}',
    ],
    ids=lambda body: body[:20].decode(),
)
def test_a_token_that_is_none_is_not_sent(body: bytes) -> None:
    """Header injection, and answers that are too large or nested too deep."""
    fake, _, _ = registry("bearer")
    fake.token_reply = lambda asked: Reply(200, {}, body)

    async def main(mirror: Mirror) -> None:
        with pytest.raises(OriginError):
            await mirror.registries.head_manifest(APP, "v1", None)

    run(web_of(fake), main)
    assert fake.sent() == [""]


def test_a_slow_token_server_costs_a_few_seconds_and_only_once() -> None:
    async def silent(asked: Asked) -> None:
        await trio.sleep(100)

    fake, _, _ = registry("bearer")
    fake.token_reply = silent

    async def main(mirror: Mirror) -> None:
        began = trio.current_time()

        async def ask() -> None:
            with pytest.raises(OriginUnreachable):
                await mirror.registries.head_manifest(APP, "v1", None)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
        assert trio.current_time() - began == pytest.approx(5.0)

    run(web_of(fake), main)
    assert len(fake.token_asked) == 1


def test_a_slow_token_server_holds_up_no_download_either() -> None:
    async def silent(asked: Asked) -> None:
        await trio.sleep(100)

    fake, _, layer = registry("bearer")
    fake.token_reply = silent

    async def main(mirror: Mirror) -> None:
        began = trio.current_time()
        with pytest.raises(OriginUnreachable, match="no token within 5 s"):
            await mirror.take(mirror.registries.blob_source(APP, layer, None))
        assert trio.current_time() - began == pytest.approx(5.0)

    run(web_of(fake), main)


def test_a_token_server_that_drips_costs_a_few_seconds() -> None:
    async def drip(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 60000\r\n\r\n")
        while True:
            await asked.stream.send_all(b" ")
            await trio.sleep(0.1)

    fake, _, _ = registry("bearer")
    fake.token_reply = drip

    async def main(mirror: Mirror) -> None:
        began = trio.current_time()
        with pytest.raises(OriginUnreachable):
            await mirror.registries.head_manifest(APP, "v1", None)
        assert trio.current_time() - began <= 5.5

    run(web_of(fake), main)


def test_a_wrong_password_is_not_tried_again_and_again() -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)

    async def main(mirror: Mirror) -> None:
        for _ in range(20):
            with pytest.raises(MirrorDenied):
                await mirror.registries.head_manifest(APP, "v1", MALLORY)
        assert len(fake.token_asked) == 1
        await trio.sleep(11)
        fake.passwords["alice"] = "guess"
        await mirror.registries.head_manifest(APP, "v1", MALLORY)

    run(web_of(fake), main)


def test_the_leader_of_a_shared_token_may_go_away() -> None:
    """R29: one of the others asks instead, not all of them."""
    fake, _, _ = registry("bearer")
    arrived = trio.Event()
    go_on = trio.Event()

    async def slow(asked: Asked) -> Reply:
        arrived.set()
        await go_on.wait()
        fake.token_reply = None
        return Reply(503)

    fake.token_reply = slow

    async def main(mirror: Mirror) -> None:
        async with trio.open_nursery() as nursery:
            leader = trio.CancelScope()

            async def lead() -> None:
                with leader:
                    await mirror.registries.head_manifest(APP, "v1", None)

            nursery.start_soon(lead)
            await arrived.wait()
            for _ in range(5):
                nursery.start_soon(mirror.registries.head_manifest, APP, "v1", None)
            await trio.testing.wait_all_tasks_blocked()
            fake.token_reply = None
            leader.cancel()
            go_on.set()

    run(web_of(fake), main)
    assert len(fake.token_asked) == 2


# --- what clients are told ----------------------------------------------------------------------------------------


def denied(fake: FakeRegistry, who: ClientCredentials | None, **table: Any) -> MirrorDenied:
    found: list[MirrorDenied] = []

    async def main(mirror: Mirror) -> None:
        with pytest.raises(MirrorDenied) as caught:
            await mirror.registries.head_manifest(APP, "v1", who)
        found.append(caught.value)

    run(web_of(fake), main, settings_of(listed(**table)))
    return found[0]


def test_a_client_is_told_what_the_registry_asks_for() -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)
    error = denied(fake, None)
    assert (error.status, error.code) == (401, "UNAUTHORIZED")
    assert error.challenge == f'Bearer realm="http://{AUTH}/token",service="fake",scope="repository:team/app:pull"'
    fake, _, _ = registry("basic", ONLY_ALICE)
    assert denied(fake, None).challenge == 'Basic realm="fake registry"'


def test_a_registry_whose_clients_are_not_to_be_asked_gives_a_bare_refusal() -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)
    assert denied(fake, ALICE, pass_credentials=False).challenge == ""
    assert all("authorization" not in asked.headers for asked in fake.token_asked)


@pytest.mark.parametrize(
    "challenge",
    [
        'Bearer realm="http://auth.example/token\r\nSet-Cookie: x=y"',
        'Bearer realm="http://auth.example/\x00"',
        'Bearer realm="http://auth.example/\\"quoted"',
        'Basic realm="a\xe9"',
    ],
)
def test_a_challenge_injects_nothing_into_our_answer(challenge: str) -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)
    fake.lies["/v2/team/app/manifests/v1"] = lambda asked: Reply(401, {"www-authenticate": challenge})

    async def main(mirror: Mirror) -> None:
        with pytest.raises((MirrorDenied, OriginError)) as caught:
            await mirror.registries.head_manifest(APP, "v1", None)
        assert getattr(caught.value, "challenge", "") in ("", 'Basic realm=""')

    run(web_of(fake), main)


@pytest.mark.parametrize(
    "header",
    ["Basic", "Basic !", "Basic YQ==", "Negotiate abc", "Bearer a b", "Bearer ", "Bearer x\r\nX: y", "Basic " + "A" * 13000],
)
def test_credentials_that_are_none_are_passed_on_to_nobody(header: str) -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)

    async def main(mirror: Mirror) -> None:
        with pytest.raises(MirrorError) as caught:
            await mirror.registries.head_manifest(APP, "v1", ClientCredentials(header))
        assert caught.value.status == 401

    run(web_of(fake), main)
    assert fake.asked == []


def test_an_empty_user_and_password_are_nobody() -> None:
    """What podman sends where it has no credentials."""
    fake, _, _ = registry("basic", ONLY_ALICE)
    assert denied(fake, ClientCredentials("Basic Og==")).status == 401
    assert set(fake.sent()) == {""}


# --- lists --------------------------------------------------------------------------------------------------------


def test_lists_are_passed_through() -> None:
    fake, _, _ = registry("bearer", ONLY_ALICE)

    async def main(mirror: Mirror) -> None:
        passed = await mirror.registries.pass_through(APP, "tags/list", "n=5", ALICE)
        assert (passed.status, passed.headers, passed.body) == (
            200,
            (("Content-Type", "application/json"),),
            b'{"tags":["v1"]}',
        )
        with pytest.raises(MirrorDenied):
            await mirror.registries.pass_through(APP, "tags/list", "n=5", BOB)
        assert (await mirror.registries.pass_through(APP, f"referrers/{WRONG}", "", ALICE)).status == 404

    run(web_of(fake), main)
    assert fake.asked[-1].target == f"/v2/team/app/referrers/{WRONG}"


@pytest.mark.parametrize(
    ("link", "passed"),
    [
        ('</v2/team/app/tags/list?n=5&last=v1>; rel="next"', '</v2/team/app/tags/list?n=5&last=v1>; rel="next"'),
        (f'<http://{REGISTRY}/v2/team/app/tags/list?last=v1>; rel="next"', '</v2/team/app/tags/list?last=v1>; rel="next"'),
        ('<?last=v1>; rel="next"', '</v2/team/app/tags/list?last=v1>; rel="next"'),
        ('<http://evil.example/v2/team/app/tags/list?last=v1>; rel="next"', ""),
        ('<//evil.example/v2/team/app/tags/list>; rel="next"', ""),
        ('</v2/team/other/tags/list>; rel="next"', ""),
        (f'<https://{REGISTRY}/v2/team/app/tags/list>; rel="next"', ""),
        ('<http://[>; rel="next"', ""),
        ('</v2/team/app/tags/list?a="b">; rel="next"', ""),
        ("garbage", ""),
    ],
)
def test_a_link_leads_to_the_next_page_or_nowhere(link: str, passed: str) -> None:
    """T24: a client that follows a Link elsewhere would take its credentials there."""
    fake, _, _ = registry()
    headers = {"content-type": "application/json", "link": link, "oci-filters-applied": "artifactType", "set-cookie": "x=y"}
    fake.lies["/v2/team/app/tags/list"] = lambda asked: Reply(200, headers, b"{}")

    async def main(mirror: Mirror) -> None:
        found = dict((await mirror.registries.pass_through(APP, "tags/list", "", None)).headers)
        assert found.pop("Link", "") == passed
        assert found == {"Content-Type": "application/json", "OCI-Filters-Applied": "artifactType"}

    run(web_of(fake), main)


# --- secrets ------------------------------------------------------------------------------------------------------


def test_a_secret_is_in_no_log_no_error_and_no_repr(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """T23."""
    fake, _, layer = registry("bearer", ONLY_ALICE)
    fake.passwords["alice"] = "canary-password"
    fake.tokens["Bearer canary-token"] = ("alice", "team/app")
    caplog.set_level("DEBUG")
    told: list[str] = []

    async def main(mirror: Mirror) -> None:
        for who in (client("alice", "canary-password"), ClientCredentials("Bearer canary-token")):
            source = mirror.registries.blob_source(APP, layer, who)
            await mirror.authorizer.check(APP, layer, who)
            told.extend(map(repr, (who, source, source.authorization, mirror.registries.asker(APP, who))))
            told.extend(map(repr, (mirror.registries._broker._tokens._kept, mirror.registries.rights._kept)))
        fake.passwords.clear()
        fake.tokens.clear()
        await trio.sleep(200)
        for who in (client("alice", "canary-password"), ClientCredentials("Bearer canary-token")):
            try:
                await mirror.registries.head_manifest(APP, "v1", who)
            except (MirrorError, OriginRefused) as error:
                told.append(f"{error!r} {error} {getattr(error, 'challenge', '')}")

    run(web_of(fake), main)
    assert len(told) == 14
    out, err = capsys.readouterr()
    for text in (*told, caplog.text, out, err):
        for secret in ("canary", basic("alice", "canary-password").split()[1], *(t.split()[1] for t in fake.tokens)):
            assert secret not in text
