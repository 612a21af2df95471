"""What a request below `/hf` names: a file of a repository at a revision, or one of the hub's reading API routes.

Everything here is text from a stranger until `parse_hub_target` returned it.  Paths that go to the hub are written anew from
what was understood, so that the hub cannot read them differently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote, unquote_to_bytes

from swarm.mirror.edges import MirrorError
from swarm.mirror.paths import MAX_TARGET_BYTES, Kind

PREFIX: Final = b"/hf/"

MAX_REVISION_CHARS: Final = 255
MAX_PATH_CHARS: Final = 1024
"""Of a file in its repository; git hosts take less."""

TYPES: Final = frozenset({"models", "datasets", "spaces", "kernels"})
"""What a repository may be.  In paths of files, those of models have no prefix."""

ROUTES: Final = frozenset({"revision", "tree", "refs", "commits", "paths-info"})
"""Below `/api/<type>/<repository>/`: all of what clients read with and nothing that writes, or that hands out tokens for
other storage."""

LISTS: Final = frozenset({"tree", "paths-info"})
"""Whose answers are lists of files."""

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_PART: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_QUERY: Final = re.compile(r"[A-Za-z0-9\-._~!$&'()*+,;=:@/?%\[\]]*")


@dataclass(frozen=True, slots=True)
class HubTarget:
    """A checked request target.

    Attributes:
        kind: `Kind.FILE` or `Kind.API`.
        repository: As in paths of files: `org/name`, `datasets/org/name`; empty where an API route has none.
        revision: Branch, tag or commit; empty where there is none.
        path: Of a file.
        route: Of an API route: its path at the hub, encoded; `word` is which of `ROUTES` it is.
        query: For an API route, as it came.
    """

    kind: Kind
    repository: str = ""
    revision: str = ""
    path: str = ""
    route: str = ""
    word: str = ""
    query: str = ""


def is_commit(revision: str) -> bool:
    """Whether it names one version for ever."""
    return _COMMIT.fullmatch(revision) is not None


def file_route(repository: str, revision: str, path: str) -> str:
    """Where the hub has a file."""
    return f"/{repository}/resolve/{quote(revision, safe='')}/{quote(path)}"


def takes_body(method: str, target_untrusted: bytes) -> bool:
    """Whether a request of this kind may have a body: the one reading route whose question is too long for a URL."""
    return method == "POST" and target_untrusted.startswith(PREFIX + b"api/") and b"/paths-info/" in target_untrusted


def parse_hub_target(target_untrusted: bytes) -> HubTarget:
    """Read the target of a request line that begins with `PREFIX`.

    Raises:
        MirrorError: 400 for what is malformed, 404 for what is no route of ours.
    """
    if len(target_untrusted) > MAX_TARGET_BYTES:
        raise MirrorError(414, "BadRequest", "the request target is too long")
    path, _, query = target_untrusted.removeprefix(PREFIX).partition(b"?")
    segments = path.split(b"/")
    if segments[0] == b"api":
        return _api(segments[1:], _checked_query(query))
    prefix = 1 if segments[0].decode("latin-1") in TYPES - {"models"} else 0
    # A name has a namespace before it, but for some from the first days; so the later of two places counts.
    at = next((prefix + n for n in (2, 1) if segments[prefix + n : prefix + n + 1] == [b"resolve"]), 0)
    if not at or len(segments) < at + 3:
        raise _no_route()
    kind = [segments[0].decode("ascii")] if prefix else []
    repository = "/".join([*kind, *map(_part, segments[prefix:at])])
    return HubTarget(Kind.FILE, repository, _revision(segments[at + 1]), _path(segments[at + 2 :]))


def _api(segments: list[bytes], query: str) -> HubTarget:
    head = segments[0].decode("latin-1") if segments else ""
    if segments == [b"whoami-v2"] or (head in TYPES and len(segments) == 1):
        return HubTarget(Kind.API, route=f"/api/{head}", word=head, query=query)
    if head not in TYPES or len(segments) < 2:
        raise _no_route()
    at = next((n for n in (2, 3) if n < len(segments) and segments[n].decode("latin-1") in ROUTES), len(segments))
    parts = [_part(segment) for segment in segments[1:at]]
    if len(parts) > 2:
        raise _no_route()
    repository = "/".join(parts if head == "models" else [head, *parts])
    route = "/".join(["/api", head, *parts])
    if at == len(segments):
        return HubTarget(Kind.API, repository, route=route, word="info", query=query)
    word, rest = segments[at].decode("ascii"), segments[at + 1 :]
    revision = ""
    if word == "refs":
        if rest:
            raise _no_route()
    elif not rest or (len(rest) > 1 and word != "tree"):
        raise _no_route()
    else:
        revision = _revision(rest[0])
    tail = "".join(f"/{quote(text, safe='')}" for text in ([revision] if revision else []))
    if len(rest) > 1:
        tail += f"/{quote(_path(rest[1:], slashes=True))}"
    return HubTarget(Kind.API, repository, revision, route=f"{route}/{word}{tail}", word=word, query=query)


def _part(raw: bytes) -> str:
    """Namespace or name of a repository."""
    text = raw.decode("latin-1")
    if _PART.fullmatch(text) is None or ".." in text or "--" in text:
        raise MirrorError(400, "BadRequest", "not a valid name of a repository")
    return text


def _revision(raw: bytes) -> str:
    """One segment, in which the slashes of a branch's name are encoded."""
    text = _decoded(raw, slashes=True)
    if len(text) > MAX_REVISION_CHARS:
        raise MirrorError(400, "BadRequest", "the name of the revision is too long")
    return text


def _path(segments: list[bytes], *, slashes: bool = False) -> str:
    """Args:
    slashes: They may be encoded, as clients do in paths of folders.
    """
    text = "/".join(_decoded(segment, slashes=slashes) for segment in segments)
    if len(text) > MAX_PATH_CHARS:
        raise MirrorError(400, "BadRequest", "the path of the file is too long")
    return text


def _decoded(raw: bytes, *, slashes: bool = False) -> str:
    """A segment as text, without what could climb out of its repository, however often it is decoded (SECURITY: T18)."""
    try:
        text = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise MirrorError(400, "BadRequest", "the path is not UTF-8") from None
    again = unquote(text)
    if any(c < " " or c == "\x7f" for c in again) or "\\" in again or again.count("/") > text.count("/"):
        raise MirrorError(400, "BadRequest", "control characters and backslashes are not part of any path")
    if any(part in ("", ".", "..") for part in again.split("/")) or ("/" in text and not slashes):
        raise MirrorError(400, "BadRequest", "empty and dot segments are not part of any path")
    return text


def _checked_query(raw: bytes) -> str:
    text = raw.decode("latin-1")
    if _QUERY.fullmatch(text) is None:
        raise MirrorError(400, "BadRequest", "the query has characters that must be percent-encoded")
    return text


def _no_route() -> MirrorError:
    return MirrorError(404, "NotFound", "no such route: the mirror reads files and lists of repositories, nothing else")
