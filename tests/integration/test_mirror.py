"""The mirror of real daemons: pulls through it, from one another, over a restart, and while their registry is gone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.integration.node import TIMEOUT, Daemon, Origin, swarm

LAYERS = [Random(seed).randbytes(size) for seed, size in enumerate((1_500_000, 3_000_000, 40_000))]
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def descriptor(content: bytes) -> dict[str, Any]:
    return {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest_of(content), "size": len(content)}


MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": descriptor(LAYERS[2]),
        "layers": [descriptor(layer) for layer in LAYERS[:2]],
    }
).encode()


class Registry(Origin):
    """A web server laid out as a registry."""

    def __init__(self) -> None:
        files = {f"/v2/lib/app/blobs/{digest_of(layer)}": layer for layer in LAYERS}
        files |= {f"/v2/lib/app/manifests/{reference}": MANIFEST for reference in ("v1", digest_of(MANIFEST))}
        super().__init__(files)
        plain = self._server.RequestHandlerClass

        class Typed(plain):  # type: ignore[misc, valid-type]  # whatever class it is
            def end_headers(self) -> None:
                kind = MANIFEST_TYPE if "/manifests/" in self.path else "application/octet-stream"
                self.send_header("Content-Type", kind)
                super().end_headers()

        self._server.RequestHandlerClass = Typed

    @property
    def name(self) -> str:
        return self.url("").removeprefix("http://")

    def configuration(self, directory: Path) -> Path:
        path = directory / "swarm.toml"
        path.write_text(f'[mirror.registry."{self.name}"]\nendpoint = "{self.url("")}"\n')
        return path

    def bodies(self) -> list[str]:
        """Blobs that were read."""
        return [path for method, path, _ in self.requests if method == "GET" and "/blobs/" in path]


@pytest.fixture
def registry() -> Iterator[Registry]:
    running = Registry()
    with running:
        yield running


def start(path: Path, registry: Registry, *options: str, http: str = "off", **more: str) -> Daemon:
    config = registry.configuration(path.parent)
    return Daemon(path, "--config", str(config), "--mirror", "127.0.0.1:0", *options, http=http, **more)


def get(daemon: Daemon, path: str, registry: Registry, **headers: str) -> tuple[int, bytes]:
    url = f"http://{daemon.status['mirror']}/v2/lib/app/{path}?ns={registry.name.replace(':', '%3A')}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def said(daemon: Daemon, event: str) -> dict[str, Any]:
    """The first such line of its log, which may come a moment after the client's last byte."""
    until = time.monotonic() + TIMEOUT
    while not (lines := [line for line in daemon.lines() if line["event"] == event]):
        assert time.monotonic() < until, daemon.log.read_text()
        time.sleep(0.02)
    return lines[0]


def pull(daemon: Daemon, registry: Registry) -> None:
    """As a runtime does; everything is compared."""
    assert get(daemon, "manifests/v1", registry) == (200, MANIFEST)
    assert get(daemon, f"manifests/{digest_of(MANIFEST)}", registry) == (200, MANIFEST)
    for layer in LAYERS:
        assert get(daemon, f"blobs/{digest_of(layer)}", registry) == (200, layer)


def test_the_second_node_gets_from_the_first_and_the_registry_is_read_once(tmp_path: Path, registry: Registry) -> None:
    with start(tmp_path / "a", registry) as first, start(tmp_path / "b", registry, "--join", first.control) as second:
        pull(first, registry)
        read = registry.bodies()
        pull(second, registry)
        assert registry.bodies() == read
        pulled = said(second, "pulled")
        assert (pulled["from_origin"], pulled["from_peers"]) == (0, sum(map(len, LAYERS)))
        assert pulled["image"] == f"{registry.name}/lib/app:v1"


def test_a_node_that_was_restarted_serves_while_the_registry_is_gone(tmp_path: Path, registry: Registry) -> None:
    with start(tmp_path / "a", registry) as first:
        pull(first, registry)
        assert first.stop() == 0
    more = {"SWARM_MIRROR_REGISTRY_TIMEOUT": "0.5", "SWARM_MIRROR_TAG_CACHE": "0"}
    with start(tmp_path / "a", registry, **more) as again:
        registry.statuses = dict.fromkeys([*registry.files, "/v2/lib/app/manifests/other"], 503)
        pull(again, registry)
        assert get(again, "manifests/other", registry)[0] in (502, 504)
        assert said(again, "mirror_tag_stale")["level"] == "warning"


def test_a_client_gets_what_it_was_promised_before_the_node_stops(tmp_path: Path, registry: Registry) -> None:
    content = Random(9).randbytes(30_000_000)
    path = f"blobs/{digest_of(content)}"
    registry.files[f"/v2/lib/app/{path}"] = content
    with start(tmp_path / "a", registry) as daemon:
        assert get(daemon, path, registry)[0] == 200
        host, port = daemon.status["mirror"].rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            client.sendall(f"GET /v2/lib/app/{path}?ns={registry.name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            got = bytearray(client.recv(65536))
            stopping = threading.Thread(target=daemon.stop)
            stopping.start()
            until = time.monotonic() + TIMEOUT
            while not any(line["event"] == "stopping" for line in daemon.lines()) and time.monotonic() < until:
                stopping.join(0.05)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((host, int(port)), timeout=2)
            while part := client.recv(1 << 20):
                got += part
        stopping.join(TIMEOUT)
        assert daemon.process.returncode == 0
        assert got.partition(b"\r\n\r\n")[2] == content


def test_an_image_is_pulled_and_listed_from_the_command_line(tmp_path: Path, registry: Registry) -> None:
    with start(tmp_path / "a", registry) as daemon:
        pulled = swarm("image", "pull", f"{registry.name}/lib/app:v1", "--json", "--data-dir", daemon.data_dir)
        result = json.loads(pulled.stdout)
        assert (result["digest"], result["from_origin"]) == (digest_of(MANIFEST), sum(map(len, LAYERS)))
        listed = json.loads(swarm("image", "ls", "--json", "--data-dir", daemon.data_dir).stdout)
        assert [(row["image"], row["blobs_here"]) for row in listed] == [(f"{registry.name}/lib/app:v1", 3)]
        missing = swarm("image", "pull", f"{registry.name}/lib/app:nosuch", "--data-dir", daemon.data_dir)
        assert missing.returncode == 4
        assert "no such manifest" in missing.stderr


def test_without_a_mirror_that_is_what_a_pull_says(tmp_path: Path) -> None:
    with Daemon(tmp_path / "a") as daemon:
        refused = swarm("image", "pull", "alpine", "--data-dir", daemon.data_dir)
        assert refused.returncode == 2
        assert "--mirror" in refused.stderr


def test_a_port_in_use_is_said_at_start(tmp_path: Path) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AssertionError, match="the mirror cannot listen on"):
            Daemon(tmp_path / "a", "--mirror", f"127.0.0.1:{port}")


def test_metrics_say_what_the_mirror_gave_and_saved(tmp_path: Path, registry: Registry) -> None:
    with start(tmp_path / "a", registry, http="127.0.0.1:0") as daemon:
        for _ in range(2):
            pull(daemon, registry)
        get(daemon, "manifests/v1", registry)  # what was counted last was counted before this is answered
        with urllib.request.urlopen(f"http://{daemon.status['http']}/metrics", timeout=TIMEOUT) as answer:
            page = answer.read().decode()
        values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        size = float(sum(map(len, LAYERS)))
        for source in ("origin", "store"):
            row = f'swarm_mirror_sent_bytes_total{{registry="{registry.name}",source="{source}"}}'
            assert float(values[row]) == size
        assert float(values[f'swarm_mirror_saved_bytes_total{{registry="{registry.name}"}}']) == size
        assert float(values["swarm_mirror_first_byte_seconds_count"]) == 6
