"""Clients of a Hugging Face hub below `/hf`: files, ranges and lists; and hubs and clients that do what they should not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import structlog.testing
import trio
import trio.testing

from swarm.config import MirrorSettings
from swarm.download.request import FetchRequest
from swarm.edges import Source
from swarm.egress import Reach
from swarm.mirror import hub as hub_module
from swarm.mirror import hub_files
from swarm.mirror.listed import Listed, egress_rule
from swarm.task import Digest, url_task
from tests.mirror.fake_hub import HubReply, git_id, sha256
from tests.mirror.hub_desk import HUB, HubDesk, play, runs
from tests.origin.web import Asked

REPOSITORY = "team/model"
BIG = bytes(range(256)) * 3000  # three pieces
CONFIG = b'{"layers": 2}\n'
FILES = {"config.json": CONFIG, "model.safetensors": BIG, "sub/dir/notes é.txt": b"notes"}


def pushed(desk: HubDesk, **more: object) -> str:
    return desk.hub.push(REPOSITORY, FILES, **more)  # type: ignore[arg-type]  # as `FakeHub.push`


# --- files ------------------------------------------------------------------------------------------------------------


@runs()
async def test_a_large_file_is_answered_as_the_hub_would_without_a_way_to_other_storage(desk: HubDesk) -> None:
    commit = pushed(desk)
    head = await desk.head(f"/{REPOSITORY}/resolve/main/model.safetensors")
    assert head.status == 200
    assert head.headers["etag"] == f'"{sha256(BIG)}"'
    assert head.headers["x-repo-commit"] == commit
    assert head.headers["content-length"] == str(len(BIG))
    assert not {"x-xet-hash", "link", "location", "x-linked-etag"} & head.headers.keys()
    got = await desk.get(f"/{REPOSITORY}/resolve/{commit}/model.safetensors")
    assert (got.status, got.body) == (200, BIG)
    assert got.headers["etag"] == head.headers["etag"]
    assert desk.hub.sent[sha256(BIG)] == len(BIG)
    assert desk.service.is_here(Digest("sha256", sha256(BIG)))


@runs()
async def test_a_small_file_of_git_comes_once_and_has_its_id(desk: HubDesk) -> None:
    commit = pushed(desk)
    for revision in ("main", commit, "main"):
        got = await desk.get(f"/{REPOSITORY}/resolve/{revision}/config.json")
        assert (got.status, got.body) == (200, CONFIG)
        assert got.headers["etag"] == f'"{git_id(CONFIG)}"'
        assert got.headers["x-repo-commit"] == commit
    assert desk.hub.sent["config.json"] == len(CONFIG)
    got = await desk.get(f"/{REPOSITORY}/resolve/main/sub/dir/notes%20%C3%A9.txt")
    assert got.body == b"notes"


@runs()
async def test_a_small_file_that_did_not_change_is_not_read_again_at_the_next_commit(desk: HubDesk) -> None:
    pushed(desk)
    await desk.get(f"/{REPOSITORY}/resolve/main/config.json")
    commit = desk.hub.push(REPOSITORY, {**FILES, "new.txt": b"new"})
    got = await desk.get(f"/{REPOSITORY}/resolve/{commit}/config.json")
    assert got.body == CONFIG
    assert desk.hub.sent["config.json"] == len(CONFIG)


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("bytes=2-9", 2, 10), ("bytes=5-", 5, None), ("bytes=-4", -4, None), ("bytes=3-999999999", 3, None)],
)
def test_ranges_are_answered_in_every_form(path: str, asked: str, start: int, stop: int | None) -> None:
    async def script(desk: HubDesk) -> None:
        pushed(desk)
        for _ in range(2):  # while it arrives, and from the store
            got = await desk.get(f"/{REPOSITORY}/resolve/main/{path}", range=asked)
            assert (got.status, got.body) == (206, FILES[path][start:stop])
            assert got.headers["content-range"].endswith(f"/{len(FILES[path])}")

    play(script)


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_range_behind_the_end_is_416(path: str) -> None:
    async def script(desk: HubDesk) -> None:
        pushed(desk)
        got = await desk.get(f"/{REPOSITORY}/resolve/main/{path}", range="bytes=9999999-")
        assert got.status == 416
        assert got.headers["content-range"] == f"bytes */{len(FILES[path])}"
        assert got.headers["x-error-message"]

    play(script)


@runs()
async def test_a_file_with_a_known_etag_is_not_sent_again(desk: HubDesk) -> None:
    pushed(desk)
    got = await desk.get(f"/{REPOSITORY}/resolve/main/model.safetensors", if_none_match=f'"{sha256(BIG)}"')
    assert (got.status, got.body) == (304, b"")
    assert not desk.hub.bodies()


@runs()
async def test_datasets_legacy_names_branches_with_slashes_and_renamed_repositories_are_found(desk: HubDesk) -> None:
    desk.hub.push("datasets/team/data", {"a.parquet": b"rows"}, "refs/pr/1")
    desk.hub.push("gpt2", {"config.json": b"old"})
    desk.hub.push("team/resolve", {"resolve/config.json": b"odd"})
    desk.hub.names["team/before"] = "team/resolve"
    assert (await desk.get("/datasets/team/data/resolve/refs%2Fpr%2F1/a.parquet")).body == b"rows"
    assert (await desk.get("/gpt2/resolve/main/config.json")).body == b"old"
    assert (await desk.get("/team/resolve/resolve/main/resolve/config.json")).body == b"odd"
    assert (await desk.get("/team/before/resolve/main/resolve/config.json")).body == b"odd"


@runs()
async def test_an_empty_file_is_a_file(desk: HubDesk) -> None:
    desk.hub.push(REPOSITORY, {"__init__.py": b"", "empty.bin": b""})
    for path in ("__init__.py", "empty.bin"):
        got = await desk.get(f"/{REPOSITORY}/resolve/main/{path}")
        assert (got.status, got.body, got.headers["content-length"]) == (200, b"", "0")


@runs()
async def test_a_file_that_clients_would_not_read_by_plain_http_is_told_without_its_size(desk: HubDesk) -> None:
    pushed(desk)
    desk.hub.says["model.safetensors"] = {"x-linked-size": "50000000001"}
    head = await desk.head(f"/{REPOSITORY}/resolve/main/model.safetensors")
    assert head.status == 200
    assert "content-length" not in head.headers


# --- how often the hub is asked ---------------------------------------------------------------------------------------


@runs(tag_cache=10.0)
async def test_many_clients_at_once_ask_the_hub_once(desk: HubDesk) -> None:
    pushed(desk)
    got: list[bytes] = []

    async def one() -> None:
        got.append((await desk.get(f"/{REPOSITORY}/resolve/main/model.safetensors")).body)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one)
    assert got == [BIG] * 20
    assert desk.hub.count("HEAD") == 1
    assert desk.hub.bodies() == len(BIG)


@runs(tag_cache=10.0)
async def test_a_branch_is_asked_again_when_its_time_is_over(desk: HubDesk) -> None:
    pushed(desk)
    await desk.get(f"/{REPOSITORY}/resolve/main/config.json")
    desk.hub.push(REPOSITORY, {"config.json": b"newer"})
    assert (await desk.get(f"/{REPOSITORY}/resolve/main/config.json")).body == CONFIG
    desk.wall += 11
    assert (await desk.get(f"/{REPOSITORY}/resolve/main/config.json")).body == b"newer"


@runs(tag_cache=10.0, tag_stale=100.0)
async def test_while_the_hub_is_down_what_was_looked_at_is_still_served(desk: HubDesk) -> None:
    commit = pushed(desk)
    for path in FILES:
        await desk.get(f"/{REPOSITORY}/resolve/main/{path.replace(' ', '%20').replace('é', '%C3%A9')}")
    await desk.get(f"/api/models/{REPOSITORY}/tree/{commit}?recursive=true")
    desk.is_down = True
    desk.wall += 50
    for revision in ("main", commit):
        assert (await desk.get(f"/{REPOSITORY}/resolve/{revision}/config.json")).body == CONFIG
        assert (await desk.get(f"/{REPOSITORY}/resolve/{revision}/model.safetensors")).body == BIG
    assert (await desk.get(f"/api/models/{REPOSITORY}/tree/{commit}?recursive=true")).status == 200
    assert desk.tally.stale[HUB]
    desk.wall += 100
    assert (await desk.get(f"/{REPOSITORY}/resolve/main/config.json")).status == 502
    assert (await desk.get(f"/{REPOSITORY}/resolve/{commit}/config.json")).body == CONFIG


def test_what_was_looked_at_is_remembered_over_a_restart(tmp_path: Path) -> None:
    commit = ""

    async def before(desk: HubDesk) -> None:
        nonlocal commit
        commit = pushed(desk)
        await desk.get(f"/api/models/{REPOSITORY}/tree/main?recursive=true")
        await desk.head(f"/{REPOSITORY}/resolve/main/config.json")

    async def after(desk: HubDesk) -> None:
        desk.is_down = True
        head = await desk.head(f"/{REPOSITORY}/resolve/main/config.json")
        assert (head.status, head.headers["x-repo-commit"]) == (200, commit)
        # Nobody asked for this one; the list told of it.
        assert (await desk.head(f"/{REPOSITORY}/resolve/{commit}/model.safetensors")).status == 200
        assert (await desk.get(f"/api/models/{REPOSITORY}/tree/main?recursive=true")).status == 200

    play(before, state=tmp_path / "hub")
    play(after, state=tmp_path / "hub")


def test_what_a_token_opened_is_not_told_to_others_after_a_restart_while_the_hub_is_down(tmp_path: Path) -> None:
    commit = ""

    async def before(desk: HubDesk) -> None:
        nonlocal commit
        commit = pushed(desk, readers={"alice"})
        await desk.get(f"/api/models/{REPOSITORY}/tree/main?recursive=true", "alice")
        assert (await desk.get(f"/{REPOSITORY}/resolve/main/model.safetensors", "alice")).body == BIG
        assert (await desk.get(f"/{REPOSITORY}/resolve/main/config.json", "alice")).body == CONFIG

    async def after(desk: HubDesk) -> None:
        desk.is_down = True
        for path in (f"/{REPOSITORY}/resolve/{commit}/model.safetensors", f"/{REPOSITORY}/resolve/main/config.json"):
            for token in ("", "mallory"):
                reply = await desk.head(path, token)
                assert reply.status in (502, 503)
                assert "etag" not in reply.headers
        assert (await desk.get(f"/api/models/{REPOSITORY}/tree/main?recursive=true")).status == 502

    play(before, state=tmp_path / "hub")
    play(after, state=tmp_path / "hub")


# --- API --------------------------------------------------------------------------------------------------------------


@runs()
async def test_lists_are_passed_on_without_xet_hashes(desk: HubDesk) -> None:
    commit = pushed(desk)
    got = await desk.get(f"/api/models/{REPOSITORY}/tree/main?recursive=true&expand=false")
    entries = {it["path"]: it for it in json.loads(got.body)}
    assert entries["model.safetensors"]["lfs"]["oid"] == sha256(BIG)
    assert got.headers["x-repo-commit"] == commit
    assert b"xetHash" not in got.body
    found = await desk.post(f"/api/models/{REPOSITORY}/paths-info/main", b"paths=model.safetensors&expand=False")
    assert [it["path"] for it in json.loads(found.body)] == ["model.safetensors"]
    assert b"xetHash" not in found.body


@runs()
async def test_pages_of_a_list_lead_back_to_the_mirror(desk: HubDesk) -> None:
    pushed(desk)
    desk.hub.page = 2
    first = await desk.get(f"/api/models/{REPOSITORY}/tree/main?recursive=true")
    link = first.headers["link"]
    assert link.startswith(f"<http://localhost/hf/api/models/{REPOSITORY}/tree/main?")
    seen = json.loads(first.body)
    while link:
        page = await desk.get(link.partition(">")[0].removeprefix("<http://localhost/hf"))
        seen += json.loads(page.body)
        link = page.headers.get("link", "")
    assert {it["path"] for it in seen if it["type"] == "file"} == set(FILES)


@pytest.mark.parametrize(
    "link", ["http://evil.example/api/models/team/model/tree/main?cursor=2", "http://hub.example/other?cursor=2"]
)
def test_a_list_whose_next_page_is_elsewhere_is_no_list(link: str) -> None:
    async def script(desk: HubDesk) -> None:
        pushed(desk)
        path = f"/api/models/{REPOSITORY}/tree/main"
        desk.instead[path] = HubReply(200, {"link": f'<{link}>; rel="next"'}, b"[]")
        reply = await desk.get(path)
        assert reply.status == 502
        assert "link" not in reply.headers

    play(script)


@runs(tag_cache=10.0)
async def test_answers_of_the_api_are_shared_and_short_lived(desk: HubDesk) -> None:
    commit = pushed(desk)
    path = f"/api/models/{REPOSITORY}/revision/main"
    for _ in range(3):
        assert json.loads((await desk.get(path)).body)["sha"] == commit
    assert desk.hub.count(f"GET {path}") == 1
    desk.wall += 11
    newer = desk.hub.push(REPOSITORY, {"a": b"b"})
    assert json.loads((await desk.get(path)).body)["sha"] == newer


@runs()
async def test_who_somebody_is_is_asked_with_his_own_token_each_time(desk: HubDesk) -> None:
    assert json.loads((await desk.get("/api/whoami-v2", "alice")).body)["name"] == "alice"
    assert json.loads((await desk.get("/api/whoami-v2", "bob")).body)["name"] == "bob"
    assert (await desk.get("/api/whoami-v2")).status == 401


# --- what is refused --------------------------------------------------------------------------------------------------


@runs()
async def test_clients_learn_from_the_hubs_own_words_what_is_wrong(desk: HubDesk) -> None:
    commit = pushed(desk)
    desk.hub.push("team/gated", FILES, readers={"alice"}, gated=True)
    for path, token, status, code in (
        (f"/{REPOSITORY}/resolve/main/nothing.txt", "", 404, "EntryNotFound"),
        (f"/{REPOSITORY}/resolve/other/config.json", "", 404, "RevisionNotFound"),
        ("/team/nothing/resolve/main/config.json", "", 401, "RepoNotFound"),
        ("/team/gated/resolve/main/config.json", "", 401, "GatedRepo"),
        ("/team/gated/resolve/main/config.json", "mallory", 403, "GatedRepo"),
        (f"/api/models/{REPOSITORY}/tree/other", "", 404, "RevisionNotFound"),
        ("/api/models/team/nothing", "", 401, "RepoNotFound"),
    ):
        reply = await desk.get(path, token)
        assert (reply.status, reply.headers["x-error-code"]) == (status, code), path
        assert reply.headers["x-error-message"]
        assert json.loads(reply.body)["error"]
    missing = await desk.head(f"/{REPOSITORY}/resolve/main/nothing.txt")
    assert missing.headers["x-repo-commit"] == commit


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", f"/api/models/{REPOSITORY}/settings"),
        ("DELETE", "/api/repos/delete"),
        ("POST", "/api/repos/create"),
        ("POST", f"/api/models/{REPOSITORY}/commit/main"),
        ("POST", f"/{REPOSITORY}/resolve/main/config.json"),
        ("POST", f"/api/models/{REPOSITORY}/tree/main"),
    ],
)
def test_nothing_that_writes_is_passed_on(method: str, path: str) -> None:
    async def script(desk: HubDesk) -> None:
        reply = await desk.get(path, "alice", method)
        assert reply.status in (404, 405)
        assert not desk.hub.asked

    play(script)


@pytest.mark.parametrize(
    "path",
    [
        f"/api/models/{REPOSITORY}/xet-read-token/main",
        f"/api/models/{REPOSITORY}/xet-write-token/main",
        "/api/xet-read-token/x",
        "/api/settings/webhooks",
        f"/{REPOSITORY}/raw/main/config.json",
        f"/{REPOSITORY}/resolve/main",
        "/resolve/main/config.json",
        "/api",
        "/",
    ],
)
def test_other_routes_do_not_reach_the_hub(path: str) -> None:
    async def script(desk: HubDesk) -> None:
        assert (await desk.get(path, "alice")).status == 404
        assert not desk.hub.asked

    play(script)


@pytest.mark.parametrize(
    "path",
    [
        f"/{REPOSITORY}/resolve/main/../../../secret",
        f"/{REPOSITORY}/resolve/main/a/%2e%2e/b",
        f"/{REPOSITORY}/resolve/main/a%2f..%2fb",
        f"/{REPOSITORY}/resolve/main/a%2Fb",
        f"/{REPOSITORY}/resolve/main/%252e%252e/b",
        f"/{REPOSITORY}/resolve/main/%252e%252e%252fb",
        f"/{REPOSITORY}/resolve/..%2f..%2fapi/b",
        f"/{REPOSITORY}/resolve/refs%2f..%2fmain/b",
        f"/{REPOSITORY}/resolve/main/a%00b",
        f"/{REPOSITORY}/resolve/main/a%0d%0ab",
        f"/{REPOSITORY}/resolve/main/a%5cb",
        f"/{REPOSITORY}/resolve/main/a%ff",
        f"/{REPOSITORY}/resolve/main//a",
        f"/{REPOSITORY}/resolve//a",
        f"/{REPOSITORY}/resolve/main/",
        "/../team/resolve/main/a",
        "/te%2fam/model/resolve/main/a",
        "/team/mo%20del/resolve/main/a",
        f"/{REPOSITORY}/resolve/{'r' * 300}/a",
        f"/{REPOSITORY}/resolve/main/{'p' * 2000}",
        f"/{'n' * 120}/model/resolve/main/a",
        f"/api/models/{REPOSITORY}/tree/main/a%2f..%2fb",
        "/api/models/../tree/main",
    ],
)
def test_t18_a_path_that_climbs_or_hides_something_is_refused(path: str) -> None:
    async def script(desk: HubDesk) -> None:
        reply = await desk.get(path)
        assert reply.status == 400
        assert reply.headers["x-error-message"]
        assert not desk.hub.asked

    play(script)


@runs()
async def test_t17_the_hub_face_is_no_proxy_and_for_no_web_page(desk: HubDesk) -> None:
    pushed(desk)
    path = f"/hf/{REPOSITORY}/resolve/main/config.json"
    for line, more in (
        (f"GET http://hub.example{path} HTTP/1.1", "Host: localhost"),
        (f"GET {path} HTTP/1.1", "Host: evil.example"),
        (f"GET {path} HTTP/1.1", "Host: localhost\r\nOrigin: http://evil.example"),
        ("CONNECT hub.example:443 HTTP/1.1", "Host: localhost"),
    ):
        client = await desk.connect()
        async with client.stream:
            got = await client.raw(f"{line}\r\n{more}\r\nConnection: close\r\n\r\n".encode())
        assert got[9:12] in (b"400", b"403", b"405"), line
    assert not desk.hub.asked


@runs()
async def test_only_the_one_route_takes_a_body_and_no_large_one(desk: HubDesk) -> None:
    pushed(desk)
    route = f"/api/models/{REPOSITORY}/paths-info/main"
    for path, body, kind, status in (
        (route, b"x" * 300_000, "application/x-www-form-urlencoded", 413),
        (route, b"{}", "application/json", 415),
        ("/api/repos/create", b"{}", "application/x-www-form-urlencoded", 405),
    ):
        client = await desk.connect()
        head = f"POST /hf{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        async with client.stream:
            got = await client.raw(head.encode())
        assert got[9:12] == str(status).encode()
    assert not desk.hub.asked


# --- rights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_t19_what_one_token_opened_is_refused_to_others(path: str) -> None:
    async def script(desk: HubDesk) -> None:
        commit = pushed(desk, readers={"alice"})
        where = f"/{REPOSITORY}/resolve/{commit}/{path}"
        assert (await desk.get(where, "alice")).body == FILES[path]
        sent = desk.hub.bodies()
        for token in ("", "mallory"):
            reply = await desk.get(where, token)
            assert reply.status in (401, 404)
            assert FILES[path] not in reply.body
            assert "etag" not in reply.headers
        assert (await desk.get(where, "alice")).body == FILES[path]
        assert desk.hub.bodies() == sent
        assert all(entry.private for entry in desk.store.entries())

    play(script)


@runs(rights_cache=0.05)
async def test_t20_a_token_that_was_taken_back_opens_nothing_more(desk: HubDesk) -> None:
    commit = pushed(desk, readers={"alice"})
    where = f"/{REPOSITORY}/resolve/{commit}/config.json"
    assert (await desk.get(where, "alice")).status == 200
    desk.hub.repositories[REPOSITORY].readers = {"bob"}
    await trio.sleep(0.06)
    reply = await desk.get(where, "alice")
    assert (reply.status, reply.headers["x-error-code"]) == (404, "RepoNotFound")


@runs()
async def test_t21_the_same_file_is_had_through_the_repository_that_shows_it(desk: HubDesk) -> None:
    pushed(desk, readers={"alice"})
    desk.hub.push("team/open", {"copy.bin": BIG})
    assert (await desk.get(f"/{REPOSITORY}/resolve/main/model.safetensors", "alice")).body == BIG
    assert (await desk.get("/team/open/resolve/main/copy.bin")).body == BIG
    assert (await desk.get(f"/{REPOSITORY}/resolve/main/model.safetensors")).status == 401
    assert desk.hub.bodies() == len(BIG)


def test_what_needed_a_token_stays_on_this_node_in_an_open_network() -> None:
    async def script(desk: HubDesk) -> None:
        pushed(desk, readers={"alice"})
        for path in ("model.safetensors", "config.json"):
            assert (await desk.get(f"/{REPOSITORY}/resolve/main/{path}", "alice")).body == FILES[path]
        assert not desk.discovery.log

    play(script, is_open=True)


@runs()
async def test_what_a_token_showed_is_told_to_nobody_else_while_the_hub_is_down(desk: HubDesk) -> None:
    commit = pushed(desk, readers={"alice"})
    where = f"/{REPOSITORY}/resolve/{commit}/model.safetensors"
    assert (await desk.head(where, "alice")).status == 200
    desk.is_down = True
    desk.forget_rights()
    for token in ("", "mallory"):
        reply = await desk.head(where, token)
        assert reply.status == 503
        assert "etag" not in reply.headers


@runs(rights_cache=0.0)
async def test_a_repository_that_is_public_no_more_is_told_to_nobody_while_the_hub_is_down(desk: HubDesk) -> None:
    commit = pushed(desk)
    where = f"/{REPOSITORY}/resolve/{commit}/model.safetensors"
    assert (await desk.head(where)).status == 200
    desk.hub.repositories[REPOSITORY].readers = {"alice"}
    assert (await desk.head(f"/{REPOSITORY}/resolve/{commit}/config.json", "alice")).status == 200
    desk.is_down = True
    desk.forget_rights()
    assert (await desk.head(where)).status in (502, 503)


@runs()
async def test_a_token_goes_to_the_hub_only_and_only_where_one_is_needed(desk: HubDesk) -> None:
    pushed(desk)
    desk.hub.push("team/closed", FILES, readers={"alice"})
    assert (await desk.get(f"/{REPOSITORY}/resolve/main/model.safetensors", "alice")).body == BIG
    assert {it.token for it in desk.hub.asked} == {""}
    assert (await desk.get("/team/closed/resolve/main/config.json", "alice")).body == CONFIG
    assert (await desk.get("/team/closed/resolve/main/model.safetensors", "alice")).body == BIG
    assert {it.token for it in desk.hub.asked} == {"", "alice"}
    assert not any("authorization" in it.headers for it in desk.hub.stored)


@runs()
async def test_where_strangers_ask_too_much_a_client_is_served_with_its_own_token(desk: HubDesk) -> None:
    pushed(desk)
    desk.hub.limits_strangers = True
    for path in ("config.json", "model.safetensors"):
        assert (await desk.get(f"/{REPOSITORY}/resolve/main/{path}", "alice")).body == FILES[path]
        reply = await desk.get(f"/{REPOSITORY}/resolve/main/{path}")
        assert reply.status in (502, 503)
    assert (await desk.get(f"/api/models/{REPOSITORY}/tree/main", "alice")).status == 200
    assert all(entry.private for entry in desk.store.entries()), "that everybody may have it was not said"


@runs(rights="verify")
async def test_verify_asks_for_every_client_also_what_is_public(desk: HubDesk) -> None:
    pushed(desk)
    assert (await desk.get(f"/{REPOSITORY}/resolve/main/config.json", "alice")).body == CONFIG
    assert (await desk.get(f"/{REPOSITORY}/resolve/main/config.json", "bob")).body == CONFIG
    assert {it.token for it in desk.hub.asked if it.method == "HEAD"} == {"alice", "bob"}
    desk.is_down = True
    assert (await desk.get(f"/{REPOSITORY}/resolve/main/config.json", "carol")).status in (502, 503)


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_list_that_everybody_sees_opens_no_file_that_needed_a_token(path: str) -> None:
    """A gated repository shows its list to everybody.  With the hub down and rights forgotten, the mark of the file counts."""

    async def script(desk: HubDesk) -> None:
        commit = desk.hub.push("team/gated", FILES, readers={"alice"}, gated=True)
        where = f"/team/gated/resolve/{commit}/{path}"
        assert (await desk.get(where, "alice")).body == FILES[path]
        assert (await desk.get(where)).status == 401
        assert all(entry.private for entry in desk.store.entries())
        assert (await desk.get("/api/models/team/gated/tree/main?recursive=true")).status == 200
        desk.is_down = True
        desk.forget_rights()
        for token in ("", "mallory"):
            reply = await desk.get(where, token)
            assert reply.status in (502, 503)
            assert FILES[path] not in reply.body

    play(script)


# --- hubs that fail or lie --------------------------------------------------------------------------------------------


@runs()
async def test_a_hub_that_is_down_is_said_so_soon_and_not_waited_for_again(desk: HubDesk) -> None:
    pushed(desk)
    desk.is_down = True
    for path in (f"/{REPOSITORY}/resolve/main/config.json", f"/api/models/{REPOSITORY}"):
        reply = await desk.get(path)
        assert reply.status == 502
        assert HUB in reply.headers["x-error-message"]


@runs(registry_timeout=0.2)
async def test_a_hub_that_says_nothing_is_not_waited_for(desk: HubDesk) -> None:
    waited: list[str] = []

    async def silence(asked: Asked) -> None:
        waited.append(asked.method)
        await trio.sleep_forever()

    path = f"/{REPOSITORY}/resolve/main/config.json"
    desk.instead[path] = silence
    for _ in range(3):
        assert (await desk.get(path)).status == 502
    assert waited == ["HEAD"]


@runs()
async def test_storage_that_sends_another_large_file_is_found_out(desk: HubDesk) -> None:
    pushed(desk)
    desk.hub.lies["model.safetensors"] = BIG[:-1] + b"!"
    reply = await desk.get(f"/{REPOSITORY}/resolve/main/model.safetensors")
    assert reply.status == 502 or (reply.cut and len(reply.body) < len(BIG))
    assert not desk.service.is_here(Digest("sha256", sha256(BIG)))


@runs()
async def test_a_hub_that_sends_another_small_file_is_found_out(desk: HubDesk) -> None:
    commit = pushed(desk)
    desk.hub.lies["config.json"] = b'{"layers": 3}\n'
    for _ in range(2):
        reply = await desk.get(f"/{REPOSITORY}/resolve/{commit}/config.json")
        assert reply.status == 502
        assert b"layers" not in reply.body
    del desk.hub.lies["config.json"]
    assert (await desk.get(f"/{REPOSITORY}/resolve/{commit}/config.json")).body == CONFIG


@runs()
async def test_a_small_file_that_the_swarm_has_wrong_is_read_at_the_hub(desk: HubDesk) -> None:
    """Members vouch for what has no digest; here one vouched for something else, which lies in the store already."""
    commit = pushed(desk)
    desk.hub.lies["config.json"] = b'{"layers": 9}\n'
    where = f"http://{HUB}/{REPOSITORY}/resolve/{commit}/config.json"
    request = FetchRequest(Source(where, requester="mirror"), immutable=True, length=len(CONFIG))
    _, stored = await desk.service.fetch(request)
    stored.close()
    del desk.hub.lies["config.json"]
    reply = await desk.get(f"/{REPOSITORY}/resolve/{commit}/config.json")
    assert (reply.status, reply.body) == (200, CONFIG)
    assert (await desk.get(f"/{REPOSITORY}/resolve/{commit}/config.json")).body == CONFIG
    kept = desk.store.open(url_task(where).id)
    assert kept is None or kept.read(0, len(CONFIG)) == CONFIG
    if kept is not None:
        kept.close()


@pytest.mark.parametrize(
    ("by_branch", "says"),
    [
        (True, {"x-repo-commit": ""}),
        (True, {"x-repo-commit": "../../etc"}),
        (True, {"x-linked-etag": '"a b\x7f"', "etag": ""}),
        (True, {"x-linked-size": "99999999999999999"}),
        (True, {"x-linked-size": "-1"}),
        (False, {"x-repo-commit": "0" * 40}),
    ],
)
def test_a_hub_that_says_what_no_hub_says_is_not_believed(by_branch: bool, says: dict[str, str]) -> None:
    async def script(desk: HubDesk) -> None:
        commit = pushed(desk)
        desk.hub.says["model.safetensors"] = says
        reply = await desk.head(f"/{REPOSITORY}/resolve/{'main' if by_branch else commit}/model.safetensors")
        assert reply.status == 502
        assert "etag" not in reply.headers

    play(script)


@runs()
async def test_a_wrong_length_of_the_hub_brings_no_wrong_file(desk: HubDesk) -> None:
    pushed(desk)
    desk.hub.says["model.safetensors"] = {"x-linked-size": str(len(BIG) - 10)}
    reply = await desk.get(f"/{REPOSITORY}/resolve/main/model.safetensors")
    assert reply.status == 502 or (reply.cut and len(reply.body) < len(BIG) - 10)


@runs()
async def test_an_answer_of_the_api_that_never_ends_is_cut_off(desk: HubDesk) -> None:
    pushed(desk)
    path = f"/api/models/{REPOSITORY}"
    desk.instead[path] = HubReply(200, {}, b" " * (hub_module.MAX_ANSWER_BYTES + 1))
    assert (await desk.get(path)).status == 502


@pytest.mark.parametrize("body", [b"", b"nonsense", b'{"a": 1}', b"[1]", b"[" * 100_000])
def test_a_list_that_is_none_is_not_passed_on(body: bytes) -> None:
    async def script(desk: HubDesk) -> None:
        pushed(desk)
        path = f"/api/models/{REPOSITORY}/tree/main"
        desk.instead[path] = HubReply(200, {}, body)
        assert (await desk.get(path)).status == 502

    play(script)


@runs()
async def test_a_hub_that_redirects_in_circles_is_left(desk: HubDesk) -> None:
    path = f"/{REPOSITORY}/resolve/main/config.json"
    desk.instead[path] = HubReply(302, {"location": f"{path}?again"})
    assert (await desk.head(path)).status == 502


@runs()
async def test_a_redirect_to_a_private_address_is_not_followed(desk: HubDesk) -> None:
    commit = pushed(desk)
    assert (await desk.head(f"/{REPOSITORY}/resolve/{commit}/model.safetensors")).status == 200
    location = {"location": "http://127.0.0.1:1/secret"}
    desk.hub.says["model.safetensors"] = location
    reply = await desk.get(f"/{REPOSITORY}/resolve/{commit}/model.safetensors")
    assert reply.status in (403, 502)
    assert not any(it.host.startswith("127.") for it in desk.web.dialled)


@runs()
async def test_an_error_of_the_hub_cannot_break_into_our_headers(desk: HubDesk) -> None:
    path = f"/{REPOSITORY}/resolve/main/config.json"
    desk.instead[path] = HubReply(404, {"x-error-code": "Entry Not;Found", "x-error-message": "caf\xe9 \x7f" + "m" * 2000})
    reply = await desk.get(path)
    assert reply.status == 404
    assert "x-error-code" not in reply.headers
    assert len(reply.headers["x-error-message"]) <= hub_module.MAX_WORDS_CHARS


@runs(seconds=10, answer_timeout=60.0)
async def test_a_client_that_goes_away_stops_what_nobody_else_needs(desk: HubDesk) -> None:
    commit = pushed(desk)
    path = f"/{REPOSITORY}/resolve/{commit}/model.safetensors"
    assert (await desk.head(path)).status == 200
    begun = trio.Event()

    async def never(asked: Asked) -> None:
        begun.set()
        await trio.sleep_forever()

    desk.instead[path] = never
    client = await desk.connect()
    async with client.stream:
        await client.ask(f"/hf{path}")
        await begun.wait()
    while desk.service.activity():  # noqa: ASYNC110 - the service has no event for it
        await trio.sleep(0.05)


def test_a_small_file_that_the_swarm_does_not_bring_is_read_by_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_files, "SWARM_SECONDS", 0.0)

    async def script(desk: HubDesk) -> None:
        pushed(desk)
        assert (await desk.get(f"/{REPOSITORY}/resolve/main/config.json")).body == CONFIG
        got = await desk.get(f"/{REPOSITORY}/resolve/main/config.json", range="bytes=2-3")
        assert (got.status, got.body) == (206, CONFIG[2:4])

    play(script)


@runs(rights_cache=0.0)
async def test_a_commit_whose_file_became_another_is_not_believed(desk: HubDesk) -> None:
    commit = pushed(desk)
    where = f"/{REPOSITORY}/resolve/{commit}/model.safetensors"
    assert (await desk.head(where)).status == 200
    desk.hub.says["model.safetensors"] = {"x-linked-etag": f'"{"0" * 64}"'}
    reply = await desk.head(where)
    assert reply.status == 502
    assert "another file" in reply.headers["x-error-message"]


def test_t23_a_token_is_in_no_log_no_answer_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hf_SecretSecretSecret"
    answers: list[str] = []

    async def script(desk: HubDesk) -> None:
        pushed(desk, readers={secret})
        for path in ("resolve/main/config.json", "resolve/main/model.safetensors", "resolve/main/no", "resolve/no/config.json"):
            answers.append(str(await desk.get(f"/{REPOSITORY}/{path}", secret)))
        answers.append(str(await desk.get(f"/api/models/{REPOSITORY}/tree/main", secret)))
        desk.is_down = True
        answers.append(str(await desk.get(f"/{REPOSITORY}/resolve/v2/config.json", secret)))

    play(script, state=tmp_path / "hub")
    said = capsys.readouterr()
    assert "pulled" in said.out
    assert secret not in said.out + said.err + "".join(answers)
    assert secret.encode() not in (tmp_path / "hub").read_bytes()


@runs()
async def test_without_a_hub_there_is_no_such_route(desk: HubDesk) -> None:
    pushed(desk)
    desk.routes._hub = None
    reply = await desk.get(f"/{REPOSITORY}/resolve/main/config.json")
    assert reply.status == 404
    assert not desk.hub.asked


def test_a_private_address_is_reached_where_the_hub_was_named_and_not_where_it_sends_to() -> None:
    named = egress_rule(MirrorSettings(huggingface="http://10.0.0.5:8080"))
    assert named("10.0.0.5", 8080, False) is Reach.LOCAL
    assert named("10.0.0.5", 8081, True) is Reach.PUBLIC
    assert egress_rule(MirrorSettings())("huggingface.co", 443, False) is Reach.PUBLIC
    assert not Listed.read(MirrorSettings(huggingface="https://hub.lan")).is_allowed("hub.lan")


@runs(registry_timeout=5.0, answer_timeout=10.0)
async def test_clients_cannot_make_it_read_any_number_of_answers_at_once(desk: HubDesk) -> None:
    full, held = trio.Event(), trio.Event()
    now: list[int] = [0, 0]

    async def slowly(asked: Asked) -> None:
        now[0] += 1
        now[1] = max(now)
        if now[0] == hub_files.API_AT_ONCE:
            full.set()
        await held.wait()
        now[0] -= 1

    names = [f"/api/models/team/m{number}" for number in range(2 * hub_files.API_AT_ONCE)]
    desk.instead |= dict.fromkeys(names, slowly)
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(desk.get, name)
        await full.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        held.set()
    assert now[1] == hub_files.API_AT_ONCE


@pytest.mark.parametrize(
    "tag", [hashlib.sha1(CONFIG, usedforsecurity=False).hexdigest(), "5d41402abc4b2a76b9719d911017c592", "v1.2-x"]
)
def test_hubs_that_have_other_etags_for_small_files_are_read_too(tag: str) -> None:
    async def script(desk: HubDesk) -> None:
        pushed(desk)
        desk.hub.says["config.json"] = {"etag": f'W/"{tag}"'}
        for _ in range(2):
            got = await desk.get(f"/{REPOSITORY}/resolve/main/config.json")
            assert (got.status, got.body, got.headers["etag"]) == (200, CONFIG, f'"{tag}"')
        assert desk.hub.sent["config.json"] == len(CONFIG)

    play(script)


@runs()
async def test_files_are_counted_for_their_hub_and_clients_make_no_rows(desk: HubDesk) -> None:
    pushed(desk)
    for _ in range(2):
        await desk.get(f"/{REPOSITORY}/resolve/main/model.safetensors")
    for number in range(5):
        await desk.head(f"/some/body{number}/resolve/main/x")
    assert (desk.tally.sent[HUB, "origin"], desk.tally.sent[HUB, "store"]) == (len(BIG), len(BIG))
    assert desk.tally.answers[HUB, "file", 200] == 2
    assert {key[0] for key in desk.tally.answers} <= {HUB, "others"}


def test_a_line_is_written_for_each_whole_file_with_where_it_came_from() -> None:
    async def script(desk: HubDesk) -> None:
        pushed(desk)
        await desk.get(f"/{REPOSITORY}/resolve/main/model.safetensors")
        await desk.get(f"/{REPOSITORY}/resolve/main/model.safetensors", range="bytes=0-9")

    with structlog.testing.capture_logs() as lines:
        play(script)
    found = [line for line in lines if line["event"] == "pulled"]
    assert [(it["name"], it["reference"], it["from_origin"], it["outcome"]) for it in found] == [
        (f"{HUB}/{REPOSITORY}", "main:model.safetensors", len(BIG), "ok")
    ]
