"""A queue of things to happen at a virtual time, drained by one trio task.

One task for all modelled links and transfers: a trio task for each would cost most of a large run.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import trio


class Events:
    """Calls scheduled functions in the order of their times; equal times in the order they were scheduled."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._earlier = trio.Event()
        self.happened = 0

    def at(self, time: float, function: Callable[[], None]) -> None:
        if not self._heap or time < self._heap[0][0]:
            self._earlier.set()
        heapq.heappush(self._heap, (time, next(self._numbers), function))

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
