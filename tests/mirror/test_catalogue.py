"""What manifests say, and what is remembered of it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.mirror import catalogue as module
from swarm.mirror.catalogue import DEFAULT_INDEX, DEFAULT_MANIFEST, SIGNED_V1, Catalogue, Child, Contents, read_manifest
from swarm.mirror.edges import ManifestInfo, MirrorError
from swarm.mirror.paths import Name
from swarm.task import Digest

NAME = Name("registry.example", "a/b")


def digest(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


def descriptor(number: int, size: int = 10, **more: object) -> dict[str, object]:
    return {"digest": str(digest(number)), "size": size, "mediaType": "type/layer", **more}


def test_an_image_lists_its_config_and_layers() -> None:
    body = {"config": descriptor(1), "layers": [descriptor(2), descriptor(3, urls=["http://elsewhere.example"])]}
    found = read_manifest(json.dumps(body).encode(), "type/said")
    assert found.media_type == "type/said"
    assert [child.digest for child in found.blobs] == [digest(1), digest(2), digest(3)]
    assert [child.elsewhere for child in found.blobs] == [False, False, True]


def test_an_index_lists_its_manifests_with_their_platforms() -> None:
    entry = descriptor(1, platform={"os": "linux", "architecture": "arm64"})
    found = read_manifest(json.dumps({"manifests": [entry]}).encode(), "")
    assert found.manifests == (Child(digest(1), 10, "type/layer", False, "linux/arm64"),)
    assert found.media_type == DEFAULT_INDEX


@pytest.mark.parametrize(
    ("document", "media_type"),
    [
        ({"mediaType": "type/own", "layers": []}, "type/own"),
        ({"mediaType": "no type\r\nX: y", "layers": []}, DEFAULT_MANIFEST),
        ({"layers": []}, DEFAULT_MANIFEST),
        ({"manifests": []}, DEFAULT_INDEX),
        ({"fsLayers": []}, SIGNED_V1),
        ([], "application/octet-stream"),
    ],
)
def test_a_type_that_nobody_said_is_read_from_the_manifest(document: object, media_type: str) -> None:
    assert read_manifest(json.dumps(document).encode(), "").media_type == media_type


def test_a_manifest_that_is_an_index_too_is_refused() -> None:
    """Programs differ about what such a thing is (GHSA-5j5w-9665-cx9f)."""
    with pytest.raises(MirrorError, match="both"):
        read_manifest(b'{"manifests": [], "layers": []}', "")


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["manifests", "layers", "config", "digest", "size", "mediaType", "platform", "urls"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=20,
    )
)
def test_any_document_is_read_or_refused(document: object) -> None:
    with contextlib.suppress(MirrorError):
        read_manifest(json.dumps(document).encode(), "")


def test_what_is_no_json_is_served_as_it_is() -> None:
    assert read_manifest(b"[" * 100_000, "type/said") == Contents("type/said")


def test_a_manifest_cannot_list_without_end() -> None:
    body = {"layers": [descriptor(number) for number in range(module.MAX_CHILDREN + 10)]}
    assert len(read_manifest(json.dumps(body).encode(), "").blobs) == module.MAX_CHILDREN


def test_two_manifests_that_differ_about_a_size_are_both_not_believed() -> None:
    kept = Catalogue()
    kept.note_children(Contents("", (), (Child(digest(1), 10, ""),)))
    assert kept.size(digest(1)) == 10
    kept.note_children(Contents("", (), (Child(digest(1), 11, ""),)))
    assert kept.size(digest(1)) is None
    kept.note_children(Contents("", (), (Child(digest(1), 11, ""),)))
    assert kept.size(digest(1)) is None


def test_tags_and_types_outlive_a_restart(tmp_path: Path) -> None:
    kept = Catalogue(tmp_path / "state")
    info = ManifestInfo(digest(1), "type/manifest", 100)
    kept.note_tag(NAME, "v1", info, 50.0)
    assert kept.changed
    kept.save()
    assert not kept.changed
    again = Catalogue(tmp_path / "state")
    assert again.tag(NAME, "v1") == module.Tag(info, 50.0)
    assert again.media_type(digest(1)) == "type/manifest"
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "raw", [b"", b"\xff" * 100, cbor2.dumps([1]), cbor2.dumps({"tags": [["x"]]}), cbor2.dumps({"tags": [], "types": [[1, 2]]})]
)
def test_a_damaged_file_is_forgotten(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "state"
    path.write_bytes(raw)
    assert Catalogue(path).images() == []


def test_clients_cannot_make_it_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TAGS", 4)
    kept = Catalogue()
    for number in range(10):
        kept.note_tag(NAME, f"v{number}", ManifestInfo(digest(number), "type/x", 1), float(number))
    assert [tag for _, tag, _ in kept.images()] == ["v9", "v8", "v7", "v6"]
