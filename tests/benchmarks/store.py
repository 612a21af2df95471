"""How fast the store takes, checks and gives bytes; ``python -m tests.benchmarks.store [--mib N] [--dir D]`` prints JSON."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio
from blake3 import blake3

from swarm import wire
from swarm.store.disk import DiskStore
from swarm.task import MIB, Geometry, url_task

PROOF = wire.Signed(b"b" * 100, b"k" * 32, b"s" * 64)


def open_store(path: Path) -> DiskStore:
    return DiskStore(path, quota_bytes=None, high_watermark=0.95, low_watermark=0.9, min_free_bytes=0)


@contextmanager
def measured(results: dict[str, Any], name: str, mib: float = 0) -> Iterator[None]:
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    yield
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    results[name] = {"seconds": round(seconds, 4), "cpu_seconds": round(cpu, 4)}
    if mib:
        results[name] |= {"mib_per_s": round(mib / seconds), "cpu_seconds_per_gib": round(cpu * 1024 / mib, 3)}


async def download(path: Path, mib: int, results: dict[str, Any]) -> None:
    """One content in order, as it would come from a single peer."""
    geometry = Geometry.of(mib * MIB)
    data = memoryview(os.urandom(geometry.piece_length))
    digest = blake3(data).digest()
    with open_store(path) as store:
        handle = await store.create(url_task("http://origin/large"), geometry)
        with measured(results, "write pieces, commit, hash and sync behind", mib):
            for piece in range(geometry.piece_count):
                handle.write_piece(piece, data[: geometry.size(piece)], digest, PROOF)
                await trio.lowlevel.checkpoint()
        with measured(results, "content digest at the end", mib):
            content = await handle.content_digest()
        with measured(results, "sync and mark complete"):
            await handle.complete_with(content)
        handle.close()


async def serve(path: Path, mib: int, results: dict[str, Any]) -> None:
    with open_store(path) as store:
        for name in ("slice every piece, first time (hashed)", "slice every piece, again"):
            handle = store.open(url_task("http://origin/large").id)
            if handle is None:
                raise SystemExit("the content is gone")
            with measured(results, name, mib):
                for piece in range(handle.geometry.piece_count):
                    part = handle.slice(piece, 0, handle.geometry.size(piece))
                    if part is not None:
                        part.release()
            handle.close()
    with open_store(path) as store:
        handle = store.open(url_task("http://origin/large").id)
        if handle is None:
            raise SystemExit("the content is gone")
        with measured(results, "verify in a thread", mib):
            await handle.verify()
        handle.close()


async def small(path: Path, results: dict[str, Any]) -> None:
    geometry = Geometry.of(200 * 1024)
    data = memoryview(bytes(geometry.length))
    digest = blake3(data).digest()
    with open_store(path) as store, measured(results, "100 contents of 200 KiB, one after another"):
        for number in range(100):
            handle = await store.create(url_task(f"http://origin/{number}"), geometry)
            handle.write_piece(0, data, digest, PROOF)
            await handle.complete_with(await handle.content_digest())
            handle.close()


def start(path: Path, results: dict[str, Any]) -> None:
    open_store(path).close()
    connection = sqlite3.connect(path / "store.db")
    with connection:
        for key in range(1, 2001):
            task = os.urandom(32)
            row = (key, f"00/{task.hex()}.0", 256 * MIB, MIB, None, 1, 0, 0.0, 0.0, 0.0)
            connection.execute("INSERT INTO content VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            connection.execute("INSERT INTO name VALUES (?, ?, NULL, 'http://x/', 1, 0, '', '', 0, 0.0)", (task, key))
            rows = [(key, piece, b"h" * 32, 0, b"p" * 228) for piece in range(256)]
            connection.executemany("INSERT INTO piece VALUES (?, ?, ?, ?, ?)", rows)
    connection.close()
    with measured(results, "start with 2,000 tasks of 256 pieces"):
        store = open_store(path)
    with measured(results, "list 2,000 tasks"):
        store.entries()
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--dir", type=Path, default=None)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=arguments.dir))
    results: dict[str, Any] = {}
    try:
        steps: list[Callable[[], Any]] = [
            lambda: trio.run(download, root / "a", arguments.mib, results),
            lambda: trio.run(serve, root / "a", arguments.mib, results),
            lambda: trio.run(small, root / "b", results),
            lambda: start(root / "c", results),
        ]
        for step in steps:
            step()
    finally:
        shutil.rmtree(root)
    results["resident_mib_at_most"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
