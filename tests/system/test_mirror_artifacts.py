"""Artifacts that are no images, with clients made for them: any media type goes through the mirror as it is stored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.system.cluster import clean_environment
from tests.system.images import Descriptor, Image
from tests.system.mirrored import MIRROR, Mirrored, assert_pulled, mirrored
from tests.system.registry import Registry

pytestmark = pytest.mark.system

MODEL = "application/vnd.cncf.model"

PARTS = {
    "model.safetensors": (f"{MODEL}.weight.v1.raw", Random(1).randbytes(3_000_000)),
    "config.json": (f"{MODEL}.weight.config.v1.raw", b'{"layers": 2}'),
    "README.md": (f"{MODEL}.doc.v1.raw", b"# A model\n"),
    "anything.bin": ("x-what/ever+else.v0", Random(2).randbytes(500_000)),
    "notes.txt": ("text/plain", b"notes"),
}
"""Files of a ModelPack artifact, and two of types that nobody has registered."""


def pushed(registry: Registry, tag: str) -> Image:
    images = registry.images
    config = images.blob(b'{"descriptor": {"name": "m"}, "modelfs": {"type": "layers"}}', f"{MODEL}.config.v1+json")
    layers: list[tuple[Descriptor, str]] = [(images.blob(body, kind), name) for name, (kind, body) in PARTS.items()]
    manifest_type = "application/vnd.oci.image.manifest.v1+json"
    document = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "artifactType": f"{MODEL}.manifest.v1+json",
        "config": config.as_json(),
        "layers": [{**it.as_json(), "annotations": {"org.opencontainers.image.title": name}} for it, name in layers],
        "annotations": {"org.example.of": "tests"},
    }
    top = images.blob(json.dumps(document).encode(), manifest_type)
    artifact = Image(top, (top,), (config, *(it for it, _ in layers)))
    registry.push(artifact, "team/model", tag)
    return artifact


def oras_pull(m: Mirrored, host: int, tag: str) -> Path:
    """What the `oras` client puts into a directory; a registry behind the mirror is the first part of its path."""
    out = m.work / f"oras{host}"
    target = f"{MIRROR}/{m.registry.name.replace(':', '__')}/team/model:{tag}"
    script = f"import oras.client as o; o.OrasClient(insecure=True).pull(target={target!r}, outdir={str(out)!r})"
    argv = m.hosts.command(host, [sys.executable, "-c", script])
    home = {"HOME": str(m.work), "DOCKER_CONFIG": str(m.work)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env={**clean_environment(), **home})
    assert done.returncode == 0, done.stderr
    return out


def assert_has_all(directory: Path) -> None:
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {name: body for name, (_, body) in PARTS.items()}


def test_an_artifact_of_any_media_types_is_pulled_unchanged_and_costs_the_registry_one_copy() -> None:
    with mirrored(2) as m:
        artifact = pushed(m.registry, "v1")
        m.cluster.start_all()
        assert_has_all(oras_pull(m, 1, "v1"))
        skopeo = m.skopeo(1)
        assert_pulled(skopeo.pull(f"{m.registry.name}/team/model:v1"))
        for blob in artifact.blobs:
            assert skopeo.content(blob.digest).read_bytes() == m.registry.images.path(blob.digest).read_bytes()
        manifest = (skopeo.out / "manifest.json").read_bytes()
        assert manifest == m.registry.images.path(artifact.digest).read_bytes()
        assert m.registry.copies(artifact) == 1
        # The second host costs the registry nothing.
        m.registry.forget()
        assert_has_all(oras_pull(m, 2, "v1"))
        m.cluster.stop()
        assert [it for it in m.registry.requests() if it.method == "GET" and "/blobs/" in it.path] == []
        assert {it.agent.partition("/")[0].lower() for it in m.registry.requests()} == {"swarm"}
