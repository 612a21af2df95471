"""What only a disk can do to the store: bit rot, full disks, crashes, other users, older and newer versions."""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from swarm.errors import ConfigError, NoSpace, StoreBusy, StoreError, StoreTooNew
from swarm.store import content as content_module
from swarm.store import database, disk, hashing
from swarm.store import store as store_module
from swarm.task import MIB, url_task
from tests.store.material import Material, complete, create, disk_store, file_of, opened, signed, until, write


def run(main: Callable[[], Any]) -> None:
    async def limited() -> None:
        with trio.fail_after(30):
            await main()

    trio.run(limited)


def flip(path: Path, offset: int) -> None:
    """Flip one bit."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def prepared(path: Path, material: Material, **options: Any) -> Path:
    """A store that was filled by an earlier process; the path of the content's file."""
    with disk_store(path, **options) as store:
        found: list[Path] = []

        async def main() -> None:
            (await complete(store, material.url, material)).close()
            found.append(file_of(store, material.url.id))

        run(main)
        return found[0]


# --- layout, owners, versions -------------------------------------------------------------------------------------


def test_everything_in_the_data_directory_is_for_its_owner_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        prepared(tmp_path / "new" / "store", Material(9000))
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in (tmp_path / "new" / "store").rglob("*")}
    assert modes.pop("tasks") == 0o700
    assert stat.S_IMODE((tmp_path / "new" / "store").stat().st_mode) == 0o700
    assert {mode for name, mode in modes.items() if len(name) != 2} == {0o600}
    assert {mode for name, mode in modes.items() if len(name) == 2} == {0o700}


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_data_directory_that_others_may_write_in_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "store"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 700"):
        disk_store(path)
    assert list(path.iterdir()) == []


def test_a_data_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store"
    path.mkdir(mode=0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(ConfigError, match=f"belongs to user {me}"):
        disk_store(path)


def test_a_link_planted_where_the_tasks_go_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.mkdir(mode=0o700)
    (tmp_path / "elsewhere").mkdir()
    (path / "tasks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not a plain directory"):
        disk_store(path)


def test_a_file_where_the_data_directory_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(ConfigError, match="not a directory"):
        disk_store(tmp_path / "store")
    with pytest.raises(ConfigError, match="cannot use"):
        disk_store(tmp_path / "store" / "below")


def test_a_second_daemon_on_the_store_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with disk_store(tmp_path / "store"):
        with pytest.raises(StoreBusy, match=f"pid {os.getpid()}"):
            disk_store(tmp_path / "store")
        code = (
            "import sys; from pathlib import Path\n"
            "from swarm.errors import StoreBusy; from tests.store.material import disk_store\n"
            "try: disk_store(Path(sys.argv[1]))\n"
            "except StoreBusy as error: print(error)"
        )
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, timeout=30
        )
        assert f"pid {os.getpid()}" in other.stdout, other.stderr
    disk_store(tmp_path / "store").close()


def test_a_refused_start_leaves_the_directory_free(tmp_path: Path) -> None:
    prepared(tmp_path / "store", Material(9000))
    with sqlite3.connect(tmp_path / "store" / "store.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    for _ in range(2):
        with pytest.raises(StoreTooNew, match="newer swarm"):
            disk_store(tmp_path / "store")


def test_an_older_store_is_migrated_and_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(9000)
    prepared(tmp_path / "store", material)
    newer = (*database.MIGRATIONS, ("CREATE TABLE later (x)", "INSERT INTO later VALUES (1)"))
    monkeypatch.setattr(database, "MIGRATIONS", newer)
    for _ in range(2):
        with disk_store(tmp_path / "store") as store, opened(store, material.url.id) as task:
            assert task.read(0, 9000) == material.data
    connection = sqlite3.connect(tmp_path / "store" / "store.db")
    assert connection.execute("SELECT count(*) FROM later").fetchone() == (1,)
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    connection.close()
    monkeypatch.undo()
    with pytest.raises(StoreTooNew):
        disk_store(tmp_path / "store")


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(9000)
    prepared(tmp_path / "store", material)
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, ("CREATE TABLE later (x)", "nonsense")))
    with pytest.raises(StoreError, match="syntax"):
        disk_store(tmp_path / "store")
    monkeypatch.undo()
    with disk_store(tmp_path / "store") as store, opened(store, material.url.id) as task:
        assert task.complete


@pytest.mark.parametrize("content", [b"not a data base" * 1000, b""])
def test_a_damaged_data_base_is_refused_and_not_deleted(tmp_path: Path, content: bytes) -> None:
    material = Material(9000)
    file = prepared(tmp_path / "store", material)
    (tmp_path / "store" / "store.db").write_bytes(content)
    if content:
        with pytest.raises(StoreError, match=r"move store\.db"):
            disk_store(tmp_path / "store")
        assert file.exists()
    else:
        disk_store(tmp_path / "store").close()


def test_the_data_base_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.mkdir(mode=0o700)
    connection = sqlite3.connect(path / "store.db")
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(StoreError, match="not a swarm store"):
        disk_store(path)


# --- across restarts ----------------------------------------------------------------------------------------------


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    material, partial = Material(20_000), Material(20_000, seed=1)

    async def before() -> None:
        with disk_store(tmp_path / "store", now=lambda: 1000.0) as store:
            with await create(store, partial.url, partial, tag="t", application="a", private=True) as task:
                write(task, partial, 1, proof=signed(1))
                write(task, partial, 3)
            (await complete(store, material.blob, material)).close()
            assert store.pin(partial.url.id, True)
            entries.extend(store.entries())

    entries: list[Any] = []
    run(before)
    with disk_store(tmp_path / "store", now=lambda: 2000.0) as store:
        assert store.entries() == entries
        with opened(store, partial.url.id) as task:
            assert task.held.to01() == "01010"
            assert task.proof(1) == signed(1)
            assert task.proof(3) is None
            assert task.piece_digest(3) == partial.blake3(3)
            assert task.read(4096, 4096) == partial.piece(1)
        with opened(store, material.blob.id) as task:
            assert task.complete
            assert task.read(0, 20_000) == material.data


def test_the_order_of_last_use_survives_a_restart(tmp_path: Path) -> None:
    *kept, new = (Material(1000, seed=seed) for seed in range(4))
    clock = [0.0]

    def now() -> float:
        clock[0] += 100
        return clock[0]

    async def fill() -> None:
        with disk_store(tmp_path / "store", now=now) as store:
            for material in kept:
                (await complete(store, material.url, material)).close()
            opened(store, kept[0].url.id).close()

    async def evict() -> None:
        with disk_store(tmp_path / "store", now=now, quota_bytes=3000) as store, await create(store, new.url, new):
            assert {entry.task.id for entry in store.entries()} == {each.url.id for each in (kept[0], kept[2], new)}

    run(fill)
    run(evict)


def test_many_tasks_do_not_hold_up_the_start(tmp_path: Path) -> None:
    with disk_store(tmp_path / "store"):
        pass
    connection = sqlite3.connect(tmp_path / "store" / "store.db")
    with connection:
        for key in range(1, 2001):
            task_id = random.Random(key).randbytes(32)
            row = (key, f"00/{task_id.hex()}.0", 256 * 4096, 4096, None, key % 2, 0, 0.0, float(key), 0.0)
            connection.execute(f"INSERT INTO content VALUES ({'?, ' * 9}?)", row)  # noqa: S608
            connection.execute("INSERT INTO name VALUES (?, ?, NULL, 'http://x/', 1, 0, '', '', 0, 0.0)", (task_id, key))
            pieces = [(key, piece, b"h" * 32, 0, b"p" * 200) for piece in range(256 if key < 200 else 2)]
            connection.executemany("INSERT INTO piece VALUES (?, ?, ?, ?, ?)", pieces)
    connection.close()
    start = time.perf_counter()
    with disk_store(tmp_path / "store") as store:
        assert len(store.entries()) == 2000
        assert time.perf_counter() - start < 1.0


def test_a_file_that_is_gone_takes_its_record_with_it(tmp_path: Path) -> None:
    material = Material(9000)
    file = prepared(tmp_path / "store", material)
    file.unlink()

    async def main() -> None:
        with disk_store(tmp_path / "store") as store:
            assert store.open(material.url.id) is None
            assert store.entries() == []
            (await complete(store, material.url, material)).close()

    run(main)


def test_files_without_a_record_and_records_without_a_file_are_swept_away(tmp_path: Path) -> None:
    material, other = Material(9000), Material(9000, seed=1)
    file = prepared(tmp_path / "store", material)
    lost = prepared(tmp_path / "store", other)
    orphan = file.with_name("f" * 64 + ".00000000")
    orphan.write_bytes(b"x")
    lost.unlink()

    async def main() -> None:
        with disk_store(tmp_path / "store") as store:
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                await until(lambda: not orphan.exists() and len(store.entries()) == 1)
                nursery.cancel_scope.cancel()
            assert file.exists()
            assert [entry.task.id for entry in store.entries()] == [material.url.id]

    run(main)


# --- rot ----------------------------------------------------------------------------------------------------------


def test_flipped_bits_are_found_before_the_piece_is_served_and_the_piece_is_fetched_again(tmp_path: Path) -> None:
    material = Material(40 * 4096)
    file = prepared(tmp_path / "store", material)
    rotten = sorted(random.Random(1).sample(range(40), 10))
    for piece in rotten:
        flip(file, piece * 4096 + piece * 7)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, opened(store, material.url.id) as task:
            told: list[int] = []
            task.on_lost(told.extend)
            for piece in range(40):
                part = task.slice(piece, 0, 4096)
                assert (part is None) == (piece in rotten)
                if part is not None:
                    assert os.pread(part.fd, 4096, part.offset) == material.piece(piece)
                    part.release()
            assert told == rotten
            assert not task.complete
            assert not any(task.held[piece] for piece in rotten)
            assert store.statistics().rotten_pieces == 10
            write(task, material)
            await task.complete_with(await task.content_digest())
            assert task.read(0, 40 * 4096) == material.data
        with disk_store(tmp_path / "store") as store, opened(store, material.url.id) as task:
            assert await task.verify() == []
            assert task.complete

    run(main)


def test_a_piece_lost_to_rot_stays_lost_after_a_restart(tmp_path: Path) -> None:
    material = Material(9000)
    flip(prepared(tmp_path / "store", material), 5000)
    with disk_store(tmp_path / "store") as store, opened(store, material.url.id) as task:
        assert task.slice(1, 0, 1) is None
    with disk_store(tmp_path / "store") as store:
        assert store.entries()[0].held == 2
        with opened(store, material.url.id) as task:
            assert task.held.to01() == "101"
            assert not task.complete


def test_a_file_edited_while_it_is_served_is_noticed(tmp_path: Path) -> None:
    material = Material(9000)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await complete(store, material.url, material) as task:
            first = task.slice(1, 0, 100)
            assert first is not None
            first.release()
            flip(file_of(store, material.url.id), 5000)
            assert task.slice(1, 0, 100) is None
            still = task.slice(0, 0, 100)
            assert still is not None
            still.release()

    run(main)


def test_a_file_edited_while_it_was_closed_is_noticed(tmp_path: Path) -> None:
    material = Material(9000)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store:
            (await complete(store, material.url, material)).close()
            flip(file_of(store, material.url.id), 5000)
            with opened(store, material.url.id) as task:
                with pytest.raises(StoreError, match="not held"):
                    task.read(0, 9000)
                assert task.held.to01() == "101"

    run(main)


def test_a_piece_is_hashed_once_and_not_at_every_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(9000)
    prepared(tmp_path / "store", material)
    hashed: list[int] = []
    original = hashing.piece_digest

    def piece_digest(fd: int, offset: int, length: int) -> bytes | None:
        hashed.append(offset)
        return original(fd, offset, length)

    monkeypatch.setattr(hashing, "piece_digest", piece_digest)
    with disk_store(tmp_path / "store") as store:
        for _ in range(3):
            with opened(store, material.url.id) as task:
                for piece in (0, 1, 1):
                    part = task.slice(piece, 0, 1)
                    assert part is not None
                    part.release()
    assert hashed == [0, 4096]


@pytest.mark.parametrize("length", [0, 5000, 8999])
def test_a_file_cut_short_loses_what_was_cut_off(tmp_path: Path, length: int) -> None:
    material = Material(9000)
    file = prepared(tmp_path / "store", material)
    os.truncate(file, length)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, opened(store, material.url.id) as task:
            assert await task.verify() == [piece for piece in range(3) if min(4096 * (piece + 1), 9000) > length]
            write(task, material)
            assert task.read(0, 9000) == material.data

    run(main)


def test_a_bad_sector_costs_one_piece_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(5 * 4096)
    prepared(tmp_path / "store", material)
    original = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if 2 * 4096 <= offset < 3 * 4096:
            raise OSError(errno.EIO, "Input/output error")
        return original(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, opened(store, material.url.id) as task:
            told: list[int] = []
            task.on_lost(told.extend)
            assert task.slice(2, 0, 10) is None
            assert told == [2]
            assert await task.verify() == []
            assert task.held.to01() == "11011"

    run(main)


def test_verify_finds_in_one_go_what_is_rotten_before_a_file_is_handed_out(tmp_path: Path) -> None:
    material = Material(9000)
    flip(prepared(tmp_path / "store", material), 8999)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, opened(store, material.url.id) as task:
            assert task.complete
            assert await task.verify() == [2]
            assert not task.complete
            assert await task.verify() == []

    run(main)


def test_rot_under_a_resumed_download_is_blamed_on_the_disk_and_not_on_the_peers(tmp_path: Path) -> None:
    material = Material(9000)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            write(task, material, 0, 1)
            file = file_of(store, material.url.id)
        flip(file, 100)
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            told: list[int] = []
            task.on_lost(told.extend)
            write(task, material)
            with pytest.raises(StoreError, match="changed on disk"):
                await task.content_digest()
            assert told == [0]
            write(task, material)
            assert await task.content_digest() == material.digest

    run(main)


def test_the_scrub_finds_rot_nobody_asked_for_and_never_counts_as_use(tmp_path: Path) -> None:
    material = Material(9000)
    flip(prepared(tmp_path / "store", material), 5000)

    async def main() -> None:
        incomplete: list[list[bytes]] = []
        with disk_store(tmp_path / "store", scrub_every_s=0.0, scrub_bytes_per_s=1 << 30) as store:
            store.on_incomplete(incomplete.append)
            before = store.entries()[0].last_used
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                while store.entries()[0].held == 3:
                    assert not store.entries()[0].in_use
                    await trio.sleep(0.001)
                nursery.cancel_scope.cancel()
            entry = store.entries()[0]
            assert (entry.held, entry.complete, entry.last_used) == (2, False, before)
            assert incomplete == [[material.url.id, material.blob.id]]

    run(main)


def test_content_whose_file_was_deleted_is_told_of_under_every_id(tmp_path: Path) -> None:
    first, second = Material(9000), Material(8000, seed=1)

    async def main() -> None:
        incomplete: list[list[bytes]] = []
        with disk_store(tmp_path / "store") as store:
            for material in (first, second):
                (await complete(store, material.url, material)).close()
                file_of(store, material.url.id).unlink()
            store.on_incomplete(incomplete.append)
            assert store.open(first.url.id) is None
            assert incomplete == [[first.url.id, first.blob.id]]
            await store._sweep()
            assert incomplete[1:] == [[second.url.id, second.blob.id]]
            assert store.entries() == []

    run(main)


def test_the_scrub_reads_a_content_again_only_when_it_is_due(tmp_path: Path) -> None:
    material, other = Material(9000), Material(8000, seed=1)

    async def main() -> None:
        clock = [0.0]
        with disk_store(tmp_path / "store", now=lambda: clock[0]) as store:
            (await complete(store, material.url, material)).close()
            clock[0] = 1000.0
            (await complete(store, other.url, other)).close()
        clock[0] = 3600.0
        with disk_store(tmp_path / "store", now=lambda: clock[0], scrub_every_s=3600.0, scrub_bytes_per_s=1 << 30) as store:
            for _ in range(2):
                async with trio.open_nursery() as nursery:
                    await nursery.start(store.run)
                    await until(lambda: store.statistics().scrubbed_bytes)
                    await trio.testing.wait_all_tasks_blocked(0.02)
                    nursery.cancel_scope.cancel()
                assert store.statistics().scrubbed_bytes == 9000

    run(main)


# --- hard links ---------------------------------------------------------------------------------------------------


def test_an_edited_hard_link_neither_corrupts_the_store_nor_is_overwritten_by_it(tmp_path: Path) -> None:
    material = Material(9000)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store:
            with await complete(store, material.url, material) as task:
                assert task.path is not None
                link = tmp_path / "link"
                os.link(task.path, link)
                flip(link, 100)
                edited = link.read_bytes()
                part = task.slice(1, 0, 100)
                assert part is not None
                assert task.slice(0, 0, 100) is None
                write(task, material, 0)
                assert task.held.to01() == "100", "the other pieces are in the file that is not ours alone any more"
                assert os.pread(part.fd, 100, part.offset) == material.piece(1)[:100]
                part.release()
                write(task, material)
                await task.complete_with(await task.content_digest())
                assert task.read(0, 9000) == material.data
                assert link.read_bytes() == edited
            with opened(store, material.url.id) as task:
                assert await task.verify() == []

    run(main)


def test_a_file_made_read_only_for_a_link_is_still_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(9000)
    file = prepared(tmp_path / "store", material)
    file.chmod(0o444)
    original = os.open

    def as_a_user(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if str(path) == str(file) and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", as_a_user)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, opened(store, material.url.id) as task:
            assert await task.verify() == []
            task.drop_pieces([1])
            write(task, material)
            write(task, material)
            await task.complete_with(await task.content_digest())
            assert task.path != file

    run(main)


# --- full disks and failing ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_fails_one_write_and_marks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    material = Material(9000)

    def pwrite(fd: int, data: Any, offset: int) -> int:
        raise OSError(code, os.strerror(code))

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", pwrite)
                with pytest.raises(NoSpace, match="4096 bytes"):
                    write(task, material, 0)
            assert not task.held.any()
            assert store.entries()[0].held == 0
            write(task, material)
            await task.complete_with(await task.content_digest())

    run(main)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(9000)
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: original(fd, data[:1000], offset))

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await complete(store, material.url, material) as task:
            assert task.read(0, 9000) == material.data

    run(main)


def test_no_room_for_the_whole_content_is_said_before_the_first_byte(tmp_path: Path) -> None:
    material = Material(9000)

    async def main() -> None:
        free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        with disk_store(tmp_path / "store", min_free_bytes=free * 2) as store:
            with pytest.raises(NoSpace, match="too little"):
                await create(store, material.url, material)
            assert store.entries() == []
            assert store.statistics().used_bytes == 0

    run(main)


def test_a_reservation_the_disk_refuses_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(9000)

    def full(fd: int, length: int) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def main() -> None:
        with disk_store(tmp_path / "store") as store:
            with monkeypatch.context() as patch:
                patch.setattr(disk, "_fallocate", full)
                with pytest.raises(NoSpace, match="cannot reserve 9000 bytes"):
                    await create(store, material.url, material)
            assert store.entries() == []
            assert store.statistics().used_bytes == 0
            assert not [path for path in (tmp_path / "store" / "tasks").rglob("*") if path.is_file()]
            (await complete(store, material.url, material)).close()

    run(main)


def test_room_reserved_but_not_allocated_is_not_given_away_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(9000)
    monkeypatch.setattr(disk, "_fallocate", lambda fd, length: False)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store:
            monkeypatch.setattr(os, "statvfs", lambda path: type("", (), {"f_bavail": 10, "f_frsize": 1000}))
            with await create(store, material.url, material) as task:
                with pytest.raises(NoSpace):
                    await create(store, url_task("http://x/other"), Material(2000))
                write(task, material, 0, 1)
                (await create(store, url_task("http://x/other"), Material(2000))).close()
            assert await store.remove(material.url.id)
            (await create(store, url_task("http://x/third"), Material(8000))).close()

    run(main)


def test_the_room_is_really_reserved(tmp_path: Path) -> None:
    async def main() -> None:
        material = Material(0)
        with disk_store(tmp_path / "store") as store:
            large = url_task("http://x/large")
            from swarm.task import Geometry

            with await store.create(large, Geometry.of(64 * MIB)) as _:  # type: ignore[attr-defined]
                assert file_of(store, large.id).stat().st_blocks * 512 >= 64 * MIB
            (await complete(store, material.url, material)).close()

    run(main)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a file system in memory at /dev/shm")
def test_a_file_system_in_memory_is_not_filled_with_zeros_first() -> None:
    async def main(path: Path) -> None:
        from swarm.task import Geometry

        with disk_store(path / "store") as store:
            large = url_task("http://x/large")
            with await store.create(large, Geometry.of(64 * MIB)) as _:  # type: ignore[attr-defined]
                assert file_of(store, large.id).stat().st_blocks == 0

    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        run(lambda: main(Path(path)))


def test_a_data_base_that_cannot_grow_fails_the_completion_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = Material(100 * 4096)
    monkeypatch.setattr(database, "BATCH_ROWS", 64)  # a few rows would fit into pages that are there

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            connection = store._rows.writer._connection
            await store._flush()
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {pages}")
            write(task, material, proof=signed(0))
            with pytest.raises(NoSpace, match="free some space"):
                await task.complete_with(material.digest)
            assert store._rows.writer.pending > 100
            connection.execute("PRAGMA max_page_count = 1000000")
            await task.complete_with(material.digest)
        with disk_store(tmp_path / "store") as store, opened(store, material.url.id) as task:
            assert task.complete
            assert await task.verify() == []

    run(main)


def test_rows_that_cannot_be_committed_do_not_pile_up_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(200 * 512, piece_length=512)
    monkeypatch.setattr(database, "MAX_PENDING", 64)
    monkeypatch.setattr(database, "BATCH_ROWS", 64)  # a few rows would fit into pages that are there

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            writer = store._rows.writer
            await store._flush()
            pages = writer._connection.execute("PRAGMA page_count").fetchone()[0]
            writer._connection.execute(f"PRAGMA max_page_count = {pages}")
            for piece in range(64):
                write(task, material, piece, proof=signed(piece))
            with pytest.raises(NoSpace, match="disk is full"):
                await store._flush()
            with pytest.raises(NoSpace, match="disk is full"):
                write(task, material, 64)
            held = task.held.count()
            assert held == 64, "the refused piece is not marked"
            writer._connection.execute("PRAGMA max_page_count = 1000000")
            await store._flush()
            write(task, material)
            await task.complete_with(await task.content_digest())

    run(main)


def test_after_a_failed_sync_nothing_that_was_written_is_relied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(9000)

    def fdatasync(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            told: list[int] = []
            task.on_lost(told.extend)
            write(task, material)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fdatasync", fdatasync)
                with pytest.raises(StoreError, match="cannot sync"):
                    await task.complete_with(material.digest)
            assert told == [0, 1, 2]
            assert not task.complete
            write(task, material)
            await task.complete_with(material.digest)

    run(main)


def test_a_write_error_in_the_background_is_remembered_until_completion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = Material(9000)
    monkeypatch.setattr(disk, "SYNC_EVERY_BYTES", 4096)
    original = os.fdatasync

    def fdatasync(fd: int) -> None:
        if threading.current_thread().name == "swarm-store-file":
            raise OSError(errno.EIO, "Input/output error")
        original(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            write(task, material)
            await store._settle()
            with pytest.raises(StoreError, match="cannot sync"):
                await task.complete_with(material.digest)
            assert not task.held.any()

    run(main)


def test_without_a_descriptor_left_pieces_are_still_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(20_000)
    monkeypatch.setattr(disk, "SYNC_EVERY_BYTES", 4096)
    monkeypatch.setattr(disk, "HASH_EVERY_BYTES", 4096)

    def none_left(*_: Any, **__: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            with monkeypatch.context() as patch:
                patch.setattr(os, "open", none_left)
                patch.setattr(os, "dup", none_left)
                write(task, material)
                with pytest.raises(StoreError, match="Too many open files"):
                    await task.content_digest()
            assert await task.content_digest() == material.digest
            await task.complete_with(material.digest)

    run(main)


# --- power loss -----------------------------------------------------------------------------------------------------


def test_after_a_power_loss_what_was_not_synced_is_hashed_before_it_counts(tmp_path: Path) -> None:
    material = Material(5 * 4096)

    async def before() -> None:
        with disk_store(tmp_path / "store", boot_id="one") as store, await create(store, material.url, material) as task:
            write(task, material, 0, 1, 2, 3)
            files.append(file_of(store, material.url.id))

    async def after() -> None:
        with disk_store(tmp_path / "store", boot_id="two") as store:
            assert store.entries()[0].held == 0
            with opened(store, material.url.id) as task:
                assert not task.held.any()
                assert task.slice(1, 0, 1) is None
            with await create(store, material.url, material) as task:
                assert task.held.to01() == "10110"
            assert store.entries()[0].held == 3
        with disk_store(tmp_path / "store", boot_id="three") as store, opened(store, material.url.id) as task:
            assert task.held.to01() == "10110", "what was read back after a boot is on the disk"

    files: list[Path] = []
    run(before)
    with files[0].open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
    run(after)


def test_suspects_are_settled_in_the_background_too(tmp_path: Path) -> None:
    material = Material(5 * 4096)

    async def main() -> None:
        with disk_store(tmp_path / "store", boot_id="one") as store, await create(store, material.url, material) as task:
            write(task, material, 0, 1)
        with disk_store(tmp_path / "store", boot_id="two") as store:
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                await until(lambda: store.entries()[0].held == 2)
                nursery.cancel_scope.cancel()

    run(main)


def test_the_same_boot_trusts_what_a_killed_process_wrote(tmp_path: Path) -> None:
    material = Material(5 * 4096)

    async def main() -> None:
        with disk_store(tmp_path / "store", boot_id="one") as store, await create(store, material.url, material) as task:
            write(task, material, 0, 1)
        with disk_store(tmp_path / "store", boot_id="one") as store, opened(store, material.url.id) as task:
            assert task.held.to01() == "11000"

    run(main)


def test_what_was_synced_in_the_background_is_trusted_after_a_power_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = Material(5 * 4096)
    monkeypatch.setattr(disk, "SYNC_EVERY_BYTES", 2 * 4096)

    async def main() -> None:
        with disk_store(tmp_path / "store", boot_id="one") as store, await create(store, material.url, material) as task:
            write(task, material, 0, 1, 2)
            await store._settle()
        with disk_store(tmp_path / "store", boot_id="two") as store, opened(store, material.url.id) as task:
            assert task.held.to01() == "11000"

    run(main)


def test_a_sync_of_a_piece_written_before_says_nothing_of_the_one_written_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = Material(5 * 4096)
    monkeypatch.setattr(disk, "SYNC_EVERY_BYTES", 4096)
    entered, leave = threading.Event(), threading.Event()
    original = os.fdatasync

    def slow(fd: int) -> None:
        entered.set()
        assert leave.wait(10)
        original(fd)

    async def main() -> None:
        with disk_store(tmp_path / "store", boot_id="one") as store, await create(store, material.url, material) as task:
            monkeypatch.setattr(os, "fdatasync", slow)
            write(task, material, 0)
            await trio.to_thread.run_sync(entered.wait, 10)
            task.drop_pieces([0])
            monkeypatch.setattr(disk, "SYNC_EVERY_BYTES", 1 << 30)
            write(task, material, 0)
            leave.set()
            await store._settle()
        with disk_store(tmp_path / "store", boot_id="two") as store, opened(store, material.url.id) as task:
            assert not task.held[0]

    run(main)


def test_complete_content_is_trusted_after_a_power_loss_and_hashed_when_first_served(tmp_path: Path) -> None:
    material = Material(9000)
    prepared(tmp_path / "store", material, boot_id="one")
    with disk_store(tmp_path / "store", boot_id="two") as store, opened(store, material.url.id) as task:
        assert task.complete
        part = task.slice(0, 0, 1)
        assert part is not None
        part.release()


# --- the content hasher ---------------------------------------------------------------------------------------------


def test_the_content_is_hashed_while_pieces_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(40 * 4096)
    monkeypatch.setattr(disk, "HASH_EVERY_BYTES", 4 * 4096)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            write(task, material, *range(39))
            store._hashing.wait()
            hasher = task.content.hasher
            assert hasher is not None
            assert hasher._position == 36 * 4096
            write(task, material, 39)
            assert await task.content_digest() == material.digest
            assert task.content.hasher is hasher

    run(main)


def test_a_piece_dropped_after_it_was_hashed_does_not_stay_in_the_content_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material, wrong = Material(40 * 4096), Material(40 * 4096, seed=1)
    monkeypatch.setattr(disk, "HASH_EVERY_BYTES", 4096)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            write(task, wrong, 3)
            write(task, material)
            store._hashing.wait()
            task.drop_pieces([3])
            write(task, material, 3)
            assert await task.content_digest() == material.digest

    run(main)


def test_waiting_for_a_digest_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(40 * 4096)
    monkeypatch.setattr(hashing, "READ_BYTES", 4096)
    original, calls = os.preadv, 0

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            write(task, material)
            scope = trio.CancelScope()

            def preadv(fd: int, buffers: Any, offset: int) -> int:
                nonlocal calls
                calls += 1
                trio.from_thread.run_sync(scope.cancel)
                return original(fd, buffers, offset)

            with monkeypatch.context() as patch, scope:
                patch.setattr(os, "preadv", preadv)
                await task.content_digest()
            assert scope.cancelled_caught
            assert calls == 1
            assert await task.content_digest() == material.digest

    run(main)


def test_no_descriptor_or_thread_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "HASH_EVERY_BYTES", 4096)
    monkeypatch.setattr(disk, "SYNC_EVERY_BYTES", 4096)

    def descriptors() -> set[str]:
        return {
            os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
        }

    def ours() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("swarm-")]

    async def main() -> None:
        with disk_store(tmp_path / "store") as store:
            for seed in range(3):
                material = Material(20_000, seed=seed)
                with await complete(store, material.url, material) as task:
                    task.drop_pieces([0])
                    write(task, material)
            material = Material(20_000, seed=9)
            left_open = await create(store, material.url, material)
            write(left_open, material, 0, 1)
        assert not [path for path in descriptors() if str(tmp_path) in path]

    run(main)
    assert ours() == []


# --- what happens while a thread is at work ---------------------------------------------------------------------------


def test_a_piece_lost_while_the_content_is_synced_keeps_it_from_being_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = Material(9000)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            write(task, material)
            with monkeypatch.context() as patch:
                patch.setattr(disk, "_sync_file", lambda *_: trio.from_thread.run_sync(task.drop_pieces, [1]))
                with pytest.raises(StoreError, match="lost while"):
                    await task.complete_with(material.digest)
            assert not task.complete
            assert store.open(material.blob.id) is None

    run(main)


def test_a_piece_replaced_while_the_content_is_hashed_spoils_that_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material, wrong = Material(9000), Material(9000, seed=1)
    original = hashing.PrefixHasher.hexdigest

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            write(task, wrong, 1)
            write(task, material)

            def replace() -> None:
                task.drop_pieces([1])
                write(task, material, 1)

            def hexdigest(*arguments: Any) -> str:
                text = original(*arguments)
                trio.from_thread.run_sync(replace)
                return text

            with monkeypatch.context() as patch:
                patch.setattr(hashing.PrefixHasher, "hexdigest", hexdigest)
                with pytest.raises(StoreError, match="lost while"):
                    await task.content_digest()
            assert await task.content_digest() == material.digest

    run(main)


def test_a_piece_replaced_while_it_is_verified_is_not_taken_for_rotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(9000)
    file = prepared(tmp_path / "store", material)
    flip(file, 5000)
    original = hashing.piece_digest

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, opened(store, material.url.id) as task:

            def replace() -> None:
                task.drop_pieces([1])
                write(task, material, 1)

            def piece_digest(fd: int, offset: int, length: int) -> bytes | None:
                found = original(fd, offset, length)
                if offset == 4096 and threading.current_thread() is not threading.main_thread():
                    trio.from_thread.run_sync(replace)
                return found

            with monkeypatch.context() as patch:
                patch.setattr(hashing, "piece_digest", piece_digest)
                assert await task.verify() == []
            assert task.held.all()
            assert task.read(0, 9000) == material.data

    run(main)


def test_the_record_of_a_completion_is_synced_and_that_of_a_piece_is_not(tmp_path: Path) -> None:
    material = Material(9000)
    statements: list[str] = []

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            await store._flush()
            store._rows.writer._connection.set_trace_callback(statements.append)
            write(task, material)
            await store._flush()
            assert any(text.startswith("INSERT OR REPLACE INTO piece") for text in statements)
            assert "PRAGMA synchronous = FULL" not in statements
            statements.clear()
            await task.complete_with(material.digest)
            full = statements.index("PRAGMA synchronous = FULL")
            row = next(n for n, text in enumerate(statements) if text.startswith("INSERT OR REPLACE INTO content"))
            assert full < row < statements.index("COMMIT", row)
            assert "PRAGMA synchronous = NORMAL" not in statements[full:row]

    run(main)


def test_a_content_closed_and_opened_again_at_once_has_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = Material(9000)
    monkeypatch.setattr(store_module, "MAX_WARM", 0)
    monkeypatch.setattr(content_module, "MAX_RECENT_PROOFS", 0)
    monkeypatch.setattr(database, "BATCH_SECONDS", 0.5)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store:
            with await create(store, material.url, material) as task:
                write(task, material, 0, 2, proof=signed(2))
                assert task.proof(2) == signed(2)
            with opened(store, material.url.id) as task:
                assert task.held.to01() == "101"
                task.drop_pieces([0])
            with opened(store, material.url.id) as task:
                assert task.held.to01() == "001"

    run(main)


def test_the_way_to_the_file_is_synced_before_the_content_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = Material(9000)
    synced: list[str] = []
    original = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        original(fd)

    async def main() -> None:
        with disk_store(tmp_path / "store") as store, await create(store, material.url, material) as task:
            write(task, material)
            monkeypatch.setattr(os, "fsync", fsync)
            await task.complete_with(material.digest)
            assert synced == [str(file_of(store, material.url.id).parent), str(tmp_path / "store" / "tasks")]

    run(main)
