"""Power lost at any moment: a thousand states a disk could be left in, each opened and looked at.

Between two syncs a disk may have kept any of the blocks written and lost the others, in any order.  A workload is
run once while every write and sync is noted; from what was on disk after each step, states are made by dropping
blocks of files and of SQLite's log that were not synced, tearing the log, and forgetting new files.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from swarm.store import disk
from swarm.store.disk import DiskStore
from swarm.task import Task, url_task
from tests.store.material import Material, create, disk_store, fast_directory, write

STATES = 1200
BLOCK = 512
PIECES = 6


@dataclass
class Snapshot:
    """What the disk was asked to keep, and what of it it has promised."""

    files: dict[str, bytes]
    dirty: dict[str, set[int]]
    synced: dict[str, dict[int, bytes]]
    named: set[str]
    log: bytes
    log_synced: int
    data_base: bytes
    promised: dict[bytes, Material]


@dataclass
class Recorder:
    """Stands between the store and the disk."""

    root: Path
    dirty: dict[str, set[int]] = field(default_factory=dict)
    synced: dict[str, dict[int, bytes]] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    log_synced: int = 0

    def name(self, fd: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), self.root)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        pwrite, fdatasync, fsync = os.pwrite, os.fdatasync, os.fsync

        def noted_pwrite(fd: int, data: Any, offset: int) -> int:
            count = pwrite(fd, data, offset)
            self.dirty.setdefault(self.name(fd), set()).update(range(offset // BLOCK, -(-(offset + count) // BLOCK)))
            return count

        def noted_fdatasync(fd: int) -> None:
            name = self.name(fd)
            written = {block: os.pread(fd, BLOCK, block * BLOCK) for block in set(self.dirty.get(name, ()))}
            fdatasync(fd)
            self.dirty.get(name, set()).difference_update(written)
            self.synced.setdefault(name, {}).update(written)

        def noted_fsync(fd: int) -> None:
            folder = self.name(fd)
            self.named.update(f"{folder}/{name}" for name in os.listdir(fd))
            fsync(fd)

        patch.setattr(os, "pwrite", noted_pwrite)
        patch.setattr(os, "fdatasync", noted_fdatasync)
        patch.setattr(os, "fsync", noted_fsync)

    def snapshot(self, promised: dict[bytes, Material]) -> Snapshot:
        paths = [path for path in (self.root / "tasks").rglob("*") if path.is_file()]
        return Snapshot(
            {str(path.relative_to(self.root)): path.read_bytes() for path in paths},
            {name: set(blocks) for name, blocks in self.dirty.items()},
            {name: dict(blocks) for name, blocks in self.synced.items()},
            set(self.named),
            (self.root / "store.db-wal").read_bytes(),
            self.log_synced,
            (self.root / "store.db").read_bytes(),
            dict(promised),
        )


def materials() -> dict[bytes, list[tuple[Task, Material]]]:
    found: dict[bytes, list[tuple[Task, Material]]] = {}
    for number in range(3):
        task = url_task(f"http://origin/{number}")
        versions = [Material(PIECES * 2 * BLOCK - 10 * (number + 1) - version, 2 * BLOCK, seed=number) for version in range(2)]
        found[task.id] = [(task, version) for version in versions]
    return found


async def workload(store: DiskStore, recorder: Recorder, rng: random.Random) -> list[Snapshot]:
    """Write, drop, complete and remove at random, as several downloads do."""
    promised: dict[bytes, Material] = {}
    snapshots = []
    for _ in range(150):
        task, material = rng.choice(rng.choice(list(materials().values())))
        with await create(store, task, material) as handle:
            if promised.get(task.id) is not material and not handle.complete:
                promised.pop(task.id, None)
            await step(store, handle, material, promised, rng, recorder)
        if rng.random() < 0.05 and await store.remove(task.id):
            promised.pop(task.id, None)
        await store._flush()
        await store._settle()
        await store._flush()
        snapshots.append(recorder.snapshot(promised))
    return snapshots


async def step(
    store: DiskStore, handle: Any, material: Material, promised: dict[bytes, Material], rng: random.Random, recorder: Recorder
) -> None:
    missing = [piece for piece in range(PIECES) if not handle.held[piece]]
    write(handle, material, *rng.sample(missing, min(len(missing), rng.randint(1, 4)))) if missing else None
    if rng.random() < 0.15:
        promised.pop(handle.task.id, None)
        handle.drop_pieces(rng.sample(range(PIECES), 2))
    if handle.held.all():
        await handle.complete_with(material.digest)
        promised[handle.task.id] = material
        recorder.log_synced = (store.data_dir / "store.db-wal").stat().st_size


def left_behind(snapshot: Snapshot, root: Path, rng: random.Random) -> None:
    """Write one state that a power loss may leave of this snapshot."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "tasks").mkdir(parents=True, mode=0o700)
    root.chmod(0o700)
    (root / "store.db").write_bytes(snapshot.data_base)
    (root / "store.db-wal").write_bytes(torn_log(snapshot, rng))
    lost = rng.choice([0.0, 0.1, 0.5, 1.0])
    for name, content in snapshot.files.items():
        if name not in snapshot.named and rng.random() < 0.2:
            continue
        data = bytearray(content)
        for block in snapshot.dirty.get(name, ()):
            if rng.random() < lost:
                size = len(data[block * BLOCK : (block + 1) * BLOCK])
                data[block * BLOCK : (block + 1) * BLOCK] = snapshot.synced.get(name, {}).get(block, bytes(BLOCK))[:size]
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


def torn_log(snapshot: Snapshot, rng: random.Random) -> bytes:
    log, synced = bytearray(snapshot.log), snapshot.log_synced
    if rng.random() < 0.5:
        del log[rng.randint(synced, len(log)) :]
    if rng.random() < 0.3 and len(log) > synced:
        start = rng.randint(synced, len(log) - 1)
        log[start : start + BLOCK] = rng.choice([bytes(BLOCK), rng.randbytes(BLOCK)])[: len(log) - start]
    return bytes(log)


async def check(store: DiskStore, snapshot: Snapshot) -> int:
    """Nothing wrong is held, and what was promised is there; returns the number of pieces that survived."""
    survived = 0
    for task_id, versions in materials().items():
        found = store._find(task_id)
        if task_id in snapshot.promised:
            assert found is not None
            assert found.complete
        for task, material in versions:
            if found is None or found.geometry != material.geometry:
                continue
            with await create(store, task, material) as handle:
                if handle.complete:
                    assert handle.read(0, material.geometry.length) == material.data
                for piece in handle.held.search(1):
                    part = handle.slice(piece, 0, material.geometry.size(piece))
                    assert part is not None, "what counts as held is right without a second look"
                    assert os.pread(part.fd, part.length, part.offset) == material.piece(piece)
                    part.release()
                    survived += 1
    return survived


@pytest.fixture
def root() -> Iterator[Path]:
    path = fast_directory()
    yield path
    shutil.rmtree(path)


def test_no_power_loss_makes_a_wrong_piece_count_as_held(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SYNC_EVERY_BYTES", 3 * 2 * BLOCK)
    rng = random.Random(20)
    survived = 0

    async def main() -> None:
        nonlocal survived
        with monkeypatch.context() as patch, disk_store(root / "before", boot_id="before") as store:
            recorder = Recorder(root / "before")
            recorder.install(patch)
            snapshots = await workload(store, recorder, rng)
        assert any(snapshot.promised for snapshot in snapshots)
        for number in range(STATES):
            snapshot = rng.choice(snapshots)
            left_behind(snapshot, root / "after", rng)
            try:
                with disk_store(root / "after", boot_id="after") as store:
                    survived += await check(store, snapshot)
            except BaseException as error:
                error.add_note(f"state {number}")
                raise

    trio.run(main)
    assert survived > STATES, "the store did not just forget everything"
