"""The pull category of the OCI distribution conformance tests, and what its specification says beside them."""

from __future__ import annotations

import hashlib

import pytest

from swarm.mirror.routes import accepts
from tests.mirror.desk import INDEX, MANIFEST, NAME, NS, REGISTRY, Desk, digest_of, play, random_bytes, runs

LAYER = random_bytes(600_000)


@runs()
async def test_the_base_is_there(desk: Desk) -> None:
    for method in ("GET", "HEAD"):
        reply = await desk.get("/v2/", method=method)
        assert reply.status == 200
        assert reply.headers["docker-distribution-api-version"] == "registry/2.0"


@runs()
async def test_a_blob_that_does_not_exist_is_404(desk: Desk) -> None:
    for method in ("GET", "HEAD"):
        reply = await desk.get(desk.blob(digest_of(b"nowhere")), method=method)
        assert reply.status == 404
    assert (await desk.get(desk.blob(digest_of(b"nowhere")))).errors[0]["code"] == "BLOB_UNKNOWN"


@runs()
async def test_a_blob_is_headed_and_got_by_digest(desk: Desk) -> None:
    digest = desk.registry.blob(LAYER)
    head = await desk.get(desk.blob(digest), method="HEAD")
    assert (head.status, head.headers["content-length"], head.body) == (200, str(len(LAYER)), b"")
    got = await desk.get(desk.blob(digest))
    assert (got.status, got.body) == (200, LAYER)
    assert got.headers["docker-content-digest"] == head.headers["docker-content-digest"] == str(digest)
    assert got.headers["accept-ranges"] == "bytes"
    assert "content-encoding" not in got.headers


@runs()
async def test_a_blob_by_sha512_is_checked_by_sha512(desk: Desk) -> None:
    digest = desk.registry.blob(LAYER, "sha512")
    got = await desk.get(desk.blob(digest))
    assert hashlib.sha512(got.body).hexdigest() == digest.hex
    assert got.headers["docker-content-digest"] == str(digest)


@runs()
async def test_an_empty_blob_is_got(desk: Desk) -> None:
    digest = desk.registry.blob(b"")
    got = await desk.get(desk.blob(digest))
    assert (got.status, got.headers["content-length"], got.body) == (200, "0", b"")


@runs()
async def test_a_manifest_that_does_not_exist_is_404(desk: Desk) -> None:
    for reference in ("nosuchtag", digest_of(b"nowhere")):
        for method in ("GET", "HEAD"):
            assert (await desk.get(desk.manifest(reference), method=method)).status == 404
        assert (await desk.get(desk.manifest(reference))).errors[0]["code"] == "MANIFEST_UNKNOWN"


@runs()
async def test_a_manifest_is_headed_and_got_by_tag_and_digest_with_its_own_bytes_and_type(desk: Desk) -> None:
    digest = desk.registry.image(b"layer")
    body, media_type = desk.registry.manifests[digest]
    for reference in ("v1", digest):
        head = await desk.get(desk.manifest(reference), method="HEAD")
        assert (head.status, head.headers["content-length"], head.body) == (200, str(len(body)), b"")
        got = await desk.get(desk.manifest(reference))
        assert (got.status, got.body) == (200, body)
        for reply in (head, got):
            assert reply.headers["docker-content-digest"] == str(digest)
            assert reply.headers["content-type"] == media_type


@runs()
async def test_nested_indexes_and_any_media_type_are_served_as_stored(desk: Desk) -> None:
    registry = desk.registry
    image = registry.image(b"layer")
    inner = registry.manifest({"manifests": [registry.descriptor(image)]}, INDEX)
    outer = registry.manifest({"manifests": [registry.descriptor(inner)]}, "application/vnd.example.odd+json", tag="nested")
    for reference, media_type in (
        ("nested", "application/vnd.example.odd+json"),
        (outer, None),
        (inner, INDEX),
        (image, MANIFEST),
    ):
        got = await desk.get(desk.manifest(reference))
        assert got.status == 200
        assert media_type is None or got.headers["content-type"] == media_type
        assert f'"{got.headers["docker-content-digest"]}"' == got.headers["etag"]


@runs()
async def test_layers_that_are_elsewhere_are_not_asked_for(desk: Desk) -> None:
    registry = desk.registry
    gone = {"digest": str(digest_of(b"gone")), "size": 4, "mediaType": "x/y", "urls": ["http://elsewhere.example/gone"]}
    digest = registry.manifest({"config": registry.descriptor(registry.blob(b"{}")), "layers": [gone]}, tag="foreign")
    assert (await desk.get(desk.manifest("foreign"))).headers["docker-content-digest"] == str(digest)


@runs()
async def test_an_artifact_without_layers_is_served(desk: Desk) -> None:
    body = {
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": {},
        "layers": [],
        "subject": {"digest": "x"},
    }
    digest = desk.registry.manifest(body, tag="model")
    assert (await desk.get(desk.manifest(digest))).status == 200


@pytest.mark.parametrize(
    ("header", "status", "content_range", "part"),
    [
        ("bytes=500-1499", 206, "bytes 500-1499/3000", slice(500, 1500)),
        ("bytes=500-", 206, "bytes 500-2999/3000", slice(500, 3000)),
        ("bytes=-500", 206, "bytes 2500-2999/3000", slice(2500, 3000)),
        ("bytes=2000-5000", 206, "bytes 2000-2999/3000", slice(2000, 3000)),
        ("bytes=500-0", 416, "bytes */3000", None),
        ("bytes=5000-10000", 416, "bytes */3000", None),
        ("bytes=1-2,5-6", 200, None, slice(0, 3000)),
        ("nonsense", 200, None, slice(0, 3000)),
    ],
)
@pytest.mark.parametrize("here", [True, False])
def test_ranges_of_a_blob(header: str, status: int, content_range: str | None, part: slice | None, here: bool) -> None:
    content = random_bytes(3000)

    async def script(desk: Desk) -> None:
        digest = desk.registry.blob(content)
        if here:
            await desk.get(desk.blob(digest))
        got = await desk.get(desk.blob(digest), ("Range", header))
        assert got.status == status
        assert got.headers.get("content-range") == content_range
        if part is not None:
            assert got.body == content[part]
            assert got.headers["content-length"] == str(len(content[part]))

    play(script)


@runs()
async def test_a_range_beyond_a_byte_of_a_large_blob_is_got_at_once(desk: Desk) -> None:
    content = random_bytes(3_000_000)
    digest = desk.registry.blob(content)
    got = await desk.get(desk.blob(digest), ("Range", "bytes=2000000-2000099"))
    assert got.body == content[2_000_000:2_000_100]
    assert desk.registry.sent[digest] <= 256 * 1024, "a range fetches its own pieces only"


@runs()
async def test_a_client_that_has_this_version_is_told_so(desk: Desk) -> None:
    digest = desk.registry.image(b"layer")
    for path, tag in ((desk.manifest("v1"), digest), (desk.blob(digest_of(b"layer")), digest_of(b"layer"))):
        reply = await desk.get(path, ("If-None-Match", f'"{tag}"'))
        assert (reply.status, reply.body) == (304, b"")
        assert reply.headers["docker-content-digest"] == str(tag)
        assert (await desk.get(path, ("If-None-Match", '"other"'))).status == 200


@runs()
async def test_if_range_of_another_version_brings_everything(desk: Desk) -> None:
    digest = desk.registry.blob(b"0123456789")
    same = await desk.get(desk.blob(digest), ("Range", "bytes=5-"), ("If-Range", f'"{digest}"'))
    other = await desk.get(desk.blob(digest), ("Range", "bytes=5-"), ("If-Range", '"other"'))
    assert (same.status, same.body) == (206, b"56789")
    assert (other.status, other.body) == (200, b"0123456789")


@runs()
async def test_a_range_on_a_manifest_is_passed_over(desk: Desk) -> None:
    """containerd's parallel fetch sends `bytes=0-` for manifests too, and a bad answer breaks the pull."""
    desk.registry.image(b"layer")
    assert (await desk.get(desk.manifest("v1"), ("Range", "bytes=0-"))).status == 200


@runs()
async def test_lists_are_passed_through(desk: Desk) -> None:
    tags = await desk.get(f"/v2/{NAME.repository}/tags/list?n=5&ns={REGISTRY}&last=a")
    assert (tags.status, tags.body, tags.headers["link"]) == (200, b'{"tags": ["v1"]}', "</v2/x>; rel=next")
    referrers = await desk.get(f"/v2/{NAME.repository}/referrers/{digest_of(b'x')}{NS}&artifactType=a%2Fb", method="HEAD")
    assert (referrers.status, referrers.body) == (200, b"")
    assert desk.registry.asked == ["list tags/list?n=5&last=a", f"list referrers/{digest_of(b'x')}?artifactType=a%2Fb"]


@runs()
async def test_the_namespace_is_answered(desk: Desk) -> None:
    desk.registry.image(b"layer")
    assert (await desk.get(desk.manifest("v1"))).headers["oci-namespace"] == REGISTRY
    by_path = await desk.get(f"/v2/{REGISTRY}/{NAME.repository}/manifests/v1")
    assert by_path.status == 200
    assert "oci-namespace" not in by_path.headers


@runs()
async def test_errors_are_those_of_the_specification(desk: Desk) -> None:
    for path, status, code in (
        ("/v2/UPPER/manifests/v1", 400, "NAME_INVALID"),
        (f"/v2/a/blobs/sha256:short{NS}", 400, "DIGEST_INVALID"),
        (f"/v2/a/manifests/{'x' * 200}{NS}", 400, "MANIFEST_INVALID"),
        ("/v2/a/manifests/v1?ns=other.example", 403, "DENIED"),
        ("/v2/nothing", 404, "UNSUPPORTED"),
    ):
        reply = await desk.get(path)
        assert (reply.status, reply.errors[0]["code"]) == (status, code)
        assert set(reply.errors[0]) == {"code", "message", "detail"}
        assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_can_be_changed(method: str) -> None:
    async def script(desk: Desk) -> None:
        reply = await desk.get(desk.manifest("v1"), method=method)
        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
        assert not desk.registry.asked

    play(script)


@pytest.mark.parametrize(
    ("accept", "taken"),
    [
        (None, True),
        ("*/*", True),
        (f"{MANIFEST}, x/y", True),
        ("x/y", False),
        ("application/*;q=0.1", True),
        (MANIFEST.upper(), True),
    ],
)
def test_what_is_stored_is_served_or_nothing(accept: str | None, taken: bool) -> None:
    assert accepts(accept, MANIFEST) is taken


@runs()
async def test_a_client_that_does_not_take_the_stored_type_gets_404(desk: Desk) -> None:
    desk.registry.image(b"layer")
    reply = await desk.get(desk.manifest("v1"), ("Accept", INDEX))
    assert (reply.status, reply.errors[0]["code"]) == (404, "MANIFEST_UNKNOWN")
    many = [("Accept", kind) for kind in (INDEX, "application/vnd.docker.distribution.manifest.v2+json", MANIFEST)]
    assert (await desk.get(desk.manifest("v1"), *many)).status == 200
