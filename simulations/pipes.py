"""Modelled bandwidth: an uplink shared block by block among its transfers, a downlink that takes blocks in turn.

Round robin over blocks is a work-conserving equal split, like TCP flows of equal round-trip time; a window of blocks
per transfer keeps a slow receiver from holding the sender's uplink.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from simulations.events import TICK, Events

WINDOW_BLOCKS = 4


@dataclass(eq=False, slots=True)
class Flow:
    """One transfer.

    Attributes:
        on_block: Called with the number of bytes that arrived.
        on_departure: Called with the number of bytes that left the uplink.
        on_sent: Called when the last block has left the uplink: the sender may start the next transfer.
        on_end: Called when the last block has arrived.
    """

    blocks: deque[int]
    downlink: Downlink
    latency: float
    on_block: Callable[[int], None]
    on_end: Callable[[], None]
    on_sent: Callable[[], None] = lambda: None
    on_departure: Callable[[int], None] = lambda _size: None
    in_flight: int = 0
    queued: bool = False
    cancelled: bool = False
    begun: float = 0.0
    moved: float = 0.0
    """When its last block arrived."""
    received: int = 0


def blocks_of(size: int) -> deque[int]:
    """Cut a transfer into at least four blocks of 16 to 128 KiB, as long as it is large enough."""
    block = max(16 * 1024, min(128 * 1024, size // 4))
    whole, rest = divmod(size, block)
    return deque([block] * whole + ([rest] if rest else []))


@dataclass(eq=False, slots=True)
class Downlink:
    """Blocks are received one after the other at `rate` bytes a second."""

    events: Events
    rate: float
    _free_at: float = 0.0

    def hold(self, until: float) -> None:
        """Receive nothing before then."""
        self._free_at = max(self._free_at, until)

    def receive(self, size: int, then: Callable[[], None]) -> None:
        now = trio.current_time()
        self._free_at = max(self._free_at, now) + size / self.rate
        self.events.at(self._free_at, then)


@dataclass(eq=False, slots=True)
class Uplink:
    """Sends the next block of each ready flow in turn at `rate` bytes a second."""

    events: Events
    rate: float
    sent: int = 0
    up: bool = True
    _ready: deque[Flow] = field(default_factory=deque)
    _busy: bool = False
    _free_at: float = 0.0
    """Exactly when the last block has left: events happen on a grid, and rounding must not slow the link down."""

    def start(self, flow: Flow) -> None:
        self._offer(flow)

    def hold(self, until: float) -> None:
        """Send nothing before then, but for the block that is leaving."""
        self._free_at = max(self._free_at, until)

    def _offer(self, flow: Flow) -> None:
        if flow.blocks and not flow.queued and flow.in_flight < WINDOW_BLOCKS and not flow.cancelled:
            flow.queued = True
            self._ready.append(flow)
            if not self._busy:
                self._free_at = max(self._free_at, trio.current_time() - TICK)
                self._send()

    def _send(self) -> None:
        while not self._busy and self._ready:
            flow = self._ready.popleft()
            flow.queued = False
            if flow.cancelled or not self.up:
                continue
            size = flow.blocks.popleft()
            flow.in_flight += 1
            self._busy = True
            self.sent += size
            self._free_at += size / self.rate
            self.events.at(self._free_at, partial(self._gone, flow, size))
            self._offer_later(flow)

    def _offer_later(self, flow: Flow) -> None:
        if flow.blocks and not flow.queued and flow.in_flight < WINDOW_BLOCKS:
            flow.queued = True
            self._ready.append(flow)

    def _gone(self, flow: Flow, size: int) -> None:
        self._busy = False
        if self.up and not flow.cancelled:
            self.events.after(flow.latency, lambda: flow.downlink.receive(size, lambda: self._arrived(flow, size)))
            flow.on_departure(size)
            if not flow.blocks:
                flow.on_sent()
        self._send()

    def _arrived(self, flow: Flow, size: int) -> None:
        if flow.cancelled or not self.up:
            return
        flow.in_flight -= 1
        flow.moved = trio.current_time()
        flow.received += size
        flow.on_block(size)
        if not flow.blocks and not flow.in_flight:
            flow.on_end()
        else:
            self._offer(flow)
