"""When a task's driver decides anew: soon after something has changed, and less often on a busy machine."""

from __future__ import annotations

from typing import Final

import trio

INFINITY: Final = float("inf")

GATHER_SECONDS: Final = 0.005
"""A burst of messages and pieces is gathered so long before the exchange decides: waking for each is what costs a busy node."""

LATENESSES: Final = 8.0
GATHER_MOST: Final = 0.08
"""Where decisions come late, for the processor is busy, what can wait is gathered for eight times as long as that, 80 ms at
most: fewer decisions, each for more, and what they say goes in fewer messages (twenty hosts on two cores: a third of the
decisions, and 10 % less time).  A fixed 80 ms would cost time where links, and not processors, are what a fetch waits for."""

_WEIGHT: Final = 0.2
"""Of the latest decision in the mean lateness."""


class Pace:
    """Attributes:
    lateness: By how many seconds decisions came later than they were due, of late.
    """

    def __init__(self) -> None:
        self.lateness = 0.0
        self._due = INFINITY
        self._timer = trio.CancelScope()

    def soon(self) -> None:
        """Something changed that cannot wait."""
        self._decide_by(trio.current_time() + GATHER_SECONDS)

    def at_leisure(self) -> None:
        """Something changed as it does with each message and piece."""
        if self._due == INFINITY:
            self._decide_by(trio.current_time() + max(GATHER_SECONDS, min(GATHER_MOST, LATENESSES * self.lateness)))

    async def sleep_until(self, deadline: float) -> None:
        """Until something has changed, a little while ago; `deadline` at the latest."""
        with trio.CancelScope(deadline=min(deadline, self._due)) as self._timer:
            await trio.sleep_forever()
        if self._due < INFINITY:
            self.lateness += _WEIGHT * (max(0.0, trio.current_time() - self._due) - self.lateness)
            self._due = INFINITY

    def _decide_by(self, when: float) -> None:
        if when < self._due:
            self._due = when
            self._timer.deadline = min(self._timer.deadline, when)
