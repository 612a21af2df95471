"""Any order of steps, restarts, kills and power losses, against a model of a few sets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from swarm.errors import LocalProtocolError, NotPermitted, StoreError
from swarm.store.disk import DiskStore
from swarm.store.handle import OpenTask
from swarm.store.memory import MemoryStore
from swarm.store.store import TaskStore
from swarm.task import Task, url_task
from tests.store.material import Material, disk_store, fast_directory, file_of, write

PIECES = 4
MATERIALS = [Material(PIECES * 512 - 100, piece_length=512, seed=seed) for seed in range(2)]
TASKS: list[tuple[Task, Material]] = [
    (MATERIALS[0].blob, MATERIALS[0]),
    (url_task("http://a/"), MATERIALS[0]),
    (url_task("http://b/"), MATERIALS[0]),
    (url_task("http://c/"), MATERIALS[1]),
]
TASK = st.integers(0, len(TASKS) - 1)
PIECE = st.integers(0, PIECES - 1)


class Machine(RuleBasedStateMachine):
    """The model knows what may be held: everything that is held must be right, and nothing verified may vanish.

    `sure` are the names whose content was complete and was neither dropped from, damaged nor removed since.
    """

    handles: Bundle[tuple[int, OpenTask]] = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.store = self.new_store()
        self.open: list[OpenTask] = []
        self.sure: set[bytes] = set()

    def new_store(self) -> TaskStore:
        return MemoryStore()

    def do(self, function: Callable[[], Awaitable[None]]) -> None:
        async def limited() -> None:
            with trio.fail_after(20):
                await function()

        trio.run(limited)

    @rule(target=handles, number=TASK)
    def create(self, number: int) -> tuple[int, OpenTask]:
        task, material = TASKS[number]
        made: list[OpenTask] = []

        async def main() -> None:
            handle = await self.store.create(task, material.geometry)
            assert isinstance(handle, OpenTask)
            made.append(handle)

        self.do(main)
        self.open.append(made[0])
        return number, made[0]

    @rule(number=TASK)
    def look(self, number: int) -> None:
        task, material = TASKS[number]
        handle = self.store.open(task.id)
        if handle is None:
            assert task.id not in self.sure
            return
        assert isinstance(handle, OpenTask)
        if handle.complete:
            assert handle.digest == material.digest
            assert handle.read(0, material.geometry.length) == material.data
        else:
            assert task.id not in self.sure
        handle.close()

    @rule(handle=handles, pieces=st.sets(PIECE))
    def write_some(self, handle: tuple[int, OpenTask], pieces: set[int]) -> None:
        number, task = handle
        if task in self.open:
            for piece in pieces:
                write(task, TASKS[number][1], piece)
            assert all(task.held[piece] for piece in pieces)

    @rule(handle=handles, pieces=st.sets(PIECE, min_size=1))
    def drop_some(self, handle: tuple[int, OpenTask], pieces: set[int]) -> None:
        number, task = handle
        if task in self.open:
            dropped = [piece for piece in pieces if task.held[piece]]
            task.drop_pieces(list(pieces))
            assert not any(task.held[piece] for piece in pieces)
            if dropped:
                self.unsure(TASKS[number][1])

    @rule(handle=handles)
    def finish(self, handle: tuple[int, OpenTask]) -> None:
        number, task = handle
        material = TASKS[number][1]
        if task not in self.open:
            return

        async def main() -> None:
            try:
                digest = await task.content_digest()
            except (LocalProtocolError, StoreError):
                return
            assert digest == material.digest
            await task.complete_with(digest)
            self.sure.add(TASKS[number][0].id)

        self.do(main)

    @rule(handle=handles, piece=PIECE)
    def serve(self, handle: tuple[int, OpenTask], piece: int) -> None:
        number, task = handle
        if task in self.open:
            material = TASKS[number][1]
            held = bool(task.held[piece])
            part = task.slice(piece, 0, material.geometry.size(piece))
            assert (part is not None) <= held
            if part is not None:
                assert os.pread(part.fd, part.length, part.offset) == material.piece(piece)
                part.release()
            else:
                assert not task.held[piece]

    @rule(handle=consumes(handles))
    def shut(self, handle: tuple[int, OpenTask]) -> None:
        if handle[1] in self.open:
            self.open.remove(handle[1])
            handle[1].close()

    @rule(number=TASK)
    def remove(self, number: int) -> None:
        task, material = TASKS[number]

        async def main() -> None:
            try:
                if await self.store.remove(task.id):
                    self.unsure(material)
            except NotPermitted:
                assert any(entry.in_use for entry in self.store.entries())

        self.do(main)

    def unsure(self, material: Material) -> None:
        for task, other in TASKS:
            if other is material:
                self.sure.discard(task.id)

    @invariant()
    def the_books_balance(self) -> None:
        contents = self.store._contents.values()
        assert self.store._used_bytes == sum(content.geometry.length for content in contents)
        assert all(content.names for content in contents)
        for task_id, content in self.store._names.items():
            assert content.names[task_id].task.id == task_id
            assert self.store._contents[content.key] is content
        for content in [*contents, *(task.content for task in self.open)]:
            assert content.references == sum(task.content is content for task in self.open)
            if content.pieces is not None:
                assert content.held_count == content.pieces.held.count()
                assert not (content.pieces.checked & ~content.pieces.held).any()
                end = content.pieces.held.find(0)
                assert content.pieces.end == (PIECES if end < 0 else end)
                assert not content.complete or content.pieces.held.all()

    def teardown(self) -> None:
        self.store.close()


class DiskMachine(Machine):
    def __init__(self) -> None:
        self.path = fast_directory()
        self.boot = 0
        super().__init__()

    def new_store(self) -> DiskStore:
        return disk_store(self.path / "store", boot_id=str(self.boot))

    @rule(power_lost=st.booleans())
    def restart(self, power_lost: bool) -> None:
        for task in self.open:
            task.close()
        self.open.clear()
        self.store.close()
        self.boot += power_lost
        self.store = self.new_store()

    @precondition(lambda self: self.sure)
    @rule(number=TASK, piece=PIECE)
    def rot(self, number: int, piece: int) -> None:
        task, material = TASKS[number]
        assert isinstance(self.store, DiskStore)
        content = self.store._find(task.id)
        if content is not None:
            with file_of(self.store, task.id).open("r+b") as file:
                file.seek(material.geometry.offset(piece))
                file.write(b"rotten")
            self.unsure(material)

    @rule()
    def look_at_all(self) -> None:
        """`verify` leaves only what is right, even where a file rotted without any trace."""

        async def main() -> None:
            for number, (task, _) in enumerate(TASKS):
                handle = self.store.open(task.id)
                if handle is None:
                    continue
                await handle.verify()
                for piece in handle.held.search(1):
                    material = TASKS[number][1]
                    assert handle.read(material.geometry.offset(piece), material.geometry.size(piece)) == material.piece(piece)
                handle.close()

        self.do(main)

    @rule(number=TASK)
    def look(self, number: int) -> None:
        """As for memory, but rot may turn up while reading."""
        task, material = TASKS[number]
        handle = self.store.open(task.id)
        if handle is None:
            assert task.id not in self.sure
            return
        try:
            if handle.complete:
                assert handle.read(0, material.geometry.length) == material.data
            else:
                assert task.id not in self.sure
        except StoreError:
            assert not handle.complete
            assert task.id not in self.sure
        handle.close()

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.path)


TestMemory = Machine.TestCase
TestMemory.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
