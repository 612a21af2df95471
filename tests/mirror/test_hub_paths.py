"""What a target below `/hf` means, and that nothing climbs out of its repository."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.mirror.edges import MirrorError
from swarm.mirror.hub_paths import file_route, parse_hub_target, takes_body
from swarm.mirror.paths import Kind

NAME = st.from_regex(r"[A-Za-z0-9]{1,8}([._-][A-Za-z0-9]{1,8})?", fullmatch=True)
SEGMENT = st.text(st.characters(blacklist_categories=("Cc", "Cs"), blacklist_characters="/\\%"), min_size=1, max_size=12)
PART = SEGMENT.filter(lambda text: text not in (".", ".."))


@given(NAME, NAME, st.lists(PART, min_size=1, max_size=3), st.lists(PART, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_file_is_understood_as_it_was_written(namespace: str, name: str, revision: list[str], path: list[str]) -> None:
    repository, branch, file = f"{namespace}/{name}", "/".join(revision), "/".join(path)
    if namespace in ("models", "datasets", "spaces", "kernels", "api"):
        return
    found = parse_hub_target(f"/hf{file_route(repository, branch, file)}".encode())
    assert (found.kind, found.repository, found.revision, found.path) == (Kind.FILE, repository, branch, file)


@given(st.binary(max_size=80))
@settings(max_examples=100, deadline=None)
def test_garbage_is_refused_and_nothing_else_happens(rest: bytes) -> None:
    status = 0
    try:
        found = parse_hub_target(b"/hf/" + rest)
    except MirrorError as error:
        status = error.status
    assert status in (400, 404, 414) or found.route or found.path


@given(
    st.lists(st.sampled_from(["..", ".", "%2e", "%2E%2e", "%252e%252e", "a", "%2f", "%252f", "", "%5c", "b%2f.."]), max_size=6)
)
@settings(max_examples=100, deadline=None)
def test_t18_no_way_of_writing_it_climbs(parts: list[str]) -> None:
    tail = "/".join(parts)
    for target in (
        f"/hf/team/model/resolve/main/{tail}",
        f"/hf/team/model/resolve/{tail}/x",
        f"/hf/api/models/team/m/tree/main/{tail}",
    ):
        try:
            found = parse_hub_target(target.encode())
        except MirrorError:
            continue
        seen = found.route or file_route(found.repository, found.revision, found.path)
        for text in (seen, unquote(seen), unquote(unquote(seen))):
            assert not {"", ".", ".."} & set(text.removeprefix("/").split("/"))


@pytest.mark.parametrize(
    ("target", "repository", "revision", "route"),
    [
        ("/hf/api/models/team/m", "team/m", "", "/api/models/team/m"),
        ("/hf/api/models/gpt2/revision/main", "gpt2", "main", "/api/models/gpt2/revision/main"),
        (
            "/hf/api/datasets/t/d/tree/refs%2Fpr%2F1/a%2Fb",
            "datasets/t/d",
            "refs/pr/1",
            "/api/datasets/t/d/tree/refs%2Fpr%2F1/a/b",
        ),
        ("/hf/api/spaces/t/s/refs", "spaces/t/s", "", "/api/spaces/t/s/refs"),
        ("/hf/api/models?search=a", "", "", "/api/models"),
        ("/hf/api/whoami-v2", "", "", "/api/whoami-v2"),
    ],
)
def test_routes_of_the_api_are_understood(target: str, repository: str, revision: str, route: str) -> None:
    found = parse_hub_target(target.encode())
    assert (found.kind, found.repository, found.revision, found.route) == (Kind.API, repository, revision, route)


def test_a_body_belongs_to_one_route() -> None:
    assert takes_body("POST", b"/hf/api/models/t/m/paths-info/main")
    assert not takes_body("PUT", b"/hf/api/models/t/m/paths-info/main")
    assert not takes_body("POST", b"/hf/api/models/t/m/commit/main")
    assert not takes_body("POST", b"/v2/paths-info/")
