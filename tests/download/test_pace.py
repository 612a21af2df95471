"""When a driver decides, on a virtual clock that also runs late."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from swarm.download.pace import GATHER_MOST, GATHER_SECONDS, LATENESSES, Pace

LATE = 0.02
"""What a busy processor may add."""


def run(main: Callable[[trio.testing.MockClock], Awaitable[None]]) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(main, clock, clock=clock)


async def slept(pace: Pace, *changes: Callable[[], None], late: float = 0.0, clock: trio.testing.MockClock) -> float:
    """Seconds from these changes, made while it sleeps, to its awakening; the processor runs `late` after them."""
    woke: list[float] = []

    async def driver() -> None:
        await pace.sleep_until(trio.current_time() + 1000.0)
        woke.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        for change in changes:
            change()
        if late:
            clock.jump(GATHER_SECONDS + late)
    return woke[0] - began


def test_without_a_change_it_sleeps_to_its_deadline() -> None:
    async def main(clock: trio.testing.MockClock) -> None:
        assert await slept(Pace(), clock=clock) == 1000.0

    run(main)


def test_on_an_idle_machine_every_change_is_seen_within_milliseconds() -> None:
    async def main(clock: trio.testing.MockClock) -> None:
        pace = Pace()
        for _ in range(20):
            assert await slept(pace, pace.at_leisure, pace.at_leisure, clock=clock) == pytest.approx(GATHER_SECONDS)
            assert await slept(pace, pace.soon, clock=clock) == pytest.approx(GATHER_SECONDS)
        assert pace.lateness == pytest.approx(0.0)

    run(main)


def test_on_a_busy_machine_what_can_wait_is_gathered_for_longer_and_what_cannot_is_not() -> None:
    async def main(clock: trio.testing.MockClock) -> None:
        pace = Pace()
        await slept(pace, pace.soon, late=LATE, clock=clock)
        first = await slept(pace, pace.at_leisure, clock=clock)
        assert GATHER_SECONDS < first == pytest.approx(LATENESSES * LATE * 0.2)
        for _ in range(50):
            await slept(pace, pace.soon, late=LATE, clock=clock)
        assert await slept(pace, pace.at_leisure, clock=clock) == pytest.approx(GATHER_MOST)
        assert await slept(pace, pace.at_leisure, pace.soon, clock=clock) == pytest.approx(GATHER_SECONDS)

    run(main)


def test_when_the_machine_has_rest_again_decisions_are_as_quick_as_before() -> None:
    async def main(clock: trio.testing.MockClock) -> None:
        pace = Pace()
        for _ in range(50):
            await slept(pace, pace.soon, late=LATE, clock=clock)
        for _ in range(50):
            await slept(pace, pace.at_leisure, clock=clock)
        assert await slept(pace, pace.at_leisure, clock=clock) == pytest.approx(GATHER_SECONDS)

    run(main)


def test_a_change_while_the_driver_decides_is_not_slept_over() -> None:
    async def main(clock: trio.testing.MockClock) -> None:
        pace = Pace()
        pace.at_leisure()
        assert await slept(pace, clock=clock) == pytest.approx(GATHER_SECONDS)

    run(main)
