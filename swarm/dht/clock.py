"""What time it is for signed records, when some clocks are wrong.

Records carry wall time; everything else in the DHT is monotonic.  Every answer reports its sender's wall time.  A node
*stamps* its records with the median of all clocks, its own among them (a tie goes to its own), and *judges* others' by
its own clock, the median of the others or the clock of the record's writer, whichever lets it live longest: a minority of
wrong clocks, and either of two that differ, do no harm.  A record that lives too long costs a dial; one that is refused
costs the origin a copy.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

MAX_WITNESSES: Final = 64
FEW: Final = 2
"""Fewer witnesses than this do not show whose clock is wrong."""
CORRECTION_PAUSE: Final = 60.0
"""Seconds between corrections of our stamps: each signs and announces everything anew, and others' clocks cause it."""
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
        self._medians: tuple[float, float] | None = None
        self._correction = 0.0
        self._corrected = -math.inf

    def observe(self, witness: str, their_time: float, now: float) -> None:
        """An answer said what time it is; the last one of each witness counts."""
        offset = their_time - now
        if abs(self._offsets.get(witness, math.inf) - offset) <= _ROUNDING:
            self._offsets.move_to_end(witness)
            return
        self._medians = None
        self._offsets[witness] = offset
        self._offsets.move_to_end(witness)
        while len(self._offsets) > MAX_WITNESSES:
            self._offsets.popitem(last=False)

    def wall(self) -> int:
        """Our own clock, for our answers."""
        return int(self._wall())

    def skew(self, now: float) -> float:
        """Seconds by which our own clock is ahead of the median of the others; 0 while there are none.

        Of an even number there are two medians, and between them nobody can say who is wrong.
        """
        own = self._wall()
        low, high = self._others(now) or (own, own)
        return own - min(max(own, low), high)

    def is_wrong(self, now: float) -> bool:
        """Whether enough others agree that our own clock is."""
        return len(self._offsets) >= FEW and abs(self.skew(now)) > MAX_SKEW

    def corrected(self, now: float) -> bool:
        """Whether stamps differ from those before this call by so much that records have to be signed anew."""
        correction = self.stamp(now) - self._wall()
        if abs(correction - self._correction) <= MAX_SKEW or now < self._corrected + CORRECTION_PAUSE:
            return False
        self._correction, self._corrected = correction, now
        return True

    def stamp(self, now: float) -> int:
        """The time to write into our own records."""
        own = self._wall()
        clocks = sorted([own, *(offset + now for offset in self._offsets.values())])
        low, high = clocks[(len(clocks) - 1) // 2], clocks[len(clocks) // 2]
        if min(abs(own - low), abs(own - high)) <= _TOLERATED:
            return int(own)
        return int(low if abs(own - low) < abs(own - high) else high)

    def _others(self, now: float) -> tuple[float, float] | None:
        """The lower and the upper median of the others' clocks."""
        if not self._offsets:
            return None
        if self._medians is None:
            offsets = sorted(self._offsets.values())
            self._medians = offsets[(len(offsets) - 1) // 2], offsets[len(offsets) // 2]
        low, high = self._medians
        return low + now, high + now

    def remaining(self, issued: int, expires: int, now: float, writer: str = "") -> float:
        """Seconds a record has left to live; 0 or less if it is expired, or was issued in the future.

        Args:
            writer: Which witness wrote it, if that is known.
        """
        clocks = [self._wall(), *(self._others(now) or ())]
        if writer in self._offsets:
            clocks.append(self._offsets[writer] + now)
        return max((expires - clock for clock in clocks if issued <= clock + MAX_SKEW), default=0.0)
