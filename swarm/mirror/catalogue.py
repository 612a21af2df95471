"""What the mirror has learnt from manifests and tags: media types, children and their sizes, and which images came by.

Manifests themselves lie in the store, as any content.  Here is what their bytes do not say, and what must be found without
reading them.  It is kept on disk so that a tag still stands for something when this node starts while its registry is down.
Everything is bounded: clients choose names, and manifests may list whatever they like.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cbor2
import structlog

from swarm.errors import ConfigError
from swarm.mirror.edges import ManifestInfo, MirrorError
from swarm.mirror.paths import Name, parse_name
from swarm.task import MAX_CONTENT_BYTES, Digest

log = structlog.get_logger(__name__)

MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024
"""What registries and clients take at most."""

MAX_CHILDREN: Final = 4096
"""Of one manifest; images have some tens of layers, model artifacts some hundreds of files."""

MAX_SIZES: Final = 65536
MAX_TAGS: Final = 4096
MAX_TYPES: Final = 16384
MAX_FILE_BYTES: Final = 16 * 1024 * 1024

INDEX_TYPES: Final = frozenset(
    {"application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"}
)
DEFAULT_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
DEFAULT_INDEX: Final = "application/vnd.oci.image.index.v1+json"
SIGNED_V1: Final = "application/vnd.docker.distribution.manifest.v1+prettyjws"

_MEDIA_TYPE_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$&^_.+-/")


@dataclass(frozen=True, slots=True)
class Child:
    """What a manifest refers to.

    Attributes:
        elsewhere: It is not to be had from the registry (`urls`: foreign layers), so nobody promises it.
        platform: `os/architecture` of an index entry.
    """

    digest: Digest
    size: int
    media_type: str
    elsewhere: bool = False
    platform: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a manifest.

    Attributes:
        manifests: Of an index.
        blobs: Config and layers.
    """

    media_type: str
    manifests: tuple[Child, ...] = ()
    blobs: tuple[Child, ...] = ()


@dataclass(frozen=True, slots=True)
class Tag:
    """What a tag stood for when the registry was asked last.

    Attributes:
        asked: Wall seconds.
    """

    info: ManifestInfo
    asked: float


def read_manifest(body_untrusted: bytes, media_type: str) -> Contents:
    """What a manifest lists.  One of a kind we do not know lists nothing, and is served as it is.

    Args:
        media_type: As the registry or a parent said; empty where nobody did: then the manifest's own word, or its shape.

    Raises:
        MirrorError: 502, it says to be a manifest and an index at once, which programs read differently.
    """
    try:
        document = json.loads(body_untrusted)
    except (ValueError, RecursionError):
        return Contents(media_type or "application/octet-stream")
    if not isinstance(document, dict):
        return Contents(media_type or "application/octet-stream")
    if "manifests" in document and ("layers" in document or "config" in document):
        raise MirrorError(502, "MANIFEST_INVALID", "the registry's manifest lists both manifests and layers")
    kind = media_type or _own_type(document)
    manifests = [child for entry in _list(document, "manifests") if (child := _child(entry)) is not None]
    described = [document.get("config"), *_list(document, "layers"), *_list(document, "blobs")]
    blobs = [child for entry in described if (child := _child(entry)) is not None]
    return Contents(kind, tuple(manifests[:MAX_CHILDREN]), tuple(blobs[:MAX_CHILDREN]))


def is_media_type(text: str) -> bool:
    """Whether it can be put into a header."""
    return 0 < len(text) <= 255 and _MEDIA_TYPE_CHARACTERS.issuperset(text) and text.count("/") == 1


def _own_type(document: dict[str, Any]) -> str:
    named = document.get("mediaType")
    if isinstance(named, str) and is_media_type(named):
        return named
    if "manifests" in document:
        return DEFAULT_INDEX
    if "fsLayers" in document:
        return SIGNED_V1
    return DEFAULT_MANIFEST


def _list(document: dict[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    return value if isinstance(value, list) else []


def _child(entry_untrusted: Any) -> Child | None:
    if not isinstance(entry_untrusted, dict):
        return None
    size, media_type = entry_untrusted.get("size"), entry_untrusted.get("mediaType")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_CONTENT_BYTES:
        return None
    try:
        digest = Digest.parse(str(entry_untrusted.get("digest")))
    except ConfigError:
        return None
    kind = media_type if isinstance(media_type, str) and is_media_type(media_type) else ""
    platform = entry_untrusted.get("platform")
    where = f"{platform.get('os')}/{platform.get('architecture')}" if isinstance(platform, dict) else ""
    return Child(digest, size, kind, bool(entry_untrusted.get("urls")), where[:64])


class Catalogue:
    """Bounded memory of the above.  `save` writes it; what cannot be read back is forgotten, it can all be learnt again.

    Args:
        path: Where it is kept; `None`: nowhere.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._tags: OrderedDict[tuple[Name, str], Tag] = OrderedDict()
        self._types: OrderedDict[Digest, str] = OrderedDict()
        self._sizes: OrderedDict[Digest, int | None] = OrderedDict()
        self._changed = False
        if path is not None:
            self._load(path)

    # --- tags ---

    def tag(self, name: Name, tag: str) -> Tag | None:
        return self._tags.get((name, tag))

    def note_tag(self, name: Name, tag: str, info: ManifestInfo, asked: float) -> None:
        _put(self._tags, (name, tag), Tag(info, asked), MAX_TAGS)
        self.note_type(info.digest, info.media_type)
        self._changed = True

    def forget_tag(self, name: Name, tag: str) -> None:
        """The registry says there is no such tag (any more)."""
        if self._tags.pop((name, tag), None) is not None:
            self._changed = True

    def images(self) -> list[tuple[Name, str, Tag]]:
        """Every tag known, the latest asked first."""
        rows = [(name, tag, known) for (name, tag), known in self._tags.items()]
        return sorted(rows, key=lambda row: -row[2].asked)

    # --- media types and sizes ---

    def media_type(self, digest: Digest) -> str:
        """As the registry or a parent said; empty if neither did."""
        return self._types.get(digest, "")

    def note_type(self, digest: Digest, media_type: str) -> None:
        if is_media_type(media_type) and self._types.get(digest) != media_type:
            _put(self._types, digest, media_type, MAX_TYPES)
            self._changed = True

    def note_children(self, contents: Contents) -> None:
        for child in contents.manifests:
            if child.media_type:
                self.note_type(child.digest, child.media_type)
        for child in (*contents.manifests, *contents.blobs):
            known = self._sizes.get(child.digest, child.size)
            # Two manifests that differ about one blob: at least one of them lies, so neither is believed.
            _put(self._sizes, child.digest, child.size if known == child.size else None, MAX_SIZES)

    def size(self, digest: Digest) -> int | None:
        """Bytes, as a manifest said."""
        return self._sizes.get(digest)

    def doubt_size(self, digest: Digest) -> None:
        """A download that relied on it failed: from now on the registry is asked."""
        if digest in self._sizes:
            self._sizes[digest] = None

    # --- the file ---

    @property
    def changed(self) -> bool:
        """Whether there is something to save."""
        return self._changed

    def save(self) -> None:
        """Write what is worth keeping over a restart, whole or not at all."""
        if self._path is None or not self._changed:
            return
        tags = [
            [name.registry, name.repository, tag, str(known.info.digest), known.info.media_type, known.info.length, known.asked]
            for (name, tag), known in self._tags.items()
        ]
        types = [[str(digest), media_type] for digest, media_type in self._types.items()]
        temporary = self._path.with_name(self._path.name + ".new")
        try:
            temporary.write_bytes(cbor2.dumps({"version": 1, "tags": tags, "types": types}))
            os.chmod(temporary, 0o600)
            temporary.rename(self._path)
        except OSError as error:
            log.warning("mirror_catalogue_not_saved", reason=error.strerror)
            return
        self._changed = False

    def _load(self, path: Path) -> None:
        try:
            if not path.exists():
                return
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError("too large")
            document = cbor2.loads(path.read_bytes())
            for registry, repository, tag, digest, media_type, length, asked in document["tags"][-MAX_TAGS:]:
                info = ManifestInfo(Digest.parse(digest), str(media_type), int(length))
                self._tags[parse_name(registry, repository), str(tag)] = Tag(info, float(asked))
            for digest, media_type in document["types"][-MAX_TYPES:]:
                self._types[Digest.parse(digest)] = str(media_type)
        except (OSError, ValueError, TypeError, KeyError, ConfigError, MirrorError, cbor2.CBORDecodeError) as error:
            log.warning("mirror_catalogue_unreadable", reason=str(error))
            self._tags.clear()
            self._types.clear()


def _put(table: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > limit:
        table.popitem(last=False)
