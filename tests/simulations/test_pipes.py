"""The modelled links: how long transfers take, and who shares them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from simulations.clock import run
from simulations.events import TICK, Events
from simulations.pipes import Downlink, Flow, Uplink, blocks_of

RATE = 1_000_000.0
MEGABYTE = 1_000_000
LATENCY = 0.01


class Links:
    """Some uplinks and downlinks; transfers between them note when they end."""

    def __init__(self) -> None:
        self.events = Events()
        self.ended: dict[str, float] = {}

    def uplink(self, rate: float = RATE) -> Uplink:
        return Uplink(self.events, rate)

    def downlink(self, rate: float = 100 * RATE) -> Downlink:
        return Downlink(self.events, rate)

    def send(self, name: str, uplink: Uplink, downlink: Downlink, size: int = MEGABYTE) -> Flow:
        def end() -> None:
            self.ended[name] = trio.current_time()

        flow = Flow(blocks_of(size), downlink, LATENCY, lambda _size: None, end)
        uplink.start(flow)
        return flow


def after(seconds: float, script: Callable[[Links], None]) -> dict[str, float]:
    """When which transfer had ended."""

    async def main() -> dict[str, float]:
        links = Links()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(links.events.run)
            script(links)
            await trio.sleep(seconds)
            nursery.cancel_scope.cancel()
        return links.ended

    return run(main, 1)


def nearly(seconds: float) -> object:
    """Give or take two blocks and their latency."""
    return pytest.approx(seconds, abs=2 * 128 * 1024 / RATE + 2 * LATENCY)


def test_a_transfer_takes_as_long_as_its_bytes_over_the_slower_link() -> None:
    assert after(5, lambda links: void(links.send("a", links.uplink(), links.downlink()))) == {"a": nearly(1.0)}
    assert after(5, lambda links: void(links.send("a", links.uplink(), links.downlink(RATE / 2)))) == {"a": nearly(2.0)}


def void(_: object) -> None:
    return None


def test_transfers_share_an_uplink_evenly_and_leave_it_to_those_that_are_left() -> None:
    def script(links: Links) -> None:
        uplink = links.uplink()
        links.send("short", uplink, links.downlink())
        links.send("long", uplink, links.downlink(), 2 * MEGABYTE)

    assert after(5, script) == {"short": nearly(2.0), "long": nearly(3.0)}


def test_a_slow_receiver_does_not_hold_up_the_others() -> None:
    def script(links: Links) -> None:
        uplink = links.uplink()
        links.send("slow", uplink, links.downlink(RATE / 10))
        links.send("fast", uplink, links.downlink())

    ended = after(15, script)
    assert ended["fast"] < 2.1
    assert ended["slow"] == nearly(10.0)


def test_senders_meet_at_a_downlink() -> None:
    def script(links: Links) -> None:
        downlink = links.downlink(RATE)
        for name in ("a", "b"):
            links.send(name, links.uplink(), downlink)

    assert max(after(5, script).values()) == nearly(2.0)


def test_rounding_to_ticks_does_not_slow_a_link_down() -> None:
    def script(links: Links) -> None:
        uplink = links.uplink(100 * RATE)
        for number in range(100):
            links.send(str(number), uplink, links.downlink(), MEGABYTE)

    ended = after(5, script)
    assert len(ended) == 100
    assert max(ended.values()) < 1.0 + LATENCY + 20 * TICK


def test_a_host_that_died_sends_nothing_more() -> None:
    def script(links: Links) -> None:
        uplink = links.uplink()
        links.send("a", uplink, links.downlink())

        def die() -> None:
            uplink.up = False

        links.events.at(0.5, die)

    assert after(5, script) == {}


def test_a_cancelled_transfer_gives_its_share_to_the_others() -> None:
    def script(links: Links) -> None:
        uplink = links.uplink()
        cancelled = links.send("cancelled", uplink, links.downlink())
        links.send("other", uplink, links.downlink())

        def cancel() -> None:
            cancelled.cancelled = True

        links.events.at(0.5, cancel)

    assert after(5, script) == {"other": nearly(1.25)}


def test_a_link_that_is_held_goes_on_afterwards() -> None:
    def script(links: Links) -> None:
        held, downlink = links.uplink(), links.downlink()
        links.send("sent", held, downlink)
        links.send("received", links.uplink(), held_downlink := links.downlink())
        for link in (held, held_downlink):
            links.events.at(0.5, lambda link=link: link.hold(10.0))  # type: ignore[misc]

    ended = after(15, script)
    assert ended["sent"] == nearly(10.5)
    assert 10.0 <= ended["received"] < 10.6


@pytest.mark.parametrize("size", [1, 16 * 1024, 65_535, 256 * 1024, 4 * 1024 * 1024 + 1])
def test_blocks_are_all_of_the_bytes(size: int) -> None:
    blocks = blocks_of(size)
    assert sum(blocks) == size
    assert all(0 < block <= 128 * 1024 for block in blocks)


def test_events_of_one_tick_happen_in_the_order_they_were_scheduled_in() -> None:
    happened: list[int] = []

    def script(links: Links) -> None:
        for number in range(50):
            links.events.at(0.1 + (number % 2) * TICK / 10, lambda number=number: happened.append(number))  # type: ignore[misc]
        links.events.at(0.05, lambda: happened.append(-1))

    after(1, script)
    assert happened[0] == -1
    assert happened[1:] == sorted(happened[1:], key=lambda number: (number % 2, number))
