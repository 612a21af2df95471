"""Sends the frames of all links, in one task.

A broadcast is a frame for each of twenty links.  A task of each link that woke to send it took longer than the sending; a link
has such a task only for what its socket does not take at once.
"""

from __future__ import annotations

from typing import Final, NoReturn, Protocol

import trio

LINKS_AT_ONCE: Final = 32
"""After so many the other tasks of the node get their turn: some two milliseconds."""


class Flushed(Protocol):
    """What the flusher does with a link."""

    def flush(self, now: float) -> float: ...


class Flusher:
    """Run `run` in a nursery; `soon` says that a link may have something to send."""

    def __init__(self) -> None:
        self._due: dict[Flushed, None] = {}
        self._something = trio.Event()

    def soon(self, link: Flushed) -> None:
        """Have `link.flush` called, when those that run have posted what they have; it says when to call it again, infinite for
        not before the next `soon`.  It must not raise."""
        self._due[link] = None
        self._something.set()

    async def run(self) -> NoReturn:
        """Until cancelled."""
        while True:
            self._something = trio.Event()
            again = await self._flush()
            with trio.CancelScope(deadline=again):
                await self._something.wait()

    async def _flush(self) -> float:
        """Once through what is due; when something is due again."""
        due, self._due = self._due, {}
        again = float("inf")
        for number, link in enumerate(due, 1):
            at = link.flush(trio.current_time())
            if at < float("inf"):
                self._due[link] = None
                again = min(again, at)
            if number % LINKS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return again
