"""What the mirror has learnt from a hub: revisions, files of commits, answers of its API, and digests of git's files.

What anybody may know of it is kept on disk, so that what was looked at once can still be had while the hub is down.  What a
token opened is in memory only.  Everything is bounded: clients choose names, and repositories have any number of files.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cbor2
import structlog

from swarm.errors import ConfigError
from swarm.mirror.hub import ApiAnswer, FileInfo
from swarm.mirror.hub_paths import is_commit
from swarm.mirror.paths import Name
from swarm.task import Digest

MAX_FILES: Final = 16_384
"""Of all commits; about 400 bytes each."""

MAX_REVISIONS: Final = 4096
MAX_CONTENTS: Final = 16_384
MAX_ANSWERS: Final = 512
MAX_ANSWERS_BYTES: Final = 8 * 1024 * 1024
"""Of answers, packed: lists of some hundred thousand files."""

MAX_ANSWER_BYTES: Final = 1024 * 1024
"""Of one answer, packed; a larger one is asked for anew each time."""

MAX_FILE_BYTES: Final = 64 * 1024 * 1024

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file of a commit; `public` where the hub told nobody in particular."""

    info: FileInfo
    public: bool


@dataclass(frozen=True, slots=True)
class KnownRevision:
    """Which commit a branch or tag was, at wall second `asked`."""

    commit: str
    asked: float
    public: bool


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """What an API route told everybody, at wall second `asked`."""

    packed: bytes
    content_type: str
    next_page: str
    commit: str
    asked: float

    def unpack(self) -> ApiAnswer:
        return ApiAnswer(zlib.decompress(self.packed), self.content_type, self.next_page, self.commit)


class HubCatalogue:
    """Bounded memory of the above.  What cannot be read back is forgotten, it can all be learnt again.

    Args:
        path: Where it is kept; `None`: nowhere.
        host: Of the hub; what another one said is not read back.
    """

    def __init__(self, host: str, path: Path | None = None) -> None:
        self._host = host
        self._path = path
        self._forget()
        if path is not None:
            self._load(path)

    def _forget(self) -> None:
        self._files: OrderedDict[tuple[Name, str, str], KnownFile] = OrderedDict()
        self._revisions: OrderedDict[tuple[Name, str], KnownRevision] = OrderedDict()
        self._answers: OrderedDict[tuple[Name, str], KnownAnswer] = OrderedDict()
        self._answer_bytes = 0
        self._contents: OrderedDict[tuple[Name, str], Digest] = OrderedDict()
        self.changed = False

    def file(self, name: Name, commit: str, path: str) -> KnownFile | None:
        return self._files.get((name, commit, path))

    def note_file(self, name: Name, path: str, info: FileInfo, *, public: bool) -> None:
        known = self._files.get((name, info.commit, path))
        found = KnownFile(info, public or (known is not None and known.public))
        _put(self._files, (name, info.commit, path), found, MAX_FILES)
        self.changed = self.changed or found != known  # noted at each request: the file is not to be written for that

    def revision(self, name: Name, revision: str) -> KnownRevision | None:
        return self._revisions.get((name, revision))

    def note_revision(self, name: Name, revision: str, commit: str, asked: float, *, public: bool) -> None:
        if not is_commit(revision):
            _put(self._revisions, (name, revision), KnownRevision(commit, asked, public), MAX_REVISIONS)
            self.changed = True

    def answer(self, name: Name, question: str) -> KnownAnswer | None:
        return self._answers.get((name, question))

    def note_answer(self, name: Name, question: str, answer: ApiAnswer, asked: float) -> None:
        """Remember what was told to nobody in particular."""
        packed = zlib.compress(answer.body, 1)
        self._drop_answer((name, question))
        if len(packed) > MAX_ANSWER_BYTES:
            return
        self._answers[name, question] = KnownAnswer(packed, answer.content_type, answer.next_page, answer.commit, asked)
        self._answer_bytes += len(packed)
        while self._answer_bytes > MAX_ANSWERS_BYTES or len(self._answers) > MAX_ANSWERS:
            self._drop_answer(next(iter(self._answers)))
        self.changed = True

    def content(self, name: Name, etag: str) -> Digest | None:
        """The digest of a file that git has under this id, once its content was here and checked.

        For one repository only: git's ids are SHA-1, and whoever can make two files of one id writes both into his own.
        """
        return self._contents.get((name, etag))

    def note_content(self, name: Name, etag: str, digest: Digest) -> None:
        _put(self._contents, (name, etag), digest, MAX_CONTENTS)
        self.changed = True

    def close(self, name: Name) -> None:
        """The hub does not show this repository to everybody (any more)."""
        for key, known in self._files.items():
            if key[0] == name and known.public:
                self._files[key] = KnownFile(known.info, False)
        for asked, revision in self._revisions.items():
            if asked[0] == name and revision.public:
                self._revisions[asked] = KnownRevision(revision.commit, revision.asked, False)
        for question in [it for it in self._answers if it[0] == name]:
            self._drop_answer(question)
        self.changed = True

    def _drop_answer(self, key: tuple[Name, str]) -> None:
        old = self._answers.pop(key, None)
        self._answer_bytes -= len(old.packed) if old is not None else 0

    # --- the file -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write what anybody may know, whole or not at all."""
        if self._path is None or not self.changed:
            return
        document = {
            "version": 1,
            "host": self._host,
            "files": [
                [name.repository, commit, path, known.info.etag, known.info.size]
                for (name, commit, path), known in self._files.items()
                if known.public
            ],
            "revisions": [
                [name.repository, revision, known.commit, known.asked]
                for (name, revision), known in self._revisions.items()
                if known.public
            ],
            "answers": [
                [name.repository, question, it.packed, it.content_type, it.next_page, it.commit, it.asked]
                for (name, question), it in self._answers.items()
            ],
            "contents": [[name.repository, etag, str(digest)] for (name, etag), digest in self._contents.items()],
        }
        temporary = self._path.with_name(self._path.name + ".new")
        try:
            temporary.write_bytes(cbor2.dumps(document))
            os.chmod(temporary, 0o600)
            temporary.rename(self._path)
        except OSError as error:
            log.warning("mirror_catalogue_not_saved", reason=error.strerror)
            return
        self.changed = False

    def _load(self, path: Path) -> None:
        try:
            if not path.exists():
                return
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError("too large")
            document = cbor2.loads(path.read_bytes())
            if document["host"] != self._host:
                return
            self._read(document)
        except (OSError, ValueError, TypeError, KeyError, ConfigError, cbor2.CBORDecodeError) as error:
            log.warning("mirror_catalogue_unreadable", reason=str(error))
            self._forget()

    def _read(self, document: Any) -> None:
        for repository, commit, path, etag, size in document["files"]:
            info = FileInfo(str(commit), str(etag), None if size is None else int(size))
            self._files[Name(self._host, str(repository)), info.commit, str(path)] = KnownFile(info, True)
        for repository, revision, commit, asked in document["revisions"]:
            self._revisions[Name(self._host, str(repository)), str(revision)] = KnownRevision(str(commit), float(asked), True)
        for repository, question, packed, content_type, next_page, commit, asked in document["answers"]:
            known = KnownAnswer(bytes(packed), str(content_type), str(next_page), str(commit), float(asked))
            self._answers[Name(self._host, str(repository)), str(question)] = known
            self._answer_bytes += len(known.packed)
        for repository, etag, digest in document["contents"]:
            self._contents[Name(self._host, str(repository)), str(etag)] = Digest.parse(digest)


def _put(table: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > limit:
        table.popitem(last=False)
