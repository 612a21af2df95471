"""Memory that the host of a virtual machine has given already, let go of as fast as the hosts of a case fill theirs.

A virtual machine's host takes unused memory back within seconds, and gives it again page by page: the first write to each costs
a fault to the host, 2 CPU-s/GiB here, as much as all the work of a fetch.  Hosts that had memory of their own would not pay
for it.  So as much as a case will use is touched before its clock starts, and kept; while the case runs, that much of it is
released at every look as the machine's free memory has shrunk, so that what the hosts take is what was just released.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

MIB: Final = 1024 * 1024
HEADROOM_BYTES: Final = 768 * MIB
"""Released at once: what twenty hosts fill between two looks, and some."""

LOOK_SECONDS: Final = 0.05
LEAST_BYTES: Final = 32 * MIB
"""Shrunk by less, nothing is released."""

CHUNK_BYTES: Final = 4 * MIB


def free_bytes() -> int:
    """Memory that nobody uses, not even for files."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemFree:"):
                return int(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo has no MemFree")


class Kept:
    """Touched memory; `release` gives it back from the end.

    A file in memory, of pages of 4 KiB: freed huge pages are what a host takes back first.
    """

    def __init__(self, size: int) -> None:
        """Takes two seconds or three for each GiB.  `size` in bytes, rounded up to whole chunks."""
        self._fd = os.memfd_create("kept", os.MFD_CLOEXEC)
        self.left = 0
        zeros = bytes(CHUNK_BYTES)
        while self.left < size:
            self.left += os.write(self._fd, zeros)

    def release(self, count: int) -> None:
        """Give back `count` bytes, or all that is left."""
        self.left = max(0, self.left - count)
        os.ftruncate(self._fd, self.left)

    def close(self) -> None:
        os.close(self._fd)

    @contextmanager
    def giving(self) -> Iterator[None]:
        """While this is open, what the machine uses more is released here."""
        self.release(HEADROOM_BYTES)
        over = threading.Event()
        thread = threading.Thread(target=self._give, args=(free_bytes(), over), name="kept-memory")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _give(self, level: int, over: threading.Event) -> None:
        while not over.wait(LOOK_SECONDS):
            shrunk = level - free_bytes()
            if shrunk >= LEAST_BYTES:
                self.release(shrunk)


@contextmanager
def kept(size: int) -> Iterator[Kept]:
    """`size` bytes of touched memory, and the headroom."""
    memory = Kept(size + HEADROOM_BYTES)
    try:
        yield memory
    finally:
        memory.close()
