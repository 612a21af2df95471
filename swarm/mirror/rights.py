"""What registries said about who may read what, remembered briefly.  No I/O."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import Final

from swarm.mirror.credentials import PROCESS_KEY
from swarm.mirror.paths import Name
from swarm.task import Digest

MAX_REMEMBERED: Final = 16_384
"""Answers kept, of about 200 bytes each; a client can ask for any number of digests."""

REFUSED_SECONDS: Final = 10.0
"""A no is believed for so long: somebody who was just given the right should not have to wait."""


class Rights:
    """Answers by registry, repository, digest and asker, under a keyed hash of all four.

    The digest alone would let one repository's reader read another's content (CVE-2024-39897), the repository alone would
    let everybody read what one may.

    Args:
        stale: Seconds after it ran out for which a yes is still told as stale.
    """

    def __init__(self, stale: float) -> None:
        self._stale = stale
        self._kept: OrderedDict[bytes, tuple[int, float]] = OrderedDict()

    def note(self, name: Name, digest: Digest, tag: bytes, status: int, now: float, seconds: float) -> None:
        """Remember an answer (200 is a yes) for so long."""
        key = _key(name, digest, tag)
        self._kept[key] = (status, now + (seconds if status == 200 else min(seconds, REFUSED_SECONDS)))
        self._kept.move_to_end(key)
        while len(self._kept) > MAX_REMEMBERED:
            self._kept.popitem(last=False)

    def known(self, name: Name, digest: Digest, tag: bytes, now: float) -> int | None:
        """The answer, while it holds."""
        status, until = self._kept.get(_key(name, digest, tag), (0, now))
        return status if now < until else None

    def was_allowed(self, name: Name, digest: Digest, tag: bytes, now: float, grace: float = 0.0) -> bool:
        """Whether the last answer was a yes that ran out not too long ago."""
        status, until = self._kept.get(_key(name, digest, tag), (0, now))
        return status == 200 and now < until + max(self._stale, grace)


def _key(name: Name, digest: Digest, tag: bytes) -> bytes:
    hashed = blake2b(key=PROCESS_KEY, digest_size=16, person=b"swarm/rights")
    for part in (name.registry.encode(), name.repository.encode(), str(digest).encode(), tag):
        hashed.update(len(part).to_bytes(4, "big") + part)
    return hashed.digest()
