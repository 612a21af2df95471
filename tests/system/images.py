"""Images made here: layers of given sizes, the same bytes for the same seed, as OCI or as Docker's schema 2.

A layer is a gzipped tar of files of mixed sizes, part of them random and part repetitive text, so that a client unpacks
it at the pace of a real one.  Blobs lie in one directory under their digests; a registry links them into its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, Final

MIB: Final = 1 << 20
_EPOCH: Final = "1970-01-01T00:00:00Z"
_FILE_SIZES: Final = (4 << 10, 64 << 10, MIB, 8 * MIB)


class Kind(Enum):
    """Whose media types a manifest uses: those of manifest, index, configuration and layer."""

    OCI = (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.oci.image.layer.v1.tar+gzip",
    )
    DOCKER = (
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.container.image.v1+json",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
    )

    @property
    def manifest(self) -> str:
        return self.value[0]

    @property
    def index(self) -> str:
        return self.value[1]

    @property
    def config(self) -> str:
        return self.value[2]

    @property
    def layer(self) -> str:
        return self.value[3]


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer is made of; equal ones have equal bytes.

    Attributes:
        size: Bytes of its files, before compression.
        random_share: About how much of them does not compress; 1.0 makes the blob about `size` long.
    """

    size: int
    seed: int = 1
    random_share: float = 1.0


@dataclass(frozen=True, slots=True)
class Descriptor:
    digest: str
    size: int
    media_type: str

    def as_json(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True, slots=True)
class Image:
    """An image or an index of images.

    Attributes:
        top: What a tag names.
        manifests: `top` and, of an index, every manifest in it.
        blobs: Configurations and layers, each once.
    """

    top: Descriptor
    manifests: tuple[Descriptor, ...]
    blobs: tuple[Descriptor, ...]
    architecture: str = "amd64"

    @property
    def digest(self) -> str:
        return self.top.digest

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        return tuple(it for it in self.blobs if "config" not in it.media_type and "container.image" not in it.media_type)

    @property
    def size(self) -> int:
        """Bytes of everything."""
        return sum(it.size for it in (*self.manifests, *self.blobs))


class Images:
    """Makes images; their blobs go to `directory`, which whoever made it removes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._made: dict[Layer, tuple[str, int, str]] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self.directory / digest.replace(":", "-")

    def image(
        self, layers: Sequence[Layer], kind: Kind = Kind.OCI, *, architecture: str = "amd64", labels: Mapping[str, str] = {}
    ) -> Image:
        """One image; with other `labels` the same layers make another one."""
        made = [self._layer(layer) for layer in layers]
        config = {
            "created": _EPOCH,
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["/bin/true"], "Labels": dict(labels)},
            "rootfs": {"type": "layers", "diff_ids": [diff for _, _, diff in made]},
            "history": [{"created": _EPOCH, "created_by": f"layer {n}"} for n in range(len(made))],
        }
        described = [Descriptor(digest, size, kind.layer) for digest, size, _ in made]
        return self.artifact(self.blob(_json(config), kind.config), described, kind, architecture=architecture)

    def artifact(
        self,
        config: Descriptor,
        layers: Sequence[Descriptor],
        kind: Kind = Kind.OCI,
        *,
        architecture: str = "amd64",
        **fields: Any,
    ) -> Image:
        """A manifest over any blobs, with further `fields` such as ``artifactType``."""
        body = {
            "schemaVersion": 2,
            "mediaType": kind.manifest,
            "config": config.as_json(),
            "layers": [it.as_json() for it in layers],
            **fields,
        }
        top = self.blob(_json(body), kind.manifest)
        return Image(top, (top,), tuple(dict.fromkeys((config, *layers))), architecture)

    def index(self, images: Sequence[Image], kind: Kind = Kind.OCI) -> Image:
        """An index (or manifest list) of images; indexes may be nested."""
        body = {
            "schemaVersion": 2,
            "mediaType": kind.index,
            "manifests": [{**it.top.as_json(), "platform": {"architecture": it.architecture, "os": "linux"}} for it in images],
        }
        top = self.blob(_json(body), kind.index)
        manifests = dict.fromkeys(inner for it in images for inner in it.manifests)
        return Image(top, (top, *manifests), tuple(dict.fromkeys(blob for it in images for blob in it.blobs)))

    def blob(self, content: bytes, media_type: str, algorithm: str = "sha256") -> Descriptor:
        """Keep any bytes as a blob."""
        digest = f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"
        self.path(digest).write_bytes(content)
        return Descriptor(digest, len(content), media_type)

    def _layer(self, layer: Layer) -> tuple[str, int, str]:
        if layer not in self._made:
            path = self.directory / "layer.part"
            with path.open("wb") as file:
                digest, size, diff = _write_layer(layer, file)
            path.rename(self.path(digest))
            self._made[layer] = digest, size, diff
        return self._made[layer]


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


class _Gzip:
    """A file that compresses what `tarfile` writes and hashes both sides; `gzip.GzipFile` would hash only neither."""

    def __init__(self, file: BinaryIO, level: int) -> None:
        self._file = file
        self._compress = zlib.compressobj(level, zlib.DEFLATED, 31)
        self._compressed, self._plain = hashlib.sha256(), hashlib.sha256()

    def write(self, content: bytes) -> int:
        self._plain.update(content)
        self._put(self._compress.compress(content))
        return len(content)

    def _put(self, content: bytes) -> None:
        self._compressed.update(content)
        self._file.write(content)

    def end(self) -> tuple[str, str]:
        """Digests of the compressed bytes and of the plain ones."""
        self._put(self._compress.flush())
        return f"sha256:{self._compressed.hexdigest()}", f"sha256:{self._plain.hexdigest()}"


def _write_layer(layer: Layer, file: BinaryIO) -> tuple[str, int, str]:
    """Returns digest and size of the blob, and the digest of the tar."""
    source = random.Random(f"{layer.size} {layer.seed}")
    # Random bytes do not compress: storing them saves the time of finding out.
    gzip = _Gzip(file, 0 if layer.random_share >= 1 else 1)
    left, unpredictable = layer.size, 0.0
    with tarfile.open(fileobj=gzip, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]  # it only writes
        number = 0
        while left:
            size = min(left, source.choice(_FILE_SIZES))
            entry = tarfile.TarInfo(f"usr/lib/app{layer.seed}/{number // 64:03d}/f{number:05d}.bin")
            entry.size, entry.mtime, entry.mode = size, 0, 0o644
            unpredictable += size * layer.random_share
            compresses = unpredictable < size / 2
            tar.addfile(entry, io.BytesIO(_text(source, size) if compresses else source.randbytes(size)))
            unpredictable -= 0 if compresses else size
            left -= size
            number += 1
    digest, diff = gzip.end()
    return digest, file.tell(), diff


def _text(source: random.Random, size: int) -> bytes:
    words = b" ".join(b"%x" % source.getrandbits(24) for _ in range(512)) + b"\n"
    return (words * (size // len(words) + 1))[:size]
