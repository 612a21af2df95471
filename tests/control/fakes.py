"""A node made of plain answers, and a control server that runs it in a thread of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from swarm.control.api import ControlServer
from swarm.control.arriving import Arriving
from swarm.download.request import Fetched, FetchRequest, Progress
from swarm.errors import NotFoundAtOrigin, SwarmError
from swarm.metrics import Histogram, Sample
from swarm.task import Digest

TASK = bytes(range(32))
DIGEST = Digest("sha256", "ab" * 32)


class FakeContent:
    """Content in an unnamed file."""

    def __init__(self, data: bytes, directory: Path) -> None:
        self.opened = 0
        self.closed = 0
        self._file = directory / f"content-{id(self)}"
        self._file.write_bytes(data)

    @property
    def path(self) -> Path | None:
        return self._file

    def open_read_only(self) -> int:
        self.opened += 1
        return os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        self.closed += 1


class FakeNode:
    """Answers at once, or waits for `release` where a test wants a fetch to hang."""

    def __init__(self, directory: Path, data: bytes = b"content") -> None:
        self.directory = directory
        self.data = data
        self.requests: list[FetchRequest] = []
        self.content: list[FakeContent] = []
        self.error: BaseException | None = None
        self.snapshots = 0
        self.hang = False
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.is_ready = True
        self.durations = Histogram()
        self.histograms = {
            "swarm_fetch_duration_seconds": self.durations,
            "swarm_mirror_first_byte_seconds": Histogram(),
        }

    async def fetch(
        self,
        request: FetchRequest,
        progress: Callable[[Progress], None] | None,
        opened: Callable[[Arriving | None], None] | None = None,
    ) -> tuple[Fetched, FakeContent]:
        self.requests.append(request)
        self.started.set()
        for done in range(self.snapshots):
            if progress is not None:
                progress(Progress(TASK, self.snapshots, done, done, 0, 0, 2, "fetching"))
            await trio.sleep(0.01)
        try:
            if self.hang:
                await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled.set()
            raise
        if self.error is not None:
            raise self.error
        self.content.append(FakeContent(self.data, self.directory))
        return Fetched(TASK, DIGEST, len(self.data), 0.5, 1, 2, 3, 4, {"alone": 1}), self.content[-1]

    def status(self) -> dict[str, Any]:
        return {"state": "ready"}

    def tasks(self) -> list[dict[str, Any]]:
        return [{"task": TASK.hex()}]

    def task(self, name: str) -> dict[str, Any]:
        if name != TASK.hex():
            raise NotFoundAtOrigin(f"no task {name}")
        return {"task": name}

    def peers(self) -> list[dict[str, Any]]:
        return [{"node": "n"}]

    def pin(self, name: str, pinned: bool) -> dict[str, Any]:
        return {"task": name, "pinned": pinned}

    async def remove(self, name: str) -> dict[str, Any]:
        raise SwarmError("in use")

    async def pull_image(self, image: str, platform: str | None) -> dict[str, Any]:
        raise SwarmError("this daemon has no registry mirror")

    async def images(self) -> list[dict[str, Any]]:
        return []

    async def check_origin(self, url: str) -> dict[str, Any]:
        raise RuntimeError("a bug")

    def samples(self) -> Iterator[Sample]:
        yield "swarm_peers", {}, 3.0
        yield "swarm_origin_reads_total", {"reason": "alone"}, 2.0


@contextmanager
def serving(node: FakeNode, directory: Path) -> Iterator[ControlServer]:
    """A control server on `directory`, in a thread, so that a test can talk to it as a command does."""
    server = ControlServer(node, directory)
    listening = threading.Event()
    failed: list[BaseException] = []
    scope = trio.CancelScope()
    token: list[trio.lowlevel.TrioToken] = []

    async def main() -> None:
        token.append(trio.lowlevel.current_trio_token())
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(server.run)
                listening.set()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:
            failed.append(error)
        finally:
            listening.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert listening.wait(10)
        if not failed:
            yield server
    finally:
        if not failed:
            token[0].run_sync_soon(scope.cancel)
        thread.join(10)
        assert not thread.is_alive()
    if failed:
        raise failed[0]
