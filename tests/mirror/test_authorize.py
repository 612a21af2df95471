"""Who may read what: private content, other clients, other repositories, registries that are down or lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from swarm.edges import Source
from swarm.errors import NotFoundAtOrigin, NotPermitted, OriginError, SwarmError
from swarm.mirror.access import Access
from swarm.mirror.authorize import held_in
from swarm.mirror.edges import Grant, MirrorDenied, MirrorError
from swarm.mirror.paths import ClientCredentials, Name
from swarm.mirror.rights import MAX_REMEMBERED, Rights
from swarm.store.memory import MemoryStore
from swarm.task import Digest, Geometry, blob_task
from tests.mirror.fake_registry import REGISTRY, FakeRegistry, Mirror, client, digest_of, listed, run, settings_of, web_of
from tests.origin.test_tls import authority_file, server_context
from tests.origin.web import Asked, Reply, Web

PRIVATE, PUBLIC = Name(REGISTRY, "team/private"), Name(REGISTRY, "team/public")
LAYER, SHARED = b"layer" * 1000, b"shared" * 1000
ALICE, BOB, MALLORY = client("alice", "secret"), client("bob", "other"), client("alice", "guess")
NOBODYS = [None, BOB, MALLORY, client("eve", ""), ClientCredentials("Bearer made-up"), ClientCredentials("Basic Og==")]


def registry(kind: str = "bearer") -> tuple[FakeRegistry, Digest, Digest]:
    """A private and a public repository that share a layer; the digests of the private layer and of the shared one."""
    fake = FakeRegistry(kind)
    _, [layer, shared] = fake.push("team/private", "v1", LAYER, SHARED, readers={"alice"})
    fake.push("team/public", "v1", SHARED)
    return fake, layer, shared


async def refused(
    mirror: Mirror, name: Name, digest: Digest, who: ClientCredentials | None, kind: type[SwarmError] = MirrorDenied
) -> SwarmError:
    with pytest.raises(kind) as caught:
        await mirror.authorizer.check(name, digest, who)
    return caught.value


def probes(fake: FakeRegistry) -> int:
    return sum("/blobs/" in asked.target or "/manifests/" in asked.target for asked in fake.asked)


# --- T19-T21 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["basic", "bearer"])
@pytest.mark.parametrize("mode", ["auto", "verify", "never"])
def test_private_content_is_for_those_whom_the_registry_lets_read_it(kind: str, mode: str) -> None:
    """T19."""
    fake, layer, _ = registry(kind)

    async def main(mirror: Mirror) -> None:
        mirror.private[layer] = True
        for _ in range(2):
            assert await mirror.authorizer.check(PRIVATE, layer, ALICE) == Grant(private=True, shared=mode != "never")
            for who in NOBODYS:
                error = await refused(mirror, PRIVATE, layer, who)
                assert isinstance(error, MirrorDenied)
                assert error.status == 401
        assert await mirror.blob(PRIVATE, layer, ALICE) == LAYER

    run(web_of(fake), main, settings_of(rights=mode))
    reads = [asked for asked in fake.asked if asked.method == "GET"]
    assert len(reads) <= 2


def test_an_answer_for_one_client_is_not_used_for_another_who_asks_at_the_same_time() -> None:
    """T19: cache poisoning across credentials, in flight."""
    fake, layer, _ = registry("basic")
    results: dict[int, object] = {}

    async def main(mirror: Mirror) -> None:
        async def ask(number: int, who: ClientCredentials | None) -> None:
            try:
                results[number] = await mirror.authorizer.check(PRIVATE, layer, who)
            except MirrorDenied as error:
                results[number] = error.status

        async with trio.open_nursery() as nursery:
            for number, who in enumerate([ALICE, *NOBODYS, ALICE]):
                nursery.start_soon(ask, number, who)

    run(web_of(fake), main)
    assert [results[number] for number in range(8)] == [Grant(True), *[401] * 6, Grant(True)]


@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_a_right_that_was_taken_away_is_gone_within_the_time_set(kind: str) -> None:
    """T20."""
    fake, layer, _ = registry(kind)
    fake.token_seconds = 3600

    async def main(mirror: Mirror) -> None:
        for _ in range(3):
            await mirror.authorizer.check(PRIVATE, layer, ALICE)
            await trio.sleep(40)
        fake.readers["team/private"] = set()
        fake.passwords["alice"] = "changed"
        await trio.sleep(120)
        await refused(mirror, PRIVATE, layer, ALICE)

    run(web_of(fake), main)


def test_a_clients_own_token_is_asked_about_again_within_the_time_set() -> None:
    """T20, with a token the client got itself."""
    fake, layer, _ = registry()
    fake.tokens["Bearer mine"] = ("alice", "team/private")
    who = ClientCredentials("Bearer mine")

    async def main(mirror: Mirror) -> None:
        await mirror.authorizer.check(PRIVATE, layer, who)
        del fake.tokens["Bearer mine"]
        await trio.sleep(121)
        await refused(mirror, PRIVATE, layer, who)

    run(web_of(fake), main)


def test_a_shared_layer_is_read_through_the_public_repository_only() -> None:
    """T21, confused deputy: the right is for a repository, whatever else has the same bytes."""
    fake, layer, shared = registry()

    async def main(mirror: Mirror) -> None:
        mirror.private[shared] = True
        assert await mirror.authorizer.check(PRIVATE, shared, ALICE) == Grant(private=True)
        for who in NOBODYS[:2]:
            assert await mirror.authorizer.check(PUBLIC, shared, who) == Grant(private=False)
            await refused(mirror, PRIVATE, shared, who)
            await refused(mirror, PUBLIC, layer, who, SwarmError)

    run(web_of(fake), main)


def test_a_digest_of_another_repository_is_not_there() -> None:
    """Confused deputy: a repository everybody may read does not open what it does not have."""
    fake, layer, _ = registry()

    async def main(mirror: Mirror) -> None:
        mirror.private[layer] = True
        await mirror.authorizer.check(PRIVATE, layer, ALICE)
        await refused(mirror, PUBLIC, layer, None, NotFoundAtOrigin)
        await refused(mirror, PUBLIC, layer, ALICE, SwarmError)

    run(web_of(fake), main)


def test_a_right_of_one_registry_is_none_in_another() -> None:
    fake, layer, _ = registry("basic")
    other = FakeRegistry("basic", host="other.example")

    async def main(mirror: Mirror) -> None:
        await mirror.authorizer.check(PRIVATE, layer, ALICE)
        await refused(mirror, Name("other.example", "team/private"), layer, ALICE, SwarmError)

    run(web_of(fake, other), main, settings_of(listed(), listed("other.example")))


# --- registries nobody listed -------------------------------------------------------------------------------------


def says_yes(host: str) -> FakeRegistry:
    """A registry that has whatever is asked for, until it has to show it."""
    fake = FakeRegistry(host=host)
    fake.serve = lambda asked: (  # type: ignore[method-assign]  # a liar
        Reply(200, {"content-length": "5000"}) if asked.method == "HEAD" else Reply(404)
    )
    return fake


def behind_tls(web: Web, directory: object, *hosts: str) -> Web:
    context = server_context(directory, *hosts)  # type: ignore[arg-type]  # a path

    async def wrap(stream: trio.abc.Stream) -> trio.abc.Stream:
        return trio.SSLStream(stream, context, server_side=True, https_compatible=True)

    web.tls = wrap
    return web


@pytest.mark.parametrize("mode", ["auto", "public", "verify", "never"])
def test_a_registry_nobody_listed_cannot_open_what_is_private_elsewhere(tmp_path, mode: str) -> None:
    """Confused deputy: anybody can run a registry that says yes to every digest."""
    layer = digest_of(LAYER)
    evil = Name("evil.example", "team/private")
    web = behind_tls(web_of(says_yes("evil.example"), port=443), tmp_path, "evil.example")

    async def main(mirror: Mirror) -> None:
        mirror.private[layer] = True
        for who in (None, BOB):
            await refused(mirror, evil, layer, who, NotFoundAtOrigin)
        mirror.private[layer] = False
        grant = await mirror.authorizer.check(evil, layer, None)
        assert grant == Grant(private=mode == "never", shared=mode != "never")

    run(web, main, settings_of(rights=mode), ca=authority_file(tmp_path))


def test_what_was_just_granted_counts_as_private_before_it_is_in_the_store(tmp_path) -> None:
    """Between the yes to one client and the first piece in the store another one could come by way of a liar."""
    fake, layer, _ = registry("basic")
    evil = says_yes("evil.example")
    web = behind_tls(web_of(fake, evil, port=443), tmp_path, "evil.example", REGISTRY)

    async def main(mirror: Mirror) -> None:
        assert await mirror.authorizer.check(Name("evil.example", "a"), layer, None) == Grant(private=False)
        await mirror.authorizer.check(PRIVATE, layer, ALICE)
        await refused(mirror, Name("evil.example", "a"), layer, None, NotFoundAtOrigin)

    run(web, main, settings_of(listed(endpoint="")), ca=authority_file(tmp_path))


def test_a_registry_nobody_listed_sees_no_credentials_and_asks_for_none(tmp_path) -> None:
    fake = FakeRegistry("basic", host="evil.example")
    _, [layer] = fake.push("team/private", "v1", LAYER, readers={"alice"})
    web = behind_tls(web_of(fake, port=443), tmp_path, "evil.example")

    async def main(mirror: Mirror) -> None:
        for who in (None, ALICE):
            error = await refused(mirror, Name("evil.example", "team/private"), layer, who)
            assert isinstance(error, MirrorDenied)
            assert (error.status, error.challenge) == (401, "")
            for ask in (mirror.registries.head_manifest, mirror.registries.get_manifest):
                with pytest.raises(MirrorDenied):
                    await ask(Name("evil.example", "team/private"), "v1", who)
            with pytest.raises(MirrorDenied):
                await mirror.registries.pass_through(Name("evil.example", "team/private"), "tags/list", "", who)

    run(web, main, ca=authority_file(tmp_path))
    assert set(fake.sent()) == {""}


def test_a_listed_public_registry_does_not_open_what_is_private_without_having_it() -> None:
    fake, layer, shared = registry("open")

    async def main(mirror: Mirror) -> None:
        mirror.private.update({layer: True, shared: True})
        assert await mirror.authorizer.check(PUBLIC, shared, None) == Grant(private=False)
        await refused(mirror, PUBLIC, layer, None, NotFoundAtOrigin)
        del mirror.private[layer]
        assert await mirror.authorizer.check(PUBLIC, layer, None) == Grant(private=False)

    run(web_of(fake), main, settings_of(rights="public"))


# --- registries that are down -------------------------------------------------------------------------------------


def down(web: Web, fake: FakeRegistry) -> None:
    """Nothing answers any more, also on connections that are open."""
    web.refuse |= set(web.handlers)
    fake.is_down = True


@pytest.mark.parametrize("mode", ["auto", "verify", "never"])
def test_what_is_private_is_refused_while_nobody_can_be_asked(mode: str) -> None:
    """Fail closed."""
    fake, layer, _ = registry("basic")
    web = web_of(fake)

    async def main(mirror: Mirror) -> None:
        mirror.private[layer] = True
        await mirror.authorizer.check(PRIVATE, layer, ALICE)
        await refused(mirror, PRIVATE, layer, None)
        await trio.sleep(400)
        down(web, fake)
        for who in (ALICE, None):
            error = await refused(mirror, PRIVATE, layer, who)
            assert isinstance(error, MirrorDenied)
            assert error.status in (401, 503)

    run(web, main, settings_of(rights=mode))


@pytest.mark.parametrize("who", [None, ALICE, BOB])
def test_what_is_held_as_private_is_refused_though_its_repository_is_not_known(who: ClientCredentials | None) -> None:
    fake, layer, _ = registry("basic")
    web = web_of(fake)

    async def main(mirror: Mirror) -> None:
        mirror.private[layer] = True
        down(web, fake)
        error = await refused(mirror, PRIVATE, layer, who)
        assert isinstance(error, MirrorDenied)
        assert error.status == 503

    run(web, main)


def test_a_repository_that_asked_for_credentials_stays_closed_while_nobody_can_be_asked() -> None:
    fake, layer, shared = registry("basic")
    web = web_of(fake)

    async def main(mirror: Mirror) -> None:
        await mirror.authorizer.check(PRIVATE, layer, ALICE)
        await trio.sleep(400)
        down(web, fake)
        for digest in (layer, shared):
            for who in (None, ALICE):
                await refused(mirror, PRIVATE, digest, who)

    run(web, main)


def test_a_yes_may_be_made_to_last_while_nobody_can_be_asked() -> None:
    fake, layer, _ = registry("basic")
    web = web_of(fake)

    async def main(mirror: Mirror) -> None:
        mirror.private[layer] = True
        await mirror.authorizer.check(PRIVATE, layer, ALICE)
        down(web, fake)
        await trio.sleep(600)
        assert await mirror.authorizer.check(PRIVATE, layer, ALICE) == Grant(private=True)
        await refused(mirror, PRIVATE, layer, BOB)
        await trio.sleep(3600)
        await refused(mirror, PRIVATE, layer, ALICE)

    run(web, main, settings_of(rights="verify", rights_stale=3600.0))


def test_public_content_is_served_while_its_registry_is_down() -> None:
    """A rollout must not need the registry for what is in the store or the swarm already."""
    fake, _, shared = registry()
    web = web_of(fake)
    down(web, fake)

    async def main(mirror: Mirror) -> None:
        mirror.private[shared] = False
        assert await mirror.authorizer.check(PUBLIC, shared, None) == Grant(private=False)
        del mirror.private[shared]
        assert await mirror.authorizer.check(PUBLIC, shared, None) == Grant(private=False)

    run(web, main)


def test_what_nobody_could_be_asked_about_is_not_read_with_credentials_later() -> None:
    """Else private content would be read with a client's password and treated as public."""
    fake, layer, _ = registry("basic")
    web = web_of(fake)

    async def main(mirror: Mirror) -> None:
        web.refuse |= set(web.handlers)
        assert await mirror.authorizer.check(PRIVATE, layer, ALICE) == Grant(private=False)
        web.refuse.clear()
        await trio.sleep(10)
        with pytest.raises(OriginError):
            await mirror.take(mirror.registries.blob_source(PRIVATE, layer, ALICE))

    run(web, main)
    assert set(fake.sent()) == {""}


# --- what it costs ------------------------------------------------------------------------------------------------


def test_a_thousand_readers_cost_one_question() -> None:
    fake, _, shared = registry("open")

    async def main(mirror: Mirror) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(mirror.authorizer.check, PUBLIC, shared, None)
        for _ in range(100):
            await mirror.authorizer.check(PUBLIC, shared, None)

    run(web_of(fake), main)
    assert probes(fake) == 1


def test_a_no_is_remembered_for_ten_seconds() -> None:
    fake, layer, _ = registry("basic")

    async def main(mirror: Mirror) -> None:
        for _ in range(10):
            await refused(mirror, PRIVATE, layer, BOB)
        before = probes(fake)
        await refused(mirror, PRIVATE, layer, BOB)
        assert probes(fake) == before
        fake.readers["team/private"].add("bob")
        await trio.sleep(11)
        await mirror.authorizer.check(PRIVATE, layer, BOB)

    run(web_of(fake), main)
    assert probes(fake) <= 7


def test_what_was_resolved_needs_no_further_question() -> None:
    fake, _, _ = registry()

    async def main(mirror: Mirror) -> None:
        info = await mirror.registries.head_manifest(PUBLIC, "v1", None)
        before = len(fake.asked)
        await mirror.authorizer.check(PUBLIC, info.digest, None)
        assert len(fake.asked) == before

    run(web_of(fake), main)


def test_a_repository_that_asked_for_credentials_is_not_asked_each_time_whether_it_is_public() -> None:
    fake, layer, shared = registry("basic")

    async def main(mirror: Mirror) -> None:
        await mirror.authorizer.check(PRIVATE, layer, ALICE)
        before = probes(fake)
        await mirror.authorizer.check(PRIVATE, shared, ALICE)
        assert probes(fake) == before + 1
        await refused(mirror, PRIVATE, shared, None)
        assert probes(fake) == before + 1

    run(web_of(fake), main)


def test_a_repository_that_was_opened_is_found_open() -> None:
    fake, layer, shared = registry()

    async def main(mirror: Mirror) -> None:
        await refused(mirror, PRIVATE, layer, None)
        del fake.readers["team/private"]
        await trio.sleep(301)
        assert await mirror.authorizer.check(PRIVATE, layer, None) == Grant(private=False)
        assert await mirror.authorizer.check(PRIVATE, shared, ALICE) == Grant(private=False)

    run(web_of(fake), main)


@pytest.mark.parametrize("manifest", [None, True, False])
def test_a_manifest_and_a_blob_are_asked_about_where_they_are(manifest: bool | None) -> None:
    fake, _, shared = registry()
    digest = digest_of(fake.manifests["team/public", "v1"])

    async def main(mirror: Mirror) -> None:
        for wanted, is_manifest in ((digest, True), (shared, False)):
            if manifest in (None, is_manifest):
                await mirror.authorizer.check(PUBLIC, wanted, None, manifest=manifest)
            else:
                with pytest.raises(NotFoundAtOrigin):
                    await mirror.authorizer.check(PUBLIC, wanted, None, manifest=manifest)

    run(web_of(fake), main)


# --- registries with habits ---------------------------------------------------------------------------------------


def test_a_registry_that_hides_what_it_would_refuse_is_asked_with_credentials() -> None:
    fake, layer, _ = registry("basic")
    serve = fake.serve

    def hide(asked: Asked) -> object:
        found = serve(asked)
        return found if isinstance(found, Reply) and (found.status != 401 or challenged) else Reply(404)

    challenged = False
    fake.serve = hide  # type: ignore[method-assign, assignment]  # with a habit

    async def main(mirror: Mirror) -> None:
        nonlocal challenged
        await refused(mirror, PRIVATE, layer, None, NotFoundAtOrigin)
        challenged = True
        assert await mirror.authorizer.check(PRIVATE, layer, ALICE) == Grant(private=True)

    run(web_of(fake), main)


@pytest.mark.parametrize("status", [403, 405, 501])
def test_a_blob_behind_a_url_signed_for_get_is_readable(status: int) -> None:
    fake, layer, _ = registry("basic")
    path = f"/v2/team/private/blobs/{layer}"

    def redirect(asked: Asked) -> Reply:
        if not fake._may(asked, "team/private"):
            return Reply(401, {"www-authenticate": "Basic realm=x"})
        return Reply(307, {"location": "http://storage.example/x?X-Amz-Signature=s"})

    def storage(asked: Asked) -> Reply:
        return Reply(status) if asked.method == "HEAD" else Reply(206, {"content-range": f"bytes 0-0/{len(LAYER)}"}, LAYER[:1])

    fake.lies[path] = redirect
    web = web_of(fake)
    web.serve("storage.example", storage)

    async def main(mirror: Mirror) -> None:
        assert await mirror.authorizer.check(PRIVATE, layer, ALICE, manifest=False) == Grant(private=True)
        await refused(mirror, PRIVATE, layer, BOB)

    run(web, main)


def test_a_page_to_log_in_is_no_permission() -> None:
    """Some portals send whoever is not logged in to a page, with 200."""
    fake, layer, _ = registry("open")
    fake.lies[f"/v2/team/private/blobs/{layer}"] = lambda asked: Reply(302, {"location": "http://login.example/"})
    web = web_of(fake)
    web.serve("login.example", lambda asked: Reply(200, {"content-type": "text/html; charset=utf-8"}, b"<form>"))

    async def main(mirror: Mirror) -> None:
        await refused(mirror, PRIVATE, layer, None, OriginError)

    run(web, main)


def test_a_registry_that_answers_about_another_digest_says_nothing() -> None:
    fake, layer, shared = registry("open")
    fake.lies[f"/v2/team/private/blobs/{layer}"] = lambda asked: Reply(200, {"docker-content-digest": str(shared)}, LAYER)

    async def main(mirror: Mirror) -> None:
        await refused(mirror, PRIVATE, layer, None, OriginError)

    run(web_of(fake), main)


@pytest.mark.parametrize("status", [200, 206, 302, 400, 418, 429, 500])
def test_any_other_answer_is_no_permission(status: int) -> None:
    fake, layer, _ = registry("basic")
    path = f"/v2/team/private/blobs/{layer}"
    if status != 200:
        fake.lies[path] = lambda asked: Reply(status)
    outcomes: list[object] = []

    async def main(mirror: Mirror) -> None:
        mirror.private[layer] = True
        try:
            outcomes.append(await mirror.authorizer.check(PRIVATE, layer, ALICE))
        except (OriginError, MirrorError) as error:
            outcomes.append(error)

    run(web_of(fake), main, settings_of(rights="verify"))
    assert (outcomes == [Grant(private=True)]) == (status == 200)


def test_malformed_credentials_are_refused_whatever_is_remembered() -> None:
    fake, _, shared = registry("open")

    async def main(mirror: Mirror) -> None:
        await mirror.authorizer.check(PUBLIC, shared, None)
        with pytest.raises(MirrorError) as caught:
            await mirror.authorizer.check(PUBLIC, shared, ClientCredentials("Basic ?"))
        assert caught.value.status == 401

    run(web_of(fake), main)


def test_a_registry_that_is_not_allowed_has_no_rights_to_give() -> None:
    async def main(mirror: Mirror) -> None:
        await refused(mirror, Name("evil.example", "a"), digest_of(LAYER), None, NotPermitted)

    run(Web(), main, settings_of(registries=(REGISTRY,)))


# --- this node's own credentials ----------------------------------------------------------------------------------


def test_whoever_reaches_the_mirror_reads_what_its_own_credentials_open(tmp_path) -> None:
    password = tmp_path / "password"
    password.write_text("secret")
    password.chmod(0o600)
    fake, layer, shared = registry()

    async def main(mirror: Mirror) -> None:
        assert await mirror.authorizer.check(PRIVATE, layer, None) == Grant(private=True)
        assert await mirror.take(mirror.registries.blob_source(PRIVATE, layer, None)) == LAYER
        assert await mirror.authorizer.check(PUBLIC, shared, None) == Grant(private=False)
        await refused(mirror, PRIVATE, layer, BOB)

    run(web_of(fake), main, settings_of(listed(username="alice", password_file=password)))


# --- details ------------------------------------------------------------------------------------------------------


def access(source: Source) -> Access:
    assert isinstance(source.authorization, Access)
    return source.authorization


def test_credentials_are_used_only_where_they_are_needed() -> None:
    fake, layer, shared = registry()

    async def main(mirror: Mirror) -> None:
        await mirror.authorizer.check(PUBLIC, shared, ALICE)
        await mirror.authorizer.check(PRIVATE, layer, ALICE)
        assert access(mirror.registries.blob_source(PUBLIC, shared, ALICE)).asker.is_anonymous
        assert not access(mirror.registries.blob_source(PRIVATE, layer, ALICE)).asker.is_anonymous
        assert access(mirror.registries.blob_source(PRIVATE, shared, ALICE)).asker.is_anonymous
        assert mirror.registries.blob_source(PRIVATE, layer, ALICE) == mirror.registries.blob_source(PRIVATE, layer, ALICE)
        await mirror.authorizer.check(PRIVATE, layer, client("alice", "secret"))
        assert mirror.registries.blob_source(PRIVATE, layer, ALICE) != mirror.registries.blob_source(PRIVATE, layer, BOB)

    run(web_of(fake), main)


def test_rights_are_few_whatever_is_asked() -> None:
    rights = Rights(stale=0)
    for number in range(MAX_REMEMBERED + 100):
        rights.note(PRIVATE, Digest("sha256", f"{number:064x}"), b"", 200, 0.0, 100.0)
    assert len(rights._kept) == MAX_REMEMBERED
    assert rights.known(PRIVATE, Digest("sha256", "0" * 64), b"", 1.0) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda name, digest, tag: (Name(name.registry + "x", name.repository), digest, tag),
        lambda name, digest, tag: (Name(name.registry, name.repository + "x"), digest, tag),
        lambda name, digest, tag: (Name(name.registry + "t", "eam/private"), digest, tag),
        lambda name, digest, tag: (name, digest_of(b"other"), tag),
        lambda name, digest, tag: (name, digest, b""),
        lambda name, digest, tag: (name, digest, tag + b"x"),
    ],
)
def test_a_right_is_for_one_place_digest_and_credential(
    change: Callable[..., tuple[Name, Digest, bytes]],
) -> None:
    rights, digest = Rights(stale=60.0), digest_of(LAYER)
    rights.note(PRIVATE, digest, b"tag", 200, 0.0, 100.0)
    assert rights.known(PRIVATE, digest, b"tag", 99.0) == 200
    assert rights.known(PRIVATE, digest, b"tag", 100.0) is None
    assert rights.was_allowed(PRIVATE, digest, b"tag", 159.0)
    assert not rights.was_allowed(PRIVATE, digest, b"tag", 160.0)
    assert rights.known(*change(PRIVATE, digest, b"tag"), 1.0) is None
    assert not rights.was_allowed(*change(PRIVATE, digest, b"tag"), 1.0)


def test_the_store_says_what_is_private() -> None:
    async def main() -> None:
        store = MemoryStore()
        held = held_in(store)
        digest = digest_of(LAYER)
        assert held(digest) is None
        stored = await store.create(blob_task(digest), Geometry.of(len(LAYER)), private=True)
        assert held(digest) is True
        stored.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_registry_that_is_slow_to_say_is_not_waited_for() -> None:
    async def silent(asked: Asked) -> None:
        await trio.sleep(100)

    fake, layer, _ = registry("open")
    fake.lies[f"/v2/team/private/blobs/{layer}"] = silent

    async def main(mirror: Mirror) -> None:
        mirror.private[layer] = True
        began = trio.current_time()
        await refused(mirror, PRIVATE, layer, None)
        assert trio.current_time() - began == pytest.approx(5.0)

    run(web_of(fake), main)
