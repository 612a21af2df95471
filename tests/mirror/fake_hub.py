"""A stand-in for a Hugging Face hub and its storage: the routes that clients read with, and what they answer.

Knows no socket: `serve` and `storage` are asked by servers in memory (`hub_desk`) and by real ones (`tests.system.hub`).
Files end up in large file storage by their suffix; the hub redirects to storage at another place, with a URL signed for some
seconds, and keeps the rest itself behind a redirect to another path.  Everything it says of large files names Xet storage as
well, which nothing here can read: who follows that gets nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

LARGE: Final = (".safetensors", ".bin", ".parquet")
SIGNED_SECONDS: Final = 3600.0


@lru_cache(maxsize=4096)
def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@lru_cache(maxsize=4096)
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


@dataclass(frozen=True, slots=True)
class HubReply:
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Repository:
    """Attributes:
    readers: Tokens that may read it; `None`: everybody.
    gated: Everybody sees that it is there and what is in it; its files are for `readers`.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    readers: set[str] | None = None
    gated: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """A request, as the hub or its storage saw it."""

    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def token(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")


@dataclass
class FakeHub:
    """Attributes:
    base: Its URL, where links and redirects lead.
    storage_base: Of its storage, another place.
    page: Entries of a list in one answer.
    sent: Bytes of contents, by path at the hub or digest in storage.
    lies: Bytes sent instead of the right ones, by path of the file.
    says: Headers that replace those of a file's answers, by path of the file.
    """

    base: str = "http://hub.example"
    storage_base: str = "http://cdn.example"
    repositories: dict[str, Repository] = field(default_factory=dict)
    page: int = 1000
    signed_seconds: float = SIGNED_SECONDS
    asked: list[Question] = field(default_factory=list)
    stored: list[Question] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    lies: dict[str, bytes] = field(default_factory=dict)
    says: dict[str, dict[str, str]] = field(default_factory=dict)
    key: bytes = b"storage"
    limits_strangers: bool = False
    """Answers 429 to who shows no token."""
    names: dict[str, str] = field(default_factory=dict)
    """Of renamed repositories: old to new."""

    # --- what a test puts in --------------------------------------------------------------------------------------

    def push(
        self,
        repository: str,
        files: Mapping[str, bytes],
        *refs: str,
        readers: set[str] | None = None,
        gated: bool = False,
    ) -> str:
        """A commit with these files, which `main` and other refs become; its id."""
        found = self.repositories.setdefault(repository, Repository())
        seed = repr([repository, len(found.commits), sorted((path, git_id(body)) for path, body in files.items())])
        commit = hashlib.sha1(seed.encode(), usedforsecurity=False).hexdigest()
        found.commits[commit] = dict(files)
        found.refs |= dict.fromkeys(("main", *refs), commit)
        found.readers, found.gated = readers, gated
        return commit

    def count(self, what: str) -> int:
        """Questions to the hub that begin so."""
        return sum(f"{it.method} {it.path}".startswith(what) for it in self.asked)

    def bodies(self) -> int:
        """Bytes of contents sent, in all."""
        return sum(self.sent.values())

    # --- the hub --------------------------------------------------------------------------------------------------

    def serve(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"", now: float = 0.0) -> HubReply:
        path, _, query = target.partition("?")
        question = Question(method, path, headers)
        self.asked.append(question)
        if self.limits_strangers and not question.token:
            return HubReply(429)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "api":
            return self._api(question, parts[1:], path, query, body)
        at = next((n for n in (3, 2, 1) if parts[n : n + 1] == ["resolve"] and (n < 3 or parts[0] == "datasets")), 0)
        if not at:
            return HubReply(404)
        repository = "/".join(parts[:at])
        if repository in self.names:
            there = path.replace(repository, self.names[repository], 1)
            return HubReply(307, {"location": there})
        return self._file(question, repository, parts[at + 1], "/".join(parts[at + 2 :]), now)

    def _refused(self, repository: str, token: str, *, files: bool) -> HubReply | None:
        found = self.repositories.get(repository)
        if found is not None and (found.readers is None or token in found.readers or (found.gated and not files)):
            return None
        if found is not None and found.gated:
            return _error(403 if token else 401, "GatedRepo", f"Access to {repository} is restricted.")
        return _error(404 if token else 401, "RepoNotFound", "Repository not found")

    def _commit(self, repository: str, revision: str) -> str:
        found = self.repositories[repository]
        return revision if revision in found.commits else found.refs.get(revision, "")

    def _file(self, question: Question, repository: str, revision: str, path: str, now: float) -> HubReply:
        refused = self._refused(repository, question.token, files=True)
        if refused is not None:
            return refused
        commit = self._commit(repository, revision)
        if not commit:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = self.repositories[repository].commits[commit].get(path)
        if content is None:
            return _error(404, "EntryNotFound", "Entry not found", **{"x-repo-commit": commit})
        says = self.says.get(path, {})
        if is_large(path):
            digest = sha256(content)
            headers = {
                "x-repo-commit": commit,
                "x-linked-etag": f'"{digest}"',
                "x-linked-size": str(len(content)),
                "accept-ranges": "bytes",
                "etag": '"of-the-redirect"',
                "x-xet-hash": sha256(b"xet" + content),
                "link": f'<{self.base}/api/xet-read-token/{commit}>; rel="xet-auth"',
                "location": self._signed(path, digest, now),
            }
            return HubReply(302, headers | says, b"Found. Redirecting")
        there = f"/api/resolve-cache/{repository}/{commit}/{quote(path, safe='')}?etag=1"
        return HubReply(307, {"location": there, "x-repo-commit": commit, "x-linked-size": str(len(content))} | says)

    def _signed(self, path: str, digest: str, now: float) -> str:
        until = str(int(now + self.signed_seconds))
        signature = hmac.new(self.key, f"{digest} {until}".encode(), "sha256").hexdigest()
        query = urlencode({"Expires": until, "Signature": signature, "Key-Pair-Id": "K"})
        return f"{self.storage_base}/repos/{digest}/{quote(path.rpartition('/')[2])}?{query}"

    def _api(self, question: Question, parts: list[str], path: str, query: str, body: bytes) -> HubReply:
        if parts[0] == "resolve-cache":
            return self._kept(question, parts)
        if parts == ["whoami-v2"]:
            return _json({"name": question.token}) if question.token else _error(401, "", "Invalid username or password.")
        words = [n for n, part in enumerate(parts) if n > 1 and part in ("revision", "tree", "refs", "paths-info")]
        at = words[0] if words else len(parts)
        repository = "/".join(parts[1:at] if parts[0] == "models" else parts[:at])
        refused = self._refused(repository, question.token, files=False)
        if refused is not None:
            return refused
        word, rest = (parts[at], parts[at + 1 :]) if words else ("revision", ["main"])
        if word == "refs":
            refs = [{"name": n, "ref": n, "targetCommit": c} for n, c in self.repositories[repository].refs.items()]
            return _json({"branches": refs, "converts": [], "tags": []})
        commit = self._commit(repository, rest[0])
        if not commit:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {rest[0]}")
        files = self.repositories[repository].commits[commit]
        if word == "revision":
            names = [{"rfilename": name} for name in files]
            return _json({"id": repository, "sha": commit, "siblings": names, "private": False, "tags": [], "downloads": 1})
        if word == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", []) if question.method == "POST" else []
            return _json([_entry(name, files[name]) for name in wanted if name in files])
        return self._tree(files, "/".join(rest[1:]), path, parse_qs(query), commit)

    def _tree(self, files: Mapping[str, bytes], below: str, path: str, query: Mapping[str, list[str]], commit: str) -> HubReply:
        prefix = f"{below}/" if below else ""
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        entries = []
        for name, content in files.items():
            if not name.startswith(prefix):
                continue
            folder = name.removeprefix(prefix).rpartition("/")[0].partition("/")[0]
            if folder and {"type": "directory", "path": prefix + folder, "oid": git_id(b""), "size": 0} not in entries:
                entries.append({"type": "directory", "path": prefix + folder, "oid": git_id(b""), "size": 0})
            if recursive or not folder:
                entries.append(_entry(name, content))
        start = int(query.get("cursor", ["0"])[0])
        headers = {"x-repo-commit": commit}
        if start + self.page < len(entries):
            rest = urlencode({"recursive": str(recursive).lower(), "cursor": start + self.page})
            headers["link"] = f'<{self.base}{path}?{rest}>; rel="next"'
        return _json(entries[start : start + self.page], **headers)

    def _kept(self, question: Question, parts: list[str]) -> HubReply:
        """Small files, which the hub has itself."""
        path = parts[-1]
        repository, commit = "/".join(parts[1:-2]), parts[-2]
        refused = self._refused(repository, question.token, files=True)
        if refused is not None:
            return refused
        content = self.repositories[repository].commits[commit][path]
        headers = {"x-repo-commit": commit, "etag": f'"{git_id(content)}"', "content-type": "text/plain"}
        reply = ranged(question, self.lies.get(path, content), headers | self.says.get(path, {}))
        if question.method == "GET":
            self.sent[path] += len(reply.body)
        return reply

    # --- its storage ----------------------------------------------------------------------------------------------

    def storage(self, method: str, target: str, headers: Mapping[str, str], now: float = 0.0) -> HubReply:
        """A body for whoever has a URL that is signed and not too old, and no other header that says who asks."""
        parts = urlsplit(target)
        question = Question(method, parts.path, headers)
        self.stored.append(question)
        digest = parts.path.split("/")[2]
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        until, signature = query.get("Expires", "0"), query.get("Signature", "")
        right = hmac.new(self.key, f"{digest} {until}".encode(), "sha256").hexdigest()
        if not hmac.compare_digest(right, signature) or now > float(until) or "authorization" in headers:
            return HubReply(403, {}, b"<Error>AccessDenied</Error>")
        commits = [files for it in self.repositories.values() for files in it.commits.values()]
        found = {sha256(body): (path, body) for files in commits for path, body in files.items() if is_large(path)}
        path, content = found[digest]
        reply = ranged(question, self.lies.get(path, content), {"etag": f'"storage-{digest[:8]}"'})
        if method == "GET":
            self.sent[digest] += len(reply.body)
        return reply


def ranged(question: Question, content: bytes, headers: dict[str, str]) -> HubReply:
    """All of it, or the range that is asked for."""
    headers |= {"accept-ranges": "bytes"}
    wanted = question.headers.get("range", "")
    if wanted and question.headers.get("if-range", headers.get("etag")) == headers.get("etag"):
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(len(content), int(last) + 1 if last else len(content))
        if start >= len(content):
            return HubReply(416, headers | {"content-range": f"bytes */{len(content)}"})
        return HubReply(206, headers | {"content-range": f"bytes {start}-{stop - 1}/{len(content)}"}, content[start:stop])
    return HubReply(200, headers, content)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
    if is_large(path):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n".encode()
        entry["oid"] = git_id(pointer)
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
        entry["xetHash"] = sha256(b"xet" + content)
    return entry


def _json(document: object, **headers: str) -> HubReply:
    return HubReply(200, {"content-type": "application/json; charset=utf-8", **headers}, json.dumps(document).encode())


def _error(status: int, code: str, message: str, **headers: str) -> HubReply:
    found = {"x-error-message": message, **headers} | ({"x-error-code": code} if code else {})
    return HubReply(status, found, json.dumps({"error": message}).encode())
