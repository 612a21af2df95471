"""Asking a Hugging Face hub for clients of the mirror: which content a file is, who may read it, and what its API says.

Participants: a client, perhaps with a token for the hub; the hub, believed about its own repositories; the storage it
redirects to, which is asked for bytes and nothing else.  What is said here is bounded in size and time, and each request
carries the token of whoever it is made for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import trio

from swarm.config import MirrorSettings
from swarm.edges import Source
from swarm.errors import NotFoundAtOrigin, OriginError, OriginUnreachable
from swarm.mirror.access import ANONYMOUS, Asker
from swarm.mirror.credentials import of_client
from swarm.mirror.edges import MirrorDenied
from swarm.mirror.hub_paths import LISTS, HubTarget, file_route, is_commit
from swarm.mirror.listed import Listed, endpoint_of
from swarm.mirror.paths import ClientCredentials, Name, parse_registry
from swarm.mirror.rights import Rights
from swarm.mirror.tokens import Asks
from swarm.origin.answers import Answer, Headers
from swarm.task import MAX_CONTENT_BYTES, Digest

MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
"""Of an API route: what is said of a repository with a hundred thousand files, all in one answer."""

MAX_LIST_BYTES: Final = 4 * 1024 * 1024
"""Of a page of a list, which is read as JSON and takes ten times that; pages have a thousand entries."""

MAX_LEARNT: Final = 2000
"""Files of one list that are remembered; a page has a thousand."""

MAX_HOPS: Final = 5
"""Redirects on the hub itself: of renamed repositories, and to where it keeps small files."""

MAX_REFUSALS: Final = 4096
MAX_PLACES: Final = 4096
"""Files asked about lately; each is noted before anything is asked about it."""

MAX_WORDS_CHARS: Final = 512
UNKNOWN_READER: Final = "Invalid credentials in Authorization header"
"""What the hub says of a token that it does not know; any other 401 is about the repository."""

SILENT_SECONDS: Final = 3.0
"""A hub that gave no answer is not waited for again so long: one download asks for many files, and waits for their sum."""

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_NO: Final = frozenset({400, 401, 403, 404, 410, 429})
"""429 is an answer here: somebody else's token may have room left."""

_ETAG: Final = re.compile(r'(?:W/)?"?([A-Za-z0-9_.:+/=-]{1,128})"?', re.ASCII)
_LENGTH: Final = re.compile(r"[0-9]{1,16}", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_GIT: Final = re.compile(r"[0-9a-f]{40}")
_CODE: Final = re.compile(r"[A-Za-z]{1,64}", re.ASCII)
_LINK: Final = re.compile(r'<([^<>\s]{1,8192})>\s*;\s*rel="?next"?', re.ASCII)
_TYPE: Final = re.compile(r"[A-Za-z0-9.+-]{1,64}/[A-Za-z0-9.+-]{1,64}(; ?charset=[A-Za-z0-9-]{1,32})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What the hub says a file of a commit is.

    Attributes:
        etag: SHA-256 of what is in large file storage, git's id of anything else; without quotes.
        size: Bytes; `None` where the hub does not say.
    """

    commit: str
    etag: str
    size: int | None

    @property
    def digest(self) -> Digest | None:
        """By which its content is found and checked."""
        return Digest("sha256", self.etag) if _SHA256.fullmatch(self.etag) else None

    @property
    def is_git(self) -> bool:
        return _GIT.fullmatch(self.etag) is not None

    def identity(self, name: Name, path: str) -> Digest:
        """What a right to it is remembered by: its digest, or one made up from where it is."""
        where = f"{name}\0{self.commit}\0{path}\0{self.etag}".encode()
        return self.digest or Digest("sha256", hashlib.sha256(b"swarm/hub\0" + where).hexdigest())


@dataclass(frozen=True, slots=True)
class ApiAnswer:
    """What an API route answered.

    Attributes:
        next_page: Path at the hub and query of the page that follows; empty at the last.
        commit: `X-Repo-Commit`, where the answer is of one.
        files: Of a list of one commit, the first `MAX_LEARNT`.
    """

    body: bytes
    content_type: str
    next_page: str = ""
    commit: str = ""
    files: tuple[tuple[str, FileInfo], ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """The hub's no, in its own words, by which its clients tell what is wrong.

    Attributes:
        commit: Which one does not have a file; clients remember that.
    """

    status: int
    code: str
    message: str
    commit: str = ""

    def __str__(self) -> str:
        return self.message or self.code or f"the hub answers {self.status}"


class HubDenied(MirrorDenied):
    """401 or 403 of the hub."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.status, refusal.code, str(refusal))
        self.refusal = refusal


class HubMissing(NotFoundAtOrigin):
    """400, 404 or 410 of the hub: no such repository, revision or file."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal

    @property
    def hides(self) -> bool:
        """Whether it may be there for somebody else."""
        return self.refusal.code not in ("EntryNotFound", "RevisionNotFound")


@dataclass(frozen=True, slots=True)
class TokenOf:
    """An `edges.Authorization`: one asker's token, to the hub only."""

    asker: Asker

    async def headers(self) -> tuple[tuple[str, str], ...]:
        credential = self.asker.credential
        return () if credential is None else (("Authorization", credential.header),)

    def refused(self, headers: tuple[tuple[str, str], ...], challenges: tuple[str, ...]) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Place:
    """Where an identity was found."""

    name: Name
    path: str
    info: FileInfo


class Hub:
    """The hub that `mirror.huggingface` names; what `Authorizer` asks about rights to its files.

    Attributes:
        host: `host[:port]`, its name among registries.
        rights: What it said about rights.
    """

    def __init__(self, settings: MirrorSettings, origin: Asks) -> None:
        self._base = settings.huggingface.rstrip("/")
        endpoint = endpoint_of(self._base)
        self._site = (endpoint.scheme, endpoint.place)
        self.host = parse_registry(urlsplit(self._base).netloc)
        self._listed = Listed.read(settings)
        self._origin = origin
        self._seconds = settings.registry_timeout
        self._rights_seconds = settings.rights_cache
        self.rights = Rights(settings.rights_stale)
        self._places: OrderedDict[tuple[Name, Digest], Place] = OrderedDict()
        self._latest: OrderedDict[Digest, Place] = OrderedDict()
        self._refusals: OrderedDict[tuple[Name, bytes, int], Refusal] = OrderedDict()
        self._silent_until = 0.0

    # --- what `Authorizer` asks -----------------------------------------------------------------------------------

    def trusts(self, registry: str) -> bool:
        """A hub is only asked where the configuration names it."""
        return True

    def mode(self, name: Name) -> str:
        """`auto`, `public`, `verify` or `never`; a registry's table of the hub's name sets it by repository."""
        return self._listed.rights(name)

    def asker(self, name: Name, client: ClientCredentials | None) -> Asker:
        """The client with its token, or nobody in particular: the node has none of its own.

        Raises:
            MirrorError: 401, what the client showed is malformed.
        """
        credential = of_client(client)
        passes = self._listed.settings(name.registry).pass_credentials
        return Asker.client(credential) if credential is not None and passes else ANONYMOUS

    def denied(self, name: Name, asker: Asker, status: int = 401) -> MirrorDenied:
        return HubDenied(self._refusal(name, asker, status))

    def refusal(self, name: Name, asker: Asker, status: int, what: str) -> OriginError | MirrorDenied:
        refusal = self._refusal(name, asker, status)
        return HubDenied(refusal) if status in (401, 403) else HubMissing(refusal)

    def _refusal(self, name: Name, asker: Asker, status: int) -> Refusal:
        words = {401: "RepoNotFound", 404: "EntryNotFound"}
        return self._refusals.get((name, asker.tag, status)) or Refusal(status, words.get(status, ""), "")

    async def may_read(self, name: Name, digest: Digest, asker: Asker, *, manifest: bool | None = None) -> None:
        """Ask whether this asker may read what was found under `digest` (an identity) before.

        Raises:
            HubDenied, HubMissing: It may not, or it is something else now.
            OriginError, NotPermitted: The hub cannot be asked.
        """
        place = self._places.get((name, digest))
        if place is None:
            raise NotFoundAtOrigin("forgotten which file this is; ask again")
        try:
            info = await self.file(name, place.info.commit, place.path, asker)
        except (HubDenied, HubMissing) as error:
            self.rights.note(name, digest, asker.tag, error.refusal.status, trio.current_time(), self._rights_seconds)
            raise
        if info.identity(name, place.path) != digest:
            raise OriginError(f"{self.host} answers with another file than before under the same commit of {name.repository}")

    def note_place(self, name: Name, path: str, info: FileInfo) -> Digest:
        """Remember where an identity is, for `may_read`."""
        identity, place = info.identity(name, path), Place(name, path, info)
        _put(self._places, (name, identity), place, MAX_PLACES)
        _put(self._latest, identity, place, MAX_PLACES)
        return identity

    def place_of(self, identity: Digest) -> Place | None:
        """Where it was found last; there is but one place for what is no digest."""
        return self._latest.get(identity)

    # --- files ----------------------------------------------------------------------------------------------------

    async def file(self, name: Name, revision: str, path: str, asker: Asker) -> FileInfo:
        """What a file is, by HEAD; that `asker` may read it is remembered with it.

        Raises:
            HubDenied, HubMissing: As the hub says.
            OriginError, NotPermitted: It cannot be asked, or says something that no hub says.
        """
        url = self._base + file_route(name.repository, revision, path)
        answer, found = await self._follow(url, asker)
        if answer.status in _NO:
            raise self._noted(name, asker, answer)
        info = self._info(answer, found)
        if is_commit(revision) and info.commit != revision:
            raise OriginError(f"{self.host} answers with commit {info.commit} where {revision} was asked for")
        identity = self.note_place(name, path, info)
        self.rights.note(name, identity, asker.tag, 200, trio.current_time(), self._rights_seconds)
        return info

    async def _follow(self, url: str, asker: Asker) -> tuple[Answer, dict[str, str]]:
        """The last answer of the hub itself, and what all of them said in headers of its own."""
        found: dict[str, str] = {}
        for _ in range(MAX_HOPS + 1):
            answer = await self._ask(Source(url, (), "mirror", TokenOf(asker)), "HEAD", _NO | _REDIRECTS | {200})
            found |= {key: value for key, value in answer.headers.items() if key.startswith("x-")}
            there = self._on_site(url, answer) if answer.status in _REDIRECTS else ""
            if not there:
                return answer, found
            url = there
        raise OriginError(f"{self.host} redirects more than {MAX_HOPS} times")

    def _on_site(self, url: str, answer: Answer) -> str:
        """Where a redirect leads, if that is the hub again; storage has nothing to say about a file."""
        try:
            there = urljoin(url, answer.headers.get("location", ""))
            endpoint = endpoint_of(there)
        except ValueError:
            return ""
        return there if there != url and (endpoint.scheme, endpoint.place) == self._site else ""

    def _info(self, answer: Answer, found: Headers) -> FileInfo:
        commit = found.get("x-repo-commit", "")
        etag = _ETAG.fullmatch((found.get("x-linked-etag") or answer.headers.get("etag", "")).strip())
        if not is_commit(commit) or etag is None:
            raise OriginError(f"{self.host} does not say which commit or content a file is; it is no hub")
        length = found.get("x-linked-size") or (answer.headers.get("content-length", "") if answer.status == 200 else "")
        if length and not (_LENGTH.fullmatch(length) and int(length) <= MAX_CONTENT_BYTES):
            raise OriginError(f"{self.host} says that a file has {length[:40]!r} bytes")
        size = int(length) if length else None
        return FileInfo(commit, etag[1], size)

    def url(self, name: Name, info: FileInfo, path: str) -> str:
        """Where this version of a file is, for ever."""
        return self._base + file_route(name.repository, info.commit, path)

    def source(self, name: Name, info: FileInfo, path: str, asker: Asker) -> Source:
        """Where the content is read; with the token of an asker that needs one."""
        url = self.url(name, info, path)
        return Source(url, requester="mirror", authorization=TokenOf(asker) if not asker.is_anonymous else None)

    async def read(self, source: Source, max_bytes: int) -> bytes:
        """A small file, past the swarm.

        Raises:
            OriginError, NotPermitted: As `edges.Origin`.
        """
        return (await self._ask(source, "GET", frozenset({200}), max_bytes)).body

    # --- API ------------------------------------------------------------------------------------------------------

    async def api(self, name: Name, target: HubTarget, body: bytes, asker: Asker) -> ApiAnswer:
        """What a reading API route says, without what would lead a client past the mirror.

        Raises:
            HubDenied, HubMissing: As the hub says.
            OriginError, NotPermitted: It cannot be asked, or its answer cannot be used.
        """
        url = self._base + target.route + (f"?{target.query}" if target.query else "")
        method = "POST" if body else "GET"
        max_bytes = MAX_LIST_BYTES if target.word in LISTS else MAX_ANSWER_BYTES
        for _ in range(MAX_HOPS + 1):
            source = Source(url, (("Accept", "application/json"),), "mirror", TokenOf(asker))
            answer = await self._ask(source, method, _NO | _REDIRECTS | {200}, max_bytes, body)
            there = self._on_site(url, answer) if answer.status in _REDIRECTS else ""
            if not there:
                break
            url = there
        if answer.status in _NO:
            raise self._noted(name, asker, answer)
        if answer.status != 200:
            raise OriginError(f"{self.host} redirects away from itself, or in circles")
        content_type, commit = answer.headers.get("content-type", ""), answer.headers.get("x-repo-commit", "")
        commit = commit if is_commit(commit) else target.revision if is_commit(target.revision) else ""
        found: bytes = answer.body
        files: tuple[tuple[str, FileInfo], ...] = ()
        if target.word in LISTS:
            found, files = await trio.to_thread.run_sync(_read_list, answer.body, commit)
        return ApiAnswer(
            found,
            content_type if _TYPE.fullmatch(content_type) else "application/json",
            self._next_page(answer.headers.get("link", ""), url),
            commit,
            files,
        )

    def _next_page(self, link_untrusted: str, url: str) -> str:
        """The route of the page after this one.

        Raises:
            OriginError: It is elsewhere: a list that ended there would look complete.
        """
        match = _LINK.search(link_untrusted)
        if match is None:
            return ""
        try:
            there = urljoin(url, match[1])
            endpoint, parts = endpoint_of(there), urlsplit(there)
        except ValueError:
            endpoint = None
        if endpoint is None or (endpoint.scheme, endpoint.place) != self._site or parts.path != urlsplit(url).path:
            raise OriginError(f"{self.host} has the next page of a list elsewhere")
        return f"{parts.path.removeprefix(urlsplit(self._base).path)}?{parts.query}"

    # --- asking ---------------------------------------------------------------------------------------------------

    async def _ask(self, source: Source, method: str, accept: frozenset[int], max_bytes: int = 0, form: bytes = b"") -> Answer:
        if trio.current_time() < self._silent_until:
            raise OriginUnreachable(f"{self.host} gave no answer just now")
        try:
            with trio.fail_after(self._seconds):
                return await self._origin.ask(source, method, accept=accept, max_bytes=max_bytes, form=form)
        except trio.TooSlowError as error:
            self._silent_until = trio.current_time() + SILENT_SECONDS
            raise OriginUnreachable(f"{self.host} gave no answer within {self._seconds:g} s") from error
        except OriginUnreachable:
            self._silent_until = trio.current_time() + SILENT_SECONDS
            raise

    def _noted(self, name: Name, asker: Asker, answer: Answer) -> HubDenied | HubMissing | OriginUnreachable:
        if answer.status == 429:
            return OriginUnreachable(f"{self.host} wants fewer requests (429)")
        code, message = answer.headers.get("x-error-code", ""), answer.headers.get("x-error-message", "")
        if not code and answer.status == 401 and message != UNKNOWN_READER:
            code = "RepoNotFound"  # clients of a hub behind TLS take it so; of a mirror without, they must be told
        refusal = Refusal(
            404 if answer.status == 410 else answer.status,
            code if _CODE.fullmatch(code) else "",
            message[:MAX_WORDS_CHARS],
            commit if is_commit(commit := answer.headers.get("x-repo-commit", "")) else "",
        )
        _put(self._refusals, (name, asker.tag, refusal.status), refusal, MAX_REFUSALS)
        return HubDenied(refusal) if answer.status in (401, 403) else HubMissing(refusal)


def _read_list(body_untrusted: bytes, commit: str) -> tuple[bytes, tuple[tuple[str, FileInfo], ...]]:
    """A list of files without Xet hashes (with them, clients would fetch from Xet storage and not ask for the file at all),
    and what it says of files, where it is of one commit.

    Raises:
        OriginError: It is no list.
    """
    try:
        entries = json.loads(body_untrusted)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise OriginError("the hub answers with something else than a list of files")
    for entry in entries:
        entry.pop("xetHash", None)
    learnt = (_file_of(entry, commit) for entry in entries[: MAX_LEARNT if commit else 0])
    return json.dumps(entries, separators=(",", ":")).encode(), tuple(it for it in learnt if it is not None)


def _file_of(entry_untrusted: dict[str, Any], commit: str) -> tuple[str, FileInfo] | None:
    """Path and content of a list's entry; `None` for folders, and for what is not understood."""
    path, oid, size, lfs = (entry_untrusted.get(key) for key in ("path", "oid", "size", "lfs"))
    if isinstance(lfs, dict):
        oid, size = lfs.get("oid"), lfs.get("size", size)
    pattern = _SHA256 if isinstance(lfs, dict) else _GIT
    if entry_untrusted.get("type") != "file" or not isinstance(path, str) or not isinstance(oid, str):
        return None
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MAX_CONTENT_BYTES:
        return None
    return (path, FileInfo(commit, oid, size)) if pattern.fullmatch(oid) else None


def _put(table: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > limit:
        table.popitem(last=False)
