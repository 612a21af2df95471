"""What every store does, in memory and on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from swarm.edges import Store
from swarm.errors import DigestMismatch, LocalProtocolError, NoSpace, NotPermitted, StoreError
from swarm.store.handle import OpenTask
from swarm.store.memory import MemoryStore
from swarm.store.store import EVICT_SECONDS, TaskStore
from swarm.task import Digest, Geometry, blob_task, url_task
from tests.store.material import Material, complete, create, disk_store, opened, signed, write

Make = Callable[..., TaskStore]


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path):
    made: list[TaskStore] = []

    def make(**options: Any) -> TaskStore:
        made.append(MemoryStore(**options) if request.param == "memory" else disk_store(tmp_path / str(len(made)), **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


def run(main: Callable[[], Any]) -> None:
    async def limited() -> None:
        with trio.fail_after(20):
            await main()

    trio.run(limited)


async def never_answers(task_id: bytes) -> None:
    await trio.sleep_forever()


def test_it_is_the_store_the_rest_of_the_node_asks_for(make: Make) -> None:
    store: Store = make()
    assert store.entries() == []


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 50_000])
def test_content_of_any_length_comes_back_exactly(make: Make, length: int) -> None:
    material = Material(length)

    async def main() -> None:
        store = make()
        with await complete(store, material.url, material) as task:
            assert task.complete
            assert task.digest == material.digest
            assert task.read(0, length) == material.data
            fd = task.open_read_only()
            try:
                assert os.pread(fd, length + 1, 0) == material.data
                with pytest.raises(OSError, match="Bad file"):
                    os.pwrite(fd, b"x", 0)
            finally:
                os.close(fd)
            for piece in range(material.geometry.piece_count):
                part = task.slice(piece, 0, material.geometry.size(piece))
                assert part is not None
                assert os.pread(part.fd, part.length, part.offset) == material.piece(piece)
                part.release()

    run(main)


def test_a_piece_is_held_from_its_writing_on(make: Make) -> None:
    material = Material(20_000)

    async def main() -> None:
        with await create(make(), material.url, material) as task:
            write(task, material, 3, 1)
            assert task.held.to01() == "01010"
            assert task.piece_digest(1) == material.blake3(1)
            assert task.piece_digest(0) is task.piece_digest(-1) is task.piece_digest(5) is None
            assert task.slice(0, 0, 1) is None
            assert task.read(4096, 4096) == material.piece(1)
            with pytest.raises(StoreError, match="not held"):
                task.read(4000, 200)
            with pytest.raises(LocalProtocolError):
                task.open_read_only()

    run(main)


def test_a_late_duplicate_cannot_overwrite_a_verified_piece(make: Make) -> None:
    material, other = Material(5000), Material(5000, seed=1)

    async def main() -> None:
        with await create(make(), material.url, material) as task:
            write(task, material)
            write(task, other)
            assert task.read(0, 5000) == material.data
            assert task.piece_digest(0) == material.blake3(0)

    run(main)


def test_a_piece_of_the_wrong_size_or_number_is_refused(make: Make) -> None:
    material = Material(5000)

    async def main() -> None:
        with await create(make(), material.url, material) as task:
            for piece, data in [(0, b"x" * 4095), (1, b"x" * 4096), (2, b""), (-1, b"x" * 904)]:
                with pytest.raises(LocalProtocolError):
                    task.write_piece(piece, memoryview(data), b"h" * 32, None)
            assert not task.held.any()

    run(main)


def test_a_slice_never_reaches_beyond_its_piece(make: Make) -> None:
    material = Material(5000)

    async def main() -> None:
        with await create(make(), material.url, material) as task:
            write(task, material)
            for piece, offset, length in [
                (0, 0, 4097),
                (0, 4096, 1),
                (0, -1, 2),
                (0, 5, -1),
                (1, 0, 905),
                (2, 0, 0),
                (-1, 0, 1),
            ]:
                assert task.slice(piece, offset, length) is None
            part = task.slice(1, 900, 4)
            assert part is not None
            assert os.pread(part.fd, part.length, part.offset) == material.data[-4:]
            part.release()

    run(main)


def test_content_of_a_url_is_found_by_its_digest(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make()
        with await create(store, material.url, material) as task:
            write(task, material)
            assert store.open(material.blob.id) is None
            await task.complete_with(material.digest)
        with opened(store, material.blob.id) as blob:
            assert blob.complete
            assert blob.read(0, 9000) == material.data
            assert blob.task == material.blob
        assert [entry.task.id for entry in store.entries()] == [material.url.id]

    run(main)


def test_two_urls_with_the_same_bytes_are_stored_once(make: Make) -> None:
    material = Material(9000)
    second_url = url_task("http://mirror/same")

    async def main() -> None:
        store = make()
        (await complete(store, material.url, material)).close()
        with await create(store, second_url, material) as task:
            write(task, material)
            assert store.statistics().used_bytes == 18_000
            part = task.slice(0, 0, 4096)
            assert part is not None
            await task.complete_with(material.digest)
            assert task.complete
            assert task.held.all()
            assert task.task == second_url
            assert os.pread(part.fd, part.length, part.offset) == material.piece(0)
            part.release()
        assert store.statistics().used_bytes == 9000
        for task_id in (material.url.id, second_url.id, material.blob.id):
            with opened(store, task_id) as task:
                assert task.read(0, 9000) == material.data
        assert await store.remove(material.url.id)
        with opened(store, second_url.id) as task:
            assert task.read(0, 9000) == material.data

    run(main)


def test_fresh_content_is_not_merged_into_a_copy_that_lost_pieces(make: Make) -> None:
    material = Material(9000)
    second_url = url_task("http://mirror/same")

    async def main() -> None:
        store = make()
        with await complete(store, material.url, material) as task:
            task.drop_pieces([1])
            with await complete(store, second_url, material) as fresh:
                assert fresh.complete
                assert fresh.read(0, 9000) == material.data
                with opened(store, material.blob.id) as blob:
                    assert blob.complete
            assert task.held.to01() == "101"

    run(main)


def test_the_same_bytes_in_pieces_of_another_length_are_kept_apart(make: Make) -> None:
    material, otherwise = Material(9000), Material(9000, piece_length=2048)
    second_url = url_task("http://mirror/same")

    async def main() -> None:
        store = make()
        (await complete(store, material.url, material)).close()
        with await complete(store, second_url, otherwise) as task:
            assert task.geometry == otherwise.geometry
            assert task.complete
        with opened(store, material.blob.id) as blob:
            assert blob.geometry == material.geometry
        assert await store.remove(material.url.id)
        with opened(store, material.blob.id) as blob:
            assert blob.geometry == otherwise.geometry
            assert blob.read(0, 9000) == material.data

    run(main)


def test_a_blob_begun_and_left_takes_over_what_a_url_brought(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make()
        with await create(store, material.blob, material, tag="begun") as task:
            write(task, material, 0)
        (await complete(store, material.url, material)).close()
        with opened(store, material.blob.id) as task:
            assert task.complete
        assert store.statistics().used_bytes == 9000
        assert {entry.tag for entry in store.entries()} == {"begun", ""}

    run(main)


def test_a_blob_being_fetched_is_left_alone_and_merged_when_it_is_complete(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make()
        with await create(store, material.blob, material) as blob:
            write(blob, material, 0)
            (await complete(store, material.url, material)).close()
            assert blob.held.count() == 1
            write(blob, material)
            await blob.complete_with(material.digest)
            assert blob.read(0, 9000) == material.data
        assert store.statistics().used_bytes == 9000

    run(main)


def test_a_repeated_fetch_resumes(make: Make) -> None:
    material = Material(20_000)

    async def main() -> None:
        store = make()
        with await create(store, material.url, material) as task:
            write(task, material, 1, 2)
        with await create(store, material.url, material) as task:
            assert task.held.to01() == "01100"
            assert task.read(4096, 8192) == material.data[4096:12288]
        assert store.statistics().used_bytes == 20_000

    run(main)


def test_content_of_another_length_replaces_what_was_there(make: Make) -> None:
    old, new = Material(20_000), Material(30_000, seed=1)

    async def main() -> None:
        store = make()
        reader = await create(store, old.url, old)
        write(reader, old)
        with await create(store, old.url, new) as task:
            assert not task.held.any()
            write(task, new)
            assert reader.read(0, 20_000) == old.data
            reader.close()
            assert store.statistics().used_bytes == 30_000
            assert task.read(0, 30_000) == new.data

    run(main)


def test_what_is_in_use_is_neither_removed_nor_evicted(make: Make) -> None:
    material, big = Material(9000), Material(9000, seed=1)

    async def main() -> None:
        store = make(quota_bytes=10_000)
        task = await complete(store, material.url, material)
        with pytest.raises(NotPermitted, match="in use"):
            await store.remove(material.url.id)
        with pytest.raises(NoSpace, match="in use"):
            await store.create(big.url, big.geometry)
        part = task.slice(0, 0, 10)
        assert part is not None
        task.close()
        assert store.entries()[0].in_use
        with pytest.raises(NoSpace):
            await store.create(big.url, big.geometry)
        assert os.pread(part.fd, part.length, part.offset) == material.data[:10]
        part.release()
        part.release()
        assert not store.entries()[0].in_use
        (await store.create(big.url, big.geometry)).close()
        assert store.open(material.url.id) is None

    run(main)


def test_the_least_recently_used_goes_first_and_pins_stay(make: Make) -> None:
    materials = [Material(1000, seed=seed) for seed in range(5)]

    async def main() -> None:
        store = make(quota_bytes=4000)
        gone: list[bytes] = []

        async def evicted(task_id: bytes) -> None:
            gone.append(task_id)

        store.on_evict(evicted)
        for material in materials[:4]:
            (await complete(store, material.url, material)).close()
        assert store.pin(materials[0].url.id, True)
        opened(store, materials[1].url.id).close()
        with await create(store, materials[4].url, materials[4]):
            assert gone == [materials[2].url.id, materials[2].blob.id]
            assert {entry.task.id for entry in store.entries()} == {materials[i].url.id for i in (0, 1, 3, 4)}
        assert store.statistics().evicted == 1

    run(main)


def test_nothing_is_evicted_for_what_would_not_fit_anyway(make: Make) -> None:
    materials = [Material(1000, seed=seed) for seed in range(3)]

    async def main() -> None:
        store = make(quota_bytes=3000)
        for material in materials:
            (await complete(store, material.url, material)).close()
        store.pin(materials[0].url.id, True)
        with pytest.raises(NoSpace, match=r"no room for 0\.0 MiB"):
            await store.create(url_task("http://origin/large"), Geometry.of(2500))
        assert len(store.entries()) == 3

    run(main)


def test_two_tasks_begun_at_once_cannot_both_take_the_last_room(make: Make) -> None:
    materials = [Material(3000, seed=seed) for seed in range(2)]
    outcomes: list[str] = []

    async def main() -> None:
        store = make(quota_bytes=5000)
        handles: list[Any] = []

        async def begin(material: Material) -> None:
            try:
                handles.append(await store.create(material.url, material.geometry))
                outcomes.append("made")
            except NoSpace:
                outcomes.append("no space")

        async with trio.open_nursery() as nursery:
            for material in materials:
                nursery.start_soon(begin, material)
        for handle in handles:
            handle.close()

    run(main)
    assert sorted(outcomes) == ["made", "no space"]


def test_one_task_begun_twice_at_once_is_one_content(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make()
        handles: list[Any] = []

        async def begin() -> None:
            handles.append(await store.create(material.url, material.geometry))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(begin)
        write(handles[0], material, 1)
        assert all(handle.held[1] for handle in handles)
        for handle in handles:
            handle.close()
        assert store.statistics().used_bytes == 9000

    run(main)


def test_above_the_high_mark_it_deletes_down_to_the_low_one(make: Make) -> None:
    materials = [Material(1000, seed=seed) for seed in range(10)]

    async def main() -> None:
        store = make(quota_bytes=10_000, high_watermark=0.85, low_watermark=0.5)
        deleted = trio.Event()
        count = 0

        async def evicted(task_id: bytes) -> None:
            nonlocal count
            count += task_id == materials[count].url.id
            if count == 4:
                deleted.set()

        store.on_evict(evicted)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            for material in materials[:8]:
                (await complete(store, material.url, material)).close()
            assert count == 0
            (await complete(store, materials[8].url, materials[8])).close()
            await deleted.wait()
            nursery.cancel_scope.cancel()
        assert store.statistics().used_bytes == 5000

    run(main)


def test_what_ends_without_a_piece_leaves_nothing_and_frees_its_room(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make(quota_bytes=10_000)
        with await create(store, material.url, material) as task, await create(store, material.url, material):
            write(task, material, 0, 1)
            task.drop_pieces([0, 1])
        assert store.entries() == []
        assert store.statistics().used_bytes == 0
        with await create(store, material.blob, material) as task:
            write(task, material, 2)
        assert [entry.held for entry in store.entries()] == [1]

    run(main)


def test_what_is_pinned_or_still_read_is_kept_without_a_piece(make: Make) -> None:
    material, other = Material(9000), Material(9000, seed=1)

    async def main() -> None:
        store = make()
        with await create(store, material.url, material):
            store.pin(material.url.id, True)
        (reader, task) = (await create(store, other.url, other), await create(store, other.url, other))
        task.close()
        assert len(store.entries()) == 2
        reader.close()
        assert [entry.task.id for entry in store.entries()] == [material.url.id]

    run(main)


def test_it_is_withdrawn_from_the_network_before_it_is_deleted(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make()
        (await complete(store, material.url, material)).close()
        seen: list[tuple[bytes, int, object]] = []

        async def evicted(task_id: bytes) -> None:
            await trio.lowlevel.checkpoint()
            seen.append((task_id, len(store.entries()), store.open(task_id)))

        store.on_evict(evicted)
        assert await store.remove(material.url.id)
        assert seen == [(material.url.id, 1, None), (material.blob.id, 1, None)]
        assert store.entries() == []
        assert not await store.remove(material.url.id)

    run(main)


def test_a_fetch_of_what_is_just_being_deleted_waits_and_begins_anew(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make()
        (await complete(store, material.url, material)).close()
        entered, leave = trio.Event(), trio.Event()

        async def evicted(task_id: bytes) -> None:
            entered.set()
            await leave.wait()

        store.on_evict(evicted)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.remove, material.url.id)
            await entered.wait()

            async def fetch() -> None:
                with await create(store, material.url, material) as task:
                    assert not task.held.any()
                    write(task, material, 1)

            nursery.start_soon(fetch)
            await trio.testing.wait_all_tasks_blocked()
            assert not await store.remove(material.url.id)
            leave.set()
        assert store.statistics().used_bytes == 9000

    run(main)


def test_a_deletion_given_up_half_way_leaves_the_content_usable(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make()
        (await complete(store, material.url, material)).close()
        store.on_evict(never_answers)
        with trio.move_on_after(0.01):
            await store.remove(material.url.id)
        with opened(store, material.url.id) as task:
            assert task.read(0, 9000) == material.data

    run(main)


def test_a_network_that_does_not_answer_cannot_hold_up_making_room() -> None:
    material, other = Material(900), Material(900, seed=1)

    async def main() -> None:
        store = MemoryStore(quota_bytes=1000)
        store.on_evict(never_answers)
        (await complete(store, material.url, material)).close()
        start = trio.current_time()
        (await store.create(other.url, other.geometry)).close()
        assert trio.current_time() - start == pytest.approx(EVICT_SECONDS)
        store.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_dropped_pieces_are_forgotten_and_the_other_readers_told(make: Make) -> None:
    material, wrong = Material(20_000), Material(20_000, seed=1)

    async def main() -> None:
        store = make()
        told: list[tuple[str, list[int]]] = []
        with await create(store, material.url, material) as task, await create(store, material.url, material) as other:
            task.on_lost(lambda lost: told.append(("task", lost)))
            other.on_lost(lambda lost: told.append(("other", lost)))
            write(task, material, 0, 1, 4)
            write(task, wrong)
            assert await task.content_digest() != material.digest
            task.drop_pieces([3, 2, 2, 99, -1])
            task.drop_pieces([3])
            assert told == [("other", [2, 3])]
            assert other.held.to01() == "11001"
            assert task.piece_digest(2) is None
            write(task, material)
            assert await task.content_digest() == material.digest

    run(main)


def test_complete_content_that_lost_a_piece_is_repaired_under_any_of_its_names(make: Make) -> None:
    material = Material(20_000)

    async def main() -> None:
        store = make()
        with await complete(store, material.url, material) as task:
            task.drop_pieces([2])
            assert not task.complete
            assert task.digest == material.digest
        with await create(store, material.blob, material) as blob:
            assert blob.held.to01() == "11011"
            write(blob, material, 2)
            await blob.complete_with(await blob.content_digest())
        with opened(store, material.url.id) as task:
            assert task.complete
            assert task.read(0, 20_000) == material.data
        assert store.statistics().used_bytes == 20_000

    run(main)


def test_the_content_digest_needs_every_piece(make: Make) -> None:
    material = Material(20_000)

    async def main() -> None:
        with await create(make(), material.url, material) as task:
            write(task, material, 0, 1, 2, 3)
            with pytest.raises(LocalProtocolError):
                await task.content_digest()
            with pytest.raises(LocalProtocolError):
                await task.complete_with(material.digest)

    run(main)


def test_other_digest_algorithms_are_counted_too(make: Make) -> None:
    import hashlib

    material = Material(20_000)
    long = Digest("sha512", hashlib.sha512(material.data).hexdigest())

    async def main() -> None:
        store = make()
        with await create(store, blob_task(long), material) as task:
            write(task, material)
            assert await task.content_digest() == material.digest
            assert await task.content_digest("sha512") == long
            await task.complete_with(long)
        with opened(store, blob_task(long).id) as task:
            assert task.complete

    run(main)


def test_a_task_cannot_be_completed_with_a_digest_it_was_not_asked_for(make: Make) -> None:
    material, other = Material(5000), Material(5000, seed=1)

    async def main() -> None:
        with await create(make(), material.blob, material) as task:
            write(task, other)
            with pytest.raises(DigestMismatch):
                await task.complete_with(other.digest)
            assert not task.complete

    run(main)


def test_a_proof_is_given_back_for_the_task_it_was_made_for(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make()
        with await create(store, material.url, material) as task:
            write(task, material, 0, proof=signed(0))
            write(task, material)
            assert task.proof(0) == signed(0)
            assert task.proof(1) is task.proof(7) is task.proof(-1) is None
            await task.complete_with(material.digest)
        with opened(store, material.blob.id) as blob:
            assert blob.proof(0) is None
        with opened(store, material.url.id) as task:
            task.drop_pieces([0])
            assert task.proof(0) is None

    run(main)


def test_asking_by_digest_without_credentials_does_not_publish_private_content(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make()
        with await complete(store, material.url, material, private=True) as task:
            assert task.private
        with opened(store, material.blob.id) as blob:
            assert blob.private
        with await create(store, material.blob, material, private=False) as blob:
            assert blob.private
            blob.drop_pieces([1])
        with await create(store, material.blob, material, private=False) as blob:
            assert blob.private
            await complete(store, material.blob, material)

    run(main)


def test_private_content_is_public_by_digest_once_somebody_got_it_in_public(make: Make) -> None:
    material = Material(9000)
    public = url_task("http://public/same")

    async def main() -> None:
        store = make()
        (await complete(store, material.url, material, private=True)).close()
        (await create(store, material.blob, material)).close()
        (await complete(store, public, material)).close()
        private = {}
        for task_id in (material.url.id, public.id, material.blob.id):
            with opened(store, task_id) as task:
                private[task_id] = task.private
        assert private == {material.url.id: True, public.id: False, material.blob.id: False}
        with await create(store, material.blob, material, private=True) as blob:
            assert not blob.private

    run(main)


def test_content_is_public_under_its_names_and_its_digest_once_it_is_complete(make: Make) -> None:
    material = Material(9000)
    other = url_task("http://other/same")

    async def main() -> None:
        store = make()
        with await create(store, material.url, material) as task:
            assert store.public_names(material.url.id) == []
            write(task, material)
            await task.complete_with(material.digest)
        (await complete(store, other, material)).close()
        for task_id in (material.url.id, other.id, material.blob.id):
            assert store.public_names(task_id) == [material.blob.id, material.url.id, other.id]
        assert await store.remove(other.id)
        assert store.public_names(other.id) == []
        assert store.public_names(material.blob.id) == [material.blob.id, material.url.id]

    run(main)


def test_a_private_name_is_never_told_whoever_else_has_the_content_in_public(make: Make) -> None:
    material = Material(9000)
    public = url_task("http://public/same")

    async def main() -> None:
        store = make()
        (await complete(store, material.url, material, private=True)).close()
        assert store.public_names(material.url.id) == store.public_names(material.blob.id) == []
        (await complete(store, public, material)).close()
        assert store.public_names(material.url.id) == [material.blob.id, public.id]
        assert {entry.task.id for entry in store.entries() if not entry.private} == {public.id}

    run(main)


def test_content_that_lost_pieces_is_told_of_under_every_id_once_its_readers_know(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make()
        told: list[str] = []
        incomplete: list[list[bytes]] = []

        def lost(ids: list[bytes]) -> None:
            told.append("all")
            incomplete.append(ids)

        store.on_incomplete(lost)
        with await complete(store, material.url, material) as task, opened(store, material.blob.id) as other:
            other.on_lost(lambda lost: told.append("reader"))
            task.drop_pieces([1])
            task.drop_pieces([2])
            assert told == ["reader", "all", "reader"]
            assert incomplete == [[material.url.id, material.blob.id]]
            assert store.public_names(material.url.id) == []

    run(main)


def test_a_task_that_becomes_private_half_way_stays_so(make: Make) -> None:
    material = Material(9000)

    async def main() -> None:
        store = make()
        with await create(store, material.url, material) as task:
            assert not task.private
            write(task, material, 0)
        with await create(store, material.url, material, private=True):
            assert task.task == material.url
        with await create(store, material.url, material, private=False) as task:
            assert task.private

    run(main)


def test_entries_say_what_there_is(make: Make) -> None:
    material = Material(20_000)

    async def main() -> None:
        store = make(now=lambda: 1000.0)
        with await create(store, material.url, material, tag="t", application="a", private=True) as task:
            write(task, material, 0, 4)
            (entry,) = store.entries()
            assert (entry.task, entry.geometry, entry.held, entry.complete) == (material.url, material.geometry, 2, False)
            assert (entry.tag, entry.application, entry.private, entry.in_use, entry.pinned) == ("t", "a", True, True, False)
            assert (entry.created, entry.last_used, entry.digest) == (1000.0, 1000.0, None)
            write(task, material)
            await task.complete_with(material.digest)
        assert store.pin(material.blob.id, True)
        (entry, blob) = store.entries()
        assert entry.digest == material.digest
        assert not entry.pinned
        assert not entry.in_use
        assert entry.held == 5
        assert blob.task == replace(material.blob, shared=False), "private under its only name, and so under its digest"
        assert blob.pinned
        assert not store.pin(b"x" * 32, True)

    run(main)


def test_a_handle_does_nothing_after_it_was_closed(make: Make) -> None:
    material = Material(5000)

    async def main() -> None:
        task = await create(make(), material.url, material)
        task.close()
        task.close()
        for use in (lambda: task.held, lambda: task.slice(0, 0, 1), lambda: write(task, material)):
            with pytest.raises(LocalProtocolError):
                use()

    run(main)


def test_after_close_nothing_can_be_written(make: Make) -> None:
    material = Material(5000)

    async def main() -> None:
        store = make()
        task = await create(store, material.url, material)
        store.close()
        store.close()
        with pytest.raises(StoreError, match="closed"):
            write(task, material)
        task.close()

    run(main)


def test_content_with_too_many_pieces_is_refused(make: Make) -> None:
    async def main() -> None:
        with pytest.raises(StoreError, match="too many"):
            await make().create(url_task("http://x/"), Geometry(1 << 50, 1 << 22))

    run(main)


def test_a_simulated_store_believes_digests_and_keeps_no_bytes() -> None:
    material = Material(20_000)

    async def main() -> None:
        told: list[tuple[int, str]] = []

        def content_digest(digests: Any, algorithm: str) -> Digest:
            told.append((len(digests), algorithm))
            return material.digest

        store = MemoryStore(keep_bytes=False, content_digest=content_digest, now=trio.current_time)
        with await create(store, material.blob, material) as task:
            for piece in range(5):
                task.write_piece(piece, memoryview(b""), material.blake3(piece), None)
            assert await task.content_digest() == material.digest
            await task.complete_with(material.digest)
            part = task.slice(2, 0, 4096)
            assert part is not None
            assert part.fd == -1
            part.release()
        assert told == [(5, "sha256")]
        with opened(store, material.blob.id) as again:
            assert isinstance(again, OpenTask)
            assert again.complete
        store.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
