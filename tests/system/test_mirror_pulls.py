"""Real clients pull through the mirror, and the registry is read about once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.images import MIB, Image, Kind, Layer
from tests.system.mirrored import Mirrored, assert_pulled, mirrored, small_image
from tests.system.processes import Prepared, start_together, wait
from tests.system.runtimes import Containerd, Docker, Place, Pulled, Skopeo

pytestmark = pytest.mark.system

# Copies: they share, rather than that each reads its own.  How near to one is the benchmarks' matter.
SHARED = 1.5


def all_at_once(pulls: Sequence[Callable[[str], Pulled]], reference: str) -> list[Pulled]:
    with ThreadPoolExecutor(len(pulls)) as threads:
        return list(threads.map(lambda pull: pull(reference), pulls))


def assert_exact(m: Mirrored, image: Image, content: Callable[[str], Path]) -> None:
    """Every blob is here, byte for byte."""
    for blob in image.blobs:
        assert content(blob.digest).read_bytes() == m.registry.images.path(blob.digest).read_bytes(), blob


@pytest.mark.parametrize("kind", Kind)
def test_every_client_pulls_through_the_mirror_and_the_registry_is_read_once(kind: Kind) -> None:
    with mirrored(1) as m:
        one, other = (m.registry.images.image([Layer(MIB, seed=7)], kind, architecture=it) for it in ("amd64", "arm64"))
        reference = m.registry.push(m.registry.images.index([one, other], kind), "lib/it", "v1")
        m.cluster.start_all()
        containerd, podman, skopeo = m.containerd(1), m.podman(1), m.skopeo(1)
        assert_pulled(containerd.cri_pull(reference), podman.pull(reference), skopeo.pull(reference))
        m.cluster.stop()
        assert_exact(m, one, skopeo.content)
        assert_exact(m, one, containerd.content)
        assert m.registry.copies(one) == 1
        # The clients asked the mirror for everything: only the daemon asked the registry.
        assert {it.agent.partition("/")[0].lower() for it in m.registry.requests()} == {"swarm"}


def test_unpacking_what_came_through_the_mirror_works() -> None:
    with mirrored(1) as m:
        reference = m.registry.push(small_image(m.registry), "lib/it", "v1")
        m.cluster.start_all()
        assert_pulled(m.containerd(1).pull(reference))


def test_docker_pulls_docker_hubs_images_through_the_mirror_once_it_was_reloaded() -> None:
    with mirrored(1, hub=True) as m:
        image = small_image(m.registry)
        m.registry.push(image, "library/small", "v1")
        m.cluster.start_all()
        docker = Docker(m.work / "d", Place(m.hosts, 1))
        docker.settings.write_text('{"max-concurrent-downloads": 2}')
        with docker:
            m.configure("--docker", docker.settings)
            docker.reload()
            assert_pulled(docker.pull("small:v1"))
        m.cluster.stop()
        assert m.registry.copies(image) == 1
        assert {it.agent.partition("/")[0].lower() for it in m.registry.requests()} == {"swarm"}


def test_four_containerds_at_once_read_the_registry_once() -> None:
    with mirrored(4, rate="200mbit") as m:
        image = m.registry.images.image([Layer(size * MIB, seed=size) for size in (1, 2, 5, 12)])
        reference = m.registry.push(image, "lib/it", "v1")
        m.cluster.start_all()
        clients = [m.containerd(host) for host in m.hosts.each()]
        assert_pulled(*all_at_once([it.cri_pull for it in clients], reference))
        m.cluster.stop()
        for client in clients:
            assert_exact(m, image, client.content)
        assert m.registry.copies(image) <= SHARED


def test_what_one_host_has_the_next_one_gets_from_it_by_podman() -> None:
    with mirrored(2) as m:
        image = small_image(m.registry)
        reference = m.registry.push(image, "lib/it", "v1")
        m.cluster.start_all()
        assert_pulled(m.skopeo(1).pull(reference), m.podman(2).pull(reference))
        m.cluster.stop()
        assert m.registry.copies(image) == 1


def test_a_rolling_update_reads_only_the_new_layer_and_once() -> None:
    with mirrored(4, rate="200mbit") as m:
        kept = [Layer(size * MIB, seed=size) for size in (1, 2, 3, 4)]
        old = m.registry.images.image([*kept, Layer(2 * MIB, seed=50)])
        new = m.registry.images.image([*kept, Layer(2 * MIB, seed=51)])
        m.cluster.start_all()
        clients = [m.containerd(host) for host in m.hosts.each()]
        for image, tag in ((old, "v1"), (new, "v2")):
            reference = m.registry.push(image, "lib/it", tag)
            m.registry.forget()
            assert_pulled(*all_at_once([it.fetch for it in clients], reference))
        m.cluster.stop()
        assert [m.registry.reads(layer.digest) for layer in new.layers[:4]] == [[], [], [], []]
        assert m.registry.copies_of(new.layers[4]) <= SHARED


def test_clients_that_start_together_on_one_host_share_one_read() -> None:
    with mirrored(1) as m:
        image = small_image(m.registry)
        reference = m.registry.push(image, "lib/it", "v1")
        m.cluster.start_all()
        clients = [Skopeo(m.work / f"s{n}", m.skopeo(1)._place) for n in range(8)]
        for client in clients:
            m.configure("--podman", client.registries)
        commands = [
            Prepared(m.hosts.command(1, it.pulling(reference)), it.directory, "pull", environment=it.environment())
            for it in clients
        ]
        try:
            start_together(commands)
            assert [it.err for it in wait(commands, 60) if it.code] == []
        finally:
            for command in commands:
                command.close()
        m.cluster.stop()
        assert m.registry.copies(image) == 1


def test_a_range_of_a_blob_is_exact_while_it_is_still_arriving() -> None:
    """What lazy-loading clients do: the far end first."""
    with mirrored(1, rate="50mbit") as m:
        image = m.registry.images.image([Layer(16 * MIB, seed=3)])
        m.registry.push(image, "lib/it", "v1")
        m.cluster.start_all()
        layer = image.layers[0]
        content = m.registry.images.path(layer.digest).read_bytes()
        path = m.blob_path("lib/it", layer.digest)
        for option, expected in (
            (f"{layer.size - 1000}-", content[-1000:]),
            ("-77", content[-77:]),
            ("5000000-5000099", content[5_000_000:5_000_100]),
            ("0-0", content[:1]),
            (f"{layer.size - 5}-{layer.size + 5000}", content[-5:]),
        ):
            status, body, _ = m.get(1, path, "-r", option)
            assert (status, body) == (206, expected), option
        assert m.get(1, path, "-r", f"{layer.size}-")[0] == 416
        assert m.get(1, path)[:2] == (200, content)


def test_an_artifact_of_any_media_type_pulls_unchanged() -> None:
    with mirrored(1) as m:
        make = m.registry.images
        weights = make.blob(b"weights" * 100_000, "application/vnd.cncf.model.weight.v1.raw")
        config = make.blob(b'{"descriptor": {"name": "tiny"}}', "application/vnd.cncf.model.config.v1+json")
        artifact = make.artifact(config, [weights], artifactType="application/vnd.cncf.model.manifest.v1+json")
        reference = m.registry.push(artifact, "models/tiny", "v1")
        m.cluster.start_all()
        skopeo = m.skopeo(1)
        assert_pulled(skopeo.pull(reference))
        assert_exact(m, artifact, skopeo.content)
        assert (skopeo.out / "manifest.json").read_bytes() == make.path(artifact.digest).read_bytes()


def test_the_client_of_a_restarted_daemon_is_served_from_its_store() -> None:
    with mirrored(1) as m:
        image = small_image(m.registry)
        reference = m.registry.push(image, "lib/it", "v1")
        m.cluster.start_all()
        assert_pulled(m.skopeo(1).pull(reference))
        m.cluster.stop()
        m.registry.forget()
        m.cluster.start(1).wait_ready()
        assert_pulled(Containerd.fetch(m.containerd(1), reference))
        m.cluster.stop()
        assert [m.registry.reads(blob.digest) for blob in image.blobs] == [[], [], [], []]
