"""What time it is for signed records, when some clocks are wrong.

Records carry wall time; everything else in the DHT is monotonic.  Every answer reports its sender's wall time.  A node
*stamps* its records with the median of all clocks, its own among them (a tie goes to its own), and *judges* others' by
its own clock or the median of the others: a minority of wrong clocks, and either of two that differ, do no harm.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

MAX_WITNESSES: Final = 64
MAX_SKEW: Final = 300.0
"""Seconds two clocks may differ before anything is done or said about it."""

_ROUNDING: Final = 1.5
"""Seconds a witness may seem to change its mind because answers carry whole seconds."""

_TOLERATED: Final = 60.0
"""A median within this of our own clock is our own clock, so that stamps do not wander with rounding and latency."""


class NetworkClock:
    """The witnesses' clocks, kept relative to the monotonic axis: a wall clock that jumps does not move them."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._offsets: OrderedDict[str, float] = OrderedDict()
        self._median: float | None = None

    def observe(self, witness: str, their_time: float, now: float) -> None:
        """An answer said what time it is; the last one of each witness counts."""
        offset = their_time - now
        if abs(self._offsets.get(witness, math.inf) - offset) <= _ROUNDING:
            self._offsets.move_to_end(witness)
            return
        self._median = None
        self._offsets[witness] = offset
        self._offsets.move_to_end(witness)
        while len(self._offsets) > MAX_WITNESSES:
            self._offsets.popitem(last=False)

    def wall(self) -> int:
        """Our own clock, for our answers."""
        return int(self._wall())

    def skew(self, now: float) -> float:
        """Seconds by which our own clock is ahead of the median of the others; 0 while there are none."""
        return 0.0 if not self._offsets else self._wall() - (self._others() + now)

    def stamp(self, now: float) -> int:
        """The time to write into our own records."""
        own = self._wall()
        clocks = sorted([own, *(offset + now for offset in self._offsets.values())])
        low, high = clocks[(len(clocks) - 1) // 2], clocks[len(clocks) // 2]
        if min(abs(own - low), abs(own - high)) <= _TOLERATED:
            return int(own)
        return int(low if abs(own - low) < abs(own - high) else high)

    def _others(self) -> float:
        if self._median is None:
            self._median = statistics.median(self._offsets.values())
        return self._median

    def remaining(self, issued: int, expires: int, now: float) -> float:
        """Seconds a record has left to live; 0 or less if it is expired, or was issued in the future."""
        clocks = [self._wall()]
        if self._offsets:
            clocks.append(self._others() + now)
        return max((expires - clock for clock in clocks if issued <= clock + MAX_SKEW), default=0.0)
