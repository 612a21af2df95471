"""Memory kept warm is released as it is used, and no faster."""

from __future__ import annotations

import threading

from tests.benchmarks import memory
from tests.benchmarks.memory import CHUNK_BYTES, Kept

MIB = 1024 * 1024


def test_what_is_kept_is_given_back_from_the_end_until_nothing_is_left():
    kept = Kept(10 * MIB)
    assert kept.left == 3 * CHUNK_BYTES
    kept.release(5 * MIB)
    assert kept.left == 7 * MIB
    kept.release(100 * MIB)
    assert kept.left == 0
    kept.close()


def test_as_much_is_released_as_the_machine_has_less(monkeypatch):
    shrinking = iter([1000 * MIB, 1000 * MIB, 990 * MIB, 960 * MIB, 950 * MIB])
    looked = threading.Event()

    def free() -> int:
        value = next(shrinking, None)
        if value is None:
            looked.set()
            return 1000 * MIB
        return value

    monkeypatch.setattr(memory, "free_bytes", free)
    monkeypatch.setattr(memory, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(memory, "HEADROOM_BYTES", 8 * MIB)
    kept = Kept(120 * MIB)
    with kept.giving():
        assert looked.wait(10)
    assert kept.left == (120 - 8 - 40 - 50) * MIB, "less than LEAST_BYTES is not worth a call"
    kept.close()


def test_what_is_free_is_read():
    assert memory.free_bytes() > 0
