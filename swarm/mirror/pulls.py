"""One log line a pull: the requests a client makes for one image, put together again.

A client says neither when it begins nor when it ends: a pull begins with the manifest of an image and ends when all it lists
went out, or when nothing of it was asked for some seconds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from swarm.mirror.paths import Kind, Name, Target
from swarm.mirror.routes import Answer, Blob
from swarm.mirror.sending import Sent
from swarm.task import Digest

log = structlog.get_logger(__name__)

QUIET_SECONDS: Final = 10.0
MAX_PULLS: Final = 1024


@dataclass(slots=True)
class Pull:
    """What one client has got of one image."""

    image: str
    left: set[Digest]
    began: float
    latest: float
    blobs: int = 0
    failed: int = 0
    under_way: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    first_byte: float | None = None


@dataclass(frozen=True, slots=True)
class _Key:
    client: str
    name: Name
    manifest: Digest


class Pulls:
    """The pulls under way.

    Args:
        blobs_of: The blobs that a manifest lists, where it is an image's.
    """

    def __init__(self, blobs_of: Callable[[Digest], frozenset[Digest]]) -> None:
        self._blobs_of = blobs_of
        self._pulls: OrderedDict[_Key, Pull] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pulls)

    def answered(self, client: str, method: str, answer: Answer, sent: Sent, began: float, now: float, outcome: str) -> None:
        """A request was answered."""
        target = answer.target
        if target is None or target.name is None or method != "GET":
            return
        if target.kind is Kind.FILE:
            _report_file(client, target, answer, sent, began, now, outcome)
            return
        if target.kind is Kind.MANIFEST and answer.status == 200:
            self._begin(client, target.name, target.reference, answer, now)
        elif target.kind is Kind.BLOB and target.digest is not None and answer.status != 304:
            self._note(client, target.name, target.digest, answer, sent, began, now, outcome)

    def expire(self, now: float) -> None:
        """Report what went quiet; call it every few seconds."""
        for key, pull in list(self._pulls.items()):
            if now - pull.latest >= QUIET_SECONDS:
                self._end(key, now)

    def _begin(self, client: str, name: Name, reference: str, answer: Answer, now: float) -> None:
        digest = _digest_of(answer)
        blobs = self._blobs_of(digest) if digest is not None else frozenset()
        if digest is None or not blobs:
            return
        key = _Key(client, name, digest)
        pull = self._pulls.get(key)
        if pull is None:
            separator = "@" if ":" in reference else ":"
            self._pulls[key] = Pull(f"{name}{separator}{reference}", set(blobs), now, now)
            if len(self._pulls) > MAX_PULLS:
                self._end(next(iter(self._pulls)), now)
        else:
            pull.latest = now

    def _note(
        self, client: str, name: Name, blob: Digest, answer: Answer, sent: Sent, began: float, now: float, outcome: str
    ) -> None:
        for key, pull in list(self._pulls.items()):
            if key.client != client or key.name != name or blob not in self._blobs_of(key.manifest):
                continue
            pull.latest = now
            pull.sources.update(sent.sources)
            if answer.status >= 400 or outcome != "ok" or not isinstance(answer.body, Blob):
                pull.failed += 1
            else:
                pull.blobs += 1
                pull.left.discard(blob)
            if sent.first_byte is not None:
                waited = sent.first_byte - began
                pull.first_byte = waited if pull.first_byte is None else max(pull.first_byte, waited)
            if not pull.left:
                self._end(key, now)
            return

    def _end(self, key: _Key, now: float) -> None:
        pull = self._pulls.pop(key)
        log.info(
            "pulled",
            image=pull.image,
            digest=str(key.manifest),
            client=key.client,
            blobs=pull.blobs,
            not_asked=len(pull.left),
            failed=pull.failed,
            bytes=pull.sources.total(),
            from_store=pull.sources["store"],
            from_peers=pull.sources["peers"],
            from_origin=pull.sources["origin"],
            seconds=round(pull.latest - pull.began, 3),
            slowest_first_byte=round(pull.first_byte, 3) if pull.first_byte is not None else None,
        )


def _report_file(client: str, target: Target, answer: Answer, sent: Sent, began: float, now: float, outcome: str) -> None:
    """One line a file of a hub that was asked for whole; those who read ranges read hundreds."""
    if answer.status != 200:
        return
    log.info(
        "pulled",
        name=str(target.name),
        reference=target.reference,
        client=client,
        outcome=outcome,
        length=answer.length,
        from_store=sent.sources["store"],
        from_peers=sent.sources["peers"],
        from_origin=sent.sources["origin"] or (len(answer.body) if isinstance(answer.body, bytes) else 0),
        seconds=round(now - began, 3),
        slowest_first_byte=round(sent.first_byte - began, 3) if sent.first_byte is not None else None,
    )


def _digest_of(answer: Answer) -> Digest | None:
    return next((Digest.parse(value) for name, value in answer.headers if name == "Docker-Content-Digest"), None)
