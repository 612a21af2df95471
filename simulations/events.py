"""A queue of things to happen at a virtual time, drained by one trio task.

One task for all modelled links and transfers: a trio task for each would cost most of a large run.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

import trio

TICK = 0.001
"""Things happen on a grid of so many seconds: waking up for each of a million events would be most of a run's cost."""


def on_grid(time: float) -> float:
    """The first tick not before `time`."""
    return math.ceil(time / TICK - 1e-6) * TICK


class Events:
    """Calls scheduled functions in the order of their ticks; in one tick in the order they were scheduled."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._earlier = trio.Event()
        self.happened = 0

    def at(self, time: float, function: Callable[[], None]) -> None:
        tick = on_grid(time)
        if not self._heap or tick < self._heap[0][0]:
            self._earlier.set()
        heapq.heappush(self._heap, (tick, next(self._numbers), function))

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        self.at(trio.current_time() + seconds, function)

    async def run(self) -> None:
        while True:
            self._earlier = trio.Event()
            with trio.move_on_at(self._heap[0][0] if self._heap else float("inf")):
                await self._earlier.wait()
            now = trio.current_time()
            while self._heap and self._heap[0][0] <= now:
                _, _, function = heapq.heappop(self._heap)
                self.happened += 1
                function()
