"""Content to store, and the few steps every test of the store repeats."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from blake3 import blake3

from swarm import wire
from swarm.store.disk import DiskStore
from swarm.store.handle import OpenTask
from swarm.store.store import TaskStore
from swarm.task import Digest, Geometry, Task, blob_task, url_task


async def until(condition: Callable[[], object]) -> None:
    """Wait for what threads do; the caller sets the time limit."""
    while not condition():  # noqa: ASYNC110  (no event comes out of a thread we know nothing of)
        await trio.sleep(0.001)


def fast_directory() -> Path:
    """A new directory, in memory where there is room for it: nothing tested with it depends on a real disk."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="swarm-", dir=memory if memory.is_dir() else None))


class Material:
    """Random bytes in small pieces."""

    def __init__(self, length: int, piece_length: int = 4096, seed: int = 0) -> None:
        self.data = random.Random(seed).randbytes(length)
        self.geometry = Geometry(length, piece_length)
        self.digest = Digest("sha256", hashlib.sha256(self.data).hexdigest())
        self.blob = blob_task(self.digest)

    @property
    def url(self) -> Task:
        return url_task(f"http://origin/{self.digest.hex[:8]}")

    def piece(self, number: int) -> memoryview:
        start = self.geometry.offset(number)
        return memoryview(self.data)[start : start + self.geometry.size(number)]

    def blake3(self, number: int) -> bytes:
        return blake3(self.piece(number)).digest()


def write(handle: Any, material: Material, *pieces: int, proof: wire.Signed | None = None) -> None:
    """Write these pieces, or all that are missing."""
    for number in pieces or range(material.geometry.piece_count):
        handle.write_piece(number, material.piece(number), material.blake3(number), proof)


async def create(store: TaskStore, task: Task, material: Material, **options: Any) -> OpenTask:
    handle = await store.create(task, material.geometry, **options)
    assert isinstance(handle, OpenTask)
    return handle


async def complete(store: TaskStore, task: Task, material: Material, **options: Any) -> OpenTask:
    handle = await create(store, task, material, **options)
    write(handle, material)
    assert await handle.content_digest() == material.digest
    await handle.complete_with(material.digest)
    return handle


def opened(store: TaskStore, task_id: bytes) -> OpenTask:
    handle = store.open(task_id)
    assert isinstance(handle, OpenTask)
    return handle


def disk_store(path: Path, **options: Any) -> DiskStore:
    settings: dict[str, Any] = {"quota_bytes": None, "high_watermark": 0.95, "low_watermark": 0.8, "min_free_bytes": 0}
    return DiskStore(path, **(settings | options))


def file_of(store: DiskStore, task_id: bytes) -> Path:
    """Where the bytes are."""
    content = store._find(task_id)
    assert content is not None
    return store._tasks_dir / content.file


def signed(number: int) -> wire.Signed:
    return wire.Signed(b"body %d" % number, b"k" * 32, b"s" * 64)
