"""What is distributed: ids that never collide or change, digests, geometry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import wire
from swarm.errors import ConfigError
from swarm.task import (
    MAX_CONTENT_BYTES,
    MAX_PIECE_BYTES,
    MIB,
    MIN_PIECE_BYTES,
    Digest,
    Geometry,
    blob_task,
    canonical_url,
    url_task,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "tasks.json").read_text())

SHA256 = "sha256:" + "5e" * 32
SHA512 = "sha512:" + "0a" * 64


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", [SHA256, SHA512])
def test_the_id_of_a_blob_never_changes_silently(digest: str) -> None:
    assert blob_task(Digest.parse(digest)).id.hex() == VECTORS["blob"][digest]


@pytest.mark.parametrize("number", range(len(VECTORS["url"])))
def test_the_id_of_a_url_never_changes_silently(number: int) -> None:
    vector = VECTORS["url"][number]
    task = url_task(vector["url"], tag=vector["tag"], application=vector["application"], validator=vector["validator"])
    assert (task.id.hex(), task.url) == (vector["id"], vector["canonical"])


FIELDS = st.text(max_size=6)


@given(st.tuples(FIELDS, FIELDS, FIELDS), st.tuples(FIELDS, FIELDS, FIELDS))
def test_moving_characters_between_fields_changes_the_id(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    ids = {
        url_task("http://h/x", tag=tag, application=application, validator=validator).id
        for tag, application, validator in (one, other)
    }
    assert len(ids) == len({one, other})


def test_fields_that_read_the_same_side_by_side_are_different_tasks() -> None:
    splits = [("ab", "c", ""), ("a", "bc", ""), ("", "abc", ""), ("abc", "", ""), ("", "", "abc"), ("a", "b", "c")]
    assert len({url_task("http://h/x", tag=t, application=a, validator=v).id for t, a, v in splits}) == len(splits)


def test_a_blob_and_a_url_never_share_an_id() -> None:
    assert blob_task(Digest.parse(SHA256)).id != url_task("http://h/" + SHA256, validator=SHA256).id


def test_a_blob_is_one_task_whether_shared_or_not() -> None:
    digest = Digest.parse(SHA256)
    assert blob_task(digest, shared=False).id == blob_task(digest).id


# --- URLs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_url", "canonical"),
    [
        ("HTTP://Host.Example:8080/A/b?q=1", "http://host.example:8080/A/b?q=1"),
        ("https://user:secret@h/x", "https://h/x"),
        ("https://h/x#part", "https://h/x"),
        ("https://h", "https://h/"),
        ("https://[2001:DB8::1]:443/x", "https://[2001:db8::1]:443/x"),
        ("https://h/x?X-Amz-Signature=1&v=2&Expires=3&x-goog-date=4", "https://h/x?v=2"),
        ("https://h/x?sig=abc&se=2026&sv=1", "https://h/x"),
        ("https://h/x?b=1&a=2&b=1", "https://h/x?b=1&a=2&b=1"),
        ("https://h/%7Ex?a=%20", "https://h/%7Ex?a=%20"),
        ("file:///tmp/x", "file:///tmp/x"),
    ],
)
def test_a_url_is_freed_of_secrets_and_of_nothing_else(given_url: str, canonical: str) -> None:
    assert canonical_url(given_url) == canonical


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "ftp://h/x",
        "gopher://h",
        "http://",
        "http:///x",
        "http://h:0/",
        "http://h:x/",
        "http://h:99999/",
        "http://h/a b",
        "http://h/\n",
        "http://h\x7f/",
        "http://[::1/",
        "unix:/run/x",
        "javascript:alert(1)",
    ],
)
def test_what_is_no_url_of_ours_is_refused_with_words(url: str) -> None:
    with pytest.raises(ConfigError, match=r"URL|fetch"):
        canonical_url(url)


# --- digests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        "sha256:" + "5e" * 31,
        "sha256:" + "5e" * 33,
        "sha256:" + "5E" * 32,
        "sha512:" + "5e" * 32,
        "md5:" + "5e" * 16,
        SHA256 + "\n",
        " " + SHA256,
        "sha256:" + "0g" * 32,
        "SHA256:" + "5e" * 32,
    ],
)
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a digest"):
        Digest.parse(text)


@pytest.mark.parametrize("text", [SHA256, SHA512])
def test_a_digest_reads_back_as_written(text: str) -> None:
    digest = Digest.parse(text)
    assert str(digest) == text
    assert digest.hasher().name == digest.algorithm


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "piece_length", "count"),
    [
        (0, MIN_PIECE_BYTES, 0),
        (1, MIN_PIECE_BYTES, 1),
        (MIN_PIECE_BYTES - 1, MIN_PIECE_BYTES, 1),
        (MIN_PIECE_BYTES, MIN_PIECE_BYTES, 1),
        (MIN_PIECE_BYTES + 1, MIN_PIECE_BYTES, 2),
        (3 * MIB, MIN_PIECE_BYTES, 12),
        (64 * MIB, MIN_PIECE_BYTES, 256),
        (64 * MIB + 1, 2 * MIN_PIECE_BYTES, 129),
        (100 * MIB, MIB // 2, 200),
        (1024 * MIB, MAX_PIECE_BYTES, 256),
        (20 * 1024 * MIB, MAX_PIECE_BYTES, 5120),
    ],
)
def test_pieces_are_a_power_of_two_near_a_256th(length: int, piece_length: int, count: int) -> None:
    geometry = Geometry.of(length)
    assert (geometry.piece_length, geometry.piece_count) == (piece_length, count)


@given(st.integers(0, MAX_CONTENT_BYTES))
def test_pieces_cover_the_content_exactly(length: int) -> None:
    geometry = Geometry.of(length)
    count = geometry.piece_count
    assert geometry.piece_length & (geometry.piece_length - 1) == 0
    assert MIN_PIECE_BYTES <= geometry.piece_length <= MAX_PIECE_BYTES
    if count:
        assert geometry.offset(count - 1) + geometry.size(count - 1) == length
        assert 0 < geometry.size(count - 1) <= geometry.piece_length
    if count > 1:
        assert geometry.size(0) == geometry.piece_length


@given(st.integers(1, 10 * MIB), st.integers(0, 11 * MIB), st.integers(0, 11 * MIB))
def test_a_range_is_covered_by_the_pieces_that_touch_it_and_no_others(length: int, start: int, stop: int) -> None:
    geometry = Geometry.of(length)
    touching = [
        piece
        for piece in range(geometry.piece_count)
        if max(start, geometry.offset(piece)) < min(stop, geometry.offset(piece) + geometry.size(piece))
    ]
    assert list(geometry.pieces_covering(start, stop)) == touching


def test_every_geometry_the_wire_allows_has_a_bitmap_that_fits_a_frame() -> None:
    assert wire.MAX_PIECES // 8 < wire.MAX_FRAME_BYTES
