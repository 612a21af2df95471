"""Equal questions asked at the same time are asked once (SECURITY: R27, R29)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import trio

from swarm.errors import SwarmError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Flight(Generic[V]):
    __slots__ = ("done", "error", "value")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: SwarmError | None = None
        self.value: list[V] = []


class Flights(Generic[K, V]):
    """Who comes while a question is being asked waits for its answer, or its failure."""

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[V]] = {}

    async def share(self, key: K, ask: Callable[[], Awaitable[V]]) -> V:
        """The answer to `key`.  Where whoever asked goes away, one of those who wait asks instead, not all of them.

        Raises:
            SwarmError: As `ask`, for everybody who waited.
        """
        while (flight := self._flights.get(key)) is not None:
            await flight.done.wait()
            if flight.error is not None:
                raise flight.error.with_traceback(None)
            if flight.value:
                return flight.value[0]
        flight = self._flights[key] = _Flight()
        try:
            value = await ask()
            flight.value.append(value)
            return value
        except SwarmError as error:
            flight.error = error
            raise
        finally:
            del self._flights[key]
            flight.done.set()
