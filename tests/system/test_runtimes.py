"""The clients themselves: each pulls from a registry without any mirror."""

from __future__ import annotations

import json
import subprocess
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.system.cluster import SWARM, clean_environment
from tests.system.hosts import Hosts
from tests.system.images import Image, Kind, Layer
from tests.system.registry import Registry
from tests.system.runtimes import Containerd, Place, Podman, Skopeo

pytestmark = pytest.mark.system

LAYERS = (Layer(100_000, seed=1), Layer(1_000_000, seed=2, random_share=0.6))


@pytest.fixture
def work() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="swarm-runtimes-", dir="/dev/shm") as directory:
        yield Path(directory)


def plain_hosts(containerd: Containerd, registry: Registry) -> None:
    directory = containerd.certs / registry.name
    directory.mkdir()
    # containerd 1.6 does not take a file without a host.
    (directory / "hosts.toml").write_text(f'[host."{registry.base}"]\n  capabilities = ["pull", "resolve"]\n')


def insecure(registry: Registry) -> str:
    return f'[[registry]]\nlocation = "{registry.name}"\ninsecure = true\n'


def image_at(registry: Registry, kind: Kind = Kind.OCI) -> tuple[Image, str]:
    image = registry.images.image(LAYERS, kind)
    return image, registry.push(image, "lib/it", "v1")


@pytest.mark.parametrize("kind", Kind)
def test_every_client_pulls_and_unpacks(kind: Kind, work: Path) -> None:
    with Registry() as registry, Containerd(work / "c") as containerd:
        image, reference = image_at(registry, kind)
        plain_hosts(containerd, registry)
        podman, skopeo = Podman(work / "p"), Skopeo(work / "s")
        for client in (podman, skopeo):
            client.registries.write_text(insecure(registry))
        for pull in (containerd.fetch, containerd.pull, containerd.cri_pull, podman.pull, skopeo.pull):
            pulled = pull(reference)
            assert pulled.code == 0, pulled
        # The second and third of containerd found everything in its content store.
        assert registry.copies(image) == 3
        for blob in image.blobs:
            assert containerd.content(blob.digest).stat().st_size == blob.size
            assert skopeo.content(blob.digest).stat().st_size == blob.size


def test_credentials_reach_the_registry_by_every_client(work: Path) -> None:
    with Registry(access="basic") as registry, Containerd(work / "c") as containerd:
        image, reference = image_at(registry)
        plain_hosts(containerd, registry)
        assert containerd.cri_pull(reference).code == 1
        assert containerd.cri_pull(reference, login=("alice", "secret")).code == 0
        podman, skopeo = Podman(work / "p"), Skopeo(work / "s")
        for client in (podman, skopeo):
            client.registries.write_text(insecure(registry))
            assert client.pull(reference).code != 0
            login = {"auths": {registry.name: {"auth": b64encode(b"alice:secret").decode()}}}
            client.logins.write_text(json.dumps(login))
            assert client.pull(reference).code == 0
        assert registry.copies(image) == 3


def test_two_containerds_in_two_hosts_do_not_share_anything(work: Path) -> None:
    with Hosts(2) as hosts, Registry(hosts) as registry:
        image, reference = image_at(registry)
        for host in hosts.each():
            with Containerd(work / str(host), Place(hosts, host)) as containerd:
                plain_hosts(containerd, registry)
                pulled = containerd.pull(reference)
                assert pulled.code == 0, pulled
        assert registry.copies(image) == 2
        assert {it.sender for it in registry.requests()} == {hosts.address(1), hosts.address(2)}


def test_the_default_of_containerd_asks_the_mirror_and_falls_back_to_whichever_registry_is_meant(work: Path) -> None:
    """Any registry can stand for the mirror here: one that has the image, and later is not there."""
    with Registry() as mirror, Registry() as registry, Containerd(work / "c") as containerd:
        image, reference = image_at(registry)
        mirror.push(mirror.images.image(LAYERS), "lib/it", "v1")
        argv = [SWARM, "mirror", "configure", "--containerd", str(containerd.certs), "--mirror", mirror.base]
        subprocess.run(argv, check=True, capture_output=True, timeout=20, env=clean_environment())
        assert [it.name for it in containerd.certs.iterdir() if it.is_dir()] == ["_default"]
        assert containerd.fetch(reference).code == 0
        assert registry.requests() == []
        namespaces = {parse_qs(urlsplit(it.path).query)["ns"][0] for it in mirror.requests()}
        assert namespaces == {registry.name}
        mirror.stop()
        assert containerd.cri_pull(reference).code == 0
        assert registry.requests() != []
        assert containerd.content(image.digest).exists()
