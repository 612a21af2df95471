"""The store in memory: the same behaviour for tests, and for simulations without even the bytes."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, TypeVarTuple, Unpack, cast

import trio

from swarm.errors import LocalProtocolError
from swarm.store.body import Body, FileBody, NoBody
from swarm.store.content import Content
from swarm.store.records import Records
from swarm.store.store import TaskStore
from swarm.task import Digest

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

ContentDigest = Callable[[Sequence[bytes], str], Digest]
"""Content digest from the BLAKE3 of its pieces and the name of an algorithm."""


def digest_of_digests(digests: Sequence[bytes], algorithm: str) -> Digest:
    """What stands for the content digest where there are no bytes to hash."""
    return Digest(algorithm, hashlib.new(algorithm, b"".join(digests)).hexdigest())


class MemoryStore(TaskStore):
    """A `Store` that ends with the process.  Uses no threads, so that a virtual clock keeps its order of events.

    Bytes are kept in anonymous files, because what is served must have a descriptor.  `close` closes them.
    """

    def __init__(
        self,
        *,
        keep_bytes: bool = True,
        quota_bytes: int | None = None,
        high_watermark: float = 1.0,
        low_watermark: float = 0.9,
        content_digest: ContentDigest = digest_of_digests,
        rng: random.Random | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            keep_bytes: `False` for simulations: pieces may be written without their bytes, and their digest is believed.
            content_digest: What `content_digest` returns if no bytes are kept.
            now: Wall seconds; a simulation gives its own.
        """
        super().__init__(
            records=Records(),
            quota_bytes=quota_bytes,
            high_watermark=high_watermark,
            low_watermark=low_watermark,
            rng=rng,
            now=now,
        )
        self._keep_bytes = keep_bytes
        self._digest_of = content_digest
        self._bodies: dict[str, int] = {}

    def _free_bytes(self) -> None:
        return None

    async def _allocate(self, content: Content) -> None:
        self._make_body(content)
        await trio.lowlevel.checkpoint()

    def _make_body(self, content: Content) -> None:
        if self._keep_bytes:
            fd = os.memfd_create("swarm-store", os.MFD_CLOEXEC)
            os.ftruncate(fd, content.geometry.length)
            self._bodies[content.file] = fd

    def _open_body(self, content: Content) -> Body | None:
        if not self._keep_bytes:
            return NoBody()
        fd = self._bodies.get(content.file)
        return None if fd is None else FileBody(os.dup(fd), None)

    def _new_body(self, content: Content) -> Body:
        self._discard(content.file)
        self._make_body(content)
        return cast(Body, self._open_body(content))

    def _discard(self, file: str) -> None:
        if (fd := self._bodies.pop(file, None)) is not None:
            os.close(fd)

    async def _blocking(self, function: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    async def _settle(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _flush(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _sync(self, content: Content) -> None:
        await trio.lowlevel.checkpoint()

    async def _scrub(self) -> None:
        await trio.sleep_forever()

    def _cool(self, content: Content) -> None:
        """Piece tables are nowhere else."""

    def _check_size(self, content: Content, piece: int, data: memoryview) -> None:
        if not self._keep_bytes and not data:
            return
        super()._check_size(content, piece, data)

    async def _hash_all(self, content: Content, algorithm: str) -> Digest:
        known = content.known
        await trio.lowlevel.checkpoint()
        if not self._keep_bytes:
            return self._digest_of([known.digest(piece) for piece in range(len(known.held))], algorithm)
        hasher = hashlib.new(algorithm)
        for piece in range(len(known.held)):
            geometry = content.geometry
            hasher.update(content.opened.read(geometry.offset(piece), geometry.size(piece)))
        return Digest(algorithm, hasher.hexdigest())

    def _file_for(self, task_id: bytes) -> str:
        """Not random: simulations with the same seed must be the same."""
        return f"{task_id.hex()}.{self._next_key}"

    def _close_medium(self) -> None:
        for file in list(self._bodies):
            self._discard(file)
        if self._bodies:
            raise LocalProtocolError("bodies left")
