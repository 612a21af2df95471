"""What goes wrong around the mirror, as real clients see it: they pull, or they are told within seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.images import MIB, Image, Layer
from tests.system.mirrored import Mirrored, assert_pulled, mirrored, small_image
from tests.system.runtimes import Pulled

pytestmark = pytest.mark.system

ANSWER = 3.0
"""The mirror's `answer_timeout` here, seconds."""

SOON = 45.0
"""A client that asks the mirror and then the registry has failed by then; podman does so four times, with pauses."""

SETTINGS = f'[mirror]\nanswer_timeout = "{ANSWER}s"\n'
CLIENTS = ("ctr", "cri", "podman", "skopeo")


def client(m: Mirrored, name: str, host: int) -> Callable[..., Pulled]:
    match name:
        case "ctr":
            return m.containerd(host).fetch
        case "cri":
            return m.containerd(host).cri_pull
        case "podman":
            return m.podman(host).pull
        case _:
            return m.skopeo(host).pull


def pushed(m: Mirrored) -> tuple[Image, str]:
    image = small_image(m.registry)
    return image, m.registry.push(image, "lib/it", "v1")


def held_by_host_1(m: Mirrored) -> tuple[Image, str]:
    """An image that host 1 pulled."""
    image, reference = pushed(m)
    m.cluster.start_all()
    assert_pulled(m.skopeo(1).pull(reference))
    return image, reference


@contextmanager
def meanwhile(pull: Callable[..., Pulled], reference: str) -> Iterator[list[Pulled]]:
    """Pull in the background; the list has the outcome once the block is left."""
    outcome: list[Pulled] = []
    thread = threading.Thread(target=lambda: outcome.append(pull(reference)))
    thread.start()
    try:
        yield outcome
    finally:
        thread.join()


def wait_for(what: Callable[[], bool], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


# --- the mirror is not there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIENTS)
def test_without_a_daemon_the_client_pulls_from_its_registry(name: str) -> None:
    with mirrored(1, more=SETTINGS) as m:
        image, reference = pushed(m)
        assert_pulled(client(m, name, 1)(reference))
        assert m.registry.copies(image) == 1


@pytest.mark.parametrize("name", CLIENTS)
def test_a_mirror_that_refuses_sends_the_client_to_its_registry(name: str) -> None:
    """A private registry that no setting lists: an error for each request, which no client may take for the last word."""
    with mirrored(1, more=SETTINGS, listed=False) as m:
        image, reference = pushed(m)
        m.cluster.start_all()
        assert_pulled(client(m, name, 1)(reference))
        m.cluster.stop()
        assert m.registry.copies(image) == 1
        assert {it.agent.partition("/")[0].lower() for it in m.registry.requests()} != {"swarm"}


@pytest.mark.parametrize("name", ["ctr", "cri"])
def test_containerd_finishes_at_its_registry_when_the_daemon_dies_in_the_middle(name: str) -> None:
    """podman and skopeo choose their source once and cannot do so, whatever a mirror does."""
    with mirrored(1, rate="50mbit") as m:
        image = m.registry.images.image([Layer(16 * MIB, seed=1)])
        reference = m.registry.push(image, "lib/it", "v1")
        m.cluster.start_all()
        with meanwhile(client(m, name, 1), reference) as outcome:
            wait_for(lambda: m.hosts.traffic()[1].received > 4 * MIB)
            m.cluster.daemons[1].kill()
        assert_pulled(*outcome)


# --- the registry is not there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIENTS)
def test_what_the_swarm_holds_is_pulled_by_digest_while_the_registry_is_down(name: str) -> None:
    with mirrored(2, more=SETTINGS) as m:
        image, reference = held_by_host_1(m)
        m.registry.stop()
        assert_pulled(client(m, name, 1)(f"{reference.rpartition(':')[0]}@{image.digest}"))


@pytest.mark.parametrize("name", CLIENTS)
def test_a_tag_that_was_asked_before_is_pulled_while_the_registry_is_down(name: str) -> None:
    with mirrored(1, more='[mirror]\ntag_cache = "0s"\n') as m:
        _, reference = held_by_host_1(m)
        m.registry.stop()
        assert_pulled(client(m, name, 1)(reference))


@pytest.mark.parametrize("name", CLIENTS)
def test_what_nobody_has_fails_soon_while_the_registry_is_down(name: str) -> None:
    with mirrored(1, more=SETTINGS) as m:
        _, reference = pushed(m)
        m.cluster.start_all()
        m.registry.stop()
        failed = client(m, name, 1)(reference)
        assert failed.code not in (0, 124), failed
        assert failed.seconds < SOON


def test_a_registry_that_says_nothing_does_not_make_the_mirror_silent() -> None:
    """A client that then asks the registry itself hangs there; with a mirror that hangs it could not even choose."""
    with mirrored(1, more=SETTINGS) as m:
        image, _ = pushed(m)
        m.cluster.start_all()
        m.registry.pause()
        for path in (f"/v2/lib/it/manifests/v1?ns={m.registry.name}", m.blob_path("lib/it", image.layers[0].digest)):
            status, body, seconds = m.get(1, path)
            assert status >= 500, body
            assert seconds < ANSWER + 2


@pytest.mark.parametrize("fault", ["stop", "pause"])
@pytest.mark.parametrize("name", ["cri", "podman"])
def test_a_registry_that_fails_in_the_middle_does_not_stop_a_pull_that_the_swarm_can_end(name: str, fault: str) -> None:
    with mirrored(2, rate="50mbit") as m:
        image = m.registry.images.image([Layer(8 * MIB, seed=1), Layer(8 * MIB, seed=2)])
        reference = m.registry.push(image, "lib/it", "v1")
        m.cluster.start_all()
        assert_pulled(m.skopeo(1).pull(reference))
        before = m.hosts.traffic()[2].received
        with meanwhile(client(m, name, 2), reference) as outcome:
            wait_for(lambda: m.hosts.traffic()[2].received > before + 2 * MIB)
            getattr(m.registry, fault)()
        assert_pulled(*outcome)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_holder_that_dies_in_the_middle_does_not_stop_a_pull(name: str) -> None:
    with mirrored(2, rate="50mbit") as m:
        image = m.registry.images.image([Layer(8 * MIB, seed=1), Layer(8 * MIB, seed=2)])
        reference = m.registry.push(image, "lib/it", "v1")
        m.cluster.start_all()
        assert_pulled(m.skopeo(1).pull(reference))
        before = m.hosts.traffic()[2].received
        with meanwhile(client(m, name, 2), reference) as outcome:
            wait_for(lambda: m.hosts.traffic()[2].received > before + 2 * MIB)
            m.cluster.daemons[1].kill()
        assert_pulled(*outcome)


# --- the registry lacks a blob, or lies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIENTS)
def test_a_blob_that_the_registry_lost_comes_from_the_swarm(name: str) -> None:
    """podman would not fall back once it had the manifest from here: all or nothing.

    Where rights are asked for, the registry's word that there is no such blob is the last: content is served only to
    who may read it there.
    """
    with mirrored(2, more=SETTINGS, rights="public") as m:
        image, reference = held_by_host_1(m)
        m.registry.forget_blob(image.layers[1].digest)
        assert_pulled(client(m, name, 2)(reference))


@pytest.mark.parametrize("name", CLIENTS)
def test_a_blob_that_nobody_has_fails_soon_and_only_for_who_wants_it(name: str) -> None:
    with mirrored(1, more=SETTINGS) as m:
        image, reference = pushed(m)
        other = m.registry.push(m.registry.images.image([Layer(200_000, seed=1)]), "lib/other", "v1")
        m.registry.forget_blob(image.layers[1].digest)
        m.cluster.start_all()
        pull = client(m, name, 1)
        failed = pull(reference)
        assert failed.code not in (0, 124), failed
        assert failed.seconds < SOON
        assert_pulled(pull(other))


LIES: dict[str, Callable[[bytes], bytes]] = {
    "other": lambda right: right[:-100] + bytes(100),
    "shorter": lambda right: right[:-100],
    "longer": lambda right: right + bytes(100),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("what", ["blob", "manifest"])
def test_wrong_bytes_from_the_registry_are_never_a_whole_answer(what: str, lie: str) -> None:
    with mirrored(1, more=SETTINGS) as m:
        image, _ = pushed(m)
        it = image.top if what == "manifest" else image.layers[1]
        right = m.registry.images.path(it.digest).read_bytes()
        m.registry.lie(it.digest, LIES[lie](right))
        m.cluster.start_all()
        for _ in range(2):  # neither at first nor from what was kept
            status, body, _ = m.get(1, f"/v2/lib/it/{what}s/{it.digest}?ns={m.registry.name}")
            assert status == 0 or status >= 400, "a complete answer with wrong bytes"
            assert status >= 400 or (len(body) < len(right) and right.startswith(body))
        assert m.cluster.daemons[1].running


@pytest.mark.parametrize("name", CLIENTS)
def test_a_pull_of_wrong_bytes_fails_as_it_would_at_the_registry(name: str) -> None:
    with mirrored(1, more=SETTINGS) as m:
        image, reference = pushed(m)
        right = m.registry.images.path(image.layers[1].digest).read_bytes()
        m.registry.lie(image.layers[1].digest, LIES["other"](right))
        m.cluster.start_all()
        failed = client(m, name, 1)(reference)
        assert failed.code not in (0, 124), failed


@pytest.mark.parametrize("name", CLIENTS)
def test_a_holder_of_the_right_bytes_helps_against_a_registry_that_lies(name: str) -> None:
    with mirrored(2, more=SETTINGS) as m:
        image, reference = held_by_host_1(m)
        layer = image.layers[1]
        m.registry.lie(layer.digest, bytes(layer.size))
        assert_pulled(client(m, name, 2)(reference))


# --- the host ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system with 8 MiB."""
    path = Path(f"/dev/shm/swarm-small-{os.getpid()}")
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(path)], check=True, timeout=10)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=10)
        path.rmdir()


@pytest.mark.parametrize("name", CLIENTS)
def test_a_full_disk_of_the_mirror_does_not_stop_a_pull(name: str, small_disk: Path) -> None:
    """The last `--data-dir` counts; the image is larger than the disk."""
    with mirrored(1, more=SETTINGS) as m:
        image = m.registry.images.image([Layer(MIB, seed=1), Layer(12 * MIB, seed=2)])
        reference = m.registry.push(image, "lib/it", "v1")
        m.cluster.start(1, "--data-dir", str(small_disk)).wait_ready()
        assert_pulled(client(m, name, 1)(reference))
        assert m.cluster.daemons[1].running


def test_a_client_that_stands_still_does_not_hold_up_the_others() -> None:
    with mirrored(1, more=SETTINGS) as m:
        image = m.registry.images.image([Layer(8 * MIB, seed=1)])
        reference = m.registry.push(image, "lib/it", "v1")
        m.cluster.start_all()
        path = m.blob_path("lib/it", image.layers[0].digest)
        slow = m.hosts.popen(1, ["curl", "-s", "-o", "/dev/null", f"http://127.0.0.1:7402{path}"])
        try:
            slow.send_signal(signal.SIGSTOP)
            assert_pulled(m.skopeo(1).pull(reference))
        finally:
            slow.kill()
            slow.wait(10)


# --- what is asked is wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIENTS)
def test_what_is_not_there_is_not_found_soon(name: str) -> None:
    with mirrored(1, more=SETTINGS) as m:
        pushed(m)
        m.cluster.start_all()
        failed = client(m, name, 1)(f"{m.registry.name}/lib/it:nothing")
        assert failed.code not in (0, 124), failed
        assert failed.seconds < SOON


def test_a_registry_that_is_not_allowed_is_not_asked() -> None:
    """No open proxy: a private address that no setting names gets no packet."""
    with mirrored(2, more=SETTINGS) as m:
        m.cluster.start(1).wait_ready()
        m.hosts.count_packets_to(1, "10.77.0.2/32")
        status, body, _ = m.get(1, "/v2/lib/it/manifests/v1?ns=10.77.0.2:5000")
        assert 400 <= status < 500
        assert status != 429
        assert b'"errors"' in body
        assert m.hosts.packets_to(1) == 0
