"""The registry itself: what it promises to the tests of the mirror."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.hosts import Hosts
from tests.system.images import MIB, Image, Kind, Layer
from tests.system.registry import Access, Registry

pytestmark = pytest.mark.system

LAYERS = (Layer(100_000, seed=1), Layer(2 * MIB, seed=2, random_share=0.6))


@pytest.fixture
def work() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="swarm-registry-", dir="/dev/shm") as directory:
        yield Path(directory)


def skopeo(*arguments: str, within: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    argv = [*(within or []), "skopeo", "--insecure-policy", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30)


def copied(reference: str, to: Path, *options: str) -> dict[str, bytes]:
    """What skopeo reads, digests checked by it: files of its `dir:` form."""
    done = skopeo("copy", "-q", "--all", "--src-tls-verify=false", *options, f"docker://{reference}", f"dir:{to}")
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in to.iterdir()}


def contents(registry: Registry, image: Image) -> dict[str, bytes]:
    return {it.digest.partition(":")[2]: registry.images.path(it.digest).read_bytes() for it in image.blobs}


@pytest.mark.parametrize("kind", Kind)
def test_an_index_reads_back_byte_for_byte(kind: Kind, work: Path) -> None:
    with Registry() as registry:
        one, other = (registry.images.image(LAYERS, kind, architecture=it) for it in ("amd64", "arm64"))
        index = registry.images.index([one, other], kind)
        found = copied(registry.push(index, "lib/both", "v1"), work / "copy")
        assert found["manifest.json"] == registry.images.path(index.digest).read_bytes()
        assert json.loads(found["manifest.json"])["mediaType"] == kind.index
        assert {name: found[name] for name in contents(registry, index)} == contents(registry, index)
        assert registry.copies(index) == 1
        assert {it.agent.partition("/")[0] for it in registry.requests()} == {"skopeo"}


def test_the_same_seed_makes_the_same_image(work: Path) -> None:
    from tests.system.images import Images

    one, other = (Images(work / name).image(LAYERS) for name in ("one", "other"))
    assert one == other
    assert Images(work / "third").image((LAYERS[0], Layer(2 * MIB, seed=3))).layers[0] == one.layers[0]


@pytest.mark.parametrize("access", ["basic", "bearer"])
def test_only_users_read_a_registry_with_users(access: Access, work: Path) -> None:
    with Registry(access=access) as registry:
        reference = registry.push(registry.images.image(LAYERS), "lib/private", "v1")
        refused = skopeo("inspect", "--tls-verify=false", "--creds", "alice:wrong", f"docker://{reference}")
        assert refused.returncode != 0
        assert not any(it.status == 200 for it in registry.requests())
        copied(reference, work / "copy", "--src-creds", "alice:secret")
        granted = {it.user for it in registry.token_requests() if it.granted}
        assert granted == ({"alice"} if access == "bearer" else set())


def test_a_registry_in_a_host_stops_and_comes_back() -> None:
    with Hosts(1) as hosts, Registry(hosts) as registry:
        image = registry.images.image(LAYERS)
        url = f"{registry.base}/v2/lib/it/blobs/{image.layers[1].digest}"
        registry.push(image, "lib/it", "v1")
        fetch = ("curl", "-sf", "-m", "5", "-o", "/dev/null", url)
        hosts.run(1, *fetch)
        assert registry.copies_of(image.layers[1]) == 1
        assert [it.sender for it in registry.requests()] == [hosts.address(1)]
        registry.stop()
        assert subprocess.run(hosts.command(1, fetch), timeout=10).returncode == 7
        registry.start()
        registry.forget()
        hosts.run(1, *fetch, "-r", "0-999")
        assert [it.sent for it in registry.reads(image.layers[1].digest)] == [1000]


def test_a_registry_that_lies_serves_what_it_was_told_to(work: Path) -> None:
    with Registry() as registry:
        image = registry.images.image(LAYERS)
        reference = registry.push(image, "lib/it", "v1")
        registry.lie(image.layers[0].digest, b"x" * image.layers[0].size)
        done = skopeo("copy", "-q", "--src-tls-verify=false", f"docker://{reference}", f"dir:{work}/copy")
        assert "igest" in done.stderr, done.stderr
