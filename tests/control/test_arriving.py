"""A command copies what is verified while the rest arrives."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from swarm.control import api, arriving
from swarm.control.arriving import Told
from swarm.control.client import ask
from swarm.download.request import Fetched, FetchRequest, Progress
from swarm.errors import StoreError
from swarm.pieces import PieceSet, none
from swarm.task import Geometry, Task
from tests.control.fakes import TASK, FakeContent, FakeNode, serving

GEOMETRY = Geometry(10 * 65536, 65536)


class Coming:
    """Content whose pieces appear when the test says so."""

    def __init__(self, path: Path, *, descriptors: bool = True) -> None:
        self.task = Task(TASK)
        self.geometry = GEOMETRY
        self.held: PieceSet = none(10)
        self.closed = 0
        self.left = threading.Event()
        self._path = path
        self._descriptors = descriptors
        self._callbacks: list[Callable[[list[int]], None]] = []

    def on_lost(self, callback: Any) -> None:
        self._callbacks.append(callback)

    def lose(self, *lost: int) -> None:
        for piece in lost:
            self.held[piece] = False
        for callback in self._callbacks:
            callback(list(lost))

    def open_read_only(self, *, partial: bool = False) -> int:
        assert partial
        if not self._descriptors:
            raise StoreError("too many open files")
        return os.open(self._path, os.O_RDONLY)

    def close(self) -> None:
        self.closed += 1
        self.left.set()


def test_each_piece_is_told_once_and_in_runs(tmp_path: Path) -> None:
    content = Coming(tmp_path)
    told = Told(content)
    assert list(told.news()) == []
    content.held[2:5] = content.held[9] = True
    assert list(told.news()) == [{"verified": [(2, 5), (9, 10)]}]
    content.held[0] = True
    assert list(told.news()) == [{"verified": [(0, 1)]}]
    assert list(told.news()) == []


def test_a_loss_is_told_before_what_came_after_it(tmp_path: Path) -> None:
    content = Coming(tmp_path)
    told = Told(content)
    content.held[2:5] = True
    list(told.news())
    content.lose(3)
    content.held[3] = True  # here again before anybody looked
    assert list(told.news()) == [{"lost": True}, {"verified": [(2, 5)]}]
    assert list(told.losses()) == []


def test_a_line_stays_short_however_torn_the_content_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving, "MAX_RUNS", 2)
    content = Coming(tmp_path)
    content.held[0] = content.held[2] = content.held[4] = True
    told = Told(content)
    assert list(told.news()) == [{"verified": [(0, 1), (2, 3)]}]
    assert list(told.news()) == [{"verified": [(4, 5)]}]


class Script(FakeNode):
    """A node whose fetch goes as the test writes it."""

    def __init__(self, directory: Path, steps: Callable[[Callable[[Any], None]], Any]) -> None:
        super().__init__(directory)
        self._steps = steps
        self.asked_early = False

    async def fetch(
        self,
        request: FetchRequest,
        progress: Callable[[Progress], None] | None,
        opened: Callable[[Any], None] | None = None,
    ) -> tuple[Fetched, FakeContent]:
        self.asked_early = opened is not None
        if opened is not None:
            await self._steps(opened)
        return await super().fetch(request, progress, None)


class Recorder:
    """What a command is told; `heard` waits for the n-th call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._news = threading.Condition()

    def _record(self, *call: Any) -> None:
        with self._news:
            self.calls.append(call)
            self._news.notify_all()

    def arriving(self, fd: int, name: str, length: int, piece_length: int) -> None:
        self._record("arriving", os.pread(fd, 100, 0), name, length, piece_length)
        os.close(fd)

    def verified(self, first: int, stop: int) -> None:
        self._record("verified", first, stop)

    def lost(self) -> None:
        self._record("lost")

    async def heard(self, count: int) -> None:
        def wait() -> bool:
            with self._news:
                return self._news.wait_for(lambda: len(self.calls) >= count, timeout=20)

        assert await trio.to_thread.run_sync(wait)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "ARRIVING_SECONDS", 0.01)
    monkeypatch.setattr(api, "PROGRESS_SECONDS", 0.01)


def test_a_command_hears_of_pieces_as_they_come_and_of_losses_before_the_result(tmp_path: Path, quick: None) -> None:
    (tmp_path / "growing").write_bytes(b"so far")
    recorder, content = Recorder(), Coming(tmp_path / "growing")

    async def steps(opened: Callable[[Any], None]) -> None:
        opened(content)
        await recorder.heard(1)
        content.held[0:3] = True
        await recorder.heard(2)
        content.held[7] = True
        await recorder.heard(3)
        content.lose(1)

    with serving(Script(tmp_path, steps), tmp_path):
        ask(tmp_path, "fetch", {"url": "http://h/"}, None, recorder).close()
    assert recorder.calls[:3] == [
        ("arriving", b"so far", TASK.hex(), GEOMETRY.length, GEOMETRY.piece_length),
        ("verified", 0, 3),
        ("verified", 7, 8),
    ]
    assert recorder.calls[3] == ("lost",)
    assert content.closed == 1


def test_content_that_starts_over_replaces_what_came_before(tmp_path: Path, quick: None) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "new").write_bytes(b"new")
    recorder, old, new = Recorder(), Coming(tmp_path / "old"), Coming(tmp_path / "new")

    async def steps(opened: Callable[[Any], None]) -> None:
        opened(old)
        await recorder.heard(1)
        opened(None)
        assert old.closed == 1, "what is in use would be in the way of the new content"
        opened(new)
        await recorder.heard(2)

    with serving(Script(tmp_path, steps), tmp_path):
        ask(tmp_path, "fetch", {"url": "http://h/"}, None, recorder).close()
    assert [call[1] for call in recorder.calls] == [b"old", b"new"]
    assert (old.closed, new.closed) == (1, 1)


def test_without_a_descriptor_to_spare_the_content_is_copied_at_the_end(tmp_path: Path, quick: None) -> None:
    recorder, content = Recorder(), Coming(tmp_path, descriptors=False)

    async def steps(opened: Callable[[Any], None]) -> None:
        opened(content)
        content.held[0:3] = True

    with serving(Script(tmp_path, steps), tmp_path):
        answer = ask(tmp_path, "fetch", {"url": "http://h/"}, None, recorder)
        assert os.read(answer.fd, 100) == b"content"
        answer.close()
    assert recorder.calls == []
    assert content.closed == 1


@pytest.mark.parametrize("asked", [{"range": [0, 5]}, {}])
def test_a_command_that_cannot_use_it_hears_nothing(tmp_path: Path, asked: dict[str, Any]) -> None:
    recorder = Recorder() if asked else None

    async def steps(_opened: Callable[[Any], None]) -> None:
        await trio.lowlevel.checkpoint()

    node = Script(tmp_path, steps)
    with serving(node, tmp_path):
        ask(tmp_path, "fetch", {"url": "http://h/", **asked}, None, recorder).close()
    assert not node.asked_early


def test_a_command_that_cannot_write_ends_its_own_wait_only(tmp_path: Path, quick: None) -> None:
    (tmp_path / "growing").write_bytes(b"so far")
    content = Coming(tmp_path / "growing")

    class Full(Recorder):
        def verified(self, first: int, stop: int) -> None:
            raise StoreError("full")

    async def steps(opened: Callable[[Any], None]) -> None:
        opened(content)
        content.held[0] = True
        await trio.sleep_forever()

    node = Script(tmp_path, steps)
    with serving(node, tmp_path):
        with pytest.raises(StoreError, match="full"):
            ask(tmp_path, "fetch", {"url": "http://h/"}, None, Full())
        assert content.left.wait(20)
        assert ask(tmp_path, "status").result == {"state": "ready"}
    assert content.closed == 1
