"""Whole images: pulled, with where each blob came from, and listed."""

from __future__ import annotations

import platform

import pytest

from swarm.errors import ConfigError, NotFoundAtOrigin, OriginRefused, OriginUnreachable
from swarm.mirror import resolve
from swarm.mirror.images import Images
from tests.mirror.desk import INDEX, NAME
from tests.mirror.test_resolve import DOWN, Bench, runs

HERE = resolve.MACHINES.get(platform.machine(), platform.machine())


def images(bench: Bench) -> Images:
    return Images(bench.registry, bench.registry, bench.service, bench.resolver)


@runs()
async def test_a_pull_has_every_blob_and_says_where_it_came_from(bench: Bench) -> None:
    digest = bench.registry.image(b"one" * 1000, b"two" * 1000)
    first = await images(bench).pull(f"{NAME}:v1", None)
    assert (first["image"], first["digest"], first["platforms"]) == (f"{NAME}:v1", str(digest), [])
    assert [row["digest"] for row in first["blobs"]] == [str(blob) for blob in bench.registry.blobs]
    assert first["from_origin"] == first["bytes"] == sum(map(len, bench.registry.blobs.values()))
    again = await images(bench).pull(f"{NAME}@{digest}", None)
    assert (again["from_origin"], again["from_local"]) == (0, first["bytes"])


@runs()
async def test_of_an_index_this_machines_image_is_pulled_or_another_or_all(bench: Bench) -> None:
    registry = bench.registry
    mine, other = registry.image(b"mine"), registry.image(b"other")
    registry.tags[NAME, "both"] = registry.manifest(
        {
            "manifests": [
                registry.descriptor(other, platform={"os": "linux", "architecture": "s390x"}),
                registry.descriptor(mine, platform={"os": "linux", "architecture": HERE}),
            ]
        },
        INDEX,
    )
    assert (await images(bench).pull(f"{NAME}:both", None))["platforms"] == [f"linux/{HERE}"]
    assert (await images(bench).pull(f"{NAME}:both", "linux/s390x"))["platforms"] == ["linux/s390x"]
    whole = await images(bench).pull(f"{NAME}:both", "all")
    assert len(whole["platforms"]) == 2
    assert len(whole["blobs"]) == 3, "the configuration they share is one blob"
    with pytest.raises(ConfigError, match="linux/s390x"):
        await images(bench).pull(f"{NAME}:both", "linux/vax")


@runs()
async def test_what_cannot_be_pulled_is_said_in_the_words_of_the_command_line(bench: Bench) -> None:
    bench.registry.image(b"layer")
    for image, kind, text in (
        (f"{NAME}:nosuch", NotFoundAtOrigin, "nosuch"),
        ("UPPER:v1", ConfigError, "write REGISTRY/REPOSITORY:TAG"),
        ("other.example/a:v1", ConfigError, "list it in mirror.registries"),
        (f"{NAME}@sha256:short", ConfigError, "write REGISTRY/REPOSITORY:TAG"),
    ):
        with pytest.raises(kind, match=text):
            await images(bench).pull(image, None)
    bench.registry.denied = {None}
    with pytest.raises(OriginRefused):
        await images(bench).pull(f"{NAME}:v1", None)
    bench.registry.error = DOWN
    with pytest.raises(OriginUnreachable):
        await images(bench).pull(f"{NAME}:v2", None)


@runs()
async def test_a_blob_that_fails_fails_the_pull_and_keeps_the_rest(bench: Bench) -> None:
    bench.registry.image(b"good" * 1000, b"gone" * 1000)
    gone = list(bench.registry.blobs)[1]
    del bench.registry.blobs[gone]
    with pytest.raises(NotFoundAtOrigin):
        await images(bench).pull(f"{NAME}:v1", None)


@runs()
async def test_images_are_listed_with_what_is_here(bench: Bench) -> None:
    registry = bench.registry
    first = registry.image(b"one" * 1000, tag="one")
    second = registry.image(b"two" * 1000, b"three", tag="two")
    await images(bench).pull(f"{NAME}:one", None)
    await bench.pull((await bench.resolver.resolve(NAME, "two", None)).digest)
    bench.resolver._kept.clear()
    rows = {row["image"]: row for row in await images(bench).known()}
    assert rows[f"{NAME}:one"]["digest"] == str(first)
    assert (rows[f"{NAME}:one"]["blobs"], rows[f"{NAME}:one"]["blobs_here"]) == (2, 2)
    assert rows[f"{NAME}:two"]["digest"] == str(second)
    assert (rows[f"{NAME}:two"]["blobs"], rows[f"{NAME}:two"]["blobs_here"]) == (3, 0)
    assert rows[f"{NAME}:one"]["bytes_here"] == rows[f"{NAME}:one"]["bytes"]
