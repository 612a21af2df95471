"""Registries with users: who may read through the mirror, and what the members of a network share."""

from __future__ import annotations

import json
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.cluster import hosts_dir
from tests.system.mirrored import MIRROR, Mirrored, assert_pulled, members, mirrored, small_image
from tests.system.registry import Access
from tests.system.runtimes import Podman, Skopeo

pytestmark = pytest.mark.system

ALICE = ("alice", "secret")
FORMS: tuple[Access, ...] = ("basic", "bearer")


@pytest.fixture
def network() -> Iterator[dict[int, Path]]:
    with tempfile.TemporaryDirectory(prefix="swarm-network-", dir=hosts_dir()) as directory:
        yield members(Path(directory), 1, 2)


def pushed(m: Mirrored) -> str:
    return m.registry.push(small_image(m.registry), "lib/closed", "v1")


def log_in(m: Mirrored, client: Podman | Skopeo, login: tuple[str, str] = ALICE) -> None:
    """These clients look credentials up by where they really ask: at the mirror."""
    entry = {"auth": b64encode(":".join(login).encode()).decode()}
    client.logins.write_text(json.dumps({"auths": {MIRROR: entry, m.registry.name: entry}}))


@pytest.mark.parametrize("access", FORMS)
def test_members_share_one_copy_of_private_content_and_each_client_shows_its_right(
    access: Access, network: dict[int, Path]
) -> None:
    with mirrored(2, access=access, network=network) as m:
        image = small_image(m.registry)
        reference = pushed(m)
        m.cluster.start_all()
        assert_pulled(m.containerd(1).cri_pull(reference, login=ALICE), m.containerd(2).cri_pull(reference, login=ALICE))
        m.cluster.stop()
        assert m.registry.copies(image) == 1


@pytest.mark.parametrize("access", FORMS[:1])
def test_private_content_is_read_once_also_by_who_comes_later_and_after_a_restart(
    access: Access, network: dict[int, Path]
) -> None:
    with mirrored(2, access=access, network=network) as m:
        image = small_image(m.registry)
        reference = pushed(m)
        m.cluster.start_all()
        assert_pulled(m.containerd(1).cri_pull(reference, login=ALICE))
        m.cluster.stop()
        m.cluster.start_all()
        assert_pulled(m.containerd(2).cri_pull(reference, login=ALICE))
        m.cluster.stop()
        assert m.registry.copies(image) == 1


def assert_read_by_swarm_only(m: Mirrored) -> None:
    """No client got its blobs by going around the mirror."""
    m.cluster.stop()
    readers = {it.agent.partition("/")[0].lower() for it in m.registry.requests() if "/blobs/" in it.path}
    assert readers == {"swarm"}


@pytest.mark.parametrize("access", FORMS)
def test_skopeo_logs_in_at_the_mirror(access: Access, network: dict[int, Path]) -> None:
    with mirrored(1, access=access, network=network) as m:
        reference = pushed(m)
        m.cluster.start_all()
        client = m.skopeo(1)
        assert client.pull(reference, timeout=40).code != 0
        log_in(m, client)
        assert_pulled(client.pull(reference))
        assert_read_by_swarm_only(m)


@pytest.mark.parametrize("access", FORMS)
def test_podman_logs_in_at_the_mirror_as_the_page_says(access: Access, network: dict[int, Path]) -> None:
    with mirrored(1, access=access, network=network) as m:
        reference = pushed(m)
        m.cluster.start_all()
        podman = m.podman(1)
        assert podman.pull(reference, timeout=40).code != 0
        assert_pulled(podman.log_in(f"{MIRROR}/{m.registry.name.replace(':', '__')}", *ALICE), podman.pull(reference))
        assert_read_by_swarm_only(m)


@pytest.mark.parametrize("access", FORMS)
def test_what_one_user_pulled_nobody_without_the_right_reads(access: Access, network: dict[int, Path]) -> None:
    """The content is on the host already; the right is asked for each reader."""
    with mirrored(1, access=access, network=network) as m:
        image = small_image(m.registry)
        reference = pushed(m)
        m.cluster.start_all()
        assert_pulled(m.containerd(1).cri_pull(reference, login=ALICE))
        blob = m.blob_path("lib/closed", image.layers[1].digest)
        for options in ((), ("-u", "alice:wrong"), ("-u", "mallory:secret"), ("-H", "Authorization: Bearer made.up.token")):
            status, body, _ = m.get(1, blob, *options)
            assert status in (401, 403, 404), (options, status)
            assert len(body) < 2000
        skopeo = m.skopeo(1)
        log_in(m, skopeo, ("mallory", "guess"))
        assert skopeo.pull(reference, timeout=40).code != 0


@pytest.mark.parametrize("access", FORMS)
def test_private_content_does_not_leave_a_node_of_an_open_network(access: Access) -> None:
    with mirrored(2, access=access) as m:
        image = small_image(m.registry)
        reference = pushed(m)
        m.cluster.start_all()
        assert_pulled(m.containerd(1).cri_pull(reference, login=ALICE), m.containerd(2).cri_pull(reference, login=ALICE))
        m.cluster.stop()
        assert m.registry.copies(image) == 2


@pytest.mark.parametrize("access", FORMS)
def test_whoever_reaches_a_mirror_with_credentials_of_its_own_may_read(access: Access, network: dict[int, Path]) -> None:
    password = network[1].parent / "password"
    password.write_text("secret\n")
    password.chmod(0o600)
    with mirrored(2, access=access, network=network, username="alice", password_file=password) as m:
        image = small_image(m.registry)
        reference = pushed(m)
        m.cluster.start_all()
        assert_pulled(m.containerd(1).cri_pull(reference), m.skopeo(2).pull(reference))
        m.cluster.stop()
        assert m.registry.copies(image) == 1


@pytest.mark.parametrize("access", FORMS)
def test_credentials_are_in_no_log_and_in_no_file(access: Access, network: dict[int, Path]) -> None:
    with mirrored(1, access=access, network=network, options=("--log-level", "debug")) as m:
        reference = pushed(m)
        m.cluster.start_all()
        assert_pulled(m.containerd(1).cri_pull(reference, login=ALICE))
        m.cluster.stop()
        # As one word, as a header's value, and how every token begins.
        secrets = (b'"secret"', b"alice:secret", b64encode(b"alice:secret"), b"eyJ0eXAiO")
        for path in m.cluster.directory(1).rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert [it for it in secrets if it in content] == [], path
